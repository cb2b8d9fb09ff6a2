"""What the gate saw: scores, what each threshold keeps, and pairs on both sides of it, as a page.

Receives the account of a run and its units' outcomes. Gives one HTML file without scripts or links, and the same
figures as a table. Where a field of the records says which texts are right, precision and recall stand beside each
threshold. Refuses, with a UserError, a field that no record has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmgem.data.audit.histogram import histogram
from mmgem.data.samples import SampleError, decode_image, parse_sample
from mmgem.errors import UserError
from mmgem.page import picture, render
from mmgem.refine.raw import Unit
from mmgem.refine.work import CAPTIONED, KEPT, PAINTED, REPAIRED, Outcome, read_outcomes, unit_file

_CARD = 220
_SHOWN = 6
_STEPS = 13


@dataclass(frozen=True, slots=True)
class Judged:
    """A text of the source with its picture's key and its score; right: where that is known."""

    unit: int
    key: str
    text: str
    score: float
    right: bool | None


def judged(found: Sequence[Unit], work: Path, labels: str | None = None) -> list[Judged]:
    """labels: a field of the records, one truth for all texts of a sample, or a list, one a text in their order.
    Raises UserError."""
    out: list[Judged] = []
    known = 0
    for number, unit in enumerate(found):
        for outcome in read_outcomes(unit_file(work, unit)):
            truth = _truth(outcome, labels)
            for text, score in _source_texts(outcome):
                right = truth.get(text) if isinstance(truth, dict) else truth
                known += right is not None
                out.append(Judged(number, outcome.key, text, score, right))
    if labels and not known:
        raise UserError(f"--labels {labels}: no record has this field; it says which texts of a sample are right")
    return out


def _source_texts(outcome: Outcome) -> Iterator[tuple[str, float]]:
    if outcome.fate == KEPT:
        yield from zip(outcome.texts, outcome.scores, strict=True)
    yield from ((text, score) for text, score in outcome.left if np.isfinite(score) and text not in _made(outcome))


def _made(outcome: Outcome) -> set[str]:
    """What the captioner wrote is no text of the source, kept or not."""
    if outcome.fate in (REPAIRED, CAPTIONED):
        return set(outcome.texts)
    return {outcome.left[-1][0]} if outcome.why == "written text does not fit" else set()


def _truth(outcome: Outcome, labels: str | None) -> Any:
    """None, a truth for all texts, or by text."""
    value = outcome.meta.get(labels) if labels else None
    if isinstance(value, dict):
        return {" ".join(str(text).split()): bool(right) for text, right in value.items()}
    return bool(value) if isinstance(value, bool | int) else None


def thresholds(pairs: Sequence[Judged], chosen: float) -> list[dict[str, Any]]:
    """For some thresholds and the chosen one: the share of pairs that passes, and with labels precision (of what
    passes, so much is right), recall (of what is right, so much passes), and how many of the wrong ones are found."""
    score_N = np.array([one.score for one in pairs])
    right_N = np.array([np.nan if one.right is None else float(one.right) for one in pairs])
    low, high = np.quantile(score_N, (0.02, 0.98)) if len(pairs) else (0.0, 1.0)
    steps = sorted({round(float(t), 2) for t in np.linspace(low, high, _STEPS)} | {round(chosen, 4)})
    rows = []
    for threshold in steps:
        passes_N = score_N >= threshold
        row: dict[str, Any] = {"threshold": threshold, "chosen": threshold == round(chosen, 4)}
        row["kept"] = float(passes_N.mean()) if len(pairs) else 0.0
        known_N = ~np.isnan(right_N)
        if known_N.any():
            passes, right = passes_N[known_N], right_N[known_N] == 1
            row["precision"] = float(right[passes].mean()) if passes.any() else 1.0
            row["recall"] = float(passes[right].mean()) if right.any() else 1.0
            row["found"] = float((~passes)[~right].mean()) if (~right).any() else 1.0
        rows.append(row)
    return rows


