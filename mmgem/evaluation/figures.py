"""Figures as text, and the tables that report.html and report.md share.

Receives the results of one task for some models. Gives its rows, each a metric with a cell a model. Refuses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mmgem.evaluation.published import Published, published
from mmgem.evaluation.result import TaskResult


@dataclass(frozen=True, slots=True)
class Row:
    """A metric. cells: (value, error) of each model, "" for no error. ratio: last to first model, or to chance."""

    name: str
    cells: list[tuple[str, str]]
    chance: str
    ratio: str
    published: list[tuple[str, Published]]
    """Figures of others under the same protocol."""


def rows(results: Sequence[TaskResult], models: Sequence[str]) -> list[Row]:
    """A row for each metric of any of the task's results, a cell for each of the models."""
    of_model = {r.model: r for r in results}
    names = dict.fromkeys(name for r in results for name in r.metrics)
    others = published(results[-1].task, results[-1].protocol)
    out = []
    for name in names:
        values = [of_model[m].metrics.get(name) if m in of_model else None for m in models]
        errors = [of_model[m].stderr.get(name) if m in of_model else None for m in models]
        chance = next((r.chance[name] for r in results if name in r.chance), None)
        cells = [(number(v), _error(v, e)) for v, e in zip(values, errors, strict=True)]
        ratio = _ratio(values[-1], values[0] if len(models) > 1 else chance)
        said = [(number(one.figures[name]), one) for one in others if name in one.figures]
        out.append(Row(name, cells, number(chance), ratio, said))
    return out


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
