"""Samples: what is kept, clipped, dropped and counted, and which pictures are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from mmgem.data.samples import (
    MAX_PIXELS,
    Region,
    Sample,
    SampleError,
    clip_box,
    decode_image,
    image_size,
    merge_texts,
    parse_captions,
    parse_sample,
    record_of,
)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters() -> Image.Image:
    """40 x 20: red, green above blue, white. Every turn of it looks different."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:] = (255, 0, 0), (0, 255, 0)
    pixels[10:, :20], pixels[10:, 20:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


PICTURE = encode(quarters(), "JPEG", quality=95, subsampling=0)


def test_a_whole_record_is_parsed():
    meta = {
        "captions": ["Two squares .", " and\ttwo more\n"],
        "regions": [
            {"box": [0, 0, 20, 10], "phrase": "a red square", "entity": 3, "types": ["shape"]},
            {"box": [20, 10, 40, 20], "phrase": "white"},
        ],
        "width": 40,
        "height": 20,
        "source": "drawn",
    }
    counts: Counter[str] = Counter()
    sample = parse_sample("one", PICTURE, meta, counts)
    assert sample.captions == ("Two squares .", "and\ttwo more")
    assert sample.regions == (
        Region((0.0, 0.0, 20.0, 10.0), "a red square", "3"),
        Region((20.0, 10.0, 40.0, 20.0), "white", None),
    )
    assert all(isinstance(edge, float) for region in sample.regions for edge in region.box)
    assert (sample.key, sample.image, sample.width, sample.height) == ("one", PICTURE, 40, 20)
    assert sample.meta == {"source": "drawn", "regions": [{"types": ["shape"]}, {}]}
    assert not counts


def test_a_record_survives_json_and_pickle():
    meta = {
        "captions": ["Grün — 緑"],
        "regions": [
            {"box": [1.5, 2.25, 9, 9], "phrase": "left", "entity": "a", "boxes_of_entity": 2},
            {"box": [5, 5, 50, 9], "phrase": "right"},
        ],
        "ids": [1, 2],
    }
    sample = parse_sample("one", PICTURE, meta)
    again = parse_sample("one", PICTURE, json.loads(json.dumps(record_of(sample))))
    assert again == sample
    assert record_of(again) == record_of(sample)
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_one_caption_and_plain_text():
    assert parse_sample("a", PICTURE, {"caption": "a flag"}).captions == ("a flag",)
    assert parse_sample("a", PICTURE, "a flag\n").captions == ("a flag",)
    # the list wins: "caption" is what img2dataset adds beside one's own fields
    assert parse_captions("a", {"captions": ["x", "y"], "caption": "z"}) == ("x", "y")


def test_size_is_read_from_the_picture_where_the_record_has_none():
    for size in ({}, {"width": None, "height": None}, {"width": 0, "height": 20}, {"width": 40}):
        sample = parse_sample("a", PICTURE, {"caption": "a flag", **size})
        assert (sample.width, sample.height) == (40, 20), size


def test_empty_captions_and_phrases_are_dropped_and_counted():
    counts: Counter[str] = Counter()
    box = [0, 0, 5, 5]
    meta = {
        "captions": ["", "  \n", None, "kept"],
        "regions": [
            {"box": box, "phrase": " "},
            {"box": box},
            {"box": box, "phrase": "kept"},
        ],
    }
    sample = parse_sample("a", PICTURE, meta, counts)
    assert sample.captions == ("kept",)
    assert [region.phrase for region in sample.regions] == ["kept"]
    assert counts == {"empty caption": 3, "empty phrase": 2}


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([1, 2, 3, 4], (1.0, 2.0, 3.0, 4.0)),
        ([-5, -1.5, 41, 20.5], (0.0, 0.0, 40.0, 20.0)),
        ([39.5, 19.5, 60, 60], (39.5, 19.5, 40.0, 20.0)),
        ([0.1, 0.1, 0.2, 0.3], (0.1, 0.1, 0.2, 0.3)),
        ([40, 0, 50, 10], "box outside image"),
        ([-9, 0, 0, 10], "box outside image"),
        ([0, 21, 10, 30], "box outside image"),
        ([10, 5, 10, 9], "box without area"),
        ([10, 9, 5, 12], "box without area"),
        ([5, 9, 8, 9], "box without area"),
        ([0, 0, float("nan"), 10], "box is not four numbers"),
        ([0, 0, float("inf"), 10], "box is not four numbers"),
        ([0, 0, 10**400, 10], "box is not four numbers"),
        ([0, 0, 10], "box is not four numbers"),
        (["a", 0, 10, 10], "box is not four numbers"),
        (None, "box is not four numbers"),
    ],
)
def test_boxes_are_clipped_or_dropped_and_counted(box: object, expected: object):
    assert clip_box(box, 40, 20) == expected
    counts: Counter[str] = Counter()
    meta = {"caption": "a flag", "regions": [{"box": box, "phrase": "it"}]}
    sample = parse_sample("a", PICTURE, meta, counts)
    if isinstance(expected, str):
        assert sample.regions == () and counts == {expected: 1}
    else:
        assert sample.regions == (Region(expected, "it"),) and not counts  # type: ignore[arg-type]


