"""Reader `img2dataset`: webdataset tars as they lie.

Receives tars with KEY.jpg (png, webp) and KEY.txt or KEY.json, as img2dataset and LAION write them.
Gives a split whose index points to them; no tar is written, moved or changed, so they must stay
where they are. Samples without picture or text are left out of the index and counted. Refuses a
folder without tars, and a tar that is compressed or cut short.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmgem.data.prepare.writing import MAX_BROKEN, account, check_broken, row_of
from mmgem.data.samples import Tally
from mmgem.data.tars import index_tars
from mmgem.errors import UserError
from mmgem.progress import Progress


def prepare_img2dataset(
    source: Path,
    out: Path,
    *,
    split: str = "train",
    decode: bool = False,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
) -> dict[str, Any]:
    """Indexes the tars of a folder where they are; writes out/SPLIT/index.json and nothing else.

    source: the folder (or one tar). out: the dataset to write. split: the name of the split.
    decode: decode every picture, not only its head (slow, finds every broken one). overwrite:
    replace an index that is there. max_broken: stop when more than this share of samples is broken.
    """
    started, source, out = time.monotonic(), Path(source), Path(out)
    tars = tars_of(source)
    tally, done = Tally(), {"tars": 0, "read": 0}
    with Progress("index", None) as progress:

        def on_shard(read: int, _kept: int) -> None:
            done["tars"] += 1
            done["read"] += read
            progress.advance(read)
            if done["tars"] == len(tars):  # the last one, before the index is written
                check_broken(tally, done["read"], max_broken)

        index = index_tars(out / split, tars, decode=decode, overwrite=overwrite, tally=tally, on_shard=on_shard)
    row = {"read": done["read"], **row_of(index.totals)}
    return account(out, {split: row}, tally, time.monotonic() - started)


def tars_of(source: Path) -> list[Path]:
    """The tars of a folder by name, or the one that is named. Raises UserError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"no such folder: {source}; it should have the tars of img2dataset")
    tars = sorted(source.glob("*.tar"))
    if not tars:
        raise UserError(f"no .tar in {source}: name the folder that img2dataset wrote its tars to")
    return tars
