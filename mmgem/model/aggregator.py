"""The PoolAggregator: from a feature map to vectors, of the whole image, of boxes, of each place.

Receives map_BCHW and boxes as shares of the map's width and height (0 … 1). Gives vectors of C. Refuses boxes that
are not R x 4. RoIAlign runs in fp32 whatever the map's type (no half-precision kernel on CPU; fewer surprises on GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


class PoolAggregator(nn.Module):
    """Mean, RoIAlign (He et al. 2017, with the half-pixel shift: `aligned=True`), or the map's own places.

    `roi_size` k: RoIAlign gives k x k bins, averaged. `roi_sampling`: points a bin and axis; -1: one a cell, rounded
    up, so that a box of the whole map gives exactly its mean.
    """

    def __init__(self, roi_size: int = 1, roi_sampling: int = -1):
        super().__init__()
        self.roi_size = roi_size
        self.roi_sampling = roi_sampling

    def image(self, map_BCHW: Tensor) -> Tensor:
        """map_BCHW -> B x C: the mean over all places."""
        return map_BCHW.mean(dim=(2, 3))

    def regions(self, map_BCHW: Tensor, boxes_R4: Tensor, image_R: Tensor) -> Tensor:
        """map_BCHW, boxes as shares, and each box's image number -> R x C. No boxes: 0 x C."""
        if boxes_R4.ndim != 2 or boxes_R4.shape[1] != 4:
            raise ValueError(f"boxes_R4 must be R x 4, not {tuple(boxes_R4.shape)}")
        height, width = map_BCHW.shape[-2:]
        scale_4 = torch.tensor([width, height, width, height], dtype=torch.float32, device=map_BCHW.device)
        rois_R5 = torch.cat([image_R[:, None].to(torch.float32), boxes_R4.to(torch.float32) * scale_4], dim=1)
        with torch.autocast(map_BCHW.device.type, enabled=False):
            pooled_RCkk = roi_align(
                map_BCHW.float(), rois_R5, self.roi_size, sampling_ratio=self.roi_sampling, aligned=True
            )
        return pooled_RCkk.mean(dim=(2, 3)).to(map_BCHW.dtype)

    def locations(self, map_BCHW: Tensor) -> Tensor:
        """map_BCHW -> B x H x W x C: one vector a place."""
        return map_BCHW.permute(0, 2, 3, 1)
