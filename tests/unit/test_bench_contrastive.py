"""The bench of the contrastive losses: its reference, its marks, and the whole at a size that says nothing of speed."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import contrastive  # pyright: ignore[reportMissingImports]

    return contrastive


def test_every_case_has_its_row_and_the_gradients_are_right():
    command = [sys.executable, BENCH / "contrastive.py", "--n", "256", "--dim", "32", "--rounds", "1", "--no-marks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("2 processes")
    for table, rows in ((first, 4), (second, 2)):
        lines = [line.split() for line in table.splitlines() if "mmgem" in line or "open_clip" in line]
        assert len(lines) == rows
        for line in lines:
            if line[0] == "InfoNCE,":
                assert all(float(error) < 1e-5 for error in line[-3:]), table
    assert [table.count("ratio") for table in (first, second)] == [2, 1]
    sent = {line.split()[1]: float(line.split()[-6]) for line in second.splitlines() if line.startswith("InfoNCE")}
    assert 4 * 256 * 32 * 2 < sent["mmgem"] * 1e6 < sent["open_clip"] * 1e6  # at least its vectors and their gradients


def test_the_reference_is_the_gradient_of_the_formula(bench: ModuleType, tmp_path: Path):
    args = argparse.Namespace(n=700, dim=8, dtype="fp32", device="cpu")  # two tiles, the second not full
    bench.in_fp64(args, [tmp_path / "found.pt"])
    leaves = [t.detach().double().requires_grad_() for t in bench.inputs(args)[:3]]
    score_NN = leaves[2].exp() * F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T
    (F.cross_entropy(score_NN, torch.arange(700)) + F.cross_entropy(score_NN.T, torch.arange(700))).backward()
    for found, leaf in zip(torch.load(tmp_path / "found.pt")["gradients"], leaves, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(found, leaf.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"memory": 10.1}, ["memory"]),
        ({"time": 1.11}, ["time"]),
        ({"bytes": 61.0}, ["bytes"]),
        ({"gradients": [torch.full((3,), 1 + 2e-5), torch.ones(3), torch.ones(())]}, ["gradient", "gradient in 2"]),
    ],
)
def test_a_mark_that_is_missed_is_named(bench: ModuleType, change: dict[str, Any], missed: list[str]):
    args = argparse.Namespace(n=6, dim=1, dtype="fp32", device="cpu", rounds=1, ranks=2)
    wanted = [torch.ones(3), torch.ones(3), torch.ones(())]
    ours = {"memory": 9.9, "time": 1.09, "cpu": 1.0, "bytes": 59.0, "gradients": wanted} | change
    theirs = {"memory": 100.0, "time": 1.0, "cpu": 1.0, "bytes": 100.0, "gradients": wanted}
    found = {(case, 1): [[ours if case in bench.PEERS else theirs]] for case in bench.NAMES}
    # Two ranks, each with half of the rows: their gradients are twice those of the whole.
    found |= {
        (case, 2): [[{**one, "gradients": [g * 2 if g.ndim else g for g in one["gradients"]]} for _ in range(2)]]
        for case, one in (("infonce", ours), ("clip", theirs))
    }
    twice = [torch.cat([w, w]) if w.ndim else w for w in wanted]
    names = bench.print_steps(args, found, wanted) + bench.print_bytes(args, found, twice)
    assert [name.removesuffix(" processes") for name in names] == missed
