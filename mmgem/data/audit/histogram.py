"""How a quantity is spread: quantiles, and a chart that lays the splits over one another.

Receives how often each value occurs. Gives figures, and inline SVG. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from mmgem.page import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, chart, label, ticks

QUANTILES = {"min": 0.0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "max": 1.0}

_BINS = 40
_SHOWN = 0.995  # of the values; single ones far out would press the rest together


def summary(counts: Mapping[float, int]) -> dict[str, Any]:
    """{"count", "mean", "quantiles", "values": [[value, how often], …]}; of nothing, only the count."""
    total = sum(counts.values())
    if not total:
        return {"count": 0}
    values, often = _sorted(counts)
    return {
        "count": total,
        "mean": float((values * often).sum() / total),
        "quantiles": {name: _quantile(values, often, share) for name, share in QUANTILES.items()},
        "values": [[value, counts[value]] for value in sorted(counts)],
    }


def histogram(title: str, splits: Mapping[str, Mapping[float, int]]) -> Markup:
    """One chart: for each split the share of its values in each bin. `splits` without values are left out."""
    spread = {name: _sorted(counts) for name, counts in splits.items() if counts}
    low = min(float(values[0]) for values, _ in spread.values())
    high = max(_quantile(*both, _SHOWN) for both in spread.values())
    whole = all((values == np.round(values)).all() for values, _ in spread.values())
    width = max(1.0, np.ceil((high - low + 1) / _BINS)) if whole else (high - low) / _BINS or 1.0
    start = low - 0.5 if whole else low
    edges = start + width * np.arange(int(np.ceil((high - start) / width + 1e-9)) + 1)
    shares = {
        name: 100 * np.histogram(np.minimum(values, edges[-1]), edges, weights=often)[0] / often.sum()
        for name, (values, often) in spread.items()
    }
    yticks = ticks(0, max(float(share.max()) for share in shares.values()), 5, outwards=True)

    def px(x: float) -> float:
        return LEFT + (x - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / yticks[-1] * (HEIGHT - TOP - BOTTOM)

    xticks = [x for x in ticks(edges[0], edges[-1], 6) if not whole or x == round(x)]
    parts = axes(xticks, yticks, px, py, "")
    place = LEFT
    for number, (name, share) in enumerate(shares.items()):
        colour = COLOURS[number % len(COLOURS)]
        corners = [f"{px(edges[0]):.1f},{py(0):.1f}"]
        for left, right, height in zip(edges[:-1], edges[1:], share, strict=True):
            corners += [f"{px(left):.1f},{py(height):.1f}", f"{px(right):.1f},{py(height):.1f}"]
        corners.append(f"{px(edges[-1]):.1f},{py(0):.1f}")
        parts.append(f'<polygon class="bins" style="fill:{colour};stroke:{colour}" points="{" ".join(corners)}"/>')
        parts.append(f'<rect x="{place}" y="{TOP - 16}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text class="stage" x="{place + 15}" y="{TOP - 7}">{escape(name)}</text>')
        place += 30 + 7 * len(name)
    top = max(float(values[-1]) for values, _ in spread.values())
    return chart(title, f"largest {label(top)}", f"{title}: shares of the values of each split", parts)


def _sorted(counts: Mapping[float, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.array(sorted(counts), dtype=np.float64)
    return values, np.array([counts[value] for value in sorted(counts)], dtype=np.float64)


def _quantile(values: NDArray[np.float64], often: NDArray[np.float64], share: float) -> float:
    """The value at this share of the way from the first to the last of them all, in order."""
    place = share * (often.sum() - 1)
    return float(values[np.searchsorted(np.cumsum(often), place, side="right")])
