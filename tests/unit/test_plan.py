"""`mmgem check`'s data part: exact numbers, each refusal with a setting that then passes, and its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import sample, write_split
from web import serve

import mmgem.data.plan
from mmgem.cli import main
from mmgem.config import Config, DataConfig, StageConfig, config_from_tree
from mmgem.data.index import SCHEMA
from mmgem.data.order import Order
from mmgem.data.plan import Machines, Shards, data_plan, plan_stage, stage_steps
from mmgem.data.sources import open_training_data
from mmgem.errors import UserError

ONE = Machines()
MODEL = {"vision": {"name": "resnet10t"}, "llm": {"config": {"model_type": "llama"}}}


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, so that the texts are the same everywhere."""
    monkeypatch.setattr(mmgem.data.plan, "cpus", lambda: 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 samples in 24 shards of 4 to train on, with 3 captions and 3 boxes each, and 2 to validate."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "train", [sample(n) for n in range(96)])
    write_split(folder / "val", [sample(n) for n in range(2)])
    return folder


def config(path: Path | str, stage: dict[str, Any] | None = None, **settings: Any) -> Config:
    place = {} if "sources" in settings else {"path": str(path)}
    stage = {"global_batch": 8, **(stage or {})}
    stages = [stage if {"samples", "steps", "epochs"} & stage.keys() else {"samples": 96, **stage}]
    return config_from_tree({"model": MODEL, "stages": stages, "data": {**place, **settings}}, "test")


def refused(config: Config, machines: Machines = ONE) -> str:
    with pytest.raises(UserError) as caught:
        data_plan(config, machines)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(split: Path) -> list[int]:
    """Bytes of its shards, as the files have them."""
    return [path.stat().st_size for path in sorted(split.glob("*.tar"))]


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "lanes", "batch", "nodes", "gpus", "steps"),
    [
        ([10] * 64, 8, 16, 1, 1, 40),
        ([10] * 64, 8, 16, 2, 2, 40),  # each node its own lanes
        ([10] * 64, 8, 16, 2, 2, 7),  # less than an epoch
        ([10] * 64, 6, 12, 4, 1, 50),  # nodes share lanes
        ([10] * 64, 1, 16, 2, 2, 40),  # all read the one lane
        ([10] * 64, 8, 12, 2, 2, 53),  # which lanes a rank reads changes from step to step
        ([3, 40, 1, 7, 25, 2, 9] * 3, 4, 8, 2, 2, 32),
        ([10] * 3, 8, 6, 1, 2, 5),  # more lanes than shards
    ],
)
def test_what_ranks_and_nodes_read_is_what_the_order_gives_them(
    shards: list[int], lanes: int, batch: int, nodes: int, gpus: int, steps: int
) -> None:
    order = Order(shards, 3, 2, lanes)
    assert steps * batch <= order.samples
    stage, machines = StageConfig(steps=steps, global_batch=batch), Machines(nodes, gpus)
    local = Shards(np.zeros(len(shards)), (slice(0, len(shards)),), (sum(shards),), (sum(shards),))
    plan = plan_stage(stage, DataConfig(window=2, lanes=lanes), order, local, machines)

    def most(readers: int) -> tuple[int, int]:
        """Lanes and shards of the reader that has most, step by step."""
        of_reader = [
            np.concatenate([order.step(step, batch, reader, readers) for step in range(steps)])
            for reader in range(readers)
        ]
        lanes_read = max(len(set(order.lanes_of(positions).tolist())) for positions in of_reader)
        return lanes_read, max(len(order.shards(positions)) for positions in of_reader)

    assert (plan.rank.lanes, plan.rank.shards) == most(machines.ranks)
    assert (plan.node.lanes, plan.node.shards) == most(nodes)
    assert plan.shards == most(1)[1]
    assert plan.node.at_once == min(plan.node.lanes * 2, plan.node.shards)


