"""Options of every format that writes shards: smaller pictures with their boxes, and other splits than the source's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmgem.data.prepare.reading import Record
from mmgem.data.prepare.writing import prepare
from mmgem.data.samples import Sample, decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError


def gradient(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    """Red grows to the right, green downwards; a blue block fills the box (w/4, h/4, w/2, h/2)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 200, width)[None, :]
    pixels[..., 1] = np.linspace(0, 200, height)[:, None]
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def resized(folder: Path, resize: int, data: bytes, box: list[float]) -> Sample:
    record = Record("a", "train", data, {"captions": ["x"], "regions": [{"box": box, "phrase": "a block", "n": 1}]})
    prepare(lambda: [record], folder, resize=resize)
    return ShardedDataset(folder / "train").sample(0)


@pytest.mark.parametrize(("size", "to"), [((401, 203), (198, 100)), ((203, 401), (100, 198)), ((300, 300), (100, 100))])
def test_a_larger_picture_is_made_smaller_and_its_boxes_with_it(tmp_path: Path, size: tuple[int, int], to: tuple):
    width, height = size
    box = [width // 4, height // 4, width // 2, height // 2]
    sample = resized(tmp_path, 100, gradient(width, height, "PNG"), box)
    assert (sample.width, sample.height) == to
    stored = Image.open(io.BytesIO(sample.image))
    assert stored.format == "JPEG" and stored.size == to
    assert sample.regions[0].box == tuple(at * new / old for at, new, old in zip(box, to * 2, size * 2, strict=True))
    assert sample.meta["regions"] == [{"n": 1}]
    x1, y1, x2, y2 = sample.regions[0].box
    pixels = np.asarray(decode_image(sample), int)
    assert pixels[round(y1) + 3 : round(y2) - 3, round(x1) + 3 : round(x2) - 3, 2].min() > 150
    outside = pixels.copy()
    outside[round(y1) - 3 : round(y2) + 3, round(x1) - 3 : round(x2) + 3] = 0
    assert outside[..., 2].max() < 100


def test_the_whole_picture_stays_the_whole_picture(tmp_path: Path):
    sample = resized(tmp_path, 224, gradient(299, 997), [0, 0, 299, 997])
    assert sample.regions[0].box == (0.0, 0.0, 224.0, float(sample.height))


def test_a_picture_that_is_small_enough_keeps_its_bytes(tmp_path: Path):
    data = gradient(300, 100, "WEBP")
    sample = resized(tmp_path, 100, data, [0, 0, 30, 30])
    assert sample.image == data and sample.regions[0].box == (0.0, 0.0, 30.0, 30.0)


def test_a_turned_picture_is_stored_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: 400 x 200 is seen as 200 x 400
    data = gradient(400, 200, exif=exif, quality=95)
    sample = resized(tmp_path, 100, data, [0, 0, 200, 400])
    assert (sample.width, sample.height) == (100, 200) and sample.regions[0].box == (0.0, 0.0, 100.0, 200.0)
    image = decode_image(sample)
    assert image.size == (100, 200) and not image.getexif()
    assert np.asarray(image)[190, 50, 0] > 150  # what was right is below


# --- splits ------------------------------------------------------------------------------------


def records(count: int, first: int = 0) -> list[Record]:
    data = gradient(16, 16)
    return [Record(f"k{n}", "source", data, f"text {n}") for n in range(first, first + count)]


def keys(out: Path) -> dict[str, list[str]]:
    return {path.name: ShardedDataset(path).keys for path in sorted(out.iterdir())}


def test_shares_split_each_picture_whatever_the_others_are(tmp_path: Path):
    prepare(lambda: records(400), tmp_path / "all", split_by="train=0.8, val=0.1,test=0.1")
    found = keys(tmp_path / "all")
    assert sorted(key for listed in found.values() for key in listed) == sorted(f"k{n}" for n in range(400))
    sizes = {split: len(listed) for split, listed in found.items()}
    assert abs(sizes["train"] - 320) < 30 and abs(sizes["val"] - 40) < 20 and abs(sizes["test"] - 40) < 20
    prepare(lambda: records(100, 50), tmp_path / "some", split_by="train=0.8,val=0.1,test=0.1")
    for split, listed in keys(tmp_path / "some").items():
        assert set(listed) <= set(found[split])
    prepare(lambda: records(400), tmp_path / "val", split_by="train=0.8,val=0.1,test=0.1", splits=["val"], limit=9)
    assert keys(tmp_path / "val") == {"val": found["val"][:9]}


def test_a_file_lists_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [tmp_path / "raw" / name for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "3.v2.jpg", "c/d/4.jpg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gradient(16, 16))
    made = [Record(f"{path.parent.name}_{path.name[0]}", "source", path, "x") for path in paths]
    made[-1] = made[-1]._replace(key="own")  # COCO's keys are names without folders
    listed = tmp_path / "splits.json"
    listed.write_text(json.dumps({"train": ["a/1.jpg", "b_1"], "dev": ["3.v2.jpg", "9.jpg", "c/d/4.jpg"]}))
    result = prepare(lambda: made, tmp_path / "out", split_by=listed)
    assert keys(tmp_path / "out") == {"dev": ["raw_3", "own"], "train": ["a_1", "b_1"]}
    assert {split: row["read"] for split, row in result["splits"].items()} == {"train": 2, "dev": 2}
    printed = capsys.readouterr().out
    assert "left out: 1 × in no split: b_2" in printed and "not in the source: 1 listed names: 9" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.9,val=0.2", "sum to 1.1, not to 1"),
        ("train=0.9,val", "'val'; write NAME=SHARE"),
        ("train=1.5,val=-0.5", "'val=-0.5'; write NAME=SHARE"),
        ("train=0.5,train=0.5", "each name once"),
        ("../x=1", "cannot be a split"),
        ("none.json", "cannot read none.json"),
    ],
)
def test_bad_shares_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        prepare(lambda: records(3), tmp_path / "out", split_by=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is expected"),
        ({"train": "a"}, "is expected"),
        ({"train": [1]}, "1 in 'train' is no file name or key"),
        ({"train": ["a.jpg"], "val": ["a"]}, "a is in 'train' and in 'val'"),
        ({"a/b": ["a"]}, "'a/b' cannot be a split"),
        ({"train": ["x"]}, r"the source has no samples \(3 × in no split: k0, k1, k2\)"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, content: Any, message: str):
    listed = tmp_path / "splits.json"
    listed.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        prepare(lambda: records(3), tmp_path / "out", split_by=str(listed))
    assert not (tmp_path / "out").exists()


def test_a_split_of_the_source_names_a_folder_of_the_dataset(tmp_path: Path):
    record = Record("a", "../../elsewhere", gradient(16, 16), "x")
    with pytest.raises(UserError, match="cannot be a split"):
        prepare(lambda: [record], tmp_path / "out" / "deep")
    assert list(tmp_path.iterdir()) == []
