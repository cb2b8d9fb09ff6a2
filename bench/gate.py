"""How well gates of one encoder and of two find captions that were exchanged, on real photos, in one run.

    python bench/gate.py --data data/flickr8k --model runs/flickr8k --out runs/gate \\
        --tower timm:mobilenetv2_100:MOBILENET.safetensors [--split val] [--threshold 1.5]

Of the split's captions, those of each picture, 30 % by lot get another picture's instead: --share. `mmgem refine`,
without captioner, judges each caption with its picture: by the model alone, by the tower alone (whose head is fitted on
the very pairs, wrong ones among them), and by both, as their least score and as their mean. `area` is that under the
curve of right pairs kept over wrong pairs kept: the chance that a right pair scores above a wrong one. `precision`,
`recall`: in finding the exchanged ones, at --threshold, and at the threshold that finds as many as were exchanged,
where the two are equal. --seeds: other exchanges.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from random import Random
from statistics import mean, stdev

import numpy as np

from mmgem.data.shards import ShardedDataset
from mmgem.refine.page import judged
from mmgem.refine.raw import units
from mmgem.refine.run import FOLDER, Settings, refine
from mmgem.refine.work import Rules

FIGURES = ("area", "precision", "recall", "precision = recall")


def main() -> None:
    args = parse_arguments()
    model = f"mmgem:{args.model}"
    gates = {"model": ((model,), "min"), "both, least": ((model, args.tower), "min")}
    gates["both, mean"] = ((model, args.tower), "mean")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*gates, "tower")}
    count = 0
    for seed in args.seeds:
        raw = args.out / f"raw-{seed}"
        if not raw.is_dir():
            exchange(ShardedDataset(args.data / args.split), raw, args.share, seed)
        for name, (encoders, combine) in gates.items():
            out = args.out / f"{name.replace(', ', '-')}-{seed}"
            settings = Settings(
                encoders, combine=combine, threshold=args.threshold, duplicates=2.0, rules=Rules(min_words=1)
            )
            refine(raw, out, settings, labels="truth", overwrite=True)
            pairs = judged(units(raw), out / FOLDER, "truth")
            right, count = np.array([bool(one.right) for one in pairs]), len(pairs)
            found[name].append(figures(np.array([one.score for one in pairs]), right, args.threshold))
            if name == "both, mean":  # twice the mean less the model's score: the tower's
                alone = {
                    (one.key, one.text): one.score for one in judged(units(raw), args.out / f"model-{seed}" / FOLDER)
                }
                tower = [2 * one.score - alone[one.key, one.text] for one in pairs]
                found["tower"].append(figures(np.array(tower), right, args.threshold))
    print(f"{count:,} captions, threshold {args.threshold}")
    print(f"{'':14}" + "".join(f"{name:>20}" for name in FIGURES))
    for name, seeds in found.items():
        cells = []
        for figure in FIGURES:
            values = [one[figure] for one in seeds]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        print(f"{name:14}" + "".join(f"{cell:>20}" for cell in cells))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tower", required=True, help="as mmgem refine --encoder, e.g. timm:mobilenetv2_100:FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--threshold", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def exchange(split: ShardedDataset, raw: Path, share: float, seed: int) -> None:
    """A tar of the split's pictures, of whose captions a share are those of the next such one's, in an order by lot."""
    captions = [list(split.captions(n)) for n in range(len(split))]
    places = [(n, k) for n, own in enumerate(captions) for k in range(len(own))]
    chosen = Random(seed).sample(places, round(share * len(places)))
    truth = [{text: True for text in own} for own in captions]
    before = [captions[n][k] for n, k in chosen]
    for (n, k), text in zip(chosen, [*before[1:], before[0]], strict=True):
        own = truth[n].pop(captions[n][k], None)
        if text in captions[n]:  # its own again
            truth[n][captions[n][k]] = bool(own)
            continue
        captions[n][k] = text
        truth[n][text] = False
    raw.mkdir(parents=True)
    with tarfile.open(raw / "00000.tar", "w") as tar:
        for n, own in enumerate(captions):
            sample = split.sample(n)
            record = json.dumps({"captions": own, "truth": truth[n]}).encode()
            for name, content in ((f"{n:06d}.jpg", sample.image), (f"{n:06d}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def figures(score_N: np.ndarray, right_N: np.ndarray, threshold: float) -> dict[str, float]:
    """In finding the wrong ones, which are to score low."""
    order = score_N.argsort(kind="stable")
    wrong_N = ~right_N[order]
    rank_W = np.flatnonzero(wrong_N)
    below = rank_W - np.arange(len(rank_W))  # right ones that score below each wrong one
    refused = score_N < threshold
    hits = int((refused & ~right_N).sum())
    wrong = int((~right_N).sum())
    return {
        "area": 1 - float(below.sum()) / (wrong * (len(right_N) - wrong)),
        "precision": hits / max(1, int(refused.sum())),
        "recall": hits / wrong,
        "precision = recall": float(wrong_N[:wrong].mean()),
    }


if __name__ == "__main__":
    main()
