"""Whether training against hard negatives teaches what belongs together, and what it costs retrieval, in one run.

    python bench/hard_negatives.py --data data/scenes --out runs/hard [--seeds 0 1 2]

For each seed trains configs/quickstart.yaml (`base`), and from there configs/composition.yaml twice, as it is (`hard`)
and without its negatives (`plain`); both see the same samples. The negatives are of --drawn, each with the scene of
which it is true, and of --texts, without one. Then they choose between the texts of scenes that differ in one thing, in
the layouts of Winoground and SugarCrepe, --pairs of each kind, of which some are of kinds that no negative in training
was of: `held out`. Recall on the test split beside it. `blind` is what can be known without the picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mmgem.cli import main as mmgem
from mmgem.data.prepare.scene_composition import SUGARCREPE_NAMES, write_scene_composition

DRAWN, TEXTS = ("swap",), ("leak", "colour", "size", "object")
RULE_OF = {
    "swap_att": "swap", "replace_att": "borrow", "replace_rel": "relation", "replace_count": "count",
    "negation": "negation",
}  # fmt: skip
"""Which kind of rule makes such a text as SugarCrepe's layout has of scenes."""
PLAIN = [f"stages.{n}.{key}" for n in range(2) for key in ("negatives={}", "loss={emb: 0.3, gen: 1.0}")]
WAYS = ("vector", "generative", "both", "blind_vector", "blind_generative")
RECALLS = ("text_retrieval_recall@1", "image_retrieval_recall@1")
SEED, SIZE = 99, 112


def main() -> None:
    args = parse_arguments()
    pairs, negatives = args.out / "pairs", args.out / "negatives"
    if not pairs.is_dir():
        write_scene_composition(pairs, args.pairs, SEED, SIZE)
    if not (negatives / "negatives.json").is_file() and set(args.only) - {"base"}:
        drawn = args.out / "drawn"
        refine = ("refine", "negatives", "--split", "train")
        mmgem_or_stop(
            *refine, str(args.data), "--out", str(drawn), "--count", "1", "--painter", "scenes", "--kinds", *args.drawn
        )
        mmgem_or_stop(*refine, str(drawn), "--out", str(negatives), "--count", "2", "--kinds", *args.texts)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("base", "plain", "hard")}
    for seed in args.seeds:
        after = [f"init_from={args.out / f'base-{seed}'}", f"data.path={negatives}", *args.common, *args.settings]
        settings = {"base": [f"data.path={args.data}", *args.common], "plain": [*after, *PLAIN], "hard": after}
        for name in args.only:
            config = "quickstart" if name == "base" else "composition"
            run = [f"run={args.out / f'{name}-{seed}'}", f"seed={seed}", *settings[name]]
            found[name].append(train(args, pairs, config, run))
            print(name, seed, json.dumps(found[name][-1]), flush=True)
    held_out = [name for name, rule in RULE_OF.items() if rule not in {*args.drawn, *args.texts}]
    print_table(held_out, found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--common", nargs="+", default=[], help="settings of all three, e.g. training.device=cuda")
    parser.add_argument("--settings", nargs="+", default=[], help="of plain and hard, e.g. stages.0.samples=96_000")
    parser.add_argument("--pairs", type=int, default=250, help="of each kind, in each layout")
    parser.add_argument("--drawn", nargs="+", default=DRAWN, help="kinds of negatives with a scene of their own")
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="kinds without")
    parser.add_argument("--only", nargs="+", default=["base", "plain", "hard"], choices=["base", "plain", "hard"])
    return parser.parse_args()


def train(args: argparse.Namespace, pairs: Path, config: str, settings: list[str]) -> dict[str, float]:
    mmgem_or_stop("train", "--config", f"configs/{config}.yaml", "--resume", "auto", *settings)
    run = settings[0].removeprefix("run=")
    figures: dict[str, float] = {}
    for task, data in (("retrieval", args.data), ("composition", pairs)):
        mmgem_or_stop("eval", task, "--model", run, "--data", str(data))
        result: dict[str, Any] = json.loads(Path(run, "report/metrics.json").read_text())
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
        wino = {score: f"winoground_{way}_{score}" for score in ("text", "image", "group")}
        found |= {f"{way}: winoground {score}": figures[name] for score, name in wino.items() if name in figures}
    return found


def print_table(held_out: list[str], found: dict[str, list[dict[str, float]]]) -> None:
    """Means over the seeds, with the deviation between them where there are several."""
    runs = [name for name in found if found[name]]
    for figures in (one for name in runs for one in found[name]):
        figures |= {f"{way}: held out": mean(figures[f"{way}: {name}"] for name in held_out) for way in WAYS}
    print(f"{'held out: ' + ', '.join(held_out):44}" + "".join(f"{name:>18}" for name in runs))
    for row in found[runs[0]][0]:
        cells = []
        for name in runs:
            values = [figures[row] for figures in found[name]]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        print(f"{row:44}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
