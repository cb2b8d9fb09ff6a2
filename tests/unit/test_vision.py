"""Towers: the map is the tower's own, without class token; cuts, patch dropout, checkpoints, errors."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import CNN, assert_same_gradients, clip_vit, cnn, gradients, timm_vit
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.model.vision import CLIP_STATS, create_timm, create_tower

TOWERS = {"timm CNN": cnn, "timm ViT": timm_vit, "open_clip ViT": clip_vit}
INNER = {cnn: "model.layer2.0", timm_vit: "model.blocks.1", clip_vit: "visual.transformer.resblocks.1"}


def pictures(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def tower(config: VisionConfig) -> Any:
    torch.manual_seed(0)
    return create_tower(config).eval()


# --- the map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), [(cnn, (32, 2, 2)), (timm_vit, (32, 4, 4)), (clip_vit, (32, 4, 4))])
def test_the_map_has_a_vector_a_place_and_no_class_token(make: Any, shape: tuple[int, ...]):
    model = tower(make())
    map_BCHW = model(pictures())
    assert map_BCHW.shape == (2, *shape)
    assert model.width == shape[0]


def test_a_timm_vits_map_is_its_normed_patch_tokens():
    model = tower(timm_vit())
    tokens = model.model.forward_features(pictures())
    assert tokens.shape == (2, 17, 32)
    assert torch.allclose(model(pictures()).flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)


def test_an_open_clip_vits_map_is_its_normed_patch_tokens():
    model = tower(clip_vit())
    model.visual.output_tokens = True
    _, tokens = model.visual(pictures())
    assert torch.allclose(model(pictures()).flatten(2).transpose(1, 2), tokens, atol=1e-6)


def test_a_timm_cnns_map_is_what_its_head_pools():
    model = tower(cnn())
    pooled = model.model(pictures())  # without classifier: the pooled features
    assert torch.allclose(model(pictures()).mean(dim=(2, 3)), pooled, atol=1e-5)


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
@pytest.mark.parametrize(("top", "left"), [(0, 1), (1, 0)])
def test_places_of_the_map_are_places_of_the_picture(make: Any, top: int, left: int):
    """Rows are rows: a change in one quarter of the picture moves that quarter of the map most."""
    model = tower(make())
    before = pictures(1)
    after = before.clone()
    after[:, :, 32 * top + 8 : 32 * top + 24, 32 * left + 8 : 32 * left + 24] += 3.0
    change_HW = (model(after) - model(before)).norm(dim=1)[0]
    half = change_HW.shape[0] // 2
    quarters = change_HW.unfold(0, half, half).unfold(1, half, half).sum(dim=(2, 3))
    assert divmod(int(quarters.argmax()), 2) == (top, left)


def test_layer_takes_an_earlier_map():
    stages = tower(cnn(layer=-2))
    assert stages(pictures()).shape == (2, 24, 4, 4) and stages.width == 24
    for make in (timm_vit, clip_vit):
        last, before = tower(make()), tower(make(layer=-2))
        before.load_state_dict(last.state_dict())
        assert before(pictures()).shape == last(pictures()).shape
        assert not torch.allclose(before(pictures()), last(pictures()), atol=1e-2)
        # The last block's output is its input plus its own part, so without that part both are equal.
        blocks = last.model.blocks if make is timm_vit else last.visual.transformer.resblocks
        with torch.no_grad():
            for name, parameter in blocks[-1].named_parameters():
                if name.startswith(("attn.proj", "mlp.fc2", "attn.out_proj", "mlp.c_proj")):
                    parameter.zero_()
        assert torch.allclose(before(pictures()), last(pictures()), atol=1e-6)
    assert torch.equal(tower(clip_vit(layer=1))(pictures()), tower(clip_vit())(pictures()))


def test_a_tower_with_channels_last_features_gives_channels_first():
    config = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    model = tower(VisionConfig(name="swin_tiny_patch4_window7_224", config=config, image_size=64))
    assert model(pictures()).shape == (2, 64, 2, 2)
    assert model.width == 64


def test_image_size_sets_the_vits_grid():
    """Without img_size in `config`, and open_clip's vision_cfg asking for another size."""
    config = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    assert tower(timm_vit(config=config, image_size=96))(pictures(1, 96)).shape == (1, 32, 6, 6)
    config = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 224}
    assert tower(clip_vit(config=config, image_size=96))(pictures(1, 96)).shape == (1, 32, 6, 6)


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
    hidden = model.trunk(pictures())
    assert not hidden.requires_grad
    assert torch.equal(model.rest(hidden), model(pictures()))
    whole = tower(VisionConfig(name="mobilenetv2_050", image_size=64))
    whole.load_state_dict(model.state_dict())
    assert torch.allclose(model(pictures()), whole(pictures()), atol=1e-5)
    stem = whole.model.bn1(whole.model.conv_stem(pictures()))
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
    model(pictures()).square().mean().backward()
    assert gradients(model).keys() == {n for n, _ in model.named_parameters()} - frozen


