"""Ranks that are late, stopped, killed or ended, as the other ranks see them: real processes over gloo, no model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import codec, sample, write_split

from mmgem.config import DataConfig, StageConfig
from mmgem.data.datamodule import StageData
from mmgem.data.order import Order
from mmgem.data.sources import Sources, open_training_data
from mmgem.images import Preprocess
from mmgem.ranks import Ranks, process_group
from mmgem.training.watchdog import (
    EXIT_CODE,
    Peer,
    PeerLost,
    Phase,
    StageShards,
    Watchdog,
    WatchdogCallback,
    describe,
    find_late,
)

LATE, STOP = 1.25, 3.0
STEPS, STEP = 12, 5
"""A rank does what it does in step 5."""
GLOBAL_BATCH = 6
# Ranks are forks of a process that has imported torch already.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmgem.training.watchdog", "helpers"])


@dataclass(frozen=True)
class Odd:
    """What one rank does in its step 5."""

    rank: int = -1
    act: str = ""
    seconds: float = 0.0

    def __call__(self, rank: int, phase: Phase) -> None:
        if rank != self.rank:
            return
        if self.act == phase:
            time.sleep(self.seconds)
        elif phase == Phase.READING and self.act.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.act))
        elif phase == Phase.READING and self.act == "raise":
            raise RuntimeError("shapes differ")


def run_rank(rank: int, count: int, port: int, folder: Path, odd: Odd) -> None:
    out = os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with process_group(cuda=False) as ranks, Watchdog(ranks, LATE, STOP, host="abc"[rank]) as watchdog:
            watchdog.shards_of = shards_of(folder, count)
            for step in range(1, STEPS + 1):
                watchdog.beat(step, Phase.READING)
                if step == STEP:
                    odd(rank, Phase.READING)
                watchdog.beat(step, Phase.COMPUTING)
                if step == STEP:
                    odd(rank, Phase.COMPUTING)
                ranks.sums(1)
                (folder / f"{rank}.step").write_text(str(step))
                time.sleep(0.1)
    except PeerLost as error:
        print(error, file=sys.stderr)
        sys.exit(PeerLost.exit_code)
    except RuntimeError:
        sys.exit(3)


def open_data(folder: Path) -> tuple[Sources, Order]:
    dataset = open_training_data(DataConfig(path=str(folder / "data")))
    return dataset, Order(dataset.sizes, seed=0, window=1, lanes=6)


def shards_of(folder: Path, count: int) -> StageShards:
    return StageShards(*open_data(folder), GLOBAL_BATCH, count, steps_before=0, steps=STEPS)


def shards_read(folder: Path, rank: int, count: int, step: int) -> list[str]:
    """The same by another way: from each sample to its shard's file."""
    dataset, order = open_data(folder)
    positions = order.step(step - 1, GLOBAL_BATCH, rank, count)
    split = dataset.splits[0]
    return sorted({split.shards[split.place(order.at(int(p))[1])[0]].path for p in positions})


class Job:
    def __init__(self, folder: Path, count: int, odd: Odd):
        self.folder = folder
        write_split(folder / "data/train", [sample(n) for n in range(24)], shard_size=2)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks: list[BaseProcess] = []
        for rank in range(count):
            self.ranks.append(CONTEXT.Process(target=run_rank, args=(rank, count, port, folder, odd)))
            self.ranks[-1].start()

    def wait(self, *ranks: int) -> list[int | None]:
        """The exit codes of these ranks, or of all; then the others are killed."""
        try:
            for rank in ranks or range(len(self.ranks)):
                self.ranks[rank].join(60)
                assert not self.ranks[rank].is_alive(), f"rank {rank} does not end: {self.err(rank)}"
        finally:
            for process in self.ranks:
                process.kill()
        return [self.ranks[rank].exitcode for rank in ranks or range(len(self.ranks))]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 60
        while not all((self.folder / f"{rank}.step").is_file() for rank in range(len(self.ranks))) or any(
            int((self.folder / f"{rank}.step").read_text() or 0) < step for rank in range(len(self.ranks))
        ):
            assert time.monotonic() < end
            time.sleep(0.02)

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def step(self, rank: int) -> int:
        return int((self.folder / f"{rank}.step").read_text())


