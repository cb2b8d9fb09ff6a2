"""The vision tower: pictures in, a feature map out.

Receives a VisionConfig and the model that `vision_weights` makes of it. Gives `VisionTower`: normalised pictures
B x 3 x S x S -> map_BCHW without class token. Refuses models that give no map, and cuts that the model does not have.

A tower may be cut in two: `trunk` (frozen for good, its output can be cached) and `rest` (may train).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.model.vision_weights import create_open_clip, create_timm


class VisionTower(nn.Module):
    """Base: subclasses give `forward` and say where the tower can be cut."""

    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.portable: dict[str, Any] = {}
        """Settings that replace the config's own where the tower is to be built without hub and files."""

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
        fixed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if fixed_size not in (None, (config.image_size,) * 2) and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=config.image_size)
        self.model = model
        self.is_vit = hasattr(model, "blocks") and hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens")
        if config.gradient_checkpointing:
            model.set_grad_checkpointing(True)
        train_depthwise_in_fp32(model)
        # Convolutions on CPU and on tensor cores are 1.3 to 3 times faster in this layout.
        self.layout = torch.contiguous_format if self.is_vit else torch.channels_last
        model.to(memory_format=self.layout)
        self.joined = [self._find(name, "join") for name in config.join]
        chosen = config.frozen_statistics
        self.frozen_statistics = config.pretrained is not None if chosen is None else chosen
        self.cut = 0
        if config.train_from is not None:
            self.cut = self._find(config.train_from, "train_from")
            early = [n for n, i in zip(config.join, self.joined, strict=True) if i < self.cut - 1]
            if early:
                raise UserError(
                    f"model.vision.join: {', '.join(early)} comes before what a tower cut at {config.train_from} "
                    "keeps; join later modules, or set train_from to the one after the earliest"
                )
            for parameter in self.frozen_parameters():
                parameter.requires_grad_(False)
        self.width = self._width()
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmTower:
        """What is frozen for good stays in evaluation, with its statistics: `trunk` gives what a cache has of it."""
        super().train(mode)
        for layer in self._layers()[: self.cut] if self.cut else ():
            layer.eval()
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _width(self) -> int:
        if self.joined:  # found by trying; the modes are set after it
            size = self.config.image_size
            self.model.eval()
            with torch.no_grad():
                return self._run(torch.zeros(1, 3, size, size, device=next(self.parameters()).device), 0).shape[1]
        if self.config.layer is None or self.is_vit:
            return int(self.model.num_features)
        return int(self.model.feature_info[self.config.layer]["num_chs"])

    def _layers(self) -> list[nn.Module]:
        """The tower as a plain sequence, up to its pooling."""
        if not hasattr(self.model, "as_sequential"):
            raise UserError(
                f"model.vision: timm's {self.config.name} is no plain sequence; leave train_from and join out, and "
                "freeze all of vision instead"
            )
        layers = list(self.model.as_sequential())
        head = {id(m) for m in (self.model.global_pool, getattr(self.model, "classifier", None)) if m is not None}
        stop = next((i for i, layer in enumerate(layers) if id(layer) in head), len(layers))
        return layers[:stop]

    def _find(self, name: str, setting: str) -> int:
        """The number of a module of the sequence."""
        modules = dict(self.model.named_modules())
        if self.config.layer is not None:
            raise UserError(f"model.vision: {setting} goes with the last layer only; leave layer empty")
        numbers = {id(layer): i for i, layer in enumerate(self._layers())}
        if name not in modules or id(modules[name]) not in numbers:
            names = [n for n, m in modules.items() if id(m) in numbers]
            raise UserError(
                f"model.vision.{setting}: {self.config.name} has no stage {name!r}; its stages: {', '.join(names)}"
            )
        return numbers[id(modules[name])]

    def _run(self, hidden: Tensor, start: int) -> Tensor:
        """The layers from `start` on; with the joined ones' maps, earliest first, before the last one's."""
        maps = {start - 1: hidden} if start - 1 in self.joined else {}
        for number, layer in enumerate(self._layers()[start:], start):
            hidden = layer(hidden)
            if number in self.joined:
                maps[number] = hidden
        grid = (hidden.shape[-2], hidden.shape[-1])
        return torch.cat([*(F.adaptive_avg_pool2d(m, grid) for m in maps.values()), hidden], 1) if maps else hidden

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
        if hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(next(self.parameters()).dtype)
        return self._run(hidden, self.cut)

    def set_patch_dropout(self, share: float) -> None:
        from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices

        if not hasattr(self.model, "patch_drop"):
            super().set_patch_dropout(share)
            return
        present = self.model.patch_drop
        if isinstance(present, (PatchDropout, PatchDropoutWithIndices)):
            present.prob = share
        elif share > 0:
            # Towers with rotary positions (timm's Eva) must know which patches are left; theirs is None when unused.
            kind = PatchDropout if isinstance(present, nn.Identity) else PatchDropoutWithIndices
            self.model.patch_drop = kind(share, num_prefix_tokens=self.model.num_prefix_tokens).train(self.training)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        if self.cut:
            return self.rest(self.trunk(images_B3SS))
        images_B3SS = images_B3SS.contiguous(memory_format=self.layout)
        layer = self.config.layer
        if self.joined:
            return self._run(images_B3SS, 0)
        if layer is None and not self.is_vit:
            map_BCHW = self.model.forward_features(images_B3SS)
            if map_BCHW.ndim != 4:
                raise UserError(f"model.vision.name={self.config.name}: gives no map of places; choose a CNN or a ViT")
            return map_BCHW.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else map_BCHW
        options: dict[str, Any] = {"indices": [-1 if layer is None else layer], "intermediates_only": True}
        if self.is_vit:
            options["norm"] = True
            if self.training and getattr(getattr(self.model, "patch_drop", None), "prob", 0) > 0:
                options["output_fmt"] = "NLC"
        out = self.model.forward_intermediates(images_B3SS, **options)[0]
        return out.transpose(1, 2)[:, :, None] if options.get("output_fmt") == "NLC" else out


class OpenClipTower(VisionTower):
    def __init__(self, config: VisionConfig, load_weights: bool = True):
        super().__init__(config)
        visual, stats, self.portable = create_open_clip(config, load_weights)
        # A CoCa tower's last norm belongs to its pooler, not to the places.
        if not hasattr(visual, "ln_post") or visual.attn_pool is not None:
            raise UserError(
                f"model.vision.name={config.name or config.config_file}: this open_clip tower gives no feature map; "
                "use open_clip's own CLIP ViTs, or library: timm"
            )
        self.mean = config.mean or stats[0]
        self.std = config.std or stats[1]
        if config.gradient_checkpointing:
            visual.set_grad_checkpointing(True)
        visual.proj = None  # not used
        self.visual = visual
        self.width = int(visual.ln_post.normalized_shape[0])

    @torch.no_grad()
    def trunk(self, images_B3SS: Tensor) -> Tensor:
        return self(images_B3SS)

    def rest(self, hidden: Tensor) -> Tensor:
        return hidden

    def set_patch_dropout(self, share: float) -> None:
        from open_clip.transformer import PatchDropout

        dropout = PatchDropout(share, exclude_first_token=True) if share else nn.Identity()
        self.visual.patch_dropout = dropout.train(self.training)

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


class _TrainsInFp32(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def train_depthwise_in_fp32(model: nn.Module) -> None:
    """On CPU the backward of a depthwise convolution is slower in bf16 than in fp32, unlike that of a pointwise one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.__class__ = _in_fp32(type(module))


@functools.cache
def _in_fp32(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return type(kind.__name__, (_TrainsInFp32, kind), {})
