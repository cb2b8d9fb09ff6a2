"""The benches of retrieval and of captions, whole, at sizes that say nothing of speed: what they print is equal. And
what the bench of gates makes and counts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgem.data.prepare.scenes import prepare_scenes
from mmgem.data.shards import ShardedDataset
from mmgem.refine.raw import units

BENCH = Path(__file__).parents[2] / "bench"


def bench(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_exchanged_captions_and_how_well_they_are_found(tmp_path: Path) -> None:
    gate = bench("gate")
    prepare_scenes(tmp_path / "data", train=20, val=0, test=0, processes=1)
    split = ShardedDataset(tmp_path / "data/train")
    gate.exchange(split, tmp_path / "raw", 0.3, 0)
    raws = [raw for unit in units(tmp_path / "raw") for raw in unit.read()]
    assert len(raws) == 20
    wrong = 0
    for number, raw in enumerate(raws):
        own, truth = set(split.captions(number)), raw.meta["truth"]
        assert set(raw.texts) == truth.keys() and all(right == (text in own) for text, right in truth.items())
        wrong += sum(not right for right in truth.values())
    assert 25 <= wrong <= 30  # of 30 that were exchanged, some may have come to their own picture again
    assert sorted(text for raw in raws for text in raw.texts) == sorted(t for n in range(20) for t in split.captions(n))
    score_N, right_N = np.array([0.1, 0.5, 0.3, 0.9, 0.7]), np.array([False, False, True, True, True])
    found = gate.figures(score_N, right_N, 0.4)
    # Of the 2 x 3 pairs of a wrong and a right one, (0.5, 0.3) alone is the wrong way round.
    assert found == pytest.approx({"area": 5 / 6, "precision": 1 / 2, "recall": 1 / 2, "precision = recall": 1 / 2})
