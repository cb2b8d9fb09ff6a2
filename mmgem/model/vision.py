"""The vision tower: pictures in, a feature map out.

Receives a VisionConfig (a timm or open_clip model by name, hub id, config or local checkpoint; random without
weights). Gives `VisionTower`: normalised pictures B x 3 x S x S -> map_BCHW without class token. Refuses unknown
names and checkpoints that do not fit, each with what was looked for.

A tower may be cut in two: `trunk` (frozen for good, its output can be cached) and `rest` (may train).
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import Preprocess

CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class VisionTower(nn.Module):
    """Base: subclasses give `forward` and say where the tower can be cut."""

    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config

    def preprocess(self) -> Preprocess:
        return Preprocess(self.config.image_size, self.mean, self.std, self.config.resize)

    def trunk(self, images_B3SS: Tensor) -> Tensor:
        """The part that never trains, or, of a tower that is frozen whole, all of it. No gradient."""
        raise UserError(f"{type(self).__name__} cannot be cut")

    def rest(self, hidden: Tensor) -> Tensor:
        """From the trunk's output to map_BCHW."""
        raise UserError(f"{type(self).__name__} cannot be cut")

    def set_patch_dropout(self, share: float) -> None:
        """Leaves out that share of the patches in training; the map is then B x C x 1 x (patches kept)."""
        if share > 0:
            raise UserError(f"model.vision.name={self.config.name} has no patches to drop; set patch_dropout to 0")

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Those before `train_from`."""
        return []


class TimmTower(VisionTower):
    def __init__(self, config: VisionConfig, load_weights: bool = True):
        super().__init__(config)
        model = create_timm(config, load_weights)
        stats = model.pretrained_cfg or {}
        self.mean = config.mean or stats.get("mean") or (0.5, 0.5, 0.5)
        self.std = config.std or stats.get("std") or (0.5, 0.5, 0.5)
        model.reset_classifier(0)
        self.model = model
        self.is_vit = hasattr(model, "blocks") and hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens")
        if config.gradient_checkpointing:
            model.set_grad_checkpointing(True)
        # Convolutions on CPU and on tensor cores are 1.3 to 3 times faster in this layout.
        self.layout = torch.contiguous_format if self.is_vit else torch.channels_last
        model.to(memory_format=self.layout)
        self.width = self._width()
        self.cut = 0
        if config.train_from is not None:
            self.cut = self._find_cut(config.train_from)
            for parameter in self.frozen_parameters():
                parameter.requires_grad_(False)

    def _width(self) -> int:
        if self.config.layer is None or self.is_vit:
            return int(self.model.num_features)
        return int(self.model.feature_info[self.config.layer]["num_chs"])

    def _layers(self) -> list[nn.Module]:
        """The tower as a plain sequence, up to its pooling."""
        if not hasattr(self.model, "as_sequential"):
            raise UserError(
                f"model.vision.train_from: timm's {self.config.name} is no plain sequence; freeze the whole of vision instead"
            )
        layers = list(self.model.as_sequential())
        head = {id(m) for m in (self.model.global_pool, getattr(self.model, "classifier", None)) if m is not None}
        stop = next((i for i, layer in enumerate(layers) if id(layer) in head), len(layers))
        return layers[:stop]

    def _find_cut(self, name: str) -> int:
        modules = dict(self.model.named_modules())
        if self.config.layer is not None:
            raise UserError("model.vision: train_from goes with the last layer only; leave layer empty")
        numbers = {id(layer): i for i, layer in enumerate(self._layers())}
        if name not in modules or id(modules[name]) not in numbers:
            names = [n for n, m in modules.items() if id(m) in numbers]
            raise UserError(
                f"model.vision.train_from: {self.config.name} has no stage {name!r}; its stages: {', '.join(names)}"
            )
        return numbers[id(modules[name])]

    def frozen_parameters(self) -> list[nn.Parameter]:
        return [p for layer in self._layers()[: self.cut] for p in layer.parameters()] if self.cut else []

    @torch.no_grad()
    def trunk(self, images_B3SS: Tensor) -> Tensor:
        if not self.config.train_from:
            return self(images_B3SS)
        hidden = images_B3SS.contiguous(memory_format=self.layout)
        for layer in self._layers()[: self.cut]:
            hidden = layer(hidden)
        return hidden

    def rest(self, hidden: Tensor) -> Tensor:
        if not self.config.train_from:
            return hidden
        hidden = hidden.contiguous(memory_format=self.layout)
        with self._fp32_on_cpu(hidden):
            for layer in self._layers()[self.cut :]:
                hidden = layer(hidden)
        return hidden

    def _fp32_on_cpu(self, x: Tensor) -> AbstractContextManager[Any]:
        """On CPU the backward of a convolution by channel is slower in bf16 than in fp32, so convolutions train in fp32."""
        slow = x.device.type == "cpu" and not self.is_vit and torch.is_grad_enabled()
        return torch.autocast("cpu", enabled=False) if slow else nullcontext()

    def set_patch_dropout(self, share: float) -> None:
        if not self.is_vit:
            super().set_patch_dropout(share)
            return
        from timm.layers import PatchDropout

        self.model.patch_drop = (
            PatchDropout(share, num_prefix_tokens=self.model.num_prefix_tokens) if share else nn.Identity()
        )

    def forward(self, images_B3SS: Tensor) -> Tensor:
        if self.cut:
            return self.rest(self.trunk(images_B3SS))
        images_B3SS = images_B3SS.contiguous(memory_format=self.layout)
        layer = self.config.layer
        if layer is None and not self.is_vit:
            with self._fp32_on_cpu(images_B3SS):
                map_BCHW = self.model.forward_features(images_B3SS)
            return map_BCHW.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else map_BCHW
        options: dict[str, Any] = {"indices": [-1 if layer is None else layer], "intermediates_only": True}
        if self.is_vit:
            options["norm"] = True
            if self.training and getattr(self.model.patch_drop, "prob", 0) > 0:
                options["output_fmt"] = "NLC"
        out = self.model.forward_intermediates(images_B3SS, **options)[0]
        return out.transpose(1, 2)[:, :, None] if options.get("output_fmt") == "NLC" else out


class OpenClipTower(VisionTower):
    def __init__(self, config: VisionConfig, load_weights: bool = True):
        super().__init__(config)
        visual, stats = create_open_clip(config, load_weights)
        if not hasattr(visual, "forward_intermediates"):
            raise UserError(
                f"model.vision.name={config.name}: this open_clip tower gives no feature map; use a ViT or timm"
            )
        self.mean = config.mean or stats[0]
        self.std = config.std or stats[1]
        if config.gradient_checkpointing:
            visual.set_grad_checkpointing(True)
        for unused in ("proj", "attn_pool"):
            if getattr(visual, unused, None) is not None:
                setattr(visual, unused, None)
        self.visual = visual
        self.width = int(visual.ln_post.normalized_shape[0])

    @torch.no_grad()
    def trunk(self, images_B3SS: Tensor) -> Tensor:
        return self(images_B3SS)

    def rest(self, hidden: Tensor) -> Tensor:
        return hidden

    def set_patch_dropout(self, share: float) -> None:
        from open_clip.transformer import PatchDropout

        self.visual.patch_dropout = PatchDropout(share, exclude_first_token=True) if share else nn.Identity()

    def forward(self, images_B3SS: Tensor) -> Tensor:
        dropping = self.training and getattr(self.visual.patch_dropout, "prob", 0) > 0
        out = self.visual.forward_intermediates(
            images_B3SS,
            indices=[-1 if self.config.layer is None else self.config.layer],
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC" if dropping else "NCHW",
        )["image_intermediates"][0]
        return out.transpose(1, 2)[:, :, None] if dropping else out


def create_tower(config: VisionConfig, load_weights: bool = True) -> VisionTower:
    """Builds the tower. `load_weights=False` builds its shape only (weights come from elsewhere)."""
    return {"timm": TimmTower, "open_clip": OpenClipTower}[config.library](config, load_weights)


# --- timm ---------------------------------------------------------------------------------------------------------


def create_timm(config: VisionConfig, load_weights: bool = True) -> Any:
    """A timm model with its classifier. `pretrained`: a timm tag (`a1_in1k`, or `default`), or a local .safetensors / .pth file."""
    import timm

    assert config.name is not None
    weights = config.pretrained if load_weights else None
    local = weights is not None and (weights.endswith((".safetensors", ".pth", ".pt", ".bin")) or "/" in weights)
    name = config.name if weights is None or local or weights == "default" else f"{config.name}.{weights}"
    if not timm.is_model(config.name.split(".")[0]):
        near = timm.list_models(f"*{config.name.split('_')[0]}*")[:3]
        raise UserError(
            f"model.vision.name={config.name}: timm has no such model" + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        model: Any = timm.create_model(name, pretrained=weights is not None and not local, **config.config)
    except (TypeError, RuntimeError, OSError) as e:
        raise UserError(f"model.vision: timm could not make {name}: {_one_line(e)}") from e
    if local:
        assert weights is not None
        _load_state(model, Path(weights))
    return model


def _load_state(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"model.vision.pretrained={path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as e:
        raise UserError(f"model.vision.pretrained={path}: does not fit the model: {_one_line(e)}") from e
    # Folded batch norms leave running statistics out; anything else missing is a wrong file.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"model.vision.pretrained={path}: does not fit the model: {len(missing)} parameters missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unknown ({', '.join(unexpected[:3])})"
        )


# --- open_clip ----------------------------------------------------------------------------------------------------


def create_open_clip(config: VisionConfig, load_weights: bool = True) -> tuple[Any, tuple[Any, Any]]:
    """The image side of an open_clip model, and its mean and standard deviation."""
    import open_clip

    logging.getLogger().addFilter(_no_random_init_warning)
    if config.config:
        settings = {"vision_cfg": config.config, "embed_dim": int(config.config.get("width", 768))}
        return _open_clip_from_settings(settings, config), CLIP_STATS
    if config.config_file:
        import json

        path = Path(config.config_file)
        if not path.is_file():
            raise UserError(f"model.vision.config_file={path}: no such file")
        try:
            return _open_clip_from_settings(json.loads(path.read_text()), config, load_weights), CLIP_STATS
        except (json.JSONDecodeError, KeyError) as e:
            raise UserError(f"model.vision.config_file={path}: not an open_clip model config ({_one_line(e)})") from e
    assert config.name is not None
    on_hub = config.name.startswith(("hf-hub:", "local-dir:"))
    if not on_hub and config.name not in open_clip.list_models():
        near = [m for m in open_clip.list_models() if config.name.lower()[:5] in m.lower()][:3]
        raise UserError(
            f"model.vision.name={config.name}: open_clip has no such model"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    options: dict[str, Any] = {"device": torch.get_default_device()}
    if not on_hub:
        size = open_clip.get_model_config(config.name)["vision_cfg"].get("image_size", 224)  # pyright: ignore[reportOptionalSubscript]
        if size != config.image_size:
            options["force_image_size"] = config.image_size
    try:
        model = open_clip.create_model(
            config.name,
            pretrained=config.pretrained if load_weights else None,
            load_weights=load_weights and (on_hub or config.pretrained is not None),
            **options,
        )
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"model.vision: open_clip could not make {config.name}: {_one_line(e)}") from e
    stats = open_clip.get_model_preprocess_cfg(model)
    return model.visual, (tuple(stats.get("mean", CLIP_STATS[0])), tuple(stats.get("std", CLIP_STATS[1])))


def _open_clip_from_settings(settings: dict[str, Any], config: VisionConfig, load_weights: bool = True) -> Any:
    import open_clip

    vision = {"image_size": config.image_size, **settings["vision_cfg"]}
    # The text side is not used; the smallest that open_clip will build.
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    try:
        model = open_clip.CLIP(settings["embed_dim"], vision_cfg=vision, text_cfg=text)
    except (TypeError, AssertionError, RuntimeError) as e:
        raise UserError(f"model.vision: open_clip could not build this vision_cfg: {_one_line(e)}") from e
    if config.pretrained and load_weights:
        path = Path(config.pretrained)
        if not path.is_file():
            raise UserError(
                f"model.vision.pretrained={path}: no such file (a config_file goes with a local checkpoint)"
            )
        state = open_clip.factory.load_state_dict(str(path))
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
        try:
            model.visual.load_state_dict(state)
        except RuntimeError as e:
            raise UserError(f"model.vision.pretrained={path}: does not fit config_file: {_one_line(e)}") from e
    return model.visual


def _no_random_init_warning(record: logging.LogRecord) -> bool:
    """open_clip warns on the root logger when a model is built random on purpose."""
    return "No pretrained weights loaded" not in record.getMessage()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"
