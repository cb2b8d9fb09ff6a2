"""One small dataset and one finished tiny run, shared by the end-to-end tests."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from tiny import Finished, Tiny, run

from mmgem.cli import main

# transformers logs to the stderr that it found when it was imported; pytest has closed that one since.
logging.raiseExceptions = False
# Nothing downloads in tests; a hub id is an error at once and not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    out = tmp_path_factory.mktemp("data") / "tiny"
    counts = ["--train", "96", "--val", "24", "--test", "24", "--size", "64"]
    assert main(["data", "prepare", "scenes", "--out", str(out), *counts, "--processes", "1"]) == 0
    return Tiny(out)


@pytest.fixture(scope="session")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run of both stages, trained by `python train.py` in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    script = Path(__file__).parents[2] / "train.py"
    done = run(*tiny.arguments(folder)[1:], script=script)
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def model(finished: tuple[Path, Finished]) -> Path:
    """The finished run's folder, for commands that take a model."""
    return finished[0]


@pytest.fixture(scope="session")
def picture(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the test split (64 x 64) as a file."""
    from mmgem.data.shards import ShardedDataset

    path = tmp_path_factory.mktemp("picture") / "scene.jpg"
    path.write_bytes(ShardedDataset(tiny.data / "test").sample(0).image)
    return path