def test_fields_of_dropped_regions_do_not_shift():
    meta = {
        "caption": "a flag",
        "regions": [
            {"box": [50, 0, 60, 9], "phrase": "gone", "n": 0},
            {"box": [0, 0, 9, 9], "phrase": "here", "n": 1},
        ],
    }
    sample = parse_sample("a", PICTURE, meta)
    assert [region.phrase for region in sample.regions] == ["here"]
    assert sample.meta["regions"] == [{"n": 1}]


@pytest.mark.parametrize(
    "meta",
    [
        {},
        "",
        " \n",
        {"captions": []},
        {"captions": [" "], "regions": [{"box": [0, 0, 0, 0], "phrase": "x"}]},
    ],
)
def test_a_sample_without_any_text_is_refused(meta: dict | str):
    with pytest.raises(SampleError) as caught:
        parse_sample("key-7", PICTURE, meta)
    assert caught.value.key == "key-7"
    assert caught.value.reason == "no caption and no region"
    assert "key-7" in str(caught.value)


def test_a_sample_with_regions_alone_is_kept():
    sample = parse_sample("a", PICTURE, {"regions": [{"box": [0, 0, 9, 9], "phrase": "x"}]})
    assert sample.captions == () and len(sample.regions) == 1


@pytest.mark.parametrize(
    "meta",
    [
        {"captions": "not a list"},
        {"captions": [5]},
        {"caption": "x", "regions": {"box": [0, 0, 1, 1]}},
        {"caption": "x", "regions": ["here"]},
        {"caption": "x", "regions": [{"box": [0, 0, 1, 1], "phrase": 5}]},
        ["caption"],
    ],
)
def test_a_record_of_another_shape_is_refused(meta: dict):
    with pytest.raises(SampleError) as caught:
        parse_sample("k", PICTURE, meta)
    assert caught.value.reason == "broken metadata"


def test_pictures_of_every_mode_become_rgb():
    flag = quarters()
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        image = decode_image(parse_sample("a", encode(flag.convert(mode), kind), "x"))
        assert image.mode == "RGB" and image.size == (40, 20), mode
    deep = Image.fromarray(np.full((4, 4), 100 * 256 + 7, np.uint16))
    assert decode_image(parse_sample("a", encode(deep), "x")).getpixel((1, 1)) == (100, 100, 100)