def test_shards_at_a_time_are_those_of_a_window_a_lane() -> None:
    """Where each lane gives one sample a step, a step never stands in two windows of a lane."""
    order = Order([10] * 64, 0, 2, 8)
    stage = StageConfig(epochs=1, global_batch=8)
    local = Shards(np.zeros(64), (slice(0, 64),), (640,), (640,))
    plan = plan_stage(stage, DataConfig(window=2, lanes=8), order, local, Machines(2, 1))
    open_at_once = [len(order.shards(order.step(step, 8, rank, 2))) for step in range(80) for rank in range(2)]
    assert plan.node.at_once == max(open_at_once) == 8


def test_weighted_sources(data: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "more/train", [sample(n) for n in range(30)], shard_size=10)
    sources = [{"path": str(data), "weight": 3}, {"path": str(tmp_path / "more"), "weight": 1}]
    settings = config("", {"samples": 80_000}, sources=sources, window=1, lanes=2)
    dataset = open_training_data(settings.data)
    order = Order(dataset.sizes, 0, 1, 2, dataset.order_sources)
    plan = plan_stage(settings.stages[0], settings.data, order, Shards.of(dataset), ONE)
    assert plan.samples == 80_000 and plan.epochs == (60_000 / 96, 20_000 / 30)
    mean = 0.75 * sum(sizes(data / "train")) / 96 + 0.25 * sum(sizes(tmp_path / "more/train")) / 30
    assert plan.sample_bytes == pytest.approx(mean)
    assert plan.rank.shards == 27
    assert plan.rank.at_once == 4  # one of each source at each lane
    text = data_plan(settings, ONE)
    assert f"data: {data}/train: 96 samples in 24 shards" in text and "; 75.0% of the samples seen" in text
    assert "10,000 steps of global_batch 8 = 80,000 samples = 625, 667 epochs (of each source)" in text


def test_cache_and_bandwidth_of_urls(data: Path) -> None:
    settings = config(f"file://{data}", {"epochs": 2}, window=2, lanes=4)
    dataset = open_training_data(settings.data)
    order = Order(dataset.sizes, 0, 2, 4)
    largest = sorted(sizes(data / "train"), reverse=True)

    def plan(cache: float, machines: Machines) -> Any:
        settings.data.shard_cache_gb = cache
        return plan_stage(settings.stages[0], settings.data, order, Shards.of(dataset), machines)

    two_nodes = plan(1e-6, Machines(2, 2))
    assert (two_nodes.node.lanes, two_nodes.rank.lanes) == (2, 1)
    assert two_nodes.cache_least == sum(largest[:4])  # 2 lanes, windows of 2
    assert two_nodes.cache_wanted == sum(largest[:8])
    assert plan(1e-6, ONE).fetched == 2 * sum(largest)  # again in the second epoch
    assert plan(1, ONE).fetched == sum(largest)  # all fit
    local = config(data, {"epochs": 2}, window=2, lanes=4)
    of_folder = plan_stage(local.stages[0], local.data, order, Shards.of(open_training_data(local.data)), ONE)
    assert (of_folder.cache_least, of_folder.cache_wanted, of_folder.fetched) == (0, 0, 0)


def test_a_smaller_cache_than_the_least_fetches_shards_again_and_again(tmp_path: Path) -> None:
    write_split(tmp_path / "web/train", [sample(n) for n in range(256)], shard_size=16)
    settings = config("", window=2, lanes=2)

    def fetched(share: float, steps: int) -> int:
        """Requests for tars while so many steps are read with this share of the least cache."""
        with serve(tmp_path / "web") as web:
            settings.data.path, settings.data.val_split = web.url, None
            settings.data.shard_cache = str(tmp_path / f"cache {share}")
            dataset = open_training_data(settings.data)
            order = Order(dataset.sizes, 0, 2, 2)
            plan = plan_stage(settings.stages[0], settings.data, order, Shards.of(dataset), ONE)
            settings.data.shard_cache_gb = share * plan.cache_least / 1e9
            dataset = open_training_data(settings.data)
            for step in range(steps):
                positions = order.step(step, 8)
                dataset.prefetch(order.shards(positions))
                for number in order.places(positions)[1].tolist():
                    dataset.sample(number)
            return sum(count for name, count in web.requests.items() if name.endswith(".tar"))

    assert fetched(1.1, 32) <= 20  # 16 shards; where a batch stands in two windows one may come twice
    assert fetched(0.6, 6) > 12  # of 4 shards


