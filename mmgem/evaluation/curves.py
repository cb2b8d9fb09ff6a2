"""Curves and confusions of tasks for the report.

Receives the results of one task for some models. Gives one chart with the lines of all models, and for the last model
its confusion as a table: small ones whole, of many classes the pairs most often taken for each other. Refuses nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmgem.evaluation.result import Confusion, TaskResult
from mmgem.page import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, chart, ticks

_WHOLE = 12  # classes of which the whole table fits a page
_PAIRS = 20
_LINES, _DASHES = 6, ("", "7 4", "2 4", "9 3 2 3")  # colours of the style sheet; kinds of line


@dataclass(frozen=True, slots=True)
class CurveChart:
    """A chart and what its lines mean: (style class, dashes, name)."""

    svg: Markup
    legend: list[tuple[str, str, str]]


def curve_chart(task: str, results: Sequence[TaskResult]) -> CurveChart | None:
    """A colour a model, dashes a curve; x on a scale of logarithms where all of it is above 0. None without curves."""
    models = list(dict.fromkeys(r.model for r in results if r.curves))
    names = list(dict.fromkeys(c.name for r in results for c in r.curves))
    points = [p for r in results for c in r.curves for p in c.points if all(map(math.isfinite, p))]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    log = min(xs) > 0
    yticks = ticks(min(0.0, *ys), max(ys) if max(ys) > min(0.0, *ys) else 1.0, 5, outwards=True)
    x_of = math.log10 if log else float
    first, last = x_of(min(xs)), x_of(max(xs))
    xticks = [10.0**n for n in range(math.ceil(first), math.floor(last) + 1)] if log else ticks(min(xs), max(xs), 5)

    def px(x: float) -> float:
        return LEFT + (x_of(x) - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - yticks[0]) / (yticks[-1] - yticks[0]) * (HEIGHT - TOP - BOTTOM)

    recalls = task.endswith("retrieval") or task == "rerank"
    parts = axes(xticks, yticks, px, py, "k" + ", on a scale of logarithms" * log if recalls else "")
    legend = []
    for result in results:
        for curve in result.curves:
            css = f"line{models.index(result.model) % _LINES}"
            dashes = _DASHES[names.index(curve.name) % len(_DASHES)]
            line = " ".join(
                f"{px(x):.1f},{py(y):.1f}" for x, y in curve.points if math.isfinite(x) and math.isfinite(y)
            )
            parts.append(f'<polyline class="{css}" stroke-dasharray="{dashes or "none"}" points="{line}"/>')
            said = [result.model] * (len(models) > 1) + [curve.name]
            legend.append((css, dashes or "none", ", ".join(said)))
    title = "Recall among the first k" if recalls else task.replace("-", " ").capitalize()
    return CurveChart(chart(title, task if recalls else "", f"{title}, {task}", parts), legend)


def confusion_parts(confusion: Confusion) -> dict[str, Any]:
    """What the template shows: `rows` of cells for few classes, `pairs` for many."""
    totals = [sum(row) for row in confusion.counts]
    if len(confusion.classes) <= _WHOLE:
        rows = [
            {
                "name": name,
                "cells": [
                    {"count": count, "share": round(100 * count / (total or 1)), "right": i == j}
                    for j, count in enumerate(row)
                ],
            }
            for i, (name, row, total) in enumerate(zip(confusion.classes, confusion.counts, totals, strict=True))
        ]
        return {"classes": confusion.classes, "rows": rows, "pairs": []}
    wrong = [(count, i, j) for i, row in enumerate(confusion.counts) for j, count in enumerate(row) if i != j and count]
    wrong.sort(key=lambda one: (-one[0], -one[0] / totals[one[1]], one[1:]))
    pairs = [
        {
            "true": confusion.classes[i],
            "taken": confusion.classes[j],
            "count": count,
            "share": f"{count / totals[i]:.0%}",
        }
        for count, i, j in wrong[:_PAIRS]
    ]
    return {"classes": confusion.classes, "rows": [], "pairs": pairs}
