"""Evaluation in the middle of training, on a fixed share of the validation split.

Receives the tasks, the split and how often. Gives val.jsonl, a line each time, the loggers' `val/…`, and the most
telling figures on the screen. Refuses nothing: `evaluation.run.refuse_lacking` has looked before training begins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from mmgem.data.samples import Sample
from mmgem.data.shards import ShardedDataset
from mmgem.evaluation.run import encode_for
from mmgem.evaluation.tasks import TASKS, SplitTask, TaskOptions
from mmgem.ranks import Ranks, equal_buffers
from mmgem.training.module import StageModule
from mmgem.training.throughput import Throughput
from mmgem.training.watchdog import Phase, Watchdog

_RESAMPLES = 100
_SHOWN = ("text_retrieval_recall@1", "image_retrieval_recall@1", "CIDEr", "region_image_retrieval_recall@1")
_BATCH = 64


def chosen_tasks(names: Sequence[str]) -> list[SplitTask]:
    found = [TASKS[name] for name in dict.fromkeys(names)]
    return [task for task in found if isinstance(task, SplitTask)]


class Share:
    """So many samples of a dataset, drawn by lot, in the order of the dataset."""

    def __init__(self, dataset: ShardedDataset, count: int, seed: int):
        drawn = np.random.default_rng(seed).permutation(len(dataset))[:count]
        self.dataset, self.positions = dataset, sorted(drawn.tolist())

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def keys(self) -> list[str]:
        keys = self.dataset.keys
        return [keys[p] for p in self.positions]

    def sample(self, index: int, /) -> Sample:
        return self.dataset.sample(self.positions[index])


class Validation(L.Callback):
    """Every `every` steps, and after the stage's last. To stand after the checkpoints: what is found is of a step that
    is safe, and a run that was asked to stop does not begin another evaluation."""

    def __init__(
        self,
        file: Path | None,
        share: Share,
        tasks: Sequence[SplitTask],
        every: int,
        steps_before: int,
        ranks: Ranks,
        throughput: Throughput,
        watchdog: Watchdog,
    ):
        """file: where the lines go; None on all ranks but the first. ranks: those that share the work; one of its own
        for each where all must compute the same."""
        self.file, self.share, self.tasks, self.every, self.steps_before = file, share, tasks, every, steps_before
        self.ranks, self.throughput, self.watchdog = ranks, throughput, watchdog

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        step = batch_idx + 1
        if trainer.should_stop or (step % self.every and step != pl_module.steps):
            return
        equal_buffers(pl_module.model)
        self.watchdog.beat(self.steps_before + step, Phase.PREPARING)
        figures = self.measure(pl_module)
        self.throughput.start()
        if self.file is None:
            return
        line = {"step": self.steps_before + step, "stage": pl_module.stage.name, **figures}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in figures.items()}, step=line["step"])
        shown = [name for name in _SHOWN if name in figures] or list(figures)[:3]
        said = ", ".join(f"{name} {figures[name]:.3f}" for name in shown)
        print(f"step {line['step']}: val: {said}", file=sys.stderr)

    def measure(self, module: StageModule) -> dict[str, float]:
        """By name the figures of all tasks."""
        options = TaskOptions(
            samples=_RESAMPLES, drawn=0, worst=0, java=False, queries=len(self.share), progress=False, ranks=self.ranks
        )
        encoded = encode_for(self.tasks, module.model, self.share, options, _BATCH)
        figures: dict[str, float] = {}
        for task in self.tasks:
            figures |= task.run(module.model, encoded, options).metrics
        return figures