def test_the_frozen_part_stays_in_evaluation_while_the_rest_trains():
    """Else its batch norms would drift, and a cache made of it would be another tower's."""
    model = cut_tower()
    before = model.trunk(pictures())
    model.train()
    model(pictures()).sum().backward()
    assert torch.equal(model.trunk(pictures()), before)
    assert model.model.blocks[5].training and not model.model.blocks[3].training


def test_train_from_the_first_module_freezes_nothing():
    model = cut_tower(train_from="conv_stem")
    assert model.frozen_parameters() == []
    assert torch.equal(model.rest(model.trunk(pictures())), model(pictures()))


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
def test_a_tower_frozen_whole_is_all_trunk(make: Any):
    model = tower(make())
    hidden = model.trunk(pictures())
    assert not hidden.requires_grad
    assert torch.allclose(model.rest(hidden), model(pictures()), atol=1e-5)


def test_cuts_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"has no stage 'blocks.9'; its stages: .*blocks\.6"):
        cut_tower(train_from="blocks.9")
    with pytest.raises(UserError, match="resnet10t is no plain sequence"):
        tower(cnn(train_from="layer3"))
    with pytest.raises(UserError, match="leave layer empty"):
        cut_tower(layer=-2)


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
    model.train()(pictures()).sum().backward()
    assert gradients(model)["model.bn1.weight"].any()
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before) == moves


# --- patch dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [timm_vit, clip_vit])
def test_patch_dropout_keeps_a_share_of_the_patches_in_training_only(make: Any):
    model = tower(make())
    full = model(pictures())
    model.set_patch_dropout(0.75)
    assert torch.equal(model(pictures()), full)  # evaluation
    model.train()
    torch.manual_seed(1)
    assert model(pictures()).shape == (2, 32, 1, 4)  # 4 of 16
    first, second = model(pictures()), model(pictures())
    assert not torch.equal(first, second)  # drawn anew
    model.set_patch_dropout(0.0)
    assert torch.equal(model(pictures()), full)


def test_towers_without_patches_refuse_patch_dropout():
    cait = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "depth_token_only": 1}
    for config in (cnn(), VisionConfig(name="cait_xxs24_224", config=cait, image_size=64)):
        model = tower(config)
        model.set_patch_dropout(0.0)
        assert model.train()(pictures()).ndim == 4
        with pytest.raises(UserError, match="has no patches to drop; set patch_dropout to 0"):
            model.set_patch_dropout(0.5)


def test_patch_dropout_of_a_tower_with_rotary_positions():
    config = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}
    model = tower(VisionConfig(name="eva02_tiny_patch14_224", config=config, image_size=64))
    model.set_patch_dropout(0.0)
    full = model.train()(pictures())
    assert full.shape == (2, 32, 4, 4)
    model.set_patch_dropout(0.5)
    assert model(pictures()).shape == (2, 32, 1, 8)
    model.set_patch_dropout(0.0)
    assert torch.equal(model(pictures()), full)


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS.keys())
def test_gradient_checkpointing_gives_the_same_gradients(make: Any):
    def trained(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
        model, runs = tower(make(gradient_checkpointing=checkpointing)).train(), []
        inner = model.get_submodule(INNER[make])
        inner.register_forward_pre_hook(lambda *_: runs.append(1))
        model(pictures(4)).square().mean().backward()
        return len(runs), gradients(model)

    runs, plain = trained(False)
    assert runs == 1
    runs, checkpointed = trained(True)
    assert runs == 2  # again in the backward pass
    assert_same_gradients(checkpointed, plain, 1e-6)


# --- checkpoints and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_loads_a_local_checkpoint(tmp_path: Path, suffix: str):
    source = create_timm(cnn())
    file = tmp_path / f"weights.{suffix}"
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    loaded = create_timm(cnn(pretrained=str(file)))
    for name, value in loaded.state_dict().items():
        assert value.dtype != torch.float16
        assert torch.equal(value, state[name].to(value.dtype)), name
    # For shapes only, the file is not even looked for.
    create_timm(cnn(pretrained=str(tmp_path / "nowhere.pth")), load_weights=False)


def test_timm_refuses_what_it_cannot_load(tmp_path: Path):
    with pytest.raises(UserError, match=r"resnet10x: timm has no such model"):
        tower(cnn(name="resnet10x"))
    with pytest.raises(UserError, match=r"mobilenetv2_99.*near: mobilenetv2_"):
        tower(cnn(name="mobilenetv2_99"))
    with pytest.raises(UserError, match="could not make resnet10t: .*widthh"):
        tower(cnn(config={"widthh": 3}))
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        tower(cnn(pretrained=str(tmp_path / "nowhere.pth")))
    other = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(3)}, other)
    with pytest.raises(
        UserError, match=r"does not fit the model: \d+ parameters missing \(.*, 1 unknown \(some.weight"
    ):
        tower(cnn(pretrained=str(other)))
    wider = create_timm(cnn(config={**CNN, "stem_width": 16}))
    save_file(wider.state_dict(), other)
    with pytest.raises(UserError, match="does not fit the model: .*size mismatch"):
        tower(cnn(pretrained=str(other)))
    for name in ("torn.safetensors", "torn.pth"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(UserError, match=f"{name}: not a checkpoint"):
            tower(cnn(pretrained=str(tmp_path / name)))


def test_a_tower_without_places_is_refused():
    model = tower(VisionConfig(name="mixer_s16_224", config={"img_size": 64}, image_size=64))
    with pytest.raises(UserError, match="mixer_s16_224: gives no map of places"):
        model(pictures())


# --- open_clip -------------------------------------------------------------------------------------------------------

CLIP_JSON: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def clip_checkpoint(folder: Path) -> Any:
    """A model of CLIP_JSON in open_clip's own words, saved as open_clip does; and the model."""
    import open_clip

    torch.manual_seed(5)
    model = open_clip.CLIP(**{k: dict(v) if isinstance(v, dict) else v for k, v in CLIP_JSON.items()}).eval()
    folder.mkdir(exist_ok=True)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_JSON, "preprocess_cfg": preprocess}))
    (folder / "model.json").write_text(json.dumps(CLIP_JSON))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    model.visual.output_tokens = True
    return model


