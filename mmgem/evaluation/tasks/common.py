"""What the tasks share: options, the protocol that stands beside the figures, and drawing examples.

Receives the model, the encoded split and options. Refuses nothing by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import mmgem
from mmgem.inference.encode import Encoder
from mmgem.ranks import Ranks

BOX_CONVENTION = "x1, y1, x2, y2 in pixels of the picture, edges: x2 and y2 are exclusive"
"""As in `data.samples`, which readers of other conventions change to."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of all tasks.

    baseline: "crop" adds the figures of boxes cut out and embedded as images (region-retrieval).
    same_text: a caption that other images carry word for word counts for them as well (retrieval); the published
    protocols count only the image's own. captions: only so many of each image, its first ones (retrieval, rerank); 0:
    all. COCO's published retrieval figures are of five. join_captions: all captions of an image, joined, are its one
    text, as long texts are retrieved with (retrieval, rerank). classes, templates: files of class names and of texts to
    put them into, instead of those that the data say (zero-shot). alpha: the weight of log p(text | no image) that is
    taken off log p(text | image) (zero-shot, composition, rerank). candidates: how many of the nearest are judged again
    (rerank). queries: at most so many, where each is costly (rerank, similarity-map, zero-shot). images: folders with
    the pictures that the data name (composition). java: METEOR and SPICE as well, where Java and pycocoevalcap are.
    samples: bootstrap resamples.
    drawn, worst: examples for the report.
    """

    split: str = "test"
    data: str = ""
    num_beams: int = 1
    max_new_tokens: int = 30
    length_penalty: float = 1.0
    rerank: float = 0.0
    baseline: Literal["none", "crop"] = "none"
    same_text: bool = False
    captions: int = 0
    join_captions: bool = False
    classes: Path | None = None
    templates: Path | None = None
    alpha: float = 1.0
    candidates: int = 10
    queries: int = 500
    images: tuple[Path, ...] = ()
    java: bool = True
    samples: int = 1000
    seed: int = 0
    drawn: int = 20
    worst: int = 20
    progress: bool = True
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def work(self) -> dict[str, Any]:
        """How long work is shared and shown, for the functions of `inference.encode`."""
        return {"progress": self.progress, "ranks": self.ranks}

    @property
    def bootstrap(self) -> dict[str, Any]:
        return {"samples": self.samples, "seed": self.seed}

    @property
    def writing(self) -> dict[str, Any]:
        """How captions are written, for `MMGem.write` and for the protocol. Beams of 1: greedy."""
        return {
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "length_penalty": self.length_penalty,
            "rerank": self.rerank,
        }


def protocol(
    model: Encoder,
    options: TaskOptions,
    task_version: int,
    *,
    images: int,
    skipped: int,
    units: str = "the images",
    **more: Any,
) -> dict[str, Any]:
    """How the figures came about: split, counts, dtype, versions, and what the task adds."""
    return {
        "version": task_version,
        "data": options.data,
        "split": options.split,
        "images": images,
        "skipped": skipped,
        "prompt": None,
        "dtype": dtype_of(model),
        "stderr": f"bootstrap, {options.samples} resamples of {units}, seed {options.seed}",
        **more,
        "versions": versions(),
    }


def dtype_of(model: Encoder) -> str:
    """The dtype of the weights, "float32" for a model without any; scores are always float32."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return str(parameter.dtype).removeprefix("torch.")
    return "float32"


def versions() -> dict[str, str]:
    """Of the packages that can change a figure."""
    found = {"mmgem": mmgem.__version__}
    for package in ("torch", "transformers", "open_clip_torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def logit_scale_of(model: Encoder) -> float:
    """The logarithm of what cosines are multiplied by; CLIP's highest for a model without."""
    found = getattr(model, "logit_scale", None)
    return math.log(100) if found is None else float(torch.as_tensor(found).detach())


def writes(model: Encoder) -> bool:
    """Whether the model knows how likely a text is; an open_clip model does not."""
    return getattr(model, "writes", True)


def mean_vector(vectors_NE: Tensor) -> Tensor:
    """[1, E] what stands for "no image" where a text's own likelihood is asked for: the mean of the set's vectors."""
    return vectors_NE.mean(dim=0, keepdim=True)


def draw(items: int, count: int, seed: int) -> list[int]:
    """`count` of `items` by lot, without repeats; the same for every model."""
    count = min(items, count)
    return sorted(np.random.default_rng(seed).choice(items, size=count, replace=False).tolist())


def worst(badness: Sequence[float] | np.ndarray, count: int, without: Sequence[int]) -> list[int]:
    """The `count` items of greatest badness, worst first; not those in `without`."""
    left_out = set(without)
    order = np.argsort(-np.asarray(badness, dtype=np.float64), kind="stable")
    return [int(i) for i in order if int(i) not in left_out][:count]
