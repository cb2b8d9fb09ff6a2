"""PoolAggregator against RoIAlign written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from mmgem.model.aggregator import PoolAggregator

H, W = 5, 7
BOXES = {
    "whole": [0.0, 0.0, 1.0, 1.0],
    "inside": [0.21, 0.33, 0.68, 0.79],
    "top left corner": [0.0, 0.0, 0.1, 0.1],
    "bottom right corner": [0.9, 0.85, 1.0, 1.0],
    "left edge": [0.0, 0.2, 0.3, 0.9],
    "sub-cell": [0.5, 0.5, 0.52, 0.53],
    "a hair": [0.4, 0.1, 0.4001, 0.95],
    "one cell": [2 / W, 1 / H, 3 / W, 2 / H],
}


def bilinear(map_CHW: Tensor, y: float, x: float) -> Tensor:
    """Between the four nearest cell centres; up to one cell outside, the border's value."""
    height, width = map_CHW.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros_like(map_CHW[:, 0, 0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (
        map_CHW[:, top, left] * (1 - down) * (1 - across)
        + map_CHW[:, top, right] * (1 - down) * across
        + map_CHW[:, bottom, left] * down * (1 - across)
        + map_CHW[:, bottom, right] * down * across
    )


def roi_align_by_hand(map_BCHW: Tensor, boxes: list[list[float]], images: list[int], bins: int, points: int) -> Tensor:
    """Mean over bins of the mean over their sampling points; half a cell is taken off since centres stand at .5."""
    height, width = map_BCHW.shape[2:]
    out = []
    for (x1, y1, x2, y2), image in zip(boxes, images, strict=True):
        left, top = x1 * width - 0.5, y1 * height - 0.5
        box_w, box_h = (x2 - x1) * width, (y2 - y1) * height
        across = points if points > 0 else max(1, math.ceil(box_w / bins - 1e-6))
        down = points if points > 0 else max(1, math.ceil(box_h / bins - 1e-6))
        values = [
            bilinear(
                map_BCHW[image],
                top + (i + (p + 0.5) / down) * box_h / bins,
                left + (j + (q + 0.5) / across) * box_w / bins,
            )
            for i in range(bins)
            for j in range(bins)
            for p in range(down)
            for q in range(across)
        ]
        out.append(torch.stack(values).mean(dim=0))
    return torch.stack(out)


@pytest.mark.parametrize(("bins", "points"), [(1, -1), (1, 4), (3, -1), (3, 2)])
def test_regions_and_their_gradients_are_those_of_the_reference(bins: int, points: int):
    torch.manual_seed(0)
    map_BCHW = torch.randn(4, 6, H, W)
    # Image 1 has no box at all, image 3 has two.
    boxes = list(BOXES.values())
    images = [0, 0, 2, 2, 3, 3, 0, 2]
    weights_RC = torch.randn(len(boxes), 6)

    ours = map_BCHW.clone().requires_grad_()
    found_RC = PoolAggregator(bins, points).regions(ours, torch.tensor(boxes), torch.tensor(images))
    (found_RC * weights_RC).sum().backward()
    reference = map_BCHW.clone().requires_grad_()
    wanted_RC = roi_align_by_hand(reference, boxes, images, bins, points)
    (wanted_RC * weights_RC).sum().backward()

    assert ours.grad is not None and reference.grad is not None
    for name, found, wanted in zip(BOXES, found_RC, wanted_RC, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5), name
    assert (ours.grad - reference.grad).abs().max() < 1e-5
    assert not ours.grad[1].any()  # no box, no gradient
    assert all(ours.grad[i].any() for i in (0, 2, 3))


@pytest.mark.parametrize(("bins", "points"), [(1, -1), (2, -1), (2, 3)])
def test_regions_are_torchvisions_roi_align_of_all_channels(bins: int, points: int):
    generator = torch.Generator().manual_seed(3)
    map_BCHW = torch.randn(3, 8, 9, 12, generator=generator)
    corners_R22 = torch.rand(200, 2, 2, generator=generator)
    boxes_R4 = torch.cat([corners_R22.amin(dim=1), corners_R22.amax(dim=1)], dim=1)
    image_R = torch.randint(3, (200,), generator=generator)
    rois_R5 = torch.cat([image_R[:, None].float(), boxes_R4 * torch.tensor([12.0, 9.0, 12.0, 9.0])], dim=1)
    wanted_RC = roi_align(map_BCHW, rois_R5, bins, sampling_ratio=points, aligned=True).mean(dim=(2, 3))
    found_RC = PoolAggregator(bins, points).regions(map_BCHW, boxes_R4, image_R)
    assert torch.allclose(found_RC, wanted_RC, atol=1e-5)


def test_the_reference_itself_knows_the_right_answer():
    """On a map that is its own x coordinate, a box's value is its centre, wherever it lies inside."""
    ramp = (torch.arange(W) + 0.5).expand(1, 1, H, W).contiguous()
    box = [1.5 / W, 0.3, 4.1 / W, 0.8]
    assert roi_align_by_hand(ramp, [box], [0], 1, 8).item() == pytest.approx((1.5 + 4.1) / 2, abs=1e-5)
    found = PoolAggregator().regions(ramp, torch.tensor([box]), torch.tensor([0]))
    assert found.item() == pytest.approx((1.5 + 4.1) / 2, abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (14, 14), (3, 16)])
def test_a_box_of_the_whole_map_is_its_mean(size: tuple[int, int]):
    map_BCHW = torch.randn(3, 8, *size, generator=torch.Generator().manual_seed(1))
    pool = PoolAggregator()
    whole_R4 = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    regions_RC = pool.regions(map_BCHW, whole_R4, torch.arange(3))
    assert torch.allclose(regions_RC, pool.image(map_BCHW), atol=1e-6)
    assert torch.equal(pool.image(map_BCHW), map_BCHW.mean(dim=(2, 3)))


def test_no_boxes_at_all():
    map_BCHW = torch.randn(2, 4, H, W, requires_grad=True)
    found = PoolAggregator().regions(map_BCHW, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert found.shape == (0, 4)
    (found.sum() + PoolAggregator().image(map_BCHW).sum()).backward()
    assert map_BCHW.grad is not None and torch.isfinite(map_BCHW.grad).all()


def test_roi_align_runs_in_fp32_inside_bf16():
    torch.manual_seed(2)
    map_BCHW, boxes_R4 = torch.randn(2, 4, H, W), torch.tensor(list(BOXES.values()))
    images_R = torch.tensor([0, 1] * 4)
    pool = PoolAggregator()
    exact = pool.regions(map_BCHW, boxes_R4, images_R)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool.regions(map_BCHW, boxes_R4, images_R), exact)
        half = pool.regions(map_BCHW.bfloat16(), boxes_R4, images_R)
    assert half.dtype == torch.bfloat16
    # Only the map was rounded, not the box: the same as fp32 on the rounded map.
    rounded = pool.regions(map_BCHW.bfloat16().float(), boxes_R4, images_R)
    assert torch.equal(half, rounded.bfloat16())


def test_locations_are_the_places_of_the_map():
    map_BCHW = torch.randn(2, 4, H, W)
    places = PoolAggregator().locations(map_BCHW)
    assert places.shape == (2, H, W, 4)
    assert torch.equal(places[1, 3, 6], map_BCHW[1, :, 3, 6])


@pytest.mark.parametrize("shape", [(4,), (2, 5)])
def test_boxes_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="R x 4"):
        PoolAggregator().regions(torch.randn(1, 4, H, W), torch.zeros(shape), torch.zeros(2))