def tokens(model: Any) -> Tensor:
    return model.visual(pictures())[1].transpose(1, 2).reshape(2, 32, 4, 4)


def test_open_clip_from_a_config_file_and_a_checkpoint(tmp_path: Path):
    """The whole CLIP checkpoint, its activation from the config, its projection left out."""
    source = clip_checkpoint(tmp_path / "clip")
    file, weights = str(tmp_path / "clip/model.json"), str(tmp_path / "clip/open_clip_pytorch_model.bin")
    model = tower(clip_vit(config={}, config_file=file, pretrained=weights))
    assert torch.allclose(model(pictures()), tokens(source), atol=1e-6)
    # The same tower from its settings alone, as a saved model describes it.
    assert model.portable == {"config_file": None, "config": {**CLIP_JSON["vision_cfg"], "quick_gelu": True}}
    again = tower(clip_vit(config=model.portable["config"]))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pictures()), model(pictures()))
    random = tower(clip_vit(config={}, config_file=file))
    assert not torch.allclose(random(pictures()), tokens(source), atol=1e-2)
    # For shapes only, the checkpoint is not even looked for.
    for settings in ({"config_file": file, "config": {}}, {"config": model.portable["config"]}):
        assert create_tower(clip_vit(**settings, pretrained="nowhere.pt"), load_weights=False).width == 32


def test_open_clip_from_a_folder(tmp_path: Path):
    """`local-dir:` is `hf-hub:` without the hub: config, weights and statistics from one folder."""
    source = clip_checkpoint(tmp_path / "clip")
    model = tower(clip_vit(config={}, name=f"local-dir:{tmp_path}/clip"))
    assert torch.allclose(model(pictures()), tokens(source), atol=1e-6)
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.portable == {"name": None, "config": {**CLIP_JSON["vision_cfg"], "quick_gelu": True}}


def test_open_clip_by_name_at_another_size():
    with torch.device("meta"):
        model = create_tower(clip_vit(config={}, name="ViT-S-32", image_size=96))
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 384, 3, 3)
    assert model.width == 384
    assert (model.mean, model.std) == CLIP_STATS
    assert model.portable == {}


