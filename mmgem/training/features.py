"""The frozen part of a tower, computed once: its output for each picture and view, kept on disk as fp16.

Receives a tower that can be cut, a split, and the number of views. Gives a `FeatureCache`, which the data module reads
in place of pictures. A killed build goes on where it was. Refuses a folder made for other weights, data or views by
never finding it: the folder's name is the hash of all that matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmgem.config import DataConfig
from mmgem.data.datamodule import cached_view, leave_signals_to_parent
from mmgem.data.samples import SampleError, decode_image
from mmgem.data.sources import Sources
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.model.vision import VisionTower
from mmgem.progress import Progress
from mmgem.training.checkpoint import write_atomically
from mmgem.training.signals import stop_if_asked

BATCH = 8
"""Pictures at once: activations this small stay in the CPU's reach, and their memory is used again."""


class FeatureCache:
    """N samples x V views of the trunk's output, memory-mapped."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def get(self, index: int, number: int) -> Tensor:
        broken = self.meta["broken"].get(str(index))
        if broken is not None:
            raise SampleError(*broken)
        array = self._array
        if array is None:
            array = self._array = np.load(self.folder / "features.npy", mmap_mode="r")
        return torch.from_numpy(array[index, number].astype(np.float32))


class _Views(Dataset):
    """Place among the wanted samples -> its number, and V x 3 x S x S, or what is wrong with it."""

    def __init__(self, dataset: Sources, data: DataConfig, preprocess: Preprocess, seed: int, views: int):
        self.dataset, self.data, self.preprocess = dataset, data, preprocess
        self.seed, self.views = seed, views
        self.wanted: list[int] = []

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[int, Tensor | tuple[Any, ...]]:
        index = self.wanted[place]
        try:
            sample = self.dataset.sample(index)
            image = decode_image(sample)
        except SampleError as e:
            return index, e.args
        views = [cached_view(self.data, self.preprocess, self.seed, index, v, *image.size) for v in range(self.views)]
        return index, torch.stack([view.picture(image, self.preprocess) for view in views])


def feature_cache(
    tower: VisionTower,
    preprocess: Preprocess,
    dataset: Sources,
    data: DataConfig,
    seed: int,
    views: int,
    root: Path,
    device: torch.device,
    bf16: bool = False,
) -> FeatureCache:
    """Finds the cache under `root`, or makes it (in bf16 autocast if asked; kept as fp16 either way)."""
    source = _Views(dataset, data, preprocess, seed, views)
    folder = root / _fingerprint(tower, source, bf16)
    meta_file = folder / "meta.json"
    meta = json.loads(meta_file.read_text()) if meta_file.is_file() else {"done": 0, "broken": {}}
    # What was broken may have been mended since: the index, whose checksum is in the folder's name, would not tell.
    source.wanted = [*map(int, meta["broken"]), *range(meta["done"], len(dataset))]
    if source.wanted:
        folder.mkdir(parents=True, exist_ok=True)
        _build(tower.to(device).eval(), source, meta, folder, device, bf16)
    return FeatureCache(folder)


@torch.no_grad()
def _build(
    tower: VisionTower, source: _Views, meta: dict[str, Any], folder: Path, device: torch.device, bf16: bool
) -> None:
    size, total = source.preprocess.size, len(source.dataset)
    probe = tower.trunk(torch.zeros(1, 3, size, size, device=device))
    file, shape = folder / "features.npy", (total, source.views, *probe.shape[1:])
    needed = 2 * int(np.prod(shape))
    if meta["done"] and file.is_file():
        array = np.lib.format.open_memmap(file, mode="r+")
    else:
        import shutil

        meta["done"], source.wanted = 0, list(range(total))
        if shutil.disk_usage(folder).free < 1.05 * needed:
            raise UserError(
                f"{folder}: cached_views={source.views} needs {needed / 1e9:.1f} GB of disk; lower it or free space"
            )
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    workers = source.data.workers
    loader = DataLoader(
        source, batch_size=BATCH, collate_fn=list, num_workers=workers, worker_init_fn=leave_signals_to_parent
    )
    what, done = f"caching {source.views} views ({needed / 1e9:.1f} GB)", total - len(source.wanted)
    with Progress(what, total, "pictures", done) as progress:
        for number, items in enumerate(loader):
            stop_if_asked()
            good = [(i, views) for i, views in items if isinstance(views, Tensor)]
            for index, found in items:
                if isinstance(found, Tensor):
                    meta["broken"].pop(str(index), None)
                else:
                    meta["broken"][str(index)] = found
            if good:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    parts = [tower.trunk(p.to(device)) for p in torch.cat([v for _, v in good]).split(BATCH)]
                hidden = torch.cat(parts).to(torch.float16).cpu().numpy()
                for place, (index, _) in enumerate(good):
                    array[index] = hidden[place * source.views : (place + 1) * source.views]
            meta["done"] = max(meta["done"], items[-1][0] + 1)
            progress.advance(len(items))
            if number % 20 == 19 or number == len(loader) - 1:
                array.flush()
                write_atomically(folder / "meta.json", json.dumps(meta))


def _fingerprint(tower: VisionTower, source: _Views, bf16: bool) -> str:
    digest = hashlib.sha256()
    frozen = tower.frozen_parameters() or list(tower.parameters())
    for parameter in frozen:
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    data = source.data
    augmentation = [data.flip, data.crop_scale, data.color_jitter]
    # Left to the tower's source or resolved, these are the same: two stand in preprocess, one plays no part here.
    config = dataclasses.replace(tower.config, mean=None, std=None, frozen_statistics=None)
    facts = [source.dataset.checksum, source.preprocess, config, *augmentation, source.seed, source.views, bf16]
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]
