"""Pictures of one object with its class, in CLIP_benchmark's webdataset layout, to try zero-shot evaluation on.

Receives how many, a seed and a size. Gives `OUT/zero-shot/` with `classnames.txt`,
`zeroshot_classification_templates.txt` and `test/0.tar`; the classes are all pairs of colour and shape, those that no
training scene shows among them. Refuses nothing: `prepare_scenes` has looked.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from mmgem.data.scene_text import COLOURS, SHAPES, with_article
from mmgem.data.scenes import render_one

FOLDER = "zero-shot"
TEMPLATES = ("{c}", "there is {c}")


def write_scene_classes(out: Path, count: int, seed: int, size: int) -> None:
    """Replaces what is there; no pictures, no folder."""
    if not count:
        return
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    root = out / FOLDER
    (root / "test").mkdir(parents=True, exist_ok=True)
    said = [with_article(f"{colour} {shape}") for colour, shape in names]
    (root / "classnames.txt").write_text("\n".join(said) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    unfinished = root / "test" / ".0.tar.unfinished"
    with tarfile.open(unfinished, "w") as tar:
        for index in range(count):
            image, colour, shape = render_one(seed, "test", index, size=size)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95, subsampling=0)
            _add(tar, f"s{index:06d}.jpg", buffer.getvalue())
            _add(tar, f"s{index:06d}.cls", str(names.index((colour, shape))).encode())
    unfinished.replace(root / "test" / "0.tar")
    (root / "test" / "nshards.txt").write_text("1\n")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
