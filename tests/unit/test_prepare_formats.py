"""Readers of published formats: each from a tiny sample in its true layout, down to boxes, phrases and keys."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmgem.data.prepare import (
    prepare_coco,
    prepare_flickr30k_entities,
    prepare_folder,
    prepare_karpathy,
    prepare_visual_genome,
)
from mmgem.data.prepare.flickr30k_entities import parse_sentences
from mmgem.data.prepare.visual_genome import items_of
from mmgem.data.samples import Region, SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError


def save(path: Path, number: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of its own, whose bytes are given back."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {".png": "PNG"}.get(path.suffix, "JPEG"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def as_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def rows(result: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    names = ("read", "written", "captions", "regions", "images_without_captions")
    return {split: tuple(row[name] for name in names) for split, row in result["splits"].items()}


# --- coco --------------------------------------------------------------------------------------


def coco(folder: Path, split: str, numbers: list[int], nested: bool = True) -> tuple[Path, Path]:
    """annotations/captions_SPLIT.json and instances_SPLIT.json, as COCO 2017 has them, and the pictures."""
    images, captions, boxes = [], [], []
    for n in numbers:
        name = f"{n:012d}.jpg"
        save(folder / (f"images/{split}" if nested else "images") / name, n)
        images.append({"license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                       "height": 48, "width": 64, "date_captured": "2013-11-14 17:02:52", "id": n})  # fmt: skip
        captions += [{"image_id": n, "id": 10 * n + i, "caption": f"Caption {i} of {n}. "} for i in range(2)]
        outline = [[1.0, 2.0, 30.0, 2.0, 30.0, 40.0]]
        common = {"image_id": n, "segmentation": outline, "area": 100.5}
        boxes += [
            {**common, "iscrowd": 0, "bbox": [4.5, 8.25, 16.25, 32.5], "category_id": 18, "id": 900000 + n},
            {**common, "iscrowd": 0, "bbox": [0, 0, 64, 48], "category_id": 90, "id": 910000 + n},
        ]
    boxes.append({**boxes[0], "segmentation": {"counts": [1], "size": [48, 64]}, "iscrowd": 1, "id": 920000})
    categories = [{"supercategory": "animal", "id": 18, "name": "dog"},
                  {"supercategory": "indoor", "id": 90, "name": "hair drier"}]  # fmt: skip
    common = {"info": {"year": 2017}, "licenses": [], "images": images}
    return (
        as_json(folder / f"annotations/captions_{split}.json", {**common, "annotations": captions}),
        as_json(
            folder / f"annotations/instances_{split}.json", {**common, "annotations": boxes, "categories": categories}
        ),
    )


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

SENTENCES = {
    "101": """[/EN#11/people Two small robots] wave at [/EN#12/vehicles/other a red tram] in [/EN#13/scene the yard] .
[/EN#11/people Two robots] , [/EN#14/clothing hats] on , wave at [/EN#0/notvisual each other] .
[/EN#11/people Two small robots] and [/EN#12/other a tram] 's driver .
""",
    "102": "[/EN#21/animals A cat] sleeps on [/EN#22/other a shelf] .\nNothing is marked here .\n",
    "103": "[/EN#31/people A woman] reads [/EN#32/other a book] .\n",
}
OBJECTS = {
    "101": [(("11",), (1, 2, 20, 40)), (("11", "14"), (30, 2, 50, 40)), (("12",), (5, 1, 64, 48)), (("13",), None)],
    "102": [(("21",), (3, 4, 10, 12)), (("22",), (1, 1, 64, 48))],
    "103": [(("31",), (10, 10, 20, 20)), (("32",), None)],
}
RAW = {
    "101": ["Two small robots wave at a red tram in the yard.", "Two robots, hats on, wave at each other.",
            "Two small robots and a tram's driver."],
    "102": ["A cat sleeps on a shelf.", "Nothing is marked here."],
    "103": ["A woman reads a book."],
}  # fmt: skip


def entities(folder: Path, lists: dict[str, list[str]]) -> Path:
    """Annotations/, Sentences/ and the lists, as the annotations.zip and the repository have them."""
    for number, name in enumerate(SENTENCES):
        save(folder / f"flickr30k-images/{name}.jpg", number)
        objects = []
        for names, box in OBJECTS[name]:
            inner = "".join(f"\t\t<name>{entity}</name>\n" for entity in names)
            if box is None:
                inner += "\t\t<scene>1</scene>\n\t\t<nobndbox>0</nobndbox>\n"
            else:
                corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                inner += "\t\t<bndbox>" + "".join(f"<{tag}>{at}</{tag}>" for tag, at in corners) + "</bndbox>\n"
            objects.append(f"\t<object>\n{inner}\t</object>\n")
        size = "\t<size>\n\t\t<width>64</width>\n\t\t<height>48</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        xml = f"<annotation>\n\t<filename>{name}.jpg</filename>\n{size}{''.join(objects)}</annotation>\n"
        for kind, text in (("Annotations/{}.xml", xml), ("Sentences/{}.txt", SENTENCES[name])):
            path = folder / kind.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


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


def test_karpathy_and_flickr30k_entities_give_the_same_pictures_splits_and_captions(tmp_path: Path):
    splits = {"101": "train", "102": "val", "103": "test"}
    source = entities(tmp_path / "raw", {split: [name] for name, split in splits.items()})
    images = source / "flickr30k-images"
    listed = [
        {"sentids": [], "imgid": n, "sentences": [{"raw": raw, "imgid": n, "sentid": 0} for raw in RAW[name]],
         "split": splits[name], "filename": f"{name}.jpg"}
        for n, name in enumerate(splits)
    ]  # fmt: skip
    path = as_json(tmp_path / "dataset_flickr30k.json", {"images": listed, "dataset": "flickr30k"})
    prepare_karpathy(path, tmp_path / "karpathy", images=images)
    prepare_flickr30k_entities(source, tmp_path / "entities", images=images)
    for split in splits.values():
        one, two = (ShardedDataset(tmp_path / kind / split) for kind in ("karpathy", "entities"))
        assert one.keys == two.keys
        captions = [[re.sub(r"\s", "", c) for c in dataset.captions(0)] for dataset in (one, two)]
        assert captions[0] == captions[1]
        assert one.sample(0).image == two.sample(0).image


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


def genome(folder: Path, flat: bool) -> tuple[Path, Path]:
    pictures = {1: ("VG_100K_2", "1.jpg"), 2370463: ("VG_100K", "2370463.jpg"), 7: ("VG_100K", "7.jpg")}
    described, known = [], []
    for name, (part, file) in pictures.items():
        save(folder / "images" / ("" if flat else part) / file, name)
        url = f"https://cs.stanford.edu/people/rak248/{part}/{file}"
        known.append({"width": 64, "url": url, "height": 48, "image_id": name, "coco_id": None, "flickr_id": name + 1})
        regions = [
            {"region_id": 10 * name + i, "width": 20 + i, "height": 30, "image_id": name, "phrase": f"thing {i}",
             "y": 5, "x": 4} for i in range(2)
        ]  # fmt: skip
        described.append({"regions": regions, "id": name})
    described[1]["regions"].append({**described[1]["regions"][0], "x": 70, "phrase": "beyond the border"})
    as_json(folder / "region_descriptions.json", described)
    as_json(folder / "image_data.json", known)
    return folder, folder / "images"


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


def test_visual_genome_refuses(tmp_path: Path):
    source, images = genome(tmp_path / "raw", flat=False)
    whole = (source / "region_descriptions.json").read_text()
    for text, message in (
        (whole[:-1], "no whole list, it ends or breaks"),
        (whole[: len(whole) // 2], "not JSON"),
        (whole.replace('"id": 7', '"id": 8'), "item 2: KeyError.*image_data.json"),
        ("{}", "no whole list"),
        ("[]", "nothing to write"),
    ):
        (source / "region_descriptions.json").write_text(text)
        with pytest.raises(UserError, match=message):
            prepare_visual_genome(source, tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()
    assert list(items_of(Path("x"), ' [\n 1 , {"a": []}\n,[2]] ')) == [1, {"a": []}, [2]]


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
    for number, name in enumerate(["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/1.jpg"]):
        save(tmp_path / "raw" / name, number)
    assert list(rows(prepare_folder(tmp_path / "raw", tmp_path / "out"))) == ["train", "val"]
    val = ShardedDataset(tmp_path / "out/val")
    assert val.keys == ["val_cat_1"] and val.captions(0) == ("a photo of a cat.",)
