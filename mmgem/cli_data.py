"""The commands of `mmgem data`: prepare, index, check.

Receives the command line, as `cli` does. Gives an exit code: 0; 1 where `check` finds something wrong; 2 is `cli`'s.
Refuses nothing itself: what an option may be is said where it is used. Imports lazily: help answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Arguments = argparse.Namespace


def add_data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="make a dataset of a public format")
    formats = prepare.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (text, add) in FORMATS.items():
        sub = formats.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(sub)
        _add_out(sub)
        add_debug(sub)
    _add_index(commands.add_parser("index", help="index tars where they lie"))
    _add_check(commands.add_parser("check", help="say what is wrong in a dataset, with pictures"))


def run_data(args: Arguments) -> int:
    return {"prepare": _run_prepare, "index": _run_index, "check": _run_check}[args.data_command](args)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


# --- prepare -----------------------------------------------------------------------------------


def _add_jsonl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR")
    _add_writing(parser)


def _add_karpathy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="JSON")
    _add_images(parser, "the folder of the pictures; of COCO, the one that has train2014/ and val2014/")
    parser.add_argument("--restval", metavar="SPLIT", help="where COCO's restval goes (default train)")
    _add_writing(parser)


def _add_coco(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", type=Path, metavar="JSON", help="captions_train2017.json …")
    _add_images(parser, "the folder of the pictures, or the one that has train2017/ …")
    parser.add_argument("--instances", nargs="+", type=Path, metavar="JSON", help="instances_train2017.json …: boxes")
    parser.add_argument("--split", metavar="SPLIT", help="of one captions file (default: by its name)")
    _add_writing(parser)


def _add_flickr30k_entities(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help="it has Sentences/, Annotations/, train.txt …")
    _add_images(parser, "the folder of the pictures")
    _add_writing(parser)


def _add_visual_genome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help="it has region_descriptions.json and image_data.json")
    _add_images(parser, "the folder that has VG_100K/ and VG_100K_2/, or the pictures")
    _add_writing(parser)


def _add_refcoco(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help="it has refs(BY).p and instances.json")
    _add_images(parser, "the folder of COCO's train2014 pictures")
    parser.add_argument("--refs", metavar="BY", help="google, umd or unc, where there are several refs files")
    _add_writing(parser)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR")
    parser.add_argument(
        "--template", metavar="TEXT", help="caption of a class, {} for its name (default 'a photo of a {}.')"
    )
    _add_writing(parser)


def _add_img2dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a tar, or URL/{00000..00099}.tar")
    parser.add_argument("--split", metavar="SPLIT", help="the name that the split gets (default train)")
    _add_decode(parser)
    _add_writing(parser)


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    for split, count in (("train", 4000), ("val", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"pictures (default {count})")
    parser.add_argument("--seed", type=int, metavar="N", help="another seed, other scenes (default 0)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of a picture (default 112)")
    _add_shard_size(parser)
    _add_processes(parser)


FORMATS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "jsonl": ("pictures in images/, captions.jsonl and, if there are boxes, regions.jsonl", _add_jsonl),
    "karpathy": ("dataset_*.json of COCO, Flickr8k or Flickr30k, and its pictures", _add_karpathy),
    "coco": ("captions_*.json, its pictures and, for boxes, instances_*.json", _add_coco),
    "flickr30k-entities": ("Flickr30k's Sentences/, Annotations/ (boxes) and pictures", _add_flickr30k_entities),
    "visual-genome": ("region_descriptions.json of Visual Genome, and its pictures", _add_visual_genome),
    "refcoco": ("refs(BY).p and instances.json of RefCOCOg, RefCOCO or RefCOCO+, and COCO's pictures", _add_refcoco),
    "folder": ("pictures with texts of the same names, or one folder a class", _add_folder),
    "img2dataset": ("tars, indexed where they lie; parquet files that hold pictures", _add_img2dataset),
    "scenes": ("rendered scenes with captions and boxes; nothing is needed", _add_scenes),
}
"""What each takes; what it does stands under the same name in `mmgem.data.prepare.FORMATS`."""


def _run_prepare(args: Arguments) -> int:
    from mmgem.data.prepare import FORMATS as readers

    own = ("command", "data_command", "format", "out", "source", "debug", "run")
    options = {name: value for name, value in vars(args).items() if name not in own and value is not None}
    source = [args.source] if "source" in args else []
    readers[args.format](*source, args.out, **options)
    return 0


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the dataset to write")
    parser.add_argument("--overwrite", action="store_true", help="replace splits that are there")


def _add_images(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help=text)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """The options of `WriteOptions`; what is not given is None, and has its default there."""
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits")
    parser.add_argument(
        "--split-by",
        metavar="SHARES|FILE",
        help="other splits than the source's: train=0.9,val=0.1; or a JSON file that lists them",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many samples a split")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="make the shorter side of larger pictures so long (JPEG)"
    )
    _add_shard_size(parser)
    _add_max_broken(parser)
    _add_processes(parser)


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard-size", type=int, metavar="N", help="samples a tar (default 1000)")


def _add_max_broken(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-broken", type=float, metavar="SHARE", help="share that may be broken (default 0.05)")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="how many work (default: one a CPU)")


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decode", action="store_true", help="decode every picture of a tar, not only its head (slow)")


# --- index -------------------------------------------------------------------------------------


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.description = "Index webdataset tars where they lie. They are not changed, and must stay there."
    parser.add_argument("source", metavar="SOURCE", help="a folder, a tar, or URL/{00000..00099}.tar")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the index goes (default: beside the tars)")
    _add_decode(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    _add_max_broken(parser)
    _add_processes(parser)
    add_debug(parser)


def _run_index(args: Arguments) -> int:
    from mmgem.data.prepare.img2dataset import index_folder

    options = {} if args.max_broken is None else {"max_broken": args.max_broken}
    index_folder(
        args.source, args.out, decode=args.decode, processes=args.processes, overwrite=args.overwrite, **options
    )
    return 0


# --- check -------------------------------------------------------------------------------------


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read a dataset, or a split of one, and say what is wrong; the exit code is then 1."
    parser.add_argument("location", metavar="LOCATION", help="a folder or URL")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these; needed for a dataset at a URL")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where check.html and check.json go (default LOCATION/check)"
    )
    parser.add_argument(
        "--no-decode",
        dest="decode",
        action="store_false",
        help="do not decode pictures: faster, but finds neither broken ones nor near duplicates",
    )
    _add_processes(parser)
    add_debug(parser)


def _run_check(args: Arguments) -> int:
    from mmgem.data.audit.check import check_data

    return check_data(args.location, out=args.out, processes=args.processes, decode=args.decode, splits=args.splits)
