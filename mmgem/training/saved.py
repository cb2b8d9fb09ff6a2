"""A checkpoint, read: one file, or the folder that DeepSpeed's ranks wrote together.

Receives its path. Gives where the run stood, what it was made with, and the whole weights in fp32, on CPU. Refuses what
is no checkpoint, and one that another strategy than the run's has saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgem.errors import UserError, one_line

STATE = "state.pt"
"""In a folder: all that is not a rank's own."""
TAG = "checkpoint"
"""In a folder: where the ranks' parts lie."""


@dataclass
class RunState:
    """All that a restart needs beside weights and optimizer: where the run stands. Randomness follows from it."""

    stage: int = 0
    samples: int = 0
    """Consumed in this stage."""


@dataclass
class Saved:
    path: Path
    run_state: RunState
    settings: dict[str, Any]
    """The run's config, as a tree."""
    data: dict[str, str]
    """Checksums."""
    architecture: str
    """What `parse_config` reads."""
    temperature: dict[str, Any]
    frozen: list[dict[str, Any]]
    strategy: str
    ranks: int
    buffers: dict[str, Tensor]
    """Of the model, by name: those of a folder, whose parts leave them out when they are shared out anew."""
    file_weights: dict[str, Tensor] | None
    """Those of a file, without the frozen ones."""

    @property
    def in_parts(self) -> bool:
        return self.file_weights is None

    def weights(self) -> dict[str, Tensor]:
        """By name in the model: what trained, the buffers, and what else has no origin elsewhere."""
        weights = self.file_weights
        if weights is None:
            weights = {**_joined(self.path), **self.buffers}
        return {**weights, **self.temperature["values"]}


def write_state(content: dict[str, Any], folder: Path) -> None:
    """Completes a folder."""
    torch.save(content, folder / STATE)
    (folder / "latest").write_text(TAG)


def run_state_tree(state: RunState) -> dict[str, int]:
    return asdict(state)


def read_checkpoint(path: Path) -> Saved:
    """Raises UserError for what is no whole checkpoint."""
    file = path / STATE if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        weights = None
        if not path.is_dir():
            weights = {name.removeprefix("model."): t for name, t in content["state_dict"].items()}
        return Saved(
            path,
            RunState(**content["run_state"]),
            content["settings"],
            content["data"],
            content["architecture"],
            content["temperature"],
            content["frozen"],
            content["strategy"],
            content["ranks"],
            content.get("buffers", {}),
            weights,
        )
    except (RuntimeError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError, AttributeError) as e:
        raise UserError(f"{path}: not a checkpoint of mmgem ({one_line(e)[:150]})") from e


def refuse_other_strategy(saved: Saved, strategy: str) -> None:
    """strategy: resolved. Parts of a folder fit the strategy that made them; a file fits the two that make one."""
    if saved.strategy != strategy and not {saved.strategy, strategy} <= {"none", "ddp"}:
        raise UserError(
            f"{saved.path}: was saved with training.strategy={saved.strategy}, not {strategy}; set it so, or begin "
            "another run from what `mmgem export` makes of it (init_from=…)"
        )


def for_ranks(saved: Saved, ranks: int, scratch: Path) -> Path:
    """What `ranks` ranks can load: the checkpoint itself, or, for parts of another number, DeepSpeed's universal form
    of it, made in `scratch`."""
    if not saved.in_parts or saved.ranks == ranks:
        return saved.path
    folder = scratch / saved.path.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{saved.path}: sharing the parts of {saved.ranks} ranks out among {ranks}", file=sys.stderr)
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
            *("--input_folder", str(saved.path / TAG), "--output_folder", str(folder / TAG)),
            *("--num_extract_workers", workers, "--num_merge_workers", workers),
        ],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        reason = done.stdout.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(
            f"{saved.path}: cannot be shared out among {ranks} ranks ({reason[0][:200]}); start {saved.ranks} ranks"
        )
    return folder


def _joined(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, from all ranks' parts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), TAG, exclude_frozen_parameters=True)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{folder}: its parts cannot be joined ({one_line(e)[:150]})") from e
    assert weights is not None
    return {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
