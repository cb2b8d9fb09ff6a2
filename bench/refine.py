"""What a refinement of noisy scenes ends with, and what training on it is worth, in one run.

    python bench/refine.py --model runs/quickstart --out runs/refined [--samples 6000] [--train 20000]

Of the scenes 30 % have another scene's text, 10 % no text and 10 % no picture (`mmgem.data.scene_noise`; another seed
than the model's training had). `mmgem refine` with the model as encoder and captioner, and the scenes' own renderer as
painter. Whether a text is true of its picture is read off the scene (`mmgem.data.scene_truth`): of the source and of
what comes out, by fate. Painted pictures were drawn from their text, and count as right.

--train N: then the first stage of configs/quickstart.yaml for N samples on three data sets of the same pictures: the
raw pairs as they are, what came out of the refinement, and all scenes with a true text; recall on the scenes' test
split beside each other, for each of --seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from mmgem.cli import main as mmgem
from mmgem.data.prepare.reading import Record
from mmgem.data.prepare.writing import prepare
from mmgem.data.scene_noise import noisy_scenes
from mmgem.data.scene_truth import is_true
from mmgem.data.scenes import render_scene
from mmgem.data.shards import ShardedDataset
from mmgem.progress import Progress
from mmgem.refine.raw import units
from mmgem.refine.run import Settings, refine

SIZE, SEED = 112, 77
FIGURES = ("text_retrieval_recall@1", "image_retrieval_recall@1")


def main() -> None:
    args = parse_arguments()
    raw, out = args.out / "raw", args.out / "out"
    if not raw.is_dir():
        print(noisy_scenes(raw, args.samples, seed=SEED, size=SIZE))
    model = f"mmgem:{args.model}"
    settings = Settings(
        (model, *args.encoder), threshold=args.threshold, captioner=model, sure=args.sure, painter="scenes"
    )
    if not (out / "train/index.json").is_file():
        refine(raw, out, settings, labels="truth")
    print_truth(raw, out)
    if args.train:
        train(args, raw, out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", action="append", default=[], help="beside the model, e.g. timm:resnet10t")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--threshold", type=float, default=2.0)
    parser.add_argument("--sure", type=float, default=0.02, help="as mmgem refine --sure")
    parser.add_argument("--train", type=int, default=0, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test", type=Path, help="the scenes to test on (default: OUT/scenes, made)")
    return parser.parse_args()


# --- what is right ---------------------------------------------------------------------------------------------------


def truth(scene: int, text: str) -> bool:
    """Of the picture of a scene, by its number."""
    found = render_scene(SEED, "train", scene, size=SIZE)
    return is_true(text, found.meta, [region.box for region in found.regions], SIZE) is True


def print_truth(raw: Path, out: Path) -> None:
    right_before = kept_right = 0
    fates: dict[str, Counter[bool]] = {}
    split = ShardedDataset(out / "train")
    kept: dict[str, str] = {}
    with Progress("judging", len(split), "samples") as progress:
        for n in range(len(split)):
            sample = split.sample(n)
            fate = sample.meta["refine"]["fate"]
            right = fate == "painted" or truth(sample.meta["scene"], sample.captions[0])
            fates.setdefault(fate, Counter())[right] += 1
            kept[str(sample.meta["scene"])] = fate
            progress.advance(1)
    for unit in units(raw):
        for one in unit.read():
            if one.meta["kind"] == "right":
                right_before += 1
                kept_right += kept.get(str(one.meta["scene"])) == "kept"
    total: Counter[bool] = sum(fates.values(), Counter())
    print(f"{'fate':12}{'samples':>9}{'right':>9}")
    for fate, counts in [*sorted(fates.items()), ("all", total)]:
        print(f"{fate:12}{counts.total():9,}{counts[True] / counts.total():9.3f}")
    print(f"of {right_before:,} right pairs {kept_right / right_before:.3f} are kept as they were")


# --- what training on it is worth ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, raw: Path, out: Path) -> None:
    test = args.test or args.out / "scenes"
    if not (test / "test/index.json").is_file():
        mmgem(["data", "prepare", "scenes", "--out", str(test), "--train", "0", "--val", "0"])
    data = {"raw": args.out / "as-it-is", "refined": out, "clean": args.out / "clean"}
    for name, source in (("raw", pairs_as_they_are), ("clean", true_pairs)):
        if not (data[name] / "train/index.json").is_file():
            prepare(lambda source=source: source(raw), data[name], plan={"format": f"bench {name}"})
    found: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in data}
    for seed in args.seeds:
        for name, folder in data.items():
            run = args.out / f"run-{name}-{seed}"
            settings = [f"run={run}", f"data.path={folder}", "data.val_split=null", f"seed={seed}", "stages.1=null"]
            settings += [f"stages.0.samples={args.train}", "stages.0.captions_per_image=1"]
            mmgem(["train", "--config", "configs/quickstart.yaml", "--resume", "auto", *settings])
            mmgem(["eval", "retrieval", "--model", str(run), "--data", str(test)])
            result: dict[str, Any] = json.loads((run / "report/metrics.json").read_text())
            for figure in FIGURES:
                found[name][figure].append(result["metrics"][figure])
    print(f"{'':12}" + "".join(f"{figure:>28}" for figure in FIGURES) + "   each seed")
    for name, figures in found.items():
        shares = [mean(figures[f]) / mean(found["clean"][f]) for f in FIGURES]
        cells = [f"{mean(figures[f]):.3f} ({share:.2f} of clean)" for f, share in zip(FIGURES, shares, strict=True)]
        print(f"{name:12}" + "".join(f"{cell:>28}" for cell in cells) + f"   {figures}")


def pairs_as_they_are(raw: Path) -> Iterator[Record]:
    for unit in units(raw):
        for one in unit.read():
            if one.image is not None and one.texts:
                yield Record(one.key, "train", one.image, {"captions": one.texts})


def true_pairs(raw: Path) -> Iterator[Record]:
    """Every picture of the source with a true text, the source's own where it is right."""
    for unit in units(raw):
        for one in unit.read():
            if one.image is not None:
                right = one.meta["kind"] == "right"
                texts = (
                    one.texts if right else list(render_scene(SEED, "train", one.meta["scene"], size=SIZE).captions[:1])
                )
                yield Record(one.key, "train", one.image, {"captions": texts})


if __name__ == "__main__":
    main()
