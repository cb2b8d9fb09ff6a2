"""InfoNCE and the sigmoid loss over the global batch, exact, in tiles.

Receives un-normalised vectors of two sides and ids that say which belong together, of this rank. Gives the loss over
those of all ranks. Refuses nothing.

Of the two sides only the texts are sent: each rank scores its own rows against the texts of all, a tile of rows at a
time, and again in the backward pass. So the scores never exist as a whole, and a rank needs memory for the texts'
vectors and a tile. Gradients follow the convention of DistributedDataParallel and ZeRO, which average those of the
ranks: each rank gives its rows' part of the gradient of the one global loss, times the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.gather import gather_rows, max_over_ranks, ranks, sum_over_ranks, sum_own_rows
from mmgem.losses.pairs import Pairs, find_pairs
from mmgem.precision import at_least_fp32

TILE = 1 << 22
"""Scores at a time."""


def contrastive_loss(
    x_NE: Tensor,
    owner_N: Tensor,
    text_ME: Tensor,
    text_owner_M: Tensor,
    text_M: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    kind: str = "infonce",
) -> Tensor:
    """The loss between images (or boxes) x and texts, over all ranks; the same number on each. The ids are those of
    `find_pairs`, and so is the way to add hard negatives, texts or images. Ranks may have different numbers of both.

    infonce: x→text plus text→x (a sum, as in MM-GEM), each the mean over its queries. A query's positives p are
    averaged; each stands against the negatives alone, never against another positive:

        L_i = mean_p −log( exp(s_ip) / (exp(s_ip) + Σ_{j negative} exp(s_ij)) ),   s = exp(logit_scale) · cos(x, text)

    With one positive a query this is InfoNCE (van den Oord et al. 2018) as CLIP has it.

    sigmoid: SigLIP's (Zhai et al. 2023): each pair of the global batch is a decision of its own,

        L = −1/N Σ_ij log σ(± (s_ij + logit_bias)),   + for positives; N: rows with a positive.

    Without any positive the loss is 0.
    """
    with torch.autocast(x_NE.device.type, enabled=False):
        pairs = find_pairs(owner_N, text_owner_M, text_M)
        x_NE, y_mE = F.normalize(at_least_fp32(x_NE), dim=-1), F.normalize(at_least_fp32(text_ME[pairs.kept_m]), dim=-1)
        scale = at_least_fp32(logit_scale).exp()
        if kind == "infonce":
            return _InfoNCE.apply(x_NE, y_mE, scale, pairs)
        bias = scale.new_zeros(()) if logit_bias is None else at_least_fp32(logit_bias)
        return _Sigmoid.apply(x_NE, y_mE, scale, bias, pairs)


class _Tiles:
    """The scores of this rank's rows and all texts, a tile of rows at a time."""

    def __init__(self, x_NE: Tensor, y_UE: Tensor, scale: Tensor, pairs: Pairs):
        self.x_NE, self.y_UE, self.scale, self.pairs = x_NE, y_UE, scale, pairs
        self.rows = max(1, TILE // max(len(y_UE), 1))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor], slice]]:
        """Rows, their scores, where in them the positives stand, and which pairs those are."""
        starts = range(0, len(self.x_NE), self.rows)
        bounds = torch.searchsorted(
            self.pairs.row_P, torch.tensor([*starts, len(self.x_NE)], device=self.x_NE.device)
        ).tolist()
        for number, start in enumerate(starts):
            rows, chosen = slice(start, start + self.rows), slice(bounds[number], bounds[number + 1])
            positive = self.pairs.row_P[chosen] - start, self.pairs.column_P[chosen]
            yield rows, (self.scale * self.x_NE[rows]) @ self.y_UE.T, positive, chosen

    def gradients(self, gradient_of: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the gradient of each tile's scores: of x, of all texts (this rank's term), of scale, and its sum."""
        dx_NE, dy_UE = torch.zeros_like(self.x_NE), torch.zeros_like(self.y_UE)
        total = self.scale.new_zeros(())
        for rows, score_CU, positive, chosen in self:
            d_CU = gradient_of(rows, score_CU, positive, chosen)
            dx_NE[rows] = d_CU @ self.y_UE
            dy_UE.addmm_(d_CU.T, self.x_NE[rows])
            total += d_CU.sum()
        dscale = (dx_NE * self.x_NE).sum()
        return dx_NE * self.scale, dy_UE * self.scale, dscale, total


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, y_mE: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
        y_UE = gather_rows(y_mE, pairs.counts)
        lowest = torch.finfo(x_NE.dtype).min
        negatives_N = x_NE.new_full((len(x_NE),), -torch.inf)
        most_U, sum_U = x_NE.new_full((len(y_UE),), lowest), x_NE.new_zeros(len(y_UE))
        positive_P = x_NE.new_empty(len(pairs.row_P))
        for rows, score_CU, positive, chosen in _Tiles(x_NE, y_UE, scale, pairs):
            positive_P[chosen] = score_CU[positive]
            score_CU[positive] = -torch.inf
            negatives_N[rows] = score_CU.logsumexp(dim=1)
            before_U, most_U = most_U, torch.maximum(most_U, score_CU.amax(dim=0))
            sum_U = sum_U * (before_U - most_U).exp() + score_CU.sub_(most_U).exp_().sum(dim=0)
        most, own_most = max_over_ranks(most_U), most_U
        negatives_U = most + sum_over_ranks(sum_U * (own_most - most).exp()).log()

        # −log(e^s / (e^s + e^neg)) = softplus(neg − s); its gradient by neg is σ(neg − s).
        share_P = 1 / (pairs.positives_N[pairs.row_P] * max(pairs.rows, 1)).to(x_NE.dtype)
        text_share_P = 1 / (pairs.positives_U[pairs.column_P] * max(pairs.texts, 1)).to(x_NE.dtype)
        over_P, text_over_P = negatives_N[pairs.row_P] - positive_P, negatives_U[pairs.column_P] - positive_P
        loss = (F.softplus(over_P) * share_P).sum() + (F.softplus(text_over_P) * text_share_P).sum()
        pull_P, text_pull_P = over_P.sigmoid() * share_P, text_over_P.sigmoid() * text_share_P
        weight_N = torch.zeros_like(negatives_N).index_add_(0, pairs.row_P, pull_P)
        weight_U = torch.zeros_like(negatives_U).index_add_(0, pairs.column_P, text_pull_P)
        weight_U, loss_1 = sum_over_ranks(torch.cat([weight_U, loss[None]])).split([len(y_UE), 1])

        # d score = weight · exp(score − negatives), as one exponential; −inf where there is nothing to weigh.
        shift_N = torch.where(weight_N > 0, weight_N.log() - negatives_N, -torch.inf)
        shift_U = torch.where(weight_U > 0, weight_U.log() - negatives_U, -torch.inf)
        ctx.save_for_backward(x_NE, y_UE, scale, shift_N, shift_U, -(pull_P + text_pull_P))
        ctx.pairs = pairs
        return loss_1[0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, y_UE, scale, shift_N, shift_U, d_P = ctx.saved_tensors

        def gradient_of(rows: slice, score_CU: Tensor, positive: tuple[Tensor, Tensor], chosen: slice) -> Tensor:
            d_CU = (score_CU + shift_U).exp_()
            d_CU += score_CU.add_(shift_N[rows, None]).exp_()
            d_CU[positive] = d_P[chosen]
            return d_CU

        with torch.autocast(x_NE.device.type, enabled=False):
            dx_NE, dy_UE, dscale, _ = _Tiles(x_NE, y_UE, scale, ctx.pairs).gradients(gradient_of)
            factor = gradients[0] * ranks()
            return dx_NE * factor, sum_own_rows(dy_UE, ctx.pairs.counts) * factor, dscale * factor, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, y_mE: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
        y_UE = gather_rows(y_mE, pairs.counts)
        loss = x_NE.new_zeros(())
        for _, score_CU, positive, _ in _Tiles(x_NE, y_UE, scale, pairs):
            score_CU += bias
            score_CU[positive] *= -1
            loss += F.softplus(score_CU).sum() / max(pairs.rows, 1)
        ctx.save_for_backward(x_NE, y_UE, scale, bias)
        ctx.pairs = pairs
        return sum_over_ranks(loss * (pairs.rows > 0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, y_UE, scale, bias = ctx.saved_tensors
        pairs: Pairs = ctx.pairs

        def gradient_of(rows: slice, score_CU: Tensor, positive: tuple[Tensor, Tensor], chosen: slice) -> Tensor:
            d_CU = score_CU.add_(bias).sigmoid_()
            d_CU[positive] -= 1
            return d_CU

        with torch.autocast(x_NE.device.type, enabled=False):
            dx_NE, dy_UE, dscale, dbias = _Tiles(x_NE, y_UE, scale, pairs).gradients(gradient_of)
            factor = gradients[0] * ranks() * (pairs.rows > 0) / max(pairs.rows, 1)
            return dx_NE * factor, sum_own_rows(dy_UE, pairs.counts) * factor, dscale * factor, dbias * factor, None
