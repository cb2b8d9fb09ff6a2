"""Data with every fault that there is: the run ends, and names each; past the budget it stops, and says so."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from spoil import shards_of
from tiny import CONFIG, Process, Tiny, figures, read_lines

from mmgem.cli import main
from mmgem.data.samples import record_of
from mmgem.data.shards import ShardedDataset

TARS, IN_EACH = 6, 16
RUN = ("stages=[{name: only, samples: 192, global_batch: 16, max_regions: 3}]", "training.log_keys=true")
Member = tuple[str, bytes]


@pytest.fixture(scope="module")
def faulty(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars as others write them, with the faults; indexed, and then two of them spoiled further."""
    folder = tmp_path_factory.mktemp("faulty")
    source = ShardedDataset(tiny.data / "train")
    for number in range(TARS):
        members: list[Member] = []
        for index in range(number * IN_EACH, (number + 1) * IN_EACH):
            sample = source.sample(index)
            record = record_of(sample)
            members += [(f"{index:05d}.jpg", sample.image), (f"{index:05d}.json", json.dumps(record).encode())]
        spoil(number, members)
        write_tar(folder / f"{number:05d}.tar", members)
    cut(folder / "00003.tar")
    assert main(["data", "index", str(folder), "--max-broken", "0.5"]) == 0
    cut(folder / "00004.tar")
    changed = bytearray((folder / "00005.tar").read_bytes())
    changed[5000] ^= 1
    (folder / "00005.tar").write_bytes(changed)
    return folder


def spoil(tar: int, members: list[Member]) -> None:
    """Members stand in pairs: picture, record."""
    if tar == 0:
        name, picture = members[4]
        members[4] = (name, picture[: len(picture) // 2])  # 00002: a truncated JPEG
        members[8] = (members[8][0], b"")  # 00004: a zero-byte file
        members += members[12:14]  # 00006: a key that is there twice
    if tar == 1:
        members[5] = (members[5][0], b'{"captions": [], "width": 64, "height": 64}')  # 00018: no caption
        members[9] = (members[9][0], b'{"captions": ["a')  # 00020: invalid JSON
        record = json.loads(members[13][1])
        record["regions"] = [{"box": [1, 2, float("nan"), 9], "phrase": "nothing"}, *record.get("regions", [])]
        members[13] = (members[13][0], json.dumps(record).encode())  # 00022: a box of NaN


def write_tar(path: Path, members: list[Member]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def arguments(data: Path, run: Path, *overrides: str) -> list[str]:
    return ["train", "--config", str(CONFIG), f"run={run}", f"data.path={data}", *RUN, *overrides]


def test_the_run_ends_and_names_all(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(arguments(faulty, run, "data.max_broken=0.9")) == 0
    named = {(line["key"], line["reason"]) for line in read_lines(run / "broken.jsonl") if line["key"]}
    assert named >= {
        ("00002", "broken image"),
        ("00004", "empty image"),
        ("00006", "duplicate key"),
        ("00018", "no caption and no region"),
        ("00020", "broken metadata"),
        ("00022", "box is not four numbers"),
    }
    tars = {(Path(line["shard"]).name, line["reason"]) for line in read_lines(run / "broken.jsonl") if not line["key"]}
    assert tars == {
        ("00003.tar", "tar cut short"),
        ("00004.tar", "shard cut short"),
        ("00005.tar", "shard has another checksum"),
    }
    lines, seen = figures(run), [key for line in read_lines(run / "keys.jsonl") for key in line["keys"]]
    assert len(lines) == 12 and len(seen) == 192, "every step is full: others take the places of broken ones"
    whole_tars = [f"{n:05d}" for n in range(4 * IN_EACH, 6 * IN_EACH)]
    assert not set(seen) & {"00002", "00004", "00018", "00020", *whole_tars}
    assert {"00006", "00022"} <= set(seen), "what is left of them is good"
    left = sum(shard["samples"] for shard in shards_of(faulty)[:4]) - 1
    assert len(set(seen)) == left
    broken = sum(line["broken"] for line in lines)
    assert f"{broken} broken samples were replaced; named in {run}/broken.jsonl" in capsys.readouterr().err


def test_the_report_says_what_was_broken(faulty: Path, tiny: Tiny, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(arguments(faulty, run, "data.max_broken=0.9", "stages.0.samples=96")) == 0
    assert main(["eval", "retrieval", "--model", str(run), "--data", str(tiny.data), "--out", str(out)]) == 0
    text = re.sub(r"\s+", " ", (out / "report.html").read_text())
    assert "Broken in the training data" in text
    assert (
        "left out by the index: 5 (00006: duplicate key, 00004: empty image, 00018: no caption and no region, …)"
        in text
    )
    assert re.search(r"samples and shards replaced: 3 \(.*00005.tar: shard has another checksum", text)
    assert "parts of samples left out: 1 (00022: box is not four numbers); all are named in broken.jsonl" in text


def test_past_the_budget_it_stops(faulty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = Process(*arguments(faulty, run, "data.max_broken=0.05")).wait()
    assert done.code == 2 and "Traceback" not in done.err
    error = done.err.strip().splitlines()[-1]
    assert re.match(
        r"mmgem: error: \d+ of \d+ samples are broken, more than data.max_broken=0.05; they are named in ", error
    )
    assert f"{run}/broken.jsonl; raise the share and go on, or mend the data" in error
    assert read_lines(run / "broken.jsonl")
    go_on = ["--resume", "auto"]
    assert main([*arguments(faulty, run, "data.max_broken=0.9"), *go_on]) == 0
    assert main(arguments(faulty, tmp_path / "other", "data.max_broken=0.9")) == 0
    assert figures(run) == figures(tmp_path / "other")


def test_what_is_read_does_not_depend_on_workers(faulty: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        assert main(arguments(faulty, tmp_path / str(workers), "data.max_broken=0.9", f"data.workers={workers}")) == 0
    assert figures(tmp_path / "0") == figures(tmp_path / "2")
    keys = [read_lines(tmp_path / workers / "keys.jsonl") for workers in ("0", "2")]
    assert keys[0] == keys[1]
    broken = [{(line["key"], line["shard"]) for line in read_lines(tmp_path / w / "broken.jsonl")} for w in ("0", "2")]
    assert broken[0] == broken[1]


def test_the_check_names_them_too(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(faulty), "--out", str(tmp_path)]) == 1
    (split,) = json.loads((tmp_path / "check.json").read_text())["splits"].values()
    named = {(one["name"], row["reason"]) for row in split["findings"] for one in row["named"]}
    left_out = {("00004", "left out when the index was made"), ("00020", "left out when the index was made")}
    assert named >= {("00002", "broken image"), ("00022", "box is not four numbers"), *left_out}
    failing = {row["reason"] for row in split["findings"] if row["fails"]}
    assert (
        failing >= {"shard cut short", "shard has another checksum"}
        and "left out when the index was made" not in failing
    )
    assert "5 × left out when the index was made" in capsys.readouterr().out