def test_open_clip_refuses_what_it_cannot_load(tmp_path: Path):
    with pytest.raises(UserError, match=r"ViT-B-33: open_clip has no such model; near: ViT-B-32, "):
        tower(clip_vit(config={}, name="ViT-B-33"))
    with pytest.raises(UserError, match="could not build this vision_cfg: .*widht"):
        tower(clip_vit(config={"widht": 3}))
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        tower(clip_vit(config={}, config_file=str(tmp_path / "nowhere.json")))
    for text in ("{", "[]", '{"embed_dim": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"bad\.json: not an open_clip model config"):
            tower(clip_vit(config={}, config_file=str(tmp_path / "bad.json")))
    clip_checkpoint(tmp_path / "clip")
    file = str(tmp_path / "clip/model.json")
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        tower(clip_vit(config={}, config_file=file, pretrained="nowhere.pt"))
    torch.save({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"not a checkpoint at all")
    for name in ("other.pt", "torn.pt"):
        with pytest.raises(UserError, match=f"{name}: does not fit"):
            tower(clip_vit(config={}, config_file=file, pretrained=str(tmp_path / name)))
    with pytest.raises(UserError, match="could not make local-dir:"):
        tower(clip_vit(config={}, name=f"local-dir:{tmp_path}/nowhere"))


def test_open_clips_towers_without_patch_tokens_are_refused():
    resnet = {"layers": [1, 1, 1, 1], "width": 16}
    coca = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True,
            "attn_pooler_heads": 2}  # fmt: skip
    for config in (resnet, coca):
        with pytest.raises(UserError, match="gives no feature map; use open_clip's own CLIP ViTs"):
            tower(clip_vit(config=config))


def test_weights_of_another_activation_are_refused():
    """open_clip would only warn, and compute with GELU what was trained with QuickGELU."""
    with pytest.raises(UserError, match="set name to ViT-L-14-quickgelu"):
        tower(clip_vit(config={}, name="ViT-L-14", pretrained="openai", image_size=224))
    with pytest.raises(UserError, match="not a known tag or valid file path"):  # of a file nothing is known
        tower(clip_vit(config={}, name="ViT-L-14", pretrained="nowhere.pt", image_size=224))


# --- real weights on real photos -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dogs() -> list[Image.Image]:
    """Photos of the validation split with a dog in every caption and a dog's box of over a fifth of the picture."""
    root = Path(os.environ.get("MMGEM_TEST_DATA", "nowhere"))
    flickr = root / "data" / "flickr8k"
    if not flickr.is_dir() or not list((root / "weights").glob("mobilenetv2*")):
        pytest.skip("MMGEM_TEST_DATA names no folder with flickr8k and MobileNetV2 weights")
    dog, share = re.compile(r"\bdogs?\b", re.IGNORECASE), {}
    lines = [json.loads(line) for line in (flickr / "captions.jsonl").open()]
    area = {item["image"]: item["width"] * item["height"] for item in lines}
    for line in (flickr / "regions.jsonl").open():
        region = json.loads(line)
        if region["split"] == "val" and dog.search(region["phrase"]):
            x1, y1, x2, y2 = region["box"]
            name = region["image"]
            share[name] = max(share.get(name, 0.0), (x2 - x1) * (y2 - y1) / area[name])
    chosen = [
        item["image"]
        for item in lines
        if share.get(item["image"], 0) > 0.2 and all(dog.search(c) for c in item["captions"])
    ]
    return [Image.open(flickr / "images" / name).convert("RGB") for name in chosen]


def mobilenet(**changes: Any) -> VisionConfig:
    weights = next((Path(os.environ["MMGEM_TEST_DATA"]) / "weights").glob("mobilenetv2*"))
    settings: dict[str, Any] = {
        "name": "mobilenetv2_100",
        "pretrained": str(weights),
        "config": {"num_classes": 1001, "pad_type": "same"},
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "resize": "crop",
    }
    return VisionConfig(**{**settings, **changes})


@torch.inference_mode()
def share_of_dogs(model: Any, images: list[Image.Image], preprocess: Preprocess) -> float:
    """ImageNet's classes 151 to 268 are dogs; this model counts a background class before them."""
    model.eval()
    parts = [
        model(torch.stack([preprocess(i) for i in images[at : at + 16]])).argmax(dim=1)
        for at in range(0, len(images), 16)
    ]
    classes = torch.cat(parts)
    return ((classes >= 152) & (classes <= 269)).float().mean().item()


def test_imagenet_weights_know_dogs(dogs: list[Image.Image]):
    """Measured: 94 % of 107 photos; 74 % with ImageNet's usual statistics, which are wrong here; 0 % at random."""
    assert len(dogs) >= 100
    model, preprocess = create_timm(mobilenet()), tower(mobilenet()).preprocess()
    assert share_of_dogs(model, dogs, preprocess) >= 0.9
    wrong = Preprocess(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop")
    assert share_of_dogs(model, dogs, wrong) < 0.85
    torch.manual_seed(0)
    assert share_of_dogs(create_timm(mobilenet(pretrained=None)), dogs[:32], preprocess) < 0.5


@torch.inference_mode()
def test_the_tower_is_that_classifier_without_its_head(dogs: list[Image.Image]):
    model, features = create_timm(mobilenet()).eval(), tower(mobilenet())
    batch = torch.stack([features.preprocess()(i) for i in dogs[:8]])
    map_BCHW = features(batch)
    assert map_BCHW.shape == (8, 1280, 7, 7)
    assert torch.allclose(model.classifier(map_BCHW.mean(dim=(2, 3))), model(batch), atol=1e-3)


def test_arguments_that_timm_cannot_use_are_the_users_error():
    with pytest.raises(UserError, match="timm could not make resnet10t"):
        create_tower(cnn(config={"no_such_argument": 8}))


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
