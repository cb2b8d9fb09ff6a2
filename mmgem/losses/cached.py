"""GradCache: the gradient of a loss over vectors that were never in memory together (Gao et al. 2021, 2101.06983).

Receives the vectors of each micro-batch, computed without a graph, and a loss over all of them. Gives the loss and each
micro-batch's gradients, which its second forward, with a graph, takes the place of: Σ vectors · gradients has the
gradient of the loss. Refuses a second forward whose vectors are not those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmgem.errors import UserError
from mmgem.precision import at_least_fp32

Vectors = tuple[Tensor, ...]
"""Of one micro-batch: one tensor of rows for each kind of vector."""

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative. Rows that are packed otherwise are summed in another order."""


def vector_gradients(
    parts: Sequence[Vectors], loss_of: Callable[[Vectors], Tensor]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The loss over the vectors of all parts, and each part's gradients. What else the loss depends on, e.g.
    logit_scale, gets its gradient at once."""
    leaves = tuple(torch.cat(kind).detach().requires_grad_() for kind in zip(*parts, strict=True))
    loss = loss_of(leaves)
    if loss.requires_grad:
        loss.backward()
    by_kind = []
    for leaf, kind in zip(leaves, zip(*parts, strict=True), strict=True):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        by_kind.append(gradient.split([len(rows) for rows in kind]))
    return loss.detach(), list(zip(*by_kind, strict=True))


def surrogate(vectors: Vectors, gradients: Vectors) -> Tensor:
    """Has the gradient that the loss would have by these vectors."""
    terms = (at_least_fp32(v * g).sum() for v, g in zip(vectors, gradients, strict=True))
    return sum(terms, start=torch.zeros((), device=vectors[0].device))


def refuse_other_vectors(first: Vectors, second: Vectors) -> None:
    """Raises UserError where the second forward gave other vectors: its gradients would silently be wrong."""
    if not all(bool(rows.isfinite().all()) for rows in first):
        return  # then the loss is not finite, and that is named elsewhere; packed texts share it with their captions
    for one, other in zip(first, second, strict=True):
        if not len(one):
            continue
        difference, size = float((other.detach() - one).abs().max()), float(one.abs().max())
        if not difference <= TOLERANCE[one.dtype] * size:
            raise UserError(
                f"micro_batch: a part of the model gave other vectors the second time (by {difference / size:.1e} of "
                "them): it draws random numbers that follow from more than its input; set its dropout to 0, or "
                "micro_batch to null"
            )
