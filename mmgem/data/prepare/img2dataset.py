"""Reader `img2dataset`: webdataset tars as they lie.

Receives tars with KEY.jpg (png, webp) and KEY.txt or KEY.json, as img2dataset and LAION write them: a folder, one tar,
or a pattern like `s3://bucket/{00000..00099}.tar`. Gives a split whose index points to them; no tar is written, moved
or changed, so they must stay where they are. What cannot be used is left out, counted, and named in `broken.jsonl`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmgem.data.prepare.writing import MAX_BROKEN, account, check_broken, row_of
from mmgem.data.samples import Tally
from mmgem.data.store import is_url
from mmgem.data.tars import find_tars, index_tars
from mmgem.errors import UserError


def prepare_img2dataset(
    source: str | Path,
    out: Path,
    *,
    split: str = "train",
    decode: bool = False,
    processes: int | None = None,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
) -> dict[str, Any]:
    """Indexes the tars of a folder where they are; writes the index of out/SPLIT and nothing else.

    source: the folder, one tar, or a pattern with braces; a path or a URL. out: the dataset to write. split: the name
    of the split. decode: decode every picture, not only its head (slow, finds every broken one). processes: how many
    read tars (default: one a CPU). overwrite: replace an index that is there. max_broken: stop when more than this
    share of samples is broken.
    """
    options: dict[str, Any] = {"decode": decode, "processes": processes, "overwrite": overwrite}
    return index_folder(source, Path(out) / split, max_broken=max_broken, **options)


def index_folder(
    source: str | Path,
    out: str | Path | None = None,
    *,
    decode: bool = False,
    processes: int | None = None,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
) -> dict[str, Any]:
    """As `prepare_img2dataset`; the index is written to the folder `out`, without it into the source's own folder."""
    started, source = time.monotonic(), str(source)
    tars = find_tars(source)
    if out is None:
        if is_url(source):
            raise UserError(f"the index of {source} is written to a folder of this machine: name it with --out")
        out = source if Path(source).is_dir() else Path(tars[0]).parent
    tally, found = Tally(), 0

    def check(tally: Tally, read: int) -> None:
        nonlocal found
        found = read
        check_broken(tally, read, max_broken)

    index = index_tars(out, tars, decode=decode, overwrite=overwrite, processes=processes, tally=tally, check=check)
    row = {"read": found, **row_of(index.totals)}
    return account(Path(out), {Path(out).name: row}, tally, time.monotonic() - started)
