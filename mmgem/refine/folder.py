"""The folder that keeps work on which a stopped command goes on: whose it is.

Receives the folder, the settings that its work depends on, and where its result will lie. Gives the result where it is
there. Refuses, with a UserError, what is of other settings or not ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmgem.errors import UserError
from mmgem.evaluation.result import write_json


def claim(work: Path, stated: dict[str, Any], overwrite: bool, index: Path, result: Path) -> dict[str, Any] | None:
    """Begins the work of these settings, or finds it begun. Gives its result where it is finished: its split has an
    index. Raises UserError for work of other settings, and for a split that is not this work's."""
    file = work / "settings.json"
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in stated if stated[name] != before.get(name)]
        if different:
            raise UserError(
                f"{work} holds work of other settings ({', '.join(different)}); name another --out, or give --overwrite"
            )
        if index.is_file() and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    elif index.is_file() and not overwrite:
        raise UserError(f"{index.parent} holds another split: choose another --out, or give --overwrite")
    else:
        write_json(file, stated)
    return None
