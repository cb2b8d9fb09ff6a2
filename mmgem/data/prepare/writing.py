"""The common way from raw records to shards.

Receives records `(key, split, picture or its path, fields)` of any reader. Gives a dataset folder
with one folder a split, and an account of what was read, written and left out. Every picture is
decoded once. Refuses, with a UserError: a split that already has files (unless told to overwrite),
a source without samples, and one of which more than a set share is broken; a single broken sample
is skipped, counted and named.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmgem.data.samples import (
    DUPLICATE_KEY,
    Sample,
    SampleError,
    Tally,
    decode_image,
    parse_sample,
)
from mmgem.data.writer import ShardWriter, check_split_dir, image_extension
from mmgem.errors import UserError
from mmgem.progress import Progress

MAX_BROKEN = 0.05
NO_FILE = "image file missing"

T = TypeVar("T")
R = TypeVar("R")


class Record(NamedTuple):
    """One raw sample: `image` is the encoded picture or the file that has it."""

    key: str
    split: str
    image: Path | bytes
    meta: Mapping[str, Any] | str


def prepare(
    records: Iterable[Record],
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    shard_size: int = 1000,
    limit: int | None = None,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
    total: int | None = None,
) -> dict[str, Any]:
    """Writes the records to `out/SPLIT/`, prints an account and returns it.

    `splits` and `limit` take only those splits and the first `limit` records of each. A split is
    whole or absent: on an error, and on Ctrl-C, what this call has written is taken away. `total`
    is the number of records where they are not a list; it serves the time left.

    Returns {"out", "seconds", "splits": {name: {"read", "written", "captions", "regions",
    "images_without_captions"}}, "skipped": {reason: count}, "dropped": {reason: count},
    "examples": {reason: first keys}}.
    """
    out, started = Path(out), time.monotonic()
    chosen = select(records, splits, limit)
    if isinstance(records, Sized):
        chosen = list(chosen)
        total = len(chosen)
        _check_splits({record.split for record in chosen}, splits, out, overwrite)
    reads: Counter[str] = Counter()
    tally, writers = Tally(), dict[str, ShardWriter]()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("prepare", total))
        for checked in _checked(chosen):
            split = checked.split
            reads[split] += 1
            if split not in writers:
                writer = ShardWriter(out / split, shard_size, overwrite=overwrite)
                writers[split] = stack.enter_context(writer)
            if isinstance(checked.result, Sample):
                writers[split].write(checked.result)
            for account_of in (tally, writers[split].tally):
                account_of.dropped.update(checked.dropped)
                if isinstance(checked.result, SampleError):
                    account_of.skip(checked.result)
            progress.advance()
            if total is not None:
                check_broken(tally, total, max_broken)
        if not reads:
            raise UserError(f"nothing to write to {out}: the source has no samples")
        check_broken(tally, reads.total(), max_broken)
    rows = {name: {"read": reads[name], **row_of(writers[name].totals)} for name in reads}
    return account(out, rows, tally, time.monotonic() - started)


def select(records: Iterable[Record], splits: Sequence[str] | None, limit: int | None) -> Iterator[Record]:
    """The records of `splits` (all where None), at most `limit` of each split."""
    taken: dict[str, int] = {}
    for record in records:
        if splits is not None and record.split not in splits:
            continue
        taken[record.split] = taken.get(record.split, 0) + 1
        if limit is None or taken[record.split] <= limit:
            yield record


def check_broken(tally: Tally, read: int, max_broken: float) -> None:
    """Raises UserError when more than the share `max_broken` of `read` samples is broken."""
    if tally.broken > max_broken * read:
        reasons = "; ".join(describe(tally.skipped, tally.examples))
        raise UserError(
            f"{tally.broken} of {read} samples are broken, more than the set share of "
            f"{max_broken:g}: {reasons}. Mend the source or raise --max-broken"
        )


def account(
    out: Path,
    rows: dict[str, dict[str, int]],
    tally: Tally,
    seconds: float,
) -> dict[str, Any]:
    """Prints the table of what was read, written and left out, and returns it as a dict."""
    columns = ["read", "written", "captions", "regions"]
    width = max(5, *map(len, rows))
    lines = [" ".join([f"{'split':<{width}}", *(f"{name:>10}" for name in columns)])]
    for name, row in rows.items():
        lines.append(" ".join([f"{name:<{width}}", *(f"{row[c]:>10}" for c in columns)]))
    if without := sum(row["images_without_captions"] for row in rows.values()):
        lines.append(f"pictures without captions: {without}")
    lines += [f"skipped: {text}" for text in describe(tally.skipped, tally.examples)]
    lines += [f"dropped: {text}" for text in describe(tally.dropped, {})]
    lines.append(f"wrote {out} in {seconds:.1f} s")
    print("\n".join(lines))
    return {
        "out": str(out),
        "seconds": seconds,
        "splits": rows,
        "skipped": dict(tally.skipped),
        "dropped": dict(tally.dropped),
        "examples": tally.examples,
    }


def row_of(totals: Mapping[str, int]) -> dict[str, int]:
    """A split's row of the account, from the totals of its index."""
    return {"written" if name == "samples" else name: count for name, count in totals.items()}


