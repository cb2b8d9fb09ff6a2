"""Boxes move with the picture: proved on pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image, ImageDraw
from torch import Tensor

from mmgem.config import DataConfig
from mmgem.data.transforms import KEPT_SHARE, View, draw_view, plain_view
from mmgem.images import Preprocess, kept_share, move_boxes

GROUND, COLOUR = (40, 90, 60), (250, 20, 240)
SIZE = 96
AUGMENT = DataConfig(flip=0.5, crop_scale=(0.3, 1.0))


def preprocess(resize: Any = "squash", size: int = SIZE) -> Preprocess:
    return Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize)


def with_box(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), GROUND)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=COLOUR)  # its x2, y2 are inclusive
    return image


def pixels(tensor: Tensor, how: Preprocess) -> Tensor:
    """3 x S x S back to 0 … 255."""
    return (tensor * torch.tensor(how.std)[:, None, None] + torch.tensor(how.mean)[:, None, None]) * 255


def coloured(tensor: Tensor, how: Preprocess) -> Tensor:
    """S x S bool: nearer to the colour than to the ground."""
    ground, colour = (torch.tensor(c, dtype=torch.float32)[:, None, None] for c in (GROUND, COLOUR))
    shown = pixels(tensor, how)
    return (shown - colour).square().sum(dim=0) < (shown - ground).square().sum(dim=0)


def edges(mask: Tensor) -> list[int]:
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def random_case(rng: np.random.Generator) -> tuple[int, int, tuple[int, int, int, int]]:
    width, height = (int(n) for n in rng.integers(60, 320, 2))
    x1, y1 = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
    return width, height, (x1, y1, int(rng.integers(x1 + 12, width + 1)), int(rng.integers(y1 + 12, height + 1)))


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("augment", [False, True])
def test_the_box_is_where_its_pixels_are(resize: str, augment: bool):
    how, rng = preprocess(resize), np.random.default_rng(0)
    seen, flips, cut = 0, 0, 0
    for _ in range(80):
        width, height, box = random_case(rng)
        view = draw_view(AUGMENT, how, width, height, rng) if augment else plain_view(how, width, height)
        found = coloured(view.picture(with_box(width, height, box), how), how)
        boxes_R4, kept = view.boxes([box])
        share = kept_share([box], view.window)[0]
        # The pixels tell how much of the box is left, too.
        window = (view.window[2] - view.window[0]) * (view.window[3] - view.window[1])
        left = found.float().mean().item() * window / ((box[2] - box[0]) * (box[3] - box[1]))
        assert left == pytest.approx(share, abs=0.12)
        assert kept == ([0] if share >= KEPT_SHARE else [])
        assert boxes_R4.shape == (len(kept), 4)
        if not kept:
            cut += 1
            continue
        moved = boxes_R4[0] * SIZE
        assert np.allclose(moved, edges(found), atol=1.5), (width, height, box, view)
        seen, flips = seen + 1, flips + view.flip
    assert seen >= 40
    assert (flips >= 10) == augment
    assert cut >= 1 or (resize == "squash" and not augment)


def test_a_flip_mirrors_left_and_right_only():
    how, box = preprocess(), (10, 20, 50, 90)
    view = View((0.0, 0.0, 200.0, 100.0), flip=True)
    assert torch.allclose(view.boxes([box])[0], torch.tensor([[0.75, 0.2, 0.95, 0.9]]))
    image = with_box(200, 100, box)
    plain = View((0.0, 0.0, 200.0, 100.0)).picture(image, how)
    assert torch.equal(view.picture(image, how), plain.flip(2))


def test_boxes_below_half_are_dropped_and_the_others_keep_their_numbers():
    view = View((50.0, 0.0, 150.0, 100.0))
    boxes = [
        (0.0, 0.0, 100.0, 100.0),  # just half of it
        (0.0, 0.0, 99.0, 100.0),  # a little less
        (60.0, 10.0, 80.0, 30.0),
        (0.0, 0.0, 40.0, 40.0),  # outside
        (140.0, 50.0, 160.0, 100.0),
    ]
    boxes_R4, kept = view.boxes(boxes)
    assert kept == [0, 2, 4]
    assert torch.allclose(boxes_R4, torch.tensor([[0, 0, 0.5, 1], [0.1, 0.1, 0.3, 0.3], [0.9, 0.5, 1, 1]]), atol=1e-6)
    assert kept_share(boxes, view.window) == pytest.approx([0.5, 49 / 99, 1, 0, 0.5])
    none_R4, none = View((0.0, 0.0, 9.0, 9.0)).boxes([])
    assert none_R4.shape == (0, 4) and none == []


def test_the_whole_picture_is_the_whole_view():
    assert torch.equal(move_boxes([(0, 0, 333, 217)], (0.0, 0.0, 333.0, 217.0)), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert move_boxes([], (0.0, 0.0, 1.0, 1.0)).shape == (0, 4)


@pytest.mark.parametrize(("width", "height"), [(200, 100), (101, 200), (77, 77), (1, 300)])
def test_plain_views(width: int, height: int):
    assert preprocess("squash").window(width, height) == (0, 0, width, height)
    x1, y1, x2, y2 = preprocess("crop").window(width, height)
    assert x2 - x1 == y2 - y1 == min(width, height)
    assert (x1 + x2) / 2 == width / 2 and (y1 + y2) / 2 == height / 2
    assert plain_view(preprocess("crop"), width, height) == View((x1, y1, x2, y2))
    assert preprocess("crop")(picture(0, width, height)).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_drawn_views_stay_inside_the_plain_one(resize: str):
    how, rng = preprocess(resize), np.random.default_rng(1)
    shares, ratios = [], []
    for _ in range(400):
        width, height = (int(n) for n in rng.integers(20, 400, 2))
        x1, y1, x2, y2 = how.window(width, height)
        a1, b1, a2, b2 = draw_view(AUGMENT, how, width, height, rng).window
        assert x1 <= a1 < a2 <= x2 + 1e-9 and y1 <= b1 < b2 <= y2 + 1e-9
        shares.append((a2 - a1) * (b2 - b1) / ((x2 - x1) * (y2 - y1)))
        ratios.append((a2 - a1) / (b2 - b1) / ((x2 - x1) / (y2 - y1)))
    assert 0.3 - 1e-9 <= min(shares) < 0.4 and 0.9 < max(shares) <= 1, "as the setting says"
    assert 3 / 4 - 1e-9 <= min(ratios) < 0.8 and 1.25 < max(ratios) <= 4 / 3 + 1e-9


def test_without_augmentation_every_view_is_the_plain_one():
    how, rng = preprocess("crop"), np.random.default_rng(2)
    assert {draw_view(DataConfig(), how, 120, 80, rng) for _ in range(20)} == {plain_view(how, 120, 80)}


def test_views_repeat_by_their_generator():
    config = DataConfig(flip=0.5, crop_scale=(0.3, 1.0), color_jitter=0.4)
    first, second = (
        [draw_view(config, preprocess(), 120, 80, rng) for _ in range(10)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )
    assert first == second and len(set(first)) == 10


def test_colours_move_within_their_range_and_boxes_do_not():
    config, how, rng = DataConfig(color_jitter=0.3), preprocess(), np.random.default_rng(3)
    views = [draw_view(config, how, 120, 80, rng) for _ in range(50)]
    factors = np.array([v.color for v in views])
    assert factors.min() >= 0.7 and factors.max() <= 1.3 and (factors.std(axis=0) > 0.1).all()
    assert {v.window for v in views} == {(0.0, 0.0, 120.0, 80.0)}
    image = picture(4, 120, 80)
    darker = View((0.0, 0.0, 120.0, 80.0), color=(0.5, 1.0, 1.0)).picture(image, how)
    plain = View((0.0, 0.0, 120.0, 80.0)).picture(image, how)
    assert torch.allclose(pixels(darker, how), pixels(plain, how) / 2, atol=2)
    grey = pixels(View((0.0, 0.0, 120.0, 80.0), color=(1.0, 1.0, 0.0)).picture(image, how), how)
    assert (grey.amax(dim=0) - grey.amin(dim=0)).max() < 1e-3


def test_pictures_are_normalised():
    how = preprocess(size=4)
    tensor = how(Image.new("RGB", (9, 7), (255, 0, 51)))
    wanted = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.3, (0.2 - 0.3) / 0.4])
    assert tensor.dtype == torch.float32
    assert torch.allclose(tensor, wanted[:, None, None].expand(3, 4, 4), atol=1e-6)
    assert torch.equal(how(Image.new("L", (9, 7), 100)), how(Image.new("RGB", (9, 7), (100, 100, 100))))


def test_a_picture_of_the_right_size_is_not_resampled():
    image = picture(6, SIZE, SIZE)
    shown = pixels(preprocess()(image), preprocess())
    assert torch.allclose(shown, torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), atol=1e-3)
