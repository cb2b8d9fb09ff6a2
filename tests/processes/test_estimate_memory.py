"""The memory that `mmgem check` says a step takes, against what one takes: the most resident memory of a process that
does nothing else, and the bytes of tensors that DeepSpeed keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MOST_OFF = 0.15
LLAMA = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 8000,
    "tie_word_embeddings": True,
}
VIT = {"layers": 6, "width": 320, "head_width": 64, "patch_size": 16}


def config(vision: dict[str, Any], again: bool, **stage: Any) -> dict[str, Any]:
    vision = {**vision, "image_size": 128, "gradient_checkpointing": again}
    model = {"vision": vision, "llm": {"config": LLAMA, "gradient_checkpointing": again}, "embed_dim": 256}
    return {"model": model, "stages": [{"steps": 1, **stage}], "training": {"device": "cpu"}}


CASES = {
    "pairs": config({"library": "open_clip", "config": VIT}, False, global_batch=32),
    "recomputed": config({"library": "open_clip", "config": VIT}, True, global_batch=40),
    "boxes": config({"name": "resnet26"}, False, global_batch=12, max_regions=4),
}

# Written out here, so that it shares nothing with the estimate but the model and the texts' packing.
STEP = r"""
import ctypes, gc, json, sys
import torch
import torch.nn.functional as F
from mmgem.config import config_from_tree
from mmgem.model import MMGem
from mmgem.text import train_tokenizer
from mmgem.training.arithmetic import made_up_texts, set_stage
from mmgem.training.check import check

def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

def step(model, stage, samples, optimizer):
    texts = made_up_texts(stage, samples, 16, model.codec, 128)
    size, regions = model.config.vision.image_size, stage.max_regions
    boxes = torch.tensor([[0.1, 0.1, 0.7, 0.8]]).repeat(samples * regions, 1)
    out = model(torch.randn(samples, 3, size, size), texts, torch.arange(samples * (1 + regions)), boxes,
                torch.arange(samples).repeat_interleave(regions))
    v, t = F.normalize(torch.cat([out.v_BE, out.r_RE]), dim=-1), F.normalize(out.t_ME, dim=-1)
    loss = F.cross_entropy(10 * v @ t.T, torch.arange(len(v)))
    # As the captions' loss has it, the vocabulary in parts that are not kept.
    head = model.language.hf.get_output_embeddings().weight
    part = lambda hidden, labels: F.cross_entropy(F.linear(hidden, head), labels, reduction="sum")
    for hidden, labels in zip(out.hidden_TD.split(256), texts.labels_T.split(256)):
        loss = loss + torch.utils.checkpoint.checkpoint(part, hidden, labels, use_reentrant=False) / len(texts.labels_T)
    del out
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def build(config):
    model = MMGem(config.model, train_tokenizer(["a"], 300, lowercase=True))
    set_stage(model, config.stages[0])
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

torch.set_num_threads(1)
tree = json.loads(sys.argv[1])
config, small = config_from_tree(tree, "test"), config_from_tree(tree, "test")
estimate = check(config).estimates[0]
# What is loaded with the first use of an operator is no part of a step.
small.model.llm.config.update(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
model, optimizer = build(small)
step(model, small.stages[0], 2, optimizer)
del model, optimizer
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM from here on
before = resident("VmRSS")
model, optimizer = build(config)
for _ in range(2):
    step(model, config.stages[0], config.stages[0].global_batch, optimizer)
print(json.dumps([resident("VmHWM") - before, estimate.memory.total, estimate.memory.activations]))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_said(case: str) -> None:
    # Freed blocks go back to the system at once, so that what is resident is what is held.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps(CASES[case])], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    taken, said, activations = json.loads(done.stdout.splitlines()[-1])
    print(f"{case}: {taken / 1e6:.0f} MB, said {said / 1e6:.0f} MB ({said / taken - 1:+.1%})")
    assert activations > 0.25 * said, "large enough to be seen"
    assert abs(said / taken - 1) < MOST_OFF


@pytest.mark.parametrize("name", ["stage1_vit_l14_tinyllama", "stage1_vit_l14_7b_zero3"])
def test_the_shipped_sizes_fit(name: str) -> None:
    file = Path(__file__).parents[2] / f"configs/{name}.yaml"
    command = [sys.executable, "-m", "mmgem.cli", "check", "--no-data", "--config", str(file)]
    machines = ["--nodes", "8", "--gpus-per-node", "8", "--gpu", "h200"]
    done = subprocess.run([*command, *machines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory of a rank" in done.stdout and "days of the stage" in done.stdout


ZERO = r"""
import gc, json, logging, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
import deepspeed

def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

logging.disable(logging.WARNING)
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
model = torch.nn.Sequential(*[torch.nn.Linear(500, 500, bias=False) for _ in range(40)])
zero = {"stage": int(sys.argv[1]), "contiguous_gradients": True, "overlap_comm": False, "reduce_scatter": False,
        "reduce_bucket_size": 600_000, "stage3_max_live_parameters": 600_000, "stage3_prefetch_bucket_size": 300_000,
        "stage3_param_persistence_threshold": 1000}
settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
for _ in range(2):
    engine.backward(engine(torch.randn(4, 500, dtype=torch.bfloat16)).float().sum())
    with_gradients = held()
    engine.step()
if torch.distributed.get_rank() == 0:
    open(sys.argv[2], "w").write(json.dumps([with_gradients, held()]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_keeps_what_was_said(zero: int, tmp_path: Path) -> None:
    """10 M parameters on two ranks, after a backward pass and after a step."""
    from mmgem.training.estimate import Engine, Weights, states

    script, out = tmp_path / "zero.py", tmp_path / "held.json"
    script.write_text(ZERO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, script, str(zero), out], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    with_gradients, resting = json.loads(out.read_text())
    engine = Engine(f"deepspeed_{zero}", 2, 2, on_gpu=False, bucket=600_000, overlap=False, gathered=600_000)
    said = states(engine, Weights(10_000_000, 10_000_000, 250_000))
    whole = said.weights + said.gradients + said.optimizer + said.buffers
    rest = said.weights + said.optimizer + (said.gradients if zero == 3 else 0)  # stage 3 keeps their place
    print(
        f"ZeRO {zero}: {with_gradients / 1e6:.1f} and {resting / 1e6:.1f} MB, said {whole / 1e6:.1f} {rest / 1e6:.1f}"
    )
    assert with_gradients == pytest.approx(whole, rel=MOST_OFF)
    assert resting == pytest.approx(rest, rel=0.05)
