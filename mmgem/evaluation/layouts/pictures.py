"""Pictures that lie in files, or in tars, read when they are asked for.

Receives a path, in a tar where the content begins, and maybe a part to cut out. Gives a PIL picture (RGB, turned as
EXIF says). Refuses, with a SampleError, what is no picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmgem.data.samples import SampleError, clip_box, decode_image, parse_sample

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """size: bytes in a tar from `offset` on; -1: the whole file. part: x1, y1, x2, y2 in whole pixels, to cut out."""

    key: str
    path: Path
    offset: int = 0
    size: int = -1
    part: tuple[int, int, int, int] | None = None

    def read(self) -> Image.Image:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as e:
            raise SampleError(self.key, "unreadable image", f"{self.path}: {e.strerror}") from e
        whole = decode_image(parse_sample(self.key, content, {"captions": ["-"]}))
        if self.part is None:
            return whole
        box = clip_box(self.part, *whole.size)
        if isinstance(box, str):
            raise SampleError(self.key, box, f"{self.part} of {whole.width} x {whole.height} pixels")
        x1, y1, x2, y2 = map(round, box)
        return whole.crop((x1, y1, x2, y2))
