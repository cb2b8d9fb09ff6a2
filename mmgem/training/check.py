"""What a config would build, without building it: shapes on the meta device, counts of parameters.

Receives a Config. Gives a text. Refuses what cannot be built. Needs neither weights nor a GPU; an LLM named by a hub
id is built from `model.llm.config`, which therefore has to describe it.
"""

from __future__ import annotations

import copy

import torch

from mmgem.config import Config, ModelConfig
from mmgem.data.plan import stage_length
from mmgem.errors import UserError
from mmgem.model import MMGem
from mmgem.model.language import refuse_unknown_settings
from mmgem.text import train_tokenizer
from mmgem.training.run import count_parameters


def check(config: Config) -> str:
    counts, shapes = meta_counts(config)
    width = max(len(part) for part in counts)
    lines = [f"{part:<{width}}  {count:>15,} parameters" for part, count in counts.items()]
    lines += [f"{name}: {value}" for name, value in shapes.items()]
    for stage in config.stages:
        regions = f", up to {stage.max_regions} regions an image" if stage.max_regions else ""
        frozen = ", ".join(stage.freeze) or "nothing"
        lines.append(
            f"stage {stage.name}: {stage_length(stage)}, global_batch {stage.global_batch}{regions}, frozen: {frozen}"
        )
    return "\n".join(lines)


def meta_counts(config: Config) -> tuple[dict[str, int], dict[str, str]]:
    """Parameters by part, and the shapes along the path for one picture, from a model on the meta device."""
    settings = copy.deepcopy(config.model)
    _refuse_unknown_sizes(settings)
    # Any tokenizer does: the vocabulary of a named LLM or tokenizer is in llm.config, and one that is trained has the
    # size that is set.
    tokenizer = train_tokenizer(["a"], 300, lowercase=True)
    if not (settings.llm.name or settings.tokenizer.path):
        settings.llm.config["vocab_size"] = max(settings.tokenizer.vocab_size, settings.llm.config.get("vocab_size", 0))
    with torch.device("meta"):
        model = MMGem(settings, tokenizer, load_weights=False)
        size = settings.vision.image_size
        map_BCHW = model.vision.eval()(torch.zeros(1, 3, size, size))
    shapes = {
        "feature map": "C x H x W = " + " x ".join(str(s) for s in map_BCHW.shape[1:]),
        "embedding": f"E = {settings.embed_dim}",
        "LLM width": f"D = {model.language.width}",
    }
    refuse_unknown_settings(config.model.llm.config, model.language.hf.config)
    return count_parameters(model), shapes


def _refuse_unknown_sizes(settings: ModelConfig) -> None:
    """What only a named LLM or tokenizer would tell has to be in `llm.config`; a guess would be printed as fact."""
    llm, source = settings.llm, settings.llm.name or settings.tokenizer.path
    if llm.name and "model_type" not in llm.config:
        raise UserError(f"model.llm.config: describe {llm.name} here (model_type, hidden_size …) to check without it")
    if source and not llm.config.get("vocab_size"):
        raise UserError(
            f"model.llm.config.vocab_size: missing, and {source} is not loaded here; set it to the size of {source}'s "
            "vocabulary to check without it"
        )
