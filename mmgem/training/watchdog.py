"""Ranks that watch each other: who is late, with which shard, and an end instead of a wait for ever.

Receives the step and phase of this rank, and through a store of its own connection those of the others. Gives a line
that names a rank which does not come to its next step, and ends the process with exit code 75 when the others have
waited long enough. Refuses nothing; a run of one rank is not watched.

Every rank watches all others from a thread, since a main thread that hangs in a collective can do nothing, and since
with a cut network each side knows of itself only. Three kinds of lateness are told apart:
    silent   its heartbeat no longer changes: the process is dead or stopped, or its machine cannot be reached
    ended    it has left, and said why, while others still wait for it
    slow     it is heard, but does not come to its next step
Clocks of machines differ, so nobody's time is read but one's own: when a value was last seen to change.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal, Self
from uuid import uuid4

import lightning as L
import numpy as np
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mmgem.data.datamodule import StageData
from mmgem.data.order import Order
from mmgem.data.sources import Sources
from mmgem.errors import one_line
from mmgem.ranks import Ranks

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
FIRST_STEP = 1800.0
"""Seconds that the first step of a stage may take beyond `stop_after`: it compiles, connects and starts workers."""
LEAVE_WITHIN = 30.0
"""Seconds after `PeerLost` in which the process must end by itself: closing a broken process group may hang."""

_LONGEST_INTERVAL = 5.0
_UNHEARD = 2.5
"""Heartbeats without which a rank may be silent: at even pace, two may seem to lie between one and the next."""
_REACH = 2.0
"""Seconds to connect to the store, which lies in the same cluster."""
_MOST_SHARDS = 4
_MOST_NAMED = 8

_ADVICE = {
    "silent": "see whether it runs and can be reached",
    "ended": "see why",
    "slow": "see what holds it up, or raise training.stop_after",
}
_GLOO = re.compile(r"\[/\S+\] |\.? This is typically caused.*")
"""What gloo says beside what happened: a line of its source, guesses."""

ShardsOf = Callable[[int, int], str]
"""(rank, step of the run) -> what it was to read."""


class PeerLost(Exception):
    """A collective failed because other ranks are gone. The message names them, in one line."""

    exit_code = EXIT_CODE

    def __init__(self, found: str, advice: str, error: BaseException):
        self.found = found
        super().__init__(f"{found}; the error was: {_GLOO.sub('', one_line(error))[:200]}{advice}")


class Phase(StrEnum):
    PREPARING = "preparing"
    """Before, between and after stages: may take hours, so only silence is late."""
    READING = "reading"
    COMPUTING = "computing"
    """Also waiting for others: in a step no rank can tell the two apart."""
    SAVING = "saving"


_MAY_WAIT = (Phase.PREPARING, Phase.COMPUTING)
_DOING = {
    Phase.PREPARING: "preparing what follows step {}",
    Phase.READING: "reading its data of step {}",
    Phase.COMPUTING: "computing step {}",
    Phase.SAVING: "saving after step {}",
}


# --- what is known of the ranks, and who of them is late ------------------------------------------------------------


@dataclass
class Peer:
    rank: int
    host: str
    heard: float
    """When its value last changed."""
    moved: float
    """When its step last changed."""
    value: bytes = b""
    step: int = 0
    phase: Phase = Phase.PREPARING
    patience: float = 0.0
    """Seconds that its step may take beyond `stop_after`."""
    ended: str | None = None
    """Empty: it has finished; else why it left before."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"

    @property
    def place(self) -> tuple[int, bool]:
        """How far it has come; in a step, whether it may be waiting for others."""
        return self.step, self.phase in _MAY_WAIT

    def tell(self, value: bytes, now: float) -> None:
        """Its latest value, as `Watchdog` writes it."""
        if value == self.value:
            return
        self.value, self.heard = value, now
        _, step, phase, self.patience, self.ended = json.loads(value)
        if step != self.step or (phase == Phase.PREPARING) != (self.phase == Phase.PREPARING):
            self.moved = now
        self.step, self.phase = step, Phase(phase)


