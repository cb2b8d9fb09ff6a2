"""The page of a check: one HTML file without scripts, fonts or links.

Receives the account of a check, and the dataset to fetch pictures from. Gives the page: what is wrong, leaks as pairs
of pictures, distributions, and samples drawn by lot with their boxes. Every text of the data is escaped. Refuses
nothing: a picture that cannot be shown is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmgem.data.audit.dataset import Dataset
from mmgem.data.audit.duplicates import Duplicates, Pairs
from mmgem.data.audit.histogram import QUANTILES, histogram
from mmgem.data.audit.report import COUNTS
from mmgem.data.audit.scan import MEASURES
from mmgem.data.audit.template import PAGE
from mmgem.data.samples import Box, SampleError, decode_image
from mmgem.errors import UserError
from mmgem.page import COLOURS, Mark, label, picture, render

_CARD, _TILE = 360, 200  # longest side of the embedded pictures, in pixels
_LEAKS, _AGAIN, _DRAWN = 24, 6, 6  # pairs of two splits, pairs of a split, samples of a split
_NAMES = 100  # a reason and split
_BOXES, _CAPTIONS = 8, 5  # a card


def render_page(found: dict[str, Any], dataset: Dataset, duplicates: Duplicates) -> str:
    names = [split.name for split in dataset.splits]
    splits = found["splits"]
    return render(
        PAGE,
        {
            "title": f"Check of {found['dataset']}",
            "passed": found["passed"],
            "decoded": found["decoded"],
            "near": found["near_means"],
            "facts": _facts(found),
            "count_names": [name.replace("_", " ") for name in COUNTS],
            "counts": [_count_row(name, split) for name, split in splits.items()],
            "findings": [
                {**row, "split": name, "named": row["named"][:_NAMES], "more": max(0, len(row["named"]) - _NAMES)}
                for name, split in splits.items()
                for row in split["findings"]
            ],
            "leaks": [
                {**leak, "shown": _pair_cards(dataset, pairs, leak["pairs"], leak["splits"], _LEAKS)}
                for leak, pairs in zip(found["leaks"], filter(len, duplicates.across.values()), strict=True)
            ],
            "again": [
                {**splits[name]["duplicates"], "split": name, "shown": shown}
                for name, pairs in zip(names, duplicates.within, strict=True)
                if (shown := _pair_cards(dataset, pairs, splits[name]["duplicates"]["pairs"], [name, name], _AGAIN))
            ],
            "charts": [
                histogram(title, {split.name: split.values[measure] for split in dataset.splits})
                for measure, title in MEASURES.items()
                if any(split.values[measure] for split in dataset.splits)
            ],
            "quantiles": list(QUANTILES),
            "spreads": [_spread(title, measure, splits) for measure, title in MEASURES.items()],
            "drawn": [{"split": split.name, "cards": _drawn(dataset, split.numbers)} for split in dataset.splits],
            "footer": f"mmgem {found['mmgem']}; everything that was named is in check.json",
        },
    )


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    total = sum(split["counts"]["samples"] for split in found["splits"].values())
    failing = [
        f"{row['count']:,} × {row['reason']}" for s in found["splits"].values() for row in s["findings"] if row["fails"]
    ]
    failing += [
        f"{leak['identical'] + leak['near']:,} leaks between {' and '.join(leak['splits'])}" for leak in found["leaks"]
    ]
    return [
        ("Result", "nothing is wrong" if found["passed"] else "failed: " + "; ".join(failing)),
        (
            "Read",
            f"{total:,} samples in {found['seconds']:.1f} s, pictures {'' if found['decoded'] else 'not '}decoded",
        ),
    ]


def _count_row(name: str, split: dict[str, Any]) -> dict[str, Any]:
    counts, told = split["counts"], split["index"]["totals"]
    cells = []
    for count in COUNTS:
        other = told.get(count, counts[count]) != counts[count]
        cells.append({"value": f"{counts[count]:,}", "told": f"index: {told[count]:,}" if other else ""})
    rest = [
        f"{counts['broken']:,}",
        f"{counts['unread']:,}",
        f"{counts['shards']:,}",
        f"{counts['bytes'] / 1e6:,.1f} MB",
    ]
    return {"split": name, "cells": cells + [{"value": value, "told": ""} for value in rest]}


def _spread(title: str, measure: str, splits: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, split in splits.items():
        spread = split["distributions"][measure]
        if spread["count"]:
            cells = [f"{spread['count']:,}", label(spread["mean"]), *map(label, spread["quantiles"].values())]
            rows.append({"split": name, "cells": cells})
    return {"title": title, "rows": rows}


def _pair_cards(
    dataset: Dataset, pairs: Pairs, named: list[dict[str, Any]], splits: list[str], most: int
) -> list[dict[str, Any]]:
    """The first pairs side by side."""
    cards = []
    for numbers, pair in zip(pairs.pairs_P2[:most].tolist(), named, strict=False):
        shown = [_picture(dataset, number, _TILE, key) for number, key in zip(numbers, pair["keys"], strict=True)]
        if all(shown):
            how = "the same bytes" if pair["identical"] else f"likeness {pair['likeness']:.3f}"
            sides = [{"picture": p, "text": f"{s}: {k}"} for p, s, k in zip(shown, splits, pair["keys"], strict=True)]
            cards.append({"sides": sides, "how": how})
    return cards


def _picture(dataset: Dataset, number: int, side: int, alt: str) -> Any:
    try:
        return picture(decode_image(dataset.sample(number)), side, alt)
    except (SampleError, UserError):
        return None


def _drawn(dataset: Dataset, numbers: range) -> list[dict[str, Any]]:
    """Some samples by lot, the same ones each time."""
    whole = numbers.start + np.flatnonzero(dataset.digests_N[numbers.start : numbers.stop])
    chosen = np.random.default_rng(0).choice(whole, min(_DRAWN, len(whole)), replace=False)
    cards = []
    for number in sorted(chosen.tolist()):
        try:
            sample = dataset.sample(number)
            image = decode_image(sample)
        except (SampleError, UserError):
            continue
        phrases: dict[Box, list[str]] = {}
        for region in sample.regions:
            phrases.setdefault(region.box, []).append(region.phrase)
        marks, notes = [], []
        for place, (box, listed) in enumerate(list(phrases.items())[:_BOXES]):
            colour, badge = COLOURS[place % len(COLOURS)], str(place + 1)
            marks.append(Mark(box, colour, badge))
            notes.append({"colour": colour, "badge": badge, "text": "; ".join(dict.fromkeys(listed))})
        cards.append(
            {
                "picture": picture(image, _CARD, f"sample {sample.key}", marks),
                "key": sample.key,
                "size": f"{image.width} x {image.height}",
                "captions": sample.captions[:_CAPTIONS],
                "notes": notes,
                "more": max(0, len(phrases) - _BOXES),
            }
        )
    return cards
