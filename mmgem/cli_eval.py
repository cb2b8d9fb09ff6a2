"""The commands that measure: eval, eval compare; and the options they share with those that use a model.

Receives parsed options. Gives exit codes. Refuses, with a UserError, what is not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgem.errors import UserError

Arguments = argparse.Namespace


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=Path, metavar="M", help="a run folder, or what save_pretrained wrote"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beams of captions (default 1: greedy)")
    parser.add_argument(
        "--rerank",
        type=float,
        default=0.0,
        metavar="W",
        help="of the beams take that with the highest mean log p of a token + W * cosine with the picture",
    )
    parser.add_argument("--max-new-tokens", type=int, default=30, metavar="N")


def reachable_model(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"{path}: no such model; give a run folder, e.g. runs/quickstart, or what save_pretrained wrote"
        )


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "`mmgem eval compare A B` compares two evaluations item by item."
    parser.add_argument(
        "task",
        choices=(
            "retrieval",
            "captioning",
            "region-retrieval",
            "region-captioning",
            "rerank",
            "similarity-map",
            "zero-shot",
            "composition",
            "all",
        ),  # fmt: skip
        help="all: those that the data allow",
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="a dataset made by `mmgem data prepare`; zero-shot, composition: or a folder in others' layouts",
    )
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where metrics.json and report.html go (default: MODEL/report)"
    )
    parser.add_argument("--stages", action="store_true", help="compare the model after each stage of the run")
    add_search(parser)
    parser.add_argument("--length-penalty", type=float, default=1.0)
    parser.add_argument(
        "--captions",
        type=int,
        default=0,
        metavar="N",
        help="retrieval, rerank: only the first N captions of an image, as COCO's published figures have 5",
    )
    parser.add_argument(
        "--join-captions", action="store_true", help="retrieval: an image's captions, joined, are one long text"
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="zero-shot: JSON of class names; or FILE:DATASET")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="zero-shot: JSON of templates with {c}")
    parser.add_argument(
        "--images",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="composition: where the pictures lie that the files name; may be given again",
    )
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="how much of log p(text | no image) is taken off (default 1)"
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=500,
        metavar="N",
        help="rerank, similarity-map, zero-shot: at most so many queries where each is costly (default 500)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time; ranks share the batches")
    parser.add_argument(
        "--baseline",
        choices=("crop",),
        help="crop: region retrieval also from the vectors of cut-out boxes, by the (first) model",
    )


def run_eval(args: Arguments) -> int:
    if args.captions < 0:
        raise UserError(f"--captions {args.captions}: at least 1, or none for all")
    reachable_model(args.model)
    models = _models_of(args.model, args.stages)
    from mmgem.evaluation.run import evaluate, tasks_for
    from mmgem.evaluation.tasks import TaskOptions
    from mmgem.ranks import process_group

    tasks = tasks_for(args.data, args.split) if args.task == "all" else [args.task]
    options = TaskOptions(
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        rerank=args.rerank,
        max_new_tokens=args.max_new_tokens,
        captions=args.captions,
        join_captions=args.join_captions,
        classes=args.classes,
        templates=args.templates,
        images=tuple(args.images),
        alpha=args.alpha,
        queries=args.queries,
    )
    out = args.out or args.model / "report"
    baseline = [next(iter(models))] if args.baseline == "crop" else []
    with process_group(cuda=False) as ranks:
        evaluate(
            models,
            args.data,
            args.split,
            tasks,
            out,
            options=options,
            batch_size=args.batch_size,
            crop_baseline=baseline,
            device=args.device,
            run_dir=args.model if (args.model / "log.jsonl").is_file() else None,
            ranks=ranks,
        )
    if ranks.first:
        print(f"{out}/metrics.json\n{out}/report.html")
    return 0


def _models_of(path: Path, stages: bool) -> dict[str, Path]:
    if not stages:
        return {path.name: path}
    found = {p.name: p for p in (path / "stages").glob("*") if (p / "config.json").is_file()}
    if not found:
        raise UserError(f"{path}/stages: no finished stage here; leave --stages out, or give a run folder")
    import yaml

    order = [s["name"] for s in yaml.safe_load((path / "config.yaml").read_text())["stages"]]
    return {name: found[name] for name in order if name in found}


# --- eval compare ------------------------------------------------------------------------------


def add_compare(parser: argparse.ArgumentParser) -> None:
    for name in "AB":
        parser.add_argument(
            name.lower(),
            metavar=name,
            help="a report folder, or a run folder with one; FOLDER:MODEL of several models (default: the last)",
        )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.json and compare.html there")
    parser.add_argument("--samples", type=int, default=10_000, metavar="N", help="resamples (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="LINE",
        help="a protocol line that may differ, e.g. num_beams; may be given again",
    )


def run_compare(args: Arguments) -> int:
    if args.samples < 100:
        raise UserError(f"--samples {args.samples}: too few for an interval; give at least 100")
    from mmgem.evaluation.compare import compare, table, write_comparison

    found = compare(args.a, args.b, samples=args.samples, seed=args.seed, allowed=args.allow)
    print(table(found))
    if args.out is not None:
        write_comparison(args.out, found)
        print(f"{args.out}/compare.json\n{args.out}/compare.html")
    return 0
