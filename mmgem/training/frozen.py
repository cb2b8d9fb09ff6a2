"""Frozen parts are not saved with each checkpoint: they are recorded by origin and hash, and verified when they come
back.

Receives a stage's model, config and run folder. Gives the records that a checkpoint keeps, and the weights that they
stand for. Refuses an origin that is gone, or that holds other weights now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgem.config import Config
from mmgem.errors import UserError
from mmgem.model import MMGem
from mmgem.model.pretrained import load_weights, model_folder

PRETRAINED = "pretrained"
"""The origin of what the config's `model.vision.pretrained` and `model.llm.name` name."""
Records = list[dict[str, Any]]


def records(model: MMGem, config: Config, stage_number: int, run: Path) -> Records:
    """For each origin of what is frozen in this stage: which parameters, and the sha256 of their bytes.

    A stage after the first begins with what the one before it left in the run's folder, the first with `init_from`, or
    with pretrained parts. What is frozen and random has no origin, and is saved.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if stage_number > 0:
        found = {f"stages/{config.stages[stage_number - 1].name}": frozen}
        if not (run / next(iter(found))).is_dir():
            return []
    elif config.init_from is not None:
        found = {str(model_folder(Path(config.init_from)).absolute()): frozen}
    else:
        loaded = ("vision.",) * (config.model.vision.pretrained is not None) + ("language.hf.",) * bool(
            config.model.llm.name
        )
        found = {PRETRAINED: {name: p for name, p in frozen.items() if name.startswith(loaded)} if loaded else {}}
    return [
        {"origin": origin, "names": sorted(parameters), "sha256": sha256(parameters)}
        for origin, parameters in found.items()
        if parameters
    ]


def sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_pretrained(records: Iterable[dict[str, Any]]) -> bool:
    """Whether a model that is built with its pretrained weights already holds some of them."""
    return any(record["origin"] == PRETRAINED for record in records)


def restore(records: Iterable[dict[str, Any]], model: MMGem, run: Path, checkpoint: Path) -> None:
    """Fills in what the records stand for; `model` was built with pretrained weights if `is_pretrained`.

    Raises UserError where an origin is gone or has changed.
    """
    for record in records:
        origin, names = record["origin"], record["names"]
        if origin != PRETRAINED:
            folder = model_folder(run / origin)
            present = {name: p.detach().clone() for name, p in model.named_parameters() if name not in names}
            load_weights(model, folder)
            model.load_state_dict(present, strict=False)
        parameters = dict(model.named_parameters())
        if sha256({name: parameters[name] for name in names}) != record["sha256"]:
            where = "model.vision.pretrained or model.llm.name" if origin == PRETRAINED else str(run / origin)
            raise UserError(
                f"{checkpoint}: its frozen parts ({len(names)} tensors) were those of {where}, which now holds others "
                f"(sha256 is not {record['sha256'][:12]}); put the right ones back"
            )
