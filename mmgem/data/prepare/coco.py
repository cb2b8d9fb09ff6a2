"""Reader `coco`: captions_*.json and, for boxes, instances_*.json, as COCO publishes them.

Receives the annotation files (`{"images": [{"id", "file_name", "width", "height"}], "annotations": [{"image_id",
"caption"}]}`; in instances `{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}` and
"categories") and the folder of the pictures. Gives a dataset: one split a captions file, named after it
(captions_train2017.json -> train). A box gets its category's name as phrase and its annotation's id as entity; crowds
are left out and counted. Refuses a file of another shape, and files that do not belong together.

The keys are those of `karpathy`. Outlines are dropped as they are read; the rest of the files is held in memory (1.5 GB
for train2017 with instances).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.reading import Record, box_of, list_of, need_folder, read_json, safe_key
from mmgem.data.prepare.splits import check_split_name
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

CROWD = "crowd annotation"


def prepare_coco(
    source: Sequence[Path] | Path,
    out: Path,
    *,
    images: Path,
    instances: Sequence[Path] = (),
    split: str | None = None,
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Prepares COCO's annotation files with the folder of their pictures.

    source: the captions_*.json, one or several. out: the dataset to write. images: the folder of the pictures, or the
    one that has train2017/, val2017/ … (what follows captions_ in the file's name). instances: the instances_*.json of
    the same names. split: the split of the pictures where there is one captions file (default: by its name). options:
    those of `WriteOptions`.
    """
    captions = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    parts = _parts(captions, [Path(path) for path in instances], split)
    need_folder(Path(images), "the pictures")
    found = list(records(parts, Path(images)))
    plan = {
        "format": "coco",
        "source": [str(path.resolve()) for path in captions],
        "instances": [str(Path(path).resolve()) for path in instances],
        "images": str(Path(images).resolve()),
        "split": split,
    }
    return prepare(lambda: found, out, plan=plan, **options)


@dataclass(frozen=True)
class Part:
    """A captions file, its instances, its split, and the folder that its pictures may have for themselves."""

    captions: Path
    instances: Path | None
    split: str
    folder: str


def records(parts: Sequence[Part], images: Path) -> Iterator[Record]:
    """The pictures of each part, in the order of its file."""
    found: list[tuple[Part, dict[str, Any], int]] = []
    parts_of: dict[str, set[str]] = {}
    for part in parts:
        for meta, crowds in _pictures_of(part):
            found.append((part, meta, crowds))
            parts_of.setdefault(safe_key(meta["image"]), set()).add(part.folder)
    folders = {part: images / part.folder if (images / part.folder).is_dir() else images for part in parts}
    for part, meta, crowds in found:
        key = safe_key(meta["image"])
        # COCO's names are unique and make its keys; a name that two files have needs the part's.
        key = key if len(parts_of[key]) == 1 else safe_key(f"{part.folder}/{meta['image']}")
        yield Record(key, part.split, folders[part] / meta["image"], meta, dropped={CROWD: crowds} if crowds else {})


def _parts(captions: Sequence[Path], instances: Sequence[Path], split: str | None) -> list[Part]:
    """Captions and instances files paired by what follows the first _ of their names. Raises UserError."""
    if split is not None and len(captions) != 1:
        raise UserError(f"--split {split} names the split of one captions file, not of {len(captions)}")
    boxes = {_folder_of(path): path for path in instances}
    if len(captions) == len(instances) == 1:
        boxes = {_folder_of(captions[0]): instances[0]}
    parts = []
    for path in captions:
        folder = _folder_of(path)
        name = split or re.sub(r"[_-]?\d+$", "", folder)
        if split is None and not path.name.startswith("captions_"):
            raise UserError(f"{path}: the split is named by captions_SPLIT.json; give --split")
        parts.append(Part(path, boxes.pop(folder, None), check_split_name(name), folder))
        if [part.split for part in parts].count(name) > 1:
            raise UserError(f"{path}: another file has made the split {name!r}; prepare them one by one, with --split")
    if boxes:
        raise UserError(f"{next(iter(boxes.values()))}: no captions file with the same ending")
    return parts


def _folder_of(path: Path) -> str:
    """captions_train2017.json -> train2017"""
    return path.stem.partition("_")[2] or path.stem


def _pictures_of(part: Part) -> list[tuple[dict[str, Any], int]]:
    """The fields of each picture, and how many crowds were left out of it. Raises UserError."""
    pictures: dict[Any, dict[str, Any]] = {}
    categories: dict[Any, str] = {}
    crowds: Counter[Any] = Counter()

    def add_picture(item: dict[str, Any]) -> None:
        size = {name: item[name] for name in ("width", "height") if name in item}
        fields = {"captions": [], "image": str(item["file_name"]), "cocoid": item["id"], **size}
        pictures.setdefault(item["id"], fields)

    def add_category(item: dict[str, Any]) -> None:
        categories[item["id"]] = str(item["name"])

    def add_caption(item: dict[str, Any]) -> None:
        pictures[item["image_id"]]["captions"].append(item["caption"])

    def add_region(item: dict[str, Any]) -> None:
        if item.get("iscrowd"):
            crowds[item["image_id"]] += 1
            return
        region = {"box": box_of(*item["bbox"]), "phrase": categories[item["category_id"]]}
        pictures[item["image_id"]].setdefault("regions", []).append({**region, "entity": str(item["id"])})

    content = read_json(part.captions)
    _each(part.captions, content, "images", add_picture)
    _each(part.captions, content, "annotations", add_caption)
    if part.instances is not None:
        content = read_json(part.instances, without=("segmentation",))
        _each(part.instances, content, "images", add_picture)
        _each(part.instances, content, "categories", add_category)
        _each(part.instances, content, "annotations", add_region)
    return [(picture, crowds[name]) for name, picture in pictures.items()]


def _each(path: Path, content: Any, name: str, add: Callable[[dict[str, Any]], None]) -> None:
    """Adds every item of the list `name`. Raises UserError."""
    for number, item in enumerate(list_of(content, name, path, "annotation file of COCO")):
        try:
            add(item)
        except KeyError as error:
            raise UserError(f"{path}, {name}[{number}]: {error} is missing, or no item has this id") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}, {name}[{number}] is not an item of COCO: {error}") from error