def test_the_picture_comes_back_unchanged():
    image = decode_image(parse_sample("a", encode(quarters()), "x"))
    assert np.array_equal(np.asarray(image), np.asarray(quarters()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied_once(orientation: int, kind: str):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quarters(), kind, exif=exif)
    sample = parse_sample("a", data, "x")
    image = decode_image(sample)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(reference))
    assert (sample.width, sample.height) == image.size == image_size("a", data)
    assert image.size == ((20, 40) if orientation >= 5 else (40, 20))
    if orientation > 1:
        assert image.getexif().get(0x0112, 1) == 1  # nobody turns it a second time


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture():
    data = encode(quarters(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode_image(parse_sample("a", data, "x")).size == (40, 20)


def noise(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(pixels), kind)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"<html>404 not found</html>", "broken image"),
        (noise("JPEG")[:-900], "broken image"),
        (noise("JPEG")[:40], "broken image"),
        (noise("PNG")[:-900], "broken image"),
        (noise("WEBP")[:-900], "broken image"),
    ],
)
def test_broken_pictures_name_the_sample(data: bytes, reason: str):
    with pytest.raises(SampleError) as caught:
        decode_image(parse_sample("img-9", data, {"caption": "x", "width": 64, "height": 64}))
    assert (caught.value.key, caught.value.reason) == ("img-9", reason)
    assert "img-9" in str(caught.value) and caught.value.detail


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("side", [9_600, 30_000])
def test_decompression_bombs_are_refused(side: int, limit: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # someone may have lifted Pillow's own
    assert side * side > MAX_PIXELS
    with pytest.raises(SampleError) as caught:
        decode_image(parse_sample("b", bomb(side, side), {"caption": "x", "width": 1, "height": 1}))
    assert caught.value.reason == "image too large"


HALF = "\ud800"  # of a pair of UTF-16, which JSON may hold and UTF-8 not
BOX = [0, 0, 9, 9]


@pytest.mark.parametrize(
    "meta",
    [
        {"captions": ["good", f"a {HALF}"]},
        {"caption": f"\udc80{HALF}"},
        {"caption": "x", "regions": [{"box": BOX, "phrase": HALF}]},
        {"caption": "x", "regions": [{"box": BOX, "phrase": "y", "entity": HALF}]},
        {"caption": "x", "regions": [{"box": BOX, "phrase": "y", "entity": [1]}]},
    ],
)
def test_text_that_no_file_and_no_tokenizer_takes_is_refused(meta: dict):
    with pytest.raises(SampleError, match="k: broken metadata") as caught:
        parse_sample("k", PICTURE, json.loads(json.dumps(meta)))
    assert str(caught.value).encode()
    whole = json.dumps({"caption": "\U0001f600 grün", "n": HALF})  # a whole pair is text, and other fields are not used
    assert parse_sample("k", PICTURE, json.loads(whole)).captions == ("\U0001f600 grün",)


@pytest.mark.parametrize("size", [10**400, 10**12, True, 1.5, "40"])
def test_a_size_that_no_picture_has_is_read_from_the_picture(size: object):
    regions = [{"box": [0, 0, 50, 9], "phrase": "x"}]
    sample = parse_sample("a", PICTURE, {"regions": regions, "width": size, "height": size})
    assert (sample.width, sample.height) == (40, 20) and sample.regions[0].box == (0.0, 0.0, 40.0, 9.0)


@pytest.mark.parametrize("side", [5e-324, 1e-200, 1e-170])
def test_a_box_whose_area_no_float_holds_is_dropped(side: float):
    assert clip_box([0, 0, side, side], 40, 20) == "box without area"
    assert clip_box([0, 0, 1e-150, 1e-150], 40, 20) == (0.0, 0.0, 1e-150, 1e-150)


@pytest.mark.parametrize("depth", [66, 500, 960, 100_000])
@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_record_that_is_nested_without_end_is_refused(depth: int, pair: tuple[bytes, bytes]):
    nested = pair[0] * depth + b"0" + pair[1] * depth
    with pytest.raises(SampleError, match="k: broken metadata .(nested deeper|maximum recursion)"):
        merge_texts("k", b'{"caption": "x", "n": ' + nested + b"}", b"")
    flat = b'{"caption": "x", "n": [' + b"[0]," * 1000 + b"[0]]}"
    assert pickle.loads(pickle.dumps(merge_texts("k", flat, b"")))["n"][1000] == [0]


def test_a_program_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow gives EPS to Ghostscript, which may run for ever."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where it was looked for before
    data = encode(quarters(), "EPS")
    with pytest.raises(OSError):
        Image.open(io.BytesIO(data)).load()
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    for read in (lambda: image_size("k", data), lambda: decode_image(Sample("k", data, ("x",), (), 40, 20, {}))):
        with pytest.raises(SampleError, match="k: broken image .EPS"):
            read()
    assert not (tmp_path / "ran").exists()


def test_a_jpeg_of_scans_without_end_is_refused():
    """Of 81 million pixels, each scan of 119 bytes takes 50 ms."""
    data = encode(Image.new("L", (800, 800), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(parse_sample("k", data[:-2] + scan * 20 + data[-2:], "x")).size == (800, 800)
    with pytest.raises(SampleError, match="k: broken image .1006 scans"):
        decode_image(parse_sample("k", data[:-2] + scan * 1000 + data[-2:], "x"))


def test_pillow_does_not_warn_of_each_picture(tmp_path: Path):
    (tmp_path / "bomb").write_bytes(bomb(9_600, 9_600))
    (tmp_path / "exif").write_bytes(encode(quarters(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"))
    (tmp_path / "clear").write_bytes(encode(quarters().convert("P"), "PNG", transparency=b"\0\1"))
    program = """
import sys
from pathlib import Path
from mmgem.data.samples import Sample, SampleError, decode_image
for name in sys.argv[1:]:
    try:
        print(decode_image(Sample(name, Path(name).read_bytes(), ("x",), (), 1, 1, {})).size)
    except SampleError as error:
        print(error.reason)
"""
    names = [str(tmp_path / name) for name in ("bomb", "exif", "clear")]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (["image too large", "(40, 20)", "(40, 20)"], "")


def test_sample_errors_survive_a_worker_process():
    error = pickle.loads(pickle.dumps(SampleError("k", "broken image", "why")))
    assert (error.key, error.reason, error.detail) == ("k", "broken image", "why")
    assert str(error) == "sample k: broken image (why)"
