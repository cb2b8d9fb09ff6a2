"""Texts that differ in a word or in word order, and the pictures that tell which is true: six benchmarks' own files.

    winoground   examples.jsonl                two captions, two images (names without ending), `collapsed_tag`
    sugarcrepe   swap_att.json …               {id: filename, caption, negative_caption}
    aro          visual_genome_relation.json, visual_genome_attribution.json   true_caption, false_caption, bbox_…
                 *.json                        [{image, caption_options}], the first one true: the orders, as ARO's code
                                               makes them (`test_cases` of its data sets) and does not store
    crepe        *.csv                         image_id, x, y, width, height, caption, hard_negs or valid_hard_negs_…
    spec         SUBSET/image2text.json, SUBSET/text2image.json                query, keys, label
    valse        existence.json …              {id: image_file, caption, foil, mturk}; valid: 2 of 3 took the caption

A file is known by the fields of its first records, not by its name, which names the subset. Pictures lie beside the
file, in one of `_PICTURE_FOLDERS` there or one folder higher, or in the folders that the user names. Receives a folder,
which has such files, or folders with them. Gives `ChoiceItem`s by benchmark. A wrong text that is the right one word
for word, as ARO's shuffles make some, is no choice: it is left out, and an item with nothing else to choose from, too.
Refuses, with a UserError, a folder without such files, a record that is not as its layout says, two files of one
subset, and a picture that is not there.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmgem.errors import UserError
from mmgem.evaluation.layouts.pictures import ENDINGS, PictureFile

FOLDER = "composition"
"""Where a dataset of ours has such data."""

_PICTURE_FOLDERS = ("images", "val2017", "val2014", "train2014", "VG_100K", "VG_100K_2", "data/images", "img")
_HEAD = 65_536
_SMALLEST_GROUP = 25
"""Items of one attribute pair that ARO asks for, where it gives their accuracy."""


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """I pictures and T texts, of which some belong together.

    pairs: (picture, text), numbers from 0 on. group: within a subset, for a mean over groups ("" for none).
    """

    subset: str
    pictures: tuple[PictureFile, ...]
    texts: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    group: str = ""


@dataclass(slots=True)
class Benchmark:
    """equal: items that were left out, for their wrong texts are the right ones."""

    items: list[ChoiceItem] = field(default_factory=list)
    equal: int = 0


def has_composition(data: Path, split: str) -> bool:
    """Whether a dataset of ours has such a folder, or the folder is one. They have no splits: `split` is any."""
    del split
    if (data / FOLDER).is_dir():
        return True
    return data.is_dir() and not any(data.glob("*/index.json")) and any(True for _ in _known_files(data))


def read_composition(data: Path, images: Sequence[Path] = ()) -> dict[str, Benchmark]:
    """The benchmarks by name, their items in the order of the files' names. images: where else pictures lie."""
    root = data / FOLDER if (data / FOLDER).is_dir() else data
    for folder in (root, *images):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder" + ("" if folder is root else " (--images)"))
    found: dict[str, Benchmark] = {}
    seen: dict[tuple[str, str, str], Path] = {}
    for file, layout in _known_files(root):
        benchmark, read = _LAYOUTS[layout]
        try:
            items = list(read(file, _Pictures(file.parent, images)))
        except _UNSOUND as e:
            raise UserError(f"{file}: not as {benchmark} writes such a file ({type(e).__name__}: {e})"[:500]) from e
        if not items:
            raise UserError(f"{file}: no items in it")
        _refuse_unsound(file, items)
        own = (layout, items[0].subset, file.name if layout in ("spec", "winoground") else "")
        if layout != "winoground" and seen.setdefault(own, file) is not file:
            raise UserError(f"{file}: {seen[own]} has the subset {items[0].subset} already; take one of them away")
        distinct = [item for item in map(_distinct, items) if item is not None]
        into = found.setdefault(benchmark, Benchmark())
        into.items += distinct
        into.equal += len(items) - len(distinct)
    if not found:
        raise UserError(
            f"{root}: nothing to choose from; composition reads the files of {', '.join(_BENCHMARKS)} "
            "(docs/evaluation.md says which)"
        )
    for benchmark, own in found.items():
        if not own.items:
            raise UserError(f"{root}: {benchmark} has nothing to choose from: all wrong texts are the right ones")
    return dict(sorted(found.items()))


