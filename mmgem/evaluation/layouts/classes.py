"""Pictures with classes: class folders, or CLIP_benchmark's webdatasets.

    DIR/[SPLIT/]CLASS/*.jpg                         the class's name is the folder's, underscores read as spaces
    DIR/classnames.txt                              a name a line        (CLIP_benchmark, `build_wds_dataset`)
    DIR/zeroshot_classification_templates.txt       a template a line, with {c} for the name
    DIR/SPLIT/nshards.txt, DIR/SPLIT/0.tar …        KEY.jpg (png, webp) and KEY.cls, the number of its class

Names and templates may come from CLIP_benchmark's JSON files instead: a list, or a list (of templates also a dict:
name → texts without {c}) by the name of a dataset. Receives a folder. Gives a `ClassSet`. Refuses, with a UserError, an
empty class folder, a .cls out of range, names that are not as many as the classes, templates without {c}, unknown
datasets.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgem.errors import UserError
from mmgem.evaluation.layouts.pictures import ENDINGS, PictureFile

NAMES, TEMPLATES, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
DEFAULT_TEMPLATES = ["a photo of a {c}."]
FOLDER = "zero-shot"
"""Where a dataset of ours has such data."""

Templates = list[str] | dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ClassSet:
    """N pictures of C classes."""

    names: list[str]
    templates: Templates
    pictures: list[PictureFile]
    labels: list[int]
    """[N] number of each picture's class."""
    layout: str

    def texts(self) -> list[list[str]]:
        """[C] what is said of each class, by template."""
        if isinstance(self.templates, dict):
            return [self.templates[name] for name in self.names]
        return [[template.replace("{c}", name) for template in self.templates] for name in self.names]


def has_classes(data: Path, split: str) -> bool:
    """Whether a folder is, or has, such data of the split. Class folders: only without a dataset of ours."""
    root = _root(data)
    if any(root.glob(f"*/{SHARDS}")):
        return (root / split / SHARDS).is_file()
    if not root.is_dir() or any(root.glob("*/index.json")) or (root / "index.json").exists():
        return False
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    return any(_is_picture(file) for folder in folders for file in folder.glob("*"))


def read_classes(data: Path, split: str, classes: str | None = None, templates: str | None = None) -> ClassSet:
    """classes, templates: `FILE` or `FILE:DATASET`, JSON as CLIP_benchmark's. Raises UserError."""
    root = _root(data)
    if not root.is_dir():
        raise UserError(f"{data}: no such folder; zero-shot needs class folders, or CLIP_benchmark's webdataset")
    if any(root.glob(f"*/{SHARDS}")):
        names, pictures, labels = _webdataset(root, split)
        layout = "webdataset"
    else:
        names, pictures, labels = _folders(root / split if (root / split).is_dir() else root)
        layout = "class folders"
    if classes is not None:
        given = _listed(classes, "--classes")
        if not isinstance(given, list):
            raise UserError(f"--classes {classes}: not a list of names")
        most = len(names) or max(labels) + 1
        if len(given) != most:
            raise UserError(f"--classes {classes}: {len(given)} names, but {root} has {most} classes")
        names = given
    elif not names:
        raise UserError(f"{root / NAMES}: missing; give the classes' names with --classes FILE")
    if beyond := [n for n, label in enumerate(labels) if not 0 <= label < len(names)]:
        first = pictures[beyond[0]]
        raise UserError(f"{first.path}: {first.key}.cls says {labels[beyond[0]]}, but there are {len(names)} classes")
    return ClassSet(names, _templates(root, names, templates), pictures, labels, layout)


def _root(data: Path) -> Path:
    return data / FOLDER if (data / FOLDER).is_dir() else data


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and file.is_file()


