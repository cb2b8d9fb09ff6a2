"""Augmentation: what part of a picture is shown, and how, with its boxes moved along.

Receives a picture's size and a random generator; gives a `View`; a view applied to a picture gives the tensor, and to
boxes their shares of it. Boxes of which less than half is left are dropped, since their phrase may not hold any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from mmgem.config import DataConfig
from mmgem.data.samples import OpenedPicture
from mmgem.images import Preprocess, Window, kept_share, move_boxes

KEPT_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class View:
    window: Window
    flip: bool = False
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors on brightness, contrast, saturation."""

    def picture(self, image: Image.Image, preprocess: Preprocess) -> Tensor:
        """-> 3 x S x S, normalised."""
        return preprocess(self.recoloured(image), self.window, self.flip)

    def recoloured(self, image: Image.Image) -> Image.Image:
        if self.color != (1.0, 1.0, 1.0):
            for enhance, factor in zip(
                (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), self.color, strict=True
            ):
                image = enhance(image).enhance(factor)
        return image

    def boxes(self, boxes: Sequence[Sequence[float]]) -> tuple[Tensor, list[int]]:
        """Boxes in pixels -> their shares of the view, and the numbers of those kept."""
        kept = [i for i, share in enumerate(kept_share(boxes, self.window)) if share >= KEPT_SHARE]
        return move_boxes([boxes[i] for i in kept], self.window, self.flip), kept


def view_picture(opened: OpenedPicture, view: View, preprocess: Preprocess, *, scaled: bool) -> Tensor:
    """-> 3 x S x S, normalised: of the full picture `view.picture(opened.decode(), preprocess)`, or faster.

    `scaled`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the window still has S pixels a side, and what is
    left to shrink by whole steps is averaged. `view.window` is in pixels of the full picture, whose size is
    `opened.size`, all the same. Raises SampleError.
    """
    needed = None
    if scaled:
        (width, height), (x1, y1, x2, y2) = opened.size, view.window
        needed = ceil(preprocess.size * width / (x2 - x1)), ceil(preprocess.size * height / (y2 - y1))
    image = view.recoloured(opened.decode(needed))
    return preprocess(image, opened.place(view.window), view.flip, rough=scaled)


def plain_view(preprocess: Preprocess, width: int, height: int) -> View:
    return View(preprocess.window(width, height))


def draw_view(config: DataConfig, preprocess: Preprocess, width: int, height: int, rng: np.random.Generator) -> View:
    """A crop of a random share of the plain view's area (its aspect within 3/4 … 4/3 of it, and so that the share fits
    into it), a flip, a colour shift."""
    x1, y1, x2, y2 = preprocess.window(width, height)
    window = (x1, y1, x2, y2)
    if config.crop_scale != (1.0, 1.0):
        share = rng.uniform(*config.crop_scale)
        narrow = max(3 / 4, share)
        aspect = np.exp(rng.uniform(np.log(narrow), -np.log(narrow)))
        w = (x2 - x1) * float(np.sqrt(share * aspect))
        h = (y2 - y1) * float(np.sqrt(share / aspect))
        left, top = x1 + rng.uniform(0, x2 - x1 - w), y1 + rng.uniform(0, y2 - y1 - h)
        window = (left, top, left + w, top + h)
    flip = bool(rng.random() < config.flip)
    color = (1.0, 1.0, 1.0)
    if config.color_jitter:
        low, high = 1 - config.color_jitter, 1 + config.color_jitter
        color = (float(rng.uniform(low, high)), float(rng.uniform(low, high)), float(rng.uniform(low, high)))
    return View(window, flip, color)
