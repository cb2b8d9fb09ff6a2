"""What a reader of a public format gives: records; and what readers share.

Receives files of a source. Gives `Record`s, keys, and the content of JSON files. Refuses, with a UserError that names
the file and line, what is missing or not of its form.
"""

from __future__ import annotations

import errno
import json
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmgem.data.samples import BROKEN_META, MOST_TEXT, SampleError, shallow
from mmgem.errors import UserError

NO_TEXT_FILE = "text file missing"


class Record(NamedTuple):
    """One raw sample: `image` is the encoded picture or the file that has it, `meta` the fields that lie beside it.

    `split` is "" for a picture that its source puts into none. `files` are those that `Load` reads beside the picture.
    `dropped` counts, by reason, what the reader has left out of it.
    """

    key: str
    split: str
    image: Path | bytes
    meta: Mapping[str, Any] | str
    files: tuple[Path, ...] = ()
    dropped: Mapping[str, int] = {}


Load = Callable[[Record], Record]
"""What is still to be done to a record, in the process that writes it. Pickles; may raise SampleError."""


def safe_key(name: str) -> str:
    """A key from a file's path as it is given: with its folders, which keep a/1.jpg and b/1.jpg
    apart, without its extension, and without what a tar member's key cannot have (webdataset ends
    the key at the first dot)."""
    path = Path(name)
    return re.sub(r"[^\w-]", "_", str(path.parent / path.stem))


def need_folder(path: Path, what: str) -> Path:
    """The path, if it is a folder. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; it should have {what}")
    return path


def read_jsonl(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, first byte, object) of each line that is not blank. Raises UserError naming the line."""
    end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                begin, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    item = shallow(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
                if not isinstance(item, dict):
                    raise UserError(f"{path}, line {number}: an object is expected")
                yield number, begin, item
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path, without: Collection[str] = ()) -> Any:
    """The content of a JSON file; the fields `without` are dropped as it is read, they are never held together."""

    def kept(item: dict[str, Any]) -> dict[str, Any]:
        for name in without:
            item.pop(name, None)
        return item

    try:
        return shallow(json.loads(path.read_text(encoding="utf-8-sig"), object_hook=kept if without else None))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error


def list_of(content: Any, name: str, path: Path, what: str) -> list[Any]:
    """The list `name` of the object in a JSON file. Raises UserError."""
    listed = content.get(name) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f'{path} has no list "{name}": it is no {what}')
    return listed


def read_file(path: Path, most: int) -> bytes:
    """The content of a file of `most` bytes. Raises OSError, also for what is no file: a device may not end."""
    try:
        found = path.stat()
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    if found.st_size > most:
        raise OSError(errno.EINVAL, f"{found.st_size} bytes, {most} at most", str(path))
    return path.read_bytes()


def box_of(x: Any, y: Any, width: Any, height: Any) -> list[float]:
    """Corner and size -> xyxy. Raises TypeError, OverflowError."""
    for value in (x, y, width, height):
        if not isinstance(value, int | float):
            raise TypeError(f"a {type(value).__name__} in a box")
    return [float(x), float(y), float(x) + width, float(y) + height]


def read_text(key: str, path: Path) -> str:
    """The content of a text file that belongs to one sample. Raises SampleError."""
    try:
        return read_file(path, MOST_TEXT).decode("utf-8-sig")
    except OSError as error:
        raise SampleError(key, NO_TEXT_FILE, f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SampleError(key, BROKEN_META, f"{path}: {error}") from error
