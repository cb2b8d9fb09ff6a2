"""Reader `refcoco`: RefCOCOg, RefCOCO and RefCOCO+, as their API (REFER) keeps them.

Receives a folder with `refs(BY).p` (a pickled list of `{"image_id", "ann_id", "split", "sentences": [{"sent"}]}`; BY is
who made the splits: google, umd, unc) and `instances.json`, COCO's, and the folder of COCO's train2014 pictures. Gives
pictures with boxes and without captions, in the splits of the file (RefCOCO has testA and testB); each expression is a
phrase of its object's box, and the object is the region's entity. Refuses files of another shape, and several refs
files of which none is named. A pickle can run code as it is read: this one may hold lists, dicts, numbers and strings
only, all else is refused unread.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Unpack

from mmgem.data.prepare.reading import Record, box_of, list_of, need_folder, read_json, safe_key
from mmgem.data.prepare.splits import check_split_name
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

INSTANCES = "instances.json"


def prepare_refcoco(
    source: Path, out: Path, *, images: Path, refs: str | None = None, **options: Unpack[WriteOptions]
) -> dict[str, Any]:
    """Prepares the referring expressions of RefCOCOg, RefCOCO or RefCOCO+.

    source: the folder with refs(BY).p and instances.json. out: the dataset to write. images: the folder of COCO's
    train2014 pictures, or the one that has train2014/. refs: BY, where there are several. options: those of
    `WriteOptions`.
    """
    source, images = Path(source), Path(images)
    need_folder(source, f"refs(BY).p and {INSTANCES}")
    need_folder(images, "the pictures")
    file = _refs_file(source, refs)
    plan = {"format": "refcoco", "refs": str(file.resolve()), "images": str(images.resolve())}
    return prepare(partial(records, file, source / INSTANCES, images), out, plan=plan, **options)


def records(refs: Path, instances: Path, images: Path) -> Iterator[Record]:
    """The pictures of each split, in the order in which the refs file names them first."""
    content = read_json(instances, without=("segmentation",))
    pictures = {item["id"]: item for item in _items(content, "images", instances, ("id", "file_name"))}
    objects = {item["id"]: item for item in _items(content, "annotations", instances, ("id", "image_id", "bbox"))}
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for number, ref in enumerate(read_refs(refs)):
        try:
            thing = objects[ref["ann_id"]]
            box = box_of(*thing["bbox"])
            pictures[ref["image_id"]]  # it must be there
            if thing["image_id"] != ref["image_id"]:
                raise ValueError(f"object {ref['ann_id']} is of picture {thing['image_id']}, not of {ref['image_id']}")
            regions = [{"box": box, "phrase": said["sent"], "entity": str(ref["ann_id"])} for said in ref["sentences"]]
            found.setdefault((check_split_name(str(ref["split"])), ref["image_id"]), []).extend(regions)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{refs}, item {number}: {error!r}; it needs an image and a box of {instances.name}, and sentences"
            ) from error
    folder = images / "train2014" if (images / "train2014").is_dir() else images
    for (split, name), regions in found.items():
        picture = pictures[name]
        size = {field: picture[field] for field in ("width", "height") if field in picture}
        file = str(picture["file_name"])
        yield Record(safe_key(file), split, folder / file, {"image": file, "cocoid": name, **size, "regions": regions})


def _items(content: Any, name: str, path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(list_of(content, name, path, "instances file of COCO")):
        if not isinstance(item, dict) or any(field not in item for field in fields):
            raise UserError(f"{path}, {name}[{number}]: {' and '.join(fields)} are expected")
        if not isinstance(item["id"], int | str):
            raise UserError(f"{path}, {name}[{number}]: id {item['id']!r} is neither a number nor a text")
        yield item


def _refs_file(source: Path, by: str | None) -> Path:
    found = sorted(source.glob("refs(*).p"))
    if by is not None:
        found = [path for path in found if path.name == f"refs({by}).p"]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name[5:-3] for path in sorted(source.glob("refs(*).p")))
    raise UserError(f"{source}: name one refs file with --refs: {names}" if names else f"{source}: no refs(BY).p in it")


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code")


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The list in the file. Raises UserError."""
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="utf-8", errors="replace").load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # what a broken pickle raises is not settled
        raise UserError(f"{path} is no refs file of REFER: {error!r:.200}") from error
    if not isinstance(content, list) or not all(isinstance(ref, dict) for ref in content):
        raise UserError(f"{path} is no refs file of REFER: a list of objects is expected")
    return content
