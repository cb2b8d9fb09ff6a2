"""From a PIL picture to the tensor a tower takes, and boxes along with it.

Receives a picture and the tower's size, mean and standard deviation; gives the normalised tensor. Boxes come in as
pixels of the given picture and leave as shares of the tensor's width and height (0 … 1), so that a feature map of any
grid can be addressed. Shared by training and use, so that both see the same pixels. Refuses nothing: what comes in
has been validated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Window = tuple[float, float, float, float]
"""x1, y1, x2, y2 of the part of the picture that becomes the tensor, in its pixels."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a tower wants its pictures."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["squash", "crop"] = "squash"

    def window(self, width: int, height: int) -> Window:
        """What the plain (not augmented) view shows: all of the picture, or its central square."""
        if self.resize == "squash":
            return (0.0, 0.0, float(width), float(height))
        side = min(width, height)
        x, y = (width - side) / 2, (height - side) / 2
        return (x, y, x + side, y + side)

    def __call__(
        self, image: Image.Image, window: Window | None = None, flip: bool = False, *, rough: bool = False
    ) -> Tensor:
        """picture -> 3 x size x size, float32. `flip` mirrors left and right after the cut.

        `rough`: a side of twice the size or more is first made smaller by whole steps, each the mean of its pixels.
        """
        window = window or self.window(*image.size)
        resized = image if image.mode == "RGB" else image.convert("RGB")
        if resized.size != (self.size, self.size) or window != (0.0, 0.0, float(self.size), float(self.size)):
            gap = 1.0 if rough else None
            resized = resized.resize((self.size, self.size), Image.Resampling.BICUBIC, window, reducing_gap=gap)
        if flip:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(resized)

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB -> 3 x height x width, contiguous."""
        # Each row's red, then its green, then its blue: cheaper to take apart than pixels.
        rows_H3W = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
        pixels_3HW = rows_H3W.transpose(1, 0, 2).astype(np.float32, order="C")
        pixels_3HW /= 255
        pixels_3HW -= np.asarray(self.mean, np.float32)[:, None, None]
        pixels_3HW /= np.asarray(self.std, np.float32)[:, None, None]
        return torch.from_numpy(pixels_3HW)


def move_boxes(boxes: Sequence[Sequence[float]], window: Window, flip: bool = False) -> Tensor:
    """Boxes in pixels of the picture -> R x 4 shares (0 … 1) of the view of `window` and `flip`, clipped to it."""
    if len(boxes) == 0:
        return torch.zeros(0, 4)
    boxes_R4 = torch.tensor([list(b) for b in boxes], dtype=torch.float32)
    x1, y1, x2, y2 = window
    boxes_R4 = (boxes_R4 - torch.tensor([x1, y1, x1, y1])) / torch.tensor([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    if flip:
        boxes_R4 = torch.stack([1 - boxes_R4[:, 2], boxes_R4[:, 1], 1 - boxes_R4[:, 0], boxes_R4[:, 3]], dim=1)
    return boxes_R4.clamp(0, 1)


def kept_share(boxes: Sequence[Sequence[float]], window: Window) -> list[float]:
    """For each box the share of its area that lies inside the window."""
    shares = []
    for bx1, by1, bx2, by2 in boxes:
        width = max(0.0, min(bx2, window[2]) - max(bx1, window[0]))
        height = max(0.0, min(by2, window[3]) - max(by1, window[1]))
        shares.append(width * height / ((bx2 - bx1) * (by2 - by1)))
    return shares
