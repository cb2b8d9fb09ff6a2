"""Several splits as one dataset, and the split that a config's words mean.

Receives paths or URLs of datasets. Gives what `ShardedDataset` gives, over all of them: sample i, sizes of shards,
totals. Refuses, with a UserError, what is no dataset.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmgem.config import DataConfig
from mmgem.data.index import INDEX_NAME
from mmgem.data.samples import Sample, SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.data.store import open_store
from mmgem.errors import UserError


class Sources:
    """The samples of several splits, one after the other; each key then has its split's number in front."""

    def __init__(self, splits: Sequence[ShardedDataset], weights: Sequence[float] = ()):
        """weights: shares of the samples seen, for `Order`; none: all splits are read as one."""
        self.splits = list(splits)
        self.weights = tuple(weights)
        self.name = ", ".join(split.name for split in splits)
        self.sizes = np.concatenate([split.sizes for split in splits])
        self.totals = {name: sum(split.totals[name] for split in splits) for name in splits[0].totals}
        checksums = [split.checksum for split in splits]
        self.checksum = checksums[0] if len(splits) == 1 else hashlib.sha256(" ".join(checksums).encode()).hexdigest()
        self._first_sample = np.cumsum([0, *(len(split) for split in splits)])
        self._first_shard = np.cumsum([0, *(len(split.sizes) for split in splits)])

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    @property
    def has_captions(self) -> bool:
        return any(split.has_captions for split in self.splits)

    @property
    def has_regions(self) -> bool:
        return any(split.has_regions for split in self.splits)

    @property
    def remote(self) -> bool:
        return any(split.remote for split in self.splits)

    @property
    def order_sources(self) -> list[tuple[int, float]]:
        """Shards and weight of each source, as `Order` takes them."""
        sizes = [len(split.sizes) for split in self.splits]
        return list(zip(sizes, self.weights, strict=True)) if self.weights else []

    def sample(self, index: int) -> Sample:
        """As `ShardedDataset.sample`."""
        number, own = self._split_of(self._first_sample, index)
        try:
            sample = self.splits[number].sample(own)
        except SampleError as error:
            raise SampleError(self._key(number, error.key), error.reason, error.detail, error.shard) from error
        return replace(sample, key=self._key(number, sample.key))

    def captions(self, index: int) -> tuple[str, ...]:
        """As `ShardedDataset.captions`."""
        number, own = self._split_of(self._first_sample, index)
        return self.splits[number].captions(own)

    def iter_texts(self) -> Iterator[str]:
        for split in self.splits:
            yield from split.iter_texts()

    def left_out(self) -> Iterator[dict[str, str]]:
        for split in self.splits:
            yield from split.left_out()

    def prefetch(self, shards: Iterable[int]) -> None:
        of_split: dict[int, list[int]] = {}
        for shard in shards:
            number, own = self._split_of(self._first_shard, shard)
            of_split.setdefault(number, []).append(own)
        for number, own in of_split.items():
            self.splits[number].prefetch(own)

    def _key(self, number: int, key: str) -> str:
        return f"{number}:{key}" if len(self.splits) > 1 else key

    def _split_of(self, firsts: np.ndarray, index: int) -> tuple[int, int]:
        if not 0 <= index < firsts[-1]:
            raise IndexError(f"{index} of {firsts[-1]}")
        number = int(np.searchsorted(firsts, index, side="right")) - 1
        return number, index - int(firsts[number])


def open_training_data(data: DataConfig) -> Sources:
    """The training split of `data.path`, or of all `data.sources`. Raises UserError."""
    if not data.path and not data.sources:
        raise UserError("data.path is missing: name a folder made by `mmgem data prepare`")
    if not data.sources:
        return Sources([open_split(data, data.path, data.train_split)])
    splits = [open_split(data, source.path, data.train_split) for source in data.sources]
    return Sources(splits, [source.weight for source in data.sources if source.weight is not None])


def open_validation_data(data: DataConfig) -> ShardedDataset | None:
    """The validation split of the (first) data set, where it has one."""
    path = data.path or data.sources[0].path
    if data.val_split is None or not open_store(f"{path.rstrip('/')}/{data.val_split}").exists(INDEX_NAME):
        return None
    return open_split(data, path, data.val_split)


def open_split(data: DataConfig, path: str, split: str) -> ShardedDataset:
    """The split of a dataset, or the dataset itself where it is one split. Raises UserError."""
    location = split_location(path, split)
    store = open_store(location, cache_dir=data.shard_cache, cache_gb=data.shard_cache_gb)
    dataset = ShardedDataset(location, store=store, verify=data.verify)
    if not len(dataset):
        raise UserError(f"{dataset.name}: no samples")
    return dataset


def split_location(path: str, split: str) -> str:
    """The folder or URL of a split: below `path`, or `path` itself where that is one (as tars of img2dataset are)."""
    if "://" in path:
        below = f"{path.rstrip('/')}/{split}"
        return below if open_store(below).exists(INDEX_NAME) else path
    if not Path(path).is_dir():
        raise UserError(f"data.path={path}: no such folder; make it with `mmgem data prepare`")
    below = os.path.join(path, split)
    return path if not os.path.isdir(below) and holds_split(path) else below


def holds_split(path: str) -> bool:
    """Whether a folder is itself a split, or has the tars to become one."""
    names = os.listdir(path)
    return INDEX_NAME in names or any(name.endswith(".tar") for name in names)
