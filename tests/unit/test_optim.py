"""AdamW by parts, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmgem.config import StageConfig
from mmgem.errors import UserError
from mmgem.training.optim import Parts, freeze, make_optimizer, schedule


@pytest.fixture
def parts() -> Parts:
    vision, llm, heads = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    return {
        "vision": [(f"vision.{n}", p) for n, p in vision.named_parameters()],
        "llm": [(f"llm.{n}", p) for n, p in llm.named_parameters()],
        "projections": [*heads.named_parameters(), ("logit_scale", nn.Parameter(torch.tensor(2.6)))],
    }


def trained(parts: Parts) -> set[str]:
    return {name for parameters in parts.values() for name, p in parameters if p.requires_grad}


def test_freezing_by_part(parts: Parts) -> None:
    freeze(parts, StageConfig(freeze=["vision", "projections"]), set())
    assert trained(parts) == {"llm.weight", "llm.bias"}
    freeze(parts, StageConfig(), set())
    assert len(trained(parts)) == 7, "the next stage trains them again"


def test_what_is_frozen_for_good_stays_frozen(parts: Parts) -> None:
    _, weight = parts["vision"][0]
    freeze(parts, StageConfig(), {id(weight)})
    assert "vision.weight" not in trained(parts) and "vision.bias" in trained(parts)


def test_groups(parts: Parts) -> None:
    stage = StageConfig(lr=1e-2, lr_scale={"vision": 0.1}, weight_decay=0.3, betas=(0.8, 0.9), freeze=["llm"])
    freeze(parts, stage, set())
    optimizer = make_optimizer(parts, stage)
    groups = {(g["part"], g["weight_decay"] > 0): g for g in optimizer.param_groups}
    assert set(groups) == {(p, d) for p in ("vision", "projections") for d in (True, False)}
    assert groups["vision", True]["lr"] == pytest.approx(1e-3)
    assert groups["projections", True]["lr"] == pytest.approx(1e-2)
    assert groups["projections", True]["weight_decay"] == 0.3 and groups["vision", False]["betas"] == (0.8, 0.9)
    undecayed = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    for part in ("vision", "projections"):
        for name, parameter in parts[part]:
            assert (id(parameter) in undecayed) == (parameter.ndim < 2), name
    in_groups = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(in_groups) == len(set(in_groups)) == 5


def test_nothing_to_train(parts: Parts) -> None:
    stage = StageConfig(name="still", freeze=["vision", "llm", "projections"])
    freeze(parts, stage, set())
    with pytest.raises(UserError, match="stage still: nothing trains"):
        make_optimizer(parts, stage)


def test_warm_up_is_linear_and_the_rest_a_cosine() -> None:
    factor = schedule(StageConfig(warmup=0.1, min_lr=0.2), 100)
    warm = [factor(step) for step in range(10)]
    assert warm == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.2 + 0.8 * 0.5), "half-way down the cosine"
    assert factor(99) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    falling = [factor(step) for step in range(10, 100)]
    assert falling == sorted(falling, reverse=True)
    assert factor(100) == factor(1000) == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_short_stages_have_a_rate_above_nothing(steps: int, warmup: float) -> None:
    factor = schedule(StageConfig(warmup=warmup), steps)
    assert all(0 < factor(step) <= 1 for step in range(steps))


def test_the_optimizer_follows_the_schedule(parts: Parts) -> None:
    stage = StageConfig(lr=1e-2, lr_scale={"llm": 2.0}, warmup=0.5)
    optimizer = make_optimizer(parts, stage)
    factor = schedule(stage, 8)
    follower = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(8):
        rates = {g["part"]: g["lr"] for g in optimizer.param_groups}
        assert rates["vision"] == pytest.approx(1e-2 * factor(step))
        assert rates["llm"] == pytest.approx(2e-2 * factor(step))
        optimizer.step()
        follower.step()
