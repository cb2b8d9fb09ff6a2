"""Cross-entropy of captions.

Receives scores at label positions only. Gives the mean over tokens. Refuses nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def caption_loss(logits_TV: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean −log p(label) over the T tokens, in fp32; 0 without tokens."""
    if len(labels_T) == 0:
        return logits_TV.sum() * 0.0
    return F.cross_entropy(logits_TV.float(), labels_T, label_smoothing=label_smoothing)
