"""Reader `scenes`: the rendered scenes of `mmgem.data.scenes` as a dataset; nothing is needed.

Receives how many scenes of each split, a seed and a size. Gives a dataset with captions and boxes;
the same arguments give the same bytes with the same Pillow, on any number of processes. Refuses
counts below 0 or all 0, and what `render_scene` refuses.

Pictures are stored as JPEG, quality 95 without chroma subsampling (the colours stay true): half the
bytes of PNG and two thirds of its decoding time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmgem.data.prepare.reading import Record
from mmgem.data.prepare.scene_classes import write_scene_classes
from mmgem.data.prepare.scene_composition import write_scene_composition
from mmgem.data.prepare.writing import prepare
from mmgem.data.scenes import render_scene
from mmgem.errors import UserError

MOST_CLASS_PICTURES = 300
MOST_PAIRS = 50


def prepare_scenes(
    out: Path,
    *,
    train: int = 4000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
    size: int = 112,
    processes: int | None = None,
    shard_size: int = 1000,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Renders scenes with captions and boxes: the data set that comes with the program; and as many pictures of
    one object as there are test scenes, up to 300, for zero-shot evaluation (`scene_classes`); and up to 50 pairs of a
    kind, a fourth of the test scenes, for composition (`scene_composition`).

    out: the dataset to write. train, val, test: scenes of each split. seed: another seed, other
    scenes. size: side of the square pictures in pixels. processes: how many render (default: one a
    CPU). shard_size: samples a tar. overwrite: replace splits that are there.
    """
    counts = {"train": train, "val": val, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise UserError(f"scenes: {counts} cannot be rendered: give counts of 0 or more, not all 0")
    render_scene(seed, "train", 0, size=size)  # refuses a bad size here, not in a process
    facts = prepare(
        partial(records, counts),
        out,
        plan={"format": "scenes", "seed": seed, "size": size},
        load=partial(rendered, seed, size),
        shard_size=shard_size,
        processes=processes,
        overwrite=overwrite,
        max_broken=0.0,
    )
    write_scene_classes(out, min(test, MOST_CLASS_PICTURES), seed, size)
    write_scene_composition(out, min(-(-test // 4), MOST_PAIRS), seed, size)
    return facts


def records(counts: Mapping[str, int]) -> Iterator[Record]:
    """The scenes split by split, in order, still to be rendered."""
    for split, count in counts.items():
        for index in range(count):
            yield Record(f"{split}-{index:06d}", split, b"", {"index": index})


def rendered(seed: int, size: int, record: Record) -> Record:
    """The record with its picture, captions and regions."""
    assert not isinstance(record.meta, str)
    scene = render_scene(seed, record.split, record.meta["index"], size=size)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=95, subsampling=0)
    regions = []
    for region in scene.regions:
        entity = {} if region.entity is None else {"entity": region.entity}
        regions.append({"box": list(region.box), "phrase": region.phrase, **entity})
    width, height = scene.image.size
    meta = {"captions": list(scene.captions), "regions": regions, "width": width, "height": height}
    origin = {"scene": {"seed": seed, "split": record.split, "index": scene.index}}
    return record._replace(image=buffer.getvalue(), meta={**meta, **scene.meta, **origin})
