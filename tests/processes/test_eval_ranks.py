"""Three ranks that share an evaluation get what one gets, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Tiny
from warm import Job


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert tiny.train(folder, "stages.0.samples=64", "stages.1.samples=64") == 0
    return folder


def evaluated(model: Path, data: Path, out: Path, ranks: int) -> list[dict]:
    # 5 batches of 5 and less: the last rank has fewer than the others.
    command = ["eval", "all", "--model", str(model), "--data", str(data), "--out", str(out), "--batch-size", "5"]
    job = Job(command, ranks, out.with_suffix(".out"))
    job.finish()
    assert job.ranks[0].printed.endswith("report.html\n")
    assert all("report.html" not in rank.printed for rank in job.ranks[1:])
    return json.loads((out / "metrics.json").read_text())


def test_three_ranks_give_the_figures_of_one(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    one = evaluated(model, tiny.data, tmp_path / "one", 1)
    three = evaluated(model, tiny.data, tmp_path / "three", 3)
    assert len(one) >= 6 and one == three