# --- text ---------------------------------------------------------------------------------------------------------


def test_the_text(data: Path) -> None:
    total = sum(sizes(data / "train"))
    settings = config(data, {"epochs": 2, "max_regions": 2, "captions_per_image": 2}, window=2, lanes=4, workers=1)
    assert data_plan(settings, Machines(2, 2), 50).splitlines() == [
        f"data: {data}/train: 96 samples in 24 shards, {total / 1000:.3g} kB ({total / 96 / 1000:.3g} kB a sample), "
        "288 captions, 288 regions",
        "ranks: 4 (2 nodes x 2), 1 worker each: 2 steps ahead",
        "stage global: 24 steps of global_batch 8 = 192 samples = 2 epochs",
        f"  a rank: 2 samples a step (up to 4 captions, up to 4 boxes), {2 * total / 96 / 1000:.3g} kB; in the stage "
        f"{total / 2 / 1000:.3g} kB; 1 lane of 4: 6 shards an epoch, 2 at a time",
        f"  a node: 2 lanes of 4: 12 shards an epoch, 4 at a time; reads {100 * total / 96 / 1000:.3g} kB/s at 50 "
        "samples/s a rank",
    ]


def test_the_text_of_urls(data: Path) -> None:
    largest = sorted(sizes(data / "train"), reverse=True)
    lines = data_plan(config(f"file://{data}", window=2, lanes=4), ONE).splitlines()
    assert lines[-2:] == [
        f"  a node: 4 lanes of 4: 24 shards an epoch, 8 at a time; reads {sum(largest) / 0.96 / 1000:.3g} kB/s, "
        f"fetches {sum(largest) / 0.96 / 1000:.3g} kB/s ({sum(largest) / 1000:.3g} kB in the stage), at 100 samples/s "
        "a rank",
        f"  cache of a node: {sum(largest[:8]) / 1000:.3g} kB for the shards read at a time, "
        f"{sum(largest[:16]) / 1000:.3g} kB with the next ones; data.shard_cache_gb=20",
    ]


def test_notes(data: Path) -> None:
    def notes(settings: Config, machines: Machines = ONE) -> list[str]:
        lines = data_plan(settings, machines).splitlines()
        return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]

    assert notes(config(data)) == []
    assert notes(config(data, workers=4), Machines(1, 2)) == [
        "8 workers a node (2 x data.workers=4), this machine has 4 CPUs: if the nodes are like it, set data.workers to "
        "2"
    ]
    assert notes(config(data, workers=2), Machines(1, 2)) == []
    shared = "stage global: nodes share shards: each reads 24, 2 times its share, as data.lanes="
    assert notes(config(data, lanes=1), Machines(2, 1)) == [
        f"{shared}1 is no multiple of 2 nodes that divides global_batch; data.lanes=2 lets each read its own"
    ]
    assert notes(config(data, lanes=2), Machines(2, 1)) == []
    (of_open,) = notes(config("", window=72, lanes=1, sources=[{"path": str(data)}] * 3))
    assert of_open.startswith("stage global: a rank reads 72 shards at a time, a process keeps 64 open")