def threshold_table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    names = [name for name in ("kept", "precision", "recall", "found") if name in rows[0]]
    titles = {"kept": "kept", "precision": "precision", "recall": "recall", "found": "wrong found"}
    lines = ["  threshold" + "".join(f"{titles[name]:>13}" for name in names)]
    for row in rows:
        mark = ">" if row["chosen"] else " "
        lines.append(f"{mark}{row['threshold']:10.2f}" + "".join(f"{row[name]:13.3f}" for name in names))
    return "\n".join(lines)


def render_page(result: dict[str, Any], found: Sequence[Unit], work: Path, labels: str | None) -> str:
    pairs = judged(found, work, labels)
    threshold = result["gate"]["threshold"]
    parts = {
        "title": f"Refined: {Path(result['source']).name}",
        "facts": _facts(result),
        "fates": [(name, f"{result[name]:,}") for name in ("kept", "repaired", "captioned", "painted", "dropped")],
        "why": [(why, f"{count:,}") for why, count in result["why"].items()],
        "labelled": bool(labels),
        "rows": thresholds(pairs, threshold),
        "chart": _chart(pairs) if pairs else "",
        "around": _around(pairs, threshold, found),
        "made": _made_cards(found, work),
    }
    return render(_PAGE, parts)


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    gate, settings = result["gate"], result["settings"]
    facts = [("Source", result["source"]), ("Samples", f"{result['in']:,} in, {result['out']:,} out")]
    facts += [("Encoders", ", ".join(gate["encoders"]))]
    facts += [("Gate", f"{gate['combine']} of their scores at least {gate['threshold']:g}")]
    facts += [("Captioner", settings["captioner"] or "none"), ("Painter", settings["painter"] or "none")]
    return facts


def _chart(pairs: Sequence[Judged]) -> Any:
    groups: dict[str, Counter[float]] = {}
    for one in pairs:
        name = "pairs" if one.right is None else "right" if one.right else "wrong"
        groups.setdefault(name, Counter())[round(one.score, 1)] += 1
    return histogram("Score of the source's pairs", dict(sorted(groups.items())))


def _around(pairs: Sequence[Judged], threshold: float, found: Sequence[Unit]) -> list[dict[str, Any]]:
    """Pairs just above, just below, and far below the threshold, and far above."""
    above = sorted((p for p in pairs if p.score >= threshold), key=lambda p: p.score)
    below = sorted((p for p in pairs if p.score < threshold), key=lambda p: -p.score)
    groups = {
        "Just let through": above[:_SHOWN],
        "Just not": below[:_SHOWN],
        "Surest": above[::-1][:_SHOWN],
        "Worst": below[::-1][:_SHOWN],
    }
    images = _pictures({(p.unit, p.key) for group in groups.values() for p in group}, found)
    return [
        {"title": title, "cards": [_card(images[p.unit, p.key], p.text, p) for p in group if (p.unit, p.key) in images]}
        for title, group in groups.items()
        if group
    ]


def _card(image: Any, text: str, pair: Judged) -> dict[str, Any]:
    return {"picture": picture(image, _CARD, text), "text": text, "score": f"{pair.score:.2f}", "right": pair.right}


