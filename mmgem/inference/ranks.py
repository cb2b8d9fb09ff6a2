"""Work of evaluation shared by ranks, with the result of one.

Receives pieces of work in an order that does not depend on how many ranks there are; each does every world-size-th.
Gives all ranks the results of all pieces in that order. A piece is computed in the same way wherever it is computed, so
what N ranks give together is what one gives, to the last bit where the machines are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from mmgem.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)  # a rank may write captions while the others wait


class Ranks:
    """The ranks that a launcher (torchrun, srun with its variables) has started; one where there is none."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if not 0 <= self.rank < self.count:
            raise UserError(f"RANK={self.rank} with WORLD_SIZE={self.count}: a rank lies between 0 and WORLD_SIZE - 1")
        self._made = self.count > 1 and not dist.is_initialized()
        if self._made:
            dist.init_process_group("gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes files."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """`auto` and `cuda` are this rank's own GPU where there are several ranks."""
        if self.count > 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
            return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
        return device

    def own(self, pieces: Iterable[T]) -> Iterator[T]:
        """This rank's pieces of all."""
        return islice(pieces, self.rank, None, self.count)

    def joined(self, own: Sequence[T]) -> list[T]:
        """From the results of `own` pieces those of all ranks, in the order of the pieces. All ranks call it."""
        if self.count == 1:
            return list(own)
        parts: list[list[T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(own))
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def close(self) -> None:
        """After the last call."""
        if self._made:
            dist.barrier()
            dist.destroy_process_group()
            self._made = False


def alone() -> Ranks:
    """One rank, whatever the environment says."""
    ranks = Ranks.__new__(Ranks)
    ranks.count, ranks.rank, ranks._made = 1, 0, False
    return ranks
