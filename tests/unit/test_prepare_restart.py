"""A prepare that is stopped goes on where it was, to the bytes of one that is not."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import picture
from prepared import accounts, assert_whole, files_of

from mmgem.data.index import read_index
from mmgem.data.prepare.reading import Record
from mmgem.data.prepare.writing import prepare
from mmgem.data.processes import map_in_order, stop_if_asked
from mmgem.data.shards import ShardedDataset
from mmgem.data.store import open_store
from mmgem.errors import UserError


def source(folder: Path, count: int = 23) -> Callable[[], list[Record]]:
    """Pictures of two splits; the third is broken, the fifth comes again."""
    folder.mkdir(parents=True)
    made = []
    for n in range(count):
        path = folder / f"{n}.jpg"
        path.write_bytes(picture(n) if n != 2 else b"<html>")
        made.append(Record(f"k{n}", "val" if n % 4 == 3 else "train", path, {"captions": [f"text {n}", ""]}))
    made.insert(9, made[4])
    return lambda: made


class Stop(Exception):
    pass


def stopping_at(key: str, error: type[BaseException] = Stop) -> Callable[[Record], Record]:
    def load(record: Record) -> Record:
        if record.key == key:
            raise error
        return record

    return load


# --- what is made ------------------------------------------------------------------------------


def test_the_same_bytes_on_any_number_of_processes(tmp_path: Path):
    records = source(tmp_path / "raw")
    for processes in (1, 3):
        prepare(records, tmp_path / str(processes), shard_size=5, processes=processes, resize=24, max_broken=0.5)
    assert_whole(tmp_path / "3", tmp_path / "1")
    assert ShardedDataset(tmp_path / "3/train").sizes.tolist() == [4, 4, 5, 4]  # cut before they were looked at
    assert ShardedDataset(tmp_path / "3/val").sizes.tolist() == [5]


def test_every_sample_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = [Record(f"k{n}", "train", b"" if n in range(1, 9) else picture(n), "x") for n in range(12)]
    records += [Record("k0", "val", picture(0), "x"), Record("v", "val", picture(0), "x")]
    prepare(lambda: records, tmp_path, shard_size=3, max_broken=0.9)
    train = ShardedDataset(tmp_path / "train")
    assert list(train.left_out()) == [
        {"key": f"k{n}", "shard": f"shard-{n // 3:06d}.tar", "reason": "empty image", "detail": "0 bytes"}
        for n in range(1, 9)
    ]
    assert train.keys == ["k0", "k9", "k10", "k11"]
    # a shard of which nothing is left is none
    assert [shard.path for shard in read_index(open_store(tmp_path / "train")).shards] == [
        "shard-000000.tar",
        "shard-000003.tar",
    ]
    assert len(list((tmp_path / "train/members").iterdir())) == 2
    [repeated] = ShardedDataset(tmp_path / "val").left_out()
    assert (repeated["key"], repeated["reason"]) == ("k0", "duplicate key")
    printed = capsys.readouterr().out
    assert "skipped: 8 × empty image: k1 (0 bytes), " in printed and "k6" not in printed
    assert f"named in {tmp_path}/train/broken.jsonl, {tmp_path}/val/broken.jsonl" in printed


def test_text_that_is_no_unicode_is_a_broken_sample(tmp_path: Path):
    records = [Record("a", "train", picture(0), "half \ud83d a pair"), Record("b", "train", picture(1), "x")]
    result = prepare(lambda: records, tmp_path, max_broken=0.5)
    assert result["skipped"] == {"broken metadata": 1}
    assert ShardedDataset(tmp_path / "train").keys == ["b"]


# --- stopped and gone on with ------------------------------------------------------------------


def test_finished_shards_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records, out = source(tmp_path / "raw"), tmp_path / "out"
    options: dict[str, Any] = {"shard_size": 5, "max_broken": 0.5, "plan": {"format": "mine"}}
    prepare(records, tmp_path / "unbroken", **options)
    for key, error in (("k9", Stop), ("k13", KeyboardInterrupt)):
        with pytest.raises(error):
            prepare(records, out, load=stopping_at(key, error), processes=1, **options)
        assert not list(out.rglob("index.json")) and not list(out.rglob("*.partial"))
    tars = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert len(tars) == len(accounts(out)) == 2
    capsys.readouterr()
    assert prepare(records, out, **options)["kept"] == 2
    assert "kept: 2 of 5 shards, finished by an earlier run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tars} == tars
    assert_whole(out, tmp_path / "unbroken")
    with pytest.raises(UserError, match="not empty"):  # it is finished
        prepare(records, out, **options)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda records, out: (records()[0].image.write_bytes(picture(50)), None), 1),
        (lambda records, out: records().__setitem__(1, records()[1]._replace(meta="another text")), 1),
        (lambda records, out: records().pop(0), 0),
        (lambda records, out: next(out.rglob("*.tar")).write_bytes(b"cut"), 1),
        (lambda records, out: next(out.rglob("members/0*.json")).unlink(), 1),
        (lambda records, out: accounts(out)[0].write_bytes(b"{"), 1),
        (lambda records, out: (out / "train/shard-000007.tar").write_bytes(b"beyond the last"), 2),
    ],
    ids=["picture", "text", "one less", "tar", "members", "account", "too many"],
)
def test_a_shard_that_is_not_of_its_records_is_made_anew(tmp_path: Path, change: Callable[..., Any], kept: int):
    records, out = source(tmp_path / "raw"), tmp_path / "out"
    with pytest.raises(Stop):
        prepare(records, out, load=stopping_at("k13"), shard_size=5, processes=1, max_broken=0.5)
    assert len(accounts(out)) == 2
    change(records, out)
    assert prepare(records, out, shard_size=5, max_broken=0.5)["kept"] == kept
    prepare(records, tmp_path / "unbroken", shard_size=5, max_broken=0.5)
    assert_whole(out, tmp_path / "unbroken")


def test_unfinished_work_of_another_command_is_not_touched(tmp_path: Path):
    records, out = source(tmp_path / "raw"), tmp_path / "out"
    options: dict[str, Any] = {"max_broken": 0.5, "processes": 1}
    with pytest.raises(Stop):
        prepare(records, out, load=stopping_at("k13"), shard_size=5, **options)
    before = files_of(out)
    for other in ({"shard_size": 6}, {"shard_size": 5, "resize": 9}, {"shard_size": 5, "plan": {"format": "x"}}):
        with pytest.raises(UserError, match=r"train holds unfinished work of another command \(.*, now .*--overwrite"):
            prepare(records, out, **other, **options)
    assert files_of(out) == before
    # --overwrite is part of the same command too: it begins anew once, then goes on
    with pytest.raises(Stop):
        prepare(records, out, load=stopping_at("k13"), shard_size=6, overwrite=True, **options)
    assert prepare(records, out, shard_size=6, overwrite=True, **options)["kept"] == 1
    prepare(records, tmp_path / "unbroken", shard_size=6, **options)
    assert_whole(out, tmp_path / "unbroken")
    assert prepare(records, out, shard_size=6, overwrite=True, **options)["kept"] == 0


def test_a_command_that_finished_no_shard_is_in_no_ones_way(tmp_path: Path):
    records = source(tmp_path / "raw")
    with pytest.raises(Stop):
        prepare(records, tmp_path / "out", load=stopping_at("k0"), processes=1)
    assert prepare(records, tmp_path / "out", resize=9, max_broken=0.5)["kept"] == 0


def test_two_do_not_write_one_folder(tmp_path: Path):
    records, out = source(tmp_path / "raw"), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    handle = os.open(out / "train", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is at work in .*train"):
        prepare(records, out, max_broken=0.5)
    os.close(handle)
    prepare(records, out, max_broken=0.5)


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while number > 1:
        stop_if_asked()
        time.sleep(0.01)
    return number


def test_a_killed_process_is_a_user_error():
    with pytest.raises(UserError, match="a process was killed, .* fewer --processes"):
        list(map_in_order(die, range(3), 2))


def test_a_full_disk_at_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records, out = source(tmp_path / "raw"), tmp_path / "out"
    prepare(records, tmp_path / "unbroken", shard_size=5, max_broken=0.5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(out / "train/index.json"))

    with monkeypatch.context() as patched:
        patched.setattr("mmgem.data.prepare.unfinished.write_index", full)
        with pytest.raises(UserError, match=r"index\.json: No space left.*5 of 5 shards are finished and kept"):
            prepare(records, out, shard_size=5, max_broken=0.5)
    assert json.loads((out / "train/unfinished/plan.json").read_text())["shard_size"] == 5
    assert prepare(records, out, shard_size=5, max_broken=0.5)["kept"] == 5
    assert_whole(out, tmp_path / "unbroken")
