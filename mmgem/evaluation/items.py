"""What each figure was made of, in a file beside metrics.json, so that two evaluations can be compared item by item.

Receives a `TaskResult`. Gives a .npz without pickles, and reads it again. Refuses a file that is no such file, with a
UserError.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from mmgem.errors import UserError
from mmgem.evaluation.metrics.scores import Items
from mmgem.evaluation.result import TaskResult

FOLDER = "items"


def items_file(out: Path, model: str, task: str) -> Path:
    """`out/items/[MODEL.]TASK.npz`; a slash in a model's name becomes a dash."""
    model = model.replace("/", "-").replace(os.sep, "-")
    return out / FOLDER / f"{model + '.' if model else ''}{task}.npz"


def save_items(out: Path, result: TaskResult) -> None:
    """Writes the file whole or not at all; nothing for a result without items."""
    if not result.items:
        return
    arrays: dict[str, np.ndarray] = {"keys": np.array(result.keys, dtype=np.str_)}
    named: dict[int, str] = {}

    def name_of(array: np.ndarray, letter: str) -> str:
        if id(array) not in named:
            named[id(array)] = f"{letter}{len(named)}"
            arrays[named[id(array)]] = array
        return named[id(array)]

    about = {
        metric: {
            "combine": items.combine,
            "values": name_of(items.values_NS, "values"),
            "unit": None if items.unit_N is None else name_of(items.unit_N, "unit"),
        }
        for metric, items in result.items.items()
    }
    arrays["about"] = np.array(json.dumps(about))
    path = items_file(out, result.model, result.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished.npz")
    np.savez_compressed(unfinished, allow_pickle=False, **arrays)
    os.replace(unfinished, path)


def load_items(path: Path) -> tuple[dict[str, Items], list[str]]:
    """By metric its items; and the keys of the units. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            found = {
                metric: Items(file[one["values"]], one["combine"], None if one["unit"] is None else file[one["unit"]])
                for metric, one in about.items()
            }
            return found, file["keys"].tolist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `mmgem eval` again, which writes it beside metrics.json") from None
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not what `mmgem eval` writes ({e!r:.100}); evaluate again") from e
