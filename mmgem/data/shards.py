"""Shards: webdataset tars with an index; open, read record i, count, checksum.

Receives a split: a folder with `index.json` and the tars it names, which lie beside it
(`shard-000000.tar`, written here) or elsewhere (tars of img2dataset, indexed as they are). Gives
sample i by offset, without reading what lies before it, in any process. Refuses, with a UserError
that names the file: a folder without index, a shard that is missing or whose size is not that of
the index, a broken tar; and with a SampleError a record that cannot be read.

index.json, schema 1:
    {"schema": 1,
     "shards": [{"path": relative to this folder or absolute, "samples": n, "bytes": size of the
                 tar, "sha256": of the tar, "members": {KEY: {ext: [offset, size]}}}],
     "totals": {"samples", "captions", "regions", "images_without_captions"},
     "skipped": {reason: samples left out},  "dropped": {reason: captions, phrases, boxes left out}}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mmgem.data.samples import (
    BROKEN_META,
    DUPLICATE_KEY,
    NO_IMAGE,
    Sample,
    SampleError,
    Tally,
    decode_image,
    image_size,
    parse_captions,
    parse_sample,
    record_of,
)
from mmgem.errors import UserError

INDEX_NAME = "index.json"
SCHEMA = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_BLOCK = 512  # a tar is made of blocks of this size
_OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 open files
_SHARD_NAME = "shard-{:06d}.tar"
_OWN_FILE = re.compile(r"\.?(shard-\d{6}\.tar|index\.json)(\.partial)?")
# webdataset's own rule: the key ends at the first dot of the last part of the path.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")


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
        self._shards: list[dict[str, Any]] = []
        self._totals = _Totals()
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, dict[str, list[int]]] = {}
        check_split_dir(self.split_dir, overwrite=overwrite)
        self.split_dir.mkdir(parents=True, exist_ok=True)
        for path in self.split_dir.iterdir():
            if _OWN_FILE.fullmatch(path.name):  # an older split; other files are not ours
                path.unlink()

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
                _write_index_file(self.split_dir, self._shards, self._totals, self.tally)
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
        """Appends one sample. Raises ValueError for a key that a tar of webdataset cannot hold,
        a key written before, and a picture that is not JPEG, PNG or WebP."""
        match = _MEMBER.match(f"{sample.key}.json")
        unsafe = sample.key.startswith("/") or ".." in sample.key.split("/")
        if match is None or match[1] != sample.key or unsafe:
            raise ValueError(f"not a key: {sample.key!r}")
        if sample.key in self._keys:
            raise ValueError(f"key {sample.key!r} was written before")
        extension = image_extension(sample.image)
        if extension is None:
            raise ValueError(f"sample {sample.key}: the picture is not JPEG, PNG or WebP")
        record = json.dumps(record_of(sample), ensure_ascii=False, separators=(",", ":"))
        if self._tar is None:
            self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)
        self._members[sample.key] = {
            extension: _add(self._tar, f"{sample.key}.{extension}", sample.image),
            "json": _add(self._tar, f"{sample.key}.json", record.encode()),
        }
        self._keys.add(sample.key)
        self._totals.add(sample)
        if len(self._members) == self.shard_size:
            self._finish_shard()

    def _discard(self) -> None:
        """Takes away whatever this writer has written."""
        if self._tar is not None:
            self._tar.close()
        for path in (self._partial, *(self.split_dir / s["path"] for s in self._shards)):
            path.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.split_dir / f".{_SHARD_NAME.format(len(self._shards))}.partial"

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        name = _SHARD_NAME.format(len(self._shards))
        entry = _shard_entry(name, self._partial, self._members)
        os.replace(self._partial, self.split_dir / name)
        self._shards.append(entry)
        self._members = {}


class ShardedDataset:
    """One split, read by offset. Cheap to pickle to a worker; opens files when it first reads.

    `keys` are in the order of the shards. `checksum` is the sha256 over the sha256 of every shard
    and the keys that are used of it (an index may leave out some), `totals` the counts of the
    index. Raises UserError as the module says.
    """

    def __init__(self, split_dir: str | Path) -> None:
        self.split_dir = Path(split_dir)
        index = read_index(self.split_dir)
        self.totals: dict[str, int] = dict(index["totals"])
        self.keys: list[str] = []
        self._paths: list[Path] = []
        shard_of: list[int] = []
        spans: list[tuple[int, ...]] = []
        digest = hashlib.sha256()
        for shard in index["shards"]:
            path = self.split_dir / shard["path"]
            _check_size(path, shard["bytes"], self.split_dir)
            digest.update(shard["sha256"].encode())
            for key, members in shard["members"].items():
                digest.update(b"\0" + key.encode())
                self.keys.append(key)
                shard_of.append(len(self._paths))
                spans.append(_spans(members))
            self._paths.append(path)
        self.checksum = digest.hexdigest()
        # Arrays, not lists: forked workers then share their pages.
        self._shard_of = np.asarray(shard_of, dtype=np.int32)
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 3, 2)
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def has_captions(self) -> bool:
        return self.totals["captions"] > 0

    @property
    def has_regions(self) -> bool:
        return self.totals["regions"] > 0

    def sample(self, index: int) -> Sample:
        """Sample `index`, validated, its picture not decoded. Raises SampleError, IndexError."""
        image = self._read(index, 0)
        return parse_sample(self.keys[index], image, self._meta(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`, without reading its picture. Raises SampleError."""
        return parse_captions(self.keys[index], self._meta(index))

    def iter_texts(self) -> Iterator[str]:
        """Every caption and phrase of the split, in order, without reading a picture.

        A record whose text is broken gives nothing: it is counted where it is used as a sample.
        """
        for index, key in enumerate(self.keys):
            try:
                meta = self._meta(index)
                yield from parse_captions(key, meta)
            except SampleError:
                continue
            for region in meta.get("regions") or ():
                phrase = region.get("phrase") if isinstance(region, dict) else None
                if isinstance(phrase, str) and phrase.strip():
                    yield phrase.strip()

    def _meta(self, index: int) -> dict[str, Any]:
        """The record's JSON, with the text of KEY.txt as caption where it has none."""
        return _merge(self.keys[index], self._read(index, 1), self._read(index, 2))

    def _read(self, index: int, member: int) -> bytes:
        offset, size = (int(value) for value in self._spans[index, member])
        if offset < 0:
            return b""
        shard = int(self._shard_of[index])
        # pread keeps no position: a handle shared with a forked worker cannot be moved by it.
        data = os.pread(self._file(shard).fileno(), size, offset)
        if len(data) != size:
            raise SampleError(self.keys[index], "shard cut short", str(self._paths[shard]))
        return data

    def _file(self, shard: int) -> FileIO:
        file = self._files.pop(shard, None)
        if file is None:
            try:
                file = FileIO(self._paths[shard])
            except OSError as error:
                raise UserError(f"cannot open shard {self._paths[shard]}: {error}") from error
        self._files[shard] = file
        if len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)  # closed with its last reader
        return file


