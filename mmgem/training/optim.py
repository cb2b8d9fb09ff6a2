"""AdamW with a learning rate by part, warm-up and cosine by samples seen.

Receives the model's parts and a stage's settings. Gives the optimizer and its schedule. Refuses a stage in which
nothing trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mmgem.config import StageConfig
from mmgem.errors import UserError

Parts = dict[str, list[tuple[str, nn.Parameter]]]


def freeze(parts: Parts, stage: StageConfig, always_frozen: set[int]) -> None:
    """Sets requires_grad by the stage's `freeze`; parameters in `always_frozen` (by id) never train."""
    for part, parameters in parts.items():
        for _, parameter in parameters:
            parameter.requires_grad_(part not in stage.freeze and id(parameter) not in always_frozen)


def set_modes(model: nn.Module) -> None:
    """Of a model in training or evaluation: frozen parts, and a trunk before `train_from`, stay in evaluation, without
    dropout and moving statistics."""
    mode = model.training
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
            # transformers recomputes activations in training only, and a gradient may pass through a frozen LLM.
            module.training = mode and getattr(module, "gradient_checkpointing", False)


def make_optimizer(parts: Parts, stage: StageConfig) -> torch.optim.AdamW:
    """Groups by part and by decay: vectors and scalars (norms, biases) are not decayed."""
    groups = []
    for part, parameters in parts.items():
        lr = stage.lr * stage.lr_scale.get(part, 1.0)
        trained = [p for _, p in parameters if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in trained if (p.ndim >= 2) == decayed]
            if chosen:
                decay = stage.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": lr, "initial_lr": lr, "weight_decay": decay, "part": part})
    if not groups:
        raise UserError(f"stage {stage.name}: nothing trains; leave a part out of freeze")
    return torch.optim.AdamW(groups, betas=stage.betas)


def schedule(stage: StageConfig, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> factor on the learning rate: linear up over the warm-up, then a cosine down to `min_lr`."""
    warmup = stage.warmup * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1.0, steps - warmup)
        return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
