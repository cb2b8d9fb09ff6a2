"""Writes samples into numbered tars, and their index.

Receives samples. Gives `shard-000000.tar …`, `members/` and `index.json` (`ShardWriter`), or one shard (`ShardFile`).
Refuses a folder that already holds a split (unless told to overwrite), a key that no tar can hold or that was written
before, and a picture of another format.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType

from mmgem.data.index import (
    BROKEN_NAME,
    INDEX_NAME,
    MEMBERS_FOLDER,
    Index,
    ShardEntry,
    sha256_of,
    write_index,
    write_members,
)
from mmgem.data.samples import Sample, Tally, record_of
from mmgem.errors import UserError

BLOCK = 512
"""A tar is made of blocks of so many bytes."""
# webdataset's own rule: the key ends at the first dot of the last part of the path.
MEMBER = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")

UNFINISHED = "unfinished"
"""The folder in a split that keeps, until the index is there, what `mmgem data prepare` goes on from."""

_OWN_FILE = re.compile(rf"\.?(shard-\d{{6}}\.tar|{re.escape(INDEX_NAME)}|{re.escape(BROKEN_NAME)})(\.partial)?")


class ShardFile:
    """One shard while it is written, as `.shard-000003.tar.partial`.

    `finish` gives it its name, `discard` takes away what has none.
    The same samples give the same bytes. A finished shard is on the disk, not only in the system's memory.
    """

    def __init__(self, split_dir: Path, number: int) -> None:
        self.totals = Totals()
        self._split_dir, self._number = split_dir, number
        self._path = shard_path(split_dir, number)
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._members: dict[str, dict[str, list[int]]] = {}
        self._file = self._partial.open("wb", buffering=1 << 20)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, sample: Sample) -> None:
        """Appends one sample. Raises ValueError for a key that a tar of webdataset cannot hold, a key that the shard
        has, a picture that is not JPEG, PNG or WebP, and (UnicodeEncodeError) text that is no Unicode."""
        match = MEMBER.match(f"{sample.key}.json")
        unsafe = sample.key.startswith("/") or ".." in sample.key.split("/")
        if match is None or match[1] != sample.key or unsafe:
            raise ValueError(f"not a key: {sample.key!r}")
        if sample.key in self._members:
            raise ValueError(f"key {sample.key!r} was written before")
        extension = image_extension(sample.image)
        if extension is None:
            raise ValueError(f"sample {sample.key}: the picture is not JPEG, PNG or WebP")
        # Encoded before the picture is written: text that is no Unicode must not leave a picture alone in the tar.
        record = json.dumps(record_of(sample), ensure_ascii=False, separators=(",", ":")).encode()
        self._members[sample.key] = {
            extension: _add(self._tar, f"{sample.key}.{extension}", sample.image),
            "json": _add(self._tar, f"{sample.key}.json", record),
        }
        self.totals.add(sample)

    def finish(self) -> ShardEntry:
        """Closes it, writes its members file and gives its entry of the index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = shard_entry(self._split_dir, self._number, self._path.name, self._partial, self._members)
        os.replace(self._partial, self._path)
        return entry

    def discard(self) -> None:
        with suppress(OSError):  # the buffer that a full disk has refused is refused again
            self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into numbered tars of `shard_size` and, at the end, the index.

    A context manager. A shard gets its name when it is whole, the index comes last: a folder with
    an index.json is complete. On an error in the block nothing of this writer stays. The same
    samples give the same bytes, and so the same checksums. Raises UserError when the folder
    already holds a split and `overwrite` is not set.
    """

    def __init__(self, split_dir: str | Path, shard_size: int = 1000, *, overwrite: bool = False) -> None:
        if shard_size < 1:
            raise UserError(f"shard_size is {shard_size}; give 1 or more")
        self.split_dir = Path(split_dir)
        self.shard_size = shard_size
        self.tally = Tally()
        self._shards: list[ShardEntry] = []
        self._totals = Totals()
        self._keys: set[str] = set()
        self._open: ShardFile | None = None
        check_split_dir(self.split_dir, overwrite=overwrite)
        self.split_dir.mkdir(parents=True, exist_ok=True)
        remove_split(self.split_dir)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish_shard()
                tally = self.tally
                write_index(self.split_dir, Index(self._shards, self.totals, dict(tally.skipped), dict(tally.dropped)))
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    @property
    def totals(self) -> dict[str, int]:
        """The totals of the index, so far."""
        return dict(vars(self._totals))

    def write(self, sample: Sample) -> None:
        """Appends one sample. Raises ValueError as `ShardFile.add` does, and for a key of any shard before."""
        if sample.key in self._keys:
            raise ValueError(f"key {sample.key!r} was written before")
        if self._open is None:
            self._open = ShardFile(self.split_dir, len(self._shards))
        self._open.add(sample)
        self._keys.add(sample.key)
        self._totals.add(sample)
        if len(self._open) == self.shard_size:
            self._finish_shard()

    def _discard(self) -> None:
        """Takes away whatever this writer has written."""
        if self._open is not None:
            self._open.discard()
        remove_split(self.split_dir)

    def _finish_shard(self) -> None:
        if self._open is not None and len(self._open):
            self._shards.append(self._open.finish())
        elif self._open is not None:  # its first sample was refused
            self._open.discard()
        self._open = None


def shard_path(split_dir: Path, number: int) -> Path:
    return split_dir / f"shard-{number:06d}.tar"


def remove_split(split_dir: Path) -> None:
    """Takes away a split that a writer made, whole or not; other files are not ours."""
    (split_dir / INDEX_NAME).unlink(missing_ok=True)  # first: what is half gone must not look whole
    for path in split_dir.iterdir():
        if _OWN_FILE.fullmatch(path.name):
            path.unlink()
    for folder in (MEMBERS_FOLDER, UNFINISHED):
        shutil.rmtree(split_dir / folder, ignore_errors=True)


def check_split_dir(split_dir: Path, *, overwrite: bool) -> None:
    """Raises UserError unless a split can be written here: the folder is missing or empty, or
    `overwrite` is set."""
    if split_dir.exists() and not split_dir.is_dir():
        raise UserError(f"{split_dir} is a file, a folder is needed: choose another --out")
    if not overwrite and split_dir.is_dir() and next(split_dir.iterdir(), None) is not None:
        raise UserError(f"{split_dir} is not empty: choose another --out, or give --overwrite")


@contextmanager
def locked(split_dir: Path) -> Iterator[None]:
    """Makes the folder, if need be, and holds it. Raises UserError where another process does. The system lets go of it
    when this one ends."""
    split_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(split_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is at work in {split_dir}: wait for it or stop it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def image_extension(image: bytes) -> str | None:
    """jpg, png or webp by the first bytes; None for every other format."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


def shard_entry(
    split_dir: Path, number: int, stored: str, tar: Path, members: Mapping[str, Mapping[str, Sequence[int]]]
) -> ShardEntry:
    """Writes the members file of a finished tar and gives its entry of the index. `stored`: its path in the index."""
    place, checksum = write_members(split_dir, number, members)
    return ShardEntry(stored, len(members), tar.stat().st_size, sha256_of(tar), place, checksum)


@dataclass
class Totals:
    samples: int = 0
    captions: int = 0
    regions: int = 0
    images_without_captions: int = 0

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.captions += len(sample.captions)
        self.regions += len(sample.regions)
        self.images_without_captions += not sample.captions


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> list[int]:
    """Writes one member and gives [offset, size] of its data."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0: same input, same bytes
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, BytesIO(data))
    return [tar.offset - padded(len(data)), len(data)]


def padded(size: int) -> int:
    """The room that so many bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK
