"""Raw data as they come: scenes of which some have another scene's text, and some lack their text or their picture.

Receives how many. Gives tars, in which each record says in `truth` which of its texts are right, and in `scene` which
scene the picture is of: by these one can tell how well that is found out. Refuses nothing.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from random import Random

from mmgem.data.scenes import render_scene

WRONG, NO_TEXT, NO_IMAGE = 0.3, 0.1, 0.1


def noisy_scenes(out: Path, count: int, *, seed: int = 0, size: int = 112, a_tar: int = 1000) -> dict[str, int]:
    """Tars of `a_tar` samples with one caption each. Gives how many there are of each kind."""
    rng = Random(seed)
    kinds = ["wrong"] * round(WRONG * count) + ["no text"] * round(NO_TEXT * count)
    kinds += ["no image"] * round(NO_IMAGE * count)
    kinds += ["right"] * (count - len(kinds))
    rng.shuffle(kinds)
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, a_tar):
        with tarfile.open(out / f"{start // a_tar:05d}.tar", "w") as tar:
            for n in range(start, min(start + a_tar, count)):
                scene = render_scene(seed, "train", n, size=size)
                text = scene.captions[rng.randrange(5)]
                right = kinds[n] != "wrong"
                if not right:
                    text = render_scene(seed, "train", count + n, size=48).captions[rng.randrange(5)]
                if kinds[n] != "no image":
                    buffer = io.BytesIO()
                    scene.image.save(buffer, "JPEG", quality=95, subsampling=0)
                    _add(tar, f"s{n:06d}.jpg", buffer.getvalue())
                record = {"kind": kinds[n], "scene": n} | (
                    {} if kinds[n] == "no text" else {"caption": text, "truth": {text: right}}
                )
                _add(tar, f"s{n:06d}.json", json.dumps(record).encode())
    return {kind: kinds.count(kind) for kind in ("right", "wrong", "no text", "no image")}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
