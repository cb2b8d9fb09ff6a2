"""The common way from raw records to shards.

Receives records of any reader, twice: to count them, and to write them. Gives a dataset folder with one folder a split,
and an account of what was read, written and left out. Every picture is decoded once. Refuses, with a UserError: a split
that already has files (unless told to overwrite), a source without samples, one of which more than a set share is
broken, and a full disk; a single broken sample is skipped, counted and named.

The records of a split are cut, in their order, into shards before any is looked at, and shards are made in parallel. A
split gets its index when all are finished. Whatever stops the work before, the finished shards stay, and the same
command goes on from them to the same bytes.
"""

from __future__ import annotations

import errno
import time
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import PIL

from mmgem import __version__
from mmgem.data.index import BROKEN_NAME, ShardEntry
from mmgem.data.prepare.reading import Load, Record
from mmgem.data.prepare.shard import Job, ShardAccount, Task, make_shard
from mmgem.data.prepare.splits import SplitBy, check_split_name, in_splits, read_split_by
from mmgem.data.prepare.unfinished import SplitFolder
from mmgem.data.processes import cpus, map_in_order
from mmgem.data.samples import SampleError, Tally
from mmgem.data.writer import Totals, locked
from mmgem.errors import UserError
from mmgem.progress import Progress

MAX_BROKEN = 0.05
_READ_AT_ONCE = 10_000  # records between two looks at the progress
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteOptions(TypedDict, total=False):
    """The options of every format that writes shards.

    splits: only these (default: all). split_by: other splits than the source's, as in
    `train=0.9,val=0.05,test=0.05`, or a JSON file that lists names (see `splits`). shard_size: records a tar (default
    1000). limit: at most so many records a split. resize: pictures whose shorter side has more pixels are made smaller
    and stored as JPEG of quality 92, boxes with them; others keep their bytes. processes: how many write (default: one
    a CPU). overwrite: replace splits that are there. max_broken: stop when more than this share of samples is broken
    (default 0.05).
    """

    splits: Sequence[str] | None
    split_by: str | Path | None
    shard_size: int
    limit: int | None
    resize: int | None
    processes: int | None
    overwrite: bool
    max_broken: float


