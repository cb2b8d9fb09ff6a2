"""What a task gives back, its metrics.json, and the examples that the report shows.

Receives figures; gives JSON of schema 1. Refuses figures that are not finite, with a ValueError:
JSON has no name for them, and a reader would take them for a result.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmgem.data.samples import Box
from mmgem.evaluation.metrics.scores import Items, Scores

SCHEMA = 1

Kind = Literal["drawn", "worst"]
"""Drawn by lot (the same items for every model), or the worst of this model."""


@dataclass(frozen=True, slots=True)
class CaptionExample:
    """An image, what the model wrote for it, and what people wrote. score: its CIDEr."""

    kind: Kind
    image: int
    written: str
    references: tuple[str, ...]
    score: float


@dataclass(frozen=True, slots=True)
class BoxNote:
    """A box, the phrases given to it, and what the model wrote. right: where it can be told."""

    box: Box
    phrases: tuple[str, ...]
    written: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class RegionExample:
    """Some boxes of one image."""

    kind: Kind
    image: int
    notes: tuple[BoxNote, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """One place of a result list: an image, or a box of it."""

    image: int
    box: Box | None
    score: float
    right: bool


@dataclass(frozen=True, slots=True)
class SearchExample:
    """A query, its best results, and the place (from 1 on) of the best right one, `wanted`."""

    kind: Kind
    query: str
    place: int
    hits: tuple[Hit, ...]
    wanted: Hit


@dataclass(frozen=True, slots=True)
class ChoiceExample:
    """A picture, what was asked of it, and the texts to choose from.

    choices: (text, score, whether it is right), best first, at most 6. taken: the best is right.
    """

    kind: Kind
    image: int
    question: str
    choices: tuple[tuple[str, float, bool], ...]
    taken: bool


@dataclass(frozen=True, slots=True)
class MapExample:
    """Where in a picture a text is seen.

    scores: H rows of W cosines, in even cells over `window` (pixels of the picture, as `boxes` and
    `peak` are). boxes: of what the text names. peak: x, y of the greatest. hit: it lies in one of the boxes.
    """

    kind: Kind
    image: int
    text: str
    window: Box
    scores: tuple[tuple[float, ...], ...]
    boxes: tuple[Box, ...]
    peak: tuple[float, float]
    hit: bool


Example = CaptionExample | RegionExample | SearchExample | ChoiceExample | MapExample


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a line for the report, from left to right."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often a thing of class i was taken for class j: counts[i][j]."""

    classes: list[str]
    counts: list[list[int]]


@dataclass(slots=True)
class TaskResult:
    """Figures of one task for one model.

    items: what each figure was made of; `keys` names the units (images) in the order of the data.
    picture: image i, of which the examples speak.
    """

    task: str
    protocol: dict[str, Any]
    metrics: dict[str, float]
    stderr: dict[str, float]
    chance: dict[str, float]
    examples: list[Example] = field(default_factory=list)
    model: str = ""
    items: dict[str, Items] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    picture: Callable[[int], Image.Image] | None = None
    curves: list[Curve] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    """By name what else is to be written beside metrics.json, as JSON, for other tools."""
    confusion: Confusion | None = None

    @classmethod
    def of(
        cls, task: str, protocol: dict[str, Any], scores: Scores, examples: list[Example], **more: Any
    ) -> "TaskResult":
        """From `Scores`; more: other fields. Raises ValueError if a figure is not finite."""
        for kind in (scores.metrics, scores.stderr, scores.chance):
            for name, value in kind.items():
                if not math.isfinite(value):
                    raise ValueError(f"{task}: {name} is {value}")
        return cls(task, protocol, scores.metrics, scores.stderr, scores.chance, examples, items=scores.items, **more)

    def to_json(self) -> dict[str, Any]:
        """metrics.json of schema 1 (metrics.schema.json); without the examples."""
        return {
            **({"model": self.model} if self.model else {}),
            "schema": SCHEMA,
            "task": self.task,
            "protocol": self.protocol,
            "metrics": self.metrics,
            "stderr": self.stderr,
            "chance": self.chance,
        }


def metrics_json(results: Sequence[TaskResult]) -> dict[str, Any] | list[dict[str, Any]]:
    """One result: itself. Several: a list of them."""
    return results[0].to_json() if len(results) == 1 else [r.to_json() for r in results]


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
