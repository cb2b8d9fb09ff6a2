"""`mmgem data prepare`, `index` and `check` as a user runs them: arguments in; table, files and exit code out."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import coco, entities, genome, jsonl_folder, karpathy, laion, refcoco, save
from tiny import Finished, run

from mmgem.cli import main
from mmgem.cli_data import FORMATS as COMMANDS
from mmgem.data.prepare import FORMATS, WriteOptions
from mmgem.data.samples import Region
from mmgem.data.shards import ShardedDataset

Arguments = list[str | Path]
SPLIT_OF = {"101": "train", "102": "val", "103": "test"}
"""The pictures of the sample of Flickr30k."""


def table(printed: str) -> dict[str, list[int]]:
    """Split -> read, written, skipped, captions, regions."""
    lines = [line.split() for line in printed.splitlines()]
    head = lines.index(["split", "read", "written", "skipped", "captions", "regions"])
    rows = {}
    for name, *cells in lines[head + 1 :]:
        if len(cells) != 5 or not all(cell.isdigit() for cell in cells):
            break
        rows[name] = [int(cell) for cell in cells]
    return rows


def data(*arguments: str | Path) -> Finished:
    return run("data", *arguments)


# --- prepare: every format -----------------------------------------------------------------------


def of_jsonl(raw: Path) -> Arguments:
    return [jsonl_folder(raw)]


def of_karpathy(raw: Path) -> Arguments:
    images = entities(raw, {}) / "flickr30k-images"
    return [karpathy(raw / "dataset_flickr30k.json", SPLIT_OF), "--images", images]


def of_coco(raw: Path) -> Arguments:
    train, train_boxes = coco(raw, "train2017", [391895, 522418, 184613])
    val, val_boxes = coco(raw, "val2017", [139])
    return [train, val, "--images", raw / "images", "--instances", train_boxes, val_boxes]


def of_flickr30k_entities(raw: Path) -> Arguments:
    source = entities(raw, {split: [name] for name, split in SPLIT_OF.items()})
    return [source, "--images", source / "flickr30k-images"]


def of_visual_genome(raw: Path) -> Arguments:
    source, images = genome(raw, flat=False)
    return [source, "--images", images]


def of_refcoco(raw: Path) -> Arguments:
    source, images = refcoco(raw)
    return [source, "--images", images, "--refs", "umd"]


def of_folder(raw: Path) -> Arguments:
    for number, name in enumerate(["train/tabby-cat/1.jpg", "train/dog/1.jpg", "test/dog/2.png"]):
        save(raw / name, number)
    return [raw, "--template", "a picture of a {}"]


def of_img2dataset(raw: Path) -> Arguments:
    return [laion(raw), "--split", "pairs"]


def of_scenes(raw: Path) -> Arguments:
    return ["--train", "2", "--val", "1", "--test", "0", "--size", "64"]


CASES: dict[str, tuple[Callable[[Path], Arguments], dict[str, list[int]], list[str]]] = {
    "jsonl": (of_jsonl, {"train": [4, 4, 0, 8, 3], "val": [2, 2, 0, 4, 0]}, []),
    "karpathy": (of_karpathy, {"train": [1, 1, 0, 3, 0], "val": [1, 1, 0, 2, 0], "test": [1, 1, 0, 1, 0]}, []),
    "coco": (
        of_coco,
        {"train": [3, 3, 0, 6, 6], "val": [1, 1, 0, 2, 2]},
        ["dropped: 2 × crowd annotation"],
    ),
    "flickr30k-entities": (
        of_flickr30k_entities,
        {"train": [1, 1, 0, 3, 7], "val": [1, 1, 0, 2, 2], "test": [1, 1, 0, 1, 1]},
        ["dropped: 2 × entity without box"],
    ),
    "visual-genome": (
        of_visual_genome,
        {"train": [3, 3, 0, 0, 6]},
        ["pictures without captions: 3", "dropped: 1 × box outside image"],
    ),
    "refcoco": (of_refcoco, {"train": [1, 1, 0, 0, 3], "test": [1, 1, 0, 0, 1]}, ["pictures without captions: 2"]),
    "folder": (of_folder, {"test": [1, 1, 0, 1, 0], "train": [2, 2, 0, 2, 0]}, []),
    "img2dataset": (of_img2dataset, {"pairs": [6, 6, 0, 6, 0]}, []),
    "scenes": (of_scenes, {"train": [2, 2, 0, 10, 4], "val": [1, 1, 0, 5, 2]}, []),
}


@pytest.mark.parametrize("name", CASES)
def test_each_format(tmp_path: Path, name: str) -> None:
    make, wanted, notes = CASES[name]
    arguments = make(tmp_path / "raw")
    done = data("prepare", name, *arguments, "--out", tmp_path / "out", "--processes", "1")
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert table(done.out) == wanted
    assert set(notes) <= set(done.out.splitlines())
    assert done.out.splitlines()[-1].startswith(f"wrote {tmp_path / 'out'}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == wanted.keys()
    for split, (read, written, skipped, captions, regions) in wanted.items():
        dataset = ShardedDataset(tmp_path / "out" / split, verify=True)
        assert read == written + skipped and written == len(dataset)
        assert (captions, regions) == (dataset.totals["captions"], dataset.totals["regions"])
        samples = [dataset.sample(number) for number in range(written)]
        assert sum(len(sample.captions) for sample in samples) == captions
        assert sum(len(sample.regions) for sample in samples) == regions


def test_karpathy_and_flickr30k_entities_reproduce_each_other(tmp_path: Path) -> None:
    for name in ("karpathy", "flickr30k-entities"):
        arguments = [*CASES[name][0](tmp_path / name / "raw"), "--out", tmp_path / name / "out", "--processes", 1]
        assert main(["data", "prepare", name, *map(str, arguments)]) == 0
    for split in SPLIT_OF.values():
        one, two = (ShardedDataset(tmp_path / name / "out" / split) for name in ("karpathy", "flickr30k-entities"))
        assert one.keys == two.keys
        texts = [[re.sub(r"\s", "", text) for text in dataset.captions(0)] for dataset in (one, two)]
        assert texts[0] == texts[1]  # the tokens of Entities stand apart by spaces
        assert one.sample(0).image == two.sample(0).image


def test_what_is_skipped_is_in_the_table_and_named(tmp_path: Path) -> None:
    raw = jsonl_folder(tmp_path / "raw")
    (raw / "images/2_a.jpg").write_bytes(b"<html>")
    (raw / "images/5_a.jpg").unlink()
    arguments = ("prepare", "jsonl", raw, "--out", tmp_path / "out", "--processes", "1")
    done = data(*arguments)
    assert done.code == 2 and "1 of 6 samples are broken" in done.err
    done = data(*arguments, "--max-broken", "0.5")
    assert done.code == 0 and table(done.out) == {"train": [4, 3, 1, 6, 3], "val": [2, 1, 1, 2, 0]}
    assert "skipped: 1 × broken image: 2_a (not a picture)" in done.out.splitlines()
    assert re.search(r"^skipped: 1 × image file missing: 5_a \(.*5_a\.jpg: No such file", done.out, re.M)
    for split, key in (("train", "2_a"), ("val", "5_a")):
        assert [line["key"] for line in ShardedDataset(tmp_path / "out" / split).left_out()] == [key]


def test_options_of_writing(tmp_path: Path) -> None:
    raw, out = jsonl_folder(tmp_path / "raw", count=12), tmp_path / "out"
    listed = tmp_path / "splits.json"
    listed.write_text(json.dumps({"train": [f"{n}_a.jpg" for n in range(8)], "dev": ["8_a.jpg", "9_a.jpg"]}))
    options: Arguments = ["--resize", "16", "--split-by", listed, "--shard-size", "3", "--limit", "7"]
    done = data("prepare", "jsonl", raw, "--out", out, *options, "--splits", "train", "--processes", "2")
    assert done.code == 0 and table(done.out) == {"train": [7, 7, 0, 14, 3]}
    train = ShardedDataset(out / "train")
    assert train.sizes.tolist() == [3, 3, 1] and [path.name for path in out.iterdir()] == ["train"]
    sample = train.sample(0)
    assert (sample.width, sample.height) == (24, 16) and sample.regions[0] == Region((0, 0, 10, 10), "two men", "7")
    again = ("prepare", "jsonl", raw, "--out", out, "--limit", "1", "--splits", "train", "--processes", "1")
    done = data(*again)
    assert done.code == 2 and f"{out}/train is not empty: choose another --out, or give --overwrite" in done.err
    assert data(*again, "--overwrite").code == 0 and len(ShardedDataset(out / "train")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split-by", "train=0.9"], "--split-by train=0.9: the shares sum to 0.9, not to 1"),
        (["--splits", "tset"], "no split 'tset': leave out --splits to see all"),
        (["--processes", "0"], "processes is 0; give 1 or more"),
        (["--max-broken", "5"], "max_broken is 5; give a share from 0 to 1"),
    ],
)
def test_what_an_option_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    raw = jsonl_folder(tmp_path / "raw")
    assert main(["data", "prepare", "jsonl", str(raw), "--out", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mmgem: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_each_option_is_one_of_the_reader(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS.keys() == FORMATS.keys() == CASES.keys()
    for name, (_, add) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        add(parser)
        asked = {action.dest for action in parser._actions} - {"help", "source"} | {"out", "overwrite"}
        parameters = inspect.signature(FORMATS[name]).parameters.keys() - {"source"}
        if "options" in parameters:
            parameters = parameters - {"options"} | WriteOptions.__annotations__.keys()
        assert asked == parameters, name
        with pytest.raises(SystemExit):
            main(["data", "prepare", name, "--help"])
        assert "--out DIR" in capsys.readouterr().out


# --- index and check -----------------------------------------------------------------------------


def test_a_laion_folder_is_indexed_and_checked(tmp_path: Path) -> None:
    raw = laion(tmp_path / "laion", tars=3)
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    done = data("index", raw)
    assert done.code == 0 and table(done.out) == {"laion": [9, 9, 0, 9, 0]}, done.err
    assert {path.name for path in raw.iterdir()} == {*before, "index.json", "members"}
    assert all((raw / name).read_bytes() == content for name, content in before.items())
    assert ShardedDataset(raw, verify=True).captions(8) == ("Text 000020002",)
    done = data("index", raw)
    assert done.code == 2 and "index.json exists: choose another --out, or give --overwrite" in done.err
    done = data("index", raw, "--out", tmp_path / "elsewhere", "--decode", "--processes", "2")
    assert done.code == 0 and len(ShardedDataset(tmp_path / "elsewhere")) == 9
    done = data("check", raw)
    assert done.code == 0 and "nothing is wrong" in done.out.splitlines(), done.out
    assert (raw / "check/check.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((raw / "check/check.json").read_text())["passed"] is True


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for number, name in enumerate(["train/a.jpg", "train/b.jpg", "val/c.jpg", "val/d.jpg"]):
        save(raw / name, number % 3)  # d is a again
        (raw / name).with_suffix(".txt").write_text(f"picture {name}")
    assert data("prepare", "folder", raw, "--out", tmp_path / "set").code == 0
    done = data("check", tmp_path / "set", "--out", tmp_path / "page", "--processes", "1")
    assert done.code == 1
    assert "FAILS  leak: train and val share pictures (1 of train, 1 of val): train_a = val_d" in done.out.splitlines()
    page = (tmp_path / "page/check.html").read_text()
    assert "train_a" in page and "val_d" in page
    assert data("check", tmp_path / "set", "--splits", "val", "--no-decode").code == 0
    assert json.loads((tmp_path / "set/check/check.json").read_text())["splits"].keys() == {"val"}
    tar = tmp_path / "set/val/shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    done = data("check", tmp_path / "set", "--splits", "val")
    assert done.code == 1 and "shard-000000.tar" in done.out and "cut short" in done.out


def test_what_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["index", tmp_path], "no .tar in"),
        (["index", tmp_path / "none"], "no such folder"),
        (["check", tmp_path], "no split in"),
        (["check", tmp_path / "none"], "no such folder"),
    ):
        assert main(["data", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mmgem: error: ") and message in err and err.count("\n") == 1
