"""What else is to be true of a text or a picture: a language, no nakedness, whatever a classifier tells apart.

    hf:NAME=LABEL,…                   a classifier of Hugging Face, by its name or folder: of texts or of pictures
    python:MODULE:FUNCTION=LABEL,…    a function of one's own: a list of texts (or of PIL pictures) -> a label each

What stands after `=` is kept, everything else is out. Receives such names. Gives `Classifier`s. Refuses, with a
UserError, names of neither form, models and functions that cannot be loaded, labels that a model does not have, and a
function that gives something else than a label each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mmgem.errors import UserError, one_line

Labels = Callable[[Sequence[Any]], Sequence[str]]
Of = Literal["text", "picture"]


@dataclass(frozen=True)
class Classifier:
    """labels: of so many texts or pictures. kept: which of them pass."""

    name: str
    labels: Labels
    kept: frozenset[str]

    def refusals(self, items: Sequence[Any]) -> list[str]:
        """Why each is out, or "". Raises UserError."""
        if not items:
            return []
        found = list(self.labels(list(items)))
        if len(found) != len(items) or not all(isinstance(label, str) for label in found):
            raise UserError(f"{self.name}: it must give a label for each of {len(items)}, and gave {found!r:.200}")
        return ["" if label in self.kept else f"{self.name}: {label}" for label in found]


def make_classifier(asked: str, of: Of) -> Classifier:
    """Raises UserError."""
    option = f"--keep-{of} {asked}"
    name, equals, wanted = asked.rpartition("=")
    kept = frozenset(label.strip() for label in wanted.split(",") if label.strip())
    kind, _, rest = name.partition(":")
    if not (equals and kept and rest and kind in ("hf", "python")):
        raise UserError(f"{option}: give hf:NAME=LABEL,… or python:MODULE:FUNCTION=LABEL,…")
    return _of_hugging_face(option, name, rest, kept, of) if kind == "hf" else _own(option, name, rest, kept)


def _of_hugging_face(option: str, name: str, model: str, kept: frozenset[str], of: Of) -> Classifier:
    from transformers import pipeline

    task: Any = "text-classification" if of == "text" else "image-classification"
    try:
        classify: Any = pipeline(task, model=model, top_k=1)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        raise UserError(f"{option}: cannot be loaded ({one_line(e)[:200]})") from e
    known = list(classify.model.config.id2label.values())
    if unknown := sorted(kept - set(known)):
        raise UserError(f"{option}: the model knows no {', '.join(unknown)}; its labels are {', '.join(known)[:300]}")
    more = {"truncation": True, "max_length": _longest(classify)} if of == "text" else {}
    return Classifier(name, lambda items: [one[0]["label"] for one in classify(list(items), **more)], kept)


def _longest(classify: Any) -> int:
    """In tokens. A tokenizer that does not say has a number beyond all bounds; some models count positions from 2."""
    stated, places = classify.tokenizer.model_max_length, getattr(classify.model.config, "max_position_embeddings", 514)
    return stated if stated < 1e6 else places - 2


def _own(option: str, name: str, place: str, kept: frozenset[str]) -> Classifier:
    module, _, function = place.rpartition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"{option}: cannot be loaded ({one_line(e)[:200]})") from e
    if not callable(found):
        raise UserError(f"{option}: {place} is no function")
    return Classifier(name, cast(Labels, found), kept)
