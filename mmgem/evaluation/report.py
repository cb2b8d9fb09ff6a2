"""The report: one HTML file that opens anywhere, without network, scripts or other files.

Receives the results of one or several models (stages), and what is known of the run. Gives the page: what the model is,
the figures, the curves of training and of tasks, and examples drawn by lot as well as the worst. Texts from data and
models are escaped. Refuses a report without results, with a ValueError.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmgem.evaluation.charts import charts, read_log
from mmgem.evaluation.curves import confusion_parts, curve_chart
from mmgem.evaluation.figures import number, rows
from mmgem.evaluation.markdown import markdown
from mmgem.evaluation.result import TaskResult, write_text
from mmgem.evaluation.sections import sections
from mmgem.evaluation.template import PAGE
from mmgem.page import render, shared

__all__ = ["About", "number", "render_report", "write_report"]


_ROWS = 24
"""Of one task, shown at once; the others are folded."""


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
    """Writes the page, and beside it the same figures as Markdown; each whole or not at all."""
    write_text(path, render_report(results, about))
    write_text(path.with_suffix(".md"), markdown(results, about.title, about.facts))


def render_report(results: Sequence[TaskResult], about: About) -> str:
    """The page as a string."""
    if not results:
        raise ValueError("a report needs at least one result")
    return shared(render(PAGE, page_parts(results, about)))


def page_parts(results: Sequence[TaskResult], about: About) -> dict[str, Any]:
    """The values that the template names."""
    models = list(dict.fromkeys(r.model for r in results))
    of_task: dict[str, list[TaskResult]] = {}
    for result in results:
        of_task.setdefault(result.task, []).append(result)
    tables = [_table(task, of_one, models) for task, of_one in of_task.items()]
    return {
        "title": about.title,
        "subtitle": about.subtitle,
        "facts": about.facts,
        "settings": about.settings,
        "models": [m or "value" for m in models],
        "last_model": models[-1] or "the model",
        "ratio_name": f"{models[-1]} ÷ {models[0]}" if len(models) > 1 else "÷ chance",
        "tables": tables,
        "sources": list(dict.fromkeys(source for table in tables for source in table["sources"])),
        "charts": charts(read_log(about.log)),
        "curves": [drawn for task, of_one in of_task.items() if (drawn := curve_chart(task, of_one))],
        "confusions": [
            {"task": task, "model": of_one[-1].model, **confusion_parts(confusion)}
            for task, of_one in of_task.items()
            if (confusion := of_one[-1].confusion)
        ],
        "sections": sections(results),
        "footer": about.footer,
    }


def _table(task: str, results: Sequence[TaskResult], models: Sequence[str]) -> dict[str, Any]:
    """One block of the table: a row a metric, a cell a model."""
    found = rows(results, models)
    shown = [
        {
            # A narrow screen may break the name after an underscore.
            "name": Markup("_<wbr>").join(row.name.split("_")),
            "cells": [{"value": value, "error": error} for value, error in row.cells],
            "chance": row.chance,
            "ratio": row.ratio,
            "published": [{"value": value, "model": one.model} for value, one in row.published],
        }
        for row in found
    ]
    protocol = json.dumps(results[-1].protocol, indent=1, ensure_ascii=False)
    sources = [f"{one.model}: {one.source}" for row in found for _, one in row.published]
    return {"name": task, "rows": shown[:_ROWS], "folded": shown[_ROWS:], "protocol": protocol, "sources": sources}
