"""The account of a check: one tree for check.json, and the summary on the screen.

Receives a dataset that was read and its duplicates. Gives plain objects and text. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmgem import __version__
from mmgem.data.audit.dataset import Dataset
from mmgem.data.audit.duplicates import Duplicates, Pairs
from mmgem.data.audit.findings import MOST_NAMES
from mmgem.data.audit.hashes import FAR, NEAR, NEAR_EDGES, PLAIN
from mmgem.data.audit.histogram import summary

SCHEMA = 1
COUNTS = ("samples", "captions", "regions", "images_without_captions")

_NAMES = 3  # a line of the screen


def report(location: str, dataset: Dataset, duplicates: Duplicates, decoded: bool, seconds: float) -> dict[str, Any]:
    """What check.json holds. Names are bounded by MOST_NAMES a reason and split, leaks are all named."""
    names = [split.name for split in dataset.splits]
    splits = {}
    for split, pairs in zip(dataset.splits, duplicates.within, strict=True):
        used = dataset.digests_N[split.numbers.start : split.numbers.stop] != 0
        hashed = dataset.hashes_N2[split.numbers.start : split.numbers.stop].any(axis=1)
        splits[split.name] = {
            "counts": {
                **{name: split.totals[name] for name in (*COUNTS, "broken", "unread")},
                "shards": len(split.index.shards),
                "bytes": split.bytes,
            },
            "index": {"totals": split.index.totals, "skipped": split.index.skipped, "dropped": split.index.dropped},
            "findings": split.findings.rows(),
            "duplicates": {
                "identical": int(pairs.identical_P.sum()),
                "near": int((~pairs.identical_P).sum()),
                "plain_pictures": int((used & ~hashed).sum()) if decoded else None,
                "pairs": _named(dataset, pairs, MOST_NAMES),
            },
            "distributions": {measure: summary(counts) for measure, counts in split.values.items()},
        }
    leaks = [
        {
            "splits": [names[s], names[t]],
            "pictures": [len(np.unique(pairs.pairs_P2[:, side])) for side in (0, 1)],
            "identical": int(pairs.identical_P.sum()),
            "near": int((~pairs.identical_P).sum()),
            "pairs": _named(dataset, pairs, len(pairs)),
        }
        for (s, t), pairs in duplicates.across.items()
        if len(pairs)
    ]
    failed = any(row["fails"] for split in splits.values() for row in split["findings"])
    return {
        "schema": SCHEMA,
        "mmgem": __version__,
        "dataset": location,
        "passed": not failed and not leaks,
        "seconds": round(seconds, 1),
        "decoded": decoded,
        "near_means": {
            "grey_correlation": NEAR,
            "edge_correlation": NEAR_EDGES,
            "hash_bits_of_128": FAR,
            "plain_below_grey_levels": PLAIN,
        },
        "splits": splits,
        "leaks": leaks,
    }


def screen(found: dict[str, Any]) -> str:
    """The summary in some lines; of each reason the first names."""
    splits = found["splits"]
    total = sum(split["counts"]["samples"] for split in splits.values())
    rate = total / max(found["seconds"], 0.1)
    lines = [f"{found['dataset']}: {total:,} samples read in {found['seconds']:.1f} s, {rate:,.0f}/s", ""]
    heads = [*COUNTS, "shards", "bytes"]
    rows = [["split", *(head.replace("images_without_captions", "no caption") for head in heads)]]
    rows += [[name, *(f"{split['counts'][head]:,}" for head in heads)] for name, split in splits.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.append("")
    for name, split in splits.items():
        for row in split["findings"]:
            lines.append(
                f"{'FAILS' if row['fails'] else 'note '}  {name}: {row['count']:,} × {row['reason']}: {_few(row)}"
            )
    for leak in found["leaks"]:
        (a, b), (of_a, of_b) = leak["splits"], leak["pictures"]
        first = _pairs(leak["pairs"])
        lines.append(f"FAILS  leak: {a} and {b} share pictures ({of_a:,} of {a}, {of_b:,} of {b}): {first}")
    for name, split in splits.items():
        again = split["duplicates"]
        if again["pairs"]:
            kinds = f"{again['identical']:,} of the same bytes, {again['near']:,} near"
            lines.append(f"note   {name}: pictures that come again: {kinds}: {_pairs(again['pairs'])}")
        if again["plain_pictures"]:
            lines.append(f"note   {name}: {again['plain_pictures']:,} pictures are plain: compared by their bytes only")
    if not found["decoded"]:
        lines.append("note   pictures were not decoded: broken ones and near duplicates are not known")
    lines.append("nothing is wrong" if found["passed"] else "the check failed")
    return "\n".join(lines)


def _named(dataset: Dataset, pairs: Pairs, most: int) -> list[dict[str, Any]]:
    listed = pairs.pairs_P2[:most]
    keys = dataset.names(listed.ravel())
    return [
        {"keys": [keys[a], keys[b]], "identical": identical, "likeness": round(likeness, 4)}
        for (a, b), identical, likeness in zip(
            listed.tolist(), pairs.identical_P.tolist(), pairs.likeness_P.tolist(), strict=False
        )
    ]


def _few(row: dict[str, Any]) -> str:
    texts = [f"{one['name']} ({one['detail']})" if one["detail"] else one["name"] for one in row["named"][:_NAMES]]
    return ", ".join([*texts, *(["…"] if len(row["named"]) > _NAMES else [])])


def _pairs(pairs: Sequence[dict[str, Any]]) -> str:
    texts = [("{} = {}" if pair["identical"] else "{} ~ {}").format(*pair["keys"]) for pair in pairs[:_NAMES]]
    return ", ".join([*texts, *(["…"] if len(pairs) > _NAMES else [])])
