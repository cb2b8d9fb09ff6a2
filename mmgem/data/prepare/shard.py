"""One shard of a dataset: from its records to its tar, in whatever process.

Receives a `Task`: the records of a shard. Gives its `ShardAccount`, when the tar, its members file and, last, the
account itself are on the disk; a shard that is there, made from the same records, is left as it is. A broken sample is
left out and named in the account. Refuses, with an OSError that names the tar, to go on when it cannot be written.

A shard depends on its own records only, so the same records give the same bytes, in any process and in any order.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmgem.data.index import ShardEntry, write_whole
from mmgem.data.prepare.reading import Load, Record, read_file
from mmgem.data.processes import stop_if_asked
from mmgem.data.samples import (
    BROKEN_META,
    DUPLICATE_KEY,
    MOST_IMAGE,
    Region,
    Sample,
    SampleError,
    decode_image,
    parse_sample,
)
from mmgem.data.writer import UNFINISHED, ShardFile, image_extension, shard_path

NO_FILE = "image file missing"
JPEG_QUALITY = 92
"""Of pictures that are made smaller; Pillow's other defaults (chroma at half size)."""


class Job(NamedTuple):
    """What is the same for all shards. `resize`: the most pixels of a picture's shorter side."""

    out: Path
    load: Load | None
    resize: int | None


class Task(NamedTuple):
    """The records of a shard; `repeated` are the numbers of those whose key came before."""

    split: str
    number: int
    records: list[Record]
    repeated: list[int]


@dataclass(frozen=True)
class ShardAccount:
    """What became of a shard's records. `entry` is that of the index; without a sample there is no tar.

    `left_out`: key, reason and detail of each sample that is not in the shard.
    """

    split: str
    read: int
    entry: ShardEntry | None
    totals: dict[str, int]
    dropped: dict[str, int]
    left_out: list[tuple[str, str, str]]
    kept: bool = False


def account_path(split_dir: Path, number: int) -> Path:
    return split_dir / UNFINISHED / f"{number:06d}.json"


def make_shard(job: Job, task: Task) -> ShardAccount:
    """Makes the shard, or finds it made. Raises OSError, Stopped."""
    split_dir = job.out / task.split
    tar, place = shard_path(split_dir, task.number), account_path(split_dir, task.number)
    made_of = _fingerprint(task)
    if (account := _finished(split_dir, place, made_of)) is not None:
        return account
    try:
        place.unlink(missing_ok=True)  # first: a tar without its account counts for nothing
        tar.unlink(missing_ok=True)
        account = _write(job, task, split_dir)
        write_whole(place, json.dumps({"made_of": made_of, **asdict(account)}).encode())
    except OSError as error:  # tarfile's do not say which file
        raise OSError(error.errno, error.strerror, str(tar)) from error
    return account


def read_account(place: Path) -> tuple[str, ShardAccount]:
    """What the shard was made of, and its account. Raises OSError, ValueError, KeyError, TypeError."""
    tree = json.loads(place.read_bytes())
    made_of, entry = tree.pop("made_of"), tree.pop("entry")
    left_out = [(key, reason, detail) for key, reason, detail in tree.pop("left_out")]
    return made_of, ShardAccount(**tree, entry=entry and ShardEntry(**entry), left_out=left_out)


def _finished(split_dir: Path, place: Path, made_of: str) -> ShardAccount | None:
    """The account of a shard that is there, whole and made of these very records."""
    try:
        found, account = read_account(place)
        entry = account.entry
        whole = entry is None or (
            (split_dir / entry.path).stat().st_size == entry.bytes and (split_dir / entry.members).exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(account, kept=True) if whole and found == made_of else None


def _fingerprint(task: Task) -> str:
    """sha256 over all that the shard is made of; of files their path, size and time of change."""
    digest = hashlib.sha256(json.dumps(task.repeated).encode())
    for key, _, image, meta, files, dropped in task.records:
        picture = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else _mark(image)
        line = [key, picture, meta, [_mark(file) for file in files], dropped]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _mark(file: Path) -> list[Any]:
    try:
        found = file.stat()
    except (OSError, ValueError):
        return [str(file)]
    return [str(file), found.st_size, found.st_mtime_ns]


def _write(job: Job, task: Task, split_dir: Path) -> ShardAccount:
    dropped: Counter[str] = Counter()
    left_out: list[tuple[str, str, str]] = []
    repeated = set(task.repeated)
    shard = ShardFile(split_dir, task.number)
    try:
        for number, record in enumerate(task.records):
            stop_if_asked()
            try:
                if number in repeated:
                    raise SampleError(record.key, DUPLICATE_KEY)
                shard.add(_sample(record, job, dropped))
            except SampleError as error:
                left_out.append((error.key, error.reason, error.detail))
            except UnicodeEncodeError as error:
                left_out.append((record.key, BROKEN_META, f"text that is no Unicode: {error.reason}"))
        entry = shard.finish() if len(shard) else None
    finally:
        shard.discard()
    return ShardAccount(task.split, len(task.records), entry, dict(vars(shard.totals)), dict(dropped), left_out)


def _sample(record: Record, job: Job, dropped: Counter[str]) -> Sample:
    """The sample as it is written: size true, picture whole, small enough and in a format of the shards."""
    if job.load is not None:
        record = job.load(record)
    dropped.update(record.dropped)
    try:
        data = record.image if isinstance(record.image, bytes) else read_file(record.image, MOST_IMAGE)
    except OSError as error:
        raise SampleError(record.key, NO_FILE, f"{error.filename}: {error.strerror}") from error
    sample = parse_sample(record.key, data, record.meta, dropped)
    image = decode_image(sample)
    sample = replace(sample, width=image.width, height=image.height)  # equal, where there are boxes
    if job.resize is not None and min(image.size) > job.resize:
        return smaller(sample, image, job.resize)
    if image_extension(data) is None:
        sample = replace(sample, image=_encoded(image, "PNG"))
    return sample


def smaller(sample: Sample, image: Image.Image, side: int) -> Sample:
    """The sample with its picture made so small that the shorter side has `side` pixels, the boxes with it."""
    width, height = image.size
    scale = side / min(image.size)
    to_width, to_height = (side if length == min(image.size) else round(length * scale) for length in image.size)
    small = image.resize((to_width, to_height), Image.Resampling.LANCZOS)
    regions = []
    for region in sample.regions:
        x1, y1, x2, y2 = region.box
        box = (x1 * to_width / width, y1 * to_height / height, x2 * to_width / width, y2 * to_height / height)
        regions.append(Region(box, region.phrase, region.entity))
    small.info = {}  # what the picture's file said of itself is no longer true
    encoded = _encoded(small, "JPEG", quality=JPEG_QUALITY)
    return replace(sample, image=encoded, width=to_width, height=to_height, regions=tuple(regions))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
