"""Where the files of a split lie.

Receives a folder. Gives its small files' content, and its shards as local files. Refuses, with a UserError that names
the file, what is not there; and with a SampleError a shard that is not what its index says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from mmgem.data.samples import SampleError
from mmgem.errors import UserError


class Shard(Protocol):
    """What a store needs to know of a shard: an entry of the index."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Store(Protocol):
    """A split's files. Cheap to pickle to a worker."""

    def name(self, path: str) -> str:
        """How users know the file: its full path or URL."""
        ...

    def exists(self, path: str) -> bool: ...

    def read(self, path: str) -> bytes:
        """The whole of a small file. Raises UserError."""
        ...

    def local(self, shard: Shard) -> Path:
        """The shard as a file on this machine, of the size that the index says. Raises UserError where there is none,
        SampleError (with `shard` set) where it is not what the index says."""
        ...

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Says which shards will soon be read."""
        ...


class LocalStore:
    def __init__(self, root: str | Path):
        self.root = Path(root)

    def name(self, path: str) -> str:
        return str(self.root / path)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.root / path}: {error.strerror}") from error

    def local(self, shard: Shard) -> Path:
        path = self.root / shard.path
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise UserError(f"shard {path} is missing, its index names it; copy or prepare it again") from error
        if found != shard.bytes:
            detail = f"{path}: {found} bytes, its index says {shard.bytes}"
            reason = "shard cut short" if found < shard.bytes else "shard changed"
            raise SampleError("", reason, detail, shard=str(path))
        return path

    def prefetch(self, shards: Iterable[Shard]) -> None:
        pass


def open_store(location: str | Path) -> Store:
    return LocalStore(location)
