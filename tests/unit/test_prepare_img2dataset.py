"""What img2dataset writes besides tars: parquet files with pictures, and pictures as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import encoded, picture

from mmgem.data.prepare import prepare_folder, prepare_img2dataset
from mmgem.data.prepare.img2dataset import index_folder
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

GROUP = 2
"""Rows of a row group; img2dataset's have 100."""


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row as img2dataset has it, but for the picture."""
    fields = {"url": f"http://x/{number}", "caption": f"Caption {number}", "key": f"{number:09d}", "status": "success"}
    return {**fields, "error_message": None, "width": 80, "height": 60, "original_width": 800,
            "original_height": 600, "exif": "{}", "sha256": "ab", **changes}  # fmt: skip


def failed(number: int) -> dict[str, Any]:
    return row(number, status="failed_to_download", error_message="404", width=None, height=None)


def write_parquet(path: Path, rows: list[dict[str, Any]], column: str = "jpg") -> None:
    schema = pyarrow.schema(
        [*((n, pyarrow.int32() if n.endswith(("width", "height")) else pyarrow.string()) for n in row(0)),
         (column, pyarrow.binary())]
    )  # fmt: skip
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), GROUP):
            part = rows[start : start + GROUP]
            table = {name: [fields.get(name) for fields in part] for name in schema.names}
            writer.write_table(pyarrow.table(table, schema))


def source(folder: Path) -> Path:
    """Two files, as `--output_format parquet` gives them: a row could not be downloaded, a picture is broken."""
    folder.mkdir()
    first = [row(n, jpg=encoded(picture(n))) for n in range(3)]
    write_parquet(folder / "00000.parquet", [first[0], failed(5), *first[1:]])
    write_parquet(folder / "00001.parquet", [row(10, jpg=b"<html>"), row(11, jpg=encoded(picture(11)), caption=None)])
    for n in range(2):
        (folder / f"{n:05d}_stats.json").write_text("{}")
    return folder


def test_pictures_in_parquet_files_are_written_to_shards(tmp_path: Path):
    result = prepare_img2dataset(source(tmp_path / "raw"), tmp_path / "out", split="pairs", shard_size=2, max_broken=1)
    assert result["splits"]["pairs"] == {
        "read": 5, "written": 3, "captions": 3, "regions": 0, "images_without_captions": 0
    }  # fmt: skip
    assert result["skipped"] == {"broken image": 1, "no caption and no region": 1}
    dataset = ShardedDataset(tmp_path / "out/pairs")
    assert dataset.keys == [f"{n:09d}" for n in range(3)] and dataset.sizes.tolist() == [2, 1]
    sample = dataset.sample(2)
    assert sample.captions == ("Caption 2",) and sample.image == encoded(picture(2))
    assert sample.meta == {"url": "http://x/2", "key": "000000002", "status": "success", "original_width": 800,
                           "original_height": 600, "exif": "{}", "sha256": "ab"}  # fmt: skip


def test_one_parquet_file_of_another_picture_format_smaller_and_split(tmp_path: Path):
    rows = [row(n, webp=encoded(picture(n), "WEBP")) for n in range(5)]
    write_parquet(tmp_path / "a.parquet", rows, "webp")
    listed = tmp_path / "splits.json"
    listed.write_text(json.dumps({"train": [f"{n:09d}" for n in range(4)], "val": ["000000004"]}))
    result = prepare_img2dataset(tmp_path / "a.parquet", tmp_path / "out", resize=30, split_by=listed)
    assert {split: row["written"] for split, row in result["splits"].items()} == {"train": 4, "val": 1}
    assert (ShardedDataset(tmp_path / "out/val").sample(0).width) == 40


def test_what_is_no_such_parquet_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "raw").mkdir()
    file = tmp_path / "raw/00000.parquet"
    write_parquet(file, [row(1)], "pixels")
    with pytest.raises(UserError, match=r"00000\.parquet has no column of pictures"):
        prepare_img2dataset(tmp_path / "raw", tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*00000\.parquet: .*fetch it again"):
        prepare_img2dataset(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(UserError, match="`mmgem data prepare img2dataset`"):
        index_folder(tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mmgem\[parquet\]'"):
        prepare_img2dataset(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_row_group_is_named(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [row(n, jpg=encoded(picture(n))) for n in range(4)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    pictures = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(len(row(0)))
    assert pictures.path_in_schema == "jpg"
    start = pictures.dictionary_page_offset
    data[start : start + 32] = b"\xff" * 32
    (tmp_path / "a.parquet").write_bytes(data)
    result = prepare_img2dataset(tmp_path / "a.parquet", tmp_path / "out", max_broken=1)
    assert result["skipped"] == {"broken metadata": 2} and result["splits"]["train"]["written"] == 2
    assert [line["key"] for line in ShardedDataset(tmp_path / "out/train").left_out()] == ["000000002", "000000003"]


def test_pictures_as_files_are_read_by_folder(tmp_path: Path):
    raw = tmp_path / "raw"
    for shard in range(2):
        (raw / f"{shard:05d}").mkdir(parents=True)
        for n in range(2):
            file = raw / f"{shard:05d}" / f"{shard:05d}{n:04d}.jpg"
            file.write_bytes(encoded(picture(n)))
            file.with_suffix(".txt").write_text(f"Caption {n}")
            file.with_suffix(".json").write_text(json.dumps(row(n)))
        write_parquet(raw / f"{shard:05d}.parquet", [row(0), row(1)], "other")
        (raw / f"{shard:05d}_stats.json").write_text("{}")
    with pytest.raises(UserError, match="has its pictures as files: give it to `mmgem data prepare folder`"):
        prepare_img2dataset(raw, tmp_path / "out")
    prepare_folder(raw, tmp_path / "out")
    dataset = ShardedDataset(tmp_path / "out/train")
    assert dataset.keys == [f"0000{s}_0000{s}000{n}" for s in range(2) for n in range(2)]
    assert dataset.captions(3) == ("Caption 1",)
