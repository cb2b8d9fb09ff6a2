"""Training against hard negatives is the same on four ranks, in micro-batches and all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import FP64, Tiny, read_lines, weights
from warm import Job

from mmgem.refine.negatives import add_negatives

SETTINGS = (
    "stages.1=null",
    "stages.0.samples=96",
    "stages.0.captions_per_image=2",
    "stages.0.negatives={texts: 2, source: data, pictures: 1, drawn: true}",
    "stages.0.loss.hard={columns: 0.5, rank: 0.2, intra: 0.2, focal: 0.5, triplet: 0.5, written: 1.0}",
)
HARD = ("columns", "rank", "intra", "focal", "triplet", "written")
LOSSES = ("loss", "loss_emb", "loss_gen", *(f"loss_hard_{name}" for name in HARD))


def test_the_same_on_ranks_and_in_micro_batches(tiny: Tiny, tmp_path: Path) -> None:
    add_negatives(
        tiny.data, tmp_path / "data", "train", kinds=["colour", "relation", "swap"], count=2, painter="scenes"
    )
    drawn = Tiny(tmp_path / "data")
    cuts = {"whole": (1, ()), "micro": (1, ("stages.0.micro_batch=5",)), "ranks": (4, ("training.strategy=ddp",))}
    jobs = [
        Job(drawn.arguments(tmp_path / name, *FP64, *SETTINGS, *more), ranks, tmp_path / f"{name}.out")
        for name, (ranks, more) in cuts.items()
    ]
    for job in jobs:
        job.finish()
    logs = {name: read_lines(tmp_path / name / "log.jsonl") for name in cuts}
    assert len(logs["whole"]) == 6
    for name in ("micro", "ranks"):
        for found, wanted in zip(logs[name], logs["whole"], strict=True):
            assert all(wanted[loss] > 0 for loss in LOSSES if loss != "loss_hard_rank")
            assert {k: found[k] for k in LOSSES} == pytest.approx({k: wanted[k] for k in LOSSES}, rel=1e-9)
        both = [weights(tmp_path / which / "model") for which in (name, "whole")]
        assert all(torch.allclose(both[0][k], both[1][k], atol=1e-6) for k in both[1])
