"""The processes that train or evaluate together, as torchrun, srun or a scheduler started them.

Receives the environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE). Gives this process's place among them, and
what they must do together. Refuses an environment that says only half of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmgem.errors import UserError

T = TypeVar("T")

# The first rank may compute cached features or train a tokenizer while the others wait.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    """Ranks on this machine."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.count // self.local_count

    def by_first(self, function: Callable[[], T]) -> T:
        """Has the first rank do something that must be done once; gives its result, or its UserError, to all."""
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def sums(self, *numbers: float) -> list[float]:
        """Each number's sum over the ranks, exact for integers below 2^53."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.tolist()

    def lists(self, items: list[T]) -> list[T]:
        """The items of all ranks, in their order."""
        if self.count == 1:
            return items
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def own(self, pieces: Iterable[T]) -> Iterator[T]:
        """This rank's pieces of work that all share: every `count`-th.

        The pieces must not depend on how many ranks there are. Then what each gives is what it gives on one rank, to
        the last bit where the machines are the same.
        """
        return islice(pieces, self.rank, None, self.count)

    def joined(self, own: Sequence[T]) -> list[T]:
        """From the results of each rank's `own` pieces those of all, in the order of the pieces. All ranks call it."""
        if self.count == 1:
            return list(own)
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, list(own))
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def equal_buffers(module: torch.nn.Module) -> None:
    """All ranks get the first one's buffers, such as the statistics that batch norms keep of a rank's own pictures:
    what ranks then compute without training is the same. A collective, where there are several ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def process_group(cuda: bool, alone: bool = False) -> Iterator[Ranks]:
    """Joins the other ranks, if there are any, for the block. alone: a rank without others gets a group, too."""
    ranks = ranks_of(os.environ)
    if ranks.count == 1 and not alone:
        yield ranks
        return
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    if ranks.count == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def ranks_of(environment: Any) -> Ranks:
    """The place that the environment gives this process. Raises UserError."""
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but {', '.join(missing)} not set: start the ranks with torchrun"
        )
    rank, count, local_rank, local_count = (int(environment[name]) for name in names)
    return Ranks(rank, count, local_rank, local_count)
