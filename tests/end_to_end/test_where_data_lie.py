"""Training on data of a web server, and on several sources at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny import CONFIG, Tiny, figures, read_lines
from web import serve

from mmgem.cli import main
from mmgem.data.order import PERIOD

SHORT = ("stages=[{name: only, samples: 192, global_batch: 16, max_regions: 3}]", "training.log_keys=true")


@pytest.fixture(scope="module")
def small_shards(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "data"
    counts = ["--train", "96", "--val", "8", "--test", "8", "--size", "64", "--shard-size", "8", "--seed", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(out), *counts, "--processes", "1"]) == 0
    return out


def train(run: Path, *overrides: str) -> int:
    return main(["train", "--config", str(CONFIG), f"run={run}", *SHORT, *overrides])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_web_server_gives_the_run_that_the_folder_gives(small_shards: Path, tmp_path: Path, workers: int) -> None:
    assert train(tmp_path / "local", f"data.path={small_shards}") == 0
    cache = f"data.shard_cache={tmp_path}/cache"
    with serve(small_shards) as web:
        web.latency = 0.01
        web.faults["shard-000002.tar"] = [("drop", 5000), 503]
        web.faults["shard-000005.tar"] = [("drop", 0)]
        assert train(tmp_path / "web", f"data.path={web.url}", f"data.workers={workers}", cache) == 0
        # Twelve shards, each fetched once for all workers and both epochs, but for the tries that failed.
        shards = {name: count for name, count in web.requests.items() if name.endswith(".tar")}
        assert shards.pop("shard-000002.tar") == 3 and shards.pop("shard-000005.tar") == 2
        assert shards.pop("shard-000000.tar") == 2, "of train and of val"
        assert len(shards) == 9 and set(shards.values()) == {1}
    assert figures(tmp_path / "web") == figures(tmp_path / "local")
    keys = [read_lines(tmp_path / run / "keys.jsonl") for run in ("web", "local")]
    assert keys[0] == keys[1] and len(keys[0]) == 12


def test_two_sources_in_their_shares(tiny: Tiny, small_shards: Path, tmp_path: Path) -> None:
    sources = f"data.sources=[{{path: {tiny.data}, weight: 3}}, {{path: {small_shards}, weight: 1}}]"
    assert train(tmp_path / "run", "data.path=", sources) == 0
    lines = read_lines(tmp_path / "run/keys.jsonl")
    seen = Counter(key.split(":")[0] for line in lines for key in line["keys"])
    assert seen["0"] + seen["1"] == 192 and abs(seen["0"] - 144) <= 2, "of any stretch, not only of all PERIOD"
    assert PERIOD > 192
    assert all(abs(sum(key.startswith("0:") for key in line["keys"]) - 12) <= 2 for line in lines), "of any batch, too"
    assert (tmp_path / "run/model").is_dir()
