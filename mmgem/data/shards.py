"""Samples out of shards, by their number, in any order and in any process.

Receives a split: a folder or URL with `index.json` and the tars it names, which lie beside it (`shard-000000.tar`,
written by `writer`) or elsewhere (tars of img2dataset, indexed as they are by `tars`). Gives sample i by offset,
without reading what lies before it. Refuses, with a UserError that names the file: a folder without index, a shard that
is missing; and with a SampleError a sample that cannot be read. A shard that is not what its index says (cut short,
other bytes) makes a SampleError of each of its samples.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from mmgem.data.index import (
    INDEX_NAME,
    OFF_MEMBER,
    OTHER_COUNT,
    Index,
    ShardMembers,
    read_index,
    read_left_out,
    read_members,
)
from mmgem.data.samples import (
    BROKEN_META,
    IMAGE_TOO_LARGE,
    MOST_IMAGE,
    MOST_TEXT,
    Sample,
    SampleError,
    is_unicode,
    merge_texts,
    parse_captions,
    parse_sample,
)
from mmgem.data.store import LocalStore, Store, check_sha256, is_url, open_store
from mmgem.errors import UserError

OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 open files


class ShardedDataset:
    """One split, read by offset. Cheap to pickle to a worker; opens files when it first reads.

    `sizes` are the samples of each shard, `totals` the counts of the index, `checksum` tells splits apart, `remote`
    says whether shards have to be fetched before they are read. Its memory does not grow with the number of samples,
    only with that of shards. `verify` compares the sha256 of each shard with the index when it is first opened by any
    of the processes that this dataset was sent to; those of URLs were compared when they were fetched. Raises UserError
    as the module says.
    """

    def __init__(self, location: str | Path, *, store: Store | None = None, verify: bool = False) -> None:
        self.store = store or open_store(location)
        if isinstance(self.store, LocalStore):
            _refuse_no_index(self.store.root)
        index = read_index(self.store)
        self.name = self.store.name("").rstrip("/")
        self.totals = index.totals
        self.checksum = index.checksum
        self.shards = index.shards
        self.remote = is_url(self.name) or any(is_url(shard.path) for shard in index.shards)
        self.sizes = np.asarray([shard.samples for shard in index.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        if isinstance(self.store, LocalStore):
            _refuse_missing_shards(self.store.root, index)
        self._opened: OrderedDict[int, tuple[FileIO, ShardMembers]] = OrderedDict()
        self._faults: dict[int, tuple[Any, ...]] = {}
        self._found_good = _Flags(len(self.shards)) if verify else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    @property
    def has_captions(self) -> bool:
        return self.totals["captions"] > 0

    @property
    def has_regions(self) -> bool:
        return self.totals["regions"] > 0

    def left_out(self) -> Iterator[dict[str, str]]:
        """As `index.read_left_out`."""
        return read_left_out(self.store)

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in order: reads all members files."""
        return [key for shard in self.shards for key in read_members(self.store, shard).keys]

    def place(self, index: int) -> tuple[int, int]:
        """Sample -> (shard, its number in the shard). Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - int(self._ends[shard] - self.sizes[shard])

    def key(self, index: int) -> str:
        """Of sample `index`."""
        shard, row = self.place(index)
        return self._open(shard)[1].keys[row]

    def sample(self, index: int) -> Sample:
        """Sample `index`, validated, its picture not decoded. Raises SampleError, IndexError."""
        shard, row = self.place(index)
        members = self._open(shard)[1]
        return parse_sample(members.keys[row], self._read(shard, row, 0), self._meta(shard, row))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`, without reading its picture. Raises SampleError."""
        shard, row = self.place(index)
        return parse_captions(self._open(shard)[1].keys[row], self._meta(shard, row))

    def iter_texts(self) -> Iterator[str]:
        """Every caption and phrase of the split, in order, without reading a picture.

        A record whose text is broken gives nothing: it is counted where it is used as a sample.
        """
        for shard in range(len(self.shards)):
            with suppress(SampleError):
                for row in range(len(self._open(shard)[1].keys)):
                    yield from self._texts(shard, row)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Says which shards will soon be read."""
        self.store.prefetch([self.shards[shard] for shard in shards])

    def _texts(self, shard: int, row: int) -> Iterator[str]:
        try:
            meta = self._meta(shard, row)
            yield from parse_captions("", meta)
        except SampleError:
            return
        regions = meta.get("regions")
        for region in regions if isinstance(regions, list) else ():
            phrase = region.get("phrase") if isinstance(region, dict) else None
            if isinstance(phrase, str) and phrase.strip() and is_unicode(phrase):
                yield phrase.strip()

    def _meta(self, shard: int, row: int) -> dict[str, Any]:
        """The record's JSON, with the text of KEY.txt as caption where it has none."""
        key = self._open(shard)[1].keys[row]
        return merge_texts(key, self._read(shard, row, 1), self._read(shard, row, 2))

    def _read(self, shard: int, row: int, member: int) -> bytes:
        file, members = self._open(shard)
        offset, size = (int(value) for value in members.spans_N32[row, member])
        if offset == -1:
            return b""
        key, length = members.keys[row], self.shards[shard].bytes
        if not (0 <= offset <= length and 0 <= size <= length - offset):
            raise SampleError(key, OFF_MEMBER, f"{size} bytes at {offset} of a tar of {length}")
        if size > (MOST_TEXT if member else MOST_IMAGE):
            raise SampleError(key, BROKEN_META if member else IMAGE_TOO_LARGE, f"{size} bytes")
        # pread keeps no position: a handle shared with a forked worker cannot be moved by it.
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise SampleError(key, "shard cut short", self.store.name(self.shards[shard].path))
        return data

    def _open(self, shard: int) -> tuple[FileIO, ShardMembers]:
        """The shard's file and members. Raises SampleError, the same one for all its samples."""
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        if shard in self._faults:
            raise SampleError(*self._faults[shard])
        entry = self.shards[shard]
        try:
            members = read_members(self.store, entry)
            if len(members.keys) != entry.samples:
                counts = f"{len(members.keys)} in {entry.members}, {entry.samples} in the index"
                raise SampleError("", OTHER_COUNT, counts, shard=self.store.name(entry.path))
            file = self.store.open(entry)
            if self._found_good is not None and not is_url(name := self.store.name(entry.path)):
                if not self._found_good[shard]:
                    check_sha256(file, entry, name)
                    self._found_good.set(shard)
        except SampleError as fault:
            self._faults[shard] = fault.args
            raise
        # A store's cache may have taken files away: they use the disk until the last reader closes them.
        for number in [n for n, (opened, _) in self._opened.items() if not os.fstat(opened.fileno()).st_nlink]:
            del self._opened[number]
        self._opened[shard] = (file, members)
        if len(self._opened) > OPEN_SHARDS:
            self._opened.popitem(last=False)  # closed with its last reader
        return self._opened[shard]