def write_index(
    split_dir: str | Path,
    tars: Iterable[str | Path],
    *,
    decode: bool = False,
    overwrite: bool = False,
    tally: Tally | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Indexes webdataset / img2dataset tars where they lie and returns the index.

    Samples without readable head of picture, without text or with a key seen before are left out
    of the index and counted in `tally`; `decode=True` decodes every picture to be sure. `on_shard`
    is told (samples read, samples kept) of each tar. Raises UserError for a tar that is missing,
    compressed or broken.
    """
    split_dir, tally = Path(split_dir), tally or Tally()
    paths = [Path(tar) for tar in tars]
    if not paths:
        raise UserError(f"no tars to index for {split_dir}: name at least one")
    index_path = split_dir / INDEX_NAME
    if index_path.exists() and not overwrite:
        raise UserError(f"{index_path} exists: choose another --out, or give --overwrite")
    shards: list[dict[str, Any]] = []
    totals, seen = _Totals(), set[str]()
    for path in paths:
        members, read = {}, 0
        for key, spans, sample in _scan(path, tally, seen, decode):
            read += 1
            if sample is not None:
                members[key] = spans
                totals.add(sample)
        shards.append(_shard_entry(_stored_path(path, split_dir), path, members))
        if on_shard is not None:
            on_shard(read, len(members))
    split_dir.mkdir(parents=True, exist_ok=True)
    return _write_index_file(split_dir, shards, totals, tally)


def read_index(split_dir: Path) -> dict[str, Any]:
    """The checked index.json of a split. Raises UserError."""
    path = split_dir / INDEX_NAME
    if not split_dir.is_dir():
        if others := _splits_of(split_dir.parent):
            raise UserError(f"no split {split_dir.name} in {split_dir.parent}; it has {others}")
        raise UserError(f"no such folder: {split_dir}; make it with `mmgem data prepare`")
    if not path.is_file():
        raise UserError(_no_index(split_dir))
    try:
        index = json.loads(path.read_bytes())
        schema = index["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an index: {error}; prepare the split again") from error
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}; prepare again")
    if missing := [name for name in ("shards", "totals") if name not in index]:
        raise UserError(f"{path} lacks {' and '.join(missing)}; prepare the split again")
    return index


def check_split_dir(split_dir: Path, *, overwrite: bool) -> None:
    """Raises UserError unless a split can be written here: the folder is missing or empty, or
    `overwrite` is set."""
    if split_dir.exists() and not split_dir.is_dir():
        raise UserError(f"{split_dir} is a file, a folder is needed: choose another --out")
    if not overwrite and split_dir.is_dir() and next(split_dir.iterdir(), None) is not None:
        raise UserError(f"{split_dir} is not empty: choose another --out, or give --overwrite")


def image_extension(image: bytes) -> str | None:
    """jpg, png or webp by the first bytes; None for every other format."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


@dataclass
class _Totals:
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
    return [tar.offset - _padded(len(data)), len(data)]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _shard_entry(name: str, path: Path, members: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return {
        "path": name,
        "samples": len(members),
        "bytes": size,
        "sha256": sha256,
        "members": members,
    }


def _write_index_file(split_dir: Path, shards: list[dict[str, Any]], totals: _Totals, tally: Tally) -> dict[str, Any]:
    index = {
        "schema": SCHEMA,
        "shards": shards,
        "totals": dict(vars(totals)),
        "skipped": dict(tally.skipped),
        "dropped": dict(tally.dropped),
    }
    partial = split_dir / f".{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, split_dir / INDEX_NAME)
    return index


def _scan(
    path: Path, tally: Tally, seen: set[str], decode: bool
) -> Iterator[tuple[str, dict[str, list[int]], Sample | None]]:
    """The records of a tar: key, members, and the sample, or None where it was skipped."""
    grouped = _members_of(path)
    with path.open("rb") as file:
        for key, members in grouped.items():
            image, *texts = (
                os.pread(file.fileno(), size, offset) if offset >= 0 else b""
                for offset, size in np.reshape(_spans(members), (3, 2)).tolist()
            )
            sample = None
            try:
                if key in seen:
                    raise SampleError(key, DUPLICATE_KEY, str(path))
                seen.add(key)
                if not any(extension in members for extension in IMAGE_EXTENSIONS):
                    raise SampleError(key, NO_IMAGE, f"only {', '.join(members)}")
                image_size(key, image)
                sample = parse_sample(key, image, _merge(key, *texts), tally.dropped)
                if decode:
                    decode_image(sample)
            except SampleError as error:
                tally.skip(error)
                sample = None
            yield key, members, sample


def _members_of(path: Path) -> dict[str, dict[str, list[int]]]:
    """Key → extension → [offset, size] of a whole, uncompressed tar. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no such tar: {path}")
    size, end = path.stat().st_size, 0
    members: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = max(end, info.offset_data + _padded(info.size if info.isreg() else 0))
                match = _MEMBER.match(info.name.removeprefix("./"))
                if info.isreg() and match:
                    spans = members.setdefault(match[1], {})
                    spans.setdefault(match[2].lower(), [info.offset_data, info.size])
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"broken tar: {path}: {error}; fetch or write it again") from error
    # tarfile takes a damaged header for the end of the archive: look for the real end mark.
    with path.open("rb") as file:
        if end + _BLOCK > size or os.pread(file.fileno(), _BLOCK, end).strip(b"\0"):
            raise UserError(f"broken tar: {path}: it ends before its end; fetch or write it again")
    return members


def _spans(members: Mapping[str, list[int]]) -> tuple[int, ...]:
    """Offset and size of the picture, the JSON and the text; -1, 0 for what is not there."""
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), (-1, 0))
    return (*image, *members.get("json", (-1, 0)), *members.get("txt", (-1, 0)))


def _merge(key: str, record: bytes, text: bytes) -> dict[str, Any]:
    """The fields of KEY.json; where it has no caption, KEY.txt is the caption."""
    try:
        meta = json.loads(record) if record else {}
        caption = text.decode("utf-8")
    except ValueError as error:
        raise SampleError(key, BROKEN_META, str(error)) from error
    if not isinstance(meta, dict):
        raise SampleError(key, BROKEN_META, f"an object is expected, not {type(meta).__name__}")
    if text and meta.get("captions") is None and meta.get("caption") is None:
        meta = {k: v for k, v in meta.items() if k != "captions"} | {"caption": caption}
    return meta


def _stored_path(path: Path, split_dir: Path) -> str:
    """Relative where the tar lies in the data set of the split, so that both can move."""
    path, dataset = path.resolve(), split_dir.resolve().parent
    if path.is_relative_to(dataset):
        return os.path.relpath(path, split_dir.resolve())
    return str(path)


def _check_size(path: Path, size: int, split_dir: Path) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"shard {path} is missing, {split_dir / INDEX_NAME} names it") from error
    if found != size:
        what = "truncated" if found < size else "changed"
        raise UserError(f"shard {path} is {what}: {found} bytes, its index says {size}; prepare or copy again")


def _no_index(split_dir: Path) -> str:
    if splits := _splits_of(split_dir):
        return f"{split_dir} holds the splits {splits}: name one of them"
    if next(split_dir.glob("*.tar"), None) is not None:
        return (
            f"no {INDEX_NAME} in {split_dir}: write one with "
            f"`mmgem data prepare img2dataset {split_dir} --out DIR --split NAME`"
        )
    return f"no {INDEX_NAME} in {split_dir}, no finished split: make one with `mmgem data prepare`"


def _splits_of(dataset: Path) -> str:
    return ", ".join(sorted(path.parent.name for path in dataset.glob(f"*/{INDEX_NAME}")))
