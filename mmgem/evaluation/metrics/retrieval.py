"""Retrieval figures from embeddings: ranks, recall@k of two kinds, mAP, median rank, chance, standard errors.

Receives query and gallery vectors and which gallery rows answer which query (any number of each).
Scores are streamed in tiles: no matrix of all queries by all of the gallery is ever held.
Refuses vectors that are not finite (a NaN compares false with everything and would read as a hit)
and queries that nothing answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgem.evaluation.metrics.scores import Floats, Ints, Items, Scores, median_stderr

# Two float32 dot products of the same unit vectors, summed in another order by another kernel,
# differ by about 1e-7. Scores closer than this are a tie, so that duplicates always tie.
TIE = 1e-6

_FEW = 32  # right rows a query: up to here tiles are compared with each level, past it scores are looked up
_ROWS = 8192  # rows, or pairs, of which a float32 copy is held at once


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
    return _scaled(x_NE, _inverse_norms(x_NE))


def _inverse_norms(x_NE: Tensor) -> Tensor:
    """[N] float32, 0 for a row of zeros. In parts, so that no second copy of the vectors is held."""
    parts = [torch.linalg.vector_norm(part_BE.detach().float(), dim=1) for part_BE in x_NE.split(_ROWS)]
    norms_N = torch.cat(parts)
    bad = (~torch.isfinite(norms_N)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} vectors are not finite, the first is row {bad[0]}")
    return torch.where(norms_N > 0, 1 / norms_N, 0)


def _scaled(x_NE: Tensor, inverse_N: Tensor) -> Tensor:
    return x_NE.detach().float() * inverse_N[:, None]


@torch.no_grad()
def positive_ranks(
    query_QE: Tensor,
    gallery_GE: Tensor,
    positives: Positives,
    *,
    query_tile: int | None = None,
    gallery_tile: int | None = None,
    tie: float = TIE,
) -> Tensor:
    """How many wrong gallery rows stand before each right one: int64, aligned with `positives.items`.

    All figures of `retrieval_scores` come from these; `best_ranks` is the least of each query.
    Scores are cosines, in float32 whatever the vectors are in. A wrong row stands before a right one
    if it scores as much, or less by no more than `tie`. Right rows do not stand before each other,
    and are taken out of a tile before it is counted: so no pair competes with itself, though its
    score comes from another product than that of its rivals.

    One product of all queries by all of the gallery. Memory beside the vectors: two tiles of
    query_tile x gallery_tile floats (by default 1024 x 1024, which stay in a CPU's cache, and on a
    GPU 8192 x 8192), and some numbers a pair.
    """
    _refuse_unfit(query_QE, gallery_GE, positives)
    counts_Q = positives.counts
    default = 1024 if query_QE.device.type == "cpu" else 8192
    query_tile, gallery_tile = query_tile or default, gallery_tile or default
    inverse_Q, inverse_G = _inverse_norms(query_QE), _inverse_norms(gallery_GE)
    ahead_P = torch.empty(len(positives.items), dtype=torch.int64)
    # Queries with about as many right rows go together: a block does as many comparisons as its largest needs.
    order_Q = torch.argsort(counts_Q, stable=True)
    with _full_float32():
        for block_B in order_Q.split(query_tile):
            row_P, pair_P = _pairs(positives.starts, block_B)
            here_B = block_B.to(query_QE.device)
            q_BE = _scaled(query_QE[here_B], inverse_Q[here_B])
            ahead_P[pair_P] = _block_ranks(
                q_BE, gallery_GE, inverse_G, row_P, positives.items[pair_P], gallery_tile, tie
            )
    return ahead_P


def _refuse_unfit(query_QE: Tensor, gallery_GE: Tensor, positives: Positives) -> None:
    if positives.queries != len(query_QE) or positives.gallery != len(gallery_GE):
        raise ValueError(
            f"positives are for {positives.queries} x {positives.gallery}, "
            f"vectors are {len(query_QE)} x {len(gallery_GE)}"
        )
    if unanswered := int((positives.counts == 0).sum()):
        raise ValueError(f"{unanswered} queries have no right answer in the gallery")


@torch.no_grad()
def ranks_both_ways(
    query_QE: Tensor,
    gallery_GE: Tensor,
    positives: Positives,
    *,
    query_tile: int | None = None,
    gallery_tile: int | None = None,
    tie: float = TIE,
) -> tuple[Tensor, Tensor]:
    """`positive_ranks` of the queries, and of the gallery's rows as queries, from one product.

    The second is aligned with `positives.reversed().items`; gallery rows that answer no query ask nothing. Where a row
    of either side has more than _FEW right ones, two products are made. Memory: as `positive_ranks`, and some numbers
    more a pair.
    """
    back = positives.reversed()
    if int(max(positives.counts.max(), back.counts.max())) > _FEW:
        tiles = {"query_tile": query_tile, "gallery_tile": gallery_tile}
        asking_G = back.counts > 0
        kept = Positives(torch.cat([back.starts[:1], back.starts[1:][asking_G]]), back.items, back.gallery)
        asking = gallery_GE[asking_G.to(gallery_GE.device)]
        return (
            positive_ranks(query_QE, gallery_GE, positives, tie=tie, **tiles),
            positive_ranks(asking, query_QE, kept, tie=tie, **tiles),
        )
    _refuse_unfit(query_QE, gallery_GE, positives)
    default = 1024 if query_QE.device.type == "cpu" else 8192
    query_tile, gallery_tile = query_tile or default, gallery_tile or default
    inverse_Q, inverse_G = _inverse_norms(query_QE), _inverse_norms(gallery_GE)
    blocks = [
        (block_B, *_pairs(positives.starts, block_B)) for block_B in torch.arange(positives.queries).split(query_tile)
    ]
    # Where each pair of the way back stands in `items`.
    forth_P = torch.argsort(positives.items, stable=True)
    ahead_P = torch.empty(len(positives.items), dtype=torch.int64)

    def unit(block_B: Tensor) -> Tensor:
        here_B = block_B.to(query_QE.device)
        return _scaled(query_QE[here_B], inverse_Q[here_B])

    with _full_float32():
        levels = [
            _pair_scores(unit(block_B), gallery_GE, inverse_G, row_P, positives.items[pair_P]) - tie
            for block_B, row_P, pair_P in blocks
        ]
        level_P = torch.cat(levels)[forth_P]
        columns = _Compared(positives.items[forth_P].to(level_P.device), level_P, len(gallery_GE), of_columns=True)
        for (block_B, row_P, pair_P), own_P in zip(blocks, levels, strict=True):
            q_BE = unit(block_B)
            rows = _Compared(row_P.to(q_BE.device), own_P, len(q_BE))
            for start, scores_BT in _tiles(q_BE, gallery_GE, inverse_G, row_P, positives.items[pair_P], gallery_tile):
                rows.add(scores_BT)
                columns.add(scores_BT, start)
            ahead_P[pair_P] = rows.ahead().cpu()
        return ahead_P, columns.ahead().cpu()


def _pairs(starts: Tensor, block_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of some queries with their right rows: which of the queries, and its place in `items`."""
    first_B = starts[block_B]
    counts_B = starts[block_B + 1] - first_B
    row_P = torch.repeat_interleave(torch.arange(len(block_B)), counts_B)
    return row_P, torch.arange(len(row_P)) + (first_B - _starts(counts_B)[:-1])[row_P]