class _Flags:
    """A flag for each shard, shared by all processes that this is sent to or that fork: bytes of a file that they map.

    It goes with the process that made it; in those that are left each has flags of its own.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        handle, self._path = tempfile.mkstemp(prefix="mmgem-flags-")
        os.truncate(handle, max(1, count))  # nothing cannot be mapped
        os.close(handle)
        self._bytes: mmap.mmap | bytearray | None = None
        weakref.finalize(self, _remove_own, self._path, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def _mapped(self) -> mmap.mmap | bytearray:
        if self._bytes is None:
            try:
                with open(self._path, "r+b") as file:
                    self._bytes = mmap.mmap(file.fileno(), 0)
            except OSError:
                self._bytes = bytearray(self._count)
        return self._bytes

    def __getitem__(self, number: int) -> bool:
        return bool(self._mapped()[number])

    def set(self, number: int) -> None:
        self._mapped()[number] = 1


def _remove_own(path: str, process: int) -> None:
    if process == os.getpid():
        with suppress(OSError):
            os.unlink(path)


def _refuse_no_index(split_dir: Path) -> None:
    """Raises UserError, which says what is there instead."""
    if not split_dir.is_dir():
        if others := _splits_of(split_dir.parent):
            raise UserError(f"no split {split_dir.name} in {split_dir.parent}; it has {others}")
        raise UserError(f"no such folder: {split_dir}; make it with `mmgem data prepare`")
    if (split_dir / INDEX_NAME).is_file():
        return
    if splits := _splits_of(split_dir):
        raise UserError(f"{split_dir} holds the splits {splits}: name one of them")
    if next(split_dir.glob("*.tar"), None) is not None:
        raise UserError(f"no {INDEX_NAME} in {split_dir}: write one with `mmgem data index {split_dir}`")
    raise UserError(f"no {INDEX_NAME} in {split_dir}, no finished split: make one with `mmgem data prepare`")


def _refuse_missing_shards(split_dir: Path, index: Index) -> None:
    """By listing folders: to look at each of 100,000 files takes long."""
    listed: dict[str, set[str]] = {}
    for shard in index.shards:
        if is_url(shard.path):
            continue
        cut = shard.path.rfind("/") + 1
        below, name = shard.path[:cut], shard.path[cut:]
        if below not in listed:
            folder = split_dir / below
            try:
                listed[below] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            except PermissionError as error:
                raise UserError(f"cannot look for shards in {folder}: {error.strerror}") from error
        if name not in listed[below]:
            raise UserError(
                f"shard {split_dir / shard.path} is missing, "
                f"{split_dir / INDEX_NAME} names it; copy or prepare it again"
            )


def _splits_of(dataset: Path) -> str:
    return ", ".join(sorted(path.parent.name for path in dataset.glob(f"*/{INDEX_NAME}")))
