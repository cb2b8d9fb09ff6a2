"""Cached views: the frozen part of the tower computed once, and the run the same as without."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONFIG, Process, Tiny, break_samples, figures, read_lines, same_bits, weights

from mmgem.cli import main
from mmgem.config import Config, load_config
from mmgem.data.samples import decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.data.sources import Sources
from mmgem.model import MMGem
from mmgem.text import train_tokenizer
from mmgem.training.features import FeatureCache, feature_cache

STAGE = "stages=[{name: only, samples: 96, global_batch: 16, lr: 2e-3, max_regions: 2, %s}]"
CUT = "model.vision={name: mobilenetv2_035, image_size: 64, train_from: blocks.5}"
AUGMENTED = ("data.flip=0.5", "data.crop_scale=[0.5,1.0]", "data.color_jitter=0.2")


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    ("vision", "freeze"), [(CUT, "[]"), (CUT, "[vision]"), ("", "[vision]")], ids=["train_from", "both", "frozen"]
)
def test_cached_training_equals_uncached(tiny: Tiny, tmp_path: Path, vision: str, freeze: str) -> None:
    """One view without augmentation is the plain picture: the losses agree as far as fp16 goes."""
    runs = {}
    for views in (0, 1):
        stage = STAGE % f"freeze: {freeze}, cached_views: {views}"
        assert tiny.train(tmp_path / f"{views}", stage, *([vision] if vision else [])) == 0
        runs[views] = [line["loss"] for line in figures(tmp_path / f"{views}")]
    assert runs[1] == pytest.approx(runs[0], rel=5e-3)
    # Only fp16 and the parts of a batch it was computed in make the difference.
    assert runs[1] != runs[0]
    assert not (tmp_path / "1/cache").exists(), "the disk is given back"


def test_a_stage_has_its_own_picture_size(tiny: Tiny, tmp_path: Path) -> None:
    """Cached or not, with the same losses, and other ones than at the tower's size (64)."""
    runs = {}
    for name, extra in {"64": "", "96": "image_size: 96", "96 cached": "image_size: 96, cached_views: 1"}.items():
        assert tiny.train(tmp_path / name, STAGE % extra, CUT, f"data.cache={tmp_path}/cache") == 0
        runs[name] = [line["loss"] for line in figures(tmp_path / name)]
    assert runs["96 cached"] == pytest.approx(runs["96"], rel=5e-3)
    assert runs["64"] != pytest.approx(runs["96"], rel=5e-3)
    assert np.load(next(tmp_path.glob("cache/*/features.npy")), mmap_mode="r").shape[-2:] == (6, 6)
    assert MMGem.from_pretrained(tmp_path / "96").preprocess.size == 64, "the model's own size is the tower's"


VITS = {
    "timm": "{name: vit_tiny_patch16_224, image_size: 64}",
    "open_clip": "{library: open_clip, config: {layers: 1, width: 32, head_width: 16, patch_size: 16}, image_size: 64}",
}


@pytest.mark.parametrize("vit", VITS.values(), ids=VITS.keys())
def test_a_tower_of_one_size_is_refused_another(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], vit: str
) -> None:
    assert tiny.train(tmp_path / "run", STAGE % "image_size: 96", f"model.vision={vit}") == 2
    assert "stage only: image_size=96: the tower is built for pictures of 64" in capsys.readouterr().err


def build(tiny: Tiny, *overrides: str) -> tuple[Config, MMGem, Sources]:
    config = load_config(CONFIG, [CUT, f"data.path={tiny.data}", *overrides])
    torch.manual_seed(0)
    model = MMGem(config.model, train_tokenizer(["a ball"], 300, True))
    return config, model, Sources([ShardedDataset(tiny.data / "train")])


def cache_of(config: Config, model: MMGem, dataset: Sources, root: Path, views: int = 1) -> FeatureCache:
    preprocess, device = model.preprocess, torch.device("cpu")
    return feature_cache(model.vision, preprocess, dataset, config.data, config.seed, views, root, device)


def test_first_view_is_the_plain_picture(tiny: Tiny, tmp_path: Path) -> None:
    config, model, dataset = build(tiny, *AUGMENTED)
    cache = cache_of(config, model, dataset, tmp_path, views=3)
    model.eval()
    with torch.no_grad():
        for index in (0, 17, 95):
            picture = model.preprocess(decode_image(dataset.sample(index)))[None]
            cached = cache.get(index, 0)[None]
            assert relative(cached, model.vision.trunk(picture)) < 1e-3
            assert relative(model.vision.rest(cached), model.vision(picture)) < 2e-3
            for other in (1, 2):
                assert relative(cache.get(index, other)[None], cached) > 0.05, "the others are augmented"


def test_views_are_drawn_in_training(tiny: Tiny, tmp_path: Path) -> None:
    """With augmentation, more views make another run than one; the same settings the same run, with workers too."""
    losses = {}
    for name, views, workers in (("one", 1, 0), ("three", 3, 0), ("again", 3, 2)):
        settings = (STAGE % f"cached_views: {views}", CUT, *AUGMENTED, f"data.workers={workers}")
        assert tiny.train(tmp_path / name, *settings) == 0
        losses[name] = [line["loss"] for line in figures(tmp_path / name)]
    assert losses["three"] == losses["again"] != losses["one"]


