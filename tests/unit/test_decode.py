"""Pictures decoded smaller are the same picture in the same place; a broken one is a SampleError, whatever ails it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image, ImageDraw, ImageFile
from torch import Tensor

from mmgem.config import DataConfig
from mmgem.data.samples import (
    MAX_PIXELS,
    OpenedPicture,
    Region,
    Sample,
    SampleError,
    decode_image,
    image_size,
    parse_sample,
)
from mmgem.data.transforms import View, draw_view, plain_view, view_picture
from mmgem.images import Preprocess

ORIENTATION = 0x0112
AUGMENT = DataConfig(flip=0.5, crop_scale=(0.4, 1.0))
LEVELS = (0.0,) * 3, (1 / 255,) * 3  # so that a tensor holds 0 … 255


def encode(image: Image.Image, kind: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    if kind == "JPEG":
        options = {"quality": 95, **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample_of(data: bytes, regions: Sequence[Region] = ()) -> Sample:
    return Sample("k7", data, ("x",), tuple(regions), 1, 1, {})


def textured(number: int, width: int, height: int) -> Image.Image:
    """Detail of every size over a smooth ground, as photos have it."""
    rng = np.random.default_rng(number)
    levels = np.asarray(picture(number, width, height), np.float32)
    for size, strength in ((16, 30), (64, 20), (160, 15)):
        rough = Image.fromarray(rng.normal(size=(size, size)).astype(np.float32))
        levels = levels + strength * np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def views(data: bytes, size: int, rng: np.random.Generator, resize: Any = "squash") -> tuple[Tensor, Tensor, bool]:
    """A drawn view from the full picture and from the scaled one, 0 … 255, and whether that one was smaller."""
    how, opened = Preprocess(size, *LEVELS, resize), OpenedPicture(sample_of(data))
    view = draw_view(AUGMENT, how, *opened.size, rng)
    full = view.picture(decode_image(sample_of(data)), how)
    fast = view_picture(opened, view, how, scaled=True)
    assert fast.shape == full.shape == (3, size, size) and fast.is_contiguous()
    whole = opened.place((0.0, 0.0, *opened.size))
    return full, fast, whole[2] - whole[0] < opened.size[0]


def differences(data: bytes, size: int, count: int = 8) -> tuple[float, float, float]:
    """The mean, the 99th percentile and the largest difference of levels over some views, all of them scaled."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        full, fast, smaller = views(data, size, rng)
        assert smaller
        found.append((fast - full).abs().flatten())
    all_of_them = torch.cat(found)
    return all_of_them.mean().item(), all_of_them.quantile(0.99).item(), all_of_them.max().item()


# --- the same picture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 48])
def test_smooth_pictures_differ_by_4_levels_at_most(size: int):
    for number in range(3):
        mean, _, largest = differences(encode(picture(number, 403, 301)), size)
        assert mean < 0.6 and largest <= 4


@pytest.mark.parametrize("size", [28, 48])
def test_textured_pictures_differ_by_3_levels_in_the_mean_and_12_nearly_everywhere(size: int):
    for number in range(3):
        mean, most, _ = differences(encode(textured(number, 403, 301)), size)
        assert mean < 3 and most <= 12


def test_photos_differ_by_3_levels_in_the_mean_and_16_nearly_everywhere():
    folder = Path(os.environ.get("MMGEM_TEST_DATA", "")) / "data" / "flickr8k" / "images"
    if not os.environ.get("MMGEM_TEST_DATA") or not folder.is_dir():
        pytest.skip("MMGEM_TEST_DATA names no folder with data/flickr8k/images")
    found = [differences(path.read_bytes(), 32, 2) for path in sorted(folder.glob("*.jpg"))[:2000:20]]
    means, most, _ = np.transpose(found)
    assert len(found) >= 50
    assert means.mean() < 3 and means.max() < 8
    assert most.mean() < 16


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_every_kind_of_jpeg_is_scaled(mode: str, options: dict[str, Any]):
    data = encode(picture(5, 333, 251).convert(mode), **options)
    mean, _, largest = differences(data, 30)
    assert mean < 1 and largest <= 6
    assert OpenedPicture(sample_of(data)).decode((40, 30)).mode == "RGB"


@pytest.mark.parametrize("mode", ["P", "I;16", "RGBA", "L", "1", "WEBP"])
def test_other_formats_are_decoded_whole_and_look_the_same(mode: str):
    image = picture(6, 333, 251)
    if mode == "WEBP":
        data = encode(image, "WEBP", quality=95)
    elif mode == "I;16":
        data = encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG")
    else:
        data = encode(image.convert(mode), "PNG")
    small = OpenedPicture(sample_of(data)).decode((20, 20))
    assert small.size == (333, 251) and small.tobytes() == decode_image(sample_of(data)).tobytes()
    rng = np.random.default_rng(0)
    for _ in range(4):
        full, fast, _ = views(data, 60, rng)
        assert (fast - full).abs().mean() < (12 if mode in "P1" else 1)  # dithered ones are nothing but detail