def _distinct(item: ChoiceItem) -> ChoiceItem | None:
    """The item without wrong texts that are a right one; None where nothing is left to choose from."""
    if len(item.texts) < 2:
        return item
    plain = [" ".join(text.split()) for text in item.texts]
    right = {text for _, text in item.pairs}
    kept = [n for n, text in enumerate(plain) if n in right or text not in {plain[m] for m in right}]
    if len({plain[m] for m in right}) < len(right) or len(kept) < 2:
        return None
    place = {n: k for k, n in enumerate(kept)}
    pairs = tuple((picture, place[text]) for picture, text in item.pairs)
    return replace(item, texts=tuple(item.texts[n] for n in kept), pairs=pairs)


def _refuse_unsound(file: Path, items: Sequence[ChoiceItem]) -> None:
    for number, item in enumerate(items):
        if max(len(item.pictures), len(item.texts)) < 2:
            raise UserError(f"{file}: item {number} leaves nothing to choose from: {item.texts}"[:500])
        for picture, text in item.pairs:
            if not (0 <= picture < len(item.pictures) and 0 <= text < len(item.texts)):
                raise UserError(
                    f"{file}: item {number} has no choice number {max(picture, text)}, which it calls right"
                )
        if not all(text.strip() for text in item.texts):
            raise UserError(f"{file}: item {number} has an empty text")


# ------------------------------------------------------------------------- which files, which pictures


def _known_files(root: Path) -> Iterator[tuple[Path, str]]:
    """The files under a folder whose layout is known, with its name. Links are followed, hidden names passed over."""
    been: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        been.add(os.path.realpath(folder))
        inside = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in inside if os.path.realpath(os.path.join(folder, name)) not in been]
        for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if file.suffix in (".json", ".jsonl", ".csv") and file.is_file() and (layout := _layout_of(file)):
                yield file, layout


def _layout_of(file: Path) -> str:
    """By the fields that the file's first records have; "" for none of ours."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD).decode("utf-8-sig", "replace")
    if file.suffix == ".csv":
        return "crepe" if "hard_negs" in head.partition("\n")[0] else ""
    for layout, fields in _FIELDS.items():
        if all(f'"{name}"' in head for name in fields):
            return layout
    return ""


class _Pictures:
    """Finds a picture by the name that a record gives, among all the folders where it may lie."""

    def __init__(self, folder: Path, given: Sequence[Path]):
        near = [place for base in (folder, folder.parent) for place in (base, *(base / n for n in _PICTURE_FOLDERS))]
        more = [place for base in given for place in (base, *(base / n for n in _PICTURE_FOLDERS))]
        self.folders = [place for place in dict.fromkeys([*more, *near]) if place.is_dir()]
        self.given = bool(given)

    def __call__(self, name: Any, part: tuple[int, int, int, int] | None = None) -> PictureFile:
        """part: as in `PictureFile`. Raises UserError."""
        text = str(name)
        names = [text] if Path(text).suffix.lower() in ENDINGS else [text + ending for ending in ENDINGS]
        for folder in self.folders:
            for one in names:
                if (folder / one).is_file():
                    return PictureFile(text, folder / one, part=part)
        places = ", ".join(str(folder) for folder in self.folders[:6])
        advice = "look there" if self.given else "name the folder of the pictures with --images DIR"
        raise UserError(f"picture {text}: in none of {places}{' …' * (len(self.folders) > 6)}; {advice}")


# ------------------------------------------------------------------------------------------- readers


def _winoground(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    for record in _lines(file):
        images = (pictures(record["image_0"]), pictures(record["image_1"]))
        texts = (_text(record["caption_0"]), _text(record["caption_1"]))
        yield ChoiceItem(_name(record.get("collapsed_tag") or ""), images, texts, ((0, 0), (1, 1)))


def _sugarcrepe(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    for record in _values(file):
        texts = (_text(record["caption"]), _text(record["negative_caption"]))
        yield ChoiceItem(_name(file.stem), (pictures(record["filename"]),), texts, ((0, 0),))


def _aro(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    """The part of the picture that its objects cover, as ARO cuts it out."""
    records = _values(file)
    pairs = [[*map(str, _list(record["attributes"]))] if "attributes" in record else [] for record in records]
    counts = Counter(f"{pair[0]}_{pair[1]}" for pair in pairs if pair)
    left_out = _aro_left_out()
    for record, pair in zip(records, pairs, strict=True):
        x, y, width, height = (int(record[f"bbox_{name}"]) for name in "xywh")
        image = pictures(record["image_path"], (x, y, x + width, y + height))
        texts = (_text(record["true_caption"]), _text(record["false_caption"]))
        group = str(record.get("relation_name", ""))
        group = "" if group in left_out else group
        if pair:
            group = f"{pair[0]}_{pair[1]}"
            group = group if counts[group] >= _SMALLEST_GROUP else ""
        yield ChoiceItem(_name(file.stem.replace("visual_genome", "vg")), (image,), texts, ((0, 0),), group)


def _aro_left_out() -> set[str]:
    """Relations of which the wrong text is often true, too."""
    text = files("mmgem.evaluation.layouts").joinpath("aro_left_out.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def _aro_order(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    for record in _values(file):
        texts = tuple(map(_text, _list(record["caption_options"])))
        yield ChoiceItem(_name(file.stem), (pictures(record["image"]),), texts, ((0, 0),))


def _crepe(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    """Productivity: a file a kind and complexity. Systematicity: a column a kind."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    stem = _name(file.stem.replace("_vg_hard_negs", ""))
    with file.open(encoding="utf-8-sig", newline="") as opened:
        for record in csv.DictReader(opened):
            x, y, width, height = (int(float(record[name])) for name in ("x", "y", "width", "height"))
            image = pictures(record["image_id"], (x, y, x + width, y + height))
            for column, kind in _HARD_NEGATIVES.items():
                negatives = _list(ast.literal_eval(record[column])) if record.get(column) else []
                if negatives:
                    texts = (_text(record["caption"]), *map(_text, negatives))
                    yield ChoiceItem(f"{stem}{kind}", (image,), texts, ((0, 0),))


