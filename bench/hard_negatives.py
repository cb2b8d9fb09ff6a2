"""Whether training against hard negatives teaches word order, and what it costs retrieval, in one run.

    python bench/hard_negatives.py --data data/scenes --out runs/hard [--seeds 0 1 2] [--stages 1]

Trains configs/quickstart.yaml twice a seed: as it is, and with hard negatives of HARD_KINDS. Then both choose between
the texts of scenes that differ in one thing, in the layouts of Winoground and SugarCrepe, --pairs of each kind. What
differs in them is, by the kind of rule that would make such a text: TRAINED, or held out of training. Recall on the
test split beside it. `blind` is what can be known without the picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mmgem.cli import main as mmgem
from mmgem.data.prepare.scene_composition import SUGARCREPE_NAMES, write_scene_composition

HARD_KINDS = ("colour", "size", "relation", "exchange")
RULE_OF = {"swap_att": "swap", "replace_rel": "relation", "replace_count": "count", "negation": "negation"}
"""Which kind of rule makes such a text as SugarCrepe's layout has of scenes."""
HELD_OUT = tuple(name for name in SUGARCREPE_NAMES.values() if RULE_OF[name] not in HARD_KINDS)
HARD_LOSSES = "{columns: 1.0, rank: 0.2, written: 1.0, written_margin: 0.5}"
WAYS = ("vector", "generative", "both", "blind_vector", "blind_generative")
RECALLS = ("text_retrieval_recall@1", "image_retrieval_recall@1")
SEED, SIZE = 99, 112


def main() -> None:
    args = parse_arguments()
    pairs = args.out / "pairs"
    if not pairs.is_dir():
        write_scene_composition(pairs, args.pairs, SEED, SIZE)
    kinds = ", ".join(args.kinds)
    runs: dict[str, list[str]] = {"plain": [], "hard": []}
    for number in range(args.stages):
        runs["hard"] += [
            f"stages.{number}.negatives={{texts: {args.texts}, kinds: [{kinds}]}}",
            f"stages.{number}.loss.hard={args.losses}",
        ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in args.seeds:
        for name, more in runs.items():
            if name not in args.only:
                continue
            found[name].append(train(args, pairs, f"{name}-{seed}", [f"seed={seed}", *more]))
            print(name, seed, json.dumps(found[name][-1]), flush=True)
    print_table(found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, default=2, help="how many of the config's")
    parser.add_argument("--pairs", type=int, default=250, help="of each kind, in each layout")
    parser.add_argument("--kinds", nargs="+", default=HARD_KINDS)
    parser.add_argument("--texts", type=int, default=2, help="negatives of a caption")
    parser.add_argument("--losses", default=HARD_LOSSES)
    parser.add_argument("--only", nargs="+", default=["plain", "hard"])
    return parser.parse_args()


def train(args: argparse.Namespace, pairs: Path, name: str, settings: list[str]) -> dict[str, float]:
    run = args.out / name
    first = ["stages.1=null"] if args.stages == 1 else []
    mmgem_or_stop("train", "--config", "configs/quickstart.yaml", "--resume", "auto", f"run={run}",
                  f"data.path={args.data}", *first, *settings)  # fmt: skip
    figures: dict[str, float] = {}
    for task, data in (("retrieval", args.data), ("composition", pairs)):
        mmgem_or_stop("eval", task, "--model", str(run), "--data", str(data))
        result: dict[str, Any] = json.loads((run / "report/metrics.json").read_text())
        figures |= result["metrics"]
    return {name: round(value, 4) for name, value in rows(figures).items()}


def mmgem_or_stop(*arguments: str) -> None:
    if code := mmgem(list(arguments)):
        raise SystemExit(code)


def rows(figures: dict[str, float]) -> dict[str, float]:
    found = {name: figures[name] for name in RECALLS}
    for way in WAYS:
        by_subset = {name: figures[f"sugarcrepe_{way}_text_{name}"] for name in SUGARCREPE_NAMES.values()}
        found |= {f"{way}: {name}": value for name, value in by_subset.items()}
        found[f"{way}: held out"] = mean(by_subset[name] for name in HELD_OUT)
        wino = {score: f"winoground_{way}_{score}" for score in ("text", "image", "group")}
        found |= {f"{way}: winoground {score}": figures[name] for score, name in wino.items() if name in figures}
    return found


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    """Means over the seeds, with the deviation between them where there are several."""
    runs = [name for name in found if found[name]]
    print(f"{'held out: ' + ', '.join(HELD_OUT):44}" + "".join(f"{name:>18}" for name in runs))
    for row in found[runs[0]][0]:
        cells = []
        for name in runs:
            values = [figures[row] for figures in found[name]]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        print(f"{row:44}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
