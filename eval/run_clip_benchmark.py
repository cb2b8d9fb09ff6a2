"""CLIP_benchmark's own command line, which then also knows `--model_type mmgem`, and our data in its layout.

    python eval/run_clip_benchmark.py data --data data/scenes --split test --out data/scenes-wds
    python eval/run_clip_benchmark.py eval --pretrained runs/quickstart --dataset wds/scenes \\
        --dataset_root data/scenes-wds --task zeroshot_retrieval --recall_k 1 5 10 --no_amp

Everything after `eval` (or `build`) is CLIP_benchmark's: `--help` lists it. Three of its options have other defaults
here: `--model_type mmgem`; `--model`, under which a result is listed, is the name of the run's folder; and `--output`
is `DATASET_MODEL_LANGUAGE_TASK.json`, since its own default would put the path of a run into a file's name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapters.clip_benchmark import MODEL_TYPE, register, write_webdataset
from mmgem.errors import UserError

OUTPUT = "{dataset}_{model}_{language}_{task}.json"


def main(argv: list[str]) -> int:
    try:
        if argv[:1] == ["data"]:
            return write(argv[1:])
        return hand_over(argv)
    except UserError as error:
        print(f"run_clip_benchmark: error: {error}", file=sys.stderr)
        return 2


def write(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run_clip_benchmark.py data", description="A prepared split for wds/NAME.")
    parser.add_argument("--data", type=Path, required=True, help="a folder of `mmgem data prepare`")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True, help="what CLIP_benchmark's --dataset_root names")
    args = parser.parse_args(argv)
    images = write_webdataset(args.data, args.split, args.out)
    print(f"{args.out}/{args.split}: {images:,} images")
    return 0


def hand_over(argv: list[str]) -> int:
    """To CLIP_benchmark, in this process."""
    try:
        from clip_benchmark import cli
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'mmgem[eval]'") from error
    register()
    sys.argv = ["clip_benchmark", *with_defaults(argv)]
    return cli.main() or 0


def with_defaults(argv: list[str]) -> list[str]:
    """Our defaults before what was given, which then wins."""
    if argv[:1] != ["eval"] or {"-h", "--help"} & set(argv):
        return argv
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--model_type", default=MODEL_TYPE)
    known.add_argument("--pretrained", nargs="+", default=[])
    known.add_argument("--model", nargs="+", default=[])
    known.add_argument("--output", default=OUTPUT)
    given, _ = known.parse_known_args(argv[1:])
    if given.model_type != MODEL_TYPE:
        return argv
    if not given.pretrained:
        raise UserError("--pretrained: no model named; give a run folder, e.g. runs/quickstart")
    if "{pretrained" in given.output:
        raise UserError(f"--output {given.output}: a run's path does not fit into a file's name; write {{model}}")
    if len(given.pretrained) > 1:
        raise UserError("--pretrained: one model a call; results are named after --model")
    name = given.model or [Path(given.pretrained[0]).resolve().name]
    return ["eval", "--model_type", MODEL_TYPE, "--model", *name, "--output", given.output, *argv[1:]]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
