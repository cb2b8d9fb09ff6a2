"""Reader `jsonl`: a folder of pictures with captions, and boxes where there are any, one a line.

Receives a folder with `images/`, `captions.jsonl` (`image`, `split`, `captions`, and `width`, `height`, `regions` where
known) and, where boxes have a file of their own, `regions.jsonl` (`image`, `split`, `box`, `phrase`, and `entity_id`
where known). Gives a dataset; captions stay as they are, `entity_id` becomes the region's entity, all other fields of a
line are kept beside them. A phrase that speaks of a group (`boxes_of_entity` above 1) gives one region a line. Refuses
a folder without these files and a line that is not a JSON object with its fields; both are named.

Both files are read line by line. Of regions.jsonl it is held in memory where the lines of each picture begin.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Unpack

from mmgem.data.prepare.reading import Record, need_folder, read_jsonl, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

CAPTIONS = "captions.jsonl"
REGIONS = "regions.jsonl"

Places = Mapping[str, tuple[str, "array[int]"]]
"""Picture -> its split, and the byte at which each of its lines begins."""


def prepare_jsonl(source: Path, out: Path, **options: Unpack[WriteOptions]) -> dict[str, Any]:
    """Prepares a folder with images/, captions.jsonl and, where there are boxes, regions.jsonl.

    source: the folder. out: the dataset to write. options: those of `WriteOptions`.
    """
    source = Path(source)
    need_folder(need_folder(source, f"images/ and {CAPTIONS}") / "images", "the pictures")
    plan = {"format": "jsonl", "source": str(source.resolve())}
    return prepare(partial(records, source, places_of(source / REGIONS)), out, plan=plan, **options)


def records(source: Path, places: Places) -> Iterator[Record]:
    """The pictures of captions.jsonl in its order, then those that have boxes only."""
    images, seen = source / "images", set[str]()
    with (source / REGIONS).open("rb") if places else BytesIO() as lines:
        for number, _, item in read_jsonl(source / CAPTIONS):
            where = f"{source / CAPTIONS}, line {number}"
            name, split = _text(item, "image", where), _text(item, "split", where)
            if not isinstance(item.get("captions"), list):
                raise UserError(f'{where}: no list of captions; give "captions": ["…"]')
            meta = {k: v for k, v in item.items() if k != "split"}
            if isinstance(item.get("regions"), list):
                meta["regions"] = list(map(_region, item["regions"]))
            if name in places:
                if item.get("regions"):
                    raise UserError(f"{where}: {name} has regions here and in {REGIONS}; keep them in one place")
                meta["regions"] = _regions(lines, places[name][1])
                seen.add(name)
            yield Record(safe_key(name), split, images / name, meta)
        for name, (split, begins) in places.items():
            if name not in seen:
                meta = {"image": name, "regions": _regions(lines, begins)}
                yield Record(safe_key(name), split, images / name, meta)


def places_of(path: Path) -> Places:
    """Of regions.jsonl; nothing where there is no such file."""
    places: dict[str, tuple[str, array[int]]] = {}
    if not path.exists():
        return places
    for number, begin, item in read_jsonl(path):
        where = f"{path}, line {number}"
        name, split = _text(item, "image", where), _text(item, "split", where)
        places.setdefault(name, (split, array("q")))[1].append(begin)
    return places


def _regions(lines: BinaryIO, begins: Iterable[int]) -> list[Any]:
    regions = []
    for begin in begins:
        lines.seek(begin)
        regions.append(_region(json.loads(lines.readline())))
    return regions


def _region(item: Any) -> Any:
    """A region as a shard's record has it. What is no object stays as it is, and is refused with its sample."""
    if not isinstance(item, dict):
        return item
    region = {k: v for k, v in item.items() if k not in ("image", "split", "entity_id")}
    return region if item.get("entity_id") is None else {**region, "entity": str(item["entity_id"])}


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: no {name!r}; every line needs one")
    return value
