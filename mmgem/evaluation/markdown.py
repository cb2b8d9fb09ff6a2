"""report.md: the figures of report.html as Markdown tables to paste.

Receives the results of one or several models. Gives a table a task with standard errors and chance, how each was
measured, and published figures where the protocol is theirs. Refuses nothing. Names are escaped.
"""

import json
from collections.abc import Sequence
from typing import Any

from mmgem.evaluation.figures import Row, rows
from mmgem.evaluation.result import TaskResult

_AFTER = "versions"  # long, and said once


def markdown(results: Sequence[TaskResult], title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The page as a string; ± is one standard error."""
    models = list(dict.fromkeys(r.model for r in results))
    lines = [f"# {_plain(title)}", "", *(f"- {_plain(name)}: {_plain(value)}" for name, value in facts), ""]
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task]
        lines += [f"## {_plain(task)}", "", *_table(rows(of_task, models), models), "", _protocol(of_task[-1]), ""]
        sources = {one.source: one.model for row in rows(of_task, models) for _, one in row.published}
        lines += [f"Published: {_plain(model)}: {_plain(source)}." for source, model in sources.items()]
        lines += [""] * bool(sources)
    ratio = f"{models[-1]} ÷ {models[0]}" if len(models) > 1 else "the figure ÷ chance"
    versions = ", ".join(f"{name} {number}" for name, number in results[-1].protocol.get(_AFTER, {}).items())
    lines += [f"± is one standard error; the ratio is {_plain(ratio)}." + f" Made by {versions}." * bool(versions), ""]
    return "\n".join(lines)


def _table(found: Sequence[Row], models: Sequence[str]) -> list[str]:
    others = any(row.published for row in found)
    head = ["metric", *(_plain(model or "value") for model in models), "chance", "ratio"] + ["published"] * others
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in found:
        cells = [value + (f" ± {error}" if error else "") for value, error in row.cells]
        said = [", ".join(f"{value} ({_plain(one.model)})" for value, one in row.published)] * others
        lines.append(_line([f"`{row.name}`", *cells, row.chance, row.ratio, *said]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _protocol(result: TaskResult) -> str:
    said = [f"{name} {_said(value)}" for name, value in result.protocol.items() if name != _AFTER and value is not None]
    return f"Measured: {_plain('; '.join(said))}." if said else ""


def _said(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int) for end in value):
        return " to ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """On one line, and nothing in it is Markdown or HTML."""
    for mark in "\\`*[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
