"""logit_scale and logit_bias, apart from what an engine casts, shares out or clips.

Receives the model. Takes the two out of it for the time of a stage and trains them here: in fp32 (bf16 could not hold
the steps of a logit_scale of 4), whole on each rank, in the same way whatever trains the rest. Gives them back.
"""

from __future__ import annotations

from typing import Any

import torch

from mmgem.config import StageConfig
from mmgem.losses.gather import ranks, sum_over_ranks
from mmgem.model import MMGem

NAMES = ("logit_scale", "logit_bias")


class Temperature:
    def __init__(self, model: MMGem, stage: StageConfig):
        self.model = model
        self.parameters = {name: p for name in NAMES if (p := getattr(model, name)) is not None}
        self.trains = "projections" not in stage.freeze
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.trains)
            delattr(model, name)
            object.__setattr__(model, name, parameter)  # no parameter of the module any more, but still its attribute
        self.lr = stage.lr * stage.lr_scale.get("projections", 1.0)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.lr, betas=stage.betas, weight_decay=0.0)

    def give_back(self) -> None:
        for name, parameter in self.parameters.items():
            self.model.__dict__.pop(name)
            parameter.grad = None
            setattr(self.model, name, parameter)

    def to(self, device: torch.device) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)

    def step(self, lr_factor: float) -> None:
        """One step with the mean of the ranks' gradients, as the others are."""
        if not self.trains:
            return
        for parameter in self.parameters.values():
            if ranks() > 1:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = sum_over_ranks(gradient) / ranks()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_logit_scale()

    def state_dict(self) -> dict[str, Any]:
        values = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
        return {"values": values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["values"][name])
        self.optimizer.load_state_dict(state["optimizer"])