def test_the_full_picture_is_that_of_decode_image_to_the_last_bit():
    how, rng = Preprocess(40, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), np.random.default_rng(1)
    config = DataConfig(flip=0.5, crop_scale=(0.4, 1.0), color_jitter=0.3)
    for orientation in (1, 6):
        sample = sample_of(encode(textured(2, 203, 151), orientation=orientation))
        image = decode_image(sample)
        for _ in range(4):
            view = draw_view(config, how, *image.size, rng)
            wanted = view.picture(image, how)
            assert torch.equal(view_picture(OpenedPicture(sample), view, how, scaled=False), wanted)
            # Where nothing can be spared the scaled one is the full one.
            large = Preprocess(160, how.mean, how.std)
            full = view_picture(OpenedPicture(sample), view, large, scaled=False)
            assert torch.equal(view_picture(OpenedPicture(sample), view, large, scaled=True), full)


def test_levels_are_normalised_as_the_formula_says():
    how, image = Preprocess(64, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), textured(3, 64, 64)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    assert torch.equal(how(image), (levels / 255 - mean) / std)
    assert how(image).is_contiguous()


# --- its size and place -----------------------------------------------------------------------------------------------


def test_the_scale_is_the_smallest_that_leaves_what_is_needed():
    rng, scales = np.random.default_rng(2), set()
    for _ in range(300):
        width, height = (int(n) for n in rng.integers(1, 260, 2))
        needed = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        orientation = int(rng.integers(1, 9))
        data = encode(Image.new("RGB", (width, height)), orientation=orientation)
        seen = (height, width) if orientation >= 5 else (width, height)
        needed = needed[::-1] if orientation >= 5 else needed
        opened = OpenedPicture(sample_of(data))
        assert opened.size == seen == image_size("k7", data)
        found = opened.decode(needed).size
        scale = next(s for s in (8, 4, 2, 1) if all(n * s <= side for n, side in zip(needed, seen, strict=True)))
        assert found == tuple(ceil(side / scale) for side in seen)
        assert found[0] >= needed[0] and found[1] >= needed[1]
        scales.add(scale)
    assert scales == {1, 2, 4, 8}
    huge = OpenedPicture(sample_of(encode(Image.new("RGB", (99, 80))))).decode((100, 20))
    assert huge.size == (99, 80)


