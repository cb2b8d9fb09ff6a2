"""Ranks that start at once: forks of a process that has imported everything, which takes longer than what they do.

Receives the arguments of `mmgem`. Gives processes of their own, each in a group of its own, with the time of its end.
Run as a script it is the process that forks: it reads one request a line, as JSON, until an empty one or the end of
its input, and then ends its ranks, too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


# --- for tests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    arguments: list[str]
    place: dict[str, str]
    """Which of the ranks it is, as a launcher says it."""
    out: str
    """What it prints; beside it, `.pid`, and after its end `.end`."""
    spoiled: str | None = None
    """Key of a sample whose picture holds a NaN."""


class Rank:
    def __init__(self, request: Request):
        self.out = Path(request.out)
        forks = _forks()
        assert forks.stdin is not None
        forks.stdin.write(json.dumps(asdict(request)) + "\n")
        self.pid = int(self._when_there(".pid", 120))
        self.begun = time.monotonic()

    def _when_there(self, suffix: str, timeout: float) -> str:
        file = self.out.with_suffix(suffix)
        wait_until(file.exists, timeout, lambda: f"no {file} after {timeout} s; printed so far: {self.printed}")
        return file.read_text()

    @property
    def running(self) -> bool:
        return not self.out.with_suffix(".end").exists()

    @property
    def printed(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def end(self, timeout: float = 240) -> tuple[int, float]:
        """Its exit code (negative: the signal), and when it ended, by `time.monotonic`."""
        return tuple(json.loads(self._when_there(".end", timeout)))

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)


class Job:
    """The ranks of one run, as those of one machine, or of several."""

    def __init__(self, arguments: Sequence[str], count: int, out: Path, spoiled: str | None = None, nodes: int = 1):
        """out: a folder for what they print; made anew."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out.mkdir(parents=True)
        self.ranks = []
        for rank in range(count):
            local = count // nodes
            place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
            place |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TMPDIR": os.environ.get("TMPDIR", tempfile.gettempdir()),
            }
            words = {name: str(value) for name, value in place.items()}
            self.ranks.append(Rank(Request([*arguments], words, str(out / f"{rank}.out"), spoiled)))

    @property
    def running(self) -> bool:
        return all(rank.running for rank in self.ranks)

    def wait(self, timeout: float = 240) -> list[int]:
        return [rank.end(timeout)[0] for rank in self.ranks]

    def finish(self) -> None:
        for rank in self.ranks:
            assert rank.end()[0] == 0, rank.printed

    def wait_for_lines(self, log: Path, lines: int) -> None:
        """Until the log has so many."""

        def reached() -> bool:
            assert self.running, f"ended before step {lines}: {self.printed}"
            return log.is_file() and log.read_bytes().count(b"\n") >= lines

        wait_until(reached, 240, lambda: f"no {lines} lines in {log}: {self.printed}")

    def kill(self) -> None:
        """All of them at once, as a machine fails."""
        assert self.running, f"ended before it could be killed: {self.printed}"
        for rank in self.ranks:
            rank.kill()
        assert set(self.wait()) == {KILLED}

    @property
    def printed(self) -> str:
        return "\n".join(rank.printed for rank in self.ranks)


def wait_until(true: Callable[[], bool], timeout: float, failure: Callable[[], str], interval: float = 0.003) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, failure()
        time.sleep(interval)


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends with it."""
    # As `mmgem` and its strategies set them themselves, before they import.
    early = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__]
    forks = subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, bufsize=1, env={**os.environ, **early}, start_new_session=True
    )
    atexit.register(_end, forks)
    return forks


def _end(forks: subprocess.Popen[str]) -> None:
    """In words: while any fork of this process lives, such as a loader's worker, the input does not end."""
    assert forks.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        forks.stdin.write("\n")
    try:
        forks.wait(30)
    except subprocess.TimeoutExpired:
        forks.kill()


# --- the process that forks -----------------------------------------------------------------------------------------


def _import_all() -> None:
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer  # with torch's compiler
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mmgem.training.run  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # looks for a compiler once, and not in each rank


def _serve() -> int:
    """Gives the exit code: of this process, and of its forks."""
    _import_all()
    running: dict[int, Path] = {}
    while True:
        if select.select([0], [], [], 0.01)[0]:
            line = _line().strip()
            if not line:
                break
            request = Request(**json.loads(line))
            gc.freeze()  # what a fork does not look at, it need not copy
            pid = os.fork()
            if pid == 0:
                return _run(request)
            _lead_group(pid)
            running[pid] = Path(request.out)
            _write(running[pid].with_suffix(".pid"), pid)
        _note_ends(running)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return 0


def _lead_group(pid: int) -> None:
    """By both, for neither knows who comes first."""
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)


def _line() -> str:
    """Without a buffer, of which `select` would know nothing."""
    text = b""
    while not text.endswith(b"\n") and (byte := os.read(0, 1)):
        text += byte
    return text.decode()


def _note_ends(running: dict[int, Path]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _write(running.pop(pid).with_suffix(".end"), [os.waitstatus_to_exitcode(status), time.monotonic()])


def _write(file: Path, value: Any) -> None:
    unfinished = file.with_suffix(".writing")
    unfinished.write_text(json.dumps(value))
    os.replace(unfinished, file)


def _run(request: Request) -> int:
    from mmgem.cli import main

    _lead_group(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(request.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(request.place)
    tempfile.tempdir = None  # is that of the place
    if request.spoiled is not None:
        _spoil(request.spoiled, Path(request.out).with_suffix(".read"))
    return main(request.arguments)


def _spoil(key: str, read: Path) -> None:
    """One value of this sample's picture is no number. read: gets the time at which it was first read."""
    import dataclasses

    from mmgem.data.datamodule import Reader

    item_of = Reader._item

    def item(self: Reader, epoch: int, index: int) -> Any:
        found = item_of(self, epoch, index)
        if found.key != key:
            return found
        if not read.exists():
            _write(read, time.monotonic())
        picture = found.picture.clone()
        picture.view(-1)[picture.numel() // 2] = float("nan")
        return dataclasses.replace(found, picture=picture)

    Reader._item = item


if __name__ == "__main__":
    sys.exit(_serve())
