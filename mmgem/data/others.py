"""What is made of a sample beside its own captions and picture: hard negatives, or the same in another order.

Receives a sample, its chosen captions, its picture as the model will see it, and a generator. Gives texts, each with
the caption that it was made of, and pictures: its own in another order, and those that were drawn of the texts. Refuses
nothing: a sample of which nothing can be made has none.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Collection, Sequence
from random import Random

import numpy as np
from PIL import Image
from torch import Tensor

from mmgem.config import NegativesConfig
from mmgem.data.batch import OtherText
from mmgem.data.samples import Sample, SampleError, decode_image, parse_sample
from mmgem.data.sources import Sources
from mmgem.negatives import KIND_NUMBERS, Negative, negatives_of, words_of

_COUNTED_SAMPLES = 500
"""Whose captions say how often the data use a word."""


class Others:
    """As a stage's `negatives` wants them."""

    def __init__(self, dataset: Sources, wanted: NegativesConfig):
        self.wanted = wanted
        by_rules = wanted.texts and wanted.source == "rules"
        self.frequency = words_of(_first_captions(dataset)) if by_rules else None

    def texts(
        self, sample: Sample, chosen: Sequence[int], rng: np.random.Generator
    ) -> tuple[tuple[OtherText, ...], list[Image.Image]]:
        """At most so many of each chosen caption, none that is another caption of the sample; and the pictures that
        were drawn of them, to come after the `shuffled` ones."""
        wanted = self.wanted
        if not wanted.texts:
            return (), []
        places = [place for place, n in enumerate(chosen) if self._is_short(sample.captions[n])]
        draw = Random(int(rng.integers(2**63)))
        if wanted.source == "data":
            found = stored_negatives(sample, wanted.kinds)
        else:
            beside = () if wanted.order_robust else sample.captions
            found = {
                n: negatives_of(sample.captions[n], wanted.kinds, draw, wanted.texts, beside, self.frequency)
                for n in (chosen[place] for place in places)
            }
        true = {caption.strip().lower() for caption in sample.captions}
        others: list[OtherText] = []
        pictures: list[Image.Image] = []
        for place in places:
            own = [one for one in found.get(chosen[place], []) if one.text.strip().lower() not in true]
            drawn = own if len(own) <= wanted.texts else draw.sample(own, wanted.texts)
            for one in drawn:
                picture = opened_picture(one) if wanted.drawn else None
                number = -1 if picture is None else wanted.pictures + len(pictures)
                pictures += [] if picture is None else [picture]
                others.append(OtherText(place, one.text, KIND_NUMBERS.get(one.kind, len(KIND_NUMBERS)), number))
        return tuple(others), pictures

    def first(self, sample: Sample) -> list[int]:
        """Captions that are to be chosen before the sample's others."""
        found = stored_negatives(sample, self.wanted.first) if self.wanted.first else {}
        return sorted(n for n in found if n in range(len(sample.captions)) and self._is_short(sample.captions[n]))

    def _is_short(self, caption: str) -> bool:
        return self.wanted.max_words is None or len(caption.split()) <= self.wanted.max_words

    def shuffled(self, picture: Tensor, rng: np.random.Generator) -> tuple[Tensor, ...]:
        return tuple(shuffled_patches(picture, self.wanted.patches, rng) for _ in range(self.wanted.pictures))


def _first_captions(dataset: Sources) -> list[str]:
    """Of the first samples; the same on each rank."""
    captions: list[str] = []
    for index in range(min(len(dataset), _COUNTED_SAMPLES)):
        try:
            captions += dataset.captions(index)
        except SampleError:
            continue
    return captions


def stored_negatives(sample: Sample, kinds: Collection[str]) -> dict[int, list[Negative]]:
    """Those of the kinds that lie with a sample, as `"negatives": [{"text": …, "kind": …, "caption": number}]` in its
    record, by the number of the caption (0, where it is left out). `"picture"`: drawn of it, a file's bytes in
    base64."""
    found: dict[int, list[Negative]] = {}
    stored = sample.meta.get("negatives") or []
    for one in stored if isinstance(stored, list) else []:
        if isinstance(one, dict) and isinstance(one.get("text"), str) and one["text"].strip():
            kind, caption = str(one.get("kind", "")), one.get("caption", 0)
            if isinstance(caption, int) and (not kinds or kind in kinds):
                drawn = one.get("picture")
                negative = Negative(one["text"], kind, drawn if isinstance(drawn, str) else "")
                found.setdefault(caption, []).append(negative)
    return found


def opened_picture(negative: Negative) -> Image.Image | None:
    """What was drawn of it; None where there is nothing, or nothing that can be read."""
    if not negative.picture:
        return None
    try:
        content = b64decode(negative.picture, validate=True)
        return decode_image(parse_sample("", content, {"captions": [negative.text]}))
    except (ValueError, SampleError):
        return None


def shuffled_patches(picture: Tensor, patches: int, rng: np.random.Generator) -> Tensor:
    """3 x S x S, or a feature map, cut into patches x patches of the same size, which change places; what is left over
    at the right and lower border stays. Never the picture itself."""
    h, w = picture.shape[-2] // patches, picture.shape[-1] // patches
    order = rng.permutation(patches**2)
    while (order == np.arange(patches**2)).all():
        order = rng.permutation(patches**2)
    out = picture.clone()
    for place, source in enumerate(order.tolist()):
        (y, x), (v, u) = divmod(place, patches), divmod(source, patches)
        out[..., y * h : y * h + h, x * w : x * w + w] = picture[..., v * h : v * h + h, u * w : u * w + w]
    return out
