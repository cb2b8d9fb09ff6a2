"""Pictures that are in a dataset more than once: within a split, and in two splits (a leak).

Receives digests, hashes and thumbnails of all pictures (see `hashes`), split after split. Gives pairs of their numbers.
Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmgem.data.audit.hashes import likeness, near_pairs

_NONE = np.iinfo(np.int64).max
_BATCH = 1 << 14

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pairs:
    """P pairs of pictures by their numbers: of the same bytes, or near. likeness: of the grey levels of thumbnails."""

    pairs_P2: Numbers
    identical_P: NDArray[np.bool_]
    likeness_P: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pairs_P2)


class Duplicates:
    """`within[s]`: pairs of split s, in which each copy stands at least once. `across[s, t]`, s < t: leaks, in which
    each picture of either split that is in the other, too, stands at least once.

    E kinds of bytes and G groups of pictures that are the same to the eye number what is compared. What grows with
    the number of copies is never compared pair by pair.
    """

    def __init__(
        self,
        digests_N: NDArray[np.uint64],
        hashes_N2: NDArray[np.uint64],
        thumbs_NC: NDArray[np.uint8],
        splits: Sequence[range],
    ) -> None:
        """A digest of 0 marks a picture that is left out; `splits` are the numbers of the pictures of each."""
        self._splits, self._thumbs_NC = splits, thumbs_NC
        self._used = np.flatnonzero(digests_N)
        _, first, bytes_n = np.unique(digests_N[self._used], return_index=True, return_inverse=True)
        group_n, leader_G = self._grouped(hashes_N2, self._used[first])
        self._bytes_N = self._spread(bytes_n, len(digests_N))
        self._group_N = self._spread(group_n[bytes_n], len(digests_N))
        self._first_SE = self._first_of(self._bytes_N, len(first))
        self._first_SG = self._first_of(self._group_N, len(leader_G))
        self._nearest_SG = self._nearest(hashes_N2, leader_G)
        count = range(len(splits))
        self.within = [self._within(split) for split in count]
        self.across = {(s, t): self._across(s, t) for s in count for t in count if s < t}

    def _grouped(self, hashes_N2: NDArray[np.uint64], numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The group of each picture, and a leader of each group: those of one hash that are near the first of them."""
        _, first, inverse = np.unique(hashes_N2[numbers], axis=0, return_index=True, return_inverse=True)
        leader_n = first[inverse.ravel()]
        alone = (hashes_N2[numbers] == 0).all(axis=1)  # plain ones, each by itself
        for start in range(0, len(numbers), _BATCH):
            part = slice(start, start + _BATCH)
            alone[part] |= ~likeness(self._thumbs_NC[numbers[part]], self._thumbs_NC[numbers[leader_n[part]]])[1]
        leader_n[alone] = np.flatnonzero(alone)
        leaders, group_n = np.unique(leader_n, return_inverse=True)
        return group_n, numbers[leaders]

    def _spread(self, values_n: Numbers, count: int) -> Numbers:
        """Values of the used pictures -> values of all, -1 for those left out."""
        values_N = np.full(count, -1, dtype=np.int64)
        values_N[self._used] = values_n
        return values_N

    def _first_of(self, kind_N: Numbers, kinds: int) -> Numbers:
        """S x kinds: the first picture of each kind in each split, or -1."""
        first = np.full((len(self._splits), kinds), -1, dtype=np.int64)
        for split, numbers in enumerate(self._splits):
            listed = self._of(numbers)[::-1]
            first[split, kind_N[listed]] = listed  # the first one is written last
        return first

    def _nearest(self, hashes_N2: NDArray[np.uint64], leader_G: Numbers) -> Numbers:
        """S x G: of each group the likest other group that has pictures in the split, or -1."""
        best_SG = np.full(self._first_SG.shape, _NONE, dtype=np.int64)
        for i, j, like in near_pairs(hashes_N2, self._thumbs_NC, leader_G):
            unlike = np.round((1 - np.minimum(like, 1)) * 1e6).astype(np.int64) << 32
            g, h = self._group_N[i], self._group_N[j]
            for best_G, first_G in zip(best_SG, self._first_SG, strict=True):
                for a, b in ((g, h), (h, g)):
                    there = first_G[b] >= 0
                    np.minimum.at(best_G, a[there], (unlike | b)[there])
        return np.where(best_SG == _NONE, -1, best_SG & 0xFFFFFFFF)

    def _within(self, split: int) -> Pairs:
        numbers = self._of(self._splits[split])
        partner = self._partner(split, numbers, numbers)
        return self._pairs(np.stack([numbers, partner], axis=1)[partner >= 0])

    def _across(self, s: int, t: int) -> Pairs:
        found = []
        for own, other in ((s, t), (t, s)):
            numbers = self._of(self._splits[own])
            partner = self._partner(other, numbers)
            found.append(np.stack([numbers, partner], axis=1)[partner >= 0])
        return self._pairs(np.concatenate(found))

    def _of(self, numbers: range) -> Numbers:
        """The pictures of a split that are used."""
        return self._used[slice(*np.searchsorted(self._used, (numbers.start, numbers.stop)))]

    def _partner(self, split: int, numbers: Numbers, but: Numbers | None = None) -> Numbers:
        """For each picture one of the split (`but` itself), or -1: of the same bytes, else of its group, else near."""
        nearest = self._nearest_SG[split, self._group_N[numbers]]
        choices = (
            self._first_SE[split, self._bytes_N[numbers]],
            self._first_SG[split, self._group_N[numbers]],
            np.where(nearest >= 0, self._first_SG[split, nearest], -1),
        )
        partner = np.full(len(numbers), -1, dtype=np.int64)
        for choice in choices:
            good = (partner < 0) & (choice >= 0) & (True if but is None else choice != but)
            partner[good] = choice[good]
        return partner

    def _pairs(self, pairs: Numbers) -> Pairs:
        """Each pair once, in the order of the pictures."""
        pairs_P2 = np.unique(np.sort(pairs, axis=1), axis=0)  # an earlier split has the smaller numbers
        identical_P = self._bytes_N[pairs_P2[:, 0]] == self._bytes_N[pairs_P2[:, 1]]
        likeness_P = np.ones(len(pairs_P2))
        for rows in np.array_split(np.flatnonzero(~identical_P), 1 + len(pairs_P2) // _BATCH):
            likeness_P[rows] = likeness(*(self._thumbs_NC[pairs_P2[rows, side]] for side in (0, 1)))[0]
        return Pairs(pairs_P2, identical_P, likeness_P)