def prepare(
    records: Callable[[], Iterable[Record]],
    out: str | Path,
    *,
    plan: Mapping[str, Any] | None = None,
    load: Load | None = None,
    splits: Sequence[str] | None = None,
    split_by: str | Path | None = None,
    shard_size: int = 1000,
    limit: int | None = None,
    resize: int | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
) -> dict[str, Any]:
    """Writes the records to `out/SPLIT/`, prints an account and returns it.

    `records` is called twice and gives the same both times. `plan` says by which format and arguments they were read:
    unfinished work of another plan is not gone on with. `load` completes a record in the process that writes it. The
    others are `WriteOptions`.

    Returns {"out", "seconds", "splits": {name: {"read", "written", "captions", "regions",
    "images_without_captions"}}, "skipped": {reason: count}, "dropped": {reason: count},
    "examples": {reason: first keys}, "kept": shards of an earlier, stopped run}.
    """
    for name, value in (("shard_size", shard_size), ("resize", resize), ("limit", limit), ("processes", processes)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
    check_share(max_broken)
    out, started = Path(out), time.monotonic()
    named, outside = read_split_by(split_by), Tally()
    counts, again = _count(in_splits(records(), named, splits, limit, outside), splits)
    if not counts:
        raise UserError(f"nothing to write to {out}: the source has no samples{_in_no_split(outside)}")
    whole_plan = {
        **(plan or {}),
        "split_by": None if split_by is None else str(split_by),
        **{"shard_size": shard_size, "limit": limit, "resize": resize},
        **{"mmgem": __version__, "Pillow": PIL.__version__},
    }
    folders = {split: SplitFolder(out / split, whole_plan) for split in counts}
    for folder in folders.values():
        folder.check(overwrite=overwrite)
    shards = {split: -(-count // shard_size) for split, count in counts.items()}
    books = _Books(counts, shards)
    tasks = _tasks(in_splits(records(), named, splits, limit, Tally()), shard_size, again)
    processes = min(processes or cpus(), sum(shards.values()))
    with ExitStack() as stack, _disk_full(out, books, folders):
        for folder in folders.values():
            stack.enter_context(locked(folder.path))
            folder.begin()
        made = stack.enter_context(closing(map_in_order(partial(make_shard, Job(out, load, resize)), tasks, processes)))
        _follow(made, books, max_broken)
        for split, folder in folders.items():
            folder.finish(shards[split], books.entries[split], vars(books.totals[split]), books.tallies[split])
        for folder in folders.values():
            folder.clean()
    notes = books.notes(out) + _notes_of_splits(outside, named)
    result = account(out, books.rows(), books.tally, time.monotonic() - started, notes)
    return {**result, "kept": books.kept.total()}


def check_share(max_broken: float) -> None:
    """Raises UserError where it is no share."""
    if not 0 <= max_broken <= 1:
        raise UserError(f"max_broken is {max_broken:g}; give a share from 0 to 1, as 0.05 for 5 in 100")


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
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Prints the table of what was read, written and left out, and returns it as a dict."""
    columns = ["read", "written", "skipped", "captions", "regions"]
    width = max(5, *map(len, rows))
    lines = [" ".join([f"{'split':<{width}}", *(f"{name:>10}" for name in columns)])]
    for name, row in rows.items():
        counts = {**row, "skipped": row["read"] - row["written"]}
        lines.append(" ".join([f"{name:<{width}}", *(f"{counts[c]:>10}" for c in columns)]))
    if without := sum(row["images_without_captions"] for row in rows.values()):
        lines.append(f"pictures without captions: {without}")
    lines += [f"skipped: {text}" for text in describe(tally.skipped, tally.examples)]
    lines += [f"dropped: {text}" for text in describe(tally.dropped, {})]
    lines += notes
    lines.append(f"wrote {out} in {seconds:.1f} s")
    print("\n".join(lines).encode(errors="replace").decode())  # names of files need not be Unicode
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


class _Books:
    """What has come of the shards so far."""

    def __init__(self, counts: Mapping[str, int], shards: Mapping[str, int]) -> None:
        self.records, self.shards = sum(counts.values()), sum(shards.values())
        self.tally = Tally()
        self.tallies = {split: Tally() for split in counts}
        self.totals = {split: Totals() for split in counts}
        self.entries: dict[str, list[ShardEntry]] = {split: [] for split in counts}
        self.read, self.kept = Counter[str](), Counter[str]()
        self.done = self.bytes = 0

    def add(self, made: ShardAccount) -> None:
        split = made.split
        for tally in (self.tally, self.tallies[split]):
            tally.dropped.update(made.dropped)
            for key, reason, detail in made.left_out:
                tally.skip(SampleError(key, reason, detail))
        for name, count in made.totals.items():
            setattr(self.totals[split], name, getattr(self.totals[split], name) + count)
        if made.entry is not None:
            self.entries[split].append(made.entry)
            self.bytes += made.entry.bytes
        self.read[split] += made.read
        self.kept[split] += made.kept
        self.done += 1

    def rows(self) -> dict[str, dict[str, int]]:
        return {split: {"read": self.read[split], **row_of(vars(totals))} for split, totals in self.totals.items()}

    def notes(self, out: Path) -> list[str]:
        notes = []
        if kept := self.kept.total():
            notes.append(f"kept: {kept} of {self.shards} shards, finished by an earlier run")
        where = [f"{out}/{split}/{BROKEN_NAME}" for split, tally in self.tallies.items() if tally.skipped]
        return [*notes, *([f"every skipped sample is named in {', '.join(where)}"] if where else [])]


def _count(records: Iterable[Record], splits: Sequence[str] | None) -> tuple[dict[str, int], set[int]]:
    """Split → its records; and the hashes that more than one key has, so that few keys need to be kept to find those
    that come again. Raises UserError for a split that is not there, and a name that cannot be one."""
    counts, hashes = Counter[str](), array("q")
    with Progress("reading", None) as progress:
        for record in records:
            counts[record.split] += 1
            hashes.append(hash(record.key))
            if len(hashes) % _READ_AT_ONCE == 0:
                progress.advance(_READ_AT_ONCE)
    for split in splits or ():
        if split not in counts:
            raise UserError(f"the source has no split {split!r}: leave out --splits to see all")
    for split in counts:
        check_split_name(split)
    hashes_N = np.sort(np.array(hashes, dtype=np.int64))
    return dict(counts), set(hashes_N[1:][hashes_N[1:] == hashes_N[:-1]].tolist())


def _tasks(records: Iterable[Record], shard_size: int, again: Container[int]) -> Iterator[Task]:
    """The shards, each when its last record is there. `again`: the hashes of the keys that may come again."""
    seen: set[str] = set()
    filling: dict[str, Task] = {}
    for record in records:
        split = record.split
        task = filling.setdefault(split, Task(split, 0, [], []))
        if hash(record.key) in again:
            if record.key in seen:
                task.repeated.append(len(task.records))
            seen.add(record.key)
        task.records.append(record)
        if len(task.records) == shard_size:
            yield task
            filling[split] = Task(split, task.number + 1, [], [])
    yield from (task for task in filling.values() if task.records)


def _follow(made: Iterable[ShardAccount], books: _Books, max_broken: float) -> None:
    """Books the shards as they come. Raises UserError when too much is broken."""
    with Progress("prepare", books.records) as progress:
        for shard in made:
            books.add(shard)
            if shard.kept:
                progress.first += shard.read  # no work: it says nothing of the time left
                progress.note = f"{books.kept.total()} shards kept"
            progress.advance(shard.read)
            check_broken(books.tally, books.records, max_broken)


@contextmanager
def _disk_full(out: Path, books: _Books, folders: Mapping[str, SplitFolder]) -> Iterator[None]:
    """Makes a UserError of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        finished = sum(folder.finished() for folder in folders.values())
        needed = ""
        if books.bytes:
            left = books.bytes / books.done * (books.shards - finished)
            needed = f", about {left / 1e6:,.0f} MB more are needed"
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror}; {finished} of {books.shards} shards are finished "
            f"and kept{needed}: make room and run the same command again"
        ) from error


def _in_no_split(outside: Tally) -> str:
    return "".join(f" ({text})" for text in describe(outside.skipped, outside.examples))


def _notes_of_splits(outside: Tally, named: SplitBy) -> list[str]:
    notes = [f"left out: {text}" for text in describe(outside.skipped, outside.examples)]
    if unused := named.unused():
        more = ", …" if len(unused) > 3 else ""
        notes.append(f"not in the source: {len(unused)} listed names: {', '.join(unused[:3])}{more}")
    return notes
