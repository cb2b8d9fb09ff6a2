"""One shard, read whole and compared with what its index says.

Receives a split's store and an entry of its index. Gives what was found in it, counts, lengths and sizes of what it
holds, and of every sample the digests of its key and picture. Refuses nothing: a shard that cannot be read, and every
sample that is broken, is a finding.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import FileIO
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgem.data.audit.findings import (
    BOX_OVER_BORDER,
    BROKEN_TAR,
    OFF_MEMBER,
    OTHER_COUNT,
    OTHER_SIZE,
    UNREADABLE,
    Findings,
)
from mmgem.data.audit.hashes import SIDE, hashes, thumbnail
from mmgem.data.index import ShardEntry, ShardMembers, read_members
from mmgem.data.samples import (
    EMPTY_CAPTION,
    EMPTY_PHRASE,
    IMAGE_TOO_LARGE,
    MOST_IMAGE,
    NO_IMAGE,
    SIZE_MISMATCH,
    Sample,
    SampleError,
    clip_box,
    decode_image,
    image_size,
    merge_texts,
    parse_sample,
)
from mmgem.data.store import Store, check_sha256
from mmgem.data.tar_members import TarFault, tar_files
from mmgem.errors import UserError

T = TypeVar("T")
Span = tuple[int, int]

MEASURES = {
    "caption_words": "Words a caption",
    "caption_characters": "Characters a caption",
    "captions": "Captions a picture",
    "regions": "Regions a picture",
    "phrase_words": "Words a phrase",
    "width": "Width of the picture, pixels",
    "height": "Height of the picture, pixels",
    "aspect": "Aspect of the picture, width / height",
    "box_area": "Area of the box, share of the picture",
}


@dataclass
class ShardScan:
    """N: samples of the shard's members file, 0 where that cannot be read."""

    findings: Findings = field(default_factory=Findings)
    totals: Counter[str] = field(default_factory=Counter)
    """samples, captions, regions, images_without_captions: of what is whole; unread: samples of which nothing is
    known; broken: samples of which something is."""
    values: dict[str, Counter[float]] = field(default_factory=lambda: {name: Counter() for name in MEASURES})
    keys_N: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    digests_N: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Of the encoded picture; 0 for a broken sample."""
    hashes_N2: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.uint64))
    """0 for a plain picture, a broken sample, and where nothing is decoded."""
    thumbs_NC: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, SIDE * SIDE), dtype=np.uint8))


def scan_shard(store: Store, entry: ShardEntry, decode: bool = True) -> ShardScan:
    """decode: decode every picture; without, only its head is read, and there are no hashes."""
    scan, name = ShardScan(), entry.path
    members = _unless_bad(scan.findings, name, lambda: read_members(store, entry))
    file = _unless_bad(scan.findings, name, lambda: store.open(entry))
    if members is not None:
        scan.keys_N = np.array([digest(key.encode("utf-8", "surrogatepass")) for key in members.keys], dtype=np.uint64)
        scan.digests_N = np.zeros(len(members.keys), dtype=np.uint64)
        scan.thumbs_NC = np.zeros((len(members.keys), SIDE * SIDE), dtype=np.uint8)
        scan.hashes_N2 = hashes(scan.thumbs_NC)
        if len(members.keys) != entry.samples:
            detail = f"{len(members.keys)} in {entry.members}, {entry.samples} in the index"
            scan.findings.add(OTHER_COUNT, name, detail)
    if file is None or members is None:
        scan.totals["unread"] += entry.samples
    if file is not None:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd EXIF and the like
            _unless_bad(scan.findings, name, lambda: check_sha256(file, entry, store.name(name)))
            if members is not None:
                _scan_samples(scan, file, name, members, decode)
    return scan


def read_sample(store: Store, entry: ShardEntry, row: int) -> Sample:
    """Sample `row` of a shard. Raises SampleError, UserError."""
    members = read_members(store, entry)
    with store.open(entry) as file:
        parts = [os.pread(file.fileno(), size, offset) if offset >= 0 else b"" for offset, size in _spans(members, row)]
    return parse_sample(members.keys[row], parts[0], merge_texts(members.keys[row], *parts[1:]))


def digest(data: bytes) -> int:
    """64 bits of BLAKE2b, never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1


def _unless_bad(findings: Findings, name: str, read: Callable[[], T]) -> T | None:
    """What `read` gives, or None where the shard `name` is then a finding."""
    try:
        return read()
    except SampleError as fault:
        findings.add(fault.reason, name, fault.detail)
    except UserError as error:
        findings.add(UNREADABLE, name, str(error))
    return None


