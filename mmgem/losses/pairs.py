"""Which rows and which texts belong together, over all ranks.

Receives ids of this rank's rows and texts. Gives the distinct texts and, for this rank's rows, the columns that are
their positives. Refuses nothing. Needs memory for the pairs alone, never for rows times texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmgem.losses.gather import counts_of_ranks, gather_rows, this_rank


@dataclass(frozen=True)
class Pairs:
    """P positive pairs of this rank's N rows and the U distinct texts of all ranks."""

    row_P: Tensor
    """Ascending."""
    column_P: Tensor
    positives_N: Tensor
    """How many positives each row has."""
    positives_U: Tensor
    """How many rows, of all ranks, each text is a positive of."""
    rows: int
    """Of all ranks, those with a positive."""
    texts: int
    """Those that are a positive of some row."""
    kept_m: Tensor
    """Which of this rank's texts stand for their like: indices, ascending."""
    counts: list[int]
    """How many of those each rank has; the U columns are theirs, one rank after the other."""


def find_pairs(owner_N: Tensor, text_owner_M: Tensor, text_M: Tensor) -> Pairs:
    """A text is a positive of a row if it, or an equal one, was given to the row's owner.

    owner_N: what each row is (its image, or its entity). text_owner_M: whom each text was given to. text_M: equal for
    equal texts. So two captions of one image, and one phrase of two boxes, are never each other's negatives.

    Each distinct text is one column, the first of its like over the ranks: a phrase said of many boxes would otherwise
    fill the loss, and be pushed away from each other box as often as it occurs. A row or a text without a positive is
    a negative for the others and no query: hard negatives are given so.
    """
    device = owner_N.device
    row_counts, text_counts = counts_of_ranks(len(owner_N), len(text_M), device=device)
    owner_G = gather_rows(owner_N, row_counts)
    both_M2 = gather_rows(torch.stack([text_owner_M, text_M], dim=1), text_counts)
    text_owner_M, text_M = both_M2.unbind(1)

    first, number_M = _first_of_each(text_M)
    begin = sum(text_counts[: this_rank()])
    here = (first >= begin) & (first < begin + text_counts[this_rank()])
    rank_U = torch.bucketize(first, torch.tensor(text_counts, device=device).cumsum(0), right=True)
    counts = torch.bincount(rank_U, minlength=len(text_counts)).tolist()

    # Whom each column was given to, each pair once, and in the order of the owners.
    owners, owner_number_M = text_owner_M.unique(return_inverse=True)
    columns = max(len(first), 1)
    given = (owner_number_M * columns + number_M).unique()
    given_owner, given_column = given // columns, given % columns
    begin_O = torch.searchsorted(given_owner, torch.arange(len(owners) + 1, device=device))

    place_G = torch.searchsorted(owners, owner_G).clamp(max=max(len(owners) - 1, 0))
    if len(owners):
        found_G = owners[place_G] == owner_G
        positives_G = (begin_O[place_G + 1] - begin_O[place_G]) * found_G
    else:
        positives_G = torch.zeros_like(owner_G)
    rows_O = torch.bincount(place_G[positives_G > 0], minlength=len(owners))
    positives_U = torch.zeros(len(first), dtype=torch.long, device=device)
    positives_U.index_add_(0, given_column, rows_O[given_owner] if len(owners) else given_column)

    own = slice(sum(row_counts[: this_rank()]), sum(row_counts[: this_rank() + 1]))
    positives_N, place_N = positives_G[own], place_G[own]
    row_P = torch.repeat_interleave(torch.arange(len(owner_N), device=device), positives_N)
    offset_P = torch.arange(len(row_P), device=device) - (positives_N.cumsum(0) - positives_N)[row_P]
    column_P = given_column[begin_O[place_N[row_P]] + offset_P]
    return Pairs(
        row_P=row_P,
        column_P=column_P,
        positives_N=positives_N,
        positives_U=positives_U,
        rows=int((positives_G > 0).sum()),
        texts=int((positives_U > 0).sum()),
        kept_m=first[here] - begin,
        counts=counts,
    )


def _first_of_each(text_M: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct text first stands, ascending; and, for each text, its number among those."""
    _, sorted_number_M = text_M.unique(return_inverse=True)
    distinct = int(sorted_number_M.max()) + 1 if len(text_M) else 0
    place_M = torch.arange(len(text_M), device=text_M.device)
    first = place_M.new_full((distinct,), len(text_M)).scatter_reduce(0, sorted_number_M, place_M, "amin")
    first, order = first.sort()
    return first, order.argsort()[sorted_number_M]