@pytest.mark.parametrize("where", ["", "file://"])
def test_a_missing_validation_split(data: Path, tmp_path: Path, where: str) -> None:
    write_split(tmp_path / "train", [sample(n) for n in range(8)])
    path, has = f"{where}{tmp_path}", "" if where else "; it has train"
    text = data_plan(config(path, {"samples": 8}), ONE)
    note = f"note: data.val_split=val: no such split in {path}{has}; captions in the log will be of training pictures"
    assert text.splitlines()[-1] == note
    message = refused(config(path, {"samples": 8}, val_split="dev"))
    assert message == (f"data.val_split=dev: no such split in {path}{has}: name one that it has, or set it to null")
    assert "note" not in data_plan(config(path, {"samples": 8}, val_split=None), ONE)


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "machines", "message", "mended", "mended_machines"),
    [
        (
            {"global_batch": 10},
            Machines(2, 2),
            "global_batch=10 cannot be divided among 4 ranks; set it to 12, or start 2 ranks (2 nodes x 1)",
            {"global_batch": 12},
            Machines(2, 1),
        ),
        (
            {"global_batch": 9},
            Machines(1, 8),
            "global_batch=9 cannot be divided among 8 ranks; set it to 8, or start 3 ranks (1 node x 3)",
            {"global_batch": 8},
            Machines(1, 3),
        ),
        (
            {"samples": 300, "global_batch": 128},
            Machines(1, 64),
            "global_batch=128 is more than the 96 samples of the data, a step would hold pictures twice; set it to 64",
            {"samples": 300, "global_batch": 64},
            Machines(1, 64),
        ),
        (
            {"samples": 15, "global_batch": 16},
            Machines(1, 2),
            "samples=15 is less than one step of global_batch=16; set samples to 16, or global_batch to 14",
            {"samples": 15, "global_batch": 14},
            Machines(1, 2),
        ),
        (
            {"epochs": 0.1, "global_batch": 16},
            ONE,
            "epochs=0.1 is 10 samples, less than one step of global_batch=16; set epochs to 0.167, or global_batch to "
            "10",
            {"epochs": 0.167, "global_batch": 16},
            ONE,
        ),
    ],
)
def test_batches_and_lengths_that_cannot_be(
    data: Path,
    stage: dict[str, Any],
    machines: Machines,
    message: str,
    mended: dict[str, Any],
    mended_machines: Machines,
) -> None:
    assert refused(config(data, stage), machines) == f"stage global: {message}"
    assert "stage global: " in data_plan(config(data, mended), machines)
    if mended_machines != machines:
        assert "stage global: " in data_plan(config(data, stage), mended_machines)


def test_a_batch_of_more_ranks_than_samples(data: Path) -> None:
    message = refused(config(data, {"samples": 128, "global_batch": 128}), Machines(16, 8))
    assert message.endswith("a step would hold pictures twice; prepare more data, or start fewer ranks")


def test_a_cache_that_is_too_small(data: Path) -> None:
    url = f"file://{data}"
    largest = sorted(sizes(data / "train"), reverse=True)
    least, wanted = sum(largest[:8]) / 1e9, sum(largest[:16]) / 1e9
    message = refused(config(url, window=2, lanes=4, shard_cache_gb=0.9 * least))
    assert message.startswith(f"stage global: data.shard_cache_gb={0.9 * least:g} has no room for the ")
    assert message.endswith(", or data.window to 1")
    settings = message.partition("set it to ")[2].split(" (")
    more, most = float(settings[0]), float(settings[1].partition(":")[0])
    assert least <= more <= 1.02 * least and wanted <= most <= 1.02 * wanted
    waits = f"note: stage global: steps will wait for shards: data.shard_cache_gb={most:g} lets the next ones come"
    assert waits in data_plan(config(url, window=2, lanes=4, shard_cache_gb=more), ONE)
    assert "note" not in data_plan(config(url, window=2, lanes=4, shard_cache_gb=most), ONE)
    assert "stage global" in data_plan(config(url, window=1, lanes=4, shard_cache_gb=0.9 * least), ONE)
    assert "data.window" not in refused(config(url, window=1, lanes=4, shard_cache_gb=1e-6))


