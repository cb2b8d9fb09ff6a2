"""Every shipped config builds: its shapes on the meta device, without weights, data or a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgem.config import load_config
from mmgem.training.check import check, meta_counts

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
    text = check(config)
    assert "303,179,776" in text and "1,100,048,384" in text


def test_stage_2_goes_on_from_stage_1() -> None:
    first, second = (load_config(CONFIGS[0].parent / f"stage{n}_vit_l14_tinyllama.yaml") for n in (1, 2))
    assert second.init_from == first.run
    assert meta_counts(first)[0] == meta_counts(second)[0]
    assert second.stages[0].max_regions > 0