def _scan_samples(scan: ShardScan, file: FileIO, name: str, members: ShardMembers, decode: bool) -> None:
    tar = _Tar(file)
    if tar.fault:
        scan.findings.add(BROKEN_TAR, name, tar.fault)
    lists: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for row, key in enumerate(members.keys):
        try:
            parts = [tar.read(key, *span) if span[0] >= 0 else b"" for span in _spans(members, row)]
            if members.spans_N32[row, 0, 0] < 0:
                raise SampleError(key, NO_IMAGE)
            meta = merge_texts(key, *parts[1:])
            dropped: Counter[str] = Counter()
            sample = parse_sample(key, parts[0], meta, dropped)
            size, image = _picture(sample, decode)
        except SampleError as fault:
            scan.findings.add(fault.reason, key, fault.detail)
            scan.totals["broken"] += 1
            continue
        if size != (sample.width, sample.height):
            detail = f"record {sample.width}x{sample.height}, picture {size[0]}x{size[1]}"
            scan.findings.add(OTHER_SIZE, key, detail)
        _note_dropped(scan.findings, key, dropped, meta, size)
        _measure(lists, sample, size)
        scan.totals.update(
            samples=1,
            captions=len(sample.captions),
            regions=len(sample.regions),
            images_without_captions=int(not sample.captions),
        )
        scan.digests_N[row] = digest(sample.image)
        if image is not None:
            scan.thumbs_NC[row] = thumbnail(image)
    scan.hashes_N2 = hashes(scan.thumbs_NC)
    scan.values = {measure: Counter(listed) for measure, listed in lists.items()}


def _spans(members: ShardMembers, row: int) -> list[Span]:
    """(offset, size) of the picture, the JSON and the text; offset -1 for what is not there."""
    return [(offset, size) for offset, size in members.spans_N32[row].tolist()]


def _picture(sample: Sample, decode: bool) -> tuple[tuple[int, int], Image.Image | None]:
    """Its size, and itself where it is to be decoded. Raises SampleError, also without `decode` where the record has
    boxes and another size."""
    if decode:
        image = decode_image(sample)
        return image.size, image
    size = image_size(sample.key, sample.image)
    if sample.regions and size != (sample.width, sample.height):
        detail = f"record {sample.width}x{sample.height}, picture {size[0]}x{size[1]}"
        raise SampleError(sample.key, SIZE_MISMATCH, detail)
    return size, None


def _note_dropped(
    findings: Findings, key: str, dropped: Counter[str], meta: dict[str, Any], size: tuple[int, int]
) -> None:
    """What the parser left out or cut of a sample; boxes with their numbers."""
    for reason in (EMPTY_CAPTION, EMPTY_PHRASE):
        if dropped[reason]:
            findings.add(reason, key, count=dropped[reason])
    for region in meta.get("regions") or ():
        if not (region.get("phrase") or "").strip():
            continue  # counted as such
        box = clip_box(region.get("box"), *size)
        if isinstance(box, str):
            findings.add(box, key, str(region.get("box"))[:100])
        elif max(abs(float(told) - kept) for told, kept in zip(region["box"], box, strict=True)) > 1:
            findings.add(BOX_OVER_BORDER, key, f"{region['box']} in {size[0]}x{size[1]}")


def _measure(lists: dict[str, list[float]], sample: Sample, size: tuple[int, int]) -> None:
    width, height = size
    found: dict[str, Iterable[float]] = {
        "caption_words": (len(caption.split()) for caption in sample.captions),
        "caption_characters": map(len, sample.captions),
        "captions": [len(sample.captions)],
        "regions": [len(sample.regions)],
        "phrase_words": (len(region.phrase.split()) for region in sample.regions),
        "width": [width],
        "height": [height],
        "aspect": [_three_digits(width / height)],
        "box_area": (
            _three_digits((x2 - x1) * (y2 - y1) / (width * height))
            for x1, y1, x2, y2 in (r.box for r in sample.regions)
        ),
    }
    for measure, values in found.items():
        lists[measure].extend(values)


def _three_digits(value: float) -> float:
    """So that a million different values are some thousands to count."""
    return float(f"{value:.3g}")


class _Tar:
    """The files of a tar by where their data begin. `fault` says where it stops being a tar, "" if it never does."""

    def __init__(self, file: FileIO) -> None:
        self._descriptor = file.fileno()
        self._size = os.fstat(self._descriptor).st_size
        self._files: dict[int, tuple[int, str]] = {}
        self._end, self.fault = self._size, ""
        try:
            for path, offset, size in tar_files(self._descriptor):
                self._files[offset] = (size, path)
        except TarFault as fault:
            self._end, self.fault = fault.at, f"{fault.reason}: {fault.detail}"

    def read(self, key: str, offset: int, size: int) -> bytes:
        """The data of a file of sample `key`. Raises SampleError unless they lie there, as far as the tar is one."""
        found = self._files.get(offset)
        inside = size >= 0 and offset + size <= self._size
        known = found is not None and found[0] == size and found[1].startswith(f"{key}.")
        if not inside or (not known and offset < self._end):
            told = f"{size} bytes at {offset}"
            there = (
                f"of a tar of {self._size}" if not inside else f"there is {found[1]}, {found[0]} bytes" if found else ""
            )
            raise SampleError(key, OFF_MEMBER, ", ".join(filter(None, (told, there))))
        if size > MOST_IMAGE:
            raise SampleError(key, IMAGE_TOO_LARGE, f"{size} bytes")
        return os.pread(self._descriptor, size, offset)
