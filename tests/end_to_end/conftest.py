"""One finished tiny run, shared by the end-to-end tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny import Finished, Tiny, run

# transformers logs to the stderr that it found when it was imported; pytest has closed that one since.
logging.raiseExceptions = False


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
