"""index.json and members files, also with checksums that are right for what they now say; every sample read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import reading
from hypothesis import strategies as st
from mutations import CHANGES, changed

from mmgem.data.samples import parse_sample
from mmgem.data.writer import ShardWriter
from mmgem.errors import UserError

GROWN = 1 << 34
"""Bytes of a tar that is longer than memory, though all of it is on the disk: a hole."""


def _split() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, 3) as writer:
            for n in range(5):
                record = {"captions": ["a", "b"], "regions": [{"box": [0, 1, 9, 9.5], "phrase": f"c{n}"}]}
                writer.write(parse_sample(f"key{n:03d}", reading.encoded(reading.picture(n)), record))
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")}


FILES = _split()
INDEX = json.loads(FILES["index.json"])
NAMES = ["members/000000.json", "members/000001.json"]
MEMBERS = [json.loads(FILES[name]) for name in NAMES]
TAR = len(FILES["shard-000000.tar"])
NUMBERS = [
    0,
    1,
    -1,
    -512,
    512,
    1024,
    TAR,
    TAR - 1,
    TAR + 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    -(1 << 63),
]
COUNTS = [0, 1, 2, 4, 5, 1000, 10**6, 10**15, 1 << 61, -1]


class Split(NamedTuple):
    content: bytes
    members: list[bytes]
    tar: str
    verify: bool


def with_spans(tree: dict[str, Any], spans: list[tuple[int, str, int, int]]) -> dict[str, Any]:
    tree, keys = json.loads(json.dumps(tree)), list(tree)
    for number, ending, offset, size in spans:
        tree[keys[number % len(keys)]][ending] = [offset, size]
    return tree


def split(
    what: str, n: int, spans: Any, changes: Any, of_index: Any, counts: list[int], right: bool, tar: str, verify: bool
) -> Split:
    tree, members = json.loads(FILES["index.json"]), [FILES[name] for name in NAMES]
    if what in ("members", "both"):
        members[n] = changed(with_spans(MEMBERS[n], spans), changes)
    if what == "counts":
        for shard, count in zip(tree["shards"], counts, strict=True):
            shard["samples"] = count
        tree["totals"]["samples"] = sum(counts)
    first = tree["shards"][0]
    if tar == "grown":
        first["bytes"] = GROWN
        files = {"jpg": [512, GROWN - 512], "json": [512, 1 << 33 if n else 1 << 20]}
        members[0] = json.dumps(MEMBERS[0] | {"key000": files}).encode()
    elif tar == "cut":
        first["bytes"] = TAR // (n + 2)
    if right:
        for shard, content in zip(tree["shards"], members, strict=True):
            shard["members_sha256"] = hashlib.sha256(content).hexdigest()
    index = changed(tree, of_index) if what in ("index", "both") else json.dumps(tree).encode()
    return Split(index, members, tar, verify)


_NUMBERS = st.sampled_from(NUMBERS) | st.integers(0, TAR)
_COUNTS = st.sampled_from(COUNTS)
INPUTS = st.builds(
    split,
    st.sampled_from(["index", "members", "members", "counts", "both"]),
    st.integers(0, 1),
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["jpg", "json", "txt", "png"]), _NUMBERS, _NUMBERS), max_size=2
    ),
    CHANGES,
    CHANGES,
    st.lists(_COUNTS, min_size=2, max_size=2),
    st.sampled_from([True] * 9 + [False]),
    st.sampled_from([*["as it was"] * 9, "grown", "cut", "other"]),
    st.booleans(),
)


def check(split: Split) -> str:
    with tempfile.TemporaryDirectory(dir=reading.memory()) as name:
        folder = Path(name)
        (folder / "members").mkdir()
        for path in ("shard-000000.tar", "shard-000001.tar"):
            (folder / path).write_bytes(FILES[path])
        for path, content in zip(NAMES, split.members, strict=True):
            (folder / path).write_bytes(content)
        (folder / "index.json").write_bytes(split.content)
        if split.tar == "grown":
            os.truncate(folder / "shard-000000.tar", GROWN)
        elif split.tar == "cut":
            os.truncate(folder / "shard-000000.tar", TAR // 2)
        elif split.tar == "other":
            (folder / "shard-000000.tar").write_bytes(bytes(TAR))
        try:
            grown = split.tar == "grown"  # its checksum takes long, as it may
            return reading.word(reading.read_split(folder, verify=split.verify and not grown, audit=not grown))
        except UserError as error:
            return reading.refused(error)


def warm_up() -> None:
    assert check(Split(FILES["index.json"], [FILES[n] for n in NAMES], "as it was", True)) == "whole"
