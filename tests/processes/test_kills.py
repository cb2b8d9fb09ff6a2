"""`kill -9` at 30 random moments, a third of them in the middle of writing a checkpoint, and a disk that is full.

Whenever it happens, the folder holds a whole checkpoint that is no older than the last finished one, and the run goes
on from it as if nothing had been. Real processes; the disk is a tmpfs, for which the tests must be root on Linux.
"""

from __future__ import annotations

import functools
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import Tiny, figures, read_lines, same_bits, weights
from warm import KILLED, Job

from mmgem.training.checkpoint import RunFolder
from mmgem.training.saved import read_checkpoint
from mmgem.training.watchdog import EXIT_CODE

EVERY, GLOBAL_BATCH = 2, 16
Steps = tuple[int, int]
"""Of the two stages."""
SETTINGS = (
    f"training.checkpoint_every={EVERY}",
    "training.log_keys=true",
    "training.sample_every=0",
    "training.late_after=4",  # ranks that are left over soon see who is gone
)
SHORT: Steps = (4, 16)
# Checkpoints of 20 MB, so that writing one takes a while.
LARGE = ("model.llm.config.hidden_size=256", "model.llm.config.intermediate_size=512")
STEP = re.compile(r"step-(\d+)\.(\w+)")


class Runs:
    """A run in a folder, again and again."""

    def __init__(self, tiny: Tiny, run: Path, strategy: str, steps: Steps, *settings: str, out: Path | None = None):
        """out: where what the ranks print goes; by default beside the run."""
        self.tiny, self.run, self.stage_steps, self.started = tiny, run, steps, 0
        self.out, self.count = out or run.parent, 1 if strategy == "none" else 2
        self.settings = (*settings, *(f"stages.{n}.samples={GLOBAL_BATCH * steps[n]}" for n in (0, 1)))
        if strategy != "none":
            self.settings += (f"training.strategy={strategy}",)

    def job(self) -> Job:
        self.started += 1
        arguments = self.tiny.arguments(self.run, *SETTINGS, *self.settings, resume="auto")
        return Job(arguments, self.count, self.out / f"{self.run.name}-out-{self.started}")

    @property
    def lines(self) -> int:
        """Of its log."""
        log = self.run / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    def steps(self, suffix: str) -> list[int]:
        """Of the files or folders with this suffix among the checkpoints."""
        found = os.listdir(self.run / "checkpoints") if (self.run / "checkpoints").is_dir() else []
        matches = [match for name in found if (match := STEP.fullmatch(name))]
        return [int(match[1]) for match in matches if match[2] == suffix]


# --- kills ----------------------------------------------------------------------------------------------------------


def until(runs: Runs, job: Job, seconds: float, steps: int, writing: bool) -> int:
    """Waits, and gives the step of the last checkpoint that was seen finished.

    seconds, steps: from now on; what comes first. writing: instead until a checkpoint is being written.
    """
    begun, lines, finished = time.monotonic(), runs.lines, 0
    while True:
        assert job.running, f"ended before it could be killed: {job.printed}"
        assert time.monotonic() - begun < 120, job.printed
        finished = max([finished, *runs.steps("ckpt")])
        if writing:
            reached = any(step > finished for step in runs.steps("unfinished"))
        else:
            reached = time.monotonic() - begun >= seconds or runs.lines >= lines + steps
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
        step = sum(runs.stage_steps[: saved.run_state.stage]) + saved.run_state.samples // GLOBAL_BATCH
        assert path.name == f"step-{step:08d}.ckpt"
        found = saved.weights()
        assert {"h1.weight", "h2.weight", "logit_scale"} <= found.keys()
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert int(newest.stem[-8:]) >= finished
    # A kill between the two renames leaves the link one behind; what goes on takes the newest.
    assert int(last.stem[-8:]) >= finished - EVERY


@pytest.mark.parametrize(("strategy", "kills", "writing", "steps"), [("none", 24, 8, 36), ("deepspeed_2", 6, 2, 12)])
def test_kill_9(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    kills: int,
    writing: int,
    steps: int,
) -> None:
    """writing: so many of the kills while a checkpoint is being written. steps: of each of the two stages."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    unbroken = Runs(tiny, tmp_path / "unbroken", strategy, (steps, steps), *LARGE)
    begun = time.monotonic()
    job = unbroken.job()
    job.wait_for_lines(unbroken.run / "log.jsonl", 1)
    start = time.monotonic() - begun
    job.finish()
    chance, runs, hits, done = random.Random(), Runs(tiny, tmp_path / "run", strategy, (steps, steps), *LARGE), 0, 0
    while done < kills or hits < writing:
        job = runs.job()
        # In a third of the kills while it starts, if it has not come further by then.
        seconds = chance.uniform(0, start) if done % 3 == 0 else 100
        finished = until(runs, job, seconds, chance.randint(1, 3), writing=hits < writing and done % 3 == 2)
        time.sleep(chance.choice([0, chance.uniform(0, 0.1)]) if done % 3 == 1 else 0)
        if runs.count > 1 and done % 4 == 1:  # once at any moment, once while writing, but not before they have met
            kill_one(job, chance.choice([0, 1]))
        else:
            job.kill()
        written = any(step > finished for step in runs.steps("unfinished"))
        hits, done = hits + written, done + 1
        look(runs, finished)
        print(f"kill {done}: after step {runs.lines}, checkpoint {finished} finished{', one begun' if written else ''}")
        assert runs.lines < 2 * steps
    runs.job().finish()
    assert_same(runs, unbroken)
    found = {path.name for path in (runs.run / "checkpoints").iterdir()}
    assert found == {f"step-{2 * steps:08d}.ckpt", "last.ckpt", "losses.json"}
    elsewhere = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert not elsewhere, "checkpoints were begun outside the run's folder, and the kills have left them there"


def assert_same(runs: Runs, unbroken: Runs) -> None:
    assert read_lines(runs.run / "keys.jsonl") == read_lines(unbroken.run / "keys.jsonl")
    assert figures(runs.run) == figures(unbroken.run) and runs.lines == sum(runs.stage_steps)
    assert same_bits(weights(runs.run / "model"), weights(unbroken.run / "model"))


def kill_one(job: Job, number: int) -> None:
    """One rank alone: the other ends by itself, and names it."""
    assert job.running
    job.ranks[number].kill()
    other = job.ranks[1 - number]
    assert other.end()[0] == EXIT_CODE, other.printed
    assert job.ranks[number].end()[0] == KILLED
    assert "Traceback" not in other.printed, other.printed
    assert re.search(rf"rank {number} \(host", other.printed), other.printed


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, size: float) -> Iterator[None]:
    """A file system of so many bytes at `place`, for the block. Skips where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs Linux and root")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(size)}", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def make_room(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)


