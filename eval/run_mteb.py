"""Tasks of MTEB 2 with a model of ours.

    python eval/run_mteb.py --model runs/quickstart --data data/scenes --split test --out runs/quickstart/mteb
    python eval/run_mteb.py --model runs/flickr8k --tasks Flickr30kT2IRetrieval Flickr30kI2TRetrieval --out mteb

`--data` makes two retrieval tasks of a prepared split. `--tasks` are MTEB's own, which it downloads. Results are its
JSON files under OUT, and are not computed again for the same weights and data.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from mmgem.errors import UserError

SHOWN = ("recall_at_1", "recall_at_5", "recall_at_10", "hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "accuracy")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run_mteb.py", description="Tasks of MTEB 2 with a model of ours.")
    parser.add_argument("--model", type=Path, required=True, help="a run folder or an exported model")
    parser.add_argument("--tasks", nargs="+", default=[], help="MTEB's own tasks, by name")
    parser.add_argument("--data", type=Path, help="a folder of `mmgem data prepare`")
    parser.add_argument("--split", default="test", help="of --data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"run_mteb: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    if not args.tasks and args.data is None:
        raise UserError("no task to run; name some of MTEB's with --tasks, or give --data")
    try:
        import mteb

        from adapters.mteb import MMGemEncoder, retrieval_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'mmgem[eval]'") from error
    logging.basicConfig(level=logging.WARNING)
    tasks: list[Any] = []
    if args.data is not None:
        tasks += retrieval_tasks(args.data, args.split)
    try:
        tasks += [mteb.get_task(name) for name in args.tasks]
    except KeyError as error:
        raise UserError(f"--tasks: {str(error.args[0])[:300]}") from error
    model = MMGemEncoder(str(args.model), device=args.device)
    found = mteb.evaluate(model, tasks, encode_kwargs={"batch_size": args.batch_size}, cache=mteb.ResultCache(args.out))
    for result in found.task_results:
        for split, subsets in result.scores.items():
            for scores in subsets:
                shown = ", ".join(f"{name} {scores[name]:.4f}" for name in SHOWN if name in scores)
                print(f"{result.task_name} {split}: main score {scores['main_score']:.4f}; {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