def test_another_tower_or_seed_gets_another_cache(tiny: Tiny, tmp_path: Path) -> None:
    config, model, dataset = build(tiny)
    first = cache_of(config, model, dataset, tmp_path)
    array = first.folder / "features.npy"
    written = array.stat().st_mtime_ns
    assert cache_of(config, model, dataset, tmp_path).folder == first.folder
    assert array.stat().st_mtime_ns == written, "found, not made again"
    model.vision.frozen_parameters()[0].data[0] += 1
    assert cache_of(config, model, dataset, tmp_path).folder != first.folder
    config.seed = 1
    assert len({cache_of(config, model, dataset, tmp_path).folder for _ in range(2)} | {first.folder}) == 2


def test_broken_samples_are_remembered(tiny: Tiny, tmp_path: Path) -> None:
    data = break_samples(tiny, tmp_path / "data", [3, 40])
    settings = (STAGE % "cached_views: 2", CUT, "data.max_broken=0.1")
    assert data.train(tmp_path / "run", *settings) == 0
    uncached = (STAGE % "cached_views: 0", CUT, "data.max_broken=0.1")
    assert data.train(tmp_path / "uncached", *uncached) == 0
    regions = [[line["regions"] for line in figures(tmp_path / name)] for name in ("run", "uncached")]
    assert regions[0] == regions[1], "the same samples are left out"


def test_what_is_mended_is_cached_and_what_is_broken_is_named_in_full(tmp_path: Path) -> None:
    data = Tiny(tmp_path / "data")
    counts = ["--train", "96", "--val", "4", "--test", "4", "--size", "64", "--shard-size", "24", "--processes", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(data.data), *counts]) == 0
    settings = (STAGE % "cached_views: 1", CUT, "data.max_broken=1", f"data.cache={tmp_path}/cache")
    shard = data.data / "train/shard-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    for run in ("cut", "cut again"):
        assert data.train(tmp_path / run, *settings) == 0
        (line,) = read_lines(tmp_path / run / "broken.jsonl")
        assert (line["key"], line["shard"], line["reason"]) == ("", str(shard), "shard cut short")
    shard.write_bytes(whole)
    assert data.train(tmp_path / "mended", *settings) == 0
    assert read_lines(tmp_path / "mended/broken.jsonl") == []
    fresh = (*settings[:-1], f"data.cache={tmp_path}/other")
    assert data.train(tmp_path / "fresh", *fresh) == 0
    assert figures(tmp_path / "mended") == figures(tmp_path / "fresh")


# --- stopped, and no room -----------------------------------------------------------------------------


def test_killed_build_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """What is done is not done again, and the whole is what an unbroken build gives."""
    big, run, pictures = Tiny(tmp_path / "data"), tmp_path / "run", 480
    counts = ["--train", str(pictures), "--val", "4", "--test", "4", "--size", "64", "--processes", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(big.data), *counts]) == 0
    config, model, dataset = build(big, *AUGMENTED)
    model.save_pretrained(tmp_path / "init")
    stage = STAGE % "cached_views: 3"
    process = Process(*big.arguments(run, stage, CUT, *AUGMENTED, f"init_from={tmp_path / 'init'}"))
    (meta,) = wait_for(process, run, "cache/*/meta.json")  # its first note, after 320 pictures
    process.signal(signal.SIGKILL)
    process.wait()
    done = json.loads(meta.read_text())["done"]
    assert 0 < done < pictures
    array = np.lib.format.open_memmap(meta.with_name("features.npy"), mode="r+")
    array[0] = 7  # a mark
    array.flush()
    cache = cache_of(config, model, dataset, run / "cache", views=3)
    assert cache.folder == meta.parent and cache.meta["done"] == pictures
    assert (cache.get(0, 0) == 7).all()
    whole = cache_of(config, model, dataset, tmp_path / "whole", views=3)
    assert all(torch.equal(cache.get(i, v), whole.get(i, v)) for i in range(1, pictures) for v in range(3))


def wait_for(process: Process, run: Path, pattern: str) -> list[Path]:
    deadline = time.monotonic() + 240
    while not (found := list(run.glob(pattern))):
        assert process.popen.poll() is None and time.monotonic() < deadline, process.wait().err
        time.sleep(0.003)
    return found


def test_asked_to_stop_while_caching(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = Process(*tiny.arguments(run, STAGE % "cached_views: 200", CUT, *AUGMENTED))
    wait_for(process, run, "cache/*/features.npy")
    process.signal(signal.SIGTERM)
    done = process.wait()
    assert done.code == 143 and "Traceback" not in done.err
    assert done.err.strip().endswith(f"mmgem train --config {run}/config.yaml --resume auto")


def test_disk_too_small(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage: Any = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert tiny.train(tmp_path / "run", STAGE % "cached_views: 2", CUT) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mmgem: error: ") and str(tmp_path / "run/cache") in message
    assert "cached_views=2" in message and "GB of disk" in message
    assert not list((tmp_path / "run").rglob("features.npy"))


def test_finished_weights_of_the_trunk_are_the_old_ones(tiny: Tiny, tmp_path: Path) -> None:
    assert tiny.train(tmp_path / "run", STAGE % "cached_views: 2", CUT) == 0
    assert tiny.train(tmp_path / "more", STAGE % "cached_views: 2", CUT, f"init_from={tmp_path / 'run'}") == 0
    before, after = weights(tmp_path / "run/model"), weights(tmp_path / "more/model")
    assert same_bits(before, after, "vision.model.blocks.4.")
    assert not same_bits(before, after, "vision.model.blocks.5.")