def size_of(path: Path) -> int:
    """As it is on a tmpfs: in whole pages."""
    path = path.resolve()
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files)


def error_of(printed: str) -> str:
    errors = [line for line in printed.splitlines() if line.startswith("mmgem: error:")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """A run with room, of each strategy."""

    @functools.cache
    def run(strategy: str) -> Runs:
        runs = Runs(tiny, tmp_path_factory.mktemp(strategy) / "run", strategy, SHORT)
        runs.job().finish()
        return runs

    return run


@pytest.mark.parametrize("strategy", ["none", "deepspeed_2"])
def test_a_disk_too_small_for_the_next_checkpoint(
    tiny: Tiny, tmp_path: Path, unbroken: Callable[[str], Runs], strategy: str
) -> None:
    """That a checkpoint does not fit ends the run with an error; the one before it stands, and the run goes on."""
    whole = unbroken(strategy).run
    one = size_of(whole / "checkpoints/last.ckpt")
    later = ("checkpoints", "model", "stages/fine-grained")
    rest = size_of(whole) - sum(size_of(whole / folder) for folder in later)
    with small_disk(tmp_path / "disk", 2.5 * one + rest):
        keep = "training.keep_checkpoints=5"
        runs = Runs(tiny, tmp_path / "disk/run", strategy, SHORT, keep, out=tmp_path)
        job = runs.job()
        assert job.wait(60) == [2] * runs.count, job.printed
        for rank in job.ranks:
            error = error_of(rank.printed)
            assert "step-00000006.ckpt: cannot be saved" in error and "make room" in error
            assert "step-00000004.ckpt stands" in error
        assert sorted(runs.steps("ckpt")) == [2, 4] and not runs.steps("unfinished") and not runs.steps("going")
        look(runs, 4)
        make_room(tmp_path / "disk")
        runs.job().finish()
        assert_same(runs, unbroken(strategy))


@pytest.mark.parametrize("strategy", ["none", "deepspeed_2"])
def test_a_disk_without_room_for_a_line(
    tiny: Tiny, tmp_path: Path, unbroken: Callable[[str], Runs], strategy: str
) -> None:
    """Others fill the disk between two checkpoints: the log is the first to find no room."""
    with small_disk(tmp_path / "disk", 100e6):
        seldom = "training.checkpoint_every=100"
        runs = Runs(tiny, tmp_path / "disk/run", strategy, SHORT, seldom, out=tmp_path)
        job = runs.job()
        job.wait_for_lines(runs.run / "log.jsonl", SHORT[0] + 1)
        subprocess.run(["dd", "if=/dev/zero", f"of={tmp_path / 'disk/filler'}", "bs=64k"], capture_output=True)
        codes = job.wait(60)
        error = error_of(job.ranks[0].printed)
        assert codes[0] == 2 and "No space left" in error and f"{SHORT[0]:08d}.ckpt stands" in error, error
        for rank, code in list(zip(job.ranks, codes, strict=True))[1:]:
            error = error_of(rank.printed)
            assert code == EXIT_CODE and "rank 0 (host" in error and "No space left" in error, error
        look(runs, SHORT[0])
        (tmp_path / "disk/filler").unlink()
        runs.job().finish()
        assert_same(runs, unbroken(strategy))


def test_a_disk_too_small_for_the_model(tiny: Tiny, tmp_path: Path, unbroken: Callable[[str], Runs]) -> None:
    """The stage's checkpoint still fits, what it ends with does not."""
    whole = unbroken("none").run
    with small_disk(tmp_path / "disk", size_of(whole) - 2.5 * size_of(whole / "model")):
        once = "training.checkpoint_every=100"
        runs = Runs(tiny, tmp_path / "disk/run", "none", SHORT, once, out=tmp_path)
        job = runs.job()
        assert job.wait(60) == [2], job.printed
        error = error_of(job.printed)
        assert "stages/global: cannot be written" in error and "No space left" in error, error
        look(runs, SHORT[0])
        assert not any((runs.run / "stages").iterdir())
        make_room(tmp_path / "disk")
        runs.job().finish()
        assert_same(runs, unbroken("none"))
