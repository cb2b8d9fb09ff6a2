"""How far work is: a bar on a real terminal, plain lines without one; both with the rate and the time left."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mmgem import progress
from mmgem.progress import Progress, clock, track

WORK = """
import time
from mmgem import progress
progress.LOG_SECONDS = 0.2
with progress.Progress("decoding", {total}, done={done}) as bar:
    for n in range(30):
        time.sleep(0.03)
        bar.note = f"loss {{n}}.5"
        bar.advance()
"""


def on_a_terminal(script: str) -> str:
    """What a process whose stderr is a terminal of 120 columns shows there, without colours and cursor moves."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not data:
                break
            shown += data
    finally:
        os.close(ours)
        if process.wait(timeout=60) != 0:
            pytest.fail(shown.decode())
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    shown = on_a_terminal(WORK.format(total=300, done=0))
    states = re.findall(r"decoding \S+ +(\d+)/300 ([\d.]+) samples/s 0:00:\d\d left (\S+) loss (\d+)\.5", shown)
    assert len(states) > 3, shown
    counts = [int(state[0]) for state in states]
    assert counts == sorted(counts) and counts[-1] == 30
    assert all(1 < float(state[1]) < 34 for state in states[1:])
    assert states[-1][3] == "29", "the note of the last step"
    hours, minutes, seconds = map(int, states[-1][2].split(":"))
    assert 3600 * hours + 60 * minutes + seconds >= 8  # 270 to do, at most 33 a second


def test_a_terminal_without_a_known_end() -> None:
    shown = on_a_terminal(WORK.format(total=None, done=0))
    assert re.search(r"decoding \S+ +30/\? [\d.]+ samples/s 0:00:\d\d loss 29\.5", shown), shown
    assert "left" not in shown


def test_without_a_terminal_come_plain_lines() -> None:
    script = WORK.format(total=310, done=10)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) > 2
    for line in lines:
        match = re.fullmatch(r"decoding: (\d+)/310 samples, ([\d.]+)/s, 0:(\d\d) left, loss \d+\.5", line)
        assert match, line
        count, rate, left = int(match[1]), float(match[2]), int(match[3])
        assert 1 < rate < 34 and left == pytest.approx((310 - count) / rate, rel=0.02, abs=1.01)
    assert lines[-1].startswith("decoding: 40/310")


def test_rate_and_time_left_are_those_of_the_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("training", 1000, "steps", done=400) as bar:  # goes on; what was done before is not today's speed
        for _ in range(5):
            now[0] += 8
            bar.advance(4)
    assert capsys.readouterr().err.splitlines() == [
        "training: 412/1000 steps, 0.5/s, 19:36 left",  # the first after LOG_SECONDS
        "training: 420/1000 steps, 0.5/s, 19:20 left",
    ]


def test_track_shows_what_it_yields(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    assert list(track([1, 2], "reading", unit="pictures")) == [1, 2]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        *("reading: 1/2 pictures", "reading: 2/2 pictures", "reading: 2/2 pictures")
    ]
    assert list(track(iter("ab"), "reading")) == ["a", "b"]
    assert "left" not in capsys.readouterr().err  # no total, no time left


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.9, 94, 3600, 3661)] == ["0:00", "0:09", "1:34", "1:00:00", "1:01:01"]
