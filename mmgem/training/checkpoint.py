"""A run's folder: what survives a restart, and where it lies.

Receives a run's settings. Gives the folder's files and the newest whole checkpoint. Refuses to mix two runs in one
folder, and to go on with other settings than the run began with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from mmgem import __version__
from mmgem.config import Config, config_text, to_tree
from mmgem.errors import UserError, one_line
from mmgem.ranks import Ranks
from mmgem.training.saved import read_checkpoint, write_state

# Settings that may differ between the parts of a run without changing its result.
FREE_SETTINGS = ("run", "training.", "data.workers", "data.path", "data.cache", "data.max_broken", "data.shard_cache")
FREE_PLACES = re.compile(r"data\.sources\.\d+\.path|stages\.\d+\.micro_batch")
BOUND_SETTINGS = ("training.precision",)

UNFINISHED, GOING = ".unfinished", ".going"
LOSSES = "losses.json"
"""Beside the checkpoints: the mean loss before each, over the steps since the one before it."""

MOST_LEFT_OUT = 10_000
"""Samples that an index left out are named in a run's broken.jsonl, too; no more than so many."""


class RunFolder:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.scratch = self.checkpoints / ".shared-out"
        """A checkpoint's parts for another number of ranks, while they are loaded."""
        self.model = self.path / "model"
        self.stages = self.path / "stages"
        self.config = self.path / "config.yaml"
        self.facts = self.path / "run.json"
        self.log = self.path / "log.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.keys = self.path / "keys.jsonl"
        self.val = self.path / "val.jsonl"
        self.broken = self.path / "broken.jsonl"
        self.tokenizer = self.path / "tokenizer"

    def begin(self, config: Config, resume: str, data_checksum: str) -> Path | None:
        """Lays the folder, or finds where to go on. Gives the checkpoint to load, None for a fresh start."""
        if resume not in ("auto", "never"):
            checkpoint = Path(resume).resolve()
            if not checkpoint.exists():
                raise UserError(f"--resume {resume}: no such checkpoint; give its path, auto or never")
            begun = read_checkpoint(checkpoint)
            _refuse_other_settings(resume, begun.settings, config)
            _refuse_other_data(resume, begun.data, config, data_checksum)
        else:
            checkpoint = self.newest() if resume == "auto" else None
            if resume == "never" and (self.newest() or self.model.exists()):
                raise UserError(
                    f"{self.path} already holds a run; --resume auto goes on with it, run=OTHER chooses another folder"
                )
        if self.config.is_file() and (checkpoint is not None or self.finished):
            _refuse_other_settings(str(self.path), yaml.safe_load(self.config.read_text()), config)
            _refuse_other_data(str(self.path), self.data_checksums, config, data_checksum)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config_text(config))
        return checkpoint

    @property
    def data_checksums(self) -> dict[str, str]:
        """Of each split that the run reads."""
        return self._read_facts().get("data", {})

    @property
    def finished(self) -> bool:
        return self.model.is_dir() and self._read_facts().get("finished") is True

    def newest(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*.ckpt"))
        return found[-1] if found else None

    def write_facts(self, **facts: Any) -> None:
        """run.json: versions, seed, data checksums, and what is added later."""
        write_atomically(self.facts, json.dumps({**self._read_facts(), "versions": versions(), **facts}, indent=2))

    def _read_facts(self) -> dict[str, Any]:
        return json.loads(self.facts.read_text()) if self.facts.is_file() else {}

    def save_checkpoint(self, save: Callable[[Path], dict[str, Any]], run_step: int, ranks: Ranks) -> Path:
        """Whole or not at all: written beside its place, then renamed. All ranks call it together.

        save: writes to the given path; of a folder it gives what completes it. Raises UserError where a rank could not
        write its part; what was saved before stands.
        """
        place = self.checkpoints / _checkpoint_name(run_step)
        unfinished = place.with_suffix(UNFINISHED)
        failure = ""
        if ranks.first:
            _remove(unfinished)
        try:
            completing = save(unfinished)
            if ranks.first:
                if unfinished.is_dir():
                    write_state(completing, unfinished)
                _to_disk(unfinished)
        except (OSError, RuntimeError) as e:  # torch's writer gives the latter for a full disk
            failure = one_line(e)[:150]
        failures = ranks.lists([failure] if failure else [])
        if failures:
            if ranks.first:
                _remove(unfinished)
            raise UserError(
                f"{place}: cannot be saved ({failures[0]}); {self.newest() or 'nothing'} stands; make room, and go on "
                "with --resume auto"
            )
        if ranks.first:
            old = place.with_suffix(GOING)
            if place.is_dir():  # of the same step; a file would be replaced at once
                os.rename(place, old)
            os.replace(unfinished, place)
            _remove(old)
            _point(self.checkpoints / "last.ckpt", place)
        ranks.lists([])  # whoever leaves now, the others' launcher may end them
        return place

    def keep_checkpoints(self, newest: int, best: bool, loss: float | None) -> None:
        """Removes older checkpoints than so many, but for the best, if it is wanted. loss: of the latest."""
        losses = self._read_losses()
        found = sorted(self.checkpoints.glob("step-*.ckpt"))
        if loss is not None:
            losses[found[-1].name] = loss
        kept = {file.name for file in found[-newest:]}
        present = {file.name: losses[file.name] for file in found if file.name in losses}
        if best and present:
            name = min(present, key=lambda name: present[name])
            kept.add(name)
            _point(self.checkpoints / "best.ckpt", self.checkpoints / name)
        for file in found:
            if file.name not in kept:
                _remove(file)
        kept_losses = {name: value for name, value in losses.items() if name in kept}
        write_atomically(self.checkpoints / LOSSES, json.dumps(kept_losses, indent=1))

    def _read_losses(self) -> dict[str, float]:
        file = self.checkpoints / LOSSES
        return json.loads(file.read_text()) if file.is_file() else {}

    @staticmethod
    def lines(file: Path) -> list[dict[str, Any]]:
        """The JSON lines of one of the run's files; none where there is no such file."""
        return [json.loads(line) for line in _split(file)] if file.is_file() else []

    def note_left_out(self, left_out: Iterable[dict[str, str]]) -> None:
        """Begins broken.jsonl with what the data's own index left out, as step 0."""
        lines = [{"step": 0, "stage": None, **one} for one in islice(left_out, MOST_LEFT_OUT)]
        lines += [line for line in self.lines(self.broken) if line["step"] > 0]
        write_atomically(self.broken, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def forget_after(self, run_step: int) -> None:
        """What the run will do again from here: lines and checkpoints of later steps, and files left half written."""
        for file in (self.log, self.samples, self.keys, self.val, self.broken):
            if file.is_file():
                lines = [line for line in _split(file) if _step_of(line) <= run_step]
                write_atomically(file, "".join(f"{line}\n" for line in lines))
        later = [c for c in self.checkpoints.glob("step-*.ckpt") if c.name > _checkpoint_name(run_step)]
        for file in [*later, *self.checkpoints.glob(f"*{UNFINISHED}"), *self.checkpoints.glob(f"*{GOING}")]:
            _remove(file)
        newest = self.newest()
        if newest is not None:
            _point(self.checkpoints / "last.ckpt", newest)


def _refuse_other_settings(origin: str, begun: Any, config: Config) -> None:
    """origin: the run's folder or checkpoint, for the error. begun: the settings it has, as a tree."""
    before, now = _flat(begun), _flat(to_tree(config))
    for key in sorted(set(before) | set(now)):
        free = key.startswith(FREE_SETTINGS) or FREE_PLACES.fullmatch(key)
        free = free and key not in BOUND_SETTINGS
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"{origin}: the run began with {key}={before.get(key)}, now it is {now.get(key)}; set it back, or "
                "begin another run with run=OTHER (init_from=RUN takes the weights along)"
            )


def _refuse_other_data(origin: str, begun: dict[str, str], config: Config, checksum: str) -> None:
    split = config.data.train_split
    before = begun.get(split, checksum)
    if before != checksum:
        place = f"{config.data.path}/{split}" if config.data.path else "data.sources"
        raise UserError(
            f"{place} holds other data than the run in {origin} began with (checksum {checksum[:12]}, it was "
            f"{before[:12]}); name those, or another folder with run=OTHER"
        )


def versions() -> dict[str, str]:
    import lightning
    import torchvision
    import transformers

    return {
        "mmgem": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def write_atomically(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def _remove(path: Path) -> None:
    """A file, or a folder with all that it holds; renamed first, so that what is left after a kill is not taken for a
    checkpoint."""
    if path.is_dir() and not path.is_symlink():
        going = path.with_suffix(GOING)
        if going != path:
            shutil.rmtree(going, ignore_errors=True)
            os.rename(path, going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def _point(link: Path, place: Path) -> None:
    """Makes the link point there, at once. Where the file system knows no links, there is none."""
    beside = link.with_name(f".{link.name}.unfinished")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(place.name)
        os.replace(beside, link)
    except OSError:
        beside.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Until it is there even if the machine loses its power."""
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_line(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _split(file: Path) -> list[str]:
    """The lines; `str.splitlines` would also cut at U+2028 and the like, which captions and keys may have."""
    # A kill may have cut a character in two.
    return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def _checkpoint_name(run_step: int) -> str:
    return f"step-{run_step:08d}.ckpt"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(v, dict) for v in tree):
        items = enumerate(tree)
    else:
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
