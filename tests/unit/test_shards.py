"""Shards: written whole or not at all, read by offset in any process, bad files named."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgem.data.index import parse_index
from mmgem.data.samples import Sample, SampleError, decode_image, parse_sample
from mmgem.data.shards import ShardedDataset
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
        "members",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]


def test_the_index_tells_the_truth(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(IndexError):
        ShardedDataset(tmp_path).sample(7)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["schema"] == 2
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
        content = (tmp_path / shard["members"]).read_bytes()
        assert shard["members_sha256"] == hashlib.sha256(content).hexdigest()
        members = json.loads(content)
        with tarfile.open(tmp_path / shard["path"]) as tar:
            for info in tar:
                key, extension = info.name.split(".")
                assert members[key][extension] == [info.offset_data, info.size]
                assert (info.mtime, info.uid, info.gid) == (0, 0, 0)


def test_same_samples_same_bytes(tmp_path: Path):
    write(tmp_path / "a")
    os.utime(tmp_path / "a" / "shard-000000.tar")
    write(tmp_path / "b")
    for name in ("shard-000000.tar", "shard-000002.tar", "index.json", "members/000002.json"):
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
    assert names == ["index.json", "members", "notes.txt", "shard-000000.tar"]
    assert [path.name for path in (tmp_path / "members").iterdir()] == ["000000.json"]


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
    (tmp_path / "00000.tar").touch()
    with pytest.raises(UserError, match="mmgem data index"):
        ShardedDataset(tmp_path)
    write(tmp_path / "set" / "val", count=1)
    write(tmp_path / "set" / "train", count=1)
    with pytest.raises(UserError, match="splits train, val"):
        ShardedDataset(tmp_path / "set")
    with pytest.raises(UserError, match="no split tset in .*set; it has train, val"):
        ShardedDataset(tmp_path / "set" / "tset")


def test_what_is_no_whole_shard_is_named(tmp_path: Path):
    write(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()
    for content, reason in ((whole[:-512], "cut short"), (whole + b"\0" * 512, "changed")):
        shard.write_bytes(content)
        dataset = ShardedDataset(tmp_path)
        for index in (3, 4, 3):
            with pytest.raises(SampleError, match=rf"shard .*shard-000001\.tar: shard {reason}") as caught:
                dataset.sample(index)
            assert caught.value.shard == str(shard)
        assert dataset.sample(2).key == "key002"
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        ShardedDataset(tmp_path)
    shard.symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"shard-000001\.tar is a link to .*gone\.tar, which is not there"):
        ShardedDataset(tmp_path).sample(3)
    (tmp_path / "gone.tar").write_bytes(whole)
    assert ShardedDataset(tmp_path).sample(3).key == "key003"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=r"shard-000001\.tar is a folder, not a file"):
        ShardedDataset(tmp_path).sample(3)
    shard.rmdir()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"shard-000001\.tar is a device, not a file"):
        ShardedDataset(tmp_path).sample(3)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_must_not_be_read_is_named(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "shard-000001.tar").chmod(0)
    with pytest.raises(UserError, match=r"cannot open shard .*shard-000001\.tar: Permission denied"):
        ShardedDataset(tmp_path).sample(3)


def test_a_shard_cut_while_in_use_is_a_sample_error(tmp_path: Path):
    write(tmp_path)
    dataset = ShardedDataset(tmp_path)
    assert dataset.sample(6).key == "key006"
    os.truncate(tmp_path / "shard-000002.tar", 600)
    with pytest.raises(SampleError, match=r"key006: shard cut short.*shard-000002"):
        dataset.sample(6)
    assert dataset.sample(0).key == "key000"


def change_a_byte(shard: Path) -> None:
    """In the mode of its first head."""
    with shard.open("r+b") as file:
        file.seek(101)
        file.write(b"1")


def keys_or_reason(dataset: ShardedDataset) -> list[str] | str:
    try:
        return [dataset.sample(index).key for index in range(3)]
    except SampleError as error:
        return error.reason


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_shard_is_verified_once_for_all_processes(tmp_path: Path, method: str):
    write(tmp_path)
    shard, keys = tmp_path / "shard-000000.tar", ["key000", "key001", "key002"]
    dataset = ShardedDataset(tmp_path, verify=True)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(keys_or_reason, (dataset,)) == keys
    change_a_byte(shard)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(keys_or_reason, (dataset,)) == keys  # found good by another process, it is not read again
        other = ShardedDataset(tmp_path, verify=True)
        assert pool.apply(keys_or_reason, (other,)) == "shard has another checksum"
    assert keys_or_reason(dataset) == keys and keys_or_reason(other) == "shard has another checksum"
    assert keys_or_reason(ShardedDataset(tmp_path)) == keys  # unasked, nobody compares


def test_the_flags_of_verified_shards_go_with_their_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "train")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    dataset = ShardedDataset(tmp_path / "train", verify=True)
    copy = pickle.loads(pickle.dumps(dataset))
    if (child := os.fork()) == 0:
        del dataset
        os._exit(0)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path / "temporary")) == 1
    del dataset
    assert os.listdir(tmp_path / "temporary") == []
    assert copy.sample(6).key == "key006"


def test_a_changed_members_file_is_the_shards_fault(tmp_path: Path):
    write(tmp_path)
    members = tmp_path / "members" / "000001.json"
    members.write_bytes(members.read_bytes().replace(b"key004", b"key999"))
    dataset = ShardedDataset(tmp_path)
    with pytest.raises(SampleError, match=r"shard-000001\.tar: shard's members file changed.*000001\.json"):
        dataset.sample(3)
    assert dataset.sample(0).key == "key000"
    members.unlink()
    with pytest.raises(UserError, match=r"cannot read .*000001\.json"):
        ShardedDataset(tmp_path).sample(3)


ENTRY = {"path": "a.tar", "samples": 0, "bytes": 1, "sha256": "0" * 64, "members": "a", "members_sha256": "0" * 64}
TOTALS = {"samples": 0, "captions": 0, "regions": 0, "images_without_captions": 0}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", "not an index"),
        ([], "not an index"),
        ({"schema": 1, "shards": [], "totals": {}}, "schema 1"),
        ({"schema": "\ud800", "shards": [], "totals": {}}, r"schema '.ud800'"),
        ({"schema": 2, "shards": []}, "totals"),
        ({"schema": 2, "shards": [ENTRY], "totals": {"samples": 0, "captions": 0}}, "not an index: KeyError..regions"),
        ({"schema": 2, "shards": [{"path": "a"}], "totals": TOTALS}, "not an index"),
        ({"schema": 2, "shards": [{**ENTRY, "samples": 1}], "totals": TOTALS}, "counts or paths"),
        ({"schema": 2, "shards": [{**ENTRY, "bytes": -1}], "totals": TOTALS}, "counts or paths"),
        ({"schema": 2, "shards": [{**ENTRY, "sha256": "../../etc"}], "totals": TOTALS}, "counts or paths"),
        ({"schema": 2, "shards": [{**ENTRY, "members": "a\0b"}], "totals": TOTALS}, "counts or paths"),
        ({"schema": 2, "shards": [{**ENTRY, "members": "\ud800"}], "totals": TOTALS}, "not an index"),
        ({"schema": 2, "shards": [{**ENTRY, "path": "a" * 5000}], "totals": TOTALS}, "counts or paths"),
        ({"schema": 2, "shards": [{**ENTRY, "a" * 5000: 1}], "totals": TOTALS}, "^.{,400}$"),
        ({"schema": 2, "shards": [ENTRY], "totals": TOTALS, "skipped": [1]}, "not an index"),
        ({"schema": 2, "shards": [ENTRY], "totals": TOTALS, "dropped": {"a": "b"}}, "counts or paths"),
        ('{"schema": ' + "[" * 980 + "]" * 980 + "}", "not an index|schema"),
        ("[" * 100_000, "not an index"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, tree: Any, message: str):
    (tmp_path / "index.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(UserError, match=message) as caught:
        ShardedDataset(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)
    good = {"schema": 2, "shards": [ENTRY], "totals": TOTALS}
    assert parse_index(json.dumps(good).encode(), "x").shards[0].path == "a.tar"


def rewrite_members(split: Path, content: bytes | dict[str, Any], **changes: Any) -> ShardedDataset:
    """The split with another members file of its second shard (key003, key004, key005), and an index that says so."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (split / "members" / "000001.json").write_bytes(content)
    index = json.loads((split / "index.json").read_text())
    index["shards"][1] |= {"members_sha256": hashlib.sha256(content).hexdigest(), **changes}
    index["totals"]["samples"] = sum(shard["samples"] for shard in index["shards"])
    (split / "index.json").write_text(json.dumps(index))
    return ShardedDataset(split)


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2, 3]",
        b"\xff",
        NESTED,
        b'{"a": ' + NESTED + b"}",
        b'{"a": [], "b": {}, "c": {}}',
        *(b'{"a": {"jpg": %s}, "b": {}, "c": {}}' % span for span in (b"0", b"[0]", b"[0, 1, 2]", b'"ab"', b"{}")),
        *(
            b'{"a": {"jpg": [512, %s]}, "b": {}, "c": {}}' % size
            for size in (b"1.5", b'"1"', b"null", b"NaN", b"9" * 30)
        ),
        b'{"\\ud800": {}, "b": {}, "c": {}}',
    ],
)
def test_a_members_file_of_another_shape_is_the_shards_fault(tmp_path: Path, content: bytes):
    write(tmp_path)
    dataset = rewrite_members(tmp_path, content)
    for index in (3, 4, 5):
        with pytest.raises(SampleError, match=r"000001\.tar: shard's members file is broken .*000001\.json") as caught:
            dataset.sample(index)
        assert caught.value.shard == str(tmp_path / "shard-000001.tar")
    assert dataset.sample(2).key == "key002" and dataset.sample(6).key == "key006"
    assert len(list(dataset.iter_texts())) == 12


