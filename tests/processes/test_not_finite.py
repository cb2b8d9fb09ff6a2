"""A sample that is not finite on one rank stops all ranks together, is named, and costs nothing but its step.

Real ranks over gloo. The picture of one sample, which the last rank reads in step 7, is given a NaN.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Tiny, figures, read_lines
from warm import Job

from mmgem.training.saved import read_checkpoint

STEPS, BAD, GLOBAL_BATCH, RANKS = 9, 7, 12, 2
"""In BAD steps no sample comes twice."""
SECONDS = 5.0
"""From the moment in which the sample is read, until the last rank has ended."""
SETTINGS = (
    f"stages.0.samples={GLOBAL_BATCH * STEPS}",
    f"stages.0.global_batch={GLOBAL_BATCH}",
    "stages.1=null",
    "training.checkpoint_every=1000",
    "training.sample_every=0",
    "training.log_keys=true",
)


@pytest.mark.parametrize(
    "settings",
    [
        ("training.strategy=ddp",),
        ("training.strategy=deepspeed_2",),
        ("training.strategy=ddp", "stages.0.micro_batch=3"),
    ],
    ids=["ddp", "deepspeed_2", "micro_batch"],
)
def test_all_ranks_stop_and_name_the_sample(tiny: Tiny, tmp_path: Path, settings: tuple[str, ...]) -> None:
    def job(run: str, spoiled: str | None = None) -> Job:
        arguments = tiny.arguments(tmp_path / run, *SETTINGS, *settings, resume="auto")
        started = len(list(tmp_path.glob("out-*")))
        return Job(arguments, RANKS, tmp_path / f"out-{started}", spoiled)

    job("unbroken").finish()
    read = [line["keys"] for line in read_lines(tmp_path / "unbroken/keys.jsonl")]
    key = read[BAD - 1][-2]
    assert key not in sum(read[: BAD - 1], [])

    stopped = job("run", spoiled=key)
    ends = [rank.end() for rank in stopped.ranks]
    assert [code for code, _ in ends] == [2] * RANKS, stopped.printed
    met = json.loads(stopped.ranks[-1].out.with_suffix(".read").read_text())
    print(f"ended {', '.join(f'{at - met:.2f}' for _, at in ends)} s after the sample was read")
    assert all(0 < at - met < SECONDS for _, at in ends)
    assert not stopped.ranks[0].out.with_suffix(".read").exists(), "only one rank has it"
    for rank in stopped.ranks:
        errors = [line for line in rank.printed.splitlines() if line.startswith("mmgem: error:")]
        assert len(errors) == 1 and "Traceback" not in rank.printed, rank.printed
        assert f"step {BAD}: the loss is not finite" in errors[0]
        assert f"it comes from {key}; look at it" in errors[0]

    folder = tmp_path / "run"
    last = (folder / "checkpoints/last.ckpt").resolve(strict=True)
    assert last.name == f"step-{BAD - 1:08d}.ckpt"
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == [last.name]
    saved = read_checkpoint(last)
    assert saved.run_state.samples == (BAD - 1) * GLOBAL_BATCH
    assert all(tensor.isfinite().all() for tensor in saved.weights().values())
    assert len(figures(folder)) == BAD - 1

    job("run").finish()
    assert figures(folder) == figures(tmp_path / "unbroken") and len(figures(folder)) == STEPS
    assert read_lines(folder / "keys.jsonl") == read_lines(tmp_path / "unbroken/keys.jsonl")
