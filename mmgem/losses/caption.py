"""Cross-entropy of captions, a part of the vocabulary at a time.

Receives hidden states at label positions and the output head's weights. Gives the mean over the tokens of all ranks and
micro-batches. Refuses nothing. The scores of all tokens on the whole vocabulary never exist: each part of it is scored
once for the normaliser and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mmgem.errors import UserError
from mmgem.losses.gather import ranks
from mmgem.precision import at_least_fp32

TILE = 1 << 24
"""Scores at a time."""
NARROWEST = 1024
"""Words at a time, at least: narrower products are slow."""

SumOfLosses = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""hidden_TD, the head's weight_VD and bias_V -> the sum of the tokens' losses."""


def caption_loss(sum_of_losses: Tensor, tokens: int) -> Tensor:
    """This rank's and micro-batch's part of the mean over the `tokens` of all ranks and micro-batches.

    It is multiplied by the number of ranks: the mean over the ranks of it, and of its gradients, is the loss of all
    tokens, however many each rank and micro-batch has.
    """
    return sum_of_losses * (ranks() / max(tokens, 1))


def caption_kernel(
    name: str, labels_T: Tensor, label_smoothing: float = 0.0, softcap: float | None = None
) -> SumOfLosses:
    """What sums −log p(label) over T tokens: `torch` (ours), or a fused kernel of liger or cut-cross-entropy (cce).

    label_smoothing: its share is the mean of −log p over the vocabulary. softcap: c of scores c · tanh(score / c).
    """
    kernel = {"torch": sum_of_caption_losses, "liger": _liger, "cce": _cut_cross_entropy}[name]
    return lambda hidden_TD, weight_VD, bias_V: kernel(hidden_TD, weight_VD, bias_V, labels_T, label_smoothing, softcap)


def sum_of_caption_losses(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Σ −log softmax(hidden · weightᵀ + bias)[label], in fp32; 0 without tokens. Products as autocast says."""
    return caption_losses(hidden_TD, weight_VD, bias_V, labels_T, label_smoothing, softcap).sum()


def caption_losses(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The terms of that sum, one a token: [T]."""
    device = hidden_TD.device.type
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        return _Losses.apply(hidden_TD, weight_VD, bias_V, labels_T, label_smoothing, softcap, products)


def parts_of_vocabulary(tokens: int, words: int) -> list[slice]:
    width = min(words, max(NARROWEST, TILE // max(tokens, 1)))
    return [slice(start, min(start + width, words)) for start in range(0, words, width)]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        label_smoothing: float,
        softcap: float | None,
        products: torch.dtype,
    ) -> Tensor:
        tokens, words = len(hidden_TD), len(weight_VD)
        score_dtype = torch.promote_types(products, torch.float32)
        own_T = hidden_TD.new_zeros(tokens, dtype=score_dtype)
        total_T, most_T, sum_T = own_T.clone(), own_T - torch.inf, own_T.clone()
        for part, score_Tc in _scores(hidden_TD, weight_VD, bias_V, softcap, products):
            if label_smoothing:
                total_T += score_Tc.sum(dim=1)
            here_T = (labels_T >= part.start) & (labels_T < part.stop)
            label_T1 = (labels_T - part.start).clamp(0, part.stop - part.start - 1)[:, None]
            own_T = torch.where(here_T, score_Tc.gather(1, label_T1)[:, 0], own_T)
            before_T, most_T = most_T, torch.maximum(most_T, score_Tc.amax(dim=1))
            sum_T = sum_T * (before_T - most_T).exp() + score_Tc.sub_(most_T[:, None]).exp_().sum(dim=1)
        normaliser_T = most_T + sum_T.log()
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T, normaliser_T)
        ctx.settings = label_smoothing, softcap, products
        return normaliser_T - (1 - label_smoothing) * own_T - label_smoothing / words * total_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, labels_T, normaliser_T = ctx.saved_tensors
        label_smoothing, softcap, products = ctx.settings
        factor_T1 = gradients[0][:, None]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            dhidden_TD = torch.zeros_like(hidden_TD, dtype=normaliser_T.dtype)
            dweight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
            dbias_V = torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
            hidden = hidden_TD.to(products)
            for part, score_Tc in _scores(hidden_TD, weight_VD, bias_V, softcap, products):
                slope_Tc = None if softcap is None else 1 - (score_Tc / softcap) ** 2
                d_Tc = score_Tc.sub_(normaliser_T[:, None]).exp_()
                if label_smoothing:
                    d_Tc -= label_smoothing / len(weight_VD)
                here = ((labels_T >= part.start) & (labels_T < part.stop)).nonzero()[:, 0]
                d_Tc[here, labels_T[here] - part.start] -= 1 - label_smoothing
                if slope_Tc is not None:
                    d_Tc *= slope_Tc
                d_Tc *= factor_T1
                if dbias_V is not None:
                    dbias_V[part] = d_Tc.sum(dim=0)
                d_Tc = d_Tc.to(products)
                dhidden_TD += d_Tc @ weight_VD[part].to(products)
                if dweight_VD is not None:
                    dweight_VD[part] = d_Tc.T @ hidden
        return dhidden_TD.to(hidden_TD.dtype), dweight_VD, dbias_V, None, None, None, None


def _scores(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, products: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    hidden = hidden_TD.to(products)
    for part in parts_of_vocabulary(len(hidden_TD), len(weight_VD)):
        score_Tc = at_least_fp32(hidden @ weight_VD[part].to(products).T)
        if bias_V is not None:
            score_Tc = score_Tc + bias_V[part]
        yield part, score_Tc if softcap is None else torch.tanh(score_Tc / softcap) * softcap


# --- fused kernels, on GPUs -------------------------------------------------------------------------------------------


def refuse_missing_kernel(name: str, device: str) -> None:
    """Raises UserError for a kernel that is not installed, or not for this device."""
    if name == "torch":
        return
    package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}[name]
    if device != "cuda":
        raise UserError(f"training.caption_kernel={name} is for GPUs; set it to torch")
    try:
        __import__(package)
    except ImportError as e:
        install = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}[name]
        raise UserError(f"training.caption_kernel={name}: {package} is missing: pip install {install}") from e


def _liger(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=label_smoothing, softcap=softcap, reduction="sum")
    return loss(weight_VD.to(hidden_TD.dtype), hidden_TD, labels_T, bias_V).float()


def _cut_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    if label_smoothing:
        raise UserError("training.caption_kernel=cce knows no label smoothing; set it to torch or liger")
    # PyPI's 25.1.1 has no bias; later ones, from its repository, do.
    if bias_V is not None and "bias" not in signature(linear_cross_entropy).parameters:
        raise UserError(
            "training.caption_kernel=cce: this version knows no bias, as the LLM's head has; set torch or liger"
        )
    bias = {} if bias_V is None else {"bias": bias_V}
    # filter_eps: its default leaves small gradients out.
    return linear_cross_entropy(
        hidden_TD, weight_VD.to(hidden_TD.dtype), labels_T, softcap=softcap, reduction="sum", filter_eps=None, **bias
    ).float()
