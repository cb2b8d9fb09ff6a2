"""scripts/two_hosts.py: the link between two hosts is cut in the middle of a run, and comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/two_hosts.py"
SKIPPED = 77


def test_both_hosts_name_each_other_and_go_on() -> None:
    command = [sys.executable, str(SCRIPT), "--stop-after", "12"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=560)
    finally:
        if process.poll() is None:
            process.terminate()  # it removes its namespaces, which it could not if it were killed
            process.wait(30)
    print(out)
    if process.returncode == SKIPPED:
        pytest.skip(out.splitlines()[-1])
    assert process.returncode == 0, out
