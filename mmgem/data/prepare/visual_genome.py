"""Reader `visual-genome`: region descriptions of Visual Genome.

Receives a folder with `region_descriptions.json` (`[{"id" or "image_id", "regions": [{"x", "y", "width", "height",
"phrase"}]}]`) and `image_data.json` (`[{"image_id" or "id", "url", "width", "height", "coco_id"}]`), of any release,
and the folder of the pictures: with VG_100K/ and VG_100K_2/, or flat (Krishna et al., 2017). Gives a dataset of
pictures with boxes and without captions, all in train unless `split_by` says otherwise. Refuses files of another shape,
and a picture that image_data.json does not know; both are named.

region_descriptions.json (0.7 GB) is read and parsed picture by picture; of image_data.json all is held in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.reading import Record, box_of, need_folder, read_json, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.data.samples import shallow
from mmgem.errors import UserError

REGIONS = "region_descriptions.json"
PICTURES = "image_data.json"
FOLDERS = ("VG_100K", "VG_100K_2")

_DECODER = json.JSONDecoder()
_FIRST = re.compile(r"\s*\[\s*(?:(?P<end>\])|(?=\S))")
_NEXT = re.compile(r"\s*(?:(?P<end>\])|,\s*(?=\S))")
_END = object()


def prepare_visual_genome(source: Path, out: Path, *, images: Path, **options: Unpack[WriteOptions]) -> dict[str, Any]:
    """Prepares Visual Genome's region descriptions.

    source: the folder with region_descriptions.json and image_data.json. out: the dataset to write. images: the
    folder that has VG_100K/ and VG_100K_2/, or the pictures themselves. options: those of `WriteOptions`.
    """
    source, images = Path(source), Path(images)
    need_folder(source, f"{REGIONS} and {PICTURES}")
    need_folder(images, "the pictures")
    plan = {"format": "visual-genome", "source": str(source.resolve()), "images": str(images.resolve())}
    pictures = _pictures_of(source / PICTURES)
    return prepare(partial(records, source / REGIONS, pictures, images), out, plan=plan, **options)


def records(path: Path, pictures: Mapping[Any, dict[str, Any]], images: Path) -> Iterator[Record]:
    """The pictures in the order of region_descriptions.json, which is `path`."""
    nested = [folder for folder in FOLDERS if (images / folder).is_dir()]
    for number, item in enumerate(items_of(path)):
        try:
            name = item["id"] if "id" in item else item["image_id"]
            regions = [_region(region) for region in item["regions"]]
            picture = pictures[name]
            *_, folder, file = ("", *str(picture["url"]).split("/"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}, item {number}: {error!r}; it needs regions, and an image of {PICTURES}"
            ) from error
        place = f"{folder}/{file}"
        meta = {field: value for field, value in picture.items() if field != "url" and value is not None}
        meta |= {"image": place, "regions": regions}
        # In the oldest release the file of a flat folder is named by the id, not by the URL.
        flat = file if file == f"{name}.jpg" or os.path.exists(images / file) else f"{name}.jpg"
        yield Record(safe_key(place), "train", images / (place if folder in nested else flat), meta)


def items_of(path: Path, at_once: int = 1 << 24) -> Iterator[Any]:
    """The items of a list of objects in a JSON file, parsed one by one. Holds at most twice `at_once` characters, which
    an item must not exceed. Raises UserError."""
    text, at, number = "", 0, 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while True:
                try:
                    item, at = _next_item(text, at, _NEXT if number else _FIRST)
                except ValueError:  # perhaps cut where the text ends
                    if len(text) - at > at_once or not (more := file.read(at_once)):
                        raise
                    text, at = text[at:] + more, 0
                    continue
                if item is _END:
                    return
                yield shallow(item)
                number += 1
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no whole JSON list, it ends or breaks after {number} items; fetch it again"
        ) from error


def _next_item(text: str, at: int, before: re.Pattern[str]) -> tuple[Any, int]:
    """The item that follows, or _END, and where it ends. Raises ValueError."""
    found = before.match(text, at)
    if found is None:
        raise ValueError("neither an item nor the end of the list")
    return (_END, found.end()) if found["end"] else _DECODER.raw_decode(text, found.end())


def _region(item: dict[str, Any]) -> dict[str, Any]:
    return {"box": box_of(item["x"], item["y"], item["width"], item["height"]), "phrase": item["phrase"]}


def _pictures_of(path: Path) -> dict[Any, dict[str, Any]]:
    """The items of image_data.json by id. Raises UserError."""
    content, pictures = read_json(path), {}
    if not isinstance(content, list):
        raise UserError(f"{path} is no {PICTURES}: a list of images is expected")
    for number, item in enumerate(content):
        try:
            name = item.pop("id") if "id" in item else item["image_id"]  # the former in release 1.0
            pictures[name] = {**item, "image_id": name}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, item {number}: an image with image_id is expected ({error!r})") from error
    return pictures
