"""Micro-batches (GradCache) take the memory of one of them, and train as the whole global batch at once does.

Runs are real ones of `mmgem train`, in processes of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import Process, Tiny, read_lines

from mmgem.cli import main

STEPS, GLOBAL, MICRO = 20, 1024, 16
SIZE = 48
MOST = 1e-5
"""Relative, of each figure of each step."""
MOST_MEMORY = 0.15
"""Of what the global batch takes at once, above what a run of one micro-batch takes."""
# Frozen statistics, since a batch norm that trains counts over the pictures that it sees at once.
SETTINGS = (
    "stages.1=null", "stages.0.samples=null", f"stages.0.steps={STEPS}", "stages.0.lr=3e-4",
    "model.vision.frozen_statistics=true",
    f"model.vision.image_size={SIZE}", "model.vision.config.channels=[8,8,16,16]",
    "model.llm.config.num_hidden_layers=1", "model.llm.config.hidden_size=32", "model.llm.config.intermediate_size=64",
    "model.embed_dim=16", "model.max_tokens=45", "data.row_tokens=96", "training.sample_every=0",
)  # fmt: skip
FIGURES = ("loss", "loss_emb", "loss_gen", "logit_scale")

TRAIN = r"""
import sys
from mmgem.cli import main

assert main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""getrusage would count the memory of the process that started this one."""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the memory of a process from /proc")
def test_1024_samples_at_a_micro_batch_of_16(tmp_path: Path) -> None:
    data, script = tmp_path / "data", tmp_path / "train.py"
    script.write_text(TRAIN)
    counts = ["--train", str(GLOBAL), "--val", "2", "--test", "2", "--size", str(SIZE)]
    assert main(["data", "prepare", "scenes", "--out", str(data), *counts]) == 0
    tiny = Tiny(data)

    def start(name: str, *settings: str) -> Process:
        return Process(*tiny.arguments(tmp_path / name, *SETTINGS, *settings), script=script)

    cached = start("cached", f"stages.0.global_batch={GLOBAL}", f"stages.0.micro_batch={MICRO}")
    peaks = {}
    for name, size in (("at once", GLOBAL), ("small", MICRO)):
        peaks[name] = peak(start(name, f"stages.0.global_batch={size}"))
    peaks["cached"] = peak(cached)

    lines = [read_lines(tmp_path / name / "log.jsonl") for name in ("cached", "at once")]
    assert len(lines[0]) == STEPS and lines[1][-1]["loss"] < 0.98 * lines[1][0]["loss"], "it learns"
    difference = max(abs(one[n] / other[n] - 1) for one, other in zip(*lines, strict=True) for n in FIGURES)
    more = {name: peaks[name] - peaks["small"] for name in ("cached", "at once")}
    share = GLOBAL * 3 * SIZE**2 * 4
    print(f"\nlargest relative difference of a figure: {difference:.1e}")
    print(f"peak memory above the {peaks['small'] / 1e6:.0f} MB of a run of {MICRO}:")
    print({name: f"{size / 1e6:.0f} MB" for name, size in more.items()}, f"a share's pictures: {share / 1e6:.0f} MB")
    assert difference < MOST
    assert more["cached"] < MOST_MEMORY * more["at once"]


def peak(process: Process) -> int:
    """Bytes."""
    done = process.wait(timeout=480)
    assert done.code == 0, done.err
    return 1024 * int(done.out.splitlines()[-1])
