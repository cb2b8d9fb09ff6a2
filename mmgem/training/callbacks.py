"""What goes on around the steps: the log, the screen, samples of captions, checkpoints, a clean stop.

Receives Lightning's hooks. Gives log.jsonl (one line a step), progress, broken.jsonl, keys.jsonl, samples.jsonl,
checkpoints; the first rank writes for all. Refuses to go on past the set share of broken samples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from PIL import Image

from mmgem.config import Config, to_tree
from mmgem.data.batch import Share
from mmgem.data.datamodule import StageData
from mmgem.errors import UserError
from mmgem.model.pretrained import config_json
from mmgem.progress import Progress
from mmgem.ranks import Ranks, equal_buffers
from mmgem.training.checkpoint import RunFolder, append_line
from mmgem.training.frozen import Records
from mmgem.training.module import NotFinite, StageModule
from mmgem.training.saved import RunState, run_state_tree
from mmgem.training.signals import SIGNALS, stop_at_once, stop_if_asked
from mmgem.training.strategy import kept_parameters, save, whole_buffers
from mmgem.training.throughput import Throughput

FIRST_LINE = 10
"""The step after which a log without a terminal gets its first line; later ones come by time."""


class BrokenSamples(L.Callback):
    """Counts broken samples and names them in broken.jsonl, each once; past the set share the run stops.

    Stands before `StepLog`, whose lines say how many each step met: from them a resumed run knows what came before.
    """

    FEWEST = 10
    """Below so many, bad luck and not bad data."""

    def __init__(self, folder: RunFolder, max_broken: float, stage: str, steps_before: int, ranks: Ranks):
        self.folder, self.max_broken, self.stage = folder, max_broken, stage
        self.steps_before, self.ranks = steps_before, ranks
        self.named = {_name_of(line) for line in folder.lines(folder.broken)}
        self.broken = sum(line.get("broken", 0) for line in folder.lines(folder.log) if line.get("stage") == stage)
        self.in_step = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Share, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        self.in_step = 0
        if not self.ranks.sums(len(batch.broken))[0]:
            return
        met = self.ranks.lists(batch.broken)
        for one in met:
            line = {"step": self.steps_before + batch_idx + 1, "stage": self.stage, **dataclasses.asdict(one)}
            if one.shard is not None:
                line["key"] = ""  # all of the shard's samples
            if self.ranks.first and _name_of(line) not in self.named:
                append_line(self.folder.broken, line)
                what = f"shard {one.shard}" if one.shard is not None else f"sample {one.key}"
                print(f"{'left out of' if one.dropped else 'skipped'} {what}: {one.reason}", file=sys.stderr)
            self.named.add(_name_of(line))
        self.in_step = sum(not one.dropped for one in met)
        self.broken += self.in_step
        seen = (batch_idx + 1) * pl_module.stage.global_batch + self.broken
        if self.broken >= self.FEWEST and self.broken > self.max_broken * seen:
            raise UserError(
                f"{self.broken} of {seen} samples are broken, more than data.max_broken={self.max_broken}; they are "
                f"named in {self.folder.broken}; raise the share and go on, or mend the data and begin a new run"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.broken and self.ranks.first:
            print(f"{self.broken} broken samples were replaced; named in {self.folder.broken}", file=sys.stderr)


def _name_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return line.get("key"), line.get("shard"), line.get("reason")


class StepLog(L.Callback):
    """log.jsonl, one line a step, and the progress on the screen; keys.jsonl, if it is wanted."""

    def __init__(
        self,
        folder: RunFolder,
        steps_before: int,
        ranks: Ranks,
        broken: BrokenSamples,
        throughput: Throughput,
        keys: bool = False,
    ):
        self.folder, self.steps_before, self.ranks, self.broken, self.keys = folder, steps_before, ranks, broken, keys
        self.throughput = throughput
        self.file: TextIO | None = None
        self.cut = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        if not self.ranks.first:
            return
        self.file = self.folder.log.open("a", buffering=1)
        done = trainer.global_step
        self.progress = Progress(pl_module.stage.name, pl_module.steps, "steps", done)
        self.progress.__enter__()
        self.throughput.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Share, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        own = batch.texts_cut, batch.regions, *self.throughput.counts(batch)
        texts_cut, regions, tokens, flops = self.ranks.sums(*own)
        step = batch_idx + 1
        if self.keys:
            keys = self.ranks.lists(batch.keys)
            if self.file is not None:
                append_line(self.folder.keys, {"step": self.steps_before + step, "keys": keys})
        if self.file is None:
            return
        self.cut += int(texts_cut)
        line = {
            "step": self.steps_before + step,
            "stage": pl_module.stage.name,
            "samples": step * pl_module.stage.global_batch,
            "loss": pl_module.last["loss"],
            "loss_emb": pl_module.last.get("loss_emb"),
            "loss_gen": pl_module.last.get("loss_gen"),
            **{k: v for k, v in pl_module.last.items() if k.startswith(("loss_region", "loss_hard"))},
            "lr": pl_module.stage.lr * pl_module.lr_factor(batch_idx),
            "logit_scale": pl_module.last["logit_scale"],
            "regions": int(regions),
            "tokens": int(tokens),
            "texts_cut": int(texts_cut),
            "broken": self.broken.in_step,
            **self.throughput.figures(tokens, flops),
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


class Checkpoints(L.Callback):
    """Every so many steps, at the end, and when asked to stop: Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and
    leave. Launchers send those again to who has not left yet, so only a second Ctrl-C stops at once.

    A step whose loss is not finite has moved nothing yet: what was there before it is saved, too.
    """

    def __init__(
        self, folder: RunFolder, config: Config, steps_before: int, ranks: Ranks, strategy: str, frozen: Records
    ):
        """strategy: resolved. frozen: what is not saved, but has its origin elsewhere."""
        self.folder, self.config, self.steps_before, self.ranks = folder, config, steps_before, ranks
        self.strategy, self.frozen = strategy, frozen
        self.signal: int | None = None
        self.handlers: dict[signal.Signals, Any] = {}
        self.losses: list[float] = []
        self.saved_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.handlers = {s: signal.signal(s, self._asked_to_stop) for s in SIGNALS}
        self.saved_step = trainer.global_step
        self.ranks.lists([])  # all have loaded what they go on from
        if self.ranks.first:
            shutil.rmtree(self.folder.scratch, ignore_errors=True)
        stop_if_asked()

    def _asked_to_stop(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            stop_at_once(number, frame)
        if self.signal is None:
            self.signal = number
            again = " (again: stop at once)" if number == signal.SIGINT else ""
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving{again}", file=sys.stderr)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= self._content(trainer, pl_module)
        elsewhere = {f"model.{name}" for record in self.frozen for name in record["names"]}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n not in elsewhere}

    def _content(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What `read_checkpoint` wants of a checkpoint, beside the weights."""
        assert isinstance(pl_module, StageModule)
        samples = trainer.global_step * pl_module.stage.global_batch
        return {
            "run_state": run_state_tree(RunState(pl_module.stage_number, samples)),
            "settings": to_tree(self.config),
            "data": self.folder.data_checksums,
            # What the LLM's and the tower's sources said beside their weights.
            "architecture": config_json(pl_module.model),
            "temperature": pl_module.temperature.state_dict(),
            "frozen": self.frozen,
            "strategy": self.strategy,
            "ranks": self.ranks.count,
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Share, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, StageData)
        step = batch_idx + 1
        data.samples_consumed = step * pl_module.stage.global_batch
        self.losses.append(pl_module.last["loss"])
        due = step % self.config.training.checkpoint_every == 0 or step == pl_module.steps
        # Read once, for a signal may come between, and for all ranks, so that they stop after the same step.
        asked = self.ranks.sums(*(float(self.signal == number) for number in SIGNALS))
        stopping = next((number for number, count in zip(SIGNALS, asked, strict=True) if count), None)
        if stopping is not None:
            self.signal = stopping
        if due or stopping is not None:
            self._save(trainer, pl_module, step)
        if stopping is not None:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, pl_module: StageModule, step: int) -> None:
        def write(path: Path) -> dict[str, Any]:
            save(trainer, path)
            elsewhere = {name for record in self.frozen for name in record["names"]}
            kept = {name: tensor for name, tensor in kept_parameters(trainer).items() if name not in elsewhere}
            buffers = whole_buffers(trainer, pl_module.model)
            return {**self._content(trainer, pl_module), "buffers": {**buffers, **kept}}

        self.folder.save_checkpoint(write, self.steps_before + step, self.ranks)
        self.saved_step = step
        if self.ranks.first:
            training = self.config.training
            loss = sum(self.losses) / len(self.losses) if self.losses else None
            self.folder.keep_checkpoints(training.keep_checkpoints, training.keep_best, loss)
        self.losses.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, StageModule)
        if isinstance(exception, NotFinite) and trainer.global_step > self.saved_step:
            self._save(trainer, pl_module, trainer.global_step)
        self.teardown(trainer, pl_module, "fit")


