"""Curves of a training log as inline SVG.

Receives `log.jsonl` (one line a step: step, stage, samples, loss, loss_emb, loss_gen, lr,
logit_scale, samples_per_s). Gives one SVG a quantity: the raw values faint, a smoothed line over
them, the stages shaded and named. Lines without a step and values that are no finite numbers are
left out, and so is a last line cut short by a crash. Refuses nothing: no log, no charts.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from mmgem.page import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axes, chart, label, ticks

QUANTITIES = {
    "loss": "Loss",
    "loss_emb": "Contrastive loss",
    "loss_gen": "Caption loss",
    "loss_region_emb": "Contrastive loss of regions",
    "loss_region_gen": "Caption loss of regions",
    "loss_hard_columns": "Contrastive loss with hard negatives",
    "loss_hard_rank": "Rank loss of hard negatives",
    "loss_hard_intra": "Loss between texts and hard negatives",
    "loss_hard_focal": "Focal loss of hard negatives",
    "loss_hard_triplet": "Triplet loss of hard negatives and their pictures",
    "loss_hard_written": "Margin of written hard negatives",
    "lr": "Learning rate",
    "logit_scale": "Logit scale",
    "samples_per_s": "Samples per second",
}

_MAX_POINTS = 400  # more than a chart of this width can show


@dataclass(frozen=True, slots=True)
class Span:
    """A stage's part of the x axis."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Log:
    """Lines of a log in order; x is the step, going on where a stage starts again at 0."""

    x: NDArray[np.int64]
    lines: list[dict[str, object]]
    spans: list[Span]


def read_log(path: Path | None) -> Log:
    """The log of a run; empty if there is none.

    A run that was resumed may have written a step twice: the later line counts.
    """
    kept: dict[tuple[str, int], dict[str, object]] = {}
    if path is not None and path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                key = (str(line.get("stage", "")), line["step"])
                kept.pop(key, None)
                kept[key] = line
    lines: list[dict[str, object]] = []
    xs: list[int] = []
    spans: list[Span] = []
    for stage in dict.fromkeys(stage for stage, _ in kept):
        steps = sorted(step for name, step in kept if name == stage)
        offset = spans[-1].stop if spans and steps[0] <= spans[-1].stop else 0
        xs += [offset + step for step in steps]
        lines += [kept[stage, step] for step in steps]
        spans.append(Span(stage, spans[-1].stop if spans else xs[0], xs[-1]))
    return Log(np.array(xs, dtype=np.int64), lines, spans)


def charts(log: Log) -> list[Markup]:
    """One chart for each quantity that the log has."""
    out = []
    for key, title in _titles(log).items():
        values = np.array([_number(line.get(key)) for line in log.lines], dtype=np.float64)
        if np.isfinite(values).sum() >= 2:
            out.append(_chart(title, log, values))
    return out


def _titles(log: Log) -> dict[str, str]:
    """QUANTITIES, and after the named losses whatever other loss the log has."""
    more = dict.fromkeys(k for line in log.lines for k in line if k.startswith("loss_"))
    named = {k: k.removeprefix("loss_").replace("_", " ").capitalize() + " (loss)" for k in more}
    losses = {k: title for k, title in QUANTITIES.items() if k.startswith("loss")}
    return losses | {k: t for k, t in named.items() if k not in losses} | QUANTITIES


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value)


def _chart(title: str, log: Log, values: NDArray[np.float64]) -> Markup:
    smooth = np.full_like(values, np.nan)
    curves: list[NDArray[np.int64]] = []
    for span in log.spans:
        first = np.searchsorted(log.x, span.start, side="left" if span is log.spans[0] else "right")
        rows = np.arange(first, np.searchsorted(log.x, span.stop, side="right"))
        rows = rows[np.isfinite(values[rows])]
        if len(rows):
            smooth[rows] = _smoothed(values[rows])
            curves.append(rows)
    low, high = _range(values[np.isfinite(values)], smooth[np.isfinite(smooth)])
    xticks = ticks(0, float(log.x[-1]), 5)
    yticks = ticks(low, high, 5, outwards=True)
    low, high = yticks[0], yticks[-1]
    x_end = max(float(log.x[-1]), 1.0)

    def px(x: float) -> float:
        return LEFT + x / x_end * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (min(max(y, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [*_stages(log, px), *axes(xticks, yticks, px, py, "step")]
    for rows in curves:
        for kind, line in (("raw", values), ("smooth", smooth)):
            points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in _thinned(log.x, line, rows))
            parts.append(f'<polyline class="{kind}" points="{points}"/>')
    final = smooth[np.isfinite(smooth)][-1]
    alt = f"{title} over the steps of training"
    return chart(title, f"last {label(float(final))}", alt, parts)


def _stages(log: Log, px: Axis) -> list[str]:
    """Their shades and names."""
    parts = []
    for number, span in enumerate(log.spans):
        left = px(span.start) if number else px(0)
        width = px(span.stop) - left
        parts.append(
            f'<rect class="stage{number % 2}" x="{left:.1f}" y="{TOP}" '
            f'width="{max(width, 0):.1f}" height="{HEIGHT - BOTTOM - TOP}"/>'
        )
        name = f'<text class="stage" x="{left + 2:.1f}" y="{TOP - 7}">{escape(span.name)}</text>'
        if width > 7 * len(span.name) + 4:
            parts.append(name)
    return parts


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running mean over a fiftieth of the curve, at its ends over what there is of it."""
    half = max(1, len(values) // 100)
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first = np.maximum(middle - half, 0)
    stop = np.minimum(middle + half + 1, len(values))
    return (total[stop] - total[first]) / (stop - first)


def _range(values: NDArray[np.float64], smooth: NDArray[np.float64]) -> tuple[float, float]:
    """All of the smoothed line, and all raw values but single ones far out."""
    low = min(float(np.percentile(values, 1)), float(smooth.min()))
    high = max(float(np.percentile(values, 99)), float(smooth.max()))
    if values.max() - values.min() < 2 * (high - low):
        low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 + 1e-6 * abs(high):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    if low > 0 and low < 0.35 * high:
        low = 0.0
    return low, high


def _thinned(x: NDArray[np.int64], y: NDArray[np.float64], rows: NDArray[np.int64]) -> list[tuple[float, float]]:
    """At most _MAX_POINTS points; of each bin its least and its greatest value, in order."""
    if len(rows) > _MAX_POINTS:
        chosen = []
        for part in np.array_split(rows, _MAX_POINTS // 2):
            ends = {int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
            chosen += sorted(ends)
        rows = np.array(chosen)
    return [(float(x[r]), float(y[r])) for r in rows]
