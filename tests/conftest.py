"""Before torch is imported: one thread a process, since tests and the processes they start share the cores. And the one
small dataset that tests of the commands share."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing downloads in tests; a hub id is an error at once and not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    from tiny import Tiny

    from mmgem.cli import main

    out = tmp_path_factory.mktemp("data") / "tiny"
    counts = ["--train", "96", "--val", "24", "--test", "24", "--size", "64"]
    assert main(["data", "prepare", "scenes", "--out", str(out), *counts, "--processes", "1"]) == 0
    return Tiny(out)