def _made_cards(found: Sequence[Unit], work: Path) -> list[dict[str, Any]]:
    """The first few of each kind that were made: what was there, and what is now."""
    groups: dict[str, list[dict[str, Any]]] = {REPAIRED: [], CAPTIONED: [], PAINTED: []}
    for number, unit in enumerate(found):
        wanted = [o for o in read_outcomes(unit_file(work, unit)) if o.fate in groups and len(groups[o.fate]) < _SHOWN]
        images = _pictures({(number, o.key) for o in wanted if not o.picture}, found)
        for one in wanted:
            if len(groups[one.fate]) == _SHOWN:
                continue
            if one.picture:
                images[number, one.key] = decode_image(
                    parse_sample(
                        one.key, (work / "pictures" / unit.name / one.picture).read_bytes(), {"captions": ["-"]}
                    )
                )
            if (number, one.key) in images:
                before = "; ".join(text for text, _ in one.left[:2])
                card = {"picture": picture(images[number, one.key], _CARD, one.texts[0]), "text": one.texts[0]}
                groups[one.fate].append({**card, "score": f"{one.scores[0]:.2f}", "before": before})
        if all(len(cards) == _SHOWN for cards in groups.values()):
            break
    titles = {REPAIRED: "Text written anew", CAPTIONED: "Text written", PAINTED: "Picture drawn"}
    return [{"title": titles[fate], "cards": cards} for fate, cards in groups.items() if cards]


def _pictures(wanted: set[tuple[int, str]], found: Sequence[Unit]) -> dict[tuple[int, str], Any]:
    """Those that can be read, by unit and key."""
    images: dict[tuple[int, str], Any] = {}
    for number in sorted({unit for unit, _ in wanted}):
        for raw in found[number].read():
            if (number, raw.key) in wanted and raw.image is not None:
                try:
                    images[number, raw.key] = decode_image(parse_sample(raw.key, raw.image, {"captions": ["-"]}))
                except SampleError:
                    continue
    return images


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}
svg.chart polygon.bins{fill-opacity:.16;stroke-width:1.5;stroke-linejoin:round}
tr.chosen td{font-weight:600}
.struck{text-decoration:line-through;opacity:.65}
</style>
</head>
<body>
<main>
<header><h1>{{ title }}</h1>
<dl class="facts">{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></header>

<h2>What became of the samples</h2>
<div class="scroll"><table><tbody>
{% for name, count in fates %}<tr><td class="name">{{ name }}</td><td>{{ count }}</td></tr>{% endfor %}
</tbody></table></div>
{% if why %}<p class="note">Dropped: {% for name, count in why %}{{ name }} {{ count }}
{%- if not loop.last %}; {% endif %}{% endfor %}.</p>{% endif %}

<h2>Thresholds</h2>
<p class="note">A score is how many standard deviations a pair lies above pairs put together by lot. The bold line is
the threshold of this run.{% if labelled %} Precision: of what passes, so much is right. Recall: of what is right, so
much passes. Found: of the wrong ones, so many do not pass.{% endif %}</p>
{% if chart %}<div class="charts">{{ chart }}</div>{% endif %}
<div class="scroll"><table><thead><tr><th>threshold</th><th>kept</th>{% if labelled %}<th>precision</th><th>recall</th>
<th>found</th>{% endif %}</tr></thead><tbody>
{% for row in rows %}<tr{% if row.chosen %} class="chosen"{% endif %}><td>{{ "%.2f"|format(row.threshold) }}</td>
<td>{{ "%.3f"|format(row.kept) }}</td>{% if labelled %}<td>{{ "%.3f"|format(row.precision) }}</td>
<td>{{ "%.3f"|format(row.recall) }}</td><td>{{ "%.3f"|format(row.found) }}</td>{% endif %}</tr>{% endfor %}
</tbody></table></div>

{% macro cards(group) %}<h3>{{ group.title }}</h3><div class="cards">{% for card in group.cards %}
<article class="card">{{ card.picture }}<div class="body">
{% if card.before %}<p class="struck">{{ card.before }}</p>{% endif %}<p>{{ card.text }}</p>
<p class="by">score {{ card.score }}{% if card.right is true %} · <span class="right">✓ right</span>
{%- elif card.right is false %} · <span class="wrong">✗ wrong</span>{% endif %}</p></div></article>
{% endfor %}</div>{% endmacro %}
{% for group in around %}{{ cards(group) }}{% endfor %}
{% if made %}<h2>What was made</h2>{% for group in made %}{{ cards(group) }}{% endfor %}{% endif %}
</main>
</body>
</html>
"""
