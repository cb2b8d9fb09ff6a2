"""A prepared split as other harnesses read data: pictures and their captions, without this package's reader.

Receives a data folder and the name of a split, as `mmgem eval` does. Gives its samples, and each picture as a file that
any reader decodes to the pixels that this package sees. Refuses, with a UserError, a missing split and more broken
samples than `mmgem eval` lets pass; and a sample without captions, which counts in our retrieval, as a picture that may
be found, but has no place in that of others.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmgem.data.samples import Sample, SampleError, decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.inference.encode import refuse_if_broken

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""The endings of the pictures that all harnesses read."""


def open_split(data: str | Path, split: str) -> ShardedDataset:
    """Raises UserError where there is no such split, or one without captions."""
    folder = Path(data) / split
    if Path(data).is_dir() and not folder.is_dir():
        there = sorted(path.parent.name for path in Path(data).glob("*/index.json"))
        has = f"it has {', '.join(there)}" if there else "make some with `mmgem data prepare`"
        raise UserError(f"{data}: no split {split!r}; {has}")
    dataset = ShardedDataset(folder)
    if not dataset.totals.get("captions"):
        raise UserError(f"{data}: split {split} has no captions; retrieval needs them, choose other data")
    return dataset


def readable(dataset: ShardedDataset) -> Iterator[tuple[Sample, Image.Image]]:
    """Each sample and its picture, in order; broken ones are left out as `mmgem eval` leaves them out."""
    skipped: list[str] = []
    for number in range(len(dataset)):
        try:
            sample = dataset.sample(number)
            image = decode_image(sample)
        except SampleError as error:
            skipped.append(str(error))
            refuse_if_broken(skipped, len(dataset))
            continue
        refuse_without_captions(sample)
        yield sample, image


def refuse_without_captions(sample: Sample) -> None:
    if not sample.captions:
        raise UserError(
            f"sample {sample.key} has no caption; other harnesses cannot rank pictures without one, "
            "give a split in which all have captions"
        )


def picture_file(sample: Sample, image: Image.Image) -> tuple[str, bytes]:
    """The ending and the bytes of a file that decodes to `image` anywhere.

    The sample's own bytes where Pillow reads the same pixels from them. Else, e.g. for a photo that is turned by EXIF
    or grey of 16 bits, a PNG.
    """
    plain = Image.open(io.BytesIO(sample.image))
    if plain.format in FORMATS:
        ending = FORMATS[plain.format]
        rgb = plain.convert("RGB")
        if rgb.size == image.size and rgb.tobytes() == image.tobytes():
            return ending, sample.image
    file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()
