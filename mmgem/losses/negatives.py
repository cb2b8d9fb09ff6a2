"""Losses against hard negatives: texts, each made of one caption, that are nearly it and not true of its picture.

Receives un-normalised vectors of this rank: of captions with their pictures, and of negatives; and how many negatives
(or captions that have some) there are on all ranks. Gives this rank's part of each loss. Refuses nothing.

As with the caption losses, a part is multiplied by the number of ranks: the mean over the ranks of it, and of its
gradients, is the loss of all pairs, however many each rank has. What adds negatives to the columns of the contrastive
loss (NegCLIP, SPEC) is `contrastive_loss` itself, which takes texts that are nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.gather import ranks, sum_over_ranks
from mmgem.precision import at_least_fp32

MOST_MARGIN = 10.0


@dataclass(slots=True)
class Scores:
    """Of M captions and K negatives, S = exp(logit_scale) · cosine.

    own_M: picture and caption. negative_K: picture and negative. text_K: caption and negative. caption_K: whose
    negative it is. kind_K: how it was made, from 0 on.
    """

    own_M: Tensor
    negative_K: Tensor
    text_K: Tensor
    caption_K: Tensor
    kind_K: Tensor

    @property
    def asked_M(self) -> Tensor:
        """Which captions have negatives."""
        counts_M = torch.bincount(self.caption_K, minlength=len(self.own_M))
        return counts_M > 0


def hard_scores(
    picture_ME: Tensor, caption_ME: Tensor, negative_KE: Tensor, caption_K: Tensor, kind_K: Tensor, logit_scale: Tensor
) -> Scores:
    """picture_ME: of each caption. In at least fp32, whatever autocast says."""
    with torch.autocast(picture_ME.device.type, enabled=False):
        picture_ME, caption_ME, negative_KE = (
            F.normalize(at_least_fp32(x), dim=-1) for x in (picture_ME, caption_ME, negative_KE)
        )
        scale = at_least_fp32(logit_scale).exp()
        return Scores(
            own_M=scale * (picture_ME * caption_ME).sum(dim=-1),
            negative_K=scale * (picture_ME[caption_K] * negative_KE).sum(dim=-1),
            text_K=scale * (caption_ME[caption_K] * negative_KE).sum(dim=-1),
            caption_K=caption_K,
            kind_K=kind_K,
        )


def rank_loss(scores: Scores, negatives: int, kinds: int) -> Tensor:
    """CE-CLIP's cross-modal rank loss (Zhang et al. 2024), a mean over the `negatives` of all ranks:

        max(0, margin_k + S(I, T⁻) − S(I, T)),   margin_k = mean S(I, T) − mean S(I, T⁻) over the negatives of kind k

    The margin has no gradient, is of all ranks, and lies between 0 and MOST_MARGIN: it grows as the model learns.
    """
    own_K = scores.own_M[scores.caption_K]
    gap_K = own_K - scores.negative_K
    sums_K2 = torch.stack([gap_K, torch.ones_like(gap_K)], dim=1).detach()
    sums_k2 = sum_over_ranks(gap_K.new_zeros(kinds, 2).index_add_(0, scores.kind_K, sums_K2))
    margin_k = (sums_k2[:, 0] / sums_k2[:, 1].clamp(min=1)).clamp(0, MOST_MARGIN)
    return _mean(F.relu(margin_k[scores.kind_K] - gap_K).sum(), negatives)


def intra_modal_loss(scores: Scores, captions: int) -> Tensor:
    """CE-CLIP's intra-modal loss, with the positive that its docstring has: a mean over the `captions` with negatives,

    −log( exp S(I, T) / (exp S(I, T) + Σ_k exp S(T, T⁻_k)) )
    """
    return _mean(_softplus_of(scores, scores.text_K).sum(), captions)


def focal_loss(scores: Scores, captions: int, gamma: float = 2.0, smoothing: float = 0.02) -> Tensor:
    """FSC-CLIP's (Oh et al. 2024): for each caption with K negatives a choice of 1 + K texts by the picture,

        −Σ_c y_c (1 − p_c)^gamma log p_c,   y = 1 − smoothing for the caption, and smoothing / (1 + K) more for each

    so that easy choices count little, and negatives are not pushed ever further away. A mean over the `captions`.
    """
    count = len(scores.own_M)
    number_M = torch.bincount(scores.caption_K, minlength=count).to(scores.own_M.dtype)
    total_M = torch.logaddexp(scores.own_M, _logsumexp(scores.negative_K, scores.caption_K, count))
    share_M = smoothing / (1 + number_M)
    log_own_M = scores.own_M - total_M
    log_negative_K = scores.negative_K - total_M[scores.caption_K]

    def focal(log_p: Tensor) -> Tensor:
        # 1 − p, from log p, exact where p is nearly 1.
        return (-torch.expm1(log_p)).clamp(min=0) ** gamma * -log_p

    own = ((1 - smoothing + share_M) * focal(log_own_M))[scores.asked_M].sum()
    others = (share_M[scores.caption_K] * focal(log_negative_K)).sum()
    return _mean(own + others, captions)


def written_loss(log_p_K: Tensor, own_log_p_K: Tensor, margin: float) -> Tensor:
    """What only a model that writes can have: the caption is likelier to be written for its picture than its negative,

        Σ_k max(0, margin + log p(T⁻_k | I) − log p(T | I)),   log p: means over the tokens and the end of the text

    a sum, as of the caption losses' tokens: `caption_loss` makes a mean of it.
    """
    return F.relu(margin + log_p_K - own_log_p_K).sum()


def triplet_loss(
    picture_KE: Tensor,
    caption_KE: Tensor,
    other_picture_KE: Tensor,
    negative_KE: Tensor,
    logit_scale: Tensor,
    pairs: int,
) -> Tensor:
    """For negatives that have a picture of their own, for which they are true (TripletCLIP, Patel et al. 2024): of the
    two pictures and two texts each picture is to choose its text and each text its picture; the sum of the four
    cross-entropies, halved, a mean over the `pairs` of all ranks.
    """
    with torch.autocast(picture_KE.device.type, enabled=False):
        pictures_K2E, texts_K2E = (
            F.normalize(at_least_fp32(torch.stack(pair, dim=1)), dim=-1)
            for pair in ((picture_KE, other_picture_KE), (caption_KE, negative_KE))
        )
        score_K22 = at_least_fp32(logit_scale).exp() * pictures_K2E @ texts_K2E.mT
        own_K2 = score_K22.diagonal(dim1=1, dim2=2)
        over = (score_K22.logsumexp(dim=2) - own_K2).sum() + (score_K22.logsumexp(dim=1) - own_K2).sum()
        return _mean(over / 2, pairs)


# --------------------------------------------------------------------------------------------- pieces


def _softplus_of(scores: Scores, other_K: Tensor) -> Tensor:
    """log(1 + Σ_k exp(other_k − own)) of each caption with negatives."""
    against_M = _logsumexp(other_K, scores.caption_K, len(scores.own_M))
    return F.softplus((against_M - scores.own_M)[scores.asked_M])


def _logsumexp(value_K: Tensor, group_K: Tensor, groups: int) -> Tensor:
    """Of each group; −inf for one without."""
    most_M = value_K.new_full((groups,), -torch.inf).scatter_reduce(0, group_K, value_K.detach(), "amax")
    finite_M = torch.where(most_M.isfinite(), most_M, 0)
    sum_M = value_K.new_zeros(groups).index_add(0, group_K, (value_K - finite_M[group_K]).exp())
    return torch.where(sum_M > 0, sum_M, 1).log() + torch.where(sum_M > 0, finite_M, -torch.inf)


def _mean(total: Tensor, count: int) -> Tensor:
    return total * (ranks() / max(count, 1))
