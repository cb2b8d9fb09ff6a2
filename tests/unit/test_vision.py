"""Towers: the map is the tower's own, without class token; cuts, patch dropout, checkpointing, precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_same_gradients, clip_vit, cnn, gradients, pixels, timm_vit, tower
from torch import Tensor

from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.model.vision import create_tower
from mmgem.model.vision_weights import CLIP_STATS, create_timm

TOWERS = {"timm CNN": cnn, "timm ViT": timm_vit, "open_clip ViT": clip_vit}
INNER = {cnn: "model.layer2.0", timm_vit: "model.blocks.1", clip_vit: "visual.transformer.resblocks.1"}


# --- the map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), [(cnn, (32, 2, 2)), (timm_vit, (32, 4, 4)), (clip_vit, (32, 4, 4))])
def test_the_map_has_a_vector_a_place_and_no_class_token(make: Any, shape: tuple[int, ...]):
    model = tower(make())
    map_BCHW = model(pixels())
    assert map_BCHW.shape == (2, *shape)
    assert model.width == shape[0]


def test_a_timm_vits_map_is_its_normed_patch_tokens():
    model = tower(timm_vit())
    tokens = model.model.forward_features(pixels())
    assert tokens.shape == (2, 17, 32)
    assert torch.allclose(model(pixels()).flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)


def test_an_open_clip_vits_map_is_its_normed_patch_tokens():
    model = tower(clip_vit())
    model.visual.output_tokens = True
    _, tokens = model.visual(pixels())
    assert torch.allclose(model(pixels()).flatten(2).transpose(1, 2), tokens, atol=1e-6)


def test_a_timm_cnns_map_is_what_its_head_pools():
    model = tower(cnn())
    pooled = model.model(pixels())  # without classifier: the pooled features
    assert torch.allclose(model(pixels()).mean(dim=(2, 3)), pooled, atol=1e-5)


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
@pytest.mark.parametrize(("top", "left"), [(0, 1), (1, 0)])
def test_places_of_the_map_are_places_of_the_picture(make: Any, top: int, left: int):
    """Rows are rows: a change in one quarter of the picture moves that quarter of the map most."""
    model = tower(make())
    before = pixels(1)
    after = before.clone()
    after[:, :, 32 * top + 8 : 32 * top + 24, 32 * left + 8 : 32 * left + 24] += 3.0
    change_HW = (model(after) - model(before)).norm(dim=1)[0]
    half = change_HW.shape[0] // 2
    quarters = change_HW.unfold(0, half, half).unfold(1, half, half).sum(dim=(2, 3))
    assert divmod(int(quarters.argmax()), 2) == (top, left)


def test_layer_takes_an_earlier_map():
    stages = tower(cnn(layer=-2))
    assert stages(pixels()).shape == (2, 24, 4, 4) and stages.width == 24
    for make in (timm_vit, clip_vit):
        last, before = tower(make()), tower(make(layer=-2))
        before.load_state_dict(last.state_dict())
        assert before(pixels()).shape == last(pixels()).shape
        assert not torch.allclose(before(pixels()), last(pixels()), atol=1e-2)
        # The last block's output is its input plus its own part, so without that part both are equal.
        blocks = last.model.blocks if make is timm_vit else last.visual.transformer.resblocks
        with torch.no_grad():
            for name, parameter in blocks[-1].named_parameters():
                if name.startswith(("attn.proj", "mlp.fc2", "attn.out_proj", "mlp.c_proj")):
                    parameter.zero_()
        assert torch.allclose(before(pixels()), last(pixels()), atol=1e-6)
    assert torch.equal(tower(clip_vit(layer=1))(pixels()), tower(clip_vit())(pixels()))


def test_a_tower_with_channels_last_features_gives_channels_first():
    config = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    model = tower(VisionConfig(name="swin_tiny_patch4_window7_224", config=config, image_size=64))
    assert model(pixels()).shape == (2, 64, 2, 2)
    assert model.width == 64


def test_image_size_sets_the_vits_grid():
    """Without img_size in `config`, and open_clip's vision_cfg asking for another size."""
    config = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    assert tower(timm_vit(config=config, image_size=96))(pixels(1, 96)).shape == (1, 32, 6, 6)
    config = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 224}
    assert tower(clip_vit(config=config, image_size=96))(pixels(1, 96)).shape == (1, 32, 6, 6)