def test_a_batch_that_a_source_cannot_fill(data: Path, tmp_path: Path) -> None:
    """Of a source of 10 samples a step of 16 would have 12."""
    write_split(tmp_path / "train", [sample(n) for n in range(10)])
    sources = [{"path": str(data), "weight": 1}, {"path": str(tmp_path), "weight": 3}]
    message = refused(config("", {"global_batch": 16}, sources=sources), Machines(1, 2))
    assert "global_batch=16 is more than the 13 samples of the data, of a source with its weight, a step" in message
    assert message.endswith("set it to 12")
    data_plan(config("", {"global_batch": 12}, sources=sources), Machines(1, 2))


def test_weights_that_cannot_be_kept(data: Path) -> None:
    def weighted(weight: float) -> Config:
        path = str(data)
        return config("", sources=[{"path": path, "weight": 1}, {"path": path, "weight": weight}])

    message = refused(weighted(1e-5))
    assert "a weight is below 1/10000 of their sum ([1.0, 1e-05]); raise it to 0.000101, or leave it out" in message
    assert "0.0% of the samples seen" in data_plan(weighted(0.000101), ONE)


def test_data_without_boxes_or_captions(tmp_path: Path) -> None:
    write_split(tmp_path / "texts/train", [sample(n, regions=[]) for n in range(8)])
    write_split(tmp_path / "boxes/train", [sample(n, captions=[]) for n in range(8)])
    message = refused(config(tmp_path / "texts", {"samples": 8, "max_regions": 3}))
    assert "max_regions=3" in message and message.endswith("set max_regions: 0 or prepare data with boxes")
    assert "8 samples" in data_plan(config(tmp_path / "texts", {"samples": 8}), ONE)
    message = refused(config(tmp_path / "boxes", {"samples": 8}))
    assert message == (
        f"stage global: {tmp_path}/boxes/train has no captions and max_regions is 0, nothing would train; set "
        "max_regions to 1 or more"
    )
    assert "8 samples" in data_plan(config(tmp_path / "boxes", {"samples": 8, "max_regions": 1}), ONE)


def test_data_that_are_not_there(data: Path, tmp_path: Path) -> None:
    assert "no such folder; make it with `mmgem data prepare`" in refused(config(tmp_path / "none"))
    assert "data.path is missing" in refused(config(""))
    assert refused(config(data, train_split="trian")).endswith("it has train, val")
    (tmp_path / "bare/train").mkdir(parents=True)
    assert "no index.json in" in refused(config(tmp_path / "bare"))
    write_split(tmp_path / "cut/train", [sample(n) for n in range(8)])
    (tmp_path / "cut/train/shard-000001.tar").unlink()
    message = refused(config(tmp_path / "cut"))
    assert message == (
        f"shard {tmp_path}/cut/train/shard-000001.tar is missing, {tmp_path}/cut/train/index.json names it; copy or "
        "prepare it again"
    )