class CaptionSamples(L.Callback):
    """Now and then, what the model writes for a few pictures: on the screen and in samples.jsonl."""

    def __init__(
        self,
        folder: RunFolder,
        pictures: Sequence[tuple[str, Image.Image, str]],
        every: int,
        steps_before: int,
        ranks: Ranks,
        together: bool,
    ):
        """pictures: key, picture, a reference caption. together: no rank holds the whole model, so that all must write;
        else the first does."""
        self.folder, self.pictures, self.every, self.steps_before = folder, pictures, every, steps_before
        self.ranks, self.together = ranks, together

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Share, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        step = batch_idx + 1
        if not self.every or not self.pictures or (step % self.every and step != pl_module.steps):
            return
        if not pl_module.stage.loss.gen or not (self.ranks.first or self.together):
            return
        if self.together:
            equal_buffers(pl_module.model)  # else one may write longer than another, and wait for it for ever
        written = pl_module.model.caption([p for _, p, _ in self.pictures], max_new_tokens=30)
        if not self.ranks.first:
            return
        with self.folder.samples.open("a", encoding="utf-8") as file:
            for (key, _, reference), caption in zip(self.pictures, written, strict=True):
                line = {"step": self.steps_before + step, "key": key, "caption": caption, "reference": reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        key, _, reference = self.pictures[0]
        print(f"step {self.steps_before + step}: {key}: {written[0]!r} (reference: {reference!r})", file=sys.stderr)
