"""Reader `karpathy`: dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json.

Receives such a file (`{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}`;
Karpathy and Fei-Fei, 2015) and the folder of its pictures. Gives a dataset; the extra training
pictures of COCO (split `restval`) go into `train`, as the field does, unless told otherwise.
Refuses a file of another shape and a missing folder. Widths and heights are read from the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.reading import Record, list_of, need_folder, read_json, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

_IDS = ("cocoid", "imgid")


def prepare_karpathy(
    source: Path, out: Path, *, images: Path, restval: str = "train", **options: Unpack[WriteOptions]
) -> dict[str, Any]:
    """Prepares a dataset_*.json of Karpathy's splits with the folder of its pictures.

    source: the JSON file. out: the dataset to write. images: the folder of the pictures (for COCO
    the one that has train2014/ and val2014/). restval: the split that the pictures of "restval" go
    to. options: those of `WriteOptions`.
    """
    source, images = Path(source), Path(images)
    found = list(records(source, images, restval))
    plan = {"format": "karpathy", "source": str(source.resolve()), "images": str(images.resolve()), "restval": restval}
    return prepare(lambda: found, out, plan=plan, **options)


def records(source: Path, images: Path, restval: str = "train") -> Iterator[Record]:
    """The pictures in the order of the file."""
    need_folder(images, "the pictures")
    found: list[tuple[Path, str, dict[str, Any]]] = []
    for number, item in enumerate(list_of(read_json(source), "images", source, "dataset_*.json of Karpathy")):
        try:
            name, split = str(item["filename"]), str(item["split"])
            captions = [_caption(sentence) for sentence in item["sentences"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{source}, images[{number}]: filename, split and sentences are needed ({error})"
            ) from error
        folder = Path(str(item.get("filepath") or ""))
        meta = {"captions": captions, "image": name}
        meta |= {field: item[field] for field in _IDS if field in item}
        # Not everyone keeps COCO's train2014/ and val2014/: one flat folder is fine too.
        place = folder / name if os.path.isdir(images / folder) else Path(name)
        found.append((place, restval if split == "restval" else split, meta))
    folders: dict[str, set[Path]] = {}
    for place, _, meta in found:
        folders.setdefault(safe_key(meta["image"]), set()).add(place.parent)
    for place, split, meta in found:
        key = safe_key(meta["image"])
        # COCO's names are unique and make its keys; a name that two folders have needs the folder.
        yield Record(key if len(folders[key]) == 1 else safe_key(str(place)), split, images / place, meta)


def _caption(sentence: dict[str, Any]) -> str:
    """The raw sentence; its tokens where a file has no raw ones."""
    return sentence["raw"] if "raw" in sentence else " ".join(sentence["tokens"])
