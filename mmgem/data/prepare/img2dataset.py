"""Reader `img2dataset`: webdataset tars as they lie, and pictures in parquet files.

Receives tars with KEY.jpg (png, webp) and KEY.txt or KEY.json, as img2dataset and LAION write them: a folder, one tar,
or a pattern like `s3://bucket/{00000..00099}.tar`. Gives a split whose index points to them; no tar is written, moved
or changed, so they must stay where they are. What cannot be used is left out, counted, and named in `broken.jsonl`.

Or receives a folder of parquet files that hold the pictures (`parquet`), which have no place of their own there: they
are written to shards. Refuses pictures as files, which `folder` reads, and the options of writing for tars.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.parquet import parquet_files, records, with_row
from mmgem.data.prepare.splits import check_split_name
from mmgem.data.prepare.writing import MAX_BROKEN, WriteOptions, account, check_broken, check_share, prepare, row_of
from mmgem.data.samples import Tally
from mmgem.data.store import is_url
from mmgem.data.tars import find_tars, index_tars
from mmgem.errors import UserError

_OF_INDEXING = ("processes", "overwrite", "max_broken")


def prepare_img2dataset(
    source: str | Path, out: Path, *, split: str = "train", decode: bool = False, **options: Unpack[WriteOptions]
) -> dict[str, Any]:
    """Indexes the tars of a folder where they are (writes the index of out/SPLIT and nothing else), or writes what
    parquet files hold to shards.

    source: the folder, one file, or a pattern of tars with braces; a path or, of tars, a URL. out: the dataset to
    write. split: the name of the split. decode: decode every picture of tars, not only its head (slow, finds every
    broken one). options: those of `WriteOptions`; of tars, only processes, overwrite and max_broken.
    """
    source, split = str(source), check_split_name(split)
    if not is_url(source) and (files := parquet_files(Path(source))):
        plan = {"format": "img2dataset", "source": str(Path(source).resolve()), "split": split}
        return prepare(partial(records, files, split), out, plan=plan, load=with_row, **options)
    for name, value in options.items():
        if name not in _OF_INDEXING and value is not None:
            what = f"--{name.replace('_', '-')}"
            raise UserError(f"{source}: its tars stay as they lie, nothing is written for {what}: leave it out")
    indexing: dict[str, Any] = {"decode": decode, **options}
    return index_folder(source, Path(out) / split, **indexing)


def index_folder(
    source: str | Path,
    out: str | Path | None = None,
    *,
    decode: bool = False,
    processes: int | None = None,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
) -> dict[str, Any]:
    """Indexes tars as `prepare_img2dataset` does; the index is written to the folder `out`, by default into that of
    the tars."""
    check_share(max_broken)
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
