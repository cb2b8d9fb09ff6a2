"""What the losses need of other ranks; the only file of the losses with collectives.

Receives a rank's tensors. Gives those of all ranks, or sums over them. Without a process group, one rank is all there
is. Gradients follow the convention of DistributedDataParallel, which averages those of the ranks: a loss that every
rank computes whole, from gathered rows, comes out as the gradient of the one global loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(x_N: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks, which may have different numbers of them; with gradient."""
    return x_N if ranks() == 1 else _GatherRows.apply(x_N)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    x = x.detach().clone()
    if ranks() > 1:
        dist.all_reduce(x)
    return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor) -> Tensor:
        sizes = [torch.zeros(1, dtype=torch.long, device=x_N.device) for _ in range(ranks())]
        dist.all_gather(sizes, torch.tensor([len(x_N)], device=x_N.device))
        counts = [int(size) for size in sizes]
        padded = x_N.new_zeros(max(counts), *x_N.shape[1:])
        padded[: len(x_N)] = x_N
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        rank = dist.get_rank()
        ctx.begin, ctx.count = sum(counts[:rank]), counts[rank]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.begin : ctx.begin + ctx.count]
