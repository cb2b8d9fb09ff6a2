"""All that is done with data, and what may come of it: a whole sample, or an error of ours that says what is wrong."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgem.data.audit.scan import scan_shard
from mmgem.data.remote import Remote
from mmgem.data.samples import Sample, SampleError, decode_image, parse_sample, record_of
from mmgem.data.shards import ShardedDataset
from mmgem.data.store import open_store
from mmgem.errors import UserError

MOST = 60
"""Samples of a split that are read."""


def picture(number: int, width: int = 48, height: int = 36) -> Image.Image:
    """Smooth random colours."""
    rough = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(error: UserError | SampleError) -> str:
    assert str(error).strip() and str(error).encode("utf-8", "surrogateescape")
    return type(error).__name__


def assert_whole(sample: Sample) -> None:
    """As the class says, and fit to be trained on and written."""
    texts = [sample.key, *sample.captions, *(r.phrase for r in sample.regions)]
    texts += [r.entity for r in sample.regions if r.entity is not None]
    assert sample.captions or sample.regions
    assert all(
        text.encode() and text == text.strip() for text in (*sample.captions, *(r.phrase for r in sample.regions))
    )
    assert "\0".join(texts).encode() is not None
    assert type(sample.width) is type(sample.height) is int and 0 < sample.width * sample.height < 1 << 28
    for region in sample.regions:
        x1, y1, x2, y2 = region.box
        assert all(type(v) is float and math.isfinite(v) for v in region.box), region
        assert 0 <= x1 < x2 <= sample.width and 0 <= y1 < y2 <= sample.height and (x2 - x1) * (y2 - y1) > 0, region
    record = record_of(sample)
    again = parse_sample(sample.key, sample.image, json.loads(json.dumps(record)))
    assert (again.captions, again.regions) == (sample.captions, sample.regions) and not again.dropped
    assert json.dumps(record_of(again)) == json.dumps(record)


def read_split(folder: Path, *, verify: bool, audit: bool = True) -> Counter[str]:
    """How many samples of the split are whole, and how many are refused."""
    found: Counter[str] = Counter()
    store = open_store(folder, cache_dir=folder / "cache", remote=Remote(retries=1, timeout=0.4, backoff=0.01))
    dataset = ShardedDataset(folder, store=store, verify=verify)
    for index in range(min(len(dataset), MOST)):
        try:
            sample = dataset.sample(index)
            assert_whole(sample)
            assert dataset.captions(index) == sample.captions
            found["whole"] += 1
            decode_image(sample)
        except (SampleError, UserError) as error:
            found[refused(error)] += 1
    for read in (lambda: dataset.keys, lambda: list(dataset.iter_texts()), lambda: list(dataset.left_out())):
        try:
            json.dumps(read(), ensure_ascii=False).encode()
        except (SampleError, UserError) as error:
            refused(error)
    if audit:
        for shard in dataset.shards[:3]:
            scan_shard(store, shard)
    return found


def memory() -> str | None:
    """A folder whose files need no disk, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def word(found: Counter[str]) -> str:
    """In one word, whether all, some or none was whole."""
    if not found.total():
        return "empty"
    return "whole" if found["whole"] == found.total() else "some broken" if found["whole"] else "all broken"
