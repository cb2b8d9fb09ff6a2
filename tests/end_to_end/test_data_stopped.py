"""`mmgem data prepare` killed at any moment, stopped by Ctrl-C or by a full disk.

The same command goes on where it was, to the bytes of one that was not stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import accounts, assert_whole, files_of

from mmgem.data.index import read_index
from mmgem.data.store import open_store

SCENES = ("--train", "90", "--val", "30", "--test", "0", "--size", "256", "--shard-size", "10")
SHARDS = 12


def command(out: Path, processes: int = 2) -> list[str]:
    options = [*SCENES, "--out", str(out), "--processes", str(processes)]
    return [sys.executable, "-m", "mmgem.cli", "data", "prepare", "scenes", *options]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    subprocess.run(command(out), check=True, capture_output=True)
    return out


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def processes_of(group: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=,args=", "-g", str(group)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "defunct" not in line and "resource_tracker" not in line]


MOMENTS: dict[str, Callable[[Path], Any]] = {
    "planned": lambda out: list(out.glob("*/unfinished/plan.json")),
    "in the first shard": lambda out: list(out.glob("*/.shard-*.partial")),
    "after some shards": lambda out: len(accounts(out)) >= 4,
    "in the last shards": lambda out: len(accounts(out)) >= SHARDS - 2,
    "at the index": lambda out: list(out.glob("*/index.json")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_moment(tmp_path: Path, unbroken: Path, moment: str):
    out = tmp_path / "out"
    running = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    until(lambda: MOMENTS[moment](out) or running.poll() is not None)
    running.send_signal(signal.SIGKILL)  # it alone: its processes must notice
    running.communicate()
    until(lambda: not processes_of(running.pid))
    for index in out.glob("*/index.json"):  # where there is one, all that it names is there
        assert files_of(index.parent).items() >= files_of(unbroken / index.parent.name).items()
    if len(list(out.glob("*/index.json"))) == 2:
        return  # it had finished, but for some files that are no longer needed
    done = len(accounts(out))
    again = subprocess.run(command(out), capture_output=True, text=True, check=True)
    assert (f"kept: {done} of {SHARDS} shards" in again.stdout) == (done > 0)
    assert_whole(out, unbroken)


def heed_ctrl_c() -> None:
    """A shell that has these tests run in the background has them ignore it, and their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, unbroken: Path):
    out = tmp_path / "out"
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command(out), start_new_session=True, preexec_fn=heed_ctrl_c, **options)
    until(lambda: len(accounts(out)) >= 3)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: all processes get it
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err and err.splitlines()[-1] == "mmgem: stopped"
    assert not list(out.rglob("*.partial")) and not list(out.rglob("index.json"))
    again = subprocess.run(command(out, 1), capture_output=True, text=True, check=True)
    assert "kept: " in again.stdout
    assert_whole(out, unbroken)


# --- a full disk -------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
from mmgem.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(tmp_path: Path, small_disk: Path, unbroken: Path, processes: int):
    assert sum(map(len, files_of(unbroken).values())) > 2_000_000
    done = subprocess.run(command(small_disk / "out", processes), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "No space left on device" in message and "MB more are needed" in message
    assert "run the same command again" in message
    finished = len(accounts(small_disk / "out"))
    assert 2 <= finished < SHARDS and not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    again = subprocess.run(command(small_disk / "out", processes), capture_output=True, text=True, check=True)
    assert f"kept: {finished} of {SHARDS} shards" in again.stdout
    assert_whole(small_disk / "out", unbroken)


def test_a_file_that_may_not_grow(tmp_path: Path, unbroken: Path):
    """As a full disk, where none can be mounted."""
    sizes = [shard.bytes for shard in read_index(open_store(unbroken / "train")).shards]
    limit = sorted(sizes)[-2] + 1  # all but the largest have room
    shutil.copytree(unbroken, tmp_path / "reference")
    limited = [sys.executable, "-c", LIMITED, str(limit), *command(tmp_path / "out", 1)[3:]]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2 and f"shard-{sizes.index(max(sizes)):06d}.tar: File too large" in done.stderr
    assert not list(tmp_path.glob("out/*/index.json"))
    subprocess.run(command(tmp_path / "out", 1), capture_output=True, text=True, check=True)
    assert_whole(tmp_path / "out", unbroken)
