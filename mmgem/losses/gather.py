"""What the losses need of other ranks; the only file of the losses with collectives.

Receives a rank's tensors. Gives those of all ranks, or sums over them, and takes back what the others owe a rank's own
rows. Without a process group, one rank is all there is. None of it has a gradient: the losses that use it know theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def counts_of_ranks(*counts: int, device: torch.device) -> list[list[int]]:
    """Each count on each rank: one list of ranks for each of the given ones."""
    own = torch.tensor(counts, dtype=torch.long, device=device)
    if ranks() == 1:
        return [[count] for count in counts]
    found = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(found, own)
    return torch.stack(found, dim=1).tolist()


def gather_rows(x_N: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, in the order of the ranks; `counts`: how many each has."""
    if ranks() == 1:
        return x_N.detach()
    padded = x_N.new_zeros(max(counts), *x_N.shape[1:])
    padded[: len(x_N)] = x_N.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_own_rows(x_N: Tensor, counts: Sequence[int]) -> Tensor:
    """Each rank holds a term for the rows of all ranks: gives the sums, over the ranks, for this rank's rows.

    What `reduce_scatter` does, for ranks with different numbers of rows, and over gloo too, which has none that sends
    a rank its own part only.
    """
    if ranks() == 1:
        return x_N
    own = counts[this_rank()]
    parts = x_N.new_empty(ranks() * own, *x_N.shape[1:])
    dist.all_to_all_single(parts, x_N.contiguous(), [own] * ranks(), list(counts))
    return parts.unflatten(0, (ranks(), own)).sum(dim=0)


def sum_over_ranks(x: Tensor) -> Tensor:
    x = x.detach().clone()
    if ranks() > 1:
        dist.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    x = x.detach().clone()
    if ranks() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
