"""Pictures that lie in files, or in tars, read when they are asked for.

Receives a path, and in a tar where the content begins. Gives a PIL picture (RGB, turned as EXIF says). Refuses, with a
SampleError, what is no picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmgem.data.samples import SampleError, decode_image, parse_sample

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """size: bytes in a tar from `offset` on; -1: the whole file."""

    key: str
    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> Image.Image:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as e:
            raise SampleError(self.key, "unreadable image", f"{self.path}: {e.strerror}") from e
        return decode_image(parse_sample(self.key, content, {"captions": ["-"]}))
