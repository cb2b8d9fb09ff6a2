"""InfoNCE with several positives.

Receives un-normalised vectors of two sides and ids that say which belong together, of this rank. Gives the loss over
those of all ranks. Refuses nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.gather import gather_rows
from mmgem.precision import at_least_fp32


def contrastive_loss(
    x_NE: Tensor, owner_N: Tensor, text_ME: Tensor, text_owner_M: Tensor, text_M: Tensor, logit_scale: Tensor
) -> Tensor:
    """InfoNCE between images (or boxes) x and texts, each distinct text once.

    The ids are those of `positives`. Every rank computes the loss of the whole global batch. A text said of many images
    or boxes is one query and one negative: otherwise the most frequent phrases fill the loss, and are pushed away from
    each other box as often as they occur.
    """
    x_NE, text_ME = gather_rows(x_NE), gather_rows(text_ME)
    owner_N, text_owner_M, text_M = gather_rows(owner_N), gather_rows(text_owner_M), gather_rows(text_M)
    first = first_of_each(text_M)
    return info_nce(x_NE, text_ME[first], positives(owner_N, text_owner_M, text_M)[:, first], logit_scale)


def positives(owner_N: Tensor, text_owner_M: Tensor, text_M: Tensor) -> Tensor:
    """N x M bool: true where the text, or an equal one, was given to x's owner.

    owner_N: what each x is (its image, or its entity). text_owner_M: whom each text was given to. text_M: equal for
    equal texts. So two captions of one image, and one phrase of two boxes, are never each other's negatives.
    """
    own_NM = owner_N[:, None] == text_owner_M[None, :]
    same_MM = text_M[:, None] == text_M[None, :]
    return (own_NM.float() @ same_MM.float()) > 0


def first_of_each(text_M: Tensor) -> Tensor:
    """Where each distinct text first stands, in ascending order."""
    _, number_M = text_M.unique(return_inverse=True)
    place_M = torch.arange(len(text_M), device=text_M.device)
    first = torch.full_like(place_M, len(text_M)).scatter_reduce(0, number_M, place_M, "amin")
    return place_M[first[number_M] == place_M]


def info_nce(x_NE: Tensor, y_ME: Tensor, positive_NM: Tensor, logit_scale: Tensor) -> Tensor:
    """x→y plus y→x (a sum, as in MM-GEM), each the mean over its queries, in fp32.

    A query's positives p are averaged; each stands against the negatives alone, never against another positive:

        L_i = mean_p −log( exp(s_ip) / (exp(s_ip) + Σ_{j negative} exp(s_ij)) ),   s = exp(logit_scale) · cos(x, y)

    With one positive a query this is InfoNCE (van den Oord et al. 2018) as CLIP has it. Queries without a positive do
    not count; without any, the loss is 0.
    """
    with torch.autocast(x_NE.device.type, enabled=False):
        x_NE, y_ME = F.normalize(at_least_fp32(x_NE), dim=-1), F.normalize(at_least_fp32(y_ME), dim=-1)
        score_NM = at_least_fp32(logit_scale).exp() * x_NE @ y_ME.T
        return _one_way(score_NM, positive_NM) + _one_way(score_NM.T, positive_NM.T)


def _one_way(score_NM: Tensor, positive_NM: Tensor) -> Tensor:
    negatives_N1 = score_NM.masked_fill(positive_NM, torch.finfo(score_NM.dtype).min).logsumexp(dim=1, keepdim=True)
    # −log(e^s / (e^s + e^neg)) = softplus(neg − s)
    loss_NM = F.softplus(negatives_N1 - score_NM) * positive_NM
    count_N = positive_NM.sum(dim=1)
    loss_N = loss_NM.sum(dim=1) / count_N.clamp(min=1)
    return loss_N.sum() / (count_N > 0).sum().clamp(min=1)
