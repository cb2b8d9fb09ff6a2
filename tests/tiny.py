"""What the end-to-end tests share: runs of tiny.yaml, in this process and in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spoil import break_pictures, members_of

from mmgem.cli import main

CONFIG = Path(__file__).with_name("tiny.yaml")
STEPS = 25
"""Of each of the two stages."""
TIMINGS = ("samples_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb")
# Where losses are to be compared between machines or numbers of ranks, rounding is what differs, and training in fp32
# makes it large within a few steps. Llama's layers round to fp32 whatever they are given (RMSNorm, rotary positions),
# GPT-2's do not. A trained batch norm counts over a rank's own pictures, and dropout draws for each rank.
FP64 = (
    "training.precision=64",
    "model.vision.frozen_statistics=true",
    "model.llm.config={model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 128, "
    "resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0, tie_word_embeddings: true}",
)


@dataclass(frozen=True)
class Tiny:
    """The shared dataset, and how to train on it."""

    data: Path

    def arguments(self, run: Path, *overrides: str, resume: str | None = None) -> list[str]:
        options = [] if resume is None else ["--resume", resume]
        settings = [f"run={run}", f"data.path={self.data}", *overrides]
        return ["train", "--config", str(CONFIG), *options, *settings]

    def train(self, run: Path, *overrides: str, resume: str | None = None) -> int:
        """In this process; gives the exit code."""
        return main(self.arguments(run, *overrides, resume=resume))


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


class Process:
    """The command in a process of its own."""

    def __init__(self, *arguments: str | Path, cwd: Path | None = None, script: Path | None = None, **env: str):
        command = [str(script)] if script else ["-m", "mmgem.cli"]
        self.popen = subprocess.Popen(
            [sys.executable, *command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            start_new_session=True,  # a signal to the group then reaches it and its children only
        )

    def wait(self, timeout: float = 240) -> Finished:
        try:
            out, err = self.popen.communicate(timeout=timeout)
        finally:
            if self.popen.poll() is None:
                os.killpg(self.popen.pid, signal.SIGKILL)
        return Finished(self.popen.returncode, out, err)

    def wait_for_lines(self, log: Path, lines: int, timeout: float = 240) -> None:
        """Until the log has so many lines. Fails if the process ends before."""
        end = time.monotonic() + timeout
        while not log.is_file() or log.read_bytes().count(b"\n") < lines:
            assert self.popen.poll() is None, (
                f"ended with {self.popen.returncode} before step {lines}: {self.wait().err}"
            )
            assert time.monotonic() < end, f"no {lines} lines in {log} after {timeout} s"
            time.sleep(0.003)

    def signal(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.popen.pid, number)


def run(*arguments: str | Path, **options: Any) -> Finished:
    return Process(*arguments, **options).wait()


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def figures(folder: Path) -> list[dict[str, Any]]:
    """The log's lines without what a clock gave."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_lines(folder / "log.jsonl")]


def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model_folder / "model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], prefix: str = "") -> bool:
    names = [n for n in one if n.startswith(prefix)]
    assert names and one.keys() == other.keys()
    return all(torch.equal(one[n], other[n]) for n in names)


def break_samples(tiny: Tiny, out: Path, numbers: list[int]) -> Tiny:
    """A copy of the dataset in which these training pictures are no pictures any more (same size, other bytes)."""
    shutil.copytree(tiny.data, out)
    keys = [key for _, key, _ in members_of(out / "train")]
    break_pictures(out / "train", [keys[number] for number in numbers])
    return Tiny(out)
