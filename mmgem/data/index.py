"""The index of a split: which shards it has, and where in each tar the members of a sample lie.

Receives a split's folder or URL. Gives its `Index`, and the members of one shard. Refuses, with a UserError that names
the file: a folder without index, and an index that is broken or of another schema.

index.json, schema 2, stays small however many samples there are; what grows with them lies in one members file a shard,
which is read when its shard is:
    {"schema": 2,
     "shards": [{"path": relative to this folder, absolute, or a URL, "samples": n, "bytes": size of the tar,
                 "sha256": of the tar, "members": file beside the index, "members_sha256": of that file}],
     "totals": {"samples", "captions", "regions", "images_without_captions"},
     "skipped": {reason: samples left out},  "dropped": {reason: captions, phrases, boxes left out}}
members/000000.json …: {KEY: {ext: [offset, size]}}, in the order of the samples.
broken.jsonl beside them names each sample that was left out: {"key", "shard", "reason", "detail"}; `shard` is a path as
in the index. A line without key is of a whole tar.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from mmgem.data.samples import SampleError
from mmgem.data.store import Store
from mmgem.errors import UserError, one_line

INDEX_NAME = "index.json"
MEMBERS_FOLDER = "members"
BROKEN_NAME = "broken.jsonl"
SCHEMA = 2
TOTALS = ("samples", "captions", "regions", "images_without_captions")
# Reasons in broken.jsonl that are of a whole tar; those of samples stand in `samples`.
TAR_CUT = "tar cut short"
TAR_DAMAGED = "damaged tar"
# Of a shard that is not what its index says.
OTHER_COUNT = "shard has another number of samples"
OFF_MEMBER = "file is not where the index says"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_LONGEST = 4096  # of a path, in characters
_SHA256 = re.compile("[0-9a-f]{64}")  # files of a cache are named by it

Members = Mapping[str, Mapping[str, Sequence[int]]]
"""KEY -> extension -> (offset, size) in the tar."""


@dataclass(slots=True)  # not frozen: a split may have 100,000, and that takes three times as long
class ShardEntry:
    path: str
    samples: int
    bytes: int
    sha256: str
    members: str
    members_sha256: str


@dataclass(frozen=True)
class Index:
    shards: list[ShardEntry]
    totals: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """sha256 over the sha256 of every shard and of its members file, in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.members_sha256}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ShardMembers:
    """The samples of one shard: their keys, and of each the offset and size of the picture, the JSON and the text."""

    keys: list[str]
    spans_N32: np.ndarray
    """N x 3 x 2; (-1, 0) for what is not there."""


@contextmanager
def _without_collection() -> Iterator[None]:
    """A large index is a million objects and no cycle: the collector would look through them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def parse_index(content: bytes, name: str) -> Index:
    """`name` is the file's, for errors. Raises UserError."""
    try:
        tree = json.loads(content)
        if (schema := tree["schema"]) != SCHEMA:
            raise UserError(f"{name} has schema {ascii(schema)[:20]}, this version reads {SCHEMA}; prepare again")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name} is not an index: {one_line(error)[:200]}; prepare the split again") from error
    try:
        shards = [ShardEntry(**shard) for shard in tree["shards"]]
        totals = {name: tree["totals"][name] for name in TOTALS}
        index = Index(shards, totals, tree.get("skipped", {}), tree.get("dropped", {}))
        counts = [*(s.samples for s in shards), *(s.bytes for s in shards)]
        counts += [*totals.values(), *index.skipped.values(), *index.dropped.values()]
        hashes = [*(s.sha256 for s in shards), *(s.members_sha256 for s in shards)]
        texts = [*(s.path for s in shards), *(s.members for s in shards), *hashes, *index.skipped, *index.dropped]
        good = set(map(type, counts)) <= {int} and set(map(type, texts)) <= {str}
        good = good and min(counts) >= 0 and max(counts) < 1 << 62
        good = good and totals["samples"] == sum(s.samples for s in shards)
        good = good and all(map(_SHA256.fullmatch, hashes))
        good = good and b"\0" not in "".join(texts).encode() and max(map(len, texts), default=0) <= _LONGEST
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"{name} is not an index: {one_line(repr(error))[:200]}; prepare the split again") from error
    if not good:
        raise UserError(f"{name} is not an index: its counts or paths are not what they should be; prepare again")
    return index


def read_index(split: Store) -> Index:
    """The checked index.json of a split. Raises UserError."""
    return parse_index(split.read(INDEX_NAME), split.name(INDEX_NAME))


def read_members(split: Store, shard: ShardEntry) -> ShardMembers:
    """The samples of a shard. Raises SampleError, for all of them, where the members file is damaged."""
    content = split.read(shard.members, shard.members_sha256)
    if hashlib.sha256(content).hexdigest() != shard.members_sha256:
        raise SampleError("", "shard's members file changed", split.name(shard.members), shard=split.name(shard.path))
    try:
        members: Members = json.loads(content)
        keys, numbers = list(members), array("q", chain.from_iterable(map(spans, members.values())))
        "".join(keys).encode()
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        detail = f"{split.name(shard.members)}: {error}"
        raise SampleError("", "shard's members file is broken", detail, shard=split.name(shard.path)) from error
    return ShardMembers(keys, np.array(numbers, dtype=np.int64).reshape(-1, 3, 2))


def read_left_out(split: Store) -> Iterator[dict[str, str]]:
    """What was left out of the index when it was made: {"key", "shard", "reason", "detail"}. Raises UserError."""
    if not split.exists(BROKEN_NAME):
        return
    for number, line in enumerate(split.read(BROKEN_NAME).splitlines(), start=1):
        try:
            item = json.loads(line)
            yield {name: str(item[name]) for name in ("key", "shard", "reason", "detail")}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            name = split.name(BROKEN_NAME)
            raise UserError(f"{name}, line {number} is broken ({error!r}): remove the file") from error


def spans(files: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Offset and size of the picture, the JSON and the text; -1, 0 for what is not there."""
    (image, image_size) = next((files[e] for e in IMAGE_EXTENSIONS if e in files), (-1, 0))
    (record, record_size), (text, text_size) = files.get("json", (-1, 0)), files.get("txt", (-1, 0))
    return image, image_size, record, record_size, text, text_size


def write_members(split_dir: Path, number: int, members: Members) -> tuple[str, str]:
    """Writes the members file of shard `number`. Gives its path in the split, and its sha256."""
    content = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()
    place = f"{MEMBERS_FOLDER}/{number:06d}.json"
    write_whole(split_dir / place, content)
    return place, hashlib.sha256(content).hexdigest()


def write_index(split_dir: Path, index: Index) -> None:
    tree = {
        "schema": SCHEMA,
        "shards": [asdict(shard) for shard in index.shards],
        "totals": index.totals,
        "skipped": index.skipped,
        "dropped": index.dropped,
    }
    write_whole(split_dir / INDEX_NAME, json.dumps(tree, ensure_ascii=False, indent=1).encode())


def broken_line(key: str, shard: str, reason: str, detail: str) -> bytes:
    """A line of broken.jsonl."""
    line = {"key": key, "shard": shard, "reason": reason, "detail": detail}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def write_whole(path: Path, content: bytes) -> None:
    """The file exists whole or not at all, also after a kill or on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