def test_a_rank_that_reads_for_too_long_is_named_with_its_shards(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, Odd(1, "reading", 60))
    assert job.wait() == [EXIT_CODE] * 3
    shards = shards_read(tmp_path, 1, 3, STEP)
    data = ", ".join(f"train/{path}" for path in shards)
    assert 0 < len(shards) < 12
    for rank in (0, 2):
        late, error = job.err(rank).splitlines()
        named = f"rank 1 (host b) is still reading its data of step 5 ({data}) after"
        assert late.startswith(f"late: {named}")
        assert named in error and "--resume auto" in error


@pytest.mark.parametrize("odd", [0, 1])
def test_a_stopped_rank_is_named_as_silent(tmp_path: Path, odd: int) -> None:
    """Rank 0 keeps the store, through which the ranks hear of each other."""
    job = Job(tmp_path, 3, Odd(odd, "SIGSTOP"))
    others = [rank for rank in range(3) if rank != odd]
    assert job.wait(*others) == [EXIT_CODE] * 2
    for rank in others:
        assert f"nothing heard of rank {odd} (host {'abc'[odd]}) for" in job.err(rank)
        if odd:
            data = ", ".join(f"train/{path}" for path in shards_read(tmp_path, odd, 3, STEP))
            lines = job.err(rank).splitlines()
            assert [line.split(":")[0] for line in lines] == ["late", "mmgem"]
            assert all(f", in step 5 it was to read {data}" in line for line in lines)
            assert "still" not in job.err(rank), "who is not heard is not slow, and who waits for it neither"
        else:
            assert f"host {'abc'[rank]} cannot reach the ranks' store at 127.0.0.1:" in job.err(rank)


@pytest.mark.parametrize("odd", [0, 2])
def test_a_killed_rank_is_named_for_the_failed_collective(tmp_path: Path, odd: int) -> None:
    job = Job(tmp_path, 3, Odd(odd, "SIGKILL"))
    others = [rank for rank in range(3) if rank != odd]
    assert job.wait(*others) == [EXIT_CODE] * 2
    for rank in others:
        assert f"rank {odd} (host {'abc'[odd]})" in job.err(rank), job.err(rank)
        assert "nothing heard of" in job.err(rank) and "--resume auto" in job.err(rank)
        assert "Traceback" not in job.err(rank)


def test_a_rank_that_ended_with_an_error_is_no_dead_one(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, Odd(1, "raise"))
    assert job.wait() == [EXIT_CODE, 3, EXIT_CODE]
    for rank in (0, 2):
        assert "rank 1 (host b) has ended (shapes differ)" in job.err(rank), job.err(rank)
        assert "nothing heard of rank 1" not in job.err(rank)
    assert job.err(1) == ""


def test_a_clean_end_and_a_rank_that_is_slow_but_not_late_print_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, Odd(1, "reading", LATE / 2))
    assert job.wait() == [0, 0]
    assert [job.err(0), job.err(1)] == ["", ""]


def test_a_late_rank_that_goes_on_is_forgiven(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, Odd(1, "computing", (LATE + STOP) / 2))
    assert job.wait() == [0, 0]
    late, *_, back = job.err(0).splitlines()
    assert late.startswith("late: all 2 ranks are late: rank 0 is still computing step 5 (train/shard-")
    assert back.startswith("no longer late: rank ")


def test_ranks_that_were_all_stopped_for_a_while_blame_nobody(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, Odd())
    job.wait_for_step(2)
    for process in job.ranks:
        os.kill(process.pid or 0, signal.SIGSTOP)
    time.sleep(STOP + 0.5)
    for process in job.ranks:
        os.kill(process.pid or 0, signal.SIGCONT)
    assert job.wait() == [0, 0], job.err(0) + job.err(1)


# --- the judgement alone ---------------------------------------------------------------------------------------------


