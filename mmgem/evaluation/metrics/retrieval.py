"""Retrieval figures from embeddings: ranks, recall@k, median rank, chance, standard errors.

Receives query and gallery vectors and which gallery rows answer which query (any number of each).
Scores are streamed in tiles: no matrix of all queries by all of the gallery is ever held.
Refuses vectors that are not finite (a NaN compares false with everything and would read as a hit)
and queries that nothing answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgem.evaluation.metrics.scores import Ints, Scores, mean_stderr, median_stderr

# Two float32 dot products of the same unit vectors, summed in another order by another kernel,
# differ by about 1e-7. Scores closer than this are a tie, so that duplicates always tie.
TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Positives:
    """Which gallery rows answer which query, as compressed rows.

    starts: [Q + 1], items: [sum]; query q is answered by items[starts[q] : starts[q + 1]].
    """

    starts: Tensor
    items: Tensor
    gallery: int

    @property
    def queries(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Tensor:
        """[Q] how many gallery rows answer each query."""
        return self.starts[1:] - self.starts[:-1]

    @classmethod
    def from_ids(cls, query_ids: Tensor, gallery_ids: Tensor) -> "Positives":
        """A gallery row answers a query if both carry the same id (int64, [Q] and [G])."""
        order = torch.argsort(gallery_ids, stable=True)
        ids = gallery_ids[order]
        first = torch.searchsorted(ids, query_ids)
        counts = torch.searchsorted(ids, query_ids, right=True) - first
        starts = _starts(counts)
        within = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], counts)
        items = order[torch.repeat_interleave(first, counts) + within]
        return cls(starts, items, len(gallery_ids))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]], gallery: int) -> "Positives":
        """lists[q] names the gallery rows that answer query q; no row twice."""
        counts = torch.tensor([len(rows) for rows in lists], dtype=torch.int64)
        items = torch.tensor([i for rows in lists for i in rows], dtype=torch.int64)
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < gallery:
            raise ValueError(f"a positive lies outside the gallery of {gallery} rows")
        return cls(_starts(counts), items, gallery)

    def reversed(self) -> "Positives":
        """The same pairs seen from the gallery: its rows become the queries."""
        query_of = torch.repeat_interleave(torch.arange(self.queries), self.counts)
        order = torch.argsort(self.items, stable=True)
        counts = torch.bincount(self.items, minlength=self.gallery)
        return Positives(_starts(counts), query_of[order], self.queries)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products in true float32: TF32 would tie what is not tied."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def unit_vectors(x_NE: Tensor) -> Tensor:
    """float32, L2-normalised rows; a row of zeros stays zero. Raises ValueError if not finite."""
    x_NE = x_NE.detach().float()
    if not torch.isfinite(x_NE).all():
        rows = (~torch.isfinite(x_NE).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"{len(rows)} vectors are not finite, the first is row {rows[0]}")
    return torch.nn.functional.normalize(x_NE, dim=1)


@torch.no_grad()
def best_ranks(
    query_QE: Tensor,
    gallery_GE: Tensor,
    positives: Positives,
    *,
    query_tile: int = 512,
    gallery_tile: int = 32768,
    tie: float = TIE,
) -> Tensor:
    """[Q] int64: how many wrong gallery rows stand before the best right one (0 is a hit at 1).

    Scores are cosines. A wrong row that ties with the best right one stands before it. The right
    rows' scores are read from the tile in which they compete, so that no pair is ever scored in
    two ways and then compared with itself. Memory: one tile of query_tile x gallery_tile floats.
    """
    if positives.queries != len(query_QE) or positives.gallery != len(gallery_GE):
        raise ValueError(
            f"positives are for {positives.queries} x {positives.gallery}, "
            f"vectors are {len(query_QE)} x {len(gallery_GE)}"
        )
    unanswered = int((positives.counts == 0).sum())
    if unanswered:
        raise ValueError(f"{unanswered} queries have no right answer in the gallery")
    query_QE, gallery_GE = unit_vectors(query_QE), unit_vectors(gallery_GE)
    ranks = torch.empty(len(query_QE), dtype=torch.int64)
    with _full_float32():
        for q0 in range(0, len(query_QE), query_tile):
            block = slice(q0, min(q0 + query_tile, len(query_QE)))
            ranks[block] = _block_ranks(query_QE, gallery_GE, positives, block, gallery_tile, tie)
    return ranks


def _block_ranks(
    query_QE: Tensor,
    gallery_GE: Tensor,
    positives: Positives,
    block: slice,
    gallery_tile: int,
    tie: float,
) -> Tensor:
    """Ranks of one block of queries: first the best right score, then who stands before it."""
    device = query_QE.device
    q_BE = query_QE[block]
    bounds = positives.starts[block.start : block.stop + 1]
    cols = positives.items[int(bounds[0]) : int(bounds[-1])].to(device)
    rows = torch.repeat_interleave(torch.arange(len(q_BE)), bounds[1:] - bounds[:-1]).to(device)

    tiles = range(0, len(gallery_GE), gallery_tile)
    held: dict[int, Tensor] = {}
    best_B = torch.full((len(q_BE),), -torch.inf, device=device)
    for g0 in tiles:
        inside = (cols >= g0) & (cols < g0 + gallery_tile)
        if inside.any():
            scores_BT = q_BE @ gallery_GE[g0 : g0 + gallery_tile].T
            right = scores_BT[rows[inside], cols[inside] - g0]
            best_B.scatter_reduce_(0, rows[inside], right, "amax")
            if len(tiles) == 1:
                held[g0] = scores_BT
    level_B = best_B - tie
    ahead_B = torch.zeros(len(q_BE), dtype=torch.int64, device=device)
    for g0 in tiles:
        inside = (cols >= g0) & (cols < g0 + gallery_tile)
        scores_BT = held.pop(g0, None)
        if scores_BT is None:
            scores_BT = q_BE @ gallery_GE[g0 : g0 + gallery_tile].T
        ahead_B += (scores_BT >= level_B[:, None]).sum(dim=1)
        right_ahead = scores_BT[rows[inside], cols[inside] - g0] >= level_B[rows[inside]]
        ahead_B -= torch.bincount(rows[inside][right_ahead], minlength=len(q_BE))
    return ahead_B.cpu()


@torch.no_grad()
def top_k(query_QE: Tensor, gallery_GE: Tensor, k: int, *, gallery_tile: int = 8192) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of a few queries: cosines [Q, k] and rows [Q, k], best first."""
    query_QE, gallery_GE = unit_vectors(query_QE), unit_vectors(gallery_GE)
    k = min(k, len(gallery_GE))
    values = query_QE.new_empty(len(query_QE), 0)
    rows = torch.empty(len(query_QE), 0, dtype=torch.int64, device=query_QE.device)
    with _full_float32():
        for g0 in range(0, len(gallery_GE), gallery_tile):
            scores = query_QE @ gallery_GE[g0 : g0 + gallery_tile].T
            here = torch.arange(g0, g0 + scores.shape[1], device=scores.device)
            values = torch.cat([values, scores], dim=1)
            rows = torch.cat([rows, here.expand_as(scores)], dim=1)
            values, kept = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, kept)
    return values.cpu(), rows.cpu()


