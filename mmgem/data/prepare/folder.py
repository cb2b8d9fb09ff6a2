"""Reader `folder`: pictures in folders, with texts of the same names or with classes.

Receives a folder, nested as it likes. Where pictures have a text of the same name (a.jpg, a.txt), each line of it is a
caption. Where there is no such text at all, the folder that a picture lies in is its class ("golden_retriever/1.jpg"),
and a template makes the caption; the record keeps the class. Gives a dataset; keys are relative paths. Where all first
folders are named like splits (train, val, test …), they are the splits, else all is train. Refuses a folder without
pictures, one that cannot be read, and a template without {}. A picture without its text, or without a class, is skipped
and named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Unpack

from mmgem.data.prepare.reading import Record, need_folder, read_text, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEMPLATE = "a photo of a {}."
SPLITS = {"train", "val", "valid", "validation", "dev", "test"}


def prepare_folder(
    source: Path, out: Path, *, template: str = TEMPLATE, **options: Unpack[WriteOptions]
) -> dict[str, Any]:
    """Prepares a folder of pictures with texts of the same names, or with one folder a class.

    source: the folder. out: the dataset to write. template: the caption of a class, with {} for its name (_ and - of
    the folder's name become spaces). options: those of `WriteOptions`.
    """
    source = Path(source)
    need_folder(source, "pictures with texts, or one folder a class")
    if template.count("{}") != 1:
        raise UserError(f"template {template!r}: write {{}} once, where the class is to stand")
    places, have_texts = pictures_in(source)
    plan = {"format": "folder", "source": str(source.resolve()), "template": None if have_texts else template}
    if have_texts:
        return prepare(partial(with_texts, source, places), out, plan=plan, load=with_captions, **options)
    if places:
        print(f"{source}: no picture has a .txt of its name: its folder is its class, its caption {template!r}")
    return prepare(partial(with_classes, source, places, template), out, plan=plan, **options)


def with_texts(source: Path, places: list[str]) -> Iterator[Record]:
    """The pictures by path, their texts still to be read."""
    have_splits = _have_splits(places)
    for place in places:
        path, split = source / place, place.partition("/")[0] if have_splits else "train"
        yield Record(safe_key(place), split, path, {"image": place}, files=(path.with_suffix(".txt"),))


def with_captions(record: Record) -> Record:
    """The record with the lines of its text as captions. Raises SampleError."""
    assert not isinstance(record.meta, str)
    lines = read_text(record.key, record.files[0]).splitlines()
    return record._replace(meta={"captions": [line for line in lines if line.strip()], **record.meta})


def with_classes(source: Path, places: list[str], template: str) -> Iterator[Record]:
    """The pictures by path; one that lies in no class has no caption."""
    have_splits = _have_splits(places)
    for place in places:
        *folders, _ = place.split("/")
        split = folders.pop(0) if have_splits else "train"
        meta: dict[str, Any] = {"captions": [], "image": place}
        if folders:
            name = re.sub(r"[_-]+", " ", folders[-1]).strip()
            meta |= {"captions": [template.replace("{}", name)], "class": name}
        yield Record(safe_key(place), split, source / place, meta)


def pictures_in(source: Path) -> tuple[list[str], bool]:
    """The paths of the pictures below the folder, in order, and whether any has a text of its name. Raises OSError."""
    places: list[str] = []
    have_texts, seen = False, set[str]()

    def refuse(error: OSError) -> NoReturn:
        raise error

    for folder, folders, files in os.walk(source, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back, or a second way
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(source)
        texts = {name for name in files if name.endswith(".txt")}
        for name in files:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                places.append(str(below / name))
                have_texts = have_texts or str(Path(name).with_suffix(".txt")) in texts
    return sorted(places), have_texts


def _have_splits(places: list[str]) -> bool:
    """Whether the first folder of each is a split."""
    return all(place.partition("/")[0] in SPLITS for place in places)