@pytest.mark.parametrize(
    ("machines", "rate", "message"),
    [
        (Machines(0, 1), 100, "--nodes 0: there must be at least 1"),
        (Machines(1, -2), 100, "--gpus-per-node -2: there must be at least 1"),
        (ONE, 0, "--samples-per-second 0: give a number above 0, e.g. 100"),
        (ONE, float("nan"), "--samples-per-second nan: give a number above 0, e.g. 100"),
    ],
)
def test_options_that_cannot_be(data: Path, machines: Machines, rate: float, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        data_plan(config(data), machines, rate)


# --- without data -------------------------------------------------------------------------------------------------


def test_without_data(tmp_path: Path) -> None:
    settings = config(tmp_path / "none", {"epochs": 2.5})
    assert data_plan(settings, Machines(2, 2), look=False).splitlines() == [
        "data: not looked at (--no-data)",
        "ranks: 4 (2 nodes x 2), 0 workers each: each step waits for its samples",
        "stage global: 2.5 epochs of global_batch 8",
        "  a rank: 2 samples a step (up to 2 captions)",
    ]
    text = data_plan(config(tmp_path / "none", {"samples": 100}), ONE, look=False)
    assert "stage global: 12 steps of global_batch 8" in text
    with pytest.raises(UserError, match="among 3 ranks"):
        data_plan(settings, Machines(1, 3), look=False)
    with pytest.raises(UserError, match="samples=7 is less than one step of global_batch=8"):
        data_plan(config(tmp_path / "none", {"samples": 7}), ONE, look=False)


def test_the_length_of_a_stage() -> None:
    def steps(**length: Any) -> int:
        return stage_steps(StageConfig(global_batch=8, **length), 100)

    assert steps(samples=80) == 10 and steps(samples=87) == 10  # whole steps
    assert steps(epochs=2) == 25 and steps(epochs=0.5) == 6
    assert steps(steps=7) == 7
    assert steps(samples=3) == 1  # at least one


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code, options, and the line of a stage given in steps; the model's part has tests of its own."""
    file = tmp_path / "config.yaml"
    llm = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = {"vision": {"name": "resnet10t", "image_size": 64}, "llm": {"config": llm | {"num_attention_heads": 2}}}
    stages = [{"steps": 5, "global_batch": 6}]
    file.write_text(yaml.safe_dump({"model": model, "data": {"path": str(data)}, "stages": stages}))
    machines = ["--nodes", "2", "--gpus-per-node", "3", "--samples-per-second", "7"]
    assert main(["check", "--config", str(file), *machines]) == 0
    out = capsys.readouterr().out
    assert "ranks: 6 (2 nodes x 3)" in out and "at 7 samples/s a rank" in out
    assert "5 steps of global_batch 6 = 30 samples" in out
    assert "stage global: 5 steps, global_batch 6, frozen: nothing" in out
    assert main(["check", "--config", str(file), "--gpus-per-node", "4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "global_batch=6 cannot be divided among 4 ranks" in captured.err
    missing = f"data.path={tmp_path}/none"
    assert main(["check", "--config", str(file), missing]) == 2
    assert f"{missing}: no such folder" in capsys.readouterr().err
    assert main(["check", "--config", str(file), missing, "--no-data"]) == 0
    assert capsys.readouterr().out.startswith("data: not looked at (--no-data)\n")


def test_a_hundred_thousand_shards_are_refused_in_two_seconds() -> None:
    """Half of them here, half at a URL that is never asked; what is refused is known last, after all was worked out.
    It waits for nothing but a processor, so its time on one is what a machine that nobody else uses takes."""
    count, size = 100_000, 100_000_000
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "data/train"
        split.mkdir(parents=True)
        shards = []
        for number in range(count):
            path = f"{number:06d}.tar" if number % 2 else f"https://shards.invalid/{number:06d}.tar"
            if number % 2:
                os.mknod(split / path)
            kept = {"members": f"members/{number:06d}.json", "members_sha256": f"{number:064x}"}
            shards.append({"path": path, "samples": 1000, "bytes": size, "sha256": f"{number:064x}", **kept})
        totals = {"samples": 1000 * count, "captions": 1000 * count, "regions": 0, "images_without_captions": 0}
        (split / "index.json").write_text(json.dumps({"schema": SCHEMA, "shards": shards, "totals": totals}, indent=1))
        file = Path(folder) / "config.yaml"
        settings = {"path": str(split.parent), "val_split": None, "shard_cache_gb": 0.7}
        stages = [{"epochs": 3, "global_batch": 4096}]
        file.write_text(yaml.safe_dump({"model": MODEL, "data": settings, "stages": stages}))
        command = [sys.executable, "-m", "mmgem.cli", "check", "--config", str(file)]
        before = os.times()
        done = subprocess.run([*command, "--nodes", "4", "--gpus-per-node", "8"], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            "mmgem: error: stage global: data.shard_cache_gb=0.7 has no room for the 800 MB of shards that a node "
            "reads at a time, each would be fetched again and again; set it to 0.808 (1.62: the next ones come "
            "meanwhile), or data.window to 3\n"
        )
        assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, mmgem.data.plan; print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().replace("set()", "[]")) == []
