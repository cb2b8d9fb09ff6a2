"""Cross-entropy of captions.

Receives scores at label positions only. Gives the mean over the tokens of all ranks. Refuses nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.gather import ranks, sum_over_ranks
from mmgem.precision import at_least_fp32


def caption_loss(logits_TV: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean −log p(label) over the T tokens, in fp32; 0 without tokens.

    With several ranks a rank's part of the mean over the tokens of all, times their number: the mean over the ranks of
    that, and of its gradients, is the loss of all tokens, however many each rank has.
    """
    if ranks() == 1:
        if len(labels_T) == 0:
            return logits_TV.sum() * 0.0
        return F.cross_entropy(at_least_fp32(logits_TV), labels_T, label_smoothing=label_smoothing)
    tokens = sum_over_ranks(labels_T.new_tensor(len(labels_T)))
    total = F.cross_entropy(at_least_fp32(logits_TV), labels_T, label_smoothing=label_smoothing, reduction="sum")
    return total * ranks() / tokens.clamp(min=1)