# --- mean and standard deviation -------------------------------------------------------------------------------------


def test_mean_and_deviation_come_with_the_tower():
    assert tower(cnn()).preprocess() == Preprocess(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert tower(timm_vit(resize="crop")).preprocess() == Preprocess(64, (0.5,) * 3, (0.5,) * 3, "crop")
    assert tower(clip_vit()).preprocess() == Preprocess(64, *CLIP_STATS)
    given: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    for make in TOWERS.values():
        assert tower(make(**given)).preprocess() == Preprocess(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --- cutting ---------------------------------------------------------------------------------------------------------


def cut_tower(**changes: Any) -> Any:
    return tower(VisionConfig(**{"name": "mobilenetv2_050", "image_size": 64, "train_from": "blocks.4", **changes}))


def test_trunk_and_rest_are_the_whole():
    model = cut_tower()
    hidden = model.trunk(pixels())
    assert not hidden.requires_grad
    assert torch.equal(model.rest(hidden), model(pixels()))
    whole = tower(VisionConfig(name="mobilenetv2_050", image_size=64))
    whole.load_state_dict(model.state_dict())
    assert torch.allclose(model(pixels()), whole(pixels()), atol=1e-5)
    stem = whole.model.bn1(whole.model.conv_stem(pixels()))
    assert torch.allclose(hidden, whole.model.blocks[:4](stem), atol=1e-5)


def test_what_stands_before_train_from_is_frozen():
    model = cut_tower()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("model.conv_stem", "model.bn1", *(f"model.blocks.{i}." for i in range(4))))
    }
    assert {id(p) for p in model.frozen_parameters()} == {id(p) for n, p in model.named_parameters() if n in frozen}
    model(pixels()).square().mean().backward()
    assert gradients(model).keys() == {n for n, _ in model.named_parameters()} - frozen


def test_the_frozen_part_stays_in_evaluation_while_the_rest_trains():
    """Else its batch norms would drift, and a cache made of it would be another tower's."""
    model = cut_tower()
    before = model.trunk(pixels())
    model.train()
    model(pixels()).sum().backward()
    assert torch.equal(model.trunk(pixels()), before)
    assert model.model.blocks[5].training and not model.model.blocks[3].training


def test_train_from_the_first_module_freezes_nothing():
    model = cut_tower(train_from="conv_stem")
    assert model.frozen_parameters() == []
    assert torch.equal(model.rest(model.trunk(pixels())), model(pixels()))


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
def test_a_tower_frozen_whole_is_all_trunk(make: Any):
    model = tower(make())
    hidden = model.trunk(pixels())
    assert not hidden.requires_grad
    assert torch.allclose(model.rest(hidden), model(pixels()), atol=1e-5)


def test_cuts_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"has no stage 'blocks.9'; its stages: .*blocks\.6"):
        cut_tower(train_from="blocks.9")
    with pytest.raises(UserError, match="resnet10t is no plain sequence"):
        tower(cnn(train_from="layer3"))
    with pytest.raises(UserError, match="leave layer empty"):
        cut_tower(layer=-2)


def test_joined_maps_stand_before_the_last_one_on_its_grid():
    model = tower(VisionConfig(name="mobilenetv2_050", image_size=64, join=["blocks.5", "blocks.3"]))
    plain = tower(VisionConfig(name="mobilenetv2_050", image_size=64))
    plain.load_state_dict(model.state_dict())
    hidden = plain.model.bn1(plain.model.conv_stem(pixels()))
    third = plain.model.blocks[:4](hidden)
    fifth = plain.model.blocks[4:6](third)
    last = plain(pixels())
    assert third.shape[-1] == 2 * last.shape[-1] and fifth.shape[-1] == last.shape[-1]
    joined = model(pixels())
    assert model.width == joined.shape[1]
    assert torch.allclose(joined, torch.cat([F.avg_pool2d(third, 2), fifth, last], dim=1), atol=1e-5)


