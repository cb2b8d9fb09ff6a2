"""Every shipped config builds: its shapes on the meta device, without weights, data or a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgem.config import TrainingConfig, load_config
from mmgem.errors import UserError
from mmgem.training.check import check, meta_counts
from mmgem.training.estimate import Weights, engine_of, states

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_builds(path: Path) -> None:
    config = load_config(path)
    counts, shapes = meta_counts(config)
    assert counts["all"] == counts["vision"] + counts["llm"] + counts["projections"]
    assert all(count > 0 for count in counts.values())
    assert shapes["embedding"] == f"E = {config.model.embed_dim}"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_real_sizes(stage: str) -> None:
    """ViT-L/14 without class projection, and TinyLlama 1.1B as published: 1,100,048,384 parameters."""
    config = load_config(CONFIGS[0].parent / f"{stage}_vit_l14_tinyllama.yaml")
    counts, shapes = meta_counts(config)
    width, dim, llm = 1024, 768, 2048
    blocks = 24 * (12 * width**2 + 13 * width)
    around = 3 * 14 * 14 * width + width + 257 * width + 2 * 2 * width
    assert counts["vision"] == blocks + around == 303_179_776
    assert counts["llm"] == 1_100_048_384
    heads = (width * dim + dim) + (llm * dim + dim) + (dim * llm + llm)
    assert counts["projections"] == heads + 2 * llm + 1
    assert shapes["feature map"] == "C x H x W = 1024 x 16 x 16"


def test_seven_billion() -> None:
    """Llama 2 7B as published: 6,738,415,616 parameters. On 64 GPUs of 80 GB its states fit with ZeRO 3, and with DDP
    they do not."""
    config = load_config(CONFIGS[0].parent / "stage1_vit_l14_7b_zero3.yaml")
    counts, _ = meta_counts(config)
    width, dim, llm = 1024, 1024, 4096
    heads = (width * dim + dim) + (llm * dim + dim) + (dim * llm + llm)
    assert counts["llm"] == 6_738_415_616 and counts["projections"] == heads + 2 * llm + 1
    weights = Weights(counts["all"], counts["all"], 0)
    assert config.training.strategy == "deepspeed_3"
    assert states(engine_of(config.training, 64, True, True), weights).total < 10e9
    assert states(engine_of(TrainingConfig(strategy="ddp"), 64, True, True), weights).total > 80e9


def test_stage_2_goes_on_from_stage_1() -> None:
    first, second = (load_config(CONFIGS[0].parent / f"stage{n}_vit_l14_tinyllama.yaml") for n in (1, 2))
    assert second.init_from == first.run
    assert meta_counts(first)[0] == meta_counts(second)[0]
    assert second.stages[0].max_regions > 0


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["model.llm.name=org/llm"], "org/llm"),
        (["model.tokenizer.path=org/words"], "org/words"),
        (["model.llm.name=org/llm", "model.tokenizer.path=org/words"], "org/llm"),  # its rows, whatever the tokenizer
        (["model.llm.name=org/llm", "model.llm.config.vocab_size=null"], "org/llm"),
    ],
)
def test_a_vocabulary_of_unknown_size_is_refused(overrides: list[str], source: str) -> None:
    path = CONFIGS[0].parent / "quickstart.yaml"
    message = f"^model.llm.config.vocab_size: missing, and {source} is not loaded here; set it .*$"
    with pytest.raises(UserError, match=message) as caught:
        check(load_config(path, overrides))
    assert "\n" not in str(caught.value)
    rows = [meta_counts(load_config(path, [*overrides, f"model.llm.config.vocab_size={n}"]))[0] for n in (1000, 1500)]
    assert rows[1]["llm"] - rows[0]["llm"] == 500 * 128  # tied: one table of so many rows of hidden_size


def test_a_named_llm_that_is_not_described_is_refused() -> None:
    path = CONFIGS[0].parent / "quickstart.yaml"
    with pytest.raises(UserError, match=r"model\.llm\.config: describe org/llm here"):
        check(load_config(path, ["model.llm.name=org/llm", "model.llm.config={vocab_size: 1000}"]))


def test_an_unknown_llm_setting_is_refused() -> None:
    config = load_config(CONFIGS[0].parent / "quickstart.yaml", ["model.llm.config.hiden_size=64"])
    with pytest.raises(UserError, match="hiden_size: llama has no such setting; did you mean hidden_size"):
        check(config)