def _block_ranks(
    q_BE: Tensor, gallery_GE: Tensor, inverse_G: Tensor, row_P: Tensor, col_P: Tensor, tile: int, tie: float
) -> Tensor:
    """`positive_ranks` of one block of queries. row_P: ascending."""
    row_P, col_P = row_P.to(q_BE.device), col_P.to(q_BE.device)
    level_P = _pair_scores(q_BE, gallery_GE, inverse_G, row_P, col_P) - tie
    few = int(torch.bincount(row_P).max()) <= _FEW
    count = (_Compared if few else _Searched)(row_P, level_P, len(q_BE))
    for _, scores_BT in _tiles(q_BE, gallery_GE, inverse_G, row_P, col_P, tile):
        count.add(scores_BT)
    return count.ahead().cpu()


def _tiles(
    q_BE: Tensor, gallery_GE: Tensor, inverse_G: Tensor, row_P: Tensor, col_P: Tensor, tile: int
) -> Iterator[tuple[int, Tensor]]:
    """Where each tile of the gallery begins, and its scores, with −inf for right pairs; the next one overwrites it."""
    row_P, col_P = row_P.to(q_BE.device), col_P.to(q_BE.device)
    by_col = torch.argsort(col_P)
    masked_row_P, masked_col_P = row_P[by_col], col_P[by_col]
    edges = torch.arange(0, len(gallery_GE) + tile, tile, device=col_P.device)
    cuts = torch.searchsorted(masked_col_P, edges).tolist()
    memory = q_BE.new_empty(len(q_BE) * min(tile, len(gallery_GE)))
    for n, g0 in enumerate(range(0, len(gallery_GE), tile)):
        g_TE = _scaled(gallery_GE[g0 : g0 + tile], inverse_G[g0 : g0 + tile])
        scores_BT = memory[: len(q_BE) * len(g_TE)].view(len(q_BE), len(g_TE))
        torch.mm(q_BE, g_TE.T, out=scores_BT)
        inside = slice(cuts[n], cuts[n + 1])
        scores_BT[masked_row_P[inside], masked_col_P[inside] - g0] = -torch.inf
        yield g0, scores_BT


