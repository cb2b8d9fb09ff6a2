"""The commands: one table, command → what it takes and what it runs.

Receives the command line. Gives an exit code: 0, 1 where `data check` finds data wrong, 2 for bad input (one line says
what, where, what to do; --debug shows the traceback), 128 + signal number when stopped. Imports lazily: help answers at
once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmgem import __version__
from mmgem.cli_data import add_data, add_debug, run_data
from mmgem.cli_eval import add_compare, add_eval, add_model, add_search, reachable_model, run_compare, run_eval
from mmgem.cli_refine import (
    add_negatives_command,
    add_refine,
    add_thresholds,
    run_negatives,
    run_refine,
    run_thresholds,
)
from mmgem.errors import UserError
from mmgem.memory import keep_freed_memory

Arguments = argparse.Namespace

LONGEST_ERROR = 2000
"""Characters."""


# --- train, check ------------------------------------------------------------------------------


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|CHECKPOINT",
        help="auto: go on where the run stopped, or begin; never (default): refuse a folder that holds a run",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings to change, e.g. stages.0.lr=1e-4"
    )


def run_train(args: Arguments) -> int:
    from mmgem.config import load_config

    config = load_config(args.config, args.overrides)
    from mmgem.training.run import train

    return train(config, args.resume)


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines of the run (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="ranks on each of them (default 1)")
    parser.add_argument(
        "--samples-per-second",
        type=float,
        default=100.0,
        metavar="R",
        help="of each rank: what the bandwidth is worked out from (default 100)",
    )
    parser.add_argument("--no-data", action="store_true", help="where the data are not: check the rest")
    parser.add_argument("--gpu", metavar="TYPE", help="e.g. h200, h100, a100, l40s: how long it takes, whether it fits")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="of its peak that is reached (0.4)")
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help="of an average text (default 16, or model.max_tokens if less)"
    )
    parser.add_argument(
        "--network-gbit", type=float, metavar="R", help="from a GPU to other machines (default: usual for its type)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")


def run_check(args: Arguments) -> int:
    from mmgem.config import load_config

    config = load_config(args.config, args.overrides)
    from mmgem.data.plan import Machines, data_plan

    machines = Machines(args.nodes, args.gpus_per_node)
    print(data_plan(config, machines, args.samples_per_second, look=not args.no_data), flush=True)
    from mmgem.training.check import Assumptions, DataCounts, check

    text_tokens = min(16, config.model.max_tokens) if args.text_tokens is None else args.text_tokens
    network = None if args.network_gbit is None else args.network_gbit * 1e9 / 8
    counts = None
    if not args.no_data:
        from mmgem.data.sources import open_training_data

        splits = open_training_data(config.data).splits
        totals = [sum(split.totals[name] for split in splits) for name in ("captions", "regions")]
        counts = DataCounts(sum(map(len, splits)), *totals)
    report = check(config, machines, Assumptions(args.gpu, args.mfu, text_tokens, network), counts)
    print(report.text, flush=True)
    if report.refusal:
        raise UserError(report.refusal)
    return 0


# --- use ---------------------------------------------------------------------------------------


def add_caption(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _add_writing(parser)


def run_caption(args: Arguments) -> int:
    from mmgem.inference.use import caption_images

    for row in caption_images(_load(args), args.images, _writing(args)):
        print(json.dumps(row, ensure_ascii=False) if args.json else f"{row['image']}: {row['caption']}")
    return 0


def add_regions(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--box", action="append", required=True, metavar="x1,y1,x2,y2", help="pixels of the picture; may be given again"
    )
    parser.add_argument(
        "--caption", action="store_true", help="write a caption for each box (the default if nothing is asked)"
    )
    parser.add_argument("--embed", action="store_true", help="give each box's vector (with --json)")
    parser.add_argument("--query", metavar="TEXT", help="give each box's cosine with a text")
    _add_writing(parser)


def run_regions(args: Arguments) -> int:
    from mmgem.inference.use import describe_regions, parse_box

    boxes = [parse_box(text) for text in args.box]
    caption = args.caption or not (args.embed or args.query)
    rows = describe_regions(
        _load(args), args.image, boxes, caption=caption, embed=args.embed, query=args.query, writing=_writing(args)
    )
    for row in rows:
        if args.json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        parts = [",".join(f"{v:g}" for v in row["box"])]
        parts += [row["caption"]] if "caption" in row else []
        parts += [f"similarity {row['similarity']:.4f}"] if "similarity" in row else []
        parts += [f"{len(row['vector'])} numbers (--json prints them)"] if "vector" in row else []
        print(": ".join(parts[:2]) + "".join(f"; {p}" for p in parts[2:]))
    return 0


def add_embed(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", nargs="+", type=Path, metavar="PATH", help="pictures, or folders of them")
    what.add_argument("--texts", type=Path, metavar="FILE", help="one text a line")
    what.add_argument("--data", type=Path, metavar="DIR", help="a split, e.g. data/scenes/test: its pictures")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE.npz", help="arrays `vectors` (N x E, length 1) and `names`"
    )


def run_embed(args: Arguments) -> int:
    from mmgem.inference.use import embed_to_file

    count, width = embed_to_file(_load(args), args.out, images=args.images, texts=args.texts, data=args.data)
    print(f"{args.out}: {count} vectors of {width}")
    return 0


def add_search_command(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--index", required=True, type=Path, metavar="FILE.npz", help="what `mmgem embed` wrote")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="may be given again")
    parser.add_argument("--image", action="append", default=[], type=Path, metavar="PATH", help="may be given again")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many to show (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object a query, a line each")


def run_search(args: Arguments) -> int:
    model = _load(args)
    from mmgem.inference.search import open_index, search

    for row in search(model, open_index(args.index, model), texts=args.text, images=args.image, count=args.k):
        if args.json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        print(f"{row['query']}:")
        for place, hit in enumerate(row["found"], 1):
            print(f"{place:4}  {hit['cosine']:.4f}  {hit['name']}")
    return 0


# --- export ------------------------------------------------------------------------------------


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or that of an older export")
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        help="another one, e.g. best.ckpt (default: the finished model, or else the newest checkpoint)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights in the file"
    )


def run_export(args: Arguments) -> int:
    from mmgem.training.export import export

    for line in export(args.folder, args.out, args.checkpoint, args.dtype):
        print(line)
    print(args.out)
    return 0


def _add_writing(parser: argparse.ArgumentParser) -> None:
    add_search(parser)
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _writing(args: Arguments) -> dict[str, Any]:
    options: dict[str, Any] = {"num_beams": args.beams, "max_new_tokens": args.max_new_tokens, "rerank": args.rerank}
    if args.top_p is not None:
        options |= {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature, "seed": args.seed}
    return options


def _load(args: Arguments) -> Any:
    reachable_model(args.model)
    from mmgem.inference.use import load_model

    return load_model(args.model, args.device)


# --- the table ---------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Arguments], int]]] = {
    "train": ("train a model, stage by stage", add_train, run_train),
    "check": ("say what a config would build, before it runs", add_check, run_check),
    "data": ("prepare, index and check data", add_data, run_data),
    "eval": ("measure a model on a dataset; metrics.json and report.html", add_eval, run_eval),
    "eval compare": ("compare two evaluations item by item, with intervals", add_compare, run_compare),
    "caption": ("write captions for pictures", add_caption, run_caption),
    "regions": ("caption, embed and compare boxes of a picture", add_regions, run_regions),
    "embed": ("vectors of pictures or texts, into a file", add_embed, run_embed),
    "search": ("the nearest of a file of vectors to texts or pictures", add_search_command, run_search),
    "refine": ("raw pairs made trustworthy: a gate, texts and pictures made anew", add_refine, run_refine),
    "refine thresholds": ("what other thresholds of a refinement would keep", add_thresholds, run_thresholds),
    "refine negatives": (
        "hard negatives of every caption, kept with the samples",
        add_negatives_command,
        run_negatives,
    ),
    "export": ("a run's model as a folder to use and share, with a model card", add_export, run_export),
}


def main(argv: Sequence[str] | None = None) -> int:
    # Threads that spin long while they wait starve each other when another program shares the cores: a step on two busy
    # cores then takes many times as long. Read when torch is imported, hence here.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        prog="mmgem", description="One model that retrieves and writes, for images and boxes of them."
    )
    parser.add_argument("--version", action="version", version=f"mmgem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, add, run) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        add(sub)
        add_debug(sub)
        sub.set_defaults(run=run)
    args = _parse(parser, sys.argv[1:] if argv is None else list(argv))
    try:
        code = args.run(args)
    except UserError as e:
        code = _failed(e, args)
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        code = 141
    except OSError as e:
        if e.filename is None:
            raise
        code = _failed(e, args)
    except KeyboardInterrupt:
        print("mmgem: stopped", file=sys.stderr)
        code = 130
    return code


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> Arguments:
    # argparse takes a box that begins below 0 for an option.
    for i in range(len(argv) - 1, 0, -1):
        if argv[i - 1] == "--box" and argv[i][:1] == "-" and argv[i][1:2] in set("0123456789."):
            argv[i - 1 : i + 1] = [f"--box={argv[i]}"]
    if " ".join(argv[:2]) in COMMANDS:  # a command of two words
        argv = [" ".join(argv[:2]), *argv[2:]]
    # It also leaves overrides over that stand on both sides of an option.
    args, rest = parser.parse_known_args(argv)
    if rest and "overrides" in args and not any(text.startswith("-") for text in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _failed(error: UserError | OSError, args: Arguments) -> int:
    if getattr(args, "debug", False):
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}"
    elif text.startswith("Caught UserError in DataLoader worker"):  # torch wraps the traceback of the worker into it
        text = text.rpartition("UserError: ")[2]
    text = " ".join(text.split())
    if len(text) > LONGEST_ERROR:  # it quotes what was given, which may be a file's whole content
        text = f"{text[: LONGEST_ERROR // 2]} … {text[-LONGEST_ERROR // 2 :]}"
    print(f"mmgem: error: {text}", file=sys.stderr)
    # They hold the data loader: let go, its workers end at once; at the program's end torch waits 5 s for each.
    traceback.clear_frames(error.__traceback__)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
