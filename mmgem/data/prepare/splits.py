"""Which split a record goes to: its source's, or another by `--split-by`.

Receives `--split-by`: shares, as in `train=0.9,val=0.05,test=0.05`, or a JSON file `{"train": ["a.jpg", …], …}` that
lists pictures by file name, by path below the folder of pictures, or by key. Gives the split of a record; "" for one
that is not listed. Refuses shares that are not above 0 or do not sum to 1, a file of another form, and a name in two
splits.

With shares, the split is drawn by a hash of the key: that of a picture does not depend on which others there are.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from mmgem.data.prepare.reading import Record, read_json, safe_key
from mmgem.data.samples import SampleError, Tally
from mmgem.errors import UserError

IN_NO_SPLIT = "in no split"


class SplitBy:
    """Says which split a record goes to: the one of its source."""

    def __call__(self, record: Record) -> str:
        return record.split

    def unused(self) -> list[str]:
        """The listed names that no record had, so far."""
        return []


class Shares(SplitBy):
    def __init__(self, shares: dict[str, float]) -> None:
        self._splits = list(shares)
        self._ends = list(accumulate(shares.values()))

    def __call__(self, record: Record) -> str:
        place = int.from_bytes(hashlib.sha256(record.key.encode()).digest()[:8], "big") / 2**64
        return self._splits[min(bisect_right(self._ends, place), len(self._ends) - 1)]


class Lists(SplitBy):
    def __init__(self, listed: dict[str, str]) -> None:
        """`listed`: the key that a listed name makes -> split."""
        self._listed = listed
        self._used: set[str] = set()

    def __call__(self, record: Record) -> str:
        name = next((name for name in _names(record) if name in self._listed), None)
        if name is None:
            return ""
        self._used.add(name)
        return self._listed[name]

    def unused(self) -> list[str]:
        return [name for name in self._listed if name not in self._used]


def _names(record: Record) -> Iterator[str]:
    """The key, and those that the last part of the picture's path makes, the last two, …"""
    yield record.key
    if isinstance(record.image, Path):
        parts = record.image.parts
        yield from (safe_key("/".join(parts[-count:])) for count in range(1, len(parts) + 1))


def read_split_by(text: str | Path | None) -> SplitBy:
    """Raises UserError, as the module says."""
    if text is None:
        return SplitBy()
    if "=" in str(text) and not Path(text).exists():
        return Shares(_shares(str(text)))
    return Lists(_lists(Path(text)))


def check_split_name(name: str) -> str:
    """The name, if it can be that of a folder in the dataset. Raises UserError."""
    if not re.fullmatch(r"\w[\w.-]{0,62}", name):  # which is 252 bytes at most
        raise UserError(f"{name[:80]!r} cannot be a split: it names a folder, use letters, digits, - and _")
    return name


def in_splits(
    records: Iterable[Record], split_by: SplitBy, splits: Iterable[str] | None, limit: int | None, outside: Tally
) -> Iterator[Record]:
    """The records of `splits` (all where None), at most `limit` of each; those in no split are counted in `outside`."""
    taken: dict[str, int] = {}
    asked = None if splits is None else set(splits)
    for record in records:
        split = split_by(record)
        if not split:
            outside.skip(SampleError(record.key, IN_NO_SPLIT))
        elif asked is None or split in asked:
            taken[split] = taken.get(split, 0) + 1
            if limit is None or taken[split] <= limit:
                yield record if record.split == split else record._replace(split=split)


def _shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0 or check_split_name(name) in shares:
            raise UserError(
                f"--split-by {text}: {part.strip()!r}; write NAME=SHARE,… with shares above 0, each name once"
            )
        shares[name] = value
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise UserError(f"--split-by {text}: the shares sum to {sum(shares.values()):g}, not to 1")
    return shares


def _lists(path: Path) -> dict[str, str]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(names, list) for names in content.values()):
        raise UserError(f'--split-by {path}: {{"train": ["a.jpg", …], "val": […]}} is expected')
    listed: dict[str, str] = {}
    for split, names in content.items():
        check_split_name(split)
        for name in names:
            if not isinstance(name, str):
                raise UserError(f"--split-by {path}: {name!r} in {split!r} is no file name or key")
            if listed.setdefault(safe_key(name), split) != split:
                raise UserError(f"--split-by {path}: {name} is in {listed[safe_key(name)]!r} and in {split!r}")
    return listed
