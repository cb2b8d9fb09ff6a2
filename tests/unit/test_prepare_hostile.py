"""Sources that would never end, never fit or never finish: each is refused, or the sample left out, in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from layouts import coco, entities, genome, save
from PIL import Image

from mmgem.data.prepare import (
    prepare_coco,
    prepare_flickr30k_entities,
    prepare_folder,
    prepare_jsonl,
    prepare_visual_genome,
)
from mmgem.data.prepare.flickr30k_entities import parse_sentences
from mmgem.data.samples import SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError

NAMES = ["a.jpg", "/dev/zero", "pipe.jpg", "nul\0.jpg", "\ud800.jpg", "x" * 300 + ".jpg", "folder.jpg", "long.jpg"]


def jsonl(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True)
    save(folder / "images" / "a.jpg")
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_picture_that_is_no_file_is_left_out_and_named(tmp_path: Path):
    source = jsonl(tmp_path / "raw", *({"image": name, "split": "train", "captions": ["x"]} for name in NAMES))
    os.mkfifo(source / "images" / "pipe.jpg")
    (source / "images" / "folder.jpg").mkdir()
    (source / "images" / "long.jpg").touch()
    os.truncate(source / "images" / "long.jpg", 1 << 34)
    result = prepare_jsonl(source, tmp_path / "out", processes=1, max_broken=1.0)
    assert result["skipped"] == {"image file missing": len(NAMES) - 1}
    dataset = ShardedDataset(tmp_path / "out" / "train")
    assert dataset.keys == ["a"]
    details = [line["detail"] for line in dataset.left_out()]
    wanted = ["not a file", "not a file", "null", "surrogates", "too long", "not a file", "17179869184 bytes"]
    assert all(want in detail for want, detail in zip(wanted, details, strict=True)), details


def test_a_text_that_never_ends_is_left_out(tmp_path: Path):
    for name in ("a", "b"):
        save(tmp_path / "raw" / f"{name}.jpg")
    (tmp_path / "raw" / "a.txt").write_text("caption")
    os.mkfifo(tmp_path / "raw" / "b.txt")
    result = prepare_folder(tmp_path / "raw", tmp_path / "out", processes=1, max_broken=1.0)
    assert result["skipped"] == {"text file missing": 1}


@pytest.mark.parametrize("depth", [66, 400, 970])
def test_json_that_is_nested_too_deep_for_other_processes_is_refused(tmp_path: Path, depth: int):
    line = {"image": "a.jpg", "split": "train", "captions": ["x"]}
    source = jsonl(tmp_path / "raw", line, {**line, "more": []})
    path = source / "captions.jsonl"
    path.write_text(path.read_text().replace("[]", "[" * depth + "]" * depth))
    with pytest.raises(UserError, match=r"captions\.jsonl, line 2: not JSON .(nested deeper|maximum recursion)"):
        prepare_jsonl(source, tmp_path / "out", processes=2)


@pytest.mark.parametrize(
    "box", [[10**400, 0, 1.5, 1], [int("9" * 4300), 0, int("9" * 4300), 1], ["a", 0, "b", 1], [1, 2, 3]]
)
def test_a_box_that_is_no_box_is_named_with_its_item(tmp_path: Path, box: list[Any]):
    captions, instances = coco(tmp_path, "val2017", [1, 2])
    content = json.loads(instances.read_text())
    content["annotations"][1]["bbox"] = box
    instances.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val2017\.json, annotations\[1\] is not an item of COCO"):
        prepare_coco([captions], tmp_path / "out", images=tmp_path / "images", instances=[instances])


def test_a_region_of_visual_genome_that_no_float_holds_is_named(tmp_path: Path):
    source, images = genome(tmp_path, flat=True)
    path = source / "region_descriptions.json"
    content = json.loads(path.read_text())
    content[1]["regions"][0] |= {"x": 10**400, "width": 1.5}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"region_descriptions\.json, item 1: OverflowError"):
        prepare_visual_genome(source, tmp_path / "out", images=images)


def test_a_split_whose_name_no_folder_can_have_is_refused(tmp_path: Path):
    source = jsonl(tmp_path / "raw", {"image": "a.jpg", "split": "a" * 300, "captions": ["x"]})
    with pytest.raises(UserError, match="cannot be a split"):
        prepare_jsonl(source, tmp_path / "out")
    whole = "訓" * 63
    source = jsonl(tmp_path / "other", {"image": "a.jpg", "split": whole, "captions": ["x"]})
    prepare_jsonl(source, tmp_path / "out", processes=1)
    assert ShardedDataset(tmp_path / "out" / whole).keys == ["a"]


def laughs(levels: int) -> str:
    """Entities of entities: the last would be 3 * 10^levels characters."""
    lines = ['<!ENTITY e0 "111">', *(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, levels + 1))]
    return f"<!DOCTYPE a [{''.join(lines)}]><annotation><size><width>&e{levels};</width></size></annotation>"


@pytest.mark.parametrize(
    "annotation",
    [
        laughs(9),
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///dev/zero">]><annotation>&e;</annotation>',
        "<a>" * 100_000,
    ],
)
def test_xml_that_grows_or_reaches_out_is_left_out(tmp_path: Path, annotation: str):
    source = entities(tmp_path, {})
    first = min((source / "Annotations").iterdir())
    first.write_text(annotation)
    images = source / "flickr30k-images"
    result = prepare_flickr30k_entities(source, tmp_path / "out", images=images, processes=1, max_broken=1.0)
    assert result["skipped"]["broken metadata"] == 1
    assert first.name in result["examples"]["broken metadata"][0]


def test_a_list_of_a_split_that_is_no_text_is_named(tmp_path: Path):
    source = entities(tmp_path, {})
    (source / "val.txt").write_bytes(b"\xff\xfe1\0")
    with pytest.raises(UserError, match=r"cannot read .*val\.txt"):
        prepare_flickr30k_entities(source, tmp_path / "out", images=source / "flickr30k-images")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["[/EN#" + "a" * 200_000, "[/EN#1/a b " * 100_000, "[/EN#1" + "/a" * 100_000])
def test_a_phrase_that_does_not_end_takes_no_time(text: str):
    """A backtracking pattern needs minutes for a tenth of these."""
    with pytest.raises(SampleError, match="does not end"):
        parse_sentences("k", text)
    assert parse_sentences("k", "[/EN#1/a/b x y] z")[1] == {("1", "x y"): ["a", "b"]}


def test_an_image_that_is_a_program_is_left_out(tmp_path: Path):
    source = jsonl(tmp_path / "raw", *({"image": n, "split": "train", "captions": ["x"]} for n in ("a.jpg", "b.eps")))
    Image.new("RGB", (8, 8)).save(source / "images" / "b.eps")
    result = prepare_jsonl(source, tmp_path / "out", processes=1, max_broken=1.0)
    assert result["examples"]["broken image"] == ["b (EPS is no picture)"]
