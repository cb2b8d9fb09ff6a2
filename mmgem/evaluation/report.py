"""The report: one HTML file that opens anywhere, without network, scripts or other files.

Receives the results of one or several models (stages), and what is known of the run. Gives the page: what the model is,
the figures, the curves of training, and examples drawn by lot as well as the worst. Texts from data and models are
escaped. Refuses a report without results, with a ValueError.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from PIL import Image

from mmgem.evaluation.charts import charts, read_log
from mmgem.evaluation.result import (
    CaptionExample,
    Example,
    Hit,
    Kind,
    RegionExample,
    SearchExample,
    TaskResult,
    write_text,
)
from mmgem.evaluation.template import PAGE
from mmgem.page import COLOURS, Mark, cutout, picture, render

_CARD, _TILE = 360, 150  # longest side of the embedded pictures, in pixels
_REFERENCES = 5
_HIT, _MISS = "#2fb36a", "#d9dde1"

E = TypeVar("E", CaptionExample, RegionExample, SearchExample)
Fetch = Callable[[int], Image.Image]
Groups = list[list[tuple[str, E]]]
"""For each item shown: (model, its example)."""


@dataclass(slots=True)
class About:
    """What the page says of the run besides its figures."""

    title: str = "mmgem"
    subtitle: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    settings: str = ""
    """The resolved configuration, shown folded."""
    log: Path | None = None
    footer: str = ""


def write_report(path: Path, results: Sequence[TaskResult], about: About) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render_report(results, about))


def render_report(results: Sequence[TaskResult], about: About) -> str:
    """The page as a string."""
    if not results:
        raise ValueError("a report needs at least one result")
    return render(PAGE, page_parts(results, about))


def page_parts(results: Sequence[TaskResult], about: About) -> dict[str, Any]:
    """The values that the template names."""
    models = list(dict.fromkeys(r.model for r in results))
    last = models[-1]
    of_task: dict[str, list[TaskResult]] = {}
    for result in results:
        of_task.setdefault(result.task, []).append(result)
    regions = of_task.get("region-captioning", [])
    return {
        "title": about.title,
        "subtitle": about.subtitle,
        "facts": about.facts,
        "settings": about.settings,
        "models": [m or "value" for m in models],
        "last_model": last or "the model",
        "ratio_name": f"{last} ÷ {models[0]}" if len(models) > 1 else "÷ chance",
        "tables": [_table(task, rows, models) for task, rows in of_task.items()],
        "charts": charts(read_log(about.log)),
        "captions": _both(of_task.get("captioning", []), last, CaptionExample, _captions),
        "regions": _both(regions, last, RegionExample, _regions)
        | {"judged": any("region_colour_shape_accuracy" in r.metrics for r in regions)},
        "images": _both(of_task.get("retrieval", []), last, SearchExample, _searches),
        "boxes": _both(of_task.get("region-retrieval", []), last, SearchExample, _searches),
        "footer": about.footer,
    }


# --- figures ---------------------------------------------------------------------------------


def _table(task: str, results: Sequence[TaskResult], models: Sequence[str]) -> dict[str, Any]:
    """One block of the table: a row a metric, a cell a model."""
    of_model = {r.model: r for r in results}
    names = dict.fromkeys(name for r in results for name in r.metrics)
    rows = []
    for name in names:
        values = [of_model[m].metrics.get(name) if m in of_model else None for m in models]
        errors = [of_model[m].stderr.get(name) if m in of_model else None for m in models]
        chance = next((r.chance[name] for r in results if name in r.chance), None)
        rows.append(
            {
                # A narrow screen may break the name after an underscore.
                "name": Markup("_<wbr>").join(name.split("_")),
                "cells": [{"value": number(v), "error": _error(v, e)} for v, e in zip(values, errors, strict=True)],
                "chance": number(chance),
                "ratio": _ratio(values[-1], values[0] if len(models) > 1 else chance),
            }
        )
    protocol = json.dumps(results[-1].protocol, indent=1, ensure_ascii=False)
    return {"name": task, "rows": rows, "protocol": protocol}


def number(value: float | None) -> str:
    """Three decimals, four for small figures, one for large ones; a dash for none."""
    return "–" if value is None else f"{value:.{decimals(value)}f}"


def decimals(value: float) -> int:
    return 1 if abs(value) >= 20 else 3 if abs(value) >= 0.01 or value == 0 else 4


def _error(value: float | None, error: float | None) -> str:
    """With as many decimals as the figure it belongs to."""
    return "" if value is None or error is None else f"{error:.{decimals(value)}f}"


def _ratio(value: float | None, base: float | None) -> str:
    if value is None or not base:
        return "–"
    ratio = value / base
    if ratio >= 1000:  # the base is next to nothing
        return "–"
    return f"× {ratio:.2f}" if ratio < 20 else f"× {ratio:,.0f}"


# --- examples --------------------------------------------------------------------------------


def _both(
    results: Sequence[TaskResult],
    last: str,
    kind: type[E],
    build: Callable[[Groups[E], Fetch, TaskResult], list[Any]],
) -> dict[str, Any]:
    """Examples drawn by lot with the answers of every model, and the worst of the last model."""
    out: dict[str, Any] = {"drawn": [], "worst": []}
    if not results or (fetch := results[-1].picture) is None:
        return out
    drawn: dict[Any, list[tuple[str, E]]] = {}
    for result in results:
        for example in _of(result.examples, kind, "drawn"):
            drawn.setdefault(_identity(example), []).append((result.model, example))
    out["drawn"] = build(list(drawn.values()), fetch, results[-1])
    shown = [r for r in results if r.model == last]
    worst = [[(r.model, e)] for r in shown for e in _of(r.examples, kind, "worst")]
    out["worst"] = build(worst, fetch, results[-1])
    return out


def _of(examples: Iterable[Example], kind: type[E], which: Kind) -> list[E]:
    return [e for e in examples if isinstance(e, kind) and e.kind == which]


def _identity(example: Example) -> Any:
    """What makes examples of two models the same item."""
    if isinstance(example, SearchExample):
        return example.query, example.wanted.image if example.wanted.box is None else None
    return example.image


def _written(model: str, text: str) -> dict[str, Any]:
    return {"model": model or "model", "text": text or "(nothing)"}


def _captions(
    groups: Groups[CaptionExample],
    fetch: Fetch,
    _: TaskResult,
) -> list[dict[str, Any]]:
    cards = []
    for group in groups:
        first = group[0][1]
        cards.append(
            {
                "picture": picture(fetch(first.image), _CARD, "image with captions"),
                "references": first.references[:_REFERENCES],
                "written": [_written(m, e.written) | {"score": f"{e.score:.2f}"} for m, e in group],
            }
        )
    return cards


def _regions(
    groups: Groups[RegionExample],
    fetch: Fetch,
    _: TaskResult,
) -> list[dict[str, Any]]:
    cards = []
    for group in groups:
        first = group[0][1]
        marks, notes = [], []
        for n, note in enumerate(first.notes):
            colour, badge = COLOURS[n % len(COLOURS)], str(n + 1)
            marks.append(Mark(note.box, colour, badge))
            first_phrase, *others = note.phrases
            given = first_phrase + (f" (+{len(others)})" if others else "")
            written = [_written(m, e.notes[n].written) | {"right": e.notes[n].right} for m, e in group]
            notes.append({"colour": colour, "badge": badge, "given": given, "written": written})
        image = picture(fetch(first.image), _CARD, "image with numbered boxes", marks)
        cards.append({"picture": image, "notes": notes})
    return cards


def _searches(
    groups: Groups[SearchExample],
    fetch: Fetch,
    result: TaskResult,
) -> list[dict[str, Any]]:
    gallery = result.protocol.get("boxes", result.protocol.get("images", 0))
    items = []
    for group in groups:
        answers = []
        for model, example in group:
            tiles = [
                _tile(hit, fetch, "hit" if hit.right else "", f"{place} · {hit.score:.2f}")
                for place, hit in enumerate(example.hits, 1)
            ]
            if not any(hit.right for hit in example.hits):
                text = f"place {example.place} · {example.wanted.score:.2f}"
                tiles.append(_tile(example.wanted, fetch, "wanted", text))
            answers.append(
                {
                    "model": model or "model",
                    "place": f"{example.place:,}",
                    "gallery": f"{gallery:,}",
                    "tiles": tiles,
                }
            )
        items.append({"query": group[0][1].query, "answers": answers})
    return items


def _tile(hit: Hit, fetch: Fetch, kind: str, text: str) -> dict[str, Any]:
    image = fetch(hit.image)
    alt = "right result" if hit.right else "result"
    if hit.box is None:
        drawn = picture(image, _TILE, alt)
    else:
        drawn = cutout(image, hit.box, _TILE, alt, _HIT if hit.right else _MISS)
    return {"picture": drawn, "kind": kind, "text": text}
