"""`mmgem data check`: is a dataset what its index says, and is it fit to train and measure on?

Receives a dataset (a folder with one folder a split) or one split; or their URLs. Reads all of it, in parallel by
shards. Gives a summary on the screen, OUT/check.json with everything counted and named, and OUT/check.html to look at.
Refuses, with a UserError, what `dataset` refuses, and a URL without OUT.

Memory: 32 bytes a sample and one shard's figures a process. 256 bytes a sample lie in a file of OUT while it runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmgem.data.audit.dataset import Dataset, open_splits
from mmgem.data.audit.duplicates import Duplicates
from mmgem.data.audit.findings import KEY_ELSEWHERE, LEFT_OUT, MOST_NAMES, OTHER_TOTALS
from mmgem.data.audit.page import render_page
from mmgem.data.audit.report import report, screen
from mmgem.data.index import read_left_out, write_whole
from mmgem.data.processes import cpus
from mmgem.data.samples import DUPLICATE_KEY
from mmgem.data.store import is_url
from mmgem.errors import UserError

JSON_NAME, PAGE_NAME = "check.json", "check.html"


def check_data(
    location: str | Path,
    *,
    out: str | Path | None = None,
    processes: int | None = None,
    decode: bool = True,
    splits: Sequence[str] | None = None,
) -> int:
    """Checks, writes and prints. Gives the exit code: 0 where nothing is wrong, 1 where a check failed.

    out: the folder of check.json and check.html (default: LOCATION/check). processes: how many read shards (default:
    one a CPU). decode: decode every picture; without, broken pictures and near duplicates are not found. splits: only
    these; needed for a dataset at a URL.

    What fails: a shard that is missing, cut short, changed, or no whole tar; files that are not where the index says;
    broken samples; other totals than the index; the same key twice in a split; and a picture in two splits. What is
    only said: dropped captions, phrases and boxes, boxes over the border, the same picture twice in a split, keys that
    two splits share, and what was left out when the index was made.
    """
    started = time.monotonic()
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}: give 1 or more")
    opened = open_splits(location, splits)
    if out is None and is_url(location):
        raise UserError(f"{location} is a URL: say with --out where {JSON_NAME} and {PAGE_NAME} go")
    folder = Path(out or Path(location) / "check")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as spool:
        dataset = Dataset(opened, spool, processes or cpus(), decode)
        numbers = [split.numbers for split in dataset.splits]
        duplicates = Duplicates(dataset.digests_N, dataset.hashes_N2, dataset.thumbs_NC, numbers)
        _note_keys(dataset)
        _note_totals(dataset)
        _note_left_out(dataset)
        found = report(str(location), dataset, duplicates, decode, time.monotonic() - started)
    tree = json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(folder / JSON_NAME, _utf8(tree))
    write_whole(folder / PAGE_NAME, _utf8(render_page(found, dataset, duplicates)))
    print(_utf8(screen(found)).decode())
    print(f"{folder / JSON_NAME}\n{folder / PAGE_NAME}")
    return 0 if found["passed"] else 1


def _utf8(text: str) -> bytes:
    """JSON can hold halves of characters, UTF-8 cannot."""
    return text.encode(errors="replace")


def _note_keys(dataset: Dataset) -> None:
    """Keys that come again in a split, and those that an earlier split has, too."""
    splits = dataset.splits
    keys = [dataset.keys_N[split.numbers.start : split.numbers.stop] for split in splits]
    for number, split in enumerate(splits):
        _, first = np.unique(keys[number], return_index=True)
        again = np.ones(len(keys[number]), dtype=bool)
        again[first] = False
        found = [(DUPLICATE_KEY, np.flatnonzero(again), "")]
        for other in range(number):
            shared = np.isin(keys[number], keys[other])
            found.append((KEY_ELSEWHERE, np.flatnonzero(shared), f"in {splits[other].name}"))
        for reason, rows, detail in found:
            named = split.numbers.start + rows[:MOST_NAMES]
            for name in dataset.names(named).values():
                split.findings.add(reason, name, detail)
            if len(rows) > len(named):
                split.findings.counts[reason] += len(rows) - len(named)


def _note_left_out(dataset: Dataset) -> None:
    for split in dataset.splits:
        for one in read_left_out(split.store):
            why = f"{one['reason']}: {one['detail']}" if one["detail"] else one["reason"]
            split.findings.add(LEFT_OUT, one["key"] or one["shard"], why)


def _note_totals(dataset: Dataset) -> None:
    """Compared with the index only where every sample was read: what broken ones hold is not known."""
    for split in dataset.splits:
        if split.totals["unread"] or split.totals["broken"]:
            continue
        for name, told in split.index.totals.items():
            if split.totals[name] != told:
                split.findings.add(OTHER_TOTALS, name, f"{split.totals[name]} counted, {told} in the index")