def _pair_scores(q_BE: Tensor, gallery_GE: Tensor, inverse_G: Tensor, row_P: Tensor, col_P: Tensor) -> Tensor:
    """[P] cosines of the pairs, in parts, so that no vectors of all pairs are held."""
    row_P, col_P = row_P.to(q_BE.device), col_P.to(q_BE.device)
    out = []
    for rows, cols in zip(row_P.split(_ROWS), col_P.split(_ROWS), strict=True):
        out.append((q_BE[rows] * _scaled(gallery_GE[cols], inverse_G[cols])).sum(dim=1))
    return torch.cat(out)


class _Compared:
    """Counts the scores at or above each level by comparing a tile with the first level of each query, then with
    the second, and so on: less than a tenth of the product's time for each, where the tile is in the cache.

    of_columns: the queries are the tiles' columns, of which a tile has some."""

    def __init__(self, row_P: Tensor, level_P: Tensor, rows: int, *, of_columns: bool = False) -> None:
        self.row_P, self.of_columns = row_P, of_columns
        counts_B = torch.bincount(row_P, minlength=rows)
        self.place_P = torch.arange(len(row_P), device=row_P.device) - _starts(counts_B)[:-1][row_P]
        # Infinite where a query has no such level: nothing stands before it.
        self.level_KB = level_P.new_full((int(counts_B.max()), rows), torch.inf)
        self.level_KB[self.place_P, row_P] = level_P
        self.ahead_KB = torch.zeros(self.level_KB.shape, dtype=torch.int64, device=row_P.device)
        self.memory = level_P.new_empty(0)

    def add(self, scores_BT: Tensor, start: int = 0) -> None:
        """start: the first column's number."""
        if len(self.memory) < scores_BT.numel():
            self.memory = scores_BT.new_empty(scores_BT.numel())
        # Ones and zeros as floats: their sum is exact up to 2^24, and several times faster than that of booleans.
        above_BT = self.memory[: scores_BT.numel()].view_as(scores_BT)
        here = slice(start, start + scores_BT.shape[1]) if self.of_columns else slice(None)
        for level_B, ahead_B in zip(self.level_KB[:, here], self.ahead_KB[:, here], strict=True):
            torch.ge(scores_BT, level_B if self.of_columns else level_B[:, None], out=above_BT)
            ahead_B += above_BT.sum(dim=0 if self.of_columns else 1).long()

    def ahead(self) -> Tensor:
        return self.ahead_KB[self.place_P, self.row_P]


