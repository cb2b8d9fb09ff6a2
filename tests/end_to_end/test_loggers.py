"""Weights & Biases by config, and loggers that are not installed. (TensorBoard's own test is in test_train.py.)"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.fabric.loggers.tensorboard as tensorboard_of_lightning
import lightning.pytorch.loggers.wandb as wandb_of_lightning
import pytest
from lightning_utilities.core.imports import RequirementCache
from tiny import Tiny, read_lines

TWO_STAGES = (
    "stages=[{name: one, samples: 48, global_batch: 16}, {name: two, samples: 32, global_batch: 16, max_regions: 2}]"
)


class Run:
    """What Lightning uses of wandb's run."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the wandb package below Lightning's own WandbLogger: no account, no network."""
    module: Any = ModuleType("wandb")
    module.run, module.settings = None, []

    def init(**settings: Any) -> Run:
        module.settings.append(settings)
        module.run = Run()
        return module.run

    module.init = init
    parts = {"sdk.lib": SimpleNamespace(RunDisabled=type("RunDisabled", (), {})), "wandb_run": SimpleNamespace(Run=Run)}
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "wandb.sdk", ModuleType("wandb.sdk"))
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"wandb.{name}", part)
    monkeypatch.setattr(wandb_of_lightning, "_WANDB_AVAILABLE", True)
    return module


@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
def test_wandb_by_config(tiny: Tiny, tmp_path: Path, wandb: Any) -> None:
    """One run of the project, with the run folder's name; each step of both stages as log.jsonl has it."""
    folder = tmp_path / "seventh"
    assert tiny.train(folder, TWO_STAGES, "training.wandb_project=pictures", "training.sample_every=0") == 0
    assert len(wandb.settings) == 1
    chosen = {key: wandb.settings[0][key] for key in ("project", "name", "dir")}
    assert chosen == {"project": "pictures", "name": "seventh", "dir": str(folder)}
    steps = [row for row in wandb.run.logged if "loss" in row]
    assert [row["trainer/global_step"] for row in steps] == [1, 2, 3, 4, 5]
    for row, line in zip(steps, read_lines(folder / "log.jsonl"), strict=True):
        assert {k: v for k, v in row.items() if k != "trainer/global_step"} == {
            k: v for k, v in line.items() if k not in ("step", "stage") and v is not None
        }
    assert "loss_region_emb" in steps[-1]


@pytest.mark.parametrize("setting", ["training.wandb_project=pictures", "training.tensorboard=true"])
def test_a_logger_that_is_not_installed(
    tiny: Tiny, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = RequirementCache("no-such-package-for-logs")
    monkeypatch.setattr(wandb_of_lightning, "_WANDB_AVAILABLE", missing)
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard_of_lightning, name, missing)
    assert tiny.train(tmp_path / "run", TWO_STAGES, setting) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "this logger is not installed" in last and last.endswith("pip install 'mmgem[log]'"), last
    assert not (tmp_path / "run/log.jsonl").exists()  # refused before the first step
