"""Indexes webdataset / img2dataset tars where they lie; no tar is written, moved or changed.

Receives tars. Gives the index of a split that names them. Refuses a tar that is missing, compressed or broken.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from mmgem.data.index import IMAGE_EXTENSIONS, INDEX_NAME, Index, ShardEntry, spans, write_index
from mmgem.data.samples import (
    DUPLICATE_KEY,
    NO_IMAGE,
    Sample,
    SampleError,
    Tally,
    decode_image,
    image_size,
    merge_texts,
    parse_sample,
)
from mmgem.data.writer import BLOCK, MEMBER, Totals, padded, shard_entry
from mmgem.errors import UserError


def index_tars(
    split_dir: str | Path,
    tars: Iterable[str | Path],
    *,
    decode: bool = False,
    overwrite: bool = False,
    tally: Tally | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> Index:
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
    split_dir.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    totals, seen = Totals(), set[str]()
    for path in paths:
        members, read = {}, 0
        for key, files, sample in _scan(path, tally, seen, decode):
            read += 1
            if sample is not None:
                members[key] = files
                totals.add(sample)
        shards.append(shard_entry(split_dir, len(shards), _stored_path(path, split_dir), path, members))
        if on_shard is not None:
            on_shard(read, len(members))
    index = Index(shards, dict(vars(totals)), dict(tally.skipped), dict(tally.dropped))
    write_index(split_dir, index)
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
                for offset, size in np.reshape(spans(members), (3, 2)).tolist()
            )
            sample = None
            try:
                if key in seen:
                    raise SampleError(key, DUPLICATE_KEY, str(path))
                seen.add(key)
                if not any(extension in members for extension in IMAGE_EXTENSIONS):
                    raise SampleError(key, NO_IMAGE, f"only {', '.join(members)}")
                image_size(key, image)
                sample = parse_sample(key, image, merge_texts(key, *texts), tally.dropped)
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
                end = max(end, info.offset_data + padded(info.size if info.isreg() else 0))
                match = MEMBER.match(info.name.removeprefix("./"))
                if info.isreg() and match:
                    files = members.setdefault(match[1], {})
                    files.setdefault(match[2].lower(), [info.offset_data, info.size])
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"broken tar: {path}: {error}; fetch or write it again") from error
    # tarfile takes a damaged header for the end of the archive: look for the real end mark.
    with path.open("rb") as file:
        if end + BLOCK > size or os.pread(file.fileno(), BLOCK, end).strip(b"\0"):
            raise UserError(f"broken tar: {path}: it ends before its end; fetch or write it again")
    return members


def _stored_path(path: Path, split_dir: Path) -> str:
    """Relative where the tar lies in the data set of the split, so that both can move."""
    path, dataset = path.resolve(), split_dir.resolve().parent
    if path.is_relative_to(dataset):
        return os.path.relpath(path, split_dir.resolve())
    return str(path)
