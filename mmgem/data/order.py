"""Which sample stands where: pure arithmetic, no I/O, no state.

Receives the samples of each shard, the sources they belong to and a seed. Gives, for any global position of a stage,
the epoch and the number of the sample, and for a step the positions of each rank. Nothing depends on ranks, workers or
on what was read before, so a run resumes exactly from one integer, on any number of ranks. Memory grows with the
number of shards, not of samples. Refuses weights that cannot be kept.

The way of a position p in a source of N samples:
    epoch e = p // N                        each epoch is another order
    lane l  = (p % N) % lanes               the epoch is walked at so many places at once
    i       = where lane l has come to      the lanes cut the epoch's sequence into equal parts
    window  = the few shards round i        of the shards in this epoch's permutation
    sample  = i permuted inside its window
So a rank that reads its own lanes reads its own few shards at a time, and a batch holds samples of many shards.

The permutations are Feistel networks with cycle walking (Black and Rogaway 2002), on modular sums, with SplitMix64's
mixing function (Steele et al. 2014) for the rounds: they need no memory, and are the same in every version of NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmgem.errors import UserError

PERIOD = 10_000
"""Positions in which each weighted source has its exact share; any so many in a row have it too."""

_ROUNDS = 8


class Order:
    """The order of all samples of a stage: positions 0, 1, 2 …"""

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        seed: int,
        window: int = 4,
        lanes: int = 8,
        sources: Sequence[tuple[int, float]] = (),
    ):
        """sizes: samples of each shard, all sources one after the other. window: shards that are mixed. lanes: see
        above. sources: shards and weight of each source; without them all are one. Raises UserError."""
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        self.window, self.lanes = window, lanes
        self._pattern = _Pattern.of([weight for _, weight in sources], seed) if sources else None
        ends = np.cumsum([shards for shards, _ in sources] if sources else [len(self.sizes)]).tolist()
        self._walks = []
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            key = int(_key(seed, number)[0])
            first = int(self.sizes[:begin].sum())
            self._walks.append(_Walk(self.sizes[begin:end], begin, first, key, window, lanes))

    def places(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global positions -> the epoch (of the source) and the number of each sample."""
        positions_P = np.asarray(positions, dtype=np.int64)
        epoch_P, sample_P = np.empty_like(positions_P), np.empty_like(positions_P)
        for walk, chosen_P, drawn in self._parts(positions_P):
            epoch_P[chosen_P], sample_P[chosen_P] = walk.places(drawn)
        return epoch_P, sample_P

    def at(self, position: int) -> tuple[int, int]:
        """Global position -> (epoch, number of the sample)."""
        epoch_P, sample_P = self.places([position])
        return int(epoch_P[0]), int(sample_P[0])

    def step(self, step: int, global_batch: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """The positions of a step that are a rank's; those of all ranks, in order, are the same for any `ranks`.

        A step has the positions step * global_batch … (step + 1) * global_batch - 1, sorted by lane; micro-batches are
        consecutive parts of a rank's. `global_batch` must be a multiple of `ranks`.
        """
        positions_G = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        part = global_batch // ranks
        by_lane_G = np.argsort(self.lanes_of(positions_G), kind="stable")
        return positions_G[by_lane_G[rank * part : (rank + 1) * part]]

    def lanes_of(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The lane of each position."""
        positions_P = np.asarray(positions, dtype=np.int64)
        lane_P = np.empty_like(positions_P)
        for walk, chosen_P, drawn in self._parts(positions_P):
            lane_P[chosen_P] = walk.lane(drawn)
        return lane_P

    def shards(self, positions: Sequence[int] | np.ndarray, windows_on: int = 0) -> list[int]:
        """The shards of all windows that these positions are in, or that their lanes come to so many (average) windows
        later."""
        found: set[int] = set()
        for walk, _, drawn in self._parts(np.asarray(positions, dtype=np.int64)):
            found |= walk.window_shards(drawn + windows_on * walk.window_samples * self.lanes)
        return sorted(found)

    def drawn(self, positions: int) -> list[int]:
        """How many of the first so many positions are each source's."""
        if self._pattern is None:
            return [positions]
        whole, rest = divmod(positions, PERIOD)
        counts = np.bincount(self._pattern.source[:rest], minlength=len(self._walks))
        return (whole * self._pattern.quotas + counts).tolist()

    def lane_shards(self, lanes: Sequence[int] | np.ndarray, positions: int) -> list[np.ndarray]:
        """Of each source, the shards of the windows that these lanes come through in the first so many positions, but
        at most in one epoch."""
        drawn = self.drawn(positions)
        return [walk.lane_shards(np.asarray(lanes), count) for walk, count in zip(self._walks, drawn, strict=True)]

    def _parts(self, positions_P: np.ndarray) -> list[tuple[_Walk, np.ndarray, np.ndarray]]:
        """Of each source: its walk, which of the positions are its, and how many it had given before each."""
        if self._pattern is None:
            return [(self._walks[0], np.ones(len(positions_P), dtype=bool), positions_P)]
        source_P, drawn_P = self._pattern.split(positions_P)
        chosen = [(walk, source_P == number) for number, walk in enumerate(self._walks)]
        return [(walk, mask_P, drawn_P[mask_P]) for walk, mask_P in chosen if mask_P.any()]


class _Walk:
    """The endless sequence of one source's samples, epoch after epoch."""

    def __init__(self, sizes: np.ndarray, first_shard: int, first_sample: int, key: int, window: int, lanes: int):
        self.sizes, self.first_shard, self.first_sample = sizes, first_shard, first_sample
        self.key, self.window, self.lanes = key, window, lanes
        self.samples = int(sizes.sum())
        self.window_samples = max(1, self.samples * window // max(1, len(sizes)))
        self.starts = np.cumsum(sizes) - sizes
        self.plan = lru_cache(maxsize=2)(self._plan)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.plan = lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's shards in order, where each begins in its sequence, and where each window does."""
        count = len(self.sizes)
        shards = permute(np.arange(count), np.full(count, count), np.full(count, _key(self.key, epoch)))
        starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return shards, starts, np.append(starts[:-1][:: self.window], starts[-1])

    def lane(self, drawn_P: np.ndarray) -> np.ndarray:
        return drawn_P % self.samples % self.lanes

    def places(self, drawn_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch_P, sample_P = drawn_P // self.samples, np.empty_like(drawn_P)
        for epoch in np.unique(epoch_P).tolist():
            now_P = epoch_P == epoch
            shards, starts, windows = self.plan(epoch)
            i_P, window_P = self._windows(drawn_P[now_P], windows)
            begin_P, size_P = windows[window_P], windows[window_P + 1] - windows[window_P]
            key_P = _key(self.key, epoch, window_P)
            i_P = begin_P + permute(i_P - begin_P, size_P, key_P)
            slot_P = np.searchsorted(starts, i_P, side="right") - 1
            sample_P[now_P] = self.first_sample + self.starts[shards[slot_P]] + i_P - starts[slot_P]
        return epoch_P, sample_P

    def window_shards(self, drawn_P: np.ndarray) -> set[int]:
        found: set[int] = set()
        epoch_P = drawn_P // self.samples
        for epoch in np.unique(epoch_P).tolist():
            shards, _, windows = self.plan(epoch)
            for window in np.unique(self._windows(drawn_P[epoch_P == epoch], windows)[1]).tolist():
                begin = window * self.window
                found.update((self.first_shard + shards[begin : begin + self.window]).tolist())
        return found

    def lane_shards(self, lane_L: np.ndarray, drawn: int) -> np.ndarray:
        shards, _, windows = self.plan(0)
        drawn = min(drawn, self.samples)
        first_L = lane_L[lane_L < drawn]
        last_L = first_L + (drawn - 1 - first_L) // self.lanes * self.lanes
        read = np.zeros(len(windows) - 1, dtype=bool)
        for begin, end in zip(self._windows(first_L, windows)[1], self._windows(last_L, windows)[1], strict=True):
            read[begin : end + 1] = True
        return self.first_shard + shards[np.repeat(read, self.window)[: len(shards)]]

    def _windows(self, drawn_P: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of each in its epoch's sequence, and the number of its window."""
        offset_P = drawn_P % self.samples
        lane_P, walked_P = offset_P % self.lanes, offset_P // self.lanes
        whole, rest = divmod(self.samples, self.lanes)
        i_P = lane_P * whole + np.minimum(lane_P, rest) + walked_P
        return i_P, np.searchsorted(windows, i_P, side="right") - 1


@dataclass(frozen=True)
class _Pattern:
    """Which source each of PERIOD positions has; repeated for ever, so that any PERIOD in a row have the exact shares.

    A source's places are spread evenly, each moved at random inside its own stretch: batches then have the shares too,
    and no rank always meets the same source.
    """

    source: np.ndarray
    before: np.ndarray
    """How often each position's source stands before it in the period."""
    quotas: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[float], seed: int) -> _Pattern:
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        quotas = np.floor(share * PERIOD).astype(np.int64)
        largest = np.argsort(-(share * PERIOD - quotas), kind="stable")
        quotas[largest[: PERIOD - int(quotas.sum())]] += 1
        if not quotas.all():
            others = np.sum(weights) - weights[int(np.argmin(quotas))]
            raise UserError(
                f"data.sources: a weight is below 1/{PERIOD} of their sum ({list(weights)}); raise it to "
                f"{1.01 * others / (PERIOD - 1):.3g}, or leave it out"
            )
        source = np.repeat(np.arange(len(quotas)), quotas)
        turn = np.arange(PERIOD) - np.repeat(np.cumsum(quotas) - quotas, quotas)
        jitter = _key(seed, source, turn) / 2.0**64
        order = np.argsort((turn + jitter) / quotas[source], kind="stable")
        return cls(source[order], turn[order], quotas)

    def split(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each position its source, and how many positions before it were the same source's."""
        period_P, offset_P = positions_P // PERIOD, positions_P % PERIOD
        source_P = self.source[offset_P]
        return source_P, period_P * self.quotas[source_P] + self.before[offset_P]


def permute(index_P: np.ndarray, size_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
    """Where index 0 … size - 1 comes to in the permutation that (size, key) stand for."""
    result_P = np.asarray(index_P, dtype=np.int64).copy()
    size_P = np.asarray(size_P, dtype=np.int64)
    # Even, since with two odd sides the rounds make even permutations only.
    left_P = 2 * np.maximum(1, np.ceil(np.sqrt(size_P) / 2).astype(np.int64))
    right_P = -(-size_P // left_P)
    walking = np.arange(len(result_P))
    while len(walking):
        a, b, key = left_P[walking], right_P[walking], key_P[walking]
        high, low = result_P[walking] // a, result_P[walking] % a
        for turn in range(_ROUNDS):
            low = (low + _round(key, 2 * turn, high, a)) % a
            high = (high + _round(key, 2 * turn + 1, low, b)) % b
        result_P[walking] = high * a + low
        walking = walking[result_P[walking] >= size_P[walking]]
    return result_P


def _round(key_P: np.ndarray, turn: int, half_P: np.ndarray, size_P: np.ndarray) -> np.ndarray:
    mixed_P = _splitmix(key_P + _splitmix(half_P.astype(np.uint64) + np.uint64(turn << 48)))
    return (mixed_P % size_P.astype(np.uint64)).astype(np.int64)


def _key(*numbers: int | np.ndarray) -> np.ndarray:
    """A key from numbers (or one for each place of arrays of them); each number counts, and so does their order."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = _splitmix(state + _splitmix(np.atleast_1d(np.asarray(number)).astype(np.uint64)))
    return state


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step and output function; sums and products wrap."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """Random numbers for one sample's views, captions or boxes; `purpose` keeps them independent of each other."""
    return np.random.default_rng([seed, epoch, sample, purpose])
