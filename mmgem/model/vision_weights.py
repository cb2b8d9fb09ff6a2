"""Ready-made image models for the towers: built by timm or open_clip, with their weights.

Receives a VisionConfig. Gives timm's or open_clip's own module, random or with the weights of a tag, a hub id or a
local checkpoint. Refuses unknown names and checkpoints that do not fit, each with what was looked for.
"""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmgem.config import VisionConfig
from mmgem.errors import UserError, one_line

CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# --- timm ---------------------------------------------------------------------------------------------------------


def create_timm(config: VisionConfig, load_weights: bool = True) -> Any:
    """A timm model with its classifier. `pretrained`: a timm tag (`a1_in1k`, `default`), or a local checkpoint file."""
    import timm

    assert config.name is not None
    weights = config.pretrained if load_weights else None
    local = weights is not None and (weights.endswith((".safetensors", ".pth", ".pt", ".bin")) or "/" in weights)
    name = config.name if weights is None or local or weights == "default" else f"{config.name}.{weights}"
    if not timm.is_model(config.name.split(".")[0]):
        near = difflib.get_close_matches(config.name, timm.list_models())
        raise UserError(
            f"model.vision.name={config.name}: timm has no such model" + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        model: Any = timm.create_model(name, pretrained=weights is not None and not local, **config.config)
    except (TypeError, RuntimeError, OSError, ValueError, LookupError, AssertionError) as e:
        raise UserError(f"model.vision: timm could not make {name}: {_short(e)}") from e
    if local:
        assert weights is not None
        _load_state(model, Path(weights))
    return model


def _load_state(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"model.vision.pretrained={path}: no such file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as e:
        raise UserError(f"model.vision.pretrained={path}: not a checkpoint: {_short(e)}") from e
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as e:
        raise UserError(f"model.vision.pretrained={path}: does not fit the model: {_short(e)}") from e
    # Folded batch norms leave running statistics out; anything else missing is a wrong file.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"model.vision.pretrained={path}: does not fit the model: {len(missing)} parameters missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unknown ({', '.join(unexpected[:3])})"
        )


# --- open_clip ----------------------------------------------------------------------------------------------------


def create_open_clip(config: VisionConfig, load_weights: bool = True) -> tuple[Any, tuple[Any, Any], dict[str, Any]]:
    """The image side of an open_clip model, its mean and standard deviation, and the tower's `portable` settings.

    `config.config` may hold, beside the vision_cfg, `quick_gelu`, as open_clip's model configs do.
    """
    logging.getLogger().addFilter(_no_random_init_warning)
    if config.config:
        return _open_clip_from_settings(config.config, config, load_weights), CLIP_STATS, {}
    if config.config_file:
        path = Path(config.config_file)
        if not path.is_file():
            raise UserError(f"model.vision.config_file={path}: no such file")
        try:
            vision = _vision_settings(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"model.vision.config_file={path}: not an open_clip model config ({_short(e)})") from e
        visual = _open_clip_from_settings(vision, config, load_weights)
        return visual, CLIP_STATS, {"config_file": None, "config": vision}
    return _open_clip_by_name(config, load_weights)


def _open_clip_by_name(config: VisionConfig, load_weights: bool) -> tuple[Any, tuple[Any, Any], dict[str, Any]]:
    import open_clip

    assert config.name is not None
    on_hub = config.name.startswith(("hf-hub:", "local-dir:"))
    if not on_hub:
        _refuse_unknown_open_clip(config)
    try:
        model = open_clip.create_model(
            config.name,
            pretrained=config.pretrained if load_weights else None,
            load_weights=load_weights and (on_hub or config.pretrained is not None),
            device=torch.get_default_device(),
            force_image_size=config.image_size,
        )
        portable = {"name": None, "config": _hub_settings(config.name)} if on_hub else {}
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"model.vision: open_clip could not make {config.name}: {_short(e)}") from e
    stats = open_clip.get_model_preprocess_cfg(model)
    return model.visual, (tuple(stats.get("mean", CLIP_STATS[0])), tuple(stats.get("std", CLIP_STATS[1]))), portable


def _refuse_unknown_open_clip(config: VisionConfig) -> None:
    import open_clip

    name, names = str(config.name), open_clip.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names)
        raise UserError(
            f"model.vision.name={name}: open_clip has no such model" + (f"; near: {', '.join(near)}" if near else "")
        )
    # open_clip only warns, and then computes with an activation the weights were not trained with.
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, config.pretrained) if config.pretrained else {}
    settings: dict[str, Any] = open_clip.get_model_config(name) or {}
    if tag and tag.get("quick_gelu", False) != settings.get("quick_gelu", False):
        other = name.removesuffix("-quickgelu") if settings.get("quick_gelu") else f"{name}-quickgelu"
        raise UserError(
            f"model.vision: the weights {config.pretrained} of {name} were trained with another activation; "
            f"set name to {other}"
        )


def _hub_settings(name: str) -> dict[str, Any]:
    """The vision settings of `hf-hub:org/name` or `local-dir:folder`, which open_clip has read before."""
    kind, _, place = name.partition(":")
    if kind == "hf-hub":
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(place, "open_clip_config.json"))
    else:
        file = Path(place) / "open_clip_config.json"
    return _vision_settings(json.loads(file.read_text())["model_cfg"])


def _vision_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The vision_cfg of an open_clip model config, with its `quick_gelu`."""
    return {**model["vision_cfg"], **({"quick_gelu": True} if model.get("quick_gelu") else {})}


def _open_clip_from_settings(settings: dict[str, Any], config: VisionConfig, load_weights: bool) -> Any:
    import open_clip

    vision: Any = {**settings, "image_size": config.image_size}
    quick_gelu = bool(vision.pop("quick_gelu", False))
    # The text side is not used; the smallest that open_clip will build.
    text: Any = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    try:
        model: Any = open_clip.CLIP(int(vision.get("width", 768)), vision, text, quick_gelu=quick_gelu)
    except (TypeError, AssertionError, RuntimeError) as e:
        raise UserError(f"model.vision: open_clip could not build this vision_cfg: {_short(e)}") from e
    if config.pretrained and load_weights:
        path = Path(config.pretrained)
        if not path.is_file():
            raise UserError(f"model.vision.pretrained={path}: no such file (a config goes with a local checkpoint)")
        model.visual.proj = None  # not used, and its width is the checkpoint's own
        try:
            state: Any = open_clip.factory.load_state_dict(str(path))
            state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
            state.pop("proj", None)
            model.visual.load_state_dict(state)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as e:
            raise UserError(f"model.vision.pretrained={path}: does not fit the vision config: {_short(e)}") from e
    return model.visual


def _no_random_init_warning(record: logging.LogRecord) -> bool:
    """open_clip warns on the root logger when a model is built random on purpose."""
    return "No pretrained weights loaded" not in record.getMessage()


def _short(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:300] + " …"
