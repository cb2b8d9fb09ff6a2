"""Pairs of scenes that differ in one thing, in the layouts of Winoground and SugarCrepe, to try composition on.

Receives how many of each kind, a seed and a size. Gives `OUT/composition/winoground/` (`examples.jsonl`, `images/`; the
kind is its `collapsed_tag`) and `OUT/composition/sugarcrepe/` (a JSON file a kind, `images/`). No pair is in both.
Refuses nothing: `prepare_scenes` has looked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from mmgem.data.scene_pairs import SAME_WORDS, render_pair

FOLDER = "composition"
SUGARCREPE_NAMES = {
    "attribute": "swap_att",
    "borrowed": "replace_att",
    "relation": "replace_rel",
    "count": "replace_count",
    "negation": "negation",
}
"""Its files, by the kind of pair. In swap_att two words change places, in the others one is replaced."""


def write_scene_composition(out: Path, count: int, seed: int, size: int) -> None:
    """Replaces what is there, whole or not at all; no pairs, no folder."""
    if not count:
        return
    unfinished = out / f".{FOLDER}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    _winoground(unfinished / "winoground", count, seed, size)
    _sugarcrepe(unfinished / "sugarcrepe", count, seed, size)
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    unfinished.replace(out / FOLDER)


def _winoground(root: Path, count: int, seed: int, size: int) -> None:
    (root / "images").mkdir(parents=True)
    lines = []
    for kind in SAME_WORDS:
        for index in range(count):
            pair, number = render_pair(kind, seed, index, size=size), len(lines)
            names = [f"ex_{number}_img_{n}" for n in range(2)]
            for name, image in zip(names, pair.images, strict=True):
                _save(image, root / "images" / f"{name}.png")
            texts = {f"caption_{n}": caption for n, caption in enumerate(pair.captions)}
            images = {f"image_{n}": name for n, name in enumerate(names)}
            lines.append({"id": number, **images, **texts, "tag": kind, "collapsed_tag": kind})
    (root / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _sugarcrepe(root: Path, count: int, seed: int, size: int) -> None:
    (root / "images").mkdir(parents=True)
    for kind, name in SUGARCREPE_NAMES.items():
        items = {}
        for index in range(count):
            pair, file = render_pair(kind, seed, count + index, size=size), f"{name}_{index:06d}.png"
            _save(pair.images[0], root / "images" / file)
            true, false = pair.contrast
            items[str(index)] = {"filename": file, "caption": true, "negative_caption": false}
        (root / f"{name}.json").write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, "PNG", compress_level=1)
