"""Tiny working parts: a tokenizer, a whole model, pictures, a split of shards. Random weights, but wide ones, so that
different inputs give clearly different outputs."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgem import MMGem
from mmgem.config import LlmConfig, ModelConfig, VisionConfig
from mmgem.data.samples import Region, Sample
from mmgem.data.writer import ShardWriter
from mmgem.losses.contrastive import contrastive_loss
from mmgem.losses.pairs import find_pairs
from mmgem.model.vision import create_tower
from mmgem.text import TextCodec, train_tokenizer

TEXTS = (
    "a red dog on the grass",
    "two men ride a bicycle down the street",
    "the cat",
    "a small blue cube left of a large ball",
    "children play in the water near a boat",
    "snow",
    "a woman in a yellow dress reads a book under a tree",
    "the bird sits on a wire",
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}

CNN: dict[str, Any] = {"channels": [8, 16, 24, 32], "stem_width": 8}


def tokenizer() -> Any:
    return train_tokenizer([t for t in TEXTS for _ in range(3)], 300, lowercase=True)


def codec(max_tokens: int = 16) -> TextCodec:
    return TextCodec(tokenizer(), max_tokens)


def cnn(**changes: Any) -> VisionConfig:
    return VisionConfig(**{"name": "resnet10t", "config": CNN, "image_size": 64, **changes})


def timm_vit(**changes: Any) -> VisionConfig:
    config = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return VisionConfig(**{"name": "vit_tiny_patch16_224", "config": config, "image_size": 64, **changes})


def clip_vit(**changes: Any) -> VisionConfig:
    config = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    return VisionConfig(**{"library": "open_clip", "config": config, "image_size": 64, **changes})


def tower(config: VisionConfig) -> Any:
    torch.manual_seed(0)
    return create_tower(config).eval()


def model_config(llm: dict[str, Any] | None = None, attention: Any = "sdpa", **changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "vision": cnn(),
            "llm": LlmConfig(config=llm or LLAMA, attention=attention),
            "embed_dim": 32,
            "max_tokens": 16,
            **changes,
        }
    )


def build(config: ModelConfig | None = None, seed: int = 0) -> MMGem:
    """A new model in evaluation mode."""
    torch.manual_seed(seed)
    model = MMGem(config or model_config(), tokenizer()).eval()
    with torch.no_grad():
        model.language.added.rows_2D.mul_(5)  # as far from each other as words are
    return model


@functools.cache
def shared_model() -> MMGem:
    """One model for tests that do not change it."""
    return build()


def picture(number: int, width: int = 80, height: int = 60) -> Image.Image:
    """Smooth random colours: no two alike, and JPEG keeps them well."""
    rough = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def pixels(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def sample(number: int, captions: Sequence[str] | None = None, regions: Sequence[Region] | None = None) -> Sample:
    """An 80 x 60 picture with three captions and three boxes, two of one entity."""
    default = (
        Region((2.0, 3.0, 40.0, 50.0), f"thing {number}", "first"),
        Region((2.0, 3.0, 42.0, 50.0), f"the same thing {number}", "first"),
        Region((30.0, 10.0, 80.0, 60.0), f"other {number}"),
    )
    return Sample(
        key=f"key{number:03d}",
        image=encoded(picture(number)),
        captions=tuple(captions if captions is not None else [f"{TEXTS[number % 8]} {v}" for v in "abc"]),
        regions=tuple(default if regions is None else regions),
        width=80,
        height=60,
        meta={},
    )


def write_split(folder: Path, samples: Sequence[Sample], shard_size: int = 4) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for one in samples:
            writer.write(one)
    return folder


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], share: float) -> None:
    """The same parameters have gradients, and no value of any differs by more than `share` of the largest one."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= share * max(1.0, gradient.abs().max().item()), name


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    assert found, "nothing has a gradient"
    return found


# --- losses ---------------------------------------------------------------------------------------------------------


def with_mask(x_NE: Tensor, y_ME: Tensor, positive_NM: Tensor, logit_scale: Tensor, **options: Any) -> Tensor:
    """The loss with these positives: a text is given to each of its rows, or to nobody."""
    owners, texts = positive_NM.nonzero().unbind(1)
    nobody = (~positive_NM.any(dim=0)).nonzero()[:, 0]
    owners, texts = torch.cat([owners, torch.full_like(nobody, -1)]), torch.cat([texts, nobody])
    return contrastive_loss(x_NE, torch.arange(len(x_NE)), y_ME[texts], owners, texts, logit_scale, **options)


def positives(owner_N: Tensor, text_owner_M: Tensor, text_M: Tensor) -> Tensor:
    """N x M: each pair with a distinct text, spread over all texts that are equal to it."""
    pairs = find_pairs(owner_N, text_owner_M, text_M)
    distinct = text_M[pairs.kept_m]
    positive_NU = torch.zeros(len(owner_N), len(distinct), dtype=torch.bool)
    positive_NU[pairs.row_P, pairs.column_P] = True
    assert pairs.positives_N.tolist() == positive_NU.sum(1).tolist()
    assert pairs.positives_U.tolist() == positive_NU.sum(0).tolist()
    assert (pairs.rows, pairs.texts) == (int(positive_NU.any(1).sum()), int(positive_NU.any(0).sum()))
    assert len(pairs.row_P) == positive_NU.sum() and pairs.counts == [len(distinct)]
    return positive_NU.int() @ (distinct[:, None] == text_M[None]).int() > 0
