"""The folder of a split, from its first shard to its index.

Receives the folder and the plan by which it is filled. Gives it free of what is not of this plan, and at the end an
index. Refuses, with a UserError, a folder that holds something else, or unfinished work of another plan (unless told to
overwrite), and one at which another process is at work.

While a split is unfinished its folder has no index.json, but `unfinished/plan.json` and an account a finished shard
(`unfinished/000003.json`; see `shard`). The same plan goes on from them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgem.data.index import (
    BROKEN_NAME,
    INDEX_NAME,
    MEMBERS_FOLDER,
    Index,
    ShardEntry,
    broken_line,
    write_index,
    write_whole,
)
from mmgem.data.prepare.shard import account_path, read_account
from mmgem.data.samples import Tally
from mmgem.data.writer import UNFINISHED, check_split_dir, remove_split, shard_path
from mmgem.errors import UserError

_PLAN = "plan.json"


class SplitFolder:
    """`check` the folders of all splits, then, with each locked, `begin`, make the shards, `finish`, `clean`."""

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self.path = path
        self._plan = json.loads(json.dumps(plan))
        self._unfinished = path / UNFINISHED

    def check(self, *, overwrite: bool) -> None:
        """Raises UserError, before anything is changed, as the module says."""
        if overwrite or self._is_of_this_plan():
            check_split_dir(self.path, overwrite=True)
        elif self.finished():
            other = self._stored_plan()
            differs = [name for name in self._plan if other.get(name) != self._plan[name]]
            raise UserError(
                f"{self.path} holds unfinished work of another command ({_changes(other, self._plan, differs)}): run "
                "that one again, choose another --out, or give --overwrite"
            )
        elif not self._is_left_over():
            check_split_dir(self.path, overwrite=False)

    def begin(self) -> None:
        """Takes away what is not of this plan."""
        if self._is_of_this_plan():
            for path in (self.path / INDEX_NAME, *self.path.glob(".*.partial")):
                path.unlink(missing_ok=True)
        else:
            remove_split(self.path)
            write_whole(self._unfinished / _PLAN, json.dumps(self._plan, indent=1).encode())
        (self.path / MEMBERS_FOLDER).mkdir(exist_ok=True)

    def finished(self) -> int:
        """How many shards are finished, of whatever plan."""
        return len(list(self._unfinished.glob("[0-9]*.json")))

    def finish(self, count: int, shards: Sequence[ShardEntry], totals: Mapping[str, int], tally: Tally) -> None:
        """Names what was left out of the `count` shards, takes away those of an earlier, longer source, and writes the
        index of `shards`, those with samples."""
        kept = {self.path / name for shard in shards for name in (shard.path, shard.members)}
        for path in (*self.path.glob("shard-*.tar"), *(self.path / MEMBERS_FOLDER).iterdir()):
            if path not in kept:
                path.unlink()
        if tally.skipped:
            write_whole(self.path / BROKEN_NAME, b"".join(self._broken_lines(count)))
        else:
            (self.path / BROKEN_NAME).unlink(missing_ok=True)
        write_index(self.path, Index(list(shards), dict(totals), dict(tally.skipped), dict(tally.dropped)))

    def clean(self) -> None:
        """Takes away what only unfinished work needs."""
        shutil.rmtree(self._unfinished)

    def _broken_lines(self, count: int) -> Iterator[bytes]:
        for number in range(count):
            tar = shard_path(self.path, number).name
            for key, reason, detail in read_account(account_path(self.path, number))[1].left_out:
                yield broken_line(key, tar, reason, detail)

    def _stored_plan(self) -> dict[str, Any]:
        try:
            plan = json.loads((self._unfinished / _PLAN).read_bytes())
        except (OSError, ValueError):
            return {}
        return plan if isinstance(plan, dict) else {}

    def _is_of_this_plan(self) -> bool:
        return self._stored_plan() == self._plan

    def _is_left_over(self) -> bool:
        """Whether there is nothing but the traces of a command that has not finished a shard."""
        if not self._unfinished.is_dir():
            return False
        ours = (UNFINISHED, MEMBERS_FOLDER)
        return all(path.name in ours or path.name.endswith(".partial") for path in self.path.iterdir())


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {old.get(name)}, now {new[name]}" for name in names) or "its plan is lost"
