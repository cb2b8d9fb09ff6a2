"""Which pictures are one picture: the same bytes, or the same to the eye.

Receives decoded pictures. Gives of each a thumbnail of 16 x 16 grey cells and a hash of 128 bits; and of many
thumbnails and hashes the pairs that are near. Refuses nothing.

Near is decided on the thumbnails: their grey values correlate by at least NEAR, and so do the differences of
neighbouring cells by at least NEAR_EDGES (two photos of a dark ground under a bright sky have the first, not the
second). A copy that was encoded anew, made smaller, brighter, grey, or cut by a per cent of its side is near; one that
is mirrored or cut by more is not.

The hash finds the pairs to decide on without comparing all with all. Its bits are the signs of random projections
(Charikar 2002), so near pictures differ in few; looked at are those that agree in all bits of one of eight bands and
differ in at most FAR over all. The usual difference hash was tried alone: at 7 of its 64 bits it calls 18 pairs of
7,000 photos and 738 pairs of 3,000 rendered scenes the same that are not.

A plain picture, whose cells hardly vary (standard deviation below PLAIN grey levels), shows nothing that could be told
apart: it has no hash, and only its bytes are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgem.progress import track

SIDE = 16
NEAR, NEAR_EDGES = 0.97, 0.85
PLAIN = 2.0
FAR = 16

_BANDS = 8
_REACH = 10_000  # in a band that more pictures share, each is compared with so many that follow it
_BATCH = 1 << 14

# Each column sums to 0: a brighter picture has the same signs.
_PROJECTION_CB = np.random.default_rng(0).standard_normal((SIDE * SIDE, 128)).astype(np.float32)
_PROJECTION_CB -= _PROJECTION_CB.mean(axis=0)


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """16 * 16 grey levels: means of the cells of the picture, whatever its aspect."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)).ravel()


def hashes(thumbs_NC: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """N x 256 grey levels -> N x 2; zeros for a plain picture."""
    cells_NC = thumbs_NC.astype(np.float32)
    bits_NB = cells_NC @ _PROJECTION_CB > 0
    bits_NB[cells_NC.std(axis=1) < PLAIN] = False
    return np.packbits(bits_NB, axis=1).view(np.uint64)


def likeness(a_NC: NDArray[np.uint8], b_NC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of pairs of thumbnails, the correlation of the grey levels, and whether they are near."""
    grey, edges = zip(*map(_grey_and_edges, (a_NC, b_NC)), strict=True)
    like = _cosine(*grey)
    return like, (like >= NEAR) & (_cosine(*edges) >= NEAR_EDGES)


def near_pairs(
    hashes_N2: NDArray[np.uint64], thumbs_NC: NDArray[np.uint8], rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Batches of (i, j, likeness): the near pairs among `rows` that are not plain, each once."""
    bands_NB = hashes_N2.view(np.uint16)
    rows = rows[hashes_N2[rows].any(axis=1)]
    for band in track(range(_BANDS), "comparing pictures", unit="bands"):
        # Those alike in the other bits, too, stand side by side.
        order = rows[np.lexsort((hashes_N2[rows, 0], hashes_N2[rows, 1], bands_NB[rows, band]))]
        candidates = (pairs[:, _close(hashes_N2, pairs, band)] for pairs in _sharing(order, bands_NB[order, band]))
        for first, second in _batches(candidates):
            like, near = likeness(thumbs_NC[first], thumbs_NC[second])
            if near.any():
                yield first[near], second[near], like[near]


def _sharing(order: NDArray[np.int64], values: NDArray[np.uint16]) -> Iterator[NDArray[np.int64]]:
    """2 x n: the pairs of equal values, which are sorted: neighbours, then those one further apart, and so on."""
    left = np.arange(len(order))
    for step in range(1, _REACH):
        left = left[: np.searchsorted(left, len(order) - step)]
        left = left[values[left] == values[left + step]]
        if not len(left):
            return
        yield np.stack([order[left], order[left + step]])


def _close(hashes_N2: NDArray[np.uint64], pairs: NDArray[np.int64], band: int) -> NDArray[np.bool_]:
    """Which pairs differ in few bits and in no earlier band are equal: those came then."""
    differ = hashes_N2[pairs[0]] ^ hashes_N2[pairs[1]]
    close = np.bitwise_count(differ).sum(axis=1) <= FAR
    close[close] = differ[close].view(np.uint16)[:, :band].all(axis=1)
    return close


def _batches(parts: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The columns of all parts, some thousands at a time."""
    held, count = [], 0
    for part in parts:
        held.append(part)
        count += part.shape[1]
        if count >= _BATCH:
            joined = np.concatenate(held, axis=1)
            yield from np.split(joined, range(_BATCH, count, _BATCH), axis=1)
            held, count = [], 0
    if count:
        yield np.concatenate(held, axis=1)


def _grey_and_edges(thumbs_NC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The cells about their mean, and the differences of each with its lower and right neighbour."""
    cells_NC = thumbs_NC.astype(np.float32)
    grid, size = cells_NC.reshape(-1, SIDE, SIDE), (len(cells_NC), SIDE * (SIDE - 1))
    edges = np.concatenate([np.diff(grid, axis=1).reshape(size), np.diff(grid, axis=2).reshape(size)], axis=1)
    return cells_NC - cells_NC.mean(axis=1, keepdims=True), edges


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    ab, aa, bb = (np.einsum("nc,nc->n", left, right) for left, right in ((a, b), (a, a), (b, b)))
    return ab / np.maximum(np.sqrt(aa * bb), 1e-6)
