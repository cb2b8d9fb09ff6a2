"""A run that is killed anywhere, and goes on, on whatever number of ranks, is the run that was never stopped.

The ranks are real processes over gloo, placed as a scheduler would place them, and killed with SIGKILL.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from tiny import FP64, Process, Tiny, figures, read_lines, same_bits, weights
from warm import Job

TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 120
LENGTH = ("stages.0.samples=960", "stages.1.samples=960")
"""60 steps of each stage."""
SETTINGS = (*LENGTH, "training.log_keys=true", "data.flip=0.5", "data.crop_scale=[0.5,1.0]", "data.color_jitter=0.2")
# The method's own layers in the usual precision, at a rate for pretrained parts: at a high one, training in fp32 makes
# the rounding of the first step large within a few.
FP32 = ("model.vision.frozen_statistics=true", "stages.0.lr=2e-5", "stages.1.lr=2e-5")
OFTEN = "training.checkpoint_every=4"


def start(tiny: Tiny, run: Path, count: int, *settings: str, nodes: int = 1) -> Job:
    place = run.parent / f"{run.name}.{len(list(run.parent.iterdir()))}"
    return Job(tiny.arguments(run, *SETTINGS, *settings, resume="auto"), count, place, nodes=nodes)


def finish(tiny: Tiny, run: Path, count: int, *settings: str) -> None:
    start(tiny, run, count, *settings).finish()


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def keys(run: Path) -> list[list[str]]:
    return [line["keys"] for line in read_lines(run / "keys.jsonl")]


def test_killed_twenty_times(tiny: Tiny, tmp_path: Path) -> None:
    """At random moments of starting, training and saving, with and without workers: not a digit differs."""
    begun = time.monotonic()
    unbroken = Process(*tiny.arguments(tmp_path / "unbroken", *SETTINGS, OFTEN)[1:], script=TRAIN)
    unbroken.wait_for_lines(tmp_path / "unbroken/log.jsonl", 1)
    takes = time.monotonic() - begun
    assert unbroken.wait().code == 0
    run, chance, reached = tmp_path / "run", random.Random(0), []
    log = run / "log.jsonl"
    for number in range(20):
        settings = (OFTEN, f"data.workers={chance.choice([0, 0, 2])}")
        if number % 4 == 3:
            cold = Process(*tiny.arguments(run, *SETTINGS, *settings, resume="auto")[1:], script=TRAIN)
            # While it starts, or where it starts faster than the first one did, soon after.
            end = time.monotonic() + chance.uniform(0, takes)
            while time.monotonic() < end and lines(log) < max(reached) + 3:
                time.sleep(0.01)
            cold.signal(signal.SIGKILL, group=True)
            assert cold.wait().code == -signal.SIGKILL
        else:
            # So many steps further, and somewhere in the next one, or in the saving of a checkpoint before it.
            job = start(tiny, run, 1, *settings)
            job.wait_for_lines(log, max(reached, default=0) + chance.randint(1, 7))
            time.sleep(chance.uniform(0, 0.05))
            job.kill()
        reached.append(lines(log))
    print("killed after steps", reached)
    assert 60 < max(reached) < STEPS
    finish(tiny, run, 1, OFTEN)
    assert keys(run) == keys(tmp_path / "unbroken") and len(keys(run)) == STEPS
    assert figures(run) == figures(tmp_path / "unbroken")
    assert same_bits(weights(run / "model"), weights(tmp_path / "unbroken/model"))


@pytest.mark.parametrize(("settings", "most"), [(FP64, 1e-12), (FP32, 1e-6)], ids=["fp64", "fp32"])
def test_one_two_four_and_one_rank_in_turn(tiny: Tiny, tmp_path: Path, settings: tuple[str, ...], most: float) -> None:
    finish(tiny, tmp_path / "unbroken", 1, *settings)
    run = tmp_path / "run"
    for count, nodes, kill_after in ((1, 1, 35), (2, 2, 64), (4, 2, 93)):
        job = start(tiny, run, count, *settings, nodes=nodes)
        job.wait_for_lines(run / "log.jsonl", kill_after)
        job.kill()
    finish(tiny, run, 1, *settings)
    assert keys(run) == keys(tmp_path / "unbroken") and len(keys(run)) == STEPS
    pairs = list(zip(figures(run), figures(tmp_path / "unbroken"), strict=True))
    names = [name for name in pairs[-1][0] if name.startswith("loss")]
    differences = [abs(ours[n] / theirs[n] - 1) for ours, theirs in pairs for n in names if theirs.get(n)]
    print(f"largest difference of a loss: {max(differences):.2g} of it")
    assert max(differences) < most
    assert any(differences), "on several ranks the sums are taken in another order: equal digits would be no such run"
    assert all(ours["regions"] == theirs["regions"] for ours, theirs in pairs)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(tiny, run, 2, *FP64)
    job.wait_for_lines(run / "log.jsonl", 5)
    os.kill(job.ranks[1].pid, signal.SIGTERM)
    assert job.wait() == [143, 143], job.printed
    assert "stopped; to go on:" in job.ranks[0].printed and "Traceback" not in job.printed
    steps = len(figures(run))
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{steps:08d}.ckpt"], "nothing is done twice"
