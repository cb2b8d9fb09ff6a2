"""Spoils a split that a writer has made: members of its tars overwritten, its index mended to match, or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def shards_of(split: Path) -> list[dict[str, Any]]:
    return json.loads((split / "index.json").read_text())["shards"]


def members_of(split: Path) -> list[tuple[str, str, dict[str, list[int]]]]:
    """Of each sample, in order: its tar, its key, and {extension: [offset, size]}."""
    return [
        (shard["path"], key, files)
        for shard in shards_of(split)
        for key, files in json.loads((split / shard["members"]).read_text()).items()
    ]


def overwrite(split: Path, key: str, extension: str, content: bytes = b"") -> None:
    """Writes `content`, then zeros, over a member; its size stays."""
    ((tar, offset, size),) = [(tar, *files[extension]) for tar, k, files in members_of(split) if k == key]
    assert len(content) <= size
    with (split / tar).open("r+b") as file:
        file.seek(offset)
        file.write(content + b"\0" * (size - len(content)))


def mend_checksums(split: Path) -> None:
    """Makes the index say what the tars hold now."""
    index = json.loads((split / "index.json").read_text())
    for shard in index["shards"]:
        content = (split / shard["path"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (split / "index.json").write_text(json.dumps(index))


def break_pictures(split: Path, keys: Iterable[str]) -> None:
    """These pictures are no pictures any more; the index knows nothing of it."""
    extensions = {key: next(e for e in files if e not in ("json", "txt")) for _, key, files in members_of(split)}
    for key in keys:
        overwrite(split, key, extensions[key])
    mend_checksums(split)
