"""`kill -9` at 30 random moments, a third of them in the middle of writing a checkpoint, and a disk that is full.

Whenever it happens, the folder holds a whole checkpoint that is no older than the last finished one, and the run goes
on from it as if nothing had been. Real processes; the disk is a tmpfs, for which the tests must be root on Linux.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import Tiny, figures, read_lines, same_bits, weights
from warm import KILLED, Job

from mmgem.training.checkpoint import RunFolder
from mmgem.training.saved import read_checkpoint
from mmgem.training.watchdog import EXIT_CODE

STEPS, EVERY, GLOBAL_BATCH = 36, 2, 16
"""STEPS of each of the two stages."""
SETTINGS = (
    *(f"stages.{n}.samples={GLOBAL_BATCH * STEPS}" for n in (0, 1)),
    f"training.checkpoint_every={EVERY}",
    "training.log_keys=true",
    "training.sample_every=0",
    "training.late_after=4",  # ranks that are left over soon see who is gone
)
# Checkpoints of 20 MB, so that writing one takes a while.
LARGE = ("model.llm.config.hidden_size=256", "model.llm.config.intermediate_size=512")
STEP = re.compile(r"step-(\d+)\.(\w+)")


class Runs:
    """A run in a folder, again and again."""

    def __init__(self, tiny: Tiny, folder: Path, count: int, *settings: str, run: Path | None = None):
        self.tiny, self.folder, self.count, self.settings = tiny, folder, count, settings
        self.run, self.started = run or folder / "run", 0

    def job(self) -> Job:
        self.started += 1
        arguments = self.tiny.arguments(self.run, *SETTINGS, *self.settings, resume="auto")
        return Job(arguments, self.count, self.folder / f"out-{self.started}")

    def steps(self, suffix: str) -> list[int]:
        """Of the files or folders with this suffix among the checkpoints."""
        found = os.listdir(self.run / "checkpoints") if (self.run / "checkpoints").is_dir() else []
        matches = [match for name in found if (match := STEP.fullmatch(name))]
        return [int(match[1]) for match in matches if match[2] == suffix]


# --- kills ----------------------------------------------------------------------------------------------------------


def until(runs: Runs, job: Job, moment: float | int | None) -> int:
    """Waits, and gives the step of the last checkpoint that was seen finished.

    moment: seconds from now; or a number of further steps; or None, until a checkpoint is being written.
    """
    begun, log, finished = time.monotonic(), runs.run / "log.jsonl", 0
    lines = log.read_bytes().count(b"\n") if log.is_file() else 0
    while True:
        assert job.running, f"ended before it could be killed: {job.printed}"
        assert time.monotonic() - begun < 120, job.printed
        finished = max([finished, *runs.steps("ckpt")])
        if moment is None:
            reached = any(step > finished for step in runs.steps("unfinished"))
        elif isinstance(moment, int):
            reached = log.is_file() and log.read_bytes().count(b"\n") >= lines + moment
        else:
            reached = time.monotonic() - begun >= moment
        if reached:
            return finished
        time.sleep(0.001)


def look(runs: Runs, finished: int) -> None:
    """What a kill has left."""
    folder = RunFolder(runs.run)
    newest = folder.newest()
    if newest is None:
        assert not finished and not (folder.checkpoints / "last.ckpt").is_symlink()
        return
    last = (folder.checkpoints / "last.ckpt").resolve(strict=True)
    for path in {newest, last}:
        saved = read_checkpoint(path)
        step = saved.run_state.stage * STEPS + saved.run_state.samples // GLOBAL_BATCH
        assert path.name == f"step-{step:08d}.ckpt"
        found = saved.weights()
        assert {"h1.weight", "h2.weight", "logit_scale"} <= found.keys()
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert int(newest.stem[-8:]) >= finished
    # A kill between the two renames leaves the link one behind; what goes on takes the newest.
    assert int(last.stem[-8:]) >= finished - EVERY


@pytest.mark.parametrize(("strategy", "kills", "writing"), [("none", 22, 7), ("deepspeed_2", 8, 3)])
def test_kill_9(tiny: Tiny, tmp_path: Path, strategy: str, kills: int, writing: int) -> None:
    settings = LARGE if strategy == "none" else (*LARGE, f"training.strategy={strategy}")
    count, chance = (1, random.Random()) if strategy == "none" else (2, random.Random())
    unbroken = Runs(tiny, tmp_path / "unbroken", count, *settings)
    begun = time.monotonic()
    job = unbroken.job()
    job.wait_for_lines(unbroken.run / "log.jsonl", 1)
    start = time.monotonic() - begun
    job.finish()
    runs, hits, done = Runs(tiny, tmp_path / "run", count, *settings), 0, 0
    while done < kills or hits < writing:
        job = runs.job()
        when = None if hits < writing and done % 3 == 2 else chance.choice([chance.uniform(0, start), 1, 2])
        finished = until(runs, job, when)
        if isinstance(when, int):
            time.sleep(chance.uniform(0, 0.1))
        only = chance.choice([0, 1]) if count > 1 and done % 4 == 1 else None
        if only is None:
            job.kill()
        else:
            left_over = kill_one(job, only)
            assert re.search(rf"rank {only} \(host", left_over), left_over
        written = any(step > finished for step in runs.steps("unfinished"))
        hits, done = hits + written, done + 1
        look(runs, finished)
        reached = len(figures_so_far(runs))
        print(f"kill {done}: after step {reached}, checkpoint {finished} finished{', one begun' if written else ''}")
        assert reached < 2 * STEPS
    runs.job().finish()
    assert read_lines(runs.run / "keys.jsonl") == read_lines(unbroken.run / "keys.jsonl")
    assert figures(runs.run) == figures(unbroken.run) and len(figures(runs.run)) == 2 * STEPS
    assert same_bits(weights(runs.run / "model"), weights(unbroken.run / "model"))
    assert {path.name for path in (runs.run / "checkpoints").iterdir()} == {
        f"step-{2 * STEPS:08d}.ckpt",
        "last.ckpt",
        "losses.json",
    }


def kill_one(job: Job, number: int) -> str:
    """One rank alone. Gives what the other says when it ends by itself."""
    assert job.running
    job.ranks[number].kill()
    other = job.ranks[1 - number]
    assert other.end()[0] == EXIT_CODE, other.printed
    assert job.ranks[number].end()[0] == KILLED
    assert "Traceback" not in other.printed, other.printed
    return other.printed


def figures_so_far(runs: Runs) -> list[str]:
    log = runs.run / "log.jsonl"
    return log.read_text().splitlines() if log.is_file() else []


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, megabytes: float) -> Iterator[None]:
    """A file system of its own at `place`, for the block. Skips where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs Linux and root")
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", sized(megabytes), "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def grow(place: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,{sized(200)}", place], check=True)


def sized(megabytes: float) -> str:
    return f"size={round(megabytes * 1024)}k"
