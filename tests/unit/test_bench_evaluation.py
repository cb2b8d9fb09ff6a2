"""The benches of retrieval and of captions, whole, at sizes that say nothing of speed: what they print is equal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmgem.data.prepare.scenes import prepare_scenes

BENCH = Path(__file__).parents[2] / "bench"


def printed(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, BENCH / script, *arguments, "--no-marks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recalls_are_clip_benchmarks() -> None:
    pytest.importorskip("clip_benchmark")
    out = printed("retrieval.py", "--images", "150", "--dim", "16", "--rounds", "1")
    differences = [float(value) for value in re.findall(r"difference (\S+)", out)]
    assert len(differences) == 12 and max(map(abs, differences)) <= 1e-6


def test_caption_figures_are_pycocoevalcaps(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    prepare_scenes(tmp_path / "data", train=0, val=0, test=30, processes=1)
    out = printed("captions.py", "--data", tmp_path / "data", "--split", "test", "--rounds", "1")
    rows = [line.split() for line in out.splitlines() if line.startswith(("BLEU", "ROUGE", "CIDEr"))]
    assert len(rows) == 6
    assert all(abs(float(difference)) < 5e-5 and float(theirs) > 0 for _, theirs, _, difference in rows)
