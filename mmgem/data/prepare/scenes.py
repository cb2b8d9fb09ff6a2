"""Reader `scenes`: the rendered scenes of `mmgem.data.scenes` as a dataset; nothing is needed.

Receives how many scenes of each split, a seed and a size. Gives a dataset with captions and boxes;
the same arguments give the same bytes with the same Pillow, on any number of processes. Refuses
counts below 0 or all 0, and what `render_scene` refuses.

Pictures are stored as JPEG, quality 95 without chroma subsampling (the colours stay true): half the
bytes of PNG and two thirds of its decoding time.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mmgem.data.prepare.writing import Record, in_order, prepare
from mmgem.data.scenes import render_scene
from mmgem.data.writer import check_split_dir
from mmgem.errors import UserError

_CHUNK = 32  # scenes a task: about a tenth of a second of work


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
    """Renders scenes with captions and boxes: the data set that comes with the program.

    out: the dataset to write. train, val, test: scenes of each split. seed: another seed, other
    scenes. size: side of the square pictures in pixels. processes: how many render (default: one a
    CPU). shard_size: samples a tar. overwrite: replace splits that are there.
    """
    counts = {"train": train, "val": val, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise UserError(f"scenes: {counts} cannot be rendered: give counts of 0 or more, not all 0")
    render_scene(seed, "train", 0, size=size)  # refuses a bad size here, not in a process
    for split, count in counts.items():
        if count:
            check_split_dir(Path(out) / split, overwrite=overwrite)
    return prepare(
        records(counts, seed=seed, size=size, processes=processes),
        out,
        shard_size=shard_size,
        overwrite=overwrite,
        max_broken=0.0,
        total=sum(counts.values()),
    )


def records(counts: Mapping[str, int], *, seed: int, size: int, processes: int | None = None) -> Iterator[Record]:
    """The scenes split by split, in order, whatever the number of processes."""
    chunks = [
        (split, range(start, min(start + _CHUNK, count)))
        for split, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    render = partial(_render, seed, size)
    processes = min(processes or os.cpu_count() or 1, len(chunks))
    if processes <= 1:
        yield from chain.from_iterable(map(render, chunks))
        return
    # spawn: forking a process that has threads (torch starts them) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from chain.from_iterable(in_order(pool, render, chunks, window=4 * processes))


def _render(seed: int, size: int, chunk: tuple[str, range]) -> list[Record]:
    split, indices = chunk
    return [_record(seed, size, split, index) for index in indices]


def _record(seed: int, size: int, split: str, index: int) -> Record:
    scene = render_scene(seed, split, index, size=size)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=95, subsampling=0)
    regions = []
    for region in scene.regions:
        entity = {} if region.entity is None else {"entity": region.entity}
        regions.append({"box": list(region.box), "phrase": region.phrase, **entity})
    width, height = scene.image.size
    meta = {"captions": list(scene.captions), "regions": regions, "width": width, "height": height}
    return Record(f"{split}-{index:06d}", split, buffer.getvalue(), {**meta, **scene.meta})
