"""The PoolAggregator: from a feature map to vectors, of the whole image, of boxes, of each place.

Receives map_BCHW and boxes as shares of the map's width and height (0 … 1). Gives vectors of C. Refuses boxes that
are not R x 4. Boxes are pooled in fp32 whatever the map's type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from mmgem.precision import at_least_fp32


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
        weights_RN = self._place_weights(boxes_R4, *map_BCHW.shape[-2:])
        with torch.autocast(map_BCHW.device.type, enabled=False):
            map_BNC = at_least_fp32(map_BCHW).flatten(2).transpose(1, 2)
            return _pool_per_image(weights_RN.to(map_BNC.dtype), map_BNC, image_R).to(map_BCHW.dtype)

    def _place_weights(self, boxes_R4: Tensor, height: int, width: int) -> Tensor:
        """What RoIAlign adds up for each box: R x (H * W), the weight of each place of the map.

        RoIAlign is linear in the map, and its weights are a product of one factor for the rows and one for the columns.
        Both are read off by pooling maps that are 1 in a single row or column, which is far less work, forward and
        backward, than pooling all channels.
        """
        rows_HHW = torch.eye(height, device=boxes_R4.device, dtype=torch.float32)[:, :, None].expand(-1, -1, width)
        columns_WHW = torch.eye(width, device=boxes_R4.device, dtype=torch.float32)[:, None, :].expand(-1, height, -1)
        scale_4 = boxes_R4.new_tensor([width, height, width, height], dtype=torch.float32)
        pooled = roi_align(
            torch.cat([rows_HHW, columns_WHW])[None],
            [boxes_R4.float() * scale_4],
            self.roi_size,
            sampling_ratio=self.roi_sampling,
            aligned=True,
        )
        of_row_RH, of_column_RW = pooled.mean(dim=(2, 3)).split([height, width], dim=1)
        return (of_row_RH[:, :, None] * of_column_RW[:, None, :]).flatten(1)

    def locations(self, map_BCHW: Tensor) -> Tensor:
        """map_BCHW -> B x H x W x C: one vector a place."""
        return map_BCHW.permute(0, 2, 3, 1)


def _pool_per_image(weights_RN: Tensor, map_BNC: Tensor, image_R: Tensor) -> Tensor:
    """Each box's weighted sum over the places of its image -> R x C."""
    images = len(map_BNC)
    # Each box's number among those of its image.
    place_R = F.one_hot(image_R, images).cumsum(dim=0).gather(1, image_R[:, None])[:, 0] - 1
    most = int(torch.bincount(image_R, minlength=images).max())
    weights_BKN = weights_RN.new_zeros(images, most, weights_RN.shape[1])
    weights_BKN[image_R, place_R] = weights_RN
    return torch.bmm(weights_BKN, map_BNC)[image_R, place_R]