def test_a_cut_tower_joins_what_its_trunk_gives():
    join = ["blocks.3", "blocks.5"]
    model = cut_tower(join=join)
    whole = tower(VisionConfig(name="mobilenetv2_050", image_size=64, join=join))
    whole.load_state_dict(model.state_dict())
    assert torch.allclose(model.rest(model.trunk(pixels())), whole(pixels()), atol=1e-5)
    assert torch.equal(whole.trunk(pixels()), whole(pixels()))  # frozen whole: the cache holds the joined map
    with pytest.raises(UserError, match="blocks.2 comes before what a tower cut at blocks.4 keeps"):
        cut_tower(join=["blocks.2", "blocks.5"])
    with pytest.raises(UserError, match=r"vision.join: mobilenetv2_050 has no stage 'blocks.9'; its stages: .*blocks"):
        cut_tower(join=["blocks.9"])
    with pytest.raises(UserError, match="resnet10t is no plain sequence; leave train_from and join out"):
        tower(cnn(join=["layer3"]))


@pytest.mark.parametrize(
    ("asked", "pretrained", "moves"),
    [(None, False, True), (None, True, False), (False, True, True), (True, False, False)],
)
def test_batch_norm_statistics_of_a_pretrained_tower_stay(
    asked: bool | None, pretrained: bool, moves: bool, tmp_path: Path
):
    """They may be folded into the weights, and would then be of nothing."""
    file = tmp_path / "weights.pth"
    torch.save(create_timm(cnn()).state_dict(), file)
    model = tower(cnn(pretrained=str(file) if pretrained else None, frozen_statistics=asked))
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")}
    model.train()(pixels()).sum().backward()
    assert gradients(model)["model.bn1.weight"].any()
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before) == moves


# --- patch dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [timm_vit, clip_vit])
def test_patch_dropout_keeps_a_share_of_the_patches_in_training_only(make: Any):
    model = tower(make())
    full = model(pixels())
    model.set_patch_dropout(0.75)
    assert torch.equal(model(pixels()), full)  # evaluation
    model.train()
    torch.manual_seed(1)
    assert model(pixels()).shape == (2, 32, 1, 4)  # 4 of 16
    first, second = model(pixels()), model(pixels())
    assert not torch.equal(first, second)  # drawn anew
    model.set_patch_dropout(0.0)
    assert torch.equal(model(pixels()), full)


def test_towers_without_patches_refuse_patch_dropout():
    cait = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "depth_token_only": 1}
    for config in (cnn(), VisionConfig(name="cait_xxs24_224", config=cait, image_size=64)):
        model = tower(config)
        model.set_patch_dropout(0.0)
        assert model.train()(pixels()).ndim == 4
        with pytest.raises(UserError, match="has no patches to drop; set patch_dropout to 0"):
            model.set_patch_dropout(0.5)


def test_patch_dropout_of_a_tower_with_rotary_positions():
    config = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}
    model = tower(VisionConfig(name="eva02_tiny_patch14_224", config=config, image_size=64))
    model.set_patch_dropout(0.0)
    full = model.train()(pixels())
    assert full.shape == (2, 32, 4, 4)
    model.set_patch_dropout(0.5)
    assert model(pixels()).shape == (2, 32, 1, 8)
    model.set_patch_dropout(0.0)
    assert torch.equal(model(pixels()), full)


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
def test_gradient_checkpointing_gives_the_same_gradients(make: Any):
    def trained(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
        model, runs = tower(make(gradient_checkpointing=checkpointing)).train(), []
        inner = model.get_submodule(INNER[make])
        inner.register_forward_pre_hook(lambda *_: runs.append(1))
        model(pixels(4)).square().mean().backward()
        return len(runs), gradients(model)

    runs, plain = trained(False)
    assert runs == 1
    runs, checkpointed = trained(True)
    assert runs == 2  # again in the backward pass
    assert_same_gradients(checkpointed, plain, 1e-6)


def test_on_cpu_depthwise_convolutions_train_in_fp32_and_pointwise_in_bf16():
    tower = create_tower(VisionConfig(name="mobilenetv2_035", image_size=64))
    plain = timm.create_model("mobilenetv2_035", num_classes=0)
    assert tower.model.state_dict().keys() == plain.state_dict().keys(), "another class, the same weights"
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: kinds[m.groups > 1].add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(tower)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tower(torch.randn(2, 3, 64, 64))
    assert torch.bfloat16 in kinds[True], "without a backward bf16 is the faster one"