@dataclass(frozen=True)
class Late:
    peer: Peer
    kind: Literal["silent", "ended", "slow"]
    seconds: float


def find_late(peers: Sequence[Peer], own: int, now: float, late_after: float, interval: float) -> list[Late] | None:
    """The ranks that others wait for, after more than `late_after` seconds; `interval` is that of the heartbeats.

    Where one is silent or has left, the others wait for it, and are not late themselves. Else those are late that have
    come the least far; of ranks in the same step, those that cannot be waiting for another. None while a rank may be
    about to fall silent: then it cannot be said who is slow.
    """
    running = [p for p in peers if p.ended is None]
    moved = peers[own].moved  # a step of one's own cannot end without the others, whatever is heard of them
    gone = [Late(p, "silent", now - max(p.heard, moved)) for p in running]
    gone += [Late(p, "ended", now - max(p.heard, moved)) for p in peers if p.ended]
    if any(late.seconds > late_after for late in gone):
        return [late for late in gone if late.seconds > late_after]
    if any(late.seconds > _UNHEARD * interval for late in gone):
        return None
    last = min(p.place for p in running)
    behind = [p for p in running if p.place == last and p.phase != Phase.PREPARING]
    slow = [Late(p, "slow", now - max(p.moved, moved)) for p in behind]
    late = [one for one in slow if one.seconds > late_after]
    return late if len(slow) < len(running) or len(late) == len(slow) else []