def peer(rank: int, step: int, phase: Phase, *, heard: float = 100, moved: float = 60, **more: Any) -> Peer:
    return Peer(rank, "ab"[rank // 2], heard, moved, step=step, phase=phase, **more)


def late(*peers: Peer) -> list[tuple[int, str]] | None:
    found = find_late(peers, 0, now=100, late_after=30, interval=5)
    return None if found is None else [(one.peer.rank, one.kind) for one in found]


def test_who_waits_is_not_late() -> None:
    waiting = peer(0, 7, Phase.COMPUTING)
    assert late(waiting, peer(1, 7, Phase.READING)) == [(1, "slow")]
    assert late(waiting, peer(1, 7, Phase.SAVING)) == [(1, "slow")]
    assert late(waiting, peer(1, 6, Phase.COMPUTING)) == [(1, "slow")]
    assert late(waiting, peer(1, 7, Phase.READING, moved=75)) == []
    assert late(waiting, peer(1, 7, Phase.COMPUTING)) == [(0, "slow"), (1, "slow")]
    assert late(waiting, peer(1, 7, Phase.COMPUTING, moved=75)) == []
    assert late(waiting, peer(1, 0, Phase.PREPARING)) == [], "which may take hours"
    assert late(waiting, peer(1, 7, Phase.READING, heard=65)) == [(1, "silent")]
    assert late(waiting, peer(1, 7, Phase.READING, heard=85)) is None, "it may have fallen silent"
    assert late(peer(0, 7, Phase.COMPUTING, moved=95), peer(1, 6, Phase.READING, heard=50)) == [], "the store is lost"
    assert late(waiting, peer(1, 7, Phase.READING, heard=60, ended="a reason")) == [(1, "ended")]
    assert late(waiting, peer(1, 7, Phase.READING, ended="")) == [(0, "slow")]


def test_ranks_of_a_lost_machine_are_named_together() -> None:
    peers = [peer(rank, 7, Phase.READING, heard=100 - 50 * (rank > 1)) for rank in range(4)]
    found = find_late(peers, 0, now=100, late_after=30, interval=5)
    assert found is not None
    text = describe(found, 4, 7, lambda rank, step: f"train/shard-{rank:06d}.tar")
    wanted = "nothing heard of ranks 2, 3 (host b) for 40 s, in step 7 rank 2 was to read "
    assert text == f"{wanted}train/shard-000002.tar"


def test_a_value_that_does_not_change_is_not_heard_again() -> None:
    one = Peer(1, "b", heard=0, moved=0)
    one.tell(json.dumps([1, 3, "reading", 0, None]).encode(), now=5)
    assert (one.heard, one.moved, one.step, one.phase) == (5, 5, 3, Phase.READING)
    one.tell(json.dumps([2, 3, "computing", 0, None]).encode(), now=9)
    assert (one.heard, one.moved) == (9, 5)
    one.tell(one.value, now=12)
    assert one.heard == 9


def test_shards_of_all_ranks_and_steps(tmp_path: Path) -> None:
    write_split(tmp_path / "data/train", [sample(n) for n in range(24)], shard_size=2)
    dataset, order = open_data(tmp_path)
    shards = StageShards(dataset, order, GLOBAL_BATCH, 2, steps_before=10, steps=6)
    for rank in range(2):
        for step in range(1, 7):
            assert shards(rank, 10 + step) == ", ".join(f"train/{s}" for s in shards_read(tmp_path, rank, 2, step))
    assert shards(0, 10) == shards(0, 17) == ""
    both = Sources([*dataset.splits, *dataset.splits])
    shards = StageShards(both, Order(both.sizes, 0), GLOBAL_BATCH, 1, 0, 8)
    assert "data/train/shard-" in shards(0, 1)


class _Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


class _SaveAfterTwo(L.Callback):
    def __init__(self, file: Path):
        self.file = file

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(self.file)


class _Beats(Watchdog):
    def __init__(self) -> None:
        super().__init__(Ranks(), LATE, STOP)
        self.beats: list[tuple[int, Phase, bool]] = []

    def beat(self, step: int, phase: Phase, patience: float = 0.0) -> None:
        self.beats.append((step, phase, patience > 0))


def test_what_the_callback_tells_of_a_stage(tmp_path: Path) -> None:
    """The stage begins after 10 steps of others and has 3; only its first one has more time."""
    write_split(tmp_path / "data/train", [sample(n) for n in range(6)], shard_size=2)
    settings, stage = DataConfig(path=str(tmp_path / "data")), StageConfig(steps=3, global_batch=2)
    data = StageData(open_training_data(settings), codec(), Preprocess(64, (0.5,) * 3, (0.5,) * 3), settings, stage, 0)
    watchdog = _Beats()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[_SaveAfterTwo(tmp_path / "checkpoint"), WatchdogCallback(watchdog, data, steps_before=10)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Toy(), torch.utils.data.DataLoader([torch.ones(1)] * 3, batch_size=None))
    assert watchdog.beats == [
        (11, Phase.READING, True),
        (11, Phase.COMPUTING, True),
        (12, Phase.READING, False),
        (12, Phase.COMPUTING, False),
        (12, Phase.SAVING, False),
        (13, Phase.READING, False),
        (13, Phase.COMPUTING, False),
        (13, Phase.PREPARING, False),
    ]
    assert watchdog.shards_of(0, 11).startswith("train/shard-") and not watchdog.shards_of(0, 14)
