"""Where a tower's weights come from: local checkpoints, open_clip's names and files, real weights, errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, clip_vit, cnn, pixels, tower
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.model.vision import create_tower
from mmgem.model.vision_weights import CLIP_STATS, create_timm

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
        model(pixels())


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
    return model.visual(pixels())[1].transpose(1, 2).reshape(2, 32, 4, 4)


def test_open_clip_from_a_config_file_and_a_checkpoint(tmp_path: Path):
    """The whole CLIP checkpoint, its activation from the config, its projection left out."""
    source = clip_checkpoint(tmp_path / "clip")
    file, weights = str(tmp_path / "clip/model.json"), str(tmp_path / "clip/open_clip_pytorch_model.bin")
    model = tower(clip_vit(config={}, config_file=file, pretrained=weights))
    assert torch.allclose(model(pixels()), tokens(source), atol=1e-6)
    # The same tower from its settings alone, as a saved model describes it.
    assert model.portable == {"config_file": None, "config": {**CLIP_JSON["vision_cfg"], "quick_gelu": True}}
    again = tower(clip_vit(config=model.portable["config"]))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pixels()), model(pixels()))
    random = tower(clip_vit(config={}, config_file=file))
    assert not torch.allclose(random(pixels()), tokens(source), atol=1e-2)
    # For shapes only, the checkpoint is not even looked for.
    for settings in ({"config_file": file, "config": {}}, {"config": model.portable["config"]}):
        assert create_tower(clip_vit(**settings, pretrained="nowhere.pt"), load_weights=False).width == 32


def test_open_clip_from_a_folder(tmp_path: Path):
    """`local-dir:` is `hf-hub:` without the hub: config, weights and statistics from one folder."""
    source = clip_checkpoint(tmp_path / "clip")
    model = tower(clip_vit(config={}, name=f"local-dir:{tmp_path}/clip"))
    assert torch.allclose(model(pixels()), tokens(source), atol=1e-6)
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.portable == {"name": None, "config": {**CLIP_JSON["vision_cfg"], "quick_gelu": True}}


def test_open_clip_by_name_at_another_size():
    with torch.device("meta"):
        model = create_tower(clip_vit(config={}, name="ViT-S-32", image_size=96))
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 384, 3, 3)
    assert model.width == 384
    assert (model.mean, model.std) == CLIP_STATS
    assert model.portable == {}


@pytest.mark.parametrize("wrapped", [False, True])
def test_open_clip_by_name_with_a_local_checkpoint(tmp_path: Path, wrapped: bool):
    """The smallest CLIP that open_clip has a name for; its whole state, plain or as open_clip's training leaves it."""
    import open_clip

    torch.manual_seed(5)
    source: Any = open_clip.create_model("ViT-S-32-alt", load_weights=False).eval()
    source.visual.output_tokens = True
    state, file = source.state_dict(), tmp_path / "clip.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, file)
    model = tower(clip_vit(config={}, name="ViT-S-32-alt", pretrained=str(file), image_size=224))
    file.unlink()  # 170 MB
    visual = {k: v for k, v in source.visual.state_dict().items() if k != "proj"}
    loaded = model.visual.state_dict()
    assert loaded.keys() == visual.keys() and len(visual) > 100
    assert all(torch.equal(loaded[name], value) for name, value in visual.items())
    images = pixels(size=224)
    assert torch.equal(model(images), source.visual(images)[1].transpose(1, 2).reshape(2, 384, 7, 7))
    random = tower(clip_vit(config={}, name="ViT-S-32-alt", image_size=224))
    assert not torch.allclose(random(images), model(images), atol=1e-2)


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
