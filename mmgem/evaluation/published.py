"""Figures that others published, for the report to show beside ours, where the protocol is the same.

Receives a task and the protocol its figures were measured by. Gives the published figures of that protocol, each with
its source. Refuses nothing: another protocol has no published figures.

The figures of MM-GEM are known at second hand: its full text was not at hand, but a review that quotes its tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MM_GEM = "MM-GEM (Ma et al. 2024, arXiv 2405.19333), as quoted at yoonschallenge.tistory.com/1013"
OPEN_CLIP = "open_clip, docs/openclip_retrieval_results.csv, June 2026"


@dataclass(frozen=True, slots=True)
class Condition:
    """What a protocol must say for published figures to stand beside its own.

    data: is part of the data folder's name, small letters without - and _. captions: the fewest and the most an image
    may have.
    """

    data: str
    split: str
    images: int
    captions: tuple[int, int]

    def met(self, protocol: Mapping[str, Any]) -> bool:
        name = str(protocol.get("data") or "").lower().replace("-", "").replace("_", "")
        few_most = protocol.get("captions_an_image")
        return (
            self.data in name
            and protocol.get("split") == self.split
            and protocol.get("images") == self.images
            and not protocol.get("skipped")
            and isinstance(few_most, Sequence)
            and len(few_most) == 2
            and self.captions[0] <= few_most[0] <= few_most[1] <= self.captions[1]
            and not protocol.get("same_text_counts")
        )


@dataclass(frozen=True, slots=True)
class Published:
    """Figures of one model. Fractions, CIDEr as coco-caption prints it."""

    model: str
    source: str
    task: str
    condition: Condition
    figures: Mapping[str, float]


# Karpathy's test splits. Retrieval takes five captions of an image; captioning compares with all of them, and
# some images of COCO have six or seven.
COCO = Condition("coco", "test", 5000, (5, 5))
COCO_WRITTEN = Condition("coco", "test", 5000, (5, 7))
FLICKR = Condition("flickr30k", "test", 1000, (5, 5))


def _recalls(model: str, source: str, condition: Condition, text: float, image: float) -> Published:
    """text: image → text, image: text → image, R@1 in percent as the sources print them."""
    figures = {"text_retrieval_recall@1": text / 100, "image_retrieval_recall@1": image / 100}
    return Published(model, source, "retrieval", condition, figures)


ALL = (
    _recalls("MM-GEM", MM_GEM, COCO, 61.0, 45.6),
    _recalls("MM-GEM", MM_GEM, FLICKR, 89.0, 75.4),
    _recalls("OpenCLIP ViT-L/14 LAION-2B", OPEN_CLIP, COCO, 63.36, 46.51),
    _recalls("OpenCLIP ViT-L/14 LAION-2B", OPEN_CLIP, FLICKR, 89.50, 75.52),
    Published("MM-GEM", MM_GEM, "captioning", COCO_WRITTEN, {"BLEU@4": 0.328, "CIDEr": 1.109}),
)


def published(task: str, protocol: Mapping[str, Any]) -> list[Published]:
    """Those of the task whose condition the protocol meets."""
    return [one for one in ALL if one.task == task and one.condition.met(protocol)]