@pytest.mark.parametrize("samples", [0, 2, 4, 10**15])
def test_an_index_that_counts_other_samples_than_the_members_file(tmp_path: Path, samples: int):
    write(tmp_path)
    members = json.loads((tmp_path / "members" / "000001.json").read_text())
    dataset = rewrite_members(tmp_path, members, samples=samples)
    assert len(dataset) == 4 + samples
    for index in {min(3, 3 + samples - 1), 3 + samples - 1} - {2}:
        with pytest.raises(SampleError, match=f"another number of samples .3 in members/000001.json, {samples} in the"):
            dataset.sample(index)
    assert dataset.sample(len(dataset) - 1).key == "key006"
    assert len(list(dataset.iter_texts())) == 12  # does not go over all that there are said to be


def test_a_key_that_comes_twice_in_a_members_file_is_found(tmp_path: Path):
    write(tmp_path)
    content = (tmp_path / "members" / "000001.json").read_bytes().replace(b"key004", b"key003")
    with pytest.raises(SampleError, match="another number of samples .2 in"):
        rewrite_members(tmp_path, content).sample(3)


def test_what_does_not_lie_in_the_tar_is_not_read(tmp_path: Path):
    write(tmp_path)
    members = json.loads((tmp_path / "members" / "000001.json").read_text())
    length = (tmp_path / "shard-000001.tar").stat().st_size
    spans = [[length, 1], [0, length + 1], [0, -1], [-2, 5], [0, 1 << 62], [(1 << 63) - 1, (1 << 63) - 1]]
    for span in spans:
        dataset = rewrite_members(tmp_path, members | {"key004": {**members["key004"], "json": span}})
        with pytest.raises(SampleError, match="key004: file is not where the index says"):
            dataset.sample(4)
        assert dataset.sample(3).key == "key003" and len(list(dataset.iter_texts())) == 18


