"""Readers of published formats: each from a tiny sample in its true layout, down to boxes, phrases and keys."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from layouts import as_json, coco, entities, genome, refcoco, save

from mmgem.data.prepare import (
    prepare_coco,
    prepare_flickr30k_entities,
    prepare_folder,
    prepare_refcoco,
    prepare_visual_genome,
)
from mmgem.data.prepare.flickr30k_entities import parse_sentences
from mmgem.data.prepare.visual_genome import items_of
from mmgem.data.samples import Region, SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError


def rows(result: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    names = ("read", "written", "captions", "regions", "images_without_captions")
    return {split: tuple(row[name] for name in names) for split, row in result["splits"].items()}


# --- coco --------------------------------------------------------------------------------------


def test_coco(tmp_path: Path):
    train, train_boxes = coco(tmp_path, "train2017", [391895, 522418, 184613])
    val, val_boxes = coco(tmp_path, "val2017", [139])
    instances = [val_boxes, train_boxes]  # in whatever order: they are paired by name
    result = prepare_coco([train, val], tmp_path / "out", images=tmp_path / "images", instances=instances)
    assert rows(result) == {"train": (3, 3, 6, 6, 0), "val": (1, 1, 2, 2, 0)}
    assert result["dropped"] == {"crowd annotation": 2} and result["skipped"] == {}
    dataset = ShardedDataset(tmp_path / "out/train")
    assert dataset.keys == ["000000391895", "000000522418", "000000184613"]
    sample = dataset.sample(1)
    assert sample.captions == ("Caption 0 of 522418.", "Caption 1 of 522418.")
    assert sample.regions == (
        Region((4.5, 8.25, 20.75, 40.75), "dog", "1422418"),
        Region((0.0, 0.0, 64.0, 48.0), "hair drier", "1432418"),
    )
    assert sample.image == (tmp_path / "images/train2017/000000522418.jpg").read_bytes()
    assert sample.meta == {"image": "000000522418.jpg", "cocoid": 522418}


def test_coco_captions_only_flat_and_named_by_option(tmp_path: Path):
    path, _ = coco(tmp_path, "val2017", [1, 2], nested=False)
    other = path.rename(path.with_name("mine.json"))
    with pytest.raises(UserError, match="give --split"):
        prepare_coco([other], tmp_path / "out", images=tmp_path / "images")
    result = prepare_coco(other, tmp_path / "out", images=tmp_path / "images", split="dev")
    assert rows(result) == {"dev": (2, 2, 4, 0, 0)}


def test_coco_pictures_of_one_name_in_two_files(tmp_path: Path):
    (train, _), (val, _) = coco(tmp_path, "train", [1, 2]), coco(tmp_path, "val", [2])
    prepare_coco([train, val], tmp_path / "out", images=tmp_path / "images")
    keys = [ShardedDataset(tmp_path / "out" / split).keys for split in ("train", "val")]
    assert keys == [["000000000001", "train_000000000002"], ["val_000000000002"]]


def test_broken_coco_sources(tmp_path: Path):
    path, boxes = coco(tmp_path, "val2017", [1, 2])
    other, _ = coco(tmp_path, "val2014", [3])
    images, out = tmp_path / "images", tmp_path / "out"
    with pytest.raises(UserError, match=r"val2014\.json: another file has made the split 'val'"):
        prepare_coco([path, other], out, images=images)
    with pytest.raises(UserError, match=r"instances_val2017\.json: no captions file"):
        prepare_coco([other], out, images=images, instances=[boxes, boxes.with_name("instances_x.json")])
    with pytest.raises(UserError, match="one captions file, not of 2"):
        prepare_coco([path, other], out, images=images, split="val")
    content = json.loads(boxes.read_text())
    del content["annotations"][1]["bbox"]
    with pytest.raises(UserError, match=r"annotations\[1\]: 'bbox' is missing"):
        prepare_coco(path, out, images=images, instances=[as_json(boxes, content)])
    content["annotations"][0]["category_id"] = 4
    with pytest.raises(UserError, match=r"annotations\[0\]: 4 is missing, or no item has this id"):
        prepare_coco(path, out, images=images, instances=[as_json(boxes, content)])
    with pytest.raises(UserError, match='no list "annotations"'):
        prepare_coco(as_json(path, {"images": []}), out, images=images)
    assert not out.exists()


# --- flickr30k-entities ------------------------------------------------------------------------


def test_flickr30k_entities(tmp_path: Path):
    source = entities(tmp_path / "raw", {"train": ["101"], "val": ["102"], "test": ["103"]})
    result = prepare_flickr30k_entities(source, tmp_path / "out", images=source / "flickr30k-images")
    assert rows(result) == {"train": (1, 1, 3, 7, 0), "val": (1, 1, 2, 2, 0), "test": (1, 1, 1, 1, 0)}
    assert result["dropped"] == {"entity without box": 2}  # 13 and 32
    sample = ShardedDataset(tmp_path / "out/train").sample(0)
    assert sample.key == "101" and sample.meta["image"] == "101.jpg"
    assert sample.captions[:2] == (
        "Two small robots wave at a red tram in the yard .",
        "Two robots , hats on , wave at each other .",
    )
    first, second, tram = (0.0, 1.0, 20.0, 40.0), (29.0, 1.0, 50.0, 40.0), (4.0, 0.0, 64.0, 48.0)
    assert sample.regions == (
        Region(first, "Two small robots", "11"),
        Region(second, "Two small robots", "11"),
        Region(tram, "a red tram", "12"),
        Region(first, "Two robots", "11"),
        Region(second, "Two robots", "11"),
        Region(second, "hats", "14"),
        Region(tram, "a tram", "12"),
    )
    extras = sample.meta["regions"]
    assert extras[0] == {"types": ["people"], "boxes_of_entity": 2}
    assert extras[2] == {"types": ["vehicles", "other"]} and extras[5] == {"types": ["clothing"]}


def test_flickr30k_entities_without_lists_or_out_of_them(tmp_path: Path):
    source = entities(tmp_path / "raw", {})
    images = source / "flickr30k-images"
    assert rows(prepare_flickr30k_entities(source, tmp_path / "all", images=images))["train"][:2] == (3, 3)
    entities(source, {"train": ["101"], "val": ["103"]})
    result = prepare_flickr30k_entities(source, tmp_path / "some", images=images)
    assert list(result["splits"]) == ["train", "val"]
    assert ShardedDataset(tmp_path / "some/val").keys == ["103"]
    entities(source, {"test": ["101"]})
    with pytest.raises(UserError, match=r"test\.txt: 101 is in train\.txt too"):
        prepare_flickr30k_entities(source, tmp_path / "twice", images=images)
    entities(source, {"test": ["104"]})
    result = prepare_flickr30k_entities(source, tmp_path / "missing", images=images, max_broken=0.5)
    assert result["skipped"] == {"text file missing": 1} and "104" in result["examples"]["text file missing"][0]


def test_broken_files_of_flickr30k_entities_are_named(tmp_path: Path):
    source = entities(tmp_path / "raw", {})
    images = source / "flickr30k-images"
    (source / "Annotations/101.xml").write_text("<annotation><size>")
    (source / "Annotations/102.xml").unlink()
    result = prepare_flickr30k_entities(source, tmp_path / "out", images=images, max_broken=0.9)
    assert result["skipped"] == {"broken metadata": 1, "text file missing": 1}
    left_out = list(ShardedDataset(tmp_path / "out/train").left_out())
    assert [line["key"] for line in left_out] == ["101", "102"] and "101.xml" in left_out[0]["detail"]
    with pytest.raises(SampleError, match="a phrase that does not end"):
        parse_sentences("k", "[/EN#1/people A man is here .")
    with pytest.raises(UserError, match="no such folder: .*Sentences"):
        prepare_flickr30k_entities(tmp_path, tmp_path / "out", images=images)


# --- visual-genome -----------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_visual_genome(tmp_path: Path, flat: bool):
    source, images = genome(tmp_path / "raw", flat)
    result = prepare_visual_genome(source, tmp_path / "out", images=images)
    assert rows(result) == {"train": (3, 3, 0, 6, 3)}
    assert result["dropped"] == {"box outside image": 1} and result["skipped"] == {}
    dataset = ShardedDataset(tmp_path / "out/train")
    assert dataset.keys == ["VG_100K_2_1", "VG_100K_2370463", "VG_100K_7"]
    sample = dataset.sample(0)
    assert sample.regions == (
        Region((4.0, 5.0, 24.0, 35.0), "thing 0"),
        Region((4.0, 5.0, 25.0, 35.0), "thing 1"),
    )
    assert sample.captions == () and sample.image == next(images.rglob("1.jpg")).read_bytes()
    assert sample.meta == {"image_id": 1, "flickr_id": 2, "image": "VG_100K_2/1.jpg"}


def test_visual_genome_1_0(tmp_path: Path):
    """Its fields had other names."""
    source, images = genome(tmp_path / "raw", flat=False)
    described, known = (
        json.loads((source / f"{name}.json").read_text()) for name in ("region_descriptions", "image_data")
    )
    for region in (region for item in described for region in item["regions"]):
        region["id"], region["image"] = region.pop("region_id"), region.pop("image_id")
    for item in known:
        item["id"] = item.pop("image_id")
    as_json(source / "region_descriptions.json", described)
    as_json(source / "image_data.json", known)
    assert rows(prepare_visual_genome(source, tmp_path / "out", images=images)) == {"train": (3, 3, 0, 6, 3)}
    sample = ShardedDataset(tmp_path / "out/train").sample(0)
    assert sample.meta == {"image_id": 1, "flickr_id": 2, "image": "VG_100K_2/1.jpg"}


def test_visual_genome_refuses(tmp_path: Path):
    source, images = genome(tmp_path / "raw", flat=False)
    whole = (source / "region_descriptions.json").read_text()
    for text, message in (
        (whole[:-1], "no whole JSON list, it ends or breaks after 3 items"),
        (whole[: len(whole) // 2], "no whole JSON list, it ends or breaks after 1 items"),
        (whole.replace('"id": 7', '"id": 8'), "item 2: KeyError.*image_data.json"),
        ("{}", "no whole JSON list"),
        ("", "no whole JSON list"),
        ("[]", "nothing to write"),
    ):
        (source / "region_descriptions.json").write_text(text)
        with pytest.raises(UserError, match=message):
            prepare_visual_genome(source, tmp_path / "out", images=images)
    for content, message in (({}, "a list of images"), ([{"url": "x"}], "item 0: an image with image_id")):
        as_json(source / "image_data.json", content)
        with pytest.raises(UserError, match=message):
            prepare_visual_genome(source, tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at_once", [7, 30, 1000])
def test_a_list_is_parsed_item_by_item(tmp_path: Path, at_once: int):
    file = tmp_path / "x.json"
    items = [{"a": [1, {"b": "],["}]}, {}, {"größe": "\\u00e9,"}, [2], None]
    file.write_text(
        "\ufeff [\n" + " ,\t".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n] ", "utf-8"
    )
    if at_once >= 30:
        assert list(items_of(file, at_once)) == items
    else:
        with pytest.raises(UserError, match="after 0 items"):  # an item is larger
            list(items_of(file, at_once))
    for text in ("[]", " [ ] "):
        file.write_text(text)
        assert list(items_of(file, at_once)) == []


# --- folder ------------------------------------------------------------------------------------


def test_folder_of_pictures_with_texts(tmp_path: Path):
    source = tmp_path / "raw"
    for number, name in enumerate(["b.jpg", "a.png", "deep/er/c.jpeg", "deep/no_text.jpg", ".hidden/x.jpg"]):
        save(source / name, number)
    for name, text in (("b", "first\n\n second \n"), ("a", "Größe"), ("deep/er/c", "one\r\ntwo")):
        (source / f"{name}.txt").write_text(text, encoding="utf-8")
    (source / "deep/notes.txt").write_text("of no picture")
    result = prepare_folder(source, tmp_path / "out", max_broken=0.5)
    assert rows(result) == {"train": (4, 3, 5, 0, 0)} and result["skipped"] == {"text file missing": 1}
    dataset = ShardedDataset(tmp_path / "out/train")
    assert dataset.keys == ["a", "b", "deep_er_c"]
    assert [dataset.captions(n) for n in range(3)] == [("Größe",), ("first", "second"), ("one", "two")]
    assert [line["key"] for line in dataset.left_out()] == ["deep_no_text"]


def test_folder_of_classes(tmp_path: Path):
    source = tmp_path / "raw"
    for number, name in enumerate(["golden_retriever/1.jpg", "birds/blue-jay/1.jpg", "birds/blue-jay/2.jpg", "x.jpg"]):
        save(source / name, number)
    result = prepare_folder(source, tmp_path / "out", template="a picture of the {}", max_broken=0.5)
    assert result["skipped"] == {"no caption and no region": 1} and result["examples"] == {
        "no caption and no region": ["x"]
    }
    dataset = ShardedDataset(tmp_path / "out/train")
    assert dataset.keys == ["birds_blue-jay_1", "birds_blue-jay_2", "golden_retriever_1"]
    assert dataset.captions(0) == ("a picture of the blue jay",)
    assert dataset.sample(2).meta == {"image": "golden_retriever/1.jpg", "class": "golden retriever"}
    with pytest.raises(UserError, match="write {} once"):
        prepare_folder(source, tmp_path / "out2", template="a dog")
    with pytest.raises(UserError, match="nothing to write"):
        (tmp_path / "empty").mkdir()
        prepare_folder(tmp_path / "empty", tmp_path / "out2")


def test_first_folders_named_like_splits_are_the_splits(tmp_path: Path):
    for number, name in enumerate(["train/cat/1.jpg", "train/dog/2.jpg", "valid/cat/1.jpg"]):
        save(tmp_path / "raw" / name, number)
    assert list(rows(prepare_folder(tmp_path / "raw", tmp_path / "out"))) == ["train", "valid"]
    valid = ShardedDataset(tmp_path / "out/valid")
    assert valid.keys == ["valid_cat_1"] and valid.captions(0) == ("a photo of a cat.",)


# --- refcoco -----------------------------------------------------------------------------------


def test_refcoco(tmp_path: Path):
    source, images = refcoco(tmp_path)
    result = prepare_refcoco(source, tmp_path / "out", images=images, refs="umd")
    assert rows(result) == {"train": (1, 1, 0, 3, 1), "test": (1, 1, 0, 1, 1)}
    sample = ShardedDataset(tmp_path / "out/train").sample(0)
    assert sample.regions == (
        Region((4.5, 8.25, 20.75, 40.75), "the left dog", "11"),
        Region((4.5, 8.25, 20.75, 40.75), "dog in the caf\u00e9", "11"),
        Region((0.0, 0.0, 64.0, 48.0), "all of it", "12"),
    )
    assert sample.meta["cocoid"] == 1 and sample.key == "COCO_train2014_000000000001"


def test_refcoco_refuses(tmp_path: Path):
    source, images = refcoco(tmp_path)

    def refused(message: str, refs: str | None = None) -> None:
        with pytest.raises(UserError, match=message):
            prepare_refcoco(source, tmp_path / "out", images=images, refs=refs)

    refused("name one refs file with --refs: google, umd")
    refused("name one refs file with --refs: google, umd", "unc")
    refused(r"refs\(google\).p is no refs file of REFER.*posix.system, which could run code", "google")
    file = source / "refs(umd).p"
    file.write_bytes(file.read_bytes()[:50])
    refused("is no refs file of REFER", "umd")
    file.write_bytes(pickle.dumps({"no": "list"}))
    refused("a list of objects is expected", "umd")
    file.write_bytes(pickle.dumps([{"image_id": 1, "ann_id": 99, "split": "val", "sentences": []}]))
    refused(r"item 0: KeyError\(99\); it needs an image and a box", "umd")
    file.write_bytes(pickle.dumps([{"image_id": 1, "ann_id": 21, "split": "val", "sentences": []}]))
    refused("object 21 is of picture 2, not of 1", "umd")
    (source / "instances.json").write_text('{"images": [{"id": [1], "file_name": "x"}], "annotations": []}')
    refused(r"images\[0\]: id \[1\] is neither a number nor a text", "umd")
