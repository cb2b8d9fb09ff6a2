"""Reader `jsonl`: a folder of pictures with captions, and boxes where there are any, one a line.

Receives a folder with `images/`, `captions.jsonl` (`image`, `split`, `captions`, and `width`,
`height` where known) and, where boxes are known, `regions.jsonl` (`image`, `split`, `box`,
`phrase`, and `entity_id` where known). Gives a dataset; captions stay as they are, `entity_id`
becomes the region's entity, all other fields of a line are kept beside them. A phrase that speaks
of a group (`boxes_of_entity` above 1) gives one region a line. Refuses a folder without these files
and a line that is not a JSON object with its fields; both are named.

captions.jsonl is read line by line; the lines of regions.jsonl are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from mmgem.data.prepare.reading import Record, need_folder, read_jsonl, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.errors import UserError

CAPTIONS = "captions.jsonl"
REGIONS = "regions.jsonl"

Regions = Mapping[str, tuple[str, list[dict[str, Any]]]]
"""Picture -> its split and its regions."""


def prepare_jsonl(source: Path, out: Path, **options: Unpack[WriteOptions]) -> dict[str, Any]:
    """Prepares a folder with images/, captions.jsonl and, where there are boxes, regions.jsonl.

    source: the folder. out: the dataset to write. options: those of `WriteOptions`.
    """
    source = Path(source)
    need_folder(need_folder(source, f"images/ and {CAPTIONS}") / "images", "the pictures")
    plan = {"format": "jsonl", "source": str(source.resolve())}
    return prepare(partial(records, source, regions_of(source / REGIONS)), out, plan=plan, **options)


def records(source: Path, regions: Regions) -> Iterator[Record]:
    """The pictures of captions.jsonl in its order, then those that have boxes only."""
    images, seen = source / "images", set[str]()
    for number, item in read_jsonl(source / CAPTIONS):
        where = f"{source / CAPTIONS}, line {number}"
        name, split = _text(item, "image", where), _text(item, "split", where)
        if not isinstance(item.get("captions"), list):
            raise UserError(f'{where}: no list of captions; give "captions": ["…"]')
        meta = {k: v for k, v in item.items() if k not in ("split", "regions")}
        if name in regions:
            meta["regions"] = regions[name][1]
            seen.add(name)
        yield Record(safe_key(name), split, images / name, meta)
    for name, (split, listed) in regions.items():
        if name not in seen:
            yield Record(safe_key(name), split, images / name, {"image": name, "regions": listed})


def regions_of(path: Path) -> Regions:
    """The content of regions.jsonl; nothing where there is no such file."""
    grouped: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    if not path.exists():
        return grouped
    for number, item in read_jsonl(path):
        where = f"{path}, line {number}"
        name, split = _text(item, "image", where), _text(item, "split", where)
        region = {k: v for k, v in item.items() if k not in ("image", "split", "entity_id")}
        if item.get("entity_id") is not None:
            region["entity"] = str(item["entity_id"])
        grouped.setdefault(name, (split, []))[1].append(region)
    return grouped


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: no {name!r}; every line needs one")
    return value