def _spec(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    for record in _values(file):
        label, keys = record["label"], _list(record["keys"])
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"label {label!r} is no number of a key")
        if file.stem == "text2image":
            images, texts, pair = tuple(map(pictures, keys)), (_text(record["query"]),), (label, 0)
        else:
            images, texts, pair = (pictures(record["query"]),), tuple(map(_text, keys)), (0, label)
        yield ChoiceItem(_name(file.parent.name), images, texts, (pair,))


def _valse(file: Path, pictures: _Pictures) -> Iterator[ChoiceItem]:
    """Only what at least two of three annotators found valid, as its README asks for."""
    for record in _values(file):
        if record["mturk"]["caption"] >= 2:
            texts = (_text(record["caption"]), _text(record["foil"]))
            yield ChoiceItem(_name(file.stem), (pictures(record["image_file"]),), texts, ((0, 0),))


# What a record that is not as it must be raises, on the way through its reader.
_UNSOUND = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, SyntaxError, OverflowError, RecursionError,
    MemoryError, csv.Error,
)  # fmt: skip
_Reader = Callable[[Path, _Pictures], Iterator[ChoiceItem]]
_LAYOUTS: dict[str, tuple[str, _Reader]] = {
    "winoground": ("winoground", _winoground),
    "sugarcrepe": ("sugarcrepe", _sugarcrepe),
    "aro": ("aro", _aro),
    "aro order": ("aro", _aro_order),
    "crepe": ("crepe", _crepe),
    "spec": ("spec", _spec),
    "valse": ("valse", _valse),
}
_BENCHMARKS = dict.fromkeys(benchmark for benchmark, _ in _LAYOUTS.values())
_FIELDS = {
    "winoground": ("image_0", "image_1", "caption_0", "caption_1"),
    "sugarcrepe": ("filename", "caption", "negative_caption"),
    "aro": ("true_caption", "false_caption", "bbox_x"),
    "aro order": ("image", "caption_options"),
    "spec": ("query", "keys", "label"),
    "valse": ("image_file", "caption", "foil", "mturk"),
}
_HARD_NEGATIVES = {"hard_negs": "", "valid_hard_negs_atom": "_atom", "valid_hard_negs_comp": "_comp"}


def _values(file: Path) -> list[Mapping[str, Any]]:
    """The records of a JSON list, or of a JSON object of records."""
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    return list(content.values()) if isinstance(content, dict) else list(content)


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig") as opened:
        yield from (json.loads(line) for line in opened if line.strip())


def _text(value: Any) -> str:
    """VALSE's own reader makes lists of captions: the first is meant."""
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # half a character is none, and no tokenizer takes it
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is no list")
    return list(value)


def _name(text: str) -> str:
    """For the names of figures: small letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in text.lower()).strip("_")
