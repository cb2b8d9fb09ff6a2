"""Reader of img2dataset's output format `parquet`: pictures and their texts in the columns of parquet files.

Receives such files: a row a picture, with the column jpg, png or webp of its bytes, and key, caption, status … Gives
the records of those rows that could be downloaded (status: success); the other columns are kept beside the picture.
Refuses, with a UserError that names the file, what is not such a file; and to read without the package pyarrow.

A row's picture is read in the process that writes it, with its row group (of 100 rows): so much is held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmgem.data.index import IMAGE_EXTENSIONS
from mmgem.data.prepare.reading import Record, safe_key
from mmgem.data.samples import BROKEN_META, SampleError
from mmgem.errors import UserError, one_line


def parquet_files(source: Path) -> list[Path]:
    """Those that hold the pictures of a folder, or the one that is named; none where the folder has tars. Raises
    UserError where the pictures are files."""
    if source.suffix == ".parquet" and source.is_file():
        return [source]
    if next(source.glob("*.tar"), None) is not None:
        return []
    files = sorted(source.glob("*.parquet"))
    if any(file.with_suffix("").is_dir() for file in files):
        raise UserError(f"{source} has its pictures as files: give it to `mmgem data prepare folder`")
    return files


def records(files: Sequence[Path], split: str) -> Iterator[Record]:
    """The rows that were downloaded, in order, their pictures still to be read. Raises UserError."""
    for file in files:
        opened = _open(file)
        names = opened.schema_arrow.names
        if not set(names) & set(IMAGE_EXTENSIONS):
            raise UserError(f"{file} has no column of pictures (jpg, png, webp): name what img2dataset wrote")
        for group in range(opened.num_row_groups):
            few = opened.read_row_group(group, columns=[name for name in ("key", "status") if name in names])
            for row, fields in enumerate(few.to_pylist()):
                if fields.get("status", "success") == "success":
                    key = fields.get("key") or f"{file.stem}_{group}_{row}"
                    yield Record(safe_key(str(key)), split, b"", {"group": group, "row": row}, files=(file,))


def with_row(record: Record) -> Record:
    """The record with its picture and fields. Raises SampleError."""
    assert not isinstance(record.meta, str)
    try:
        group = _group(record.files[0], record.meta["group"])
    except (OSError, ValueError) as error:
        raise SampleError(record.key, BROKEN_META, f"{record.files[0]}: {one_line(error)}") from error
    fields = group.slice(record.meta["row"], 1).to_pylist()[0]
    image = next((fields[name] for name in IMAGE_EXTENSIONS if isinstance(fields.get(name), bytes)), b"")
    texts = {name: value for name, value in fields.items() if value is not None and not isinstance(value, bytes)}
    return record._replace(image=image, meta=json.loads(json.dumps(texts, default=str)))  # dates, say, become text


@lru_cache(maxsize=1)
def _group(file: Path, number: int) -> Any:
    return _open(file).read_row_group(number, use_threads=False)


def _open(file: Path) -> Any:
    """Raises UserError."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"to read {file} the package pyarrow is needed: pip install 'mmgem[parquet]'") from error
    try:
        return ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}; fetch it again") from error
