"""Reader `visual-genome`: region descriptions of Visual Genome.

Receives a folder with `region_descriptions.json` (`[{"id" or "image_id", "regions": [{"x", "y", "width", "height",
"phrase"}]}]`) and `image_data.json` (`[{"image_id", "url", "width", "height", "coco_id"}]`), and the folder of the
pictures: with VG_100K/ and VG_100K_2/, or flat (Krishna et al., 2017). Gives a dataset of pictures with boxes and
without captions, all in train unless `split_by` says otherwise. Refuses files of another shape, and a picture that
image_data.json does not know; both are named.

The text of region_descriptions.json is held in memory (0.7 GB), not what it says: pictures are parsed one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.reading import Record, need_folder, read_json, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

REGIONS = "region_descriptions.json"
PICTURES = "image_data.json"
FOLDERS = ("VG_100K", "VG_100K_2")

_SPACE = re.compile(r"[ \t\r\n]*")


def prepare_visual_genome(source: Path, out: Path, *, images: Path, **options: Unpack[WriteOptions]) -> dict[str, Any]:
    """Prepares Visual Genome's region descriptions.

    source: the folder with region_descriptions.json and image_data.json. out: the dataset to write. images: the
    folder that has VG_100K/ and VG_100K_2/, or the pictures themselves. options: those of `WriteOptions`.
    """
    source, images = Path(source), Path(images)
    need_folder(source, f"{REGIONS} and {PICTURES}")
    need_folder(images, "the pictures")
    path = source / REGIONS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    plan = {"format": "visual-genome", "source": str(source.resolve()), "images": str(images.resolve())}
    pictures = _pictures_of(source / PICTURES)
    return prepare(partial(records, path, text, pictures, images), out, plan=plan, **options)


def records(path: Path, text: str, pictures: Mapping[Any, dict[str, Any]], images: Path) -> Iterator[Record]:
    """The pictures in the order of region_descriptions.json, whose content is `text`."""
    nested = [folder for folder in FOLDERS if (images / folder).is_dir()]
    for number, item in enumerate(items_of(path, text)):
        try:
            name = item["id"] if "id" in item else item["image_id"]
            regions = [_region(region) for region in item["regions"]]
            picture = pictures[name]
            *_, folder, file = ("", *str(picture["url"]).split("/"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, item {number}: {error!r}; it needs regions, and an image of {PICTURES}"
            ) from error
        place = f"{folder}/{file}"
        meta = {field: value for field, value in picture.items() if field != "url" and value is not None}
        meta |= {"image": place, "regions": regions}
        # In the oldest release the file of a flat folder is named by the id, not by the URL.
        flat = file if file == f"{name}.jpg" or (images / file).exists() else f"{name}.jpg"
        yield Record(safe_key(place), "train", images / (place if folder in nested else flat), meta)


def items_of(path: Path, text: str) -> Iterator[Any]:
    """The items of a JSON list, parsed one by one. Raises UserError."""
    decoder, after, mark = json.JSONDecoder(), 0, "["
    while True:
        at = _SPACE.match(text, after).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[at : at + 1] != mark:
            break
        at = _SPACE.match(text, at + 1).end()  # pyright: ignore[reportOptionalMemberAccess]
        if mark == "[" and text[at : at + 1] == "]":
            return
        try:
            item, after = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
        yield item
        mark = ","
    if text[at : at + 1] != "]":
        raise UserError(f"{path} is no whole list, it ends or breaks at character {at}; fetch it again")


def _region(item: dict[str, Any]) -> dict[str, Any]:
    x, y = item["x"], item["y"]
    return {"box": [x, y, x + item["width"], y + item["height"]], "phrase": item["phrase"]}


def _pictures_of(path: Path) -> dict[Any, dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) and "image_id" in item for item in content):
        raise UserError(f"{path} is no image_data.json: a list of images with image_id is expected")
    return {item["image_id"]: item for item in content}