def describe(counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> list[str]:
    """One text a reason: its count and the first keys."""
    texts = []
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        names = examples.get(reason, [])
        more = ", …" if names and count > len(names) else ""
        texts.append(f"{count} × {reason}" + (f": {', '.join(names)}{more}" if names else ""))
    return texts


def safe_key(name: str) -> str:
    """A key from a file's path as it is given: with its folders, which keep a/1.jpg and b/1.jpg
    apart, without its extension, and without what a tar member's key cannot have (webdataset ends
    the key at the first dot)."""
    path = Path(name)
    return re.sub(r"[^\w-]", "_", str(path.parent / path.stem))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. Raises UserError naming the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    item = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
                if not isinstance(item, dict):
                    raise UserError(f"{path}, line {number}: an object is expected")
                yield number, item
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def need_folder(path: Path, what: str) -> Path:
    """The path, if it is a folder. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; it should have {what}")
    return path


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`map` over the pool, in order, with at most `window` items under way."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Checked(NamedTuple):
    split: str
    result: Sample | SampleError
    dropped: Counter[str]


def _checked(records: Iterable[Record]) -> Iterator[_Checked]:
    """Each record read, parsed and decoded, in order. Threads: Pillow decodes without the GIL."""
    seen: set[str] = set()

    def marked() -> Iterator[tuple[Record, bool]]:
        for record in records:
            yield record, record.key in seen
            seen.add(record.key)

    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(pool, _check, marked(), window=8 * workers)


def _check(item: tuple[Record, bool]) -> _Checked:
    record, repeated = item
    dropped: Counter[str] = Counter()
    try:
        if repeated:
            raise SampleError(record.key, DUPLICATE_KEY)
        return _Checked(record.split, _sample_of(record, dropped), dropped)
    except SampleError as error:
        return _Checked(record.split, error, dropped)


def _sample_of(record: Record, dropped: Counter[str]) -> Sample:
    """The sample as it is written: size true, picture whole and in a format of the shards."""
    try:
        data = record.image if isinstance(record.image, bytes) else record.image.read_bytes()
    except OSError as error:
        raise SampleError(record.key, NO_FILE, f"{error.filename}: {error.strerror}") from error
    sample = parse_sample(record.key, data, record.meta, dropped)
    image = decode_image(sample)
    sample = replace(sample, width=image.width, height=image.height)  # equal, where there are boxes
    if image_extension(data) is None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        sample = replace(sample, image=buffer.getvalue())
    return sample


def _check_splits(found: set[str], asked: Sequence[str] | None, out: Path, overwrite: bool) -> None:
    """Before the first picture is read: every split asked for is there, and its folder is free."""
    for split in asked or ():
        if split not in found:
            raise UserError(f"the source has no split {split!r}: leave out --splits to see all")
    for split in sorted(found):
        check_split_dir(out / split, overwrite=overwrite)
