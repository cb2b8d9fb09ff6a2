"""Tars are indexed where they lie: what is good in them is read, what is not is named."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image
from web import serve

from mmgem.data.index import read_index
from mmgem.data.prepare import prepare_img2dataset
from mmgem.data.prepare.img2dataset import index_folder
from mmgem.data.remote import Remote
from mmgem.data.samples import Tally, decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.data.store import open_store
from mmgem.data.tar_members import read_tar_members
from mmgem.data.tars import find_tars, index_tars
from mmgem.data.writer import locked
from mmgem.errors import UserError

QUICK = Remote(retries=1, timeout=0.4, backoff=0.01)
JPEG = encoded(picture(1, 32, 24))


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{e}", d) for key in keys for e, d in (("jpg", JPEG), ("txt", f"text {key}".encode()))]


def tars_of_pairs(folder: Path, tars: int, samples: int = 3) -> Path:
    for t in range(tars):
        write_tar(folder / f"{t:05d}.tar", pairs(*(f"{t:05d}{n:04d}" for n in range(samples))))
    return folder


def broken(split_dir: Path) -> list[tuple[str, str, str]]:
    lines = map(json.loads, (split_dir / "broken.jsonl").read_bytes().splitlines())
    return [(line["key"], line["shard"], line["reason"]) for line in lines]


def test_a_laion_folder_is_indexed_in_place_and_read_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long, foreign = "f/" + "k" * 180, "größe-緑"
    record = {"caption": "from json", "url": "http://x", "key": "000000001", "status": "success", "sha256": "ab",
              "width": 32, "height": 24}  # fmt: skip
    first = [
        ("000000001.jpg", JPEG),
        ("000000002.JPG", encoded(picture(2, 40, 30))),  # the members of two samples, mixed
        ("000000001.txt", b"from text"),
        ("000000002.cls", b"7"),
        ("./000000001.json", json.dumps(record).encode()),
        ("000000002.txt", b"only text\n"),
        ("README", b"no sample"),
        ("000000001.seg.png", b"another picture of it"),
    ]
    write_tar(tmp_path / "00000.tar", first, format=tarfile.GNU_FORMAT)
    captions = json.dumps({"captions": ["a", "b"]}).encode()
    second = [(f"{long}.webp", encoded(picture(4), "WEBP")), (f"{long}.json", captions), *pairs(foreign, "a/b/1")]
    write_tar(tmp_path / "00001.tar", second, format=tarfile.PAX_FORMAT)
    for n in range(2):
        (tmp_path / f"{n:05d}.parquet").write_bytes(b"left alone")
        (tmp_path / f"{n:05d}_stats.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = index_folder(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted({path.name for path in tmp_path.iterdir()} - before.keys()) == ["index.json", "members"]
    assert sorted(path.name for path in (tmp_path / "members").iterdir()) == ["000000.json", "000001.json"]
    dataset = ShardedDataset(tmp_path, verify=True)
    assert dataset.keys == ["000000001", "000000002", long, foreign, "a/b/1"]
    texts = [("from json",), ("only text",), ("a", "b"), (f"text {foreign}",), ("text a/b/1",)]
    assert [dataset.sample(i).captions for i in range(5)] == texts
    assert dataset.sample(0).meta == {"url": "http://x", "key": "000000001", "status": "success", "sha256": "ab"}
    assert decode_image(dataset.sample(1)).size == (40, 30)
    assert [shard.path for shard in dataset.shards] == ["00000.tar", "00001.tar"]
    assert result["splits"] == {tmp_path.name: {"read": 5, "written": 5, "captions": 6, "regions": 0,
                                                "images_without_captions": 0}}  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["5", "5", "0", "6", "0"]


def test_what_cannot_be_used_is_left_out_counted_and_named(tmp_path: Path):
    first = [
        *pairs("good"),
        ("notext.jpg", JPEG),
        ("blank.jpg", JPEG),
        ("blank.txt", b" "),
        ("nopicture.txt", b"x"),
        ("empty.jpg", b""),
        ("empty.txt", b"x"),
        ("head.jpg", b"<html>"),
        ("head.txt", b"x"),
        ("json.jpg", JPEG),
        ("json.json", b"{"),
        *pairs("twice", "twice", "twice"),
    ]
    write_tar(tmp_path / "a.tar", first)
    write_tar(tmp_path / "b.tar", pairs("x", "good", "y", "twice"))
    write_tar(tmp_path / "c.tar", pairs("y"))
    tally, told = Tally(), []
    index = index_tars(
        tmp_path, find_tars(str(tmp_path)), tally=tally, check=lambda t, read: told.append((t.broken, read))
    )
    assert index == read_index(open_store(tmp_path))
    wanted = [
        ("twice", "a.tar", "duplicate key"),
        ("twice", "a.tar", "duplicate key"),
        ("notext", "a.tar", "no caption and no region"),
        ("blank", "a.tar", "no caption and no region"),
        ("nopicture", "a.tar", "no image"),
        ("empty", "a.tar", "empty image"),
        ("head", "a.tar", "broken image"),
        ("json", "a.tar", "broken metadata"),
        ("good", "b.tar", "duplicate key"),
        ("twice", "b.tar", "duplicate key"),
        ("y", "c.tar", "duplicate key"),
    ]
    assert broken(tmp_path) == wanted
    assert index.skipped == tally.skipped and sum(tally.skipped.values()) == len(wanted)
    assert tally.skipped["duplicate key"] == 5 and tally.dropped == {"empty caption": 1} == index.dropped
    assert told == [(6, 15)]
    dataset = ShardedDataset(tmp_path)
    assert dataset.keys == ["good", "twice", "x", "y"] and dataset.sizes.tolist() == [2, 2]
    assert dataset.totals == {"samples": 4, "captions": 4, "regions": 0, "images_without_captions": 0}
    assert [dataset.captions(i) for i in range(4)] == [(f"text {key}",) for key in dataset.keys]
    assert list(dataset.left_out())[0]["detail"] == "again in its tar"


DAMAGES = ["end", "unmarked", "middle", "header", "empty", "garbage"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_tar_the_samples_before_the_fault_are_taken(tmp_path: Path, damage: str):
    tar = write_tar(tmp_path / "00007.tar", pairs("0", "1", "2", "3"))
    write_tar(tmp_path / "00008.tar", pairs("8"))
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        infos = opened.getmembers()
    reason, kept = "tar cut short", ["0", "1", "2"]
    if damage == "end":
        del data[infos[-1].offset_data + 1 :]
    elif damage == "unmarked":  # every member is whole, what may have followed is not known
        del data[infos[-1].offset_data + 512 :]
        kept = ["0", "1", "2", "3"]
    elif damage == "middle":
        del data[infos[5].offset_data + 3 :]
        kept = ["0", "1"]
    elif damage == "header":
        data[infos[4].offset : infos[4].offset + 200] = b"\xff" * 200
        reason, kept = "damaged tar", ["0", "1"]
    else:
        data = bytearray(b"" if damage == "empty" else b"not a tar at all" * 200)
        reason, kept = "tar cut short" if damage == "empty" else "damaged tar", []
    tar.write_bytes(data)
    index_tars(tmp_path / "train", find_tars(str(tmp_path)))
    assert ShardedDataset(tmp_path / "train", verify=True).keys == [*kept, "8"]
    assert broken(tmp_path / "train") == [("", "../00007.tar", reason)]


@pytest.mark.parametrize("fault", ["gz", "missing", "folder"])
def test_a_tar_that_cannot_be_an_indexed_one_is_refused(tmp_path: Path, fault: str):
    tar = tmp_path / "00007.tar"
    if fault == "gz":
        write_tar(tar, pairs("1"))
        with tarfile.open(tar, "w:gz") as opened:
            add(opened, "1.jpg", JPEG)
    elif fault == "folder":
        tar.mkdir()
    message = {"gz": "is compressed", "missing": "no such tar", "folder": "is no file"}[fault]
    with pytest.raises(UserError, match=rf"(?=.*00007\.tar).*{message}"):
        index_tars(tmp_path / "train", [tar])
    assert not (tmp_path / "train" / "index.json").exists()


def claim(size: bytes) -> Callable[[bytearray], None]:
    """Makes the first head of a tar claim this size."""

    def change(data: bytearray) -> None:
        data[124:136] = size.ljust(12, b"\0")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])

    return change


def kind(letter: bytes, size: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[156:157] = letter
        claim(size)(data)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (claim(b"\x80" + (10**15).to_bytes(11, "big")), "tar cut short"),
        (claim(b"\xff" * 12), "damaged tar"),  # -1
        (kind(b"x", b"40000000000"), "damaged tar"),  # a PAX header of 4 GB
        (kind(b"L", b"40000000000"), "damaged tar"),  # a name of 4 GB
        (kind(b"x", b"00000000100"), "damaged tar"),  # a PAX header that is none
    ],
)
def test_a_hostile_head_costs_no_memory(tmp_path: Path, change: Callable[[bytearray], None], reason: str):
    tar = write_tar(tmp_path / "bad.tar", pairs("1", "2"))
    data = bytearray(tar.read_bytes())
    change(data)
    tar.write_bytes(data)
    write_tar(tmp_path / "good.tar", pairs("3"))
    tracemalloc.start()
    index_tars(tmp_path, find_tars(str(tmp_path)))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert broken(tmp_path) == [("", "bad.tar", reason)] and ShardedDataset(tmp_path).keys == ["3"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_whatever_bytes_change_nothing_is_found_outside_the_tar(tmp_path: Path, form: int):
    tar, rng = write_tar(tmp_path / "a.tar", pairs("k" * 150, "größe"), format=form), random.Random(form)
    whole = tar.read_bytes()
    heads, faults = range(0, len(whole), 512), Counter[str]()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(3):
            place = rng.choice(heads) + rng.choice([0, 124, 135, 156, 482, 504, rng.randrange(512)])
            data[place] = rng.choice([0, 255, *b"xLSKg19", rng.randrange(256)])
        for head in heads:
            if data[head + 257 : head + 262] == b"ustar":  # or the change would only be a wrong checksum
                data[head + 148 : head + 156] = b" " * 8
                data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
        tar.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        with tar.open("rb") as file:
            found = read_tar_members(file.fileno())
        spans = [span for files in found.files.values() for span in files.values()]
        assert all(0 <= offset and 0 <= size and offset + size <= tar.stat().st_size for offset, size in spans)
        faults[found.fault[0] if found.fault else "none"] += 1
    assert set(faults) == {"none", "tar cut short", "damaged tar"} and min(faults.values()) > 50


def test_links_folders_and_sparse_files_are_passed_over(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "folder.jpg", b"", type=tarfile.DIRTYPE)
        add(tar, "1.jpg", JPEG, pax_headers={"comment": "x" * 3000})
        for letter in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("2.jpg")
            info.type, info.linkname, info.size = letter, "1.jpg", len(JPEG)
            tar.addfile(info)
        add(tar, "2.txt", b"a link for a picture")
        add(tar, "3.jpg", JPEG, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add(tar, "1.txt", b"good")
    index_tars(tmp_path, [tmp_path / "a.tar"])
    assert ShardedDataset(tmp_path).keys == ["1"]
    assert broken(tmp_path) == [("2", "a.tar", "no image")]


def test_decode_finds_pictures_that_are_cut(tmp_path: Path):
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", noise[:-500]), ("1.txt", b"cut"), *pairs("2")])
    assert index_tars(tmp_path / "quick", [tar]).totals["samples"] == 2
    slow = index_tars(tmp_path / "slow", [tar], decode=True)
    assert slow.totals["samples"] == 1 and slow.skipped == {"broken image": 1}
    assert ShardedDataset(tmp_path / "slow").keys == ["2"]
    # the same tars, but sample 0 is another one: what is cached under one must not serve the other
    assert slow.checksum != ShardedDataset(tmp_path / "quick").checksum


def test_any_number_of_processes_makes_the_same_index(tmp_path: Path):
    tars_of_pairs(tmp_path / "raw", tars=9)
    write_tar(tmp_path / "raw" / "00004.tar", pairs("new", "000000001"))  # one again, read by another process
    for processes in (1, 2):
        index_tars(tmp_path / str(processes), find_tars(str(tmp_path / "raw")), processes=processes)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.json*")} for n in "12")
    assert one == two and len(one) == 11
    assert broken(tmp_path / "2") == [("000000001", "../raw/00004.tar", "duplicate key")]
    assert len(ShardedDataset(tmp_path / "2")) == 25


def test_a_killed_indexing_goes_on_where_it_was(tmp_path: Path):
    raw, out = tars_of_pairs(tmp_path / "raw", tars=3), tmp_path / "out"
    with serve(raw) as web:
        urls = find_tars(f"{web.url}/{{00000..00002}}.tar")
        web.faults["00002.tar"] = [("hang", 100)]
        child = multiprocessing.get_context("fork").Process(target=index_tars, args=(out, urls))
        child.start()
        while web.requests["00002.tar"] == 0:
            time.sleep(0.01)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert not (out / "index.json").exists()
        index = index_tars(out, urls)
        assert web.requests == {"00000.tar": 1, "00001.tar": 1, "00002.tar": 2}
        dataset = ShardedDataset(out, store=open_store(out, cache_dir=tmp_path / "cache", remote=QUICK))
        assert [dataset.captions(i) for i in range(9)] == [(f"text {key}",) for key in dataset.keys]
    local = index_tars(tmp_path / "local", find_tars(str(raw)))
    assert [s.sha256 for s in index.shards] == [s.sha256 for s in local.shards] and index.totals == local.totals
    assert sorted(path.name for path in (out / "members").iterdir()) == ["000000.json", "000001.json", "000002.json"]


def test_only_what_has_changed_is_read_again(tmp_path: Path):
    raw = tars_of_pairs(tmp_path / "raw", tars=3)
    write_tar(raw / "00002.tar", [("1.jpg", b"?"), ("1.txt", b"x")])
    with pytest.raises(UserError, match="1 of 7 samples are broken.*1 .*--max-broken"):
        index_folder(raw, tmp_path / "out")
    assert broken(tmp_path / "out") == [("1", "../raw/00002.tar", "broken image")]
    times = (raw / "00000.tar").stat().st_mtime_ns
    for name, keep in (("00000.tar", True), ("00001.tar", False)):
        write_tar(raw / name, pairs(*(f"newly{n}" + name[4] for n in range(3))))
        os.utime(raw / name, ns=(times, times) if keep else (0, 0))
    index_folder(raw, tmp_path / "out", max_broken=0.5)
    keys = [f"00000{n:04d}" for n in range(3)] + [f"newly{n}1" for n in range(3)]
    assert ShardedDataset(tmp_path / "out").keys == keys  # the first tar was not opened again
    index_folder(raw, tmp_path / "out", max_broken=0.5, overwrite=True)
    assert ShardedDataset(tmp_path / "out").keys[0] == "newly00"


def test_tars_of_a_server_are_found_and_read(tmp_path: Path):
    raw = tars_of_pairs(tmp_path / "raw", tars=2)
    (raw / "00000.parquet").touch()
    with serve(raw.parent) as web:
        urls = find_tars(f"{web.url}/raw/")
        assert urls == [f"{web.url}/raw/{n:05d}.tar" for n in range(2)] == find_tars(f"{web.url}/raw/0000{{0,1}}.tar")
        with pytest.raises(UserError, match="a folder of this machine"):
            index_folder(f"{web.url}/raw")
        index_folder(f"{web.url}/raw", tmp_path / "out")
        store = open_store(tmp_path / "out", cache_dir=tmp_path / "cache", remote=QUICK)
        dataset = ShardedDataset(tmp_path / "out", store=store)
        assert dataset.remote and [dataset.sample(i).image for i in range(6)] == [JPEG] * 6
        with pytest.raises(UserError, match=r"no such file: .*raw/00002\.tar"):
            index_folder(f"{web.url}/raw/{{00001..00002}}.tar", tmp_path / "other")
    with pytest.raises(UserError, match="write {00000..00099}"):
        find_tars("s3://b/{0..1.tar")


def test_paths_are_relative_inside_the_dataset_and_absolute_outside(tmp_path: Path):
    dataset = tmp_path / "set"
    inside, outside = write_tar(dataset / "a.tar", pairs("in")), write_tar(tmp_path / "b.tar", pairs("out"))
    (dataset / "train").mkdir()
    link = dataset / "train" / "c.tar"
    link.symlink_to(write_tar(tmp_path / "far" / "c.tar", pairs("linked")))
    index = index_tars(dataset / "train", [inside, outside, link])
    assert [shard.path for shard in index.shards] == ["../a.tar", str(outside), "c.tar"]
    dataset.rename(tmp_path / "moved")
    assert ShardedDataset(tmp_path / "moved" / "train").keys == ["in", "out", "linked"]


def test_a_tar_whose_name_is_no_utf8_is_refused(tmp_path: Path):
    write_tar(tmp_path / os.fsdecode(b"\xff.tar"), pairs("1"))
    with pytest.raises(UserError, match=r"udcff\.tar.: an index cannot name .*rename"):
        index_tars(tmp_path / "out", find_tars(str(tmp_path)))
    assert not (tmp_path / "out" / "index.json").exists()


def test_prepare_img2dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    raw, out = tmp_path / "raw", tmp_path / "out"
    with pytest.raises(UserError, match="no such folder"):
        prepare_img2dataset(raw, out)
    raw.mkdir()
    (raw / "0.tar.gz").touch()
    with pytest.raises(UserError, match=r"no \.tar in .*0\.tar\.gz must be unpacked"):
        prepare_img2dataset(raw, out)
    with pytest.raises(UserError, match=r"no \.tar in .*: there are some in .*/raw, name that folder"):
        write_tar(raw / "1.tar", pairs("1"))
        index_folder(tmp_path)
    (raw / "1.tar").unlink()
    write_tar(raw / "0.tar", [*pairs("1"), ("2.jpg", b""), ("2.txt", b"x")])
    with pytest.raises(UserError, match="1 of 2 samples are broken.*empty image"):
        prepare_img2dataset(raw, out, split="pairs")
    assert not (out / "pairs" / "index.json").exists()
    result = prepare_img2dataset(raw, out, split="pairs", max_broken=0.5)
    assert result["skipped"] == {"empty image": 1}
    assert result["splits"]["pairs"]["read"] == 2 and result["splits"]["pairs"]["written"] == 1
    assert "skipped: 1 × empty image: 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"index\.json exists.*--overwrite"):
        prepare_img2dataset(raw, out, split="pairs", max_broken=0.5)
    prepare_img2dataset(raw, out, split="pairs", max_broken=0.5, overwrite=True)
    assert sorted(path.name for path in (out / "pairs").iterdir()) == ["broken.jsonl", "index.json", "members"]
    (raw / "0.tar").unlink()
    write_tar(raw / "1.tar", [("2.jpg", b""), ("2.txt", b"x")])
    with pytest.raises(UserError, match=r"no sample that can be used.*broken\.jsonl says why"):
        prepare_img2dataset(raw, out, split="none", max_broken=1.0)
    with pytest.raises(UserError, match="no tars"):
        index_tars(out / "train", [])
    with pytest.raises(UserError, match="processes is 0; give 1 or more"):
        index_tars(out / "train", [raw / "1.tar"], processes=0)
    with pytest.raises(UserError, match="stay as they lie, nothing is written for --resize"):
        prepare_img2dataset(raw, out, resize=224)


def test_two_do_not_index_into_one_folder(tmp_path: Path):
    tars_of_pairs(tmp_path, tars=1)
    with locked(tmp_path), pytest.raises(UserError, match="another process is at work in"):
        index_folder(tmp_path)
    assert index_folder(tmp_path)["splits"][tmp_path.name]["written"] == 3