def describe(late: Sequence[Late], running: int, step: int, shards_of: ShardsOf) -> str:
    """Who is late, how, for how long, and what it was to read.

    running: ranks that have not ended. step: the one in which the others wait; what a silent rank last wrote is older.
    """
    parts = []
    slow = [one for one in late if one.kind == "slow"]
    if len(slow) == running > 1:
        doing, seconds = _doing(slow[0].peer, shards_of), slow[0].seconds
        parts.append(f"all {running} ranks are late: rank {slow[0].peer.rank} is still {doing} after {seconds:.0f} s")
    else:
        parts += [f"{one.peer} is still {_doing(one.peer, shards_of)} after {one.seconds:.0f} s" for one in slow]
    silent = [one for one in late if one.kind == "silent"]
    for host in dict.fromkeys(one.peer.host for one in silent):
        here = [one for one in silent if one.peer.host == host]
        parts.append(f"nothing heard of {_names(here)} for {min(one.seconds for one in here):.0f} s")
        if shards := shards_of(here[0].peer.rank, step):
            who = "it" if len(here) == 1 else f"rank {here[0].peer.rank}"
            parts[-1] += f", in step {step} {who} was to read {shards}"
    for one in late:
        if one.kind == "ended":
            parts.append(f"{one.peer} has ended" + (f" ({one.peer.ended})" if one.peer.ended else ""))
    more = len(parts) - _MOST_NAMED
    return "; ".join(parts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _names(late: Sequence[Late]) -> str:
    """The ranks of one host."""
    if len(late) == 1:
        return str(late[0].peer)
    return f"ranks {', '.join(str(one.peer.rank) for one in late)} (host {late[0].peer.host})"


def _doing(peer: Peer, shards_of: ShardsOf) -> str:
    doing = _DOING[peer.phase].format(peer.step)
    shards = "" if peer.phase == Phase.PREPARING else shards_of(peer.rank, peer.step)
    return f"{doing} ({shards})" if shards else doing


def _advice(late: Sequence[Late]) -> str:
    return f"; {_ADVICE[late[0].kind]}, then start all ranks again with --resume auto"


class StageShards:
    """(rank, step of the run) -> the shards with its samples of that step, as text: arithmetic, nobody is asked."""

    def __init__(self, dataset: Sources, order: Order, global_batch: int, ranks: int, steps_before: int, steps: int):
        """steps_before: of the stages before this one. steps: of this stage."""
        self.dataset, self.order, self.global_batch, self.ranks = dataset, order, global_batch, ranks
        self.steps_before, self.steps = steps_before, steps

    def __call__(self, rank: int, step: int) -> str:
        """Empty for a step of another stage."""
        if not 0 < step - self.steps_before <= self.steps:
            return ""
        positions = self.order.step(step - self.steps_before - 1, self.global_batch, rank, self.ranks)
        samples = self.order.places(positions)[1]
        shards = np.unique(np.searchsorted(np.cumsum(self.dataset.sizes), samples, side="right")).tolist()
        names = ", ".join(self._name(shard) for shard in shards[:_MOST_SHARDS])
        return names + (f" and {len(shards) - _MOST_SHARDS} more" if len(shards) > _MOST_SHARDS else "")

    def _name(self, shard: int) -> str:
        """With its split, and where there are several sources with the folder that tells them apart."""
        for split in self.dataset.splits:
            if shard < len(split.shards):
                parts = split.store.name(split.shards[shard].path).split("/")
                return "/".join(parts[-2 if len(self.dataset.splits) == 1 else -3 :])
            shard -= len(split.shards)
        raise IndexError(shard)


# --- the threads ----------------------------------------------------------------------------------------------------


class Watchdog:
    """Watches the ranks for the block that it is the context of; every rank must enter it.

    In the block, `beat` says where this rank stands; it costs an assignment. Where a collective of the block fails
    because another rank is gone, the block ends with `PeerLost`; where one would never end, the process does, with
    exit code 75 and the same message.
    """

    def __init__(self, ranks: Ranks, late_after: float, stop_after: float, host: str | None = None):
        """late_after, stop_after: seconds, as in `TrainingConfig`. host: this machine's name in messages."""
        self.ranks, self.late_after, self.stop_after = ranks, late_after, stop_after
        self.host = host or socket.gethostname()
        self.interval = min(late_after / 4, _LONGEST_INTERVAL)
        self.shards_of: ShardsOf = lambda rank, step: ""
        """What a rank was to read in a step of the run; `WatchdogCallback` sets it."""
        self._state: tuple[int, Phase, float] = (0, Phase.PREPARING, 0.0)
        self._ended: str | None = None
        self._peers: list[Peer] = []
        self._lock = threading.Lock()
        self._paused = 0.0
        self._closing, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: TCPStore | None = None
        self._exchanges, self._exchanged, self._failed, self._hurry = 0, 0.0, False, False
        self._named: dict[int, tuple[str, int]] = {}

    def beat(self, step: int, phase: Phase, patience: float = 0.0) -> None:
        """Where this rank stands. step: of the run, from 1. patience: seconds it may take beyond `stop_after`."""
        self._state = (step, phase, patience)

    def start(self) -> None:
        """Begins to watch. A collective: all ranks must call it."""
        if self.ranks.count == 1:
            return
        # A launcher's store outlives a failed start, and must not bring its heartbeats into the next.
        everyone = self.ranks.lists([(uuid4().hex, self.host)])
        self._key = f"mmgem/watchdog/{everyone[0][0]}/"
        now = self._exchanged = self._now()
        self._peers = [Peer(rank, host, now, now) for rank, (_, host) in enumerate(everyone)]
        for work in (self._talk, self._watch):
            self._threads.append(threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self, why: str = "") -> None:
        """Ends the threads, and tells the others that this rank has left; why: empty when it has finished."""
        self._ended = why
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self.interval + _REACH)  # a thread that hangs in the store is left behind
        self._threads = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.stop()
            return
        lost = self.explain(error)
        why = lost.found if lost else one_line(error) or type(error).__name__
        self.stop(why[:300] if isinstance(error, Exception) else "stopped")
        if lost is not None:
            timer = threading.Timer(LEAVE_WITHIN, leave, [str(lost)])
            timer.daemon = True
            timer.start()
            raise lost from error

    def explain(self, error: BaseException) -> PeerLost | None:
        """Which ranks are to blame for an error of a collective: waits a few seconds for what is heard of each.

        None for an error of another kind, or where all are heard.
        """
        # gloo raises plain RuntimeErrors; NCCL and the store have classes of their own.
        collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if not self._threads or not collective:
            return None
        with self._lock:
            own = self._peers[self.ranks.rank]
            late = find_late(self._peers, own.rank, self._now(), self.late_after, self.interval) or []
            # Those that gave up waiting for it may end now, and are heard of no more.
            waited_for = [one for one in late if one.kind == "slow" and one.peer.place < own.place]
        time.sleep(0.2)  # until what a process that just died has kept open is closed
        before, begun = self._values(), self._exchanges
        self._hurry = True
        self._wake.set()
        end = time.monotonic() + 1.5 * self.interval + 1
        while time.monotonic() < end:
            time.sleep(0.05)
            # An exchange under way, and the next, may still bring what a rank wrote before it died.
            if self._exchanges < begun + 2:
                before = self._values()
            elif not self._unchanged(before):
                break
        with self._lock:
            now, waited = self._now(), [one.peer for one in waited_for]
            silent = [self._peers[rank] for rank in self._unchanged(before)]
            late = waited_for + [Late(p, "silent", now - p.heard) for p in silent if p not in waited]
            late += [Late(p, "ended", now - p.heard) for p in self._peers if p.ended is not None and p not in waited]
            return PeerLost(self._message(late), _advice(late), error) if late else None

    def _values(self) -> list[bytes]:
        with self._lock:
            return [peer.value for peer in self._peers]

    def _unchanged(self, before: list[bytes]) -> list[int]:
        """Other ranks that have not ended and of which nothing was heard since."""
        silent = [p.rank for p in self._peers if p.value == before[p.rank] and p.ended is None]
        return [rank for rank in silent if rank != self.ranks.rank]

    def _now(self) -> float:
        """Seconds in which this process ran: what it could not hear while it was stopped itself blames nobody."""
        return time.monotonic() - self._paused

    # -- talking: publishes this rank, reads the others

    def _talk(self) -> None:
        beats = 0
        while True:
            closing = self._closing.is_set()
            beats += 1
            self._exchange(json.dumps([beats, *self._state, self._ended]).encode())
            if closing:
                break
            self._wake.wait(0.2 if self._hurry else self.interval)
            self._wake.clear()
        # The first rank may keep the store: the others shall still read why it ends, and be spared a broken connection.
        end = time.monotonic() + self.interval + 1
        while self.ranks.first and self._store and time.monotonic() < end:
            if all(peer.ended is not None for peer in self._peers[1:]):
                break
            time.sleep(0.1)
            self._exchange(None)

    def _exchange(self, value: bytes | None) -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # The store's client may wait for ever on a cut network, and prints a trace where it is refused.
            socket.create_connection(address, _REACH).close()
            if self._store is None:
                self._store = TCPStore(*address, timeout=timedelta(seconds=10), wait_for_workers=False)
            keys = [f"{self._key}{rank}" for rank in range(self.ranks.count)]
            if value is not None:
                self._store.set(keys[self.ranks.rank], value.decode())
            if not all(self._values()):  # to get a key that is not there would wait for it
                keys = [key for key in keys if self._store.check([key])]
            values = self._store.multi_get(keys)
        except (OSError, RuntimeError):
            self._store, self._failed = None, True
            return
        with self._lock:
            for key, found in zip(keys, values, strict=True):
                rank = int(key.removeprefix(self._key))
                if rank != self.ranks.rank:  # of itself it knows more than the store
                    self._peers[rank].tell(found, self._now())
            self._exchanges, self._exchanged, self._failed = self._exchanges + 1, self._now(), False

    # -- watching: who is late

    def _watch(self) -> None:
        tick = min(self.interval / 2, 1.0)
        last = time.monotonic()
        while not self._closing.wait(tick):
            passed, last = time.monotonic() - last, time.monotonic()
            self._paused += max(0.0, passed - tick - 1)
            with self._lock:
                self._judge()

    def _judge(self) -> None:
        now, own = self._now(), self._peers[self.ranks.rank]
        own.tell(json.dumps([0, *self._state, None]).encode(), now)
        own.heard = now
        late = find_late(self._peers, own.rank, now, self.late_after, self.interval)
        if late is None:
            return
        if any(one.seconds > self._limit(one, own) for one in late):
            leave(self._message(late) + _advice(late))
        self._name(late)

    def _limit(self, late: Late, own: Peer) -> float:
        """Seconds to wait for it. For one that has left, no longer than it takes to be sure that one has to wait."""
        if late.kind == "ended" and own.phase in _MAY_WAIT:
            return self.late_after
        return self.stop_after + (late.peer.patience if late.kind == "slow" else 0.0)

    def _name(self, late: list[Late]) -> None:
        """Says once who is late, and when it goes on; on each machine one rank does."""
        names = {one.peer.rank: (one.kind, one.peer.step) for one in late}
        here = [p.rank for p in self._peers if p.host == self.host and p.ended is None]
        speaker = min([rank for rank in here if rank not in names] or here)
        new = [one for one in late if self._named.get(one.peer.rank) != names[one.peer.rank]]
        back = [self._peers[rank] for rank in self._named if rank not in names and self._peers[rank].ended is None]
        self._named = names
        if speaker != self.ranks.rank:
            return
        if new:
            print(f"late: {self._message(new)}", file=sys.stderr, flush=True)
        if back and not late:
            print(f"no longer late: {', '.join(map(str, back[:_MOST_NAMED]))}", file=sys.stderr, flush=True)

    def _message(self, late: Sequence[Late]) -> str:
        running, step = sum(peer.ended is None for peer in self._peers), max(peer.step for peer in self._peers)
        reached = not self._failed and self._now() - self._exchanged < _UNHEARD * self.interval
        if reached or all(one.kind != "silent" for one in late):
            return describe(late, running, step, self.shards_of)
        # Nothing is heard of any rank then, nor of those on this machine, which have the same trouble.
        elsewhere = [one for one in late if one.peer.host != self.host or one.kind != "silent"]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (host {self._peers[0].host})"
        named = describe(elsewhere or late, running, step, self.shards_of)
        return f"host {self.host} cannot reach the ranks' store at {address}: {named}"


