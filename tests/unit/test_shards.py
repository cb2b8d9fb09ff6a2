"""Shards: written whole or not at all, read by offset in any process, bad files named."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgem.data.samples import Sample, SampleError, Tally, decode_image, parse_sample
from mmgem.data.index import read_index
from mmgem.data.shards import ShardedDataset
from mmgem.data.tars import index_tars
from mmgem.data.writer import ShardWriter
from mmgem.errors import UserError


def picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (number * 9 % 256, 80, 120)).save(buffer, kind)
    return buffer.getvalue()


def a_sample(number: int, kind: str = "JPEG", **meta: Any) -> Sample:
    fields = {
        "captions": [f"picture {number} .", f"again {number}"],
        "regions": [{"box": [0, 0, 8 + number, 9], "phrase": f"part {number}", "entity": "e"}],
        "number": number,
    }
    return parse_sample(f"key{number:03d}", picture(number, kind), {**fields, **meta})


def write(folder: Path, count: int = 7, shard_size: int = 3) -> list[Sample]:
    samples = [a_sample(n, ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(count)]
    with ShardWriter(folder, shard_size=shard_size) as writer:
        for sample in samples:
            writer.write(sample)
    return samples


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_is_written_is_read_in_any_order(tmp_path: Path):
    samples = write(tmp_path / "train")
    dataset = ShardedDataset(tmp_path / "train")
    assert len(dataset) == 7
    assert dataset.keys == [sample.key for sample in samples]
    for index in (6, 0, 3, 2, 5, 1, 4):
        assert dataset.sample(index) == samples[index]
        assert dataset.captions(index) == samples[index].captions
        assert decode_image(dataset.sample(index)).size == (32, 24)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        "index.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]


def test_the_index_tells_the_truth(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(IndexError):
        ShardedDataset(tmp_path).sample(7)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["schema"] == 1
    assert [shard["samples"] for shard in index["shards"]] == [3, 3, 1]
    assert index["totals"] == {
        "samples": 7,
        "captions": 14,
        "regions": 7,
        "images_without_captions": 0,
    }
    for shard in index["shards"]:
        data = (tmp_path / shard["path"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(tmp_path / shard["path"]) as tar:
            for info in tar:
                key, extension = info.name.split(".")
                assert shard["members"][key][extension] == [info.offset_data, info.size]
                assert (info.mtime, info.uid, info.gid) == (0, 0, 0)


def test_same_samples_same_bytes(tmp_path: Path):
    write(tmp_path / "a")
    os.utime(tmp_path / "a" / "shard-000000.tar")
    write(tmp_path / "b")
    for name in ("shard-000000.tar", "shard-000002.tar", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = ShardedDataset(tmp_path / "a"), ShardedDataset(tmp_path / "b")
    assert a.checksum == b.checksum and len(a.checksum) == 64
    write(tmp_path / "c", count=6)
    assert ShardedDataset(tmp_path / "c").checksum != a.checksum


def test_webdataset_reads_the_shards(tmp_path: Path):
    from webdataset.compat import WebDataset

    samples = write(tmp_path, count=3)
    url = str(tmp_path / "shard-000000.tar")
    items = list(WebDataset(url, shardshuffle=False, empty_check=False))
    assert [item["__key__"] for item in items] == [sample.key for sample in samples]
    for item, extension, sample in zip(items, ("jpg", "png", "webp"), samples, strict=True):
        assert item[extension] == sample.image
        assert json.loads(item["json"])["captions"] == list(sample.captions)


def test_long_and_foreign_keys(tmp_path: Path):
    keys = ["k" * 150, "größe-緑", "folder/with/parts"]
    with ShardWriter(tmp_path) as writer:
        for number, key in enumerate(keys):
            writer.write(parse_sample(key, picture(number), f"caption {number}"))
    dataset = ShardedDataset(tmp_path)
    assert dataset.keys == keys
    assert [dataset.captions(i) for i in range(3)] == [(f"caption {n}",) for n in range(3)]


@pytest.mark.parametrize("key", ["", "a.b", "../up", "/root", "folder/"])
def test_keys_that_no_tar_can_hold_are_refused(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match="not a key"), ShardWriter(tmp_path) as writer:
        writer.write(parse_sample(key, picture(0), "x"))


def test_a_key_is_written_once_and_a_picture_of_another_format_never(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write(a_sample(1))
        with pytest.raises(ValueError, match="written before"):
            writer.write(a_sample(1))
        with pytest.raises(ValueError, match="not JPEG"):
            writer.write(a_sample(2, "BMP"))
    assert len(ShardedDataset(tmp_path)) == 1


def test_an_error_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, shard_size=2) as writer:
        for number in range(5):
            writer.write(a_sample(number))
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
        assert not (tmp_path / "index.json").exists()
        raise RuntimeError("the source broke")
    assert list(tmp_path.iterdir()) == []


def test_a_split_is_not_overwritten_unasked(tmp_path: Path):
    write(tmp_path, count=7)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        ShardWriter(tmp_path)
    assert len(ShardedDataset(tmp_path)) == 7
    with ShardWriter(tmp_path, overwrite=True) as writer:
        writer.write(a_sample(1))
    assert ShardedDataset(tmp_path).keys == ["key001"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", "notes.txt", "shard-000000.tar"]


def test_texts_without_pictures(tmp_path: Path):
    samples = write(tmp_path, count=4)
    expected = [t for s in samples for t in (*s.captions, *(r.phrase for r in s.regions))]
    assert list(ShardedDataset(tmp_path).iter_texts()) == expected
    assert len(expected) == 12


def test_has_regions_and_captions(tmp_path: Path):
    write(tmp_path / "boxes", count=1)
    assert ShardedDataset(tmp_path / "boxes").has_regions is True
    with ShardWriter(tmp_path / "plain") as writer:
        writer.write(parse_sample("a", picture(0), "x"))
    assert ShardedDataset(tmp_path / "plain").has_regions is False
    assert ShardedDataset(tmp_path / "plain").has_captions is True
    with ShardWriter(tmp_path / "bare") as writer:
        regions = [{"box": [1, 1, 9, 9], "phrase": "x"}]
        writer.write(parse_sample("a", picture(0), {"regions": regions}))
    assert ShardedDataset(tmp_path / "bare").has_captions is False


def read_key_and_captions(dataset: ShardedDataset, index: int) -> tuple[int, str, tuple[str, ...]]:
    sample = dataset.sample(index)
    return os.getpid(), sample.key, sample.captions


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes_read_the_same(tmp_path: Path, method: str):
    samples = write(tmp_path)
    dataset = ShardedDataset(tmp_path)
    dataset.sample(0)  # a file is open now, and must not be shared by position
    with multiprocessing.get_context(method).Pool(2) as pool:
        calls = [(dataset, index) for index in [0, 6, 3] * 5]
        found = pool.starmap(read_key_and_captions, calls, chunksize=1)
    assert [f[1:] for f in found] == [(samples[i].key, samples[i].captions) for i in [0, 6, 3] * 5]
    assert os.getpid() not in {f[0] for f in found}


def test_a_pickle_carries_no_open_file(tmp_path: Path):
    samples = write(tmp_path)
    dataset = ShardedDataset(tmp_path)
    dataset.sample(0)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.sample(5) == samples[5]


def test_few_files_stay_open(tmp_path: Path):
    samples = write(tmp_path, count=80, shard_size=1)
    dataset = ShardedDataset(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(80):
        assert dataset.sample(index).key == samples[index].key
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert dataset.sample(0) == samples[0]


def test_missing_folder_and_missing_index(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such folder.*mmgem data prepare"):
        ShardedDataset(tmp_path / "none")
    with pytest.raises(UserError, match=r"no index.json.*mmgem data prepare"):
        ShardedDataset(tmp_path)
    write_tar(tmp_path / "00000.tar", [("a.jpg", picture(1)), ("a.txt", b"x")])
    with pytest.raises(UserError, match="mmgem data prepare img2dataset"):
        ShardedDataset(tmp_path)
    write(tmp_path / "set" / "val", count=1)
    write(tmp_path / "set" / "train", count=1)
    with pytest.raises(UserError, match="splits train, val"):
        ShardedDataset(tmp_path / "set")
    with pytest.raises(UserError, match="no split tset in .*set; it has train, val"):
        ShardedDataset(tmp_path / "set" / "tset")


def test_missing_and_truncated_shards_are_named(tmp_path: Path):
    write(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar is truncated"):
        ShardedDataset(tmp_path)
    shard.write_bytes(whole + b"\0" * 512)
    with pytest.raises(UserError, match=r"shard-000001\.tar is changed"):
        ShardedDataset(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        ShardedDataset(tmp_path)


def test_a_shard_cut_while_in_use_is_a_sample_error(tmp_path: Path):
    write(tmp_path)
    dataset = ShardedDataset(tmp_path)
    os.truncate(tmp_path / "shard-000002.tar", 600)
    with pytest.raises(SampleError, match=r"key006: shard cut short.*shard-000002"):
        dataset.sample(6)
    assert dataset.sample(0).key == "key000"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"schema": 99, "shards": [], "totals": {}}', "schema 99"),
        ('{"schema": 1, "shards": []}', "lacks totals"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_index(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)


def test_broken_json_in_a_shard_is_a_sample_error_and_no_text(tmp_path: Path):
    write(tmp_path, count=3)
    index = json.loads((tmp_path / "index.json").read_text())
    offset, size = index["shards"][0]["members"]["key001"]["json"]
    with (tmp_path / "shard-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    dataset = ShardedDataset(tmp_path)
    with pytest.raises(SampleError, match="key001: broken metadata"):
        dataset.sample(1)
    assert len(list(dataset.iter_texts())) == 6


def test_tars_are_indexed_where_they_lie(tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    record = {"caption": "from json", "url": "http://x", "width": 32, "height": 24, "status": "ok"}
    first = write_tar(
        raw / "00000.tar",
        [
            ("000000001.jpg", picture(1)),
            ("000000001.txt", b"from text"),
            ("000000001.json", json.dumps(record).encode()),
            ("./000000002.JPG", picture(2)),
            ("./000000002.txt", b"only text\n"),
            ("000000003.jpg", picture(3)),
            ("000000003.txt", b" "),
            ("000000004.txt", b"no picture"),
            ("000000005.jpg", b""),
            ("000000005.txt", b"empty picture"),
        ],
    )
    second = write_tar(
        raw / "00001.tar",
        [
            ("000000002.png", picture(9, "PNG")),
            ("000000002.txt", b"again"),
            ("000010000.json", json.dumps({"captions": ["a", "b"]}).encode()),
            ("000010000.webp", picture(4, "WEBP")),
        ],
    )
    before = first.read_bytes(), second.read_bytes()
    tally, seen = Tally(), []
    index = index_tars(tmp_path / "set" / "train", [first, second], tally=tally, on_shard=lambda *a: seen.append(a))
    assert (first.read_bytes(), second.read_bytes()) == before
    assert [path.name for path in (tmp_path / "set" / "train").iterdir()] == ["index.json"]
    assert index == read_index(tmp_path / "set" / "train")
    dataset = ShardedDataset(tmp_path / "set" / "train")
    assert dataset.keys == ["000000001", "000000002", "000010000"]
    assert [dataset.sample(i).captions for i in range(3)] == [
        ("from json",),
        ("only text",),
        ("a", "b"),
    ]
    assert dataset.sample(0).meta == {"url": "http://x", "status": "ok"}
    assert list(dataset.iter_texts()) == ["from json", "only text", "a", "b"]
    assert seen == [(5, 2), (2, 1)]
    assert (
        tally.skipped
        == index["skipped"]
        == {
            "no caption and no region": 1,
            "no image": 1,
            "empty image": 1,
            "duplicate key": 1,
        }
    )
    assert tally.dropped == {"empty caption": 1}
    assert tally.broken == 3
    assert tally.examples["no caption and no region"] == ["000000003"]
    assert index["totals"]["samples"] == 3 and index["totals"]["captions"] == 4


def test_paths_are_relative_inside_the_dataset_and_absolute_outside(tmp_path: Path):
    dataset = tmp_path / "set"
    dataset.mkdir()
    inside = write_tar(dataset / "a.tar", [("1.jpg", picture(1)), ("1.txt", b"in")])
    outside = write_tar(tmp_path / "b.tar", [("2.jpg", picture(2)), ("2.txt", b"out")])
    index = index_tars(dataset / "train", [inside, outside])
    assert [shard["path"] for shard in index["shards"]] == ["../a.tar", str(outside)]
    dataset.rename(tmp_path / "moved")
    assert ShardedDataset(tmp_path / "moved" / "train").captions(0) == ("in",)


def test_decode_finds_pictures_that_are_cut(tmp_path: Path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    cut = buffer.getvalue()[:-500]
    tar = write_tar(
        tmp_path / "a.tar",
        [("1.jpg", cut), ("1.txt", b"cut"), ("2.jpg", picture(2)), ("2.txt", b"x")],
    )
    assert index_tars(tmp_path / "quick", [tar])["totals"]["samples"] == 2
    slow = index_tars(tmp_path / "slow", [tar], decode=True)
    assert slow["totals"]["samples"] == 1 and slow["skipped"] == {"broken image": 1}
    assert ShardedDataset(tmp_path / "slow").keys == ["2"]
    # the same tars, but sample 0 is another one: what is cached under one must not serve the other
    assert ShardedDataset(tmp_path / "slow").checksum != ShardedDataset(tmp_path / "quick").checksum


def test_an_index_is_not_overwritten_unasked(tmp_path: Path):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.txt", b"x")])
    index_tars(tmp_path / "train", [tar])
    with pytest.raises(UserError, match=r"index\.json exists"):
        index_tars(tmp_path / "train", [tar])
    assert index_tars(tmp_path / "train", [tar], overwrite=True)["totals"]["samples"] == 1
    assert tar.exists()


DAMAGES = ["end", "unmarked", "middle", "header", "empty", "garbage", "gz", "missing"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_tar_is_named(tmp_path: Path, damage: str):
    members = [(f"{n}.{e}", picture(n) * 3) for n in range(4) for e in ("jpg", "txt")]
    tar = write_tar(tmp_path / "00007.tar", members)
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        infos = opened.getmembers()
    if damage == "end":
        del data[infos[-1].offset_data + infos[-1].size :]
    elif damage == "unmarked":  # every member is whole, what may have followed is not known
        del data[infos[-1].offset_data + -(-infos[-1].size // 512) * 512 :]
    elif damage == "middle":
        del data[infos[3].offset_data + 100 :]
    elif damage == "header":
        data[infos[4].offset : infos[4].offset + 200] = b"\xff" * 200
    elif damage in ("empty", "garbage"):
        data = bytearray(b"" if damage == "empty" else b"not a tar at all" * 200)
    tar.write_bytes(data)
    if damage == "gz":
        with tarfile.open(tar, "w:gz") as opened:
            opened.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    if damage == "missing":
        tar.unlink()
    with pytest.raises(UserError, match=r"00007\.tar"):
        index_tars(tmp_path / "train", [tar])
    assert not (tmp_path / "train" / "index.json").exists()


def test_no_tars_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no tars"):
        index_tars(tmp_path / "train", [])
