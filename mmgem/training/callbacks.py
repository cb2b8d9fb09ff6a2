"""What goes on around the steps: the log, the screen, samples of captions, checkpoints, a clean stop.

Receives Lightning's hooks. Gives log.jsonl (one line a step), progress, samples.jsonl, checkpoints. Refuses to go on
past the set share of broken samples.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

import lightning as L
from PIL import Image

from mmgem.config import Config
from mmgem.data.batch import Batch
from mmgem.data.datamodule import StageData
from mmgem.errors import UserError
from mmgem.model.pretrained import config_json
from mmgem.progress import Progress
from mmgem.training.checkpoint import RunFolder, RunState, state_tree
from mmgem.training.module import StageModule
from mmgem.training.signals import SIGNALS, stop_at_once, stop_if_asked

FIRST_LINE = 10
"""The step after which a log without a terminal gets its first line; later ones come by time."""


class StepLog(L.Callback):
    """log.jsonl, one line a step, and the progress on the screen."""

    def __init__(self, folder: RunFolder, steps_before: int):
        self.folder, self.steps_before = folder, steps_before
        self.file: TextIO | None = None
        self.cut = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self.file = self.folder.log.open("a", buffering=1)
        done = trainer.global_step
        self.progress = Progress(pl_module.stage.name, pl_module.steps, "steps", done)
        self.progress.__enter__()
        self.clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule) and self.file is not None
        now = time.monotonic()
        rate, self.clock = len(batch.keys) / max(now - self.clock, 1e-9), now
        self.cut += batch.texts_cut
        step = batch_idx + 1
        line = {
            "step": self.steps_before + step,
            "stage": pl_module.stage.name,
            "samples": step * pl_module.stage.global_batch,
            "loss": pl_module.last["loss"],
            "loss_emb": pl_module.last.get("loss_emb"),
            "loss_gen": pl_module.last.get("loss_gen"),
            **{k: v for k, v in pl_module.last.items() if k.startswith("loss_region")},
            "lr": pl_module.stage.lr * pl_module.lr_factor(batch_idx),
            "logit_scale": pl_module.last["logit_scale"],
            "samples_per_s": round(rate, 2),
            "regions": len(batch.boxes_R4),
            "texts_cut": batch.texts_cut,
        }
        self.file.write(json.dumps(line) + "\n")
        metrics = {k: v for k, v in line.items() if k not in ("stage", "step") and v is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=line["step"])
        figures = {k.replace("loss_", ""): v for k, v in pl_module.last.items() if k.startswith("loss")}
        self.progress.note = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
        self.progress.advance()
        if not self.progress.terminal and step == FIRST_LINE:
            self.progress.line()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
            self.progress.__exit__()
            if self.cut:
                print(f"{self.cut} texts were longer than model.max_tokens and cut", file=sys.stderr)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class BrokenSamples(L.Callback):
    """Counts and names broken samples; past the set share the run stops."""

    FEWEST = 10
    """Below so many, bad luck and not bad data."""

    def __init__(self, max_broken: float):
        self.max_broken = max_broken
        self.seen = 0
        self.broken: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen += len(batch.keys) + len(batch.broken)
        for sample in batch.broken:
            if sample.key not in self.broken:
                print(f"skipped sample {sample.key}: {sample.reason}", file=sys.stderr)
            self.broken[sample.key] += 1
        count = self.broken.total()
        if count >= self.FEWEST and count > self.max_broken * self.seen:
            raise UserError(
                f"{count} of {self.seen} samples are broken, more than data.max_broken={self.max_broken}; the first: "
                f"{', '.join(list(self.broken)[:5])}; raise the share and go on, or mend the data and begin a new run"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.broken:
            print(f"{self.broken.total()} of {self.seen} samples were broken and left out", file=sys.stderr)


class Checkpoints(L.Callback):
    """Every so many steps, at the end, and when asked to stop: Ctrl-C and SIGTERM finish the step, save, and leave."""

    def __init__(self, folder: RunFolder, config: Config, steps_before: int):
        self.folder, self.config, self.steps_before = folder, config, steps_before
        self.signal: int | None = None
        self.handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.handlers = {s: signal.signal(s, self._asked_to_stop) for s in SIGNALS}
        stop_if_asked()

    def _asked_to_stop(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            stop_at_once(number, frame)
        self.signal = number
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)", file=sys.stderr
        )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, StageModule)
        samples = trainer.global_step * pl_module.stage.global_batch
        checkpoint["run_state"] = state_tree(RunState(pl_module.stage_number, samples))
        # What the LLM's and the tower's sources said beside their weights, which a resumed run does not read again.
        checkpoint["architecture"] = config_json(pl_module.model)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, StageData)
        step = batch_idx + 1
        data.samples_consumed = step * pl_module.stage.global_batch
        due = step % self.config.training.checkpoint_every == 0 or step == pl_module.steps
        stopping = self.signal is not None  # read once: a signal may come between
        if due or stopping:
            self._save(trainer, step)
        if stopping:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, step: int) -> None:
        run_step = self.steps_before + step
        self.folder.save_checkpoint(trainer, run_step, self.config.training.keep_checkpoints)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class CaptionSamples(L.Callback):
    """Now and then, what the model writes for a few pictures: on the screen and in samples.jsonl."""

    def __init__(
        self, folder: RunFolder, pictures: Sequence[tuple[str, Image.Image, str]], every: int, steps_before: int
    ):
        """pictures: key, picture, a reference caption."""
        self.folder, self.pictures, self.every, self.steps_before = folder, pictures, every, steps_before

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        step = batch_idx + 1
        if not self.every or not self.pictures or (step % self.every and step != pl_module.steps):
            return
        if not pl_module.stage.loss.gen:
            return
        written = pl_module.model.caption([p for _, p, _ in self.pictures], max_new_tokens=30)
        with self.folder.samples.open("a") as file:
            for (key, _, reference), caption in zip(self.pictures, written, strict=True):
                line = {"step": self.steps_before + step, "key": key, "caption": caption, "reference": reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        key, _, reference = self.pictures[0]
        print(f"step {self.steps_before + step}: {key}: {written[0]!r} (reference: {reference!r})", file=sys.stderr)