def leave(message: str) -> None:
    """Ends the process at once, whatever its main thread hangs in."""
    timer = threading.Timer(5, os._exit, [EXIT_CODE])  # should nobody read what it prints
    timer.daemon = True
    timer.start()
    print(f"mmgem: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


class WatchdogCallback(L.Callback):
    """Tells the watchdog where a stage stands. To be the last callback: what others do after a step belongs to it."""

    def __init__(self, watchdog: Watchdog, data: StageData, steps_before: int):
        """steps_before: of the stages before this one."""
        self.watchdog, self.steps_before, self.steps = watchdog, steps_before, data.steps
        self.shards_of = StageShards(
            data.reader.dataset, data.reader.order, data.stage.global_batch, data.ranks, steps_before, data.steps
        )
        self.patience, self.batch_idx = FIRST_STEP, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watchdog.shards_of = self.shards_of
        self._beat(trainer.global_step, Phase.READING)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._beat(batch_idx, Phase.COMPUTING)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._beat(self.batch_idx, Phase.SAVING)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.patience = 0.0
        if batch_idx + 1 < self.steps and not trainer.should_stop:
            self._beat(batch_idx + 1, Phase.READING)
        else:
            self._beat(batch_idx, Phase.PREPARING)

    def _beat(self, batch_idx: int, phase: Phase) -> None:
        self.batch_idx = batch_idx
        self.watchdog.beat(self.steps_before + batch_idx + 1, phase, self.patience)
