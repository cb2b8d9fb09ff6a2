"""Small pictures for the report: images and boxes as inline SVG with an embedded JPEG.

Receives PIL pictures and boxes in their pixels. Gives markup that needs no file and no network.
Refuses nothing.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from PIL import Image

from mmgem.data.samples import Box

# Told apart on photos and by colour-blind readers (Okabe and Ito 2008, less its black).
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7")

_QUALITY = 80


@dataclass(frozen=True, slots=True)
class Mark:
    """A box to be drawn, and the text of its badge ("" for none)."""

    box: Box
    colour: str
    badge: str = ""


def jpeg_uri(image: Image.Image) -> str:
    """The picture as a data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels on the longer edge; never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def picture(image: Image.Image, side: int, alt: str, marks: Sequence[Mark] = ()) -> Markup:
    """The picture, with boxes drawn over it in pixels of the original."""
    return _svg(image, side, alt, marks, (0.0, 0.0, float(image.width), float(image.height)))


def cutout(image: Image.Image, box: Box, side: int, alt: str, colour: str) -> Markup:
    """The square round a box, with as much of the picture about it as lets one see what it is."""
    reach = max(1.6 * max(box[2] - box[0], box[3] - box[1]), 32.0)
    reach = min(reach, float(max(image.size)))
    window = []
    for low, high, size in ((box[0], box[2], image.width), (box[1], box[3], image.height)):
        length = min(reach, float(size))
        start = min(max((low + high - length) / 2, 0.0), size - length)
        window.append((start, start + length))
    (x1, x2), (y1, y2) = window
    return _svg(image, side, alt, [Mark(box, colour)], (x1, y1, x2, y2))


def _svg(image: Image.Image, side: int, alt: str, marks: Sequence[Mark], window: Box) -> Markup:
    """The window of the picture; boxes keep their line width at any size."""
    cut = tuple(round(edge) for edge in window)
    x1, y1, x2, y2 = cut[0], cut[1], max(cut[2], cut[0] + 1), max(cut[3], cut[1] + 1)
    width, height = x2 - x1, y2 - y1
    uri = jpeg_uri(thumbnail(image.crop((x1, y1, x2, y2)), side))
    parts = [f'<image href="{uri}" x="{x1}" y="{y1}" width="{width}" height="{height}"/>']
    font = max(width, height) / 17
    for mark in marks:
        left, top, right, bottom = mark.box
        shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="halo" {shape}/>')
        parts.append(f'<rect class="box" stroke="{mark.colour}" {shape}/>')
        if mark.badge:
            x = min(max(left, x1), x2 - 1.3 * font)
            y = min(max(top, y1), y2 - 1.3 * font)
            parts.append(
                f'<rect class="badge" fill="{mark.colour}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{1.3 * font:.1f}" height="{1.3 * font:.1f}"/>'
                f'<text class="badge" font-size="{font:.1f}" x="{x + 0.65 * font:.1f}" '
                f'y="{y + font:.1f}">{escape(mark.badge)}</text>'
            )
    return Markup(
        f'<svg class="picture" viewBox="{x1} {y1} {width} {height}" role="img" '
        f'aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    )
