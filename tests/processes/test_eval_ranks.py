"""Three ranks that share an evaluation get what one gets, to the last digit."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from tiny import Process, Tiny, run


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run(*tiny.arguments(folder, "stages.0.samples=64", "stages.1.samples=64"))
    assert done.code == 0, done.err
    return folder


def evaluated(model: Path, data: Path, out: Path, ranks: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # 5 batches of 5 and less: the last rank has fewer than the others.
    command = ["eval", "all", "--model", model, "--data", data, "--out", out, "--batch-size", "5"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    shared["LOCAL_WORLD_SIZE"] = str(ranks)
    started = [Process(*command, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    done = [process.wait() for process in started]
    assert [d.code for d in done] == [0] * ranks, done[-1].err
    assert done[0].out.endswith("report.html\n") and all(d.out == "" for d in done[1:])
    return json.loads((out / "metrics.json").read_text())


def test_three_ranks_give_the_figures_of_one(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    one = evaluated(model, tiny.data, tmp_path / "one", 1)
    three = evaluated(model, tiny.data, tmp_path / "three", 3)
    assert len(one) >= 6 and one == three
