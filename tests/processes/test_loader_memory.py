"""The loader's memory does not grow with the number of samples that it has read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spoil import shards_of

SHARDS, IN_EACH = 100, 1000
MOST_GROWTH = 30e6
"""Bytes from 20,000 to 100,000 samples: the members of 64 open shards, and what an allocator does not give back."""

READ = r"""
import json, os, sys
from mmgem.config import DataConfig, StageConfig
from mmgem.data.datamodule import StageData
from mmgem.data.sources import open_training_data
from mmgem.images import Preprocess
from mmgem.memory import keep_freed_memory
from mmgem.text import TextCodec, train_tokenizer

def resident(process):
    return int(open(f"/proc/{process}/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def children():
    return [int(n) for n in open(f"/proc/self/task/{os.getpid()}/children").read().split()]

keep_freed_memory()
data = DataConfig(path=sys.argv[1], workers=1)
codec = TextCodec(train_tokenizer(["a b c"], 300, lowercase=True), 16)
stage = StageConfig(samples=100_000, global_batch=100)
loader = StageData(open_training_data(data), codec, Preprocess(32, (0, 0, 0), (1, 1, 1)), data, stage, 0)
seen, bytes_of = bytearray(100_000), {}
for step, batch in enumerate(loader.train_dataloader(), 1):
    for key in batch.keys:
        seen[int(key)] += 1
    if step % 200 == 0:
        bytes_of[100 * step] = [resident(process) for process in (os.getpid(), *children())]
print(json.dumps([seen == b"\1" * 100_000, bytes_of]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import encoded, picture

    from mmgem.data.samples import Sample
    from mmgem.data.writer import ShardWriter

    folder = tmp_path_factory.mktemp("large")
    pictures = [encoded(picture(number, 32, 32)) for number in range(50)]
    with ShardWriter(folder / "train", IN_EACH) as writer:
        for number in range(SHARDS * IN_EACH):
            captions = (f"caption {number}",)
            writer.write(Sample(str(number), pictures[number % 50], captions, (), 32, 32, {}))
    return folder


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the memory of processes from /proc")
def test_memory_is_flat_over_100_000_samples(data: Path) -> None:
    assert len(shards_of(data / "train")) == SHARDS
    done = subprocess.run([sys.executable, "-c", READ, str(data)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    each_once, bytes_of = json.loads(done.stdout)
    assert each_once
    print({samples: [f"{n / 1e6:.1f} MB" for n in processes] for samples, processes in bytes_of.items()})
    assert list(bytes_of) == ["20000", "40000", "60000", "80000", "100000"]
    assert len(bytes_of["20000"]) == 2, "this process and its worker"
    for early, late in zip(bytes_of["20000"], bytes_of["100000"], strict=True):
        assert late - early < MOST_GROWTH
