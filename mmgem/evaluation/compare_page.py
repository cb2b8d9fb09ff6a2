"""compare.html: the differences of two evaluations with their intervals, in one file that opens anywhere.

Receives a `Comparison`. Gives the page: a forest of the differences a task, one chart for the figures of one unit, and
the table. Texts are escaped. Refuses nothing.
"""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup, escape

from mmgem.evaluation.compare import Comparison, lower_is_better, p_value, signed, verdict
from mmgem.evaluation.figures import decimals
from mmgem.evaluation.metrics.paired import Paired
from mmgem.evaluation.result import write_text
from mmgem.page import label, render, ticks

_WIDTH, _ROW, _TOP, _BOTTOM, _SIDE = 520, 40, 34, 46, 16
_SHARES = "shares of 1"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<dl class="facts">{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<p class="note">Each dot is {{ b }} less {{ a }}, its line the 95 % interval: both were measured on the same items,
which were drawn anew {{ samples }} times, the same for both. <span class="right">Green</span>: {{ b }} is better,
<span class="wrong">red</span>: worse, grey: the interval includes 0. The p are of one figure each; of twenty figures
that do not differ one falls below 0.05.</p>
{% for task in tasks %}
<h2>{{ task.name }}</h2>
<div class="charts">{% for chart in task.charts %}{{ chart }}{% endfor %}</div>
<div class="scroll"><table>
<thead><tr><th>metric</th><th>{{ a }}</th><th>{{ b }}</th>
<th>difference</th><th>95 % interval</th><th>p</th></tr></thead>
<tbody>{% for row in task.rows %}<tr><td class="name">{{ row.name }}</td><td>{{ row.a }}</td><td>{{ row.b }}</td>
<td class="{{ row.css }}">{{ row.difference }} <small>± {{ row.error }}</small></td><td>{{ row.interval }}</td>
<td>{{ row.p }}</td></tr>{% endfor %}</tbody></table></div>
{% for said in task.told %}<p class="note">{{ said }}</p>{% endfor %}
{% endfor %}
{% for said in told %}<p class="note">{{ said }}</p>{% endfor %}
</main>
</body>
</html>
"""


def write_page(path: Path, found: Comparison) -> None:
    """Writes the page whole or not at all."""
    write_text(path, render_comparison(found))


def render_comparison(found: Comparison) -> str:
    """The page as a string."""
    a, b = found.names
    samples = sorted({p.samples for one in found.tasks for p in one.figures.values()})
    return render(
        PAGE,
        {
            "title": f"{b} against {a}",
            "a": a,
            "b": b,
            "facts": [(name, f"{side.place}") for name, side in zip(found.names, (found.a, found.b), strict=True)],
            "samples": " to ".join(f"{n:,}" for n in dict.fromkeys(samples[:1] + samples[-1:])),
            "tasks": [
                {
                    "name": one.task,
                    "charts": [_forest(unit, figures) for unit, figures in _by_unit(one.figures).items()],
                    "rows": [_row(name, paired) for name, paired in one.figures.items()],
                    "told": one.told,
                }
                for one in found.tasks
            ],
            "told": found.told,
        },
    )


def _by_unit(figures: Mapping[str, Paired]) -> dict[str, dict[str, Paired]]:
    """Shares together, what has a scale of its own by itself: one axis fits all of a chart."""
    out: dict[str, dict[str, Paired]] = {}
    for name, paired in figures.items():
        own = "CIDEr" in name or lower_is_better(name) or not (0 <= paired.a <= 1 and 0 <= paired.b <= 1)
        unit = ("median rank" if name.endswith("median_rank") else name) if own else _SHARES
        out.setdefault(unit, {})[name] = paired
    return out


def _row(name: str, paired: Paired) -> dict[str, str | Markup]:
    digits = decimals(max(abs(paired.a), abs(paired.b)))
    return {
        "name": Markup("_<wbr>").join(name.split("_")),
        "a": f"{paired.a:.{digits}f}",
        "b": f"{paired.b:.{digits}f}",
        "difference": signed(paired.difference, digits),
        "error": f"{paired.stderr:.{digits}f}",
        "interval": f"{signed(paired.low, digits)} … {signed(paired.high, digits)}",
        "p": p_value(paired),
        "css": {"better": "right", "worse": "wrong"}.get(verdict(name, paired), ""),
    }


def _forest(unit: str, figures: Mapping[str, Paired]) -> Markup:
    """A row a figure: its name, and below it the interval with the difference as a dot."""
    low = min(0.0, *(p.low for p in figures.values()), *(p.difference for p in figures.values()))
    high = max(0.0, *(p.high for p in figures.values()), *(p.difference for p in figures.values()))
    marks = ticks(low, high, 5, outwards=True) if high > low else [-1.0, 0.0, 1.0]
    height = _TOP + _ROW * len(figures) + _BOTTOM

    def px(value: float) -> float:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return 2 * _SIDE + share * (_WIDTH - 4 * _SIDE)

    bottom = height - _BOTTOM
    parts = [f'<text class="title" x="{_SIDE}" y="14">Difference: {escape(unit)}</text>']
    for mark in marks:
        css = "zero" if abs(mark) < 1e-12 else "grid"
        parts.append(f'<path class="{css}" d="M{px(mark):.1f} {_TOP - 8}V{bottom}"/>')
        parts.append(f'<text class="x" x="{px(mark):.1f}" y="{bottom + 18}">{label(mark)}</text>')
    better = "further left is better" if all(map(lower_is_better, figures)) else "further right is better"
    parts.append(f'<text class="x unit" x="{_WIDTH / 2}" y="{height - 6}">{better}</text>')
    for n, (name, paired) in enumerate(figures.items()):
        y = _TOP + _ROW * n
        css = verdict(name, paired) or "even"
        left, right = f"{px(paired.low):.1f}", f"{px(paired.high):.1f}"
        parts.append(f'<text x="{_SIDE}" y="{y + 10}">{escape(name)}</text>')
        parts.append(f'<path class="{css}" d="M{left} {y + 22}H{right}M{left} {y + 18}v8M{right} {y + 18}v8"/>')
        parts.append(f'<circle class="{css}" cx="{px(paired.difference):.1f}" cy="{y + 22}" r="4.5"/>')
    return Markup(
        f'<svg class="chart forest" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="differences and their intervals, {escape(unit)}">{"".join(parts)}</svg>'
    )
