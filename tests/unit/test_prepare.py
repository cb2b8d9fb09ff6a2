"""Readers: each public format becomes shards; broken input is named, counted or refused."""

from __future__ import annotations

import inspect
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import jsonl_folder, lines, picture
from PIL import Image

from mmgem.data.prepare import FORMATS, prepare_jsonl
from mmgem.data.prepare.reading import Record, safe_key
from mmgem.data.prepare.scenes import prepare_scenes
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.data.samples import Region, decode_image
from mmgem.data.scenes import render_scene
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError

COLUMNS = ("read", "written", "captions", "regions", "images_without_captions")


def edit(folder: Path, name: str, change: Callable[[list[dict]], Any]) -> None:
    items = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    change(items)
    lines(folder / name, items)


def test_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = jsonl_folder(tmp_path / "raw")
    result = prepare_jsonl(source, tmp_path / "out")
    assert [list(row.items()) for row in result["splits"].values()] == [
        list(zip(COLUMNS, (4, 4, 8, 3, 0), strict=True)),
        list(zip(COLUMNS, (2, 2, 4, 0, 0), strict=True)),
    ]
    assert result["skipped"] == result["dropped"] == {}
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["0_a", "1_a", "2_a", "3_a"]
    first = train.sample(0)
    assert first.captions == ("picture 0 .", "Number 0")
    assert first.image == (source / "images" / "0_a.jpg").read_bytes()
    assert first.regions == (
        Region((0.0, 0.0, 20.0, 20.0), "two men", "7"),
        Region((20.0, 0.0, 40.0, 20.0), "two men", "7"),
    )
    assert first.meta["image"] == "0_a.jpg"
    assert first.meta["regions"] == [{"types": ["people"], "boxes_of_entity": 2}] * 2
    assert train.sample(1).regions == (Region((1.5, 2.0, 30.0, 31.0), "a dog", None),)
    assert ShardedDataset(tmp_path / "out" / "val").keys == ["4_a", "5_a"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["split", "read", "written", "skipped", "captions", "regions"]
    assert printed[1].split() == ["train", "4", "4", "0", "8", "3"]


def test_jsonl_without_regions(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw")
    (source / "regions.jsonl").unlink()
    prepare_jsonl(source, tmp_path / "out")
    assert not ShardedDataset(tmp_path / "out" / "train").has_regions


def test_jsonl_regions_on_the_line_of_the_captions(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw")
    (source / "regions.jsonl").unlink()
    regions = [{"box": [1, 2, 30, 31], "phrase": "a dog", "entity_id": 3, "types": ["animals"]}]
    edit(source, "captions.jsonl", lambda items: items[0].update(regions=regions))
    assert prepare_jsonl(source, tmp_path / "out")["splits"]["train"]["regions"] == 1
    sample = ShardedDataset(tmp_path / "out" / "train").sample(0)
    assert sample.regions == (Region((1.0, 2.0, 30.0, 31.0), "a dog", "3"),)
    assert sample.meta["regions"] == [{"types": ["animals"]}]
    lines(source / "regions.jsonl", [{"image": "0_a.jpg", "split": "train", **regions[0]}])
    with pytest.raises(UserError, match=r"captions\.jsonl, line 1: 0_a\.jpg has regions here and in regions\.jsonl"):
        prepare_jsonl(source, tmp_path / "other")


def test_a_picture_with_boxes_only_is_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = jsonl_folder(tmp_path / "raw")
    edit(source, "captions.jsonl", lambda items: items.pop(1))
    result = prepare_jsonl(source, tmp_path / "out")
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["0_a", "2_a", "3_a", "1_a"]
    assert train.sample(3).captions == () and len(train.sample(3).regions) == 1
    assert result["splits"]["train"]["images_without_captions"] == 1
    assert train.totals["images_without_captions"] == 1
    assert "pictures without captions: 1" in capsys.readouterr().out


def test_pictures_of_one_name_in_several_folders(tmp_path: Path):
    """Visual Genome's VG_100K/1.jpg and VG_100K_2/1.jpg, say; only what makes the same key is a duplicate."""
    source, names = tmp_path / "raw", ["1.jpg", "a/1.jpg", "b/1.jpg", "a/b_c.jpg", "a_b/c.jpg", "v1.0/1.jpg"]
    for n, name in enumerate(names):
        (source / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "images" / name).write_bytes(picture(n))
    listed = [{"image": name, "split": "train", "captions": [f"picture {n}"]} for n, name in enumerate(names)]
    lines(source / "captions.jsonl", listed)
    lines(source / "regions.jsonl", [{"image": "b/1.jpg", "split": "train", "box": [0, 0, 9, 9], "phrase": "a dog"}])
    result = prepare_jsonl(source, tmp_path / "out", max_broken=0.5)
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["1", "a_1", "b_1", "a_b_c", "v1_0_1"]
    assert result["skipped"] == {"duplicate key": 1} and result["examples"] == {"duplicate key": ["a_b_c"]}
    for index, number in enumerate([0, 1, 2, 3, 5]):
        sample = train.sample(index)
        assert sample.image == picture(number) and sample.captions == (f"picture {number}",)
        assert sample.meta["image"] == names[number]
    assert [len(train.sample(i).regions) for i in range(5)] == [0, 0, 1, 0, 0]
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{key}.{kind}" for key in train.keys for kind in ("jpg", "json")]


def test_splits_limit_and_shard_size(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw", count=8)
    result = prepare_jsonl(source, tmp_path / "out", splits=["train"], limit=5, shard_size=2)
    assert list(result["splits"]) == ["train"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"]
    assert ShardedDataset(tmp_path / "out" / "train").keys == [f"{n}_a" for n in range(5)]
    assert len(list((tmp_path / "out" / "train").glob("shard-*.tar"))) == 3
    with pytest.raises(UserError, match="no split 'tset'"):
        prepare_jsonl(source, tmp_path / "other", splits=["tset"])


def test_broken_samples_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = jsonl_folder(tmp_path / "raw", count=9)
    images = source / "images"
    (images / "0_a.jpg").write_bytes(picture(0)[:-700])
    (images / "1_a.jpg").unlink()
    (images / "2_a.jpg").write_bytes(b"")

    def change(items: list[dict]) -> None:
        items[3]["captions"] = ["", " "]
        items[4]["captions"].append("")
        items.insert(6, dict(items[5]))

    edit(source, "captions.jsonl", change)
    lines(
        source / "regions.jsonl",
        [
            {"image": "4_a.jpg", "split": "train", "box": [90, 0, 99, 9], "phrase": "gone"},
            {"image": "4_a.jpg", "split": "train", "box": [9, 9, 9, 20], "phrase": "flat"},
            {"image": "4_a.jpg", "split": "train", "box": [0, 0, 99, 9], "phrase": "clipped"},
        ],
    )
    result = prepare_jsonl(source, tmp_path / "out", max_broken=0.5)
    assert result["skipped"] == {
        "broken image": 1,
        "image file missing": 1,
        "empty image": 1,
        "no caption and no region": 1,
        "duplicate key": 1,
    }
    assert result["dropped"] == {
        "empty caption": 3,
        "box outside image": 1,
        "box without area": 1,
    }
    assert result["splits"]["train"]["read"] == 8 and result["splits"]["train"]["written"] == 3
    assert result["examples"]["broken image"][0].startswith("0_a (")
    assert str(images / "1_a.jpg") in result["examples"]["image file missing"][0]
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["4_a", "5_a", "6_a"]
    assert train.sample(0).regions == (Region((0.0, 0.0, 48.0, 9.0), "clipped"),)
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert index["skipped"] == result["skipped"] and index["dropped"] == result["dropped"]
    printed = capsys.readouterr().out
    assert "skipped: 1 × broken image: 0_a (" in printed
    assert "dropped: 3 × empty caption" in printed


def test_too_many_broken_samples_stop_it(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw", count=8)
    for n in (0, 1):
        (source / "images" / f"{n}_a.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"2 of 8 samples are broken.*0_a.*--max-broken") as caught:
        prepare_jsonl(source, tmp_path / "out", max_broken=0.125)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("index.json"))
    assert prepare_jsonl(source, tmp_path / "out", max_broken=0.25)["skipped"]["broken image"] == 2
    with pytest.raises(UserError, match="max_broken is 5; give a share"):
        prepare_jsonl(source, tmp_path / "other", max_broken=5)


def test_a_size_that_is_not_the_pictures(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw")

    def change(items: list[dict]) -> None:
        items[0]["width"] = items[2]["width"] = 96

    edit(source, "captions.jsonl", change)
    result = prepare_jsonl(source, tmp_path / "out", max_broken=0.5)
    # with boxes, they would be of another picture; without, the size is put right
    assert result["skipped"] == {"size differs from record": 1}
    assert result["examples"] == {"size differs from record": ["0_a (record 96x32, picture 48x32)"]}
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["1_a", "2_a", "3_a"]
    assert (train.sample(1).width, train.sample(1).height) == (48, 32)


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw")
    prepare_jsonl(source, tmp_path / "out", splits=["val"])
    before = ShardedDataset(tmp_path / "out" / "val").checksum
    with pytest.raises(UserError, match=r"val is not empty.*--overwrite"):
        prepare_jsonl(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()  # refused before the first picture
    assert ShardedDataset(tmp_path / "out" / "val").checksum == before
    prepare_jsonl(source, tmp_path / "out", splits=["val"], limit=1, overwrite=True)
    assert len(ShardedDataset(tmp_path / "out" / "val")) == 1


@pytest.mark.parametrize("name", ["captions.jsonl", "regions.jsonl"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": ', "line 3: not JSON"),
        ("\xff", "line 3: not JSON"),
        ("[1]", "line 3: an object is expected"),
        ('{"split": "train", "captions": ["x"]}', "line 3: no 'image'"),
        ('{"image": "0_a.jpg", "captions": ["x"]}', "line 3: no 'split'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: str, message: str):
    source = jsonl_folder(tmp_path / "raw")
    listed = (source / name).read_bytes().splitlines()
    listed[2:2] = [line.encode("latin-1")]
    (source / name).write_bytes(b"\n".join(listed))
    with pytest.raises(UserError) as caught:
        prepare_jsonl(source, tmp_path / "out")
    assert f"{source / name}, {message}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_captions_must_be_a_list(tmp_path: Path):
    source = jsonl_folder(tmp_path / "raw")
    edit(source, "captions.jsonl", lambda items: items[1].pop("captions"))
    with pytest.raises(UserError, match="line 2: no list of captions"):
        prepare_jsonl(source, tmp_path / "out")


def test_missing_jsonl_sources(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such folder: .*raw; it should have images/"):
        prepare_jsonl(tmp_path / "raw", tmp_path / "out")
    source = jsonl_folder(tmp_path / "raw")
    (source / "captions.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot read .*captions\.jsonl"):
        prepare_jsonl(source, tmp_path / "out")
    (source / "captions.jsonl").write_text("\n")
    (source / "regions.jsonl").unlink()
    with pytest.raises(UserError, match="nothing to write"):
        prepare_jsonl(source, tmp_path / "out")


def test_scenes(tmp_path: Path):
    result = prepare_scenes(tmp_path / "one", train=5, val=2, test=0, seed=3, size=64, processes=1, shard_size=4)
    assert {name: row["written"] for name, row in result["splits"].items()} == {
        "train": 5,
        "val": 2,
    }
    train = ShardedDataset(tmp_path / "one" / "train")
    assert train.keys == [f"train-{n:06d}" for n in range(5)] and train.has_regions
    scene, sample = render_scene(3, "train", 4, size=64), train.sample(4)
    assert sample.captions == tuple(scene.captions)
    assert [(r.box, r.phrase) for r in sample.regions] == [(tuple(map(float, r.box)), r.phrase) for r in scene.regions]
    assert sample.meta["ground"] == scene.ground
    assert [thing["shape"] for thing in sample.meta["objects"]] == [o.shape for o in scene.objects]
    found, drawn = np.asarray(decode_image(sample), int), np.asarray(scene.image, int)
    assert np.abs(found - drawn).mean() < 4  # JPEG, but the very picture
    other = prepare_scenes(tmp_path / "other", train=1, val=0, test=0, seed=4, size=64)
    assert other["splits"]["train"]["written"] == 1
    assert ShardedDataset(tmp_path / "other" / "train").captions(0) != train.captions(0)


def test_scenes_are_the_same_on_any_number_of_processes(tmp_path: Path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        prepare_scenes(out, train=70, val=0, test=3, size=48, processes=processes)
    for split in ("train", "test"):
        one, two = (ShardedDataset(tmp_path / n / split).checksum for n in ("1", "2"))
        assert one == two


def test_scenes_refuse(tmp_path: Path):
    with pytest.raises(UserError, match="not all 0"):
        prepare_scenes(tmp_path / "out", train=0, val=0, test=0)
    with pytest.raises(UserError, match="counts of 0 or more"):
        prepare_scenes(tmp_path / "out", train=-1)
    with pytest.raises(UserError, match="size"):
        prepare_scenes(tmp_path / "out", train=1, size=1)
    (tmp_path / "out" / "val").mkdir(parents=True)
    (tmp_path / "out" / "val" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        prepare_scenes(tmp_path / "out", train=1, val=1)
    assert not (tmp_path / "out" / "train").exists()


def test_other_picture_formats_are_stored_as_png(tmp_path: Path):
    data = picture(1, "BMP")
    prepare(lambda: [Record("a", "train", data, "a bitmap")], tmp_path)
    sample = ShardedDataset(tmp_path / "train").sample(0)
    assert sample.image.startswith(b"\x89PNG")
    original = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(sample)), original)


def test_a_picture_in_two_splits_is_taken_once(tmp_path: Path):
    records = [Record("a", split, picture(), "x") for split in ("train", "val")]
    records.append(Record("b", "val", picture(1), "y"))
    result = prepare(lambda: records, tmp_path)
    assert result["skipped"] == {"duplicate key": 1}
    assert ShardedDataset(tmp_path / "val").keys == ["b"]


def test_keys_from_file_names():
    assert safe_key("1000268201_693b08cb0e.jpg") == "1000268201_693b08cb0e"
    assert safe_key("My photo.v2.JPG") == "My_photo_v2"
    assert safe_key("val/My photo.v2.JPG") == "val_My_photo_v2"
    assert safe_key("v1.0/a/1.jpg") == "v1_0_a_1" and safe_key("./1.jpg") == "1"
    assert safe_key("größe-緑.png") == "größe-緑"


def test_formats_have_one_kind_of_signature():
    shared: dict[str, set[str]] = {}
    for name, function in FORMATS.items():
        parameters = inspect.signature(function).parameters
        positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == (["out"] if name == "scenes" else ["source", "out"])
        assert parameters.keys() & {"overwrite", "options"}, name
        described = (function.__doc__ or "").replace(",", ":")
        for parameter in parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
                text = f"{parameter.annotation} = {parameter.default}"
                shared.setdefault(parameter.name, set()).add(text)
                assert f"{parameter.name}:" in described, f"{name}: option {parameter.name} is not described"
    shared.pop("split", None)
    assert {name: kinds for name, kinds in shared.items() if len(kinds) > 1} == {}
    of_all = set(inspect.signature(prepare).parameters) - {"records", "out", "plan", "load"}
    assert of_all == set(WriteOptions.__annotations__)
    assert all(f"{name}:" in (WriteOptions.__doc__ or "") for name in of_all)


def test_real_photos(tmp_path: Path):
    root = os.environ.get("MMGEM_TEST_DATA", "")
    source = Path(root) / "data" / "flickr8k"
    if not root or not source.is_dir():
        pytest.skip("MMGEM_TEST_DATA names no folder with data/flickr8k")
    result = prepare_jsonl(source, tmp_path / "out", limit=40)
    assert {name: row["read"] for name, row in result["splits"].items()} == {"train": 40, "val": 40}
    val = ShardedDataset(tmp_path / "out" / "val")
    for index in range(len(val)):
        sample = val.sample(index)
        assert len(sample.captions) == 5
        assert decode_image(sample).size == (sample.width, sample.height)
        for region in sample.regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 < x2 <= sample.width and 0 <= y1 < y2 <= sample.height
            assert region.entity is not None