def _folders(root: Path) -> tuple[list[str], list[PictureFile], list[int]]:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if len(folders) < 2:
        raise UserError(f"{root}: {len(folders)} class folders; zero-shot needs a folder with pictures for each class")
    pictures, labels = [], []
    for number, folder in enumerate(folders):
        found = sorted(file for file in folder.iterdir() if _is_picture(file))
        if not found:
            raise UserError(f"{folder}: no pictures in this class folder; remove it, or put some there")
        pictures += [PictureFile(f"{folder.name}/{file.name}", file) for file in found]
        labels += [number] * len(found)
    return [folder.name.replace("_", " ") for folder in folders], pictures, labels


def _webdataset(root: Path, split: str) -> tuple[list[str], list[PictureFile], list[int]]:
    count_file = root / split / SHARDS
    if not count_file.is_file():
        splits = sorted(file.parent.name for file in root.glob(f"*/{SHARDS}"))
        raise UserError(f"{root}: no split {split!r}; it has {', '.join(splits)}")
    try:
        count = int(count_file.read_text())
    except ValueError:
        raise UserError(f"{count_file}: not a number of shards") from None
    names = (root / NAMES).read_text(encoding="utf-8").splitlines() if (root / NAMES).is_file() else []
    pictures: list[PictureFile] = []
    labels: list[int] = []
    for number in range(count):
        _read_tar(root / split / f"{number}.tar", pictures, labels)
    if not pictures:
        raise UserError(f"{root / split}: no pictures in its {count} shards")
    return [name.strip() for name in names if name.strip()], pictures, labels


def _read_tar(path: Path, pictures: list[PictureFile], labels: list[int]) -> None:
    """Adds the pictures of one tar that have a class."""
    found: dict[str, PictureFile] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                if f".{ending.lower()}" in ENDINGS:
                    found[key] = PictureFile(key, path, member.offset_data, member.size)
                elif ending == "cls" and (file := tar.extractfile(member)):
                    classes[key] = int(file.read())
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard; {SHARDS} beside it says there is one") from None
    except (tarfile.TarError, ValueError) as e:
        raise UserError(f"{path}: not a shard of pictures with .cls files ({e})") from e
    if missing := [key for key in found if key not in classes]:
        raise UserError(f"{path}: {missing[0]} has no .cls file, which says its class")
    pictures += found.values()
    labels += [classes[key] for key in found]


def _templates(root: Path, names: Sequence[str], given: str | None) -> Templates:
    source = given
    if given is not None:
        found = _listed(given, "--templates")
    elif (root / TEMPLATES).is_file():
        source = str(root / TEMPLATES)
        found = [line.strip() for line in (root / TEMPLATES).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        return DEFAULT_TEMPLATES
    if isinstance(found, dict):
        if lacking := [name for name in names if not found.get(name)]:
            raise UserError(f"{source}: no texts for the class {lacking[0]!r}")
        return {name: list(map(str, found[name])) for name in names}
    lacking = [template for template in found if "{c}" not in template]
    if lacking or not found:
        which = f": {lacking[0]!r}" if found else ""
        raise UserError(f"{source}: a template needs {{c}}, where the class's name goes{which}")
    return found


def _listed(given: str, option: str) -> list[str] | dict[str, list[str]]:
    """The list (or dict) of `FILE` or `FILE:DATASET`."""
    file, _, name = given.rpartition(":") if not Path(given).is_file() and ":" in given else (given, "", "")
    try:
        content: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{option} {file}: no such file") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{option} {file}: not a JSON file ({e})") from e
    if isinstance(content, list):
        return list(map(str, content))
    if not isinstance(content, dict):
        raise UserError(f"{option} {file}: neither a list nor lists by the name of a dataset")
    if not name and len(content) == 1:
        name = next(iter(content))
    if name not in content:
        what = f"no dataset {name!r}" if name else "several datasets, name one with FILE:DATASET"
        raise UserError(f"{option} {file}: {what}; it has {', '.join(map(str, content))}"[:500])
    found = content[name]
    if isinstance(found, dict):
        return {str(key): [str(text) for text in texts] for key, texts in found.items()}
    return [str(text) for text in found]
