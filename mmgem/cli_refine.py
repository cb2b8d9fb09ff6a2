"""The commands that make raw data trustworthy: refine, refine thresholds, refine negatives.

Receives parsed options. Gives exit codes. Refuses, with a UserError, what is not there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmgem.errors import UserError

Arguments = argparse.Namespace


def add_refine(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "`mmgem refine thresholds OUT` shows what other thresholds would keep."
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder of tars, or of pictures and texts")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the dataset to write")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="KIND:NAME",
        help="mmgem:MODEL, open_clip:NAME[:WEIGHTS] or timm:NAME[:WEIGHTS]; given again, each has its say",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=2.0,
        metavar="X",
        help="what passes, in standard deviations above pairs that do not belong together (default 2)",
    )
    parser.add_argument(
        "--combine", choices=("min", "mean"), default="min", help="several encoders: all reach it, or their mean (min)"
    )
    parser.add_argument("--captioner", metavar="KIND:NAME", help="writes texts: mmgem:MODEL or hf:NAME")
    parser.add_argument("--caption-prompt", default="", metavar="TEXT", help="what a model of Hugging Face is asked")
    parser.add_argument(
        "--sure",
        type=float,
        default=0.0,
        metavar="P",
        help="what the captioner writes must be so probable, by itself, given the picture (default 0: however little)",
    )
    parser.add_argument("--painter", metavar="KIND[:NAME]", help="draws pictures: scenes or diffusers:NAME")
    parser.add_argument("--paint-prompt", default="", metavar="TEXT", help="put before each text")
    parser.add_argument(
        "--duplicates",
        type=float,
        default=0.95,
        metavar="COS",
        help="pictures that look alike are one from this cosine on (default 0.95); above 1: duplicates are kept",
    )
    parser.add_argument("--min-words", type=int, default=2, metavar="N", help="of a text (default 2)")
    parser.add_argument("--max-words", type=int, default=80, metavar="N", help="of a text (default 80)")
    parser.add_argument(
        "--short",
        type=int,
        default=0,
        metavar="N",
        help="a text of more words is also kept short, as its first sentences of at most so many (default: not)",
    )
    for kind in ("text", "picture"):
        parser.add_argument(
            f"--keep-{kind}",
            action="append",
            default=[],
            metavar="KIND:NAME=LABEL,…",
            help=f"only {kind}s that a classifier calls LABEL: hf:NAME or python:MODULE:FUNCTION; may be given again",
        )
    parser.add_argument("--max-aspect", type=float, default=4.0, metavar="X", help="longer by shorter side (default 4)")
    parser.add_argument("--min-side", type=int, default=16, metavar="PIXELS", help="of a picture (default 16)")
    parser.add_argument("--labels", metavar="FIELD", help="of the records: which texts are right, for the page")
    parser.add_argument("--split", default="train", help="the split to write (default train)")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples a tar (default 1000)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--overwrite", action="store_true", help="begin anew, and replace what is there")


def run_refine(args: Arguments) -> int:
    if not args.encoder:
        raise UserError("name an encoder with --encoder, e.g. mmgem:runs/quickstart")
    if args.min_words > args.max_words:
        raise UserError(f"--min-words {args.min_words} is above --max-words {args.max_words}: no text could pass")
    if not 0 <= args.sure < 1:
        raise UserError(f"--sure {args.sure}: a probability, at least 0 and below 1")
    from mmgem.ranks import process_group
    from mmgem.refine.run import Settings, refine, table
    from mmgem.refine.work import Rules

    settings = Settings(
        encoders=tuple(args.encoder),
        combine=args.combine,
        threshold=args.threshold,
        captioner=args.captioner,
        caption_prompt=args.caption_prompt,
        sure=args.sure,
        painter=args.painter,
        paint_prompt=args.paint_prompt,
        duplicates=args.duplicates,
        keep_texts=tuple(args.keep_text),
        keep_pictures=tuple(args.keep_picture),
        rules=Rules(args.min_words, args.max_words, args.max_aspect, args.min_side, args.short),
    )
    with process_group(cuda=False) as ranks:
        result = refine(
            args.source,
            args.out,
            settings,
            split=args.split,
            shard_size=args.shard_size,
            overwrite=args.overwrite,
            device=args.device,
            labels=args.labels,
            ranks=ranks,
        )
    if ranks.first:
        print(table(result))
        print(f"{args.out}/refine.html")
    return 0


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="what `mmgem refine` wrote")
    parser.add_argument("--labels", metavar="FIELD", help="of the records: which texts are right")
    parser.add_argument("--json", action="store_true", help="the table as JSON")


def run_thresholds(args: Arguments) -> int:
    from mmgem.refine.page import judged, render_page, threshold_table, thresholds
    from mmgem.refine.raw import units
    from mmgem.refine.run import FOLDER

    try:
        result = json.loads((args.out / "refine.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{args.out}/refine.json: no such file; run `mmgem refine … --out {args.out}` first") from None
    found, work = units(Path(result["settings"]["source"])), args.out / FOLDER
    rows = thresholds(judged(found, work, args.labels), result["gate"]["threshold"])
    if args.json:
        print(json.dumps(rows))
        return 0
    print(threshold_table(rows))
    from mmgem.evaluation.result import write_text

    write_text(args.out / "refine.html", render_page(result, found, work, args.labels))
    print(f"{args.out}/refine.html")
    return 0


def add_negatives_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a dataset made by `mmgem data prepare`")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the dataset to write")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--maker", action="append", default=[], metavar="KIND[:NAME]", help="rules (default) or hf:NAME; again for both"
    )
    parser.add_argument("--kinds", nargs="+", default=[], metavar="KIND", help="colour, swap, … (default: all)")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="of each caption, by each maker (default 3)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="for a language model, with {kind} and {caption}")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.5,
        metavar="X",
        help="a language model's text may be so much less likely than the caption, in mean log p (default 0.5)",
    )
    parser.add_argument(
        "--painter", metavar="KIND[:NAME]", help="draws a picture of each: scenes or diffusers:NAME (default: none)"
    )
    parser.add_argument("--paint-prompt", default="", metavar="TEXT", help="put before each text")
    parser.add_argument(
        "--benchmark", action="store_true", help="also write them for `mmgem eval composition`, in SugarCrepe's layout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="begin anew, and replace what is there")


def run_negatives(args: Arguments) -> int:
    from mmgem.ranks import process_group
    from mmgem.refine.negatives import add_negatives

    with process_group(cuda=False) as ranks:
        found = add_negatives(
            args.data,
            args.out,
            args.split,
            makers=args.maker or ["rules"],
            kinds=args.kinds,
            count=args.count,
            prompt=args.prompt,
            margin=args.margin,
            painter=args.painter,
            paint_prompt=args.paint_prompt,
            benchmark=args.benchmark,
            seed=args.seed,
            overwrite=args.overwrite,
            ranks=ranks,
        )
    if ranks.first:
        drawn = f", {found['drawn']:,} of them drawn" if args.painter else ""
        print(f"{found['samples']:,} samples, {found['negatives']:,} negatives{drawn}")
        for kind, count in found["kinds"].items():
            print(f"  {kind:12}{count:>9,}")
    return 0