class _Searched:
    """The same for many levels a query: each score at or above the query's lowest level is looked up among them."""

    def __init__(self, row_P: Tensor, level_P: Tensor, rows: int) -> None:
        # One ascending list for all queries: cosines lie within 4 of each other.
        self.key_P, self.order_P = torch.sort(4.0 * row_P.double() + level_P.double())
        self.ends_B = torch.cumsum(torch.bincount(row_P, minlength=rows), 0)
        self.lowest_B1 = level_P.new_full((rows,), torch.inf).scatter_reduce_(0, row_P, level_P, "amin")[:, None]
        self.hits_P = torch.zeros(len(row_P), dtype=torch.int64, device=row_P.device)
        self.row_P = row_P

    def add(self, scores_BT: Tensor) -> None:
        rows, cols = (scores_BT >= self.lowest_B1).nonzero(as_tuple=True)
        keys = 4.0 * rows.double() + scores_BT[rows, cols].double()
        highest = torch.searchsorted(self.key_P, keys, right=True) - 1
        self.hits_P += torch.bincount(highest, minlength=len(self.hits_P))

    def ahead(self) -> Tensor:
        """A score stands before the highest level that it reaches and before all lower ones of its query."""
        sums_P = torch.cumsum(self.hits_P, 0)
        ahead_P = torch.empty_like(sums_P)
        ahead_P[self.order_P] = sums_P[self.ends_B - 1][self.row_P] - sums_P + self.hits_P
        return ahead_P


def best_ranks(
    query_QE: Tensor,
    gallery_GE: Tensor,
    positives: Positives,
    *,
    query_tile: int | None = None,
    gallery_tile: int | None = None,
    tie: float = TIE,
) -> Tensor:
    """[Q] int64: how many wrong gallery rows stand before the best right one (0 is a hit at 1).

    A wrong row that ties with the best right one stands before it; see `positive_ranks`.
    """
    ahead_P = positive_ranks(query_QE, gallery_GE, positives, query_tile=query_tile, gallery_tile=gallery_tile, tie=tie)
    return first_ranks(ahead_P, positives)


def first_ranks(ahead_P: Tensor, positives: Positives) -> Tensor:
    """[Q] the least of each query's `positive_ranks`, which is the rank of its best right row."""
    row_P = torch.repeat_interleave(torch.arange(positives.queries), positives.counts)
    return torch.full((positives.queries,), positives.gallery).scatter_reduce_(0, row_P, ahead_P, "amin")


@torch.no_grad()
def top_k(query_QE: Tensor, gallery_GE: Tensor, k: int, *, gallery_tile: int = 8192) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of a few queries: cosines [Q, k] and rows [Q, k], best first."""
    query_QE, inverse_G = unit_vectors(query_QE), _inverse_norms(gallery_GE)
    k = min(k, len(gallery_GE))
    values = query_QE.new_empty(len(query_QE), 0)
    rows = torch.empty(len(query_QE), 0, dtype=torch.int64, device=query_QE.device)
    with _full_float32():
        for g0 in range(0, len(gallery_GE), gallery_tile):
            tile = slice(g0, g0 + gallery_tile)
            scores = query_QE @ _scaled(gallery_GE[tile], inverse_G[tile]).T
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


def chance_strict_recall(gallery: int, k: int) -> float:
    """Expected share of a query's right rows among the first k of a random order: k / G."""
    return min(k, gallery) / gallery


def chance_precision(counts_Q: Tensor, gallery: int, *, cut: bool = False) -> float:
    """Expected mAP of a random order, with `cut` mAP@R; mean over the queries.

    Of G rows, P of them right, row i is right with probability P / G, and rows i and j with
    P (P - 1) / (G (G - 1)); so over the first N places, N = G or P with `cut`,
    E[AP] = (H_N + (P - 1) / (G - 1) * (N - H_N)) / G, where H_N = 1 + 1/2 + ... + 1/N. Exact.
    """
    right_Q = counts_Q.double()
    harmonic_G = torch.cumsum(1 / torch.arange(1, gallery + 1, dtype=torch.float64), 0)
    places_Q = counts_Q if cut else torch.full_like(counts_Q, gallery)
    harmonic_Q = harmonic_G[places_Q - 1]
    others_Q = (right_Q - 1) / max(gallery - 1, 1)
    return float(((harmonic_Q + others_Q * (places_Q - harmonic_Q)) / gallery).mean())


