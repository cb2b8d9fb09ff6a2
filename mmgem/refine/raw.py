"""Raw samples: tars or a folder in which a text may be wrong, a picture may have no text, or a text no picture.

    DIR/*.tar            KEY.jpg (png, webp) and KEY.txt or KEY.json beside each other, as webdataset and img2dataset
                         have them; either may be missing
    DIR/**/KEY.jpg …     the same as files

Receives such a folder, or a split of `mmgem data prepare`. Gives `Unit`s, which are read one at a time, in an order
that does not change. Refuses, with a UserError, a folder with neither, and a tar that is damaged; a sample with neither
picture nor text is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmgem.data.tar_members import read_tar_members
from mmgem.errors import UserError

ENDINGS = ("jpg", "jpeg", "png", "webp")
FILES_A_UNIT = 1000


@dataclass(slots=True)
class Raw:
    """A sample as it was found. texts: those that are not blank."""

    key: str
    image: bytes | None
    texts: list[str]
    meta: dict[str, Any] = field(default_factory=dict)
    """What else its record says."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A tar, or some files of a folder. name: a file's name, unlike the others'."""

    name: str
    path: Path
    files: tuple[tuple[str, dict[str, Path]], ...] = ()
    """Of a folder: key → ending → file."""

    def read(self) -> Iterator[Raw]:
        """Raises UserError."""
        yield from _of_files(self.files) if self.files else _of_tar(self.path)


def units(source: Path) -> list[Unit]:
    """In the order of their names. Raises UserError."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; it should have tars, or pictures and texts")
    tars = sorted(source.glob("*.tar"))
    if tars:
        return [Unit(tar.stem, tar) for tar in tars]
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
        ending = file.suffix[1:].lower()
        if ending in (*ENDINGS, "txt", "json"):
            found.setdefault(str(file.relative_to(source).with_suffix("")), {})[ending] = file
    if not found:
        raise UserError(f"{source}: neither tars nor pictures ({', '.join(ENDINGS)}) nor texts (txt, json) in it")
    samples = list(found.items())
    parts = [samples[n : n + FILES_A_UNIT] for n in range(0, len(samples), FILES_A_UNIT)]
    return [Unit(f"files-{n:06d}", source, tuple(part)) for n, part in enumerate(parts)]


def _of_files(files: tuple[tuple[str, dict[str, Path]], ...]) -> Iterator[Raw]:
    for key, by_ending in files:
        image = next((path.read_bytes() for ending, path in by_ending.items() if ending in ENDINGS), None)
        record = by_ending["json"].read_bytes() if "json" in by_ending else None
        text = by_ending["txt"].read_bytes() if "txt" in by_ending else None
        if (raw := _raw(key, image, record, text)) is not None:
            yield raw


def _of_tar(path: Path) -> Iterator[Raw]:
    handle = os.open(path, os.O_RDONLY)
    try:
        members = read_tar_members(handle)
        if members.fault is not None:
            raise UserError(f"{path}: {': '.join(members.fault)}; fetch it again, or take it away")
        for key, files in members.files.items():
            parts = {ending: os.pread(handle, size, offset) for ending, (offset, size) in files.items()}
            image = next((content for ending, content in parts.items() if ending in ENDINGS), None)
            if (raw := _raw(key, image, parts.get("json"), parts.get("txt"))) is not None:
                yield raw
    finally:
        os.close(handle)


def _raw(key: str, image: bytes | None, record: bytes | None, text: bytes | None) -> Raw | None:
    """A record that is no JSON object counts as none: its picture may still be had."""
    meta: dict[str, Any] = {}
    try:
        content = json.loads(record) if record else {}
        meta = content if isinstance(content, dict) else {}
    except (ValueError, RecursionError):
        pass
    stored = meta.pop("captions", None)
    texts = [t for t in stored if isinstance(t, str)] if isinstance(stored, list) else []
    single = meta.pop("caption", None)
    texts += [single] if isinstance(single, str) and not texts else []
    texts += [text.decode("utf-8", "replace")] if text is not None and not texts else []
    texts = [" ".join(t.split()) for t in texts if t.strip()]
    return Raw(key, image or None, texts, meta) if image or texts else None