def test_the_window_keeps_the_pixels_of_the_view_and_no_more_than_it_must():
    rng, data, scales = np.random.default_rng(3), encode(Image.new("RGB", (300, 220))), set()
    for _ in range(200):
        how = Preprocess(int(2 ** rng.uniform(3, 7)), *LEVELS)
        left, top = rng.uniform(0, 100), rng.uniform(0, 100)
        window = (left, top, rng.uniform(left + 10, 300), rng.uniform(top + 10, 220))
        opened = OpenedPicture(sample_of(data))
        view_picture(opened, View(window), how, scaled=True)
        x1, y1, x2, y2 = opened.place(window)
        scale = round((window[2] - window[0]) / (x2 - x1))
        kept = min(x2 - x1, y2 - y1)
        assert scale == 1 or kept >= how.size - 1e-6
        assert scale == 8 or kept / 2 < how.size + 1  # its parts of a pixel count for nothing
        scales.add(scale)
    assert scales == {1, 2, 4, 8}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_picture_lies_where_the_full_one_lies(orientation: int):
    """On ramps, where a shift shows as a difference of levels. Just above a multiple of 8 there is the most padding."""
    across, down = np.meshgrid(np.linspace(0, 255, 129), np.linspace(0, 255, 137))
    image = Image.fromarray(np.stack([across, down, 0 * down], axis=2).astype(np.uint8))
    sample = sample_of(encode(image, orientation=orientation, subsampling=0, quality=98))
    for size in (64, 32, 16):
        how, rng = Preprocess(size, *LEVELS), np.random.default_rng(orientation)
        whole = plain_view(how, *OpenedPicture(sample).size)
        for view in (whole, draw_view(AUGMENT, how, *OpenedPicture(sample).size, rng)):
            full, fast = (view_picture(OpenedPicture(sample), view, how, scaled=scaled) for scaled in (False, True))
            along_x, along_y = (fast - full)[:2] if orientation < 5 else (fast - full)[:2].flip(0)
            pixel = 255 / size * (view.window[2] - view.window[0]) / whole.window[2]
            assert along_x.mean(dim=0).abs().max() < 0.25 * pixel
            pixel = 255 / size * (view.window[3] - view.window[1]) / whole.window[3]
            assert along_y.mean(dim=1).abs().max() < 0.25 * pixel


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_marks_stand_in_the_same_pixels_of_any_view(resize: str):
    """Sharp squares of four colours in the corners, seen through windows and flips."""
    image = Image.new("RGB", (331, 253), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for x, y, colour in ((0, 0, "red"), (251, 0, "lime"), (0, 173, "blue"), (251, 173, "white")):
        draw.rectangle((x, y, x + 79, y + 79), fill=colour)
    rng, smaller_ones = np.random.default_rng(4), 0
    data = encode(image, subsampling=0)
    for _ in range(30):
        full, fast, smaller = views(data, 56, rng, resize)
        smaller_ones += smaller
        # Edges may be blurred, by a pixel to each side; nothing else may differ.
        apart = ((fast - full).abs() > 40).any(dim=0)
        assert not apart[1:, 1:].logical_and(apart[:-1, :-1]).logical_and(apart[:-1, 1:]).any()
        assert apart.float().mean() < 0.05
    assert smaller_ones >= 10


def test_boxes_are_of_the_full_picture_even_when_it_is_scaled():
    data = encode(picture(1, 200, 120))
    box = Region((10.0, 20.0, 150.0, 110.0), "thing")
    right, half = (Sample("k7", data, (), (box,), *size, {}) for size in ((200, 120), (100, 60)))
    assert OpenedPicture(right).decode((50, 30)).size == (50, 30)
    with pytest.raises(SampleError, match="size differs from record") as caught:
        OpenedPicture(half).decode((100, 60))
    assert caught.value.key == "k7" and "picture 200x120" in caught.value.detail


# --- broken pictures --------------------------------------------------------------------------------------------------


def outcome(data: bytes, scaled: bool) -> str:
    """The reason of the SampleError, or "" where the picture came; nothing else may happen."""
    how = Preprocess(24, *LEVELS)
    try:
        opened = OpenedPicture(sample_of(data))
        shown = view_picture(opened, View((0.0, 0.0, *map(float, opened.size))), how, scaled=scaled)
    except SampleError as error:
        assert error.key == "k7" and "k7" in str(error) and error.detail
        return error.reason
    assert shown.shape == (3, 24, 24) and shown.isfinite().all()
    return ""


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_cut_anywhere_is_whole_or_a_sample_error(name: str):
    kind, options = KINDS[name]
    data = encode(textured(1, 120, 90), kind, **options)
    reasons = {}
    for length in sorted({0, 1, 2, 3, 10, len(data) - 1, *range(20, len(data), len(data) // 60)}):
        reasons[length] = outcome(data[:length], scaled=True)
        assert reasons[length] == outcome(data[:length], scaled=False)
    assert reasons.pop(0) == "empty image"
    assert set(reasons.values()) <= {"broken image", ""}
    assert {r for length, r in reasons.items() if length < 0.9 * len(data)} == {"broken image"}
    assert outcome(data, scaled=True) == outcome(data, scaled=False) == ""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_bytes_are_a_picture_or_a_sample_error(name: str):
    kind, options = KINDS[name]
    rng = np.random.default_rng(5)
    data = np.frombuffer(encode(textured(1, 120, 90), kind, **options), np.uint8)
    seen = set()
    for _ in range(80):
        damaged = data.copy()
        # Half of them in the head, where sizes and tables stand.
        end = len(data) if rng.random() < 0.5 else 400
        damaged[rng.integers(2, end, 6)] = rng.integers(0, 256, 6)
        if max(declared_size(damaged.tobytes())) < 4000:  # a larger one is no bomb yet, but slow
            seen.add(outcome(damaged.tobytes(), scaled=bool(rng.random() < 0.5)))
    assert "broken image" in seen and seen <= {"", "broken image", "image too large"}


def test_a_png_whose_pixels_are_damaged_is_broken_though_it_is_looked_through_for_exif_before():
    data = bytearray(encode(textured(1, 120, 90), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert outcome(bytes(data), scaled=True) == outcome(bytes(data), scaled=False) == "broken image"


def declared_size(data: bytes) -> tuple[int, int]:
    try:
        return image_size("k7", data)
    except SampleError:
        return (0, 0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "data", [b"\0" * 500, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", bytes(range(256))]
)
def test_what_is_no_picture_is_a_broken_image(data: bytes, scaled: bool):
    assert outcome(data, scaled) == "broken image"


def claims(width: int, height: int) -> dict[str, bytes]:
    """Small pictures whose heads say another size."""
    jpeg = bytearray(encode(picture(0)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    png = bytearray(encode(picture(0), "PNG"))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return {"jpeg": bytes(jpeg), "png": bytes(png)}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60_000, 60_000), (9_600, 9_600)])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_bomb_is_refused_before_anything_is_decoded(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    def never(_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", never)  # where its memory is taken
    data = claims(*size)[kind]
    assert size[0] * size[1] > MAX_PIXELS
    assert outcome(data, scaled=True) == outcome(data, scaled=False) == "image too large"
    with pytest.raises(SampleError, match="sample k7: image too large"):
        parse_sample("k7", data, {"caption": "x"})
    assert outcome(claims(80, 60)[kind], scaled=True) == "broken image"  # and here it would have been


def test_a_png_that_claims_to_be_larger_than_it_is_is_broken():
    data = claims(800, 600)["png"]
    assert outcome(data, scaled=True) == outcome(data, scaled=False) == "broken image"
