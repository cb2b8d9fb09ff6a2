"""DeepSpeed's ZeRO 2 and 3: killed, and resumed on other numbers of ranks, a run has the losses of the unbroken one.

Real ranks over gloo, killed with SIGKILL. A checkpoint of so many ranks is shared out anew for another number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, figures, read_lines
from warm import Job

STEPS = 10
"""Of each of the two stages."""
SETTINGS = (
    *(f"stages.{n}.samples={16 * STEPS}" for n in (0, 1)),
    # A rate for pretrained parts, as in test_exact_resume.py. The decay is one that shows where it goes astray.
    *(f"stages.{n}.{setting}" for n in (0, 1) for setting in ("lr=2e-5", "weight_decay=8")),
    "model.vision.frozen_statistics=true",
    "training.log_keys=true",
    "training.checkpoint_every=3",
    "training.sample_every=0",
)
MOST = 1e-5
"""Relative difference of a loss."""


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one rank, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("unbroken")
    job(tiny, folder / "run", 1).finish()
    return folder / "run"


def job(tiny: Tiny, run: Path, count: int, *settings: str) -> Job:
    out = run.parent / f"out-{len(list(run.parent.glob('out-*')))}"
    return Job(tiny.arguments(run, *SETTINGS, *settings, resume="auto"), count, out)


def keys(run: Path) -> list[Any]:
    return [line["keys"] for line in read_lines(run / "keys.jsonl")]


def difference(run: Path, other: Path) -> float:
    """The largest of a loss, as a share of it."""
    pairs = list(zip(figures(run), figures(other), strict=True))
    names = [name for name in pairs[-1][0] if name.startswith("loss")]
    assert len(pairs) == 2 * STEPS and len(names) == 5
    return max(abs(ours[n] / theirs[n] - 1) for ours, theirs in pairs for n in names if theirs.get(n))


def kill_in(started: Job, run: Path, steps: Sequence[int], chance: random.Random) -> None:
    step = chance.choice(steps)
    started.wait_for_lines(run / "log.jsonl", step)
    started.kill()
    print(f"{len(started.ranks)} ranks killed after step {len(figures(run))}")


@pytest.mark.parametrize("strategy", ["deepspeed_2", "deepspeed_3"])
def test_killed_on_two_ranks_then_one_then_four(tiny: Tiny, tmp_path: Path, unbroken: Path, strategy: str) -> None:
    zero, chance = f"training.strategy={strategy}", random.Random()
    run = tmp_path / "run"
    # Past a checkpoint of the stage in which it is, since such are what is shared out.
    for count, steps in ((2, (4, 5)), (2, (7, 8)), (1, (STEPS + 4, STEPS + 5))):
        kill_in(job(tiny, run, count, zero), run, steps, chance)
    last = job(tiny, run, 4, zero)
    last.finish()
    assert "sharing the parts of 1 ranks out among 4" in last.printed
    job(tiny, tmp_path / "two", 2, zero).finish()
    assert keys(run) == keys(tmp_path / "two") == keys(unbroken)
    found = {name: difference(run, other) for name, other in (("one rank", unbroken), ("two", tmp_path / "two"))}
    print(f"{strategy}: largest difference of a loss from the unbroken run on {found}")
    assert max(found.values()) < MOST
    assert any(found.values()), (
        "on several ranks the sums are taken in another order: equal digits would be no such run"
    )