def chance_recall(counts_Q: Tensor, gallery: int, k: int) -> float:
    """Expected recall@k of a random order: mean of 1 - C(G - P, k) / C(G, k) over the queries.

    counts_Q: how many of the `gallery` rows answer each query (P). Exact, hypergeometric.
    """
    wrong = gallery - counts_Q.double()
    miss = torch.ones_like(wrong)
    for i in range(min(k, gallery)):
        miss *= (wrong - i).clamp(min=0) / (gallery - i)
    return float((1 - miss).mean())


def recall_scores(
    prefix: str,
    ranks_Q: Tensor,
    positives: Positives,
    *,
    ks: Sequence[int] = (1, 5, 10),
    groups: Ints | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Scores:
    """`{prefix}_recall@k` for each k and `{prefix}_median_rank` (from 1 on) from `best_ranks`.

    groups: [Q] the image of each query where one image gives several; standard errors then
    resample images. Chance is exact for the recalls; the median rank has none.
    """
    ranks = ranks_Q.numpy()
    hits_QK = np.stack([ranks < k for k in ks], axis=1).astype(np.float64)
    errors = mean_stderr(hits_QK, groups=groups, samples=samples, seed=seed)
    out = Scores()
    for k, value, error in zip(ks, hits_QK.mean(axis=0), errors, strict=True):
        name = f"{prefix}_recall@{k}"
        out.metrics[name], out.stderr[name] = float(value), float(error)
        out.chance[name] = chance_recall(positives.counts, positives.gallery, k)
    name = f"{prefix}_median_rank"
    places = ranks.astype(np.float64) + 1
    out.metrics[name] = float(np.median(places))
    out.stderr[name] = median_stderr(places, groups=groups, samples=samples, seed=seed)
    return out