def test_a_picture_or_record_that_is_too_large_is_not_read(tmp_path: Path):
    write(tmp_path)
    members = json.loads((tmp_path / "members" / "000001.json").read_text())
    length = 1 << 34  # of a hole, which needs no disk
    os.truncate(tmp_path / "shard-000001.tar", length)
    members["key003"]["jpg"], members["key004"]["json"] = [512, length - 512], [512, (16 << 20) + 1]
    dataset = rewrite_members(tmp_path, members, bytes=length)
    with pytest.raises(SampleError, match="key003: image too large"):
        dataset.sample(3)
    with pytest.raises(SampleError, match="key004: broken metadata .16777217 bytes"):
        dataset.sample(4)
    assert dataset.captions(3) and dataset.sample(5).key == "key005"


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"key": "a"}', b"[" * 100_000, b"1"])
def test_a_broken_list_of_what_was_left_out_is_named(tmp_path: Path, line: bytes):
    write(tmp_path)
    good = {"key": "a", "shard": "b.tar", "reason": "c", "detail": ""}
    (tmp_path / "broken.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    left_out = ShardedDataset(tmp_path).left_out()
    assert next(left_out) == good
    with pytest.raises(UserError, match=r"broken\.jsonl, line 2 is broken"):
        next(left_out)


def test_a_members_file_that_never_ends_is_refused(tmp_path: Path):
    write(tmp_path)
    members = json.loads((tmp_path / "members" / "000001.json").read_text())
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "pipe", "members"):
        with pytest.raises(UserError, match=rf"cannot read .*{path}: it is no file"):
            rewrite_members(tmp_path, members, members=path).sample(3)


def test_broken_json_in_a_shard_is_a_sample_error_and_no_text(tmp_path: Path):
    write(tmp_path, count=3)
    offset, size = json.loads((tmp_path / "members" / "000000.json").read_text())["key001"]["json"]
    with (tmp_path / "shard-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    dataset = ShardedDataset(tmp_path)
    with pytest.raises(SampleError, match="key001: broken metadata"):
        dataset.sample(1)
    assert len(list(dataset.iter_texts())) == 6