def per_query(ahead_P: Tensor, positives: Positives, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Floats]:
    """Of each query [Q]: `recall@k`, `strict_recall@k`, `mAP`, `mAP@R` and `median_rank`, from `positive_ranks`.

    The names are those of `retrieval_scores`; `mAP` is here the query's average precision and
    `median_rank` the rank, from 1 on, of its best right row.
    """
    starts, counts = positives.starts.numpy(), positives.counts.numpy()
    row_P = np.repeat(np.arange(len(counts)), counts)
    sorted_P = ahead_P.numpy()[np.lexsort((ahead_P.numpy(), row_P))]
    within_P = np.arange(len(row_P)) - starts[row_P]
    place_P = sorted_P + within_P  # from 0 on, in the order of all rows
    precision_P = (within_P + 1) / (place_P + 1)

    def mean(values_P: NDArray[Any]) -> Floats:
        return np.add.reduceat(values_P.astype(np.float64), starts[:-1]) / counts

    best_Q = sorted_P[starts[:-1]]
    out = {f"recall@{k}": (best_Q < k).astype(np.float64) for k in ks}
    out |= {f"strict_recall@{k}": mean(place_P < k) for k in ks}
    out["mAP"] = mean(precision_P)
    out["mAP@R"] = mean(precision_P * (place_P < counts[row_P]))
    out["median_rank"] = best_Q + 1.0
    return out


def retrieval_scores(
    prefix: str,
    ahead_P: Tensor,
    positives: Positives,
    *,
    ks: Sequence[int] = (1, 5, 10),
    groups: Ints | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Scores:
    """All figures of a ranking, from `positive_ranks`. Each is `{prefix}_` and:

    - `recall@k`: the share of queries of which any right row is among the first k. This is what
      CLIP papers, CLIP_benchmark's `{image,text}_retrieval_recall@k` and ECCV Caption's R@k mean.
    - `strict_recall@k`: the share of a query's right rows that is among the first k, mean over the
      queries; recall as in information retrieval (torchmetrics' RetrievalRecall, and
      CLIP_benchmark's function `recall_at_k` before `evaluate` asks whether it is above 0). Where
      a query has P > k right rows it is at most k / P. Both are the same where each has one.
    - `mAP`: mean over the queries of the average precision over the whole ranking, that is the mean
      over the right rows of the share of right rows up to it (torchmetrics' RetrievalMAP).
    - `mAP@R`: the same over the first R places, divided by R, the number of the query's right rows
      (Musgrave et al. 2020; ECCV Caption's `eccv_map_at_r`, Chun et al. 2022).
    - `median_rank`: of the best right row, from 1 on.

    groups: [Q] the image of each query where one image gives several; standard errors then
    resample images, `samples` times (0: no standard errors). Chance is exact, of a random order;
    the median rank has none.
    """
    found = per_query(ahead_P, positives, ks)
    ranks_Q = found.pop("median_rank")
    counts, gallery = positives.counts, positives.gallery
    chance = {f"recall@{k}": chance_recall(counts, gallery, k) for k in ks}
    chance |= {f"strict_recall@{k}": chance_strict_recall(gallery, k) for k in ks}
    chance |= {"mAP": chance_precision(counts, gallery), "mAP@R": chance_precision(counts, gallery, cut=True)}
    out = Scores.of_means(found, chance=chance, groups=groups, samples=samples, seed=seed)
    out.metrics["median_rank"] = float(np.median(ranks_Q))
    out.items["median_rank"] = Items(ranks_Q[:, None], "median", groups)
    if samples:
        out.stderr["median_rank"] = median_stderr(ranks_Q, groups=groups, samples=samples, seed=seed)
    return out.prefixed(f"{prefix}_")


def recall_curve(ahead_P: Tensor, positives: Positives, points: int = 40) -> list[tuple[float, float]]:
    """(k, recall@k) at k from 1 to the gallery's size, evenly on a scale of logarithms."""
    ranks_Q = first_ranks(ahead_P, positives).sort().values
    ks = torch.logspace(0, float(np.log10(max(positives.gallery, 1))), points).round().long().unique()
    recalls = torch.searchsorted(ranks_Q, ks) / len(ranks_Q)
    return list(zip(ks.double().tolist(), recalls.tolist(), strict=True))
