"""Pictures of the formats that shards have and of some that they should not have: opened, scaled, decoded."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from mutations import DAMAGES, damaged
from PIL import Image, PngImagePlugin
from reading import encoded, picture, refused

from mmgem.data.samples import MAX_PIXELS, OpenedPicture, Region, Sample, SampleError, decode_image, image_size
from mmgem.data.transforms import plain_view, view_picture
from mmgem.images import Preprocess

HOW = Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MEGABYTES = (3 * 4 * MAX_PIXELS >> 20) + 50
"""The largest picture that is taken: as it is stored, as RGB, and turned."""
SIDES = [0, 1, 2, 47, 49, 255, 9459, 9460, 16383, 16384, 65500, 65535]


def _pictures() -> dict[str, bytes]:
    plain, exif, text = picture(7), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text.add_text("a", "b" * 100, zip=True)
    deep = Image.fromarray(np.asarray(plain.convert("L"), np.uint16) * 256)
    frames = {"save_all": True, "append_images": [picture(8)]}
    made = {f"jpeg {mode}": encoded(plain.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")}
    made |= {
        "jpeg exif": encoded(plain, exif=exif),
        "jpeg progressive": encoded(plain, progressive=True),
    }
    made |= {f"png {mode}": encoded(plain.convert(mode), "PNG") for mode in ("RGB", "L", "P", "1", "RGBA", "LA")}
    made |= {"png deep": encoded(deep, "PNG"), "png exif": encoded(plain, "PNG", exif=exif, pnginfo=text)}
    made |= {
        "png clear": encoded(plain.convert("P"), "PNG", transparency=b"\0\1"),
        "apng": encoded(plain, "PNG", **frames),
    }
    made |= {"webp": encoded(plain, "WEBP"), "webp lossless": encoded(plain.convert("RGBA"), "WEBP", lossless=True)}
    made |= {"webp exif": encoded(plain, "WEBP", exif=exif), "webp frames": encoded(plain, "WEBP", **frames)}
    return made | {
        kind: encoded(plain, kind) for kind in ("GIF", "BMP", "TIFF", "MPO", "JPEG2000", "ICO", "PPM", "TGA", "EPS")
    }


PICTURES = _pictures()


def in_parts(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The start of a JPEG, PNG or WebP, and its markers or chunks: name and content."""
    parts = []
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at + 1] != 0xDA:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            parts.append((data[at : at + 2], data[at + 4 : at + 2 + length]))
            at += 2 + length
        return data[:2], [*parts, (b"", data[at:])]
    png = data.startswith(b"\x89PNG")
    at = start = 8 if png else 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big") if png else int.from_bytes(data[at + 4 : at + 8], "little")
        name = data[at + 4 : at + 8] if png else data[at : at + 4]
        parts.append((name, data[at + 8 : at + 8 + length]))
        at += 8 + length + (4 if png else length % 2)
    return data[:start], parts


def joined(start: bytes, parts: list[tuple[bytes, bytes]]) -> bytes:
    """With the right lengths and checksums."""
    if start == b"\xff\xd8":
        whole = (name and name + struct.pack(">H", min(len(body) + 2, 65535)) for name, body in parts)
        return start + b"".join(head + body for head, (_, body) in zip(whole, parts, strict=True))
    if start.startswith(b"\x89PNG"):
        chunks = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts)
        return start + b"".join(chunks)
    rest = b"".join(name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(rest)) + b"WEBP" + rest


def resized(name: bytes, body: bytes, width: int, height: int) -> bytes:
    """The part with another size of the picture, if it says one."""
    if name in (b"\xff\xc0", b"\xff\xc2"):
        return body[:1] + struct.pack(">HH", height % 65536, width % 65536) + body[5:]
    if name == b"IHDR":
        return struct.pack(">II", width, height) + body[8:]
    if name == b"VP8X":
        return body[:4] + b"".join(((side - 1) % (1 << 24)).to_bytes(3, "little") for side in (width, height))
    if name == b"VP8 ":
        return body[:6] + struct.pack("<HH", width % 16384, height % 16384) + body[10:]
    return body


def part_changed(data: bytes, changes: list[tuple[str, int, int, int, bytes, Any]]) -> bytes:
    start, parts = in_parts(data)
    for how, n, width, height, other, damages in changes:
        n %= len(parts)
        name, body = parts[n]
        if how == "size":
            parts = [(name, resized(name, body, width, height)) for name, body in parts]
        elif how == "name" and name:
            parts[n] = (other[: len(name)], body)
        elif how == "again":
            parts[n:n] = [parts[n]] * (1 if width < 255 else 200)
        elif how == "damaged":
            parts[n] = (name, damaged(body, damages))
        elif how == "out" and len(parts) > 1:
            del parts[n]
    return joined(start, parts)


def flat(width: int, height: int, kind: tuple[int, int, int], whole: bool) -> bytes:
    """A PNG of few bytes and many pixels, as large as may be or larger."""
    depth, colour, bits = kind
    row = 1 + (width * bits + 7) // 8
    rows = height if whole and width * height <= MAX_PIXELS else 1
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [(b"PLTE", bytes(768))] if colour == 3 else []
    return joined(b"\x89PNG\r\n\x1a\n", [*parts, (b"IDAT", zlib.compress(bytes(row * rows), 1)), (b"IEND", b"")])


_SIDES = st.sampled_from(SIDES)
_NAMES = [b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"zTXt", b"ANMF", b"ALPH", b"VP8L", b"EXIF"]
_NAMES += [bytes([255, marker]) for marker in (0xC0, 0xC2, 0xC3, 0xC4, 0xC9, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xE2, 0xEE)]
_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["size", "name", "again", "damaged", "damaged", "out"]),
        st.integers(0, 20),
        _SIDES,
        _SIDES,
        st.sampled_from(_NAMES),
        DAMAGES,
    ),
    min_size=1,
    max_size=2,
)
_IN_PARTS = [data for data in PICTURES.values() if data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))]
_FLAT = st.builds(
    flat,
    st.sampled_from([1, 3000, 9000, 9459]),
    st.sampled_from([1, 3000, 9000, 9460]),
    st.sampled_from([(8, 2, 24), (8, 0, 8), (16, 2, 48), (8, 6, 32), (1, 0, 1), (8, 3, 8), (16, 0, 16)]),
    st.booleans(),
)
_DAMAGED = st.builds(damaged, st.sampled_from(list(PICTURES.values())), DAMAGES)
_PARTS = st.builds(part_changed, st.sampled_from(_IN_PARTS), _CHANGES)
INPUTS = st.tuples(
    st.sampled_from([_DAMAGED] * 80 + [_PARTS] * 120 + [_FLAT]).flatmap(lambda kind: kind), st.booleans(), st.booleans()
)


def check(content: tuple[bytes, bool, bool]) -> str:
    data, scaled, boxes = content
    try:
        width, height = image_size("k", data)
    except SampleError as error:
        refused(error)
        width, height = 48, 36
    regions = (Region((0.0, 0.0, float(width), float(height)), "x"),) if boxes else ()
    sample = Sample("k", data, ("x",), regions, width, height, {})
    try:
        opened = OpenedPicture(sample)
        size = opened.size
        assert 0 < size[0] * size[1] <= MAX_PIXELS
        view = plain_view(HOW, *size)
        assert torch.isfinite(view_picture(opened, view, HOW, scaled=scaled)).all()
        del opened
        image = decode_image(sample)
    except SampleError as error:
        refused(error)
        return error.reason
    assert image.mode == "RGB" and image.size == size
    return "whole"


def warm_up() -> None:
    for data in PICTURES.values():
        check((data, True, True))
