"""`mmgem refine` with a real model: killed half-way, and gone on with on two ranks, it gives the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tiny import Process

from mmgem.data.scene_noise import noisy_scenes
from mmgem.data.shards import ShardedDataset


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy") / "raw"
    noisy_scenes(folder, 160, seed=3, size=64, a_tar=20)
    return folder


def command(raw: Path, out: Path, model: Path) -> list[str | Path]:
    made = ["--captioner", f"mmgem:{model}", "--painter", "scenes", "--threshold", "-0.5", "--shard-size", "50"]
    encoders = ["--encoder", f"mmgem:{model}", "--encoder", "timm:resnet10t", "--combine", "mean"]
    return ["refine", raw, "--out", out, *encoders, *made]


def written(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted((out / "train").rglob("*")) if f.is_file()}


def test_killed_and_gone_on_with_on_one_and_two_ranks(raw: Path, model: Path, tmp_path: Path) -> None:
    whole = Process(*command(raw, tmp_path / "whole", model))
    stopped = Process(*command(raw, tmp_path / "stopped", model))
    units = tmp_path / "stopped/.refine/units"
    end = time.monotonic() + 120
    while len(list(units.glob("*.jsonl"))) < 2:
        assert stopped.popen.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    stopped.signal(signal.SIGKILL, group=True)
    stopped.wait()
    done = len(list(units.glob("*.jsonl")))
    assert done < 8 and not (tmp_path / "stopped/train/index.json").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        Process(*command(raw, tmp_path / "stopped", model), **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    finished = [process.wait() for process in [whole, *ranks]]
    assert [one.code for one in finished] == [0, 0, 0], finished[-1].err
    assert finished[1].out.splitlines()[-1] == f"{tmp_path}/stopped/refine.html" and finished[2].out == ""
    assert written(tmp_path / "whole") == written(tmp_path / "stopped")
    split = ShardedDataset(tmp_path / "whole/train", verify=True)
    fates = {split.sample(n).meta["refine"]["fate"] for n in range(len(split))}
    assert {"kept", "painted"} <= fates and os.path.getsize(tmp_path / "whole/refine.html") > 5000
