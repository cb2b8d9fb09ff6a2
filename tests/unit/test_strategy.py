"""Which strategy a run takes, what it tells DeepSpeed, and what is kept apart from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LLAMA, build, model_config

from mmgem.config import Config, ModelConfig, StageConfig, TrainingConfig
from mmgem.errors import UserError
from mmgem.ranks import Ranks
from mmgem.training.saved import RunState, Saved, refuse_other_strategy
from mmgem.training.strategy import deepspeed_settings, repeated_blocks, resolve
from mmgem.training.temperature import Temperature

ONE, FOUR = Ranks(), Ranks(0, 4, 0, 4)


def config(strategy: str = "auto", **stage: Any) -> Config:
    training = TrainingConfig(strategy=strategy)  # pyright: ignore[reportArgumentType]
    return Config(stages=[StageConfig(samples=10, **stage)], training=training)


def saved(strategy: str, parts: bool) -> Saved:
    weights = None if parts else {}
    return Saved(Path("c.ckpt"), RunState(), {}, {}, "{}", {}, [], strategy, 2, {}, weights)


def test_what_auto_means() -> None:
    assert resolve(config(), ONE, True, None) == resolve(config(), ONE, False, None) == "none"
    assert resolve(config(), FOUR, True, None) == "deepspeed_1"
    assert resolve(config(), FOUR, False, None) == "ddp"
    assert resolve(config(ema=0.9), FOUR, True, None) == "ddp", "an average of whole weights"
    assert resolve(config("ddp"), ONE, True, None) == "none"
    assert resolve(config("deepspeed_3"), ONE, False, None) == "deepspeed_3"
    assert resolve(config(), ONE, True, saved("deepspeed_1", parts=True)) == "deepspeed_1", "what its parts need"
    assert resolve(config(), FOUR, False, saved("none", parts=False)) == "ddp"


def test_a_checkpoint_goes_on_with_the_strategy_that_reads_it() -> None:
    refuse_other_strategy(saved("none", parts=False), "ddp")
    refuse_other_strategy(saved("ddp", parts=False), "none")
    refuse_other_strategy(saved("deepspeed_2", parts=True), "deepspeed_2")
    for strategy, other in (("deepspeed_2", "ddp"), ("deepspeed_2", "deepspeed_3"), ("none", "fsdp2")):
        with pytest.raises(UserError, match=f"saved with training.strategy={strategy}, not {other}; set it so"):
            refuse_other_strategy(saved(strategy, parts=True), other)


def test_deepspeeds_own_settings_go_before_ours() -> None:
    own = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}, "steps_per_print": 7}
    training = TrainingConfig(offload="optimizer", deepspeed=own)
    settings = deepspeed_settings(training, 2, torch.device("cpu"), 0.5)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 1000, True)
    assert zero["offload_optimizer"]["device"] == "cpu" and "offload_param" not in zero
    assert settings["gradient_clipping"] == 0.5 and settings["steps_per_print"] == 7
    assert own == {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}, "steps_per_print": 7}
    all_of_it = TrainingConfig(offload="parameters")
    assert {"offload_optimizer", "offload_param"} <= deepspeed_settings(all_of_it, 3, torch.device("cuda"), 0)[
        "zero_optimization"
    ].keys()


def test_the_layers_that_repeat() -> None:
    model = build()
    blocks = repeated_blocks(model)
    layers = list(model.language.backbone.layers)  # pyright: ignore[reportArgumentType]
    assert all(any(block is layer for block in blocks) for layer in layers)
    inside = [set(map(id, block.parameters())) for block in blocks]
    assert sum(map(len, inside)) == len(set().union(*inside)), "no layer within another"


def test_the_temperature_is_apart_for_a_stage_and_comes_back() -> None:
    model = build(dataclasses.replace(model_config(), init_logit_bias=-10.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    temperature = Temperature(model, StageConfig(samples=10, lr=0.5, lr_scale={"projections": 0.1}))
    assert before.keys() - dict(model.named_parameters()).keys() == {"logit_scale", "logit_bias"}
    assert "logit_scale" not in model.state_dict()
    model.logit_scale.grad, model.logit_bias.grad = torch.tensor(3.0), torch.tensor(-1e-3)  # pyright: ignore
    temperature.step(0.5)
    # Adam's first step is the rate times the sign, whatever the gradient's size: 0.5 · 0.1 · 0.5.
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07) - 0.025, abs=1e-6)
    assert model.logit_bias is not None and model.logit_bias.item() == pytest.approx(-10 + 0.025, abs=1e-4)
    state = temperature.state_dict()
    temperature.give_back()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and model.state_dict()["logit_scale"] == state["values"]["logit_scale"]
    other = build(dataclasses.replace(model_config(), init_logit_bias=-10.0))
    resumed = Temperature(other, StageConfig(samples=10, lr=0.5, lr_scale={"projections": 0.1}))
    resumed.load_state_dict(state)
    assert other.logit_scale == state["values"]["logit_scale"]
    assert resumed.state_dict()["optimizer"]["state"][0]["step"] == 1


def test_frozen_projections_keep_the_temperature() -> None:
    model = build()
    temperature = Temperature(model, StageConfig(samples=10, freeze=["projections"]))
    model.logit_scale.grad = torch.tensor(3.0)
    temperature.step(1.0)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize(
    ("changes", "llm", "draws"),
    [
        ({}, {}, False),
        ({"visual_dropout": 0.5}, {}, False),  # before the texts' path
        ({"token_dropout": 0.1}, {}, True),
        ({"head_dropout": 0.1}, {}, True),
        ({}, {"attention_dropout": 0.1}, True),
    ],
)
def test_whether_the_texts_path_draws_random_numbers(changes: Any, llm: Any, draws: bool) -> None:
    settings: ModelConfig = dataclasses.replace(model_config({**LLAMA, **llm}), **changes)
    assert build(settings).text_draws() is draws
