"""Reader `flickr30k-entities`: captions and boxes of Flickr30k Entities as they are published.

Receives a folder with `Sentences/ID.txt` (a caption a line, phrases marked as in `[/EN#283585/people Two young guys]`),
`Annotations/ID.xml` (boxes by entity) and, where they are, `train.txt`, `val.txt`, `test.txt` (an ID a line); and the
folder of the pictures, `ID.jpg` (Plummer et al., 2017). Gives a dataset: captions without the marks; a region for each
box of an entity and each phrase that names it, with the entity's id, the phrase's `types` and, for a group, in
`boxes_of_entity` how many boxes it has. Entities without a box (scenes, what is not to be seen) are counted. Without
lists all pictures go into train; with them, those in none are left out. Refuses a folder without Sentences and
Annotations, and a picture in two lists; a picture with broken files is skipped and named.

The keys are those of `karpathy`; so are the captions, but for their tokens, which stand apart by spaces here. Boxes are
published as pixels counted from 1, xmax and ymax among them: here, x1 = xmin - 1 and x2 = xmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack
from xml.etree import ElementTree

from mmgem.data.prepare.reading import Record, need_folder, read_text, safe_key
from mmgem.data.prepare.writing import WriteOptions, prepare
from mmgem.data.samples import BROKEN_META, SampleError
from mmgem.errors import UserError

WITHOUT_BOX = "entity without box"
NOT_VISUAL = "0"
"""The id of all phrases that name nothing to be seen."""

_LISTS = ("train", "val", "test")
# Possessive, and no "[" in it: a text without "]" is not gone over again and again.
_MARKED = re.compile(r"\[/EN#([^/\s\[\]]++)((?:/[^/\s\[\]]++)*+)\s*+([^\[\]]*+)\]")

Boxes = Mapping[str, list[list[float]]]
"""Entity -> its boxes, xyxy."""


def prepare_flickr30k_entities(
    source: Path, out: Path, *, images: Path, **options: Unpack[WriteOptions]
) -> dict[str, Any]:
    """Prepares Flickr30k Entities.

    source: the folder with Sentences/, Annotations/ and train.txt, val.txt, test.txt. out: the dataset to write.
    images: the folder of the pictures. options: those of `WriteOptions`.
    """
    source, images = Path(source), Path(images)
    for folder in ("Sentences", "Annotations"):
        need_folder(source / folder, "a file a picture")
    need_folder(images, "the pictures")
    split_of = _split_of(source)
    names = sorted({path.stem for path in (source / "Sentences").glob("*.txt")} | split_of.keys())
    plan = {"format": "flickr30k-entities", "source": str(source.resolve()), "images": str(images.resolve())}
    return prepare(partial(records, source, images, names, split_of), out, plan=plan, load=with_texts, **options)


def records(source: Path, images: Path, names: list[str], split_of: Mapping[str, str]) -> Iterator[Record]:
    """The pictures by name, their files still to be read."""
    for name in names:
        files = (source / "Sentences" / f"{name}.txt", source / "Annotations" / f"{name}.xml")
        split = split_of.get(name, "") if split_of else "train"
        yield Record(safe_key(f"{name}.jpg"), split, images / f"{name}.jpg", {"image": f"{name}.jpg"}, files)


def with_texts(record: Record) -> Record:
    """The record with its captions and regions. Raises SampleError."""
    assert not isinstance(record.meta, str)
    sentences, annotation = record.files
    captions, phrases = parse_sentences(record.key, read_text(record.key, sentences))
    size, boxes = _parse_annotation(record.key, annotation)
    regions = []
    for (entity, phrase), types in phrases.items():
        group = {"boxes_of_entity": len(boxes.get(entity, ()))} if len(boxes.get(entity, ())) > 1 else {}
        for box in boxes.get(entity, ()):
            regions.append({"box": box, "phrase": phrase, "entity": entity, "types": types, **group})
    boxless = {entity for entity, _ in phrases if entity != NOT_VISUAL and entity not in boxes}
    dropped = {WITHOUT_BOX: len(boxless)} if boxless else {}
    meta = {"captions": captions, "regions": regions, **size, **record.meta}
    return record._replace(meta=meta, dropped=dropped)


def parse_sentences(key: str, text: str) -> tuple[list[str], dict[tuple[str, str], list[str]]]:
    """The captions without marks, and (entity, phrase) -> types, in the order of their first mention. Raises
    SampleError."""
    captions: list[str] = []
    phrases: dict[tuple[str, str], list[str]] = {}
    for line in filter(None, map(str.strip, text.split("\n"))):
        for entity, types, phrase in _MARKED.findall(line):
            phrases.setdefault((entity, phrase.strip()), types.split("/")[1:])
        caption = _MARKED.sub(lambda match: match[3], line)
        if "[/EN#" in caption:
            raise SampleError(key, BROKEN_META, f"a phrase that does not end: {line}")
        captions.append(caption)
    return captions, phrases


def _parse_annotation(key: str, path: Path) -> tuple[dict[str, int], Boxes]:
    """Width and height, and the boxes. Raises SampleError."""
    boxes: dict[str, list[list[float]]] = {}
    try:
        root = ElementTree.fromstring(read_text(key, path))
        size = {name: int(root.findtext(f"size/{name}", "")) for name in ("width", "height")}
        for item in root.iterfind("object"):
            corners = item.find("bndbox")
            if corners is None:
                continue
            x1, y1, x2, y2 = (float(corners.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in item.iterfind("name"):
                boxes.setdefault(name.text or "", []).append([x1 - 1, y1 - 1, x2, y2])
    except (ElementTree.ParseError, ValueError) as error:
        raise SampleError(key, BROKEN_META, f"{path}: {error}") from error
    return size, boxes


def _split_of(source: Path) -> dict[str, str]:
    """Picture -> split, of the lists that are there. Raises UserError."""
    split_of: dict[str, str] = {}
    for split in _LISTS:
        path = source / f"{split}.txt"
        if not path.exists():
            continue
        try:
            names = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}; it should list pictures, an ID a line") from error
        for name in names:
            if split_of.setdefault(name, split) != split:
                raise UserError(f"{path}: {name} is in {split_of[name]}.txt too; fetch the lists again")
    return split_of
