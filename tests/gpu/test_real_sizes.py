"""Training steps at the method's own size on a GPU: the shipped stage 1 with random weights, on rendered scenes.

Prints samples/s, MFU and memory, and what `mmgem check` said of the latter, for docs/results.md: pytest tests/gpu -s
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import pytest
import torch

from mmgem.cli import main
from mmgem.config import load_config
from mmgem.losses.caption import caption_kernel
from mmgem.training.check import check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CONFIG = Path(__file__).parents[2] / "configs/stage1_vit_l14_tinyllama.yaml"
STEPS, MICRO_BATCH = 6, 64


def test_stage_1_steps_at_micro_batch_64_in_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes, run = tmp_path / "scenes", tmp_path / "run"
    counts = ["--train", str(STEPS * MICRO_BATCH), "--val", "1", "--test", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(scenes), *counts]) == 0
    torch.cuda.reset_peak_memory_stats()
    random_weights = ["model.vision.pretrained=null", "model.llm.name=null"]
    length = [f"stages.0.samples={STEPS * MICRO_BATCH}", f"stages.0.global_batch={MICRO_BATCH}"]
    settings = ["training.device=cuda", "training.precision=bf16", "training.sample_every=0"]
    where = [f"run={run}", f"data.path={scenes}"]
    assert main(["train", "--config", str(CONFIG), *where, *random_weights, *length, *settings]) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [MICRO_BATCH * (step + 1) for step in range(STEPS)]
    assert all(math.isfinite(line[loss]) for line in lines for loss in ("loss", "loss_emb", "loss_gen"))
    # Untrained: each of the two directions and each token is near a guess. The first step shows the start.
    assert lines[0]["loss_emb"] == pytest.approx(2 * math.log(MICRO_BATCH), rel=0.5)
    assert lines[-1]["loss_gen"] < lines[0]["loss_gen"]
    parameters = json.loads((run / "run.json").read_text())["parameters"]
    assert parameters["vision"] == 303_179_776 and parameters["llm"] == 1_100_048_384
    memory = torch.cuda.max_memory_allocated()
    overrides = [*random_weights, *length, *settings, f"data.path={scenes}"]
    said = check(load_config(CONFIG, overrides)).estimates[0].memory.total
    rate, mfu = (median(line.get(name, math.nan) for line in lines[2:]) for name in ("samples_per_s", "mfu"))
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}: {rate:.1f} samples/s, MFU {mfu:.3f}, {memory / 1e9:.1f} GB at most; "
            f"mmgem check says {said / 1e9:.1f} GB ({said / memory - 1:+.1%})"
        )


@pytest.mark.parametrize(("kernel", "package"), [("liger", "liger_kernel"), ("cce", "cut_cross_entropy")])
def test_fused_caption_kernels_give_what_ours_gives(kernel: str, package: str) -> None:
    pytest.importorskip(package)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_TD = torch.randn(777, 512, device="cuda", generator=generator)
    weight_VD = torch.randn(32_000, 512, device="cuda", generator=generator) * 0.05
    labels_T = torch.randint(32_000, (777,), device="cuda", generator=generator)
    found = []
    for name in ("torch", kernel):
        hidden, weight = (t.bfloat16().requires_grad_() for t in (hidden_TD, weight_VD))
        loss = caption_kernel(name, labels_T)(hidden, weight, None)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        found.append((loss.detach().float(), hidden.grad.float(), weight.grad.float()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * ours.norm()
