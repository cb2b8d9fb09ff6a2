"""All splits of a dataset, read shard by shard in several processes.

Receives a dataset or a split: a folder or URL. Gives, of each split, what was found, counted and measured, and of all
samples, which are numbered split after split, the digests and hashes. Refuses, with a UserError: what is no dataset, a
broken index, and a URL of a dataset without the names of its splits.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mmgem.data.audit.findings import Findings
from mmgem.data.audit.hashes import SIDE
from mmgem.data.audit.scan import MEASURES, ShardScan, read_sample, scan_shard
from mmgem.data.index import INDEX_NAME, Index, ShardEntry, read_index, read_members
from mmgem.data.processes import map_in_order
from mmgem.data.samples import Sample
from mmgem.data.store import Store, is_url, open_store
from mmgem.errors import UserError
from mmgem.progress import Progress


@dataclass
class Split:
    name: str
    store: Store
    index: Index
    numbers: range = range(0)
    """Of its samples."""
    findings: Findings = field(default_factory=Findings)
    totals: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[float]] = field(default_factory=lambda: {name: Counter() for name in MEASURES})

    @property
    def bytes(self) -> int:
        """Of its tars, as the index says."""
        return sum(shard.bytes for shard in self.index.shards)


class Dataset:
    """N samples: those of all members files that can be read. The arrays are those of `ShardScan`."""

    def __init__(self, splits: Sequence[Split], spool: IO[bytes], processes: int, decode: bool) -> None:
        """`spool` is where the thumbnails are kept; it has to stay open. Raises UserError."""
        self.splits = list(splits)
        self._shards = [(split, entry) for split in self.splits for entry in split.index.shards]
        keys, digests, hashes = ([np.zeros((0, *shape), dtype=np.uint64)] for shape in ((), (), (2,)))
        starts = [0]
        total = sum(entry.samples for _, entry in self._shards)
        with Progress("checking", total) as progress:
            scans = _scans(self._shards, processes, decode)
            for (split, entry), scan in zip(self._shards, scans, strict=True):
                split.findings.update(scan.findings)
                split.totals.update(scan.totals)
                for measure, counts in scan.values.items():
                    split.values[measure].update(counts)
                keys.append(scan.keys_N)
                digests.append(scan.digests_N)
                hashes.append(scan.hashes_N2)
                starts.append(starts[-1] + len(scan.keys_N))
                spool.write(scan.thumbs_NC.tobytes())
                progress.advance(entry.samples)
        self._starts = np.array(starts)
        first = 0
        for split in self.splits:
            last = first + len(split.index.shards)
            split.numbers = range(starts[first], starts[last])
            first = last
        self.keys_N, self.digests_N, self.hashes_N2 = map(np.concatenate, (keys, digests, hashes))
        spool.flush()
        shape = (len(self.keys_N), SIDE * SIDE)
        self.thumbs_NC: NDArray[np.uint8] = (
            np.memmap(spool, dtype=np.uint8, mode="r", shape=shape) if shape[0] else np.zeros(shape, dtype=np.uint8)
        )

    def names(self, numbers: Iterable[int]) -> dict[int, str]:
        """The keys of samples; reads the members files of their shards."""
        by_shard: dict[int, list[int]] = {}
        for number in sorted({int(number) for number in numbers}):
            by_shard.setdefault(self._shard_of(number), []).append(number)
        found = {}
        for shard, listed in by_shard.items():
            split, entry = self._shards[shard]
            keys = read_members(split.store, entry).keys
            found.update({number: keys[number - int(self._starts[shard])] for number in listed})
        return found

    def sample(self, number: int) -> Sample:
        """Raises SampleError, UserError."""
        shard = self._shard_of(number)
        split, entry = self._shards[shard]
        return read_sample(split.store, entry, number - int(self._starts[shard]))

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def open_splits(location: str | Path, names: Sequence[str] | None = None) -> list[Split]:
    """The splits of a dataset, train first; `names`: only these. A split itself is one. Raises UserError."""
    store = open_store(location)
    if names:
        found = {name: open_store(_join(location, name)) for name in names}
    elif store.exists(INDEX_NAME):
        own = posixpath.basename(str(location).rstrip("/")) if is_url(location) else Path(location).resolve().name
        found = {own: store}
    elif is_url(location):
        raise UserError(
            f"no {INDEX_NAME} at {location}: name the splits of a dataset at a URL, e.g. --splits train val"
        )
    elif not Path(location).is_dir():
        raise UserError(f"no such folder: {location}; make it with `mmgem data prepare`")
    else:
        paths = [path.parent for path in Path(location).glob(f"*/{INDEX_NAME}")]
        found = {path.name: open_store(path) for path in paths}
        if not found:
            raise UserError(f"no split in {location}: no folder in it has an {INDEX_NAME}; see `mmgem data prepare`")
    order = sorted(found, key=lambda name: (name != "train", name))
    return [Split(name, found[name], read_index(found[name])) for name in order]


def _join(location: str | Path, name: str) -> str | Path:
    return f"{str(location).rstrip('/')}/{name}" if is_url(location) else Path(location) / name


def _scans(shards: Sequence[tuple[Split, ShardEntry]], processes: int, decode: bool) -> Iterator[ShardScan]:
    """In the order of the shards."""
    tasks = [(split.store, entry) for split, entry in shards]
    return map_in_order(partial(_scan, decode), tasks, min(processes, len(tasks)))


def _scan(decode: bool, task: tuple[Store, ShardEntry]) -> ShardScan:
    return scan_shard(*task, decode)
