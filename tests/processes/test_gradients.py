"""What moves the weights does not depend on how a step is cut up: over ranks, over micro-batches, by a strategy.

Ranks are real processes over gloo that take real steps in fp32; see `gradient_ranks`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from gradient_ranks import Case, first_model
from tiny import Process
from torch import Tensor

SCRIPT = Path(__file__).with_name("gradient_ranks.py")
RANKS = 4
MOST = 1e-5
"""Relative: of a figure, and of a parameter's largest gradient."""
STRATEGIES = ("none", "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp2")
MODELS = ("cnn_tied", "vit_untied")
UNEVEN = 3
"""Micro-batches of 3, 3 and 2: the last of a rank's is smaller."""


def cases_of(strategy: str) -> list[Case]:
    """Every stage, loss and way to take a step, each with one of the two models, or both; parts frozen, too."""
    cases: list[Case] = []
    for number, (regions, kind, micro) in enumerate(product((False, True), ("infonce", "sigmoid"), (None, UNEVEN))):
        turn = (number.bit_count() + STRATEGIES.index(strategy)) % 2
        models = MODELS if strategy == "ddp" else (MODELS[turn],)
        cases += [Case(model, regions, kind, strategy, micro) for model in models]
    if strategy not in ("deepspeed_1", "deepspeed_2"):  # which treat parts that are frozen as the others do
        cases.append(Case("vit_untied", True, "infonce", strategy, UNEVEN, freeze=("llm",)))
        cases.append(Case("cnn_tied", True, "sigmoid", strategy, None, freeze=("vision",)))
    return [case for case in cases if case != reference(case)]


def reference(case: Case) -> Case:
    """One rank, all 32 samples at once."""
    return replace(case, strategy="none", micro_batch=None)


Outcome = tuple[dict[str, float], dict[str, Tensor | None]]


class Launch:
    """So many ranks that work through cases."""

    def __init__(self, out: Path, count: int, cases: list[Case]):
        out.mkdir()
        self.out, self.count = out, count
        listed = json.dumps([dataclasses.asdict(case) for case in dict.fromkeys(cases)])
        self.process = Process(out, str(count), listed, script=SCRIPT)
        self.stderr = ""

    def wait(self) -> None:
        self.stderr = self.process.wait(timeout=480).err

    def outcomes(self, case: Case) -> list[Outcome]:
        """Of each rank."""
        files = [self.out / f"{case.name}.{rank}.pt" for rank in range(self.count)]
        assert all(file.is_file() for file in files), f"{case.name}: not finished\n{self.stderr}"
        saved = [torch.load(file) for file in files]
        return [(one["figures"], one["gradients"]) for one in saved]


@dataclasses.dataclass
class Difference:
    figures: float = 0.0
    gradients: float = 0.0
    worst: str = ""

    def add(self, found: Outcome, wanted: Outcome) -> Difference:
        """Also asserts that both have the same figures and the same gradients, those of 0 in the same places."""
        assert found[0].keys() == wanted[0].keys() and found[1].keys() == wanted[1].keys()
        for name, figure in wanted[0].items():
            assert math.isfinite(found[0][name]), name
            self.figures = max(self.figures, abs(found[0][name] - figure) / abs(figure))
        for name, gradient in wanted[1].items():
            other = found[1][name]
            if not has_gradient(gradient):
                assert not has_gradient(other), name
                continue
            assert gradient is not None and other is not None and other.shape == gradient.shape, name
            share = float((other - gradient).abs().max() / gradient.abs().max())
            assert math.isfinite(share), name
            if share > self.gradients:
                self.gradients, self.worst = share, name
        return self

    @property
    def small(self) -> bool:
        return self.figures <= MOST and self.gradients <= MOST

    def row(self, name: str) -> str:
        return f"{name:62} {self.figures:8.1e} {self.gradients:10.1e}  {self.worst}"


HEAD = f"{'largest relative difference':62} {'figures':>8} {'gradients':>10}  of"


def has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def trained_names(case: Case) -> set[str]:
    parts = first_model(case.model).parts()
    return {name for part, parameters in parts.items() if part not in case.freeze for name, _ in parameters}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Launch, Launch]:
    """One rank, and four: those of all strategies one after another, for their imports take longer than many steps."""
    folder = tmp_path_factory.mktemp("gradients")
    several = [case for strategy in STRATEGIES[1:] for case in cases_of(strategy)]
    alone = [*(reference(case) for case in several), *cases_of("none")]
    found = Launch(folder / "one", 1, alone), Launch(folder / "four", RANKS, several)
    for launch in found:
        launch.wait()
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_ranks_of_8_take_the_step_of_one_of_32(strategy: str, launches: tuple[Launch, Launch]) -> None:
    """Also where captions are of 1 word on one rank and of 60 on another, boxes ragged and on one rank none."""
    one, four = launches
    differences = {}
    for case in cases_of(strategy):
        wanted = one.outcomes(reference(case))[0]
        assert wanted[1].keys() == trained_names(case)
        without = {name for name, gradient in wanted[1].items() if not has_gradient(gradient)}
        assert without == ({"logit_bias"} if case.kind == "infonce" else set()), "each of the others is compared"
        assert {name.removeprefix("loss_") for name in wanted[0]} == {
            "loss", "logit_scale", "emb", "gen", *(("region_emb", "region_gen") if case.regions else ())
        }  # fmt: skip
        differences[case.name] = Difference()
        for found in (one if strategy == "none" else four).outcomes(case):
            differences[case.name].add(found, wanted)
    print("\n" + "\n".join([HEAD, *(difference.row(name) for name, difference in differences.items())]))
    assert all(difference.small for difference in differences.values())


DRAWING = [
    Case("dropout", False, patch_dropout=0.5, micro_batch=5),
    Case("dropout", True, micro_batch=5),
    Case("dropout", True, "sigmoid", micro_batch=5),
    Case("visual_dropout", False, patch_dropout=0.5, micro_batch=5),
]
"""Wherever random numbers are drawn: in the LLM and before it, in the heads, in the tower; and in the tower alone."""


@pytest.mark.parametrize(("count", "strategy"), [(1, "none"), (2, "ddp")])
def test_cached_draws_as_one_forward_would(count: int, strategy: str, tmp_path: Path) -> None:
    """Against micro-batches that are forwarded once, with their graphs, and one loss that goes back through all."""
    by_hand = [replace(case, strategy="by_hand") for case in DRAWING]
    others = [replace(case, seed=1) for case in by_hand]
    cached = [replace(case, strategy=strategy) for case in DRAWING]
    launch = Launch(tmp_path / "ranks", count, [*by_hand, *others, *cached])
    launch.wait()
    for case, other in zip(by_hand, others, strict=True):
        drawn = Difference().add(launch.outcomes(other)[0], launch.outcomes(case)[0])
        assert drawn.gradients > 0.1, "with other random numbers it is another step"
    rows, small = [HEAD], True
    for case in cached:
        wanted = launch.outcomes(replace(case, strategy="by_hand"))
        difference = Difference()
        for found, reference_of_rank in zip(launch.outcomes(case), wanted, strict=True):
            found[0].pop("logit_scale")
            difference.add(found, reference_of_rank)
        rows.append(difference.row(case.name))
        small &= difference.small
    print("\n" + "\n".join(rows))
    assert small
