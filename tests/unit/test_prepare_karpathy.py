"""Reader `karpathy`: COCO's and Flickr's splits with their folders of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import encoded, picture

from mmgem.data.prepare.karpathy import prepare_karpathy
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError


def karpathy_file(folder: Path) -> Path:
    entries = []
    splits = ["train", "restval", "val", "test"]
    for n, split in enumerate(splits):
        where = "train2014" if split == "train" else "val2014"
        name = f"COCO_{where}_{n:012d}.jpg"
        (folder / "images" / where).mkdir(parents=True, exist_ok=True)
        (folder / "images" / where / name).write_bytes(encoded(picture(n, 40 + n, 30)))
        sentences = [{"raw": f"A cat, no. {n}.\n", "tokens": ["a", "cat"]}, {"tokens": ["a", "b"]}]
        entry = {"filename": name, "filepath": where, "split": split, "sentences": sentences}
        entries.append({**entry, "cocoid": 100 + n, "imgid": n})
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return path


def test_karpathy(tmp_path: Path):
    path = karpathy_file(tmp_path)
    result = prepare_karpathy(path, tmp_path / "out", images=tmp_path / "images")
    assert {name: row["written"] for name, row in result["splits"].items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["COCO_train2014_000000000000", "COCO_val2014_000000000001"]
    second = train.sample(1)
    assert second.captions == ("A cat, no. 1.", "a b")
    assert (second.width, second.height) == (41, 30)
    assert second.meta == {"image": "COCO_val2014_000000000001.jpg", "cocoid": 101, "imgid": 1}


def test_karpathy_restval_apart_and_pictures_in_one_folder(tmp_path: Path):
    path = karpathy_file(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (tmp_path / "images").rglob("*.jpg"):
        image.rename(flat / image.name)
    result = prepare_karpathy(path, tmp_path / "out", images=flat, restval="restval")
    assert set(result["splits"]) == {"train", "restval", "val", "test"}
    assert len(ShardedDataset(tmp_path / "out" / "train")) == 1
    assert result["skipped"] == {}


def test_karpathy_tells_pictures_of_one_name_apart(tmp_path: Path):
    path = karpathy_file(tmp_path)
    content = json.loads(path.read_text())
    for n, folder in enumerate(["a", "b", "b"]):
        (tmp_path / "images" / folder).mkdir(exist_ok=True)
        (tmp_path / "images" / folder / "1.jpg").write_bytes(encoded(picture(10 + (folder == "b"))))
        entry = {"filename": "1.jpg", "filepath": folder, "split": "train", "sentences": [{"raw": f"line {n}"}]}
        content["images"].append(entry)
    path.write_text(json.dumps(content))
    result = prepare_karpathy(path, tmp_path / "out", images=tmp_path / "images", max_broken=0.5)
    assert result["examples"] == {"duplicate key": ["b_1"]}
    train = ShardedDataset(tmp_path / "out" / "train")
    assert train.keys == ["COCO_train2014_000000000000", "COCO_val2014_000000000001", "a_1", "b_1"]
    assert [train.sample(n).image for n in (2, 3)] == [encoded(picture(10)), encoded(picture(11))]


def test_broken_karpathy_sources(tmp_path: Path):
    path = karpathy_file(tmp_path)
    images, out = tmp_path / "images", tmp_path / "out"
    with pytest.raises(UserError, match="cannot read"):
        prepare_karpathy(tmp_path / "none.json", out, images=images)
    with pytest.raises(UserError, match="no such folder"):
        prepare_karpathy(path, out, images=tmp_path / "none")
    content = json.loads(path.read_text())
    del content["images"][2]["sentences"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[2\].*sentences"):
        prepare_karpathy(path, out, images=images)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        prepare_karpathy(path, out, images=images)
    path.write_text('{"annotations": []}')
    with pytest.raises(UserError, match='no list "images"'):
        prepare_karpathy(path, out, images=images)
    assert not out.exists()
