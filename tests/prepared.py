"""What a prepared dataset consists of."""

from __future__ import annotations

from pathlib import Path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_whole(out: Path, unbroken: Path) -> None:
    assert files_of(out) == files_of(unbroken)
    for split in out.iterdir():
        kinds = {path.name for path in split.iterdir() if not path.name.startswith("shard-")}
        assert kinds <= {"index.json", "members", "broken.jsonl"}


def accounts(out: Path) -> list[Path]:
    return sorted(out.glob("*/unfinished/0*.json"))
