"""A small working model of colours, with the methods of MMGem that evaluation uses.

The vector of a picture, a box or a text is its mean colour, from -1 to 1, so that every figure it
gets on coloured pictures can be worked out by hand. What it writes is the name of the colour.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Box = tuple[float, float, float, float]

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


def colour_vector(name: str) -> Tensor:
    return torch.tensor(COLOURS[name], dtype=torch.float32) / 127.5 - 1


class WordCodec:
    """The part of TextCodec that evaluation uses; a word is a token."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        lengths = [len(text.split()) for text in texts]
        return [[0] * min(n, self.max_tokens) for n in lengths], [n > self.max_tokens for n in lengths]


class ColourModel:
    """Counts its passes, so that a test can tell how often it was asked."""

    def __init__(self, noun: str = "ball", max_tokens: int = 16) -> None:
        self.noun = noun
        self.codec = WordCodec(max_tokens)
        self.images_seen = 0
        self.texts_seen: list[str] = []

    def sees(self, image: Image.Image, box: Box) -> bool:
        return True

    def image_vectors(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        self.images_seen += len(images)
        return torch.stack([_mean(image) for image in images])

    def image_and_region_vectors(
        self,
        images: Sequence[Image.Image],
        boxes: Sequence[Sequence[Box]],
        batch_size: int = 64,
    ) -> tuple[Tensor, list[Tensor]]:
        regions = []
        for image, own in zip(images, boxes, strict=True):
            cuts = [_mean(image.crop(tuple(round(x) for x in box))) for box in own]
            regions.append(torch.stack(cuts) if cuts else torch.zeros(0, 3))
        return self.image_vectors(images), regions

    def text_vectors(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        self.texts_seen += texts
        rows = []
        for text in texts:
            found = [colour_vector(w) for w in text.lower().split() if w in COLOURS]
            rows.append(torch.stack(found).mean(dim=0) if found else torch.zeros(3))
        return torch.stack(rows)

    def write(
        self,
        vectors_NE: Tensor,
        *,
        num_beams: int = 1,
        max_new_tokens: int = 30,
        length_penalty: float = 1.0,
        rerank: float = 0.0,
    ) -> list[str]:
        names = list(COLOURS)
        known = torch.stack([colour_vector(name) for name in names])
        nearest = torch.cdist(vectors_NE, known).argmin(dim=1).tolist()
        return [f"a {names[i]} {self.noun}" for i in nearest]

    def log_likelihoods(self, vectors_NE, texts, vector_P, text_P, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Minus the distance of the two colours, and a little for each word."""
        words = torch.tensor([len(text.split()) for text in texts])
        distance_P = (vectors_NE[vector_P] - self.text_vectors(texts)[text_P]).norm(dim=1)
        return -distance_P - 0.1 * words[text_P], words[text_P] + 1

    def prefix_tree(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def choose(self, vectors_NE: Tensor, texts: Sequence[str], num_beams: int = 5) -> tuple[Tensor, Tensor]:
        log_p_NT = -torch.cdist(vectors_NE, self.text_vectors(list(texts)))
        best = log_p_NT.topk(min(num_beams, len(texts)), dim=1)
        return best.indices, best.values

    def place_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        """2 x 4 places, each with the mean colour of its part."""
        rows = []
        for image in images:
            w, h = image.width // 4, image.height // 2
            cuts = [image.crop((x * w, y * h, x * w + w, y * h + h)) for y in range(2) for x in range(4)]
            rows.append(torch.stack([_mean(cut) for cut in cuts]).view(2, 4, -1))
        return torch.stack(rows)

    def window(self, image: Image.Image) -> Box:
        return 0.0, 0.0, float(image.width), float(image.height)


def _mean(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).reshape(-1, 3).mean(axis=0)
    return torch.from_numpy(pixels / 127.5 - 1)
