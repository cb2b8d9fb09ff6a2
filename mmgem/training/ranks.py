"""The ranks as Lightning asks for them."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from mmgem.ranks import Ranks


class StartedRanks(ClusterEnvironment):
    """What Lightning asks of a launcher. Its own guesses want more variables, and a scheduler's to agree with them."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "29500"))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.ranks.count

    def global_rank(self) -> int:
        return self.ranks.rank

    def local_rank(self) -> int:
        return self.ranks.local_rank

    def node_rank(self) -> int:
        return self.ranks.rank // self.ranks.local_count

    def set_world_size(self, size: int) -> None:
        assert size == self.ranks.count

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.ranks.rank
