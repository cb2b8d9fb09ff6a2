"""Images a second of one core: this package's loader against open_clip's, on the same tar.

    python bench/data.py [--images 2000] [--rounds 5]

Makes a tar as img2dataset does (KEY.jpg, KEY.txt, KEY.json) of textured 640 x 480 JPEGs, and reads it in turns with
`StageData.train_dataloader()`, with and without scaled decoding, and with open_clip's `get_wds_dataset`: batches of 64,
each picture a random crop of 0.9 to 1 of its area at 224 x 224, normalised, each caption tokenised; no workers, one
thread. Each has a process of its own, set up as its trainer does it: `mmgem` keeps freed memory for the next step.
open_clip does not, and has a second row in which it does. Prints one table of the medians over the rounds, after one
that does not count. Time is the process's CPU time, so that other work on the machine counts as little as possible.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else our tokenizer would use all cores

import numpy as np
import open_clip
import torch
from PIL import Image

from mmgem.config import DataConfig, StageConfig
from mmgem.data.batch import Batch
from mmgem.data.datamodule import StageData
from mmgem.data.sources import open_training_data
from mmgem.data.tars import index_tars
from mmgem.images import Preprocess
from mmgem.memory import keep_freed_memory
from mmgem.progress import Progress
from mmgem.text import TextCodec, train_tokenizer

WIDTH, HEIGHT, SIZE, BATCH = 640, 480, 224, 64
CROP = (0.9, 1.0)  # open_clip's default
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
WORDS = (
    "a the two small large red brown white dog man woman child bird horse street field beach table runs sits stands "
    "rides holds watches plays on in near behind under with water grass ball bicycle umbrella mountain snow evening"
).split()

OPEN_CLIP = f"open_clip_torch {importlib.metadata.version('open_clip_torch')}"
LOADERS = {OPEN_CLIP: "theirs", "  freed memory kept": "theirs kept", "mmgem": "scaled", "  full decoding": "full"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.images < BATCH or args.rounds < 1:
        parser.error(f"at least {BATCH} images and 1 round")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        tar = Path(folder) / "train" / "00000.tar"
        captions, size = write_tar(tar, args.images)
        index_tars(tar.parent, [tar])
        process = partial(ProcessPoolExecutor, 1, get_context("spawn"), set_up)
        pools = {name: processes.enter_context(process((kind, tar, captions))) for name, kind in LOADERS.items()}
        rates: dict[str, list[float]] = {name: [] for name in pools}
        with Progress("reading", (args.rounds + 1) * len(pools), "passes") as progress:
            for number in range(args.rounds + 1):
                for name, pool in pools.items():
                    rate = pool.submit(images_a_second).result()
                    if number > 0:
                        rates[name].append(rate)
                    progress.advance()
    print(f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} kB each; medians of {args.rounds} rounds")
    print(f"{'on one core':24}{'images/s':>9}{'lowest':>9}{'highest':>9}{'ratio':>8}")
    for name, found in rates.items():
        # Rounds are compared one by one: what slows the machine down slows both.
        ratio = median(one / theirs for one, theirs in zip(found, rates[OPEN_CLIP], strict=True))
        print(f"{name:24}{median(found):9.0f}{min(found):9.0f}{max(found):9.0f}{ratio:8.2f}")


def set_up(kind: str, tar: Path, captions: list[str]) -> None:
    """Makes this process one that reads with a loader."""
    global loader
    torch.set_num_threads(1)
    if kind != "theirs":
        keep_freed_memory()
    loader = their_loader(tar, len(captions)) if "theirs" in kind else our_loader(tar, captions, kind == "scaled")


def images_a_second() -> float:
    """Of one pass over this process's loader."""
    images, start = 0, time.process_time()
    for batch in loader:
        pictures = batch.pictures if isinstance(batch, Batch) else batch[0]
        assert pictures.shape[1:] == (3, SIZE, SIZE) and pictures.dtype == torch.float32
        images += len(pictures)
    return images / (time.process_time() - start)


def our_loader(tar: Path, captions: list[str], scaled: bool) -> Iterable[Batch]:
    data = DataConfig(path=str(tar.parent.parent), crop_scale=CROP, scaled_decoding=scaled)
    codec = TextCodec(train_tokenizer(captions, 1000, lowercase=True), max_tokens=77)
    stage = StageConfig(epochs=1, global_batch=BATCH)
    return StageData(
        open_training_data(data), codec, Preprocess(SIZE, MEAN, STD), data, stage, seed=0
    ).train_dataloader()


def their_loader(tar: Path, images: int) -> Iterable[Any]:
    """`get_wds_dataset` as it is, but for two faults of open_clip 3.3 beside webdataset 1.0."""
    # It imports pandas, without saying so in its requirements, for a reader of CSV files that is not used here.
    with patch.dict(sys.modules, {} if "pandas" in sys.modules else {"pandas": ModuleType("pandas")}):
        from open_clip_train import data
    # webdataset marks the end of each tar with an empty sample, at which its grouping raises KeyError (issue 935).
    data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    args = SimpleNamespace(
        train_data=str(tar),
        train_num_samples=images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=0,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    tokenizer = open_clip.SimpleTokenizer()
    return data.get_wds_dataset(args, transform, is_train=True, floor=True, tokenizer=tokenizer).dataloader


def write_tar(path: Path, images: int) -> tuple[list[str], float]:
    """Gives the captions, and the mean bytes of a JPEG."""
    rng, captions, size = np.random.default_rng(0), [], 0
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar, Progress("drawing", images, "images") as progress:
        for number in range(images):
            caption = " ".join(rng.choice(WORDS, rng.integers(6, 16)))
            record = {"caption": caption, "key": f"{number:09d}", "width": WIDTH, "height": HEIGHT}
            jpeg = textured(rng)
            for ending, content in (
                ("jpg", jpeg),
                ("txt", caption.encode()),
                ("json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            captions.append(caption)
            size += len(jpeg)
            progress.advance()
    return captions, size / images


def textured(rng: np.random.Generator) -> bytes:
    """A JPEG of quality 90 with detail of every size, less colour than light, and some noise, as photos have."""
    levels = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for across, strength in ((4, 90.0), (16, 40.0), (64, 22.0), (240, 8.0)):
        light, *colours = rng.normal(size=(4, across * 3 // 4, across)).astype(np.float32)
        for channel, colour in enumerate(colours):
            rough = Image.fromarray(strength * (0.75 * light + 0.4 * colour))
            levels[..., channel] += np.asarray(rough.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    levels += 3.5 * rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
