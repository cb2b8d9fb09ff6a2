"""What does not fit together in a config whose types are right.

Receives a Config. Gives what is wrong with it, one sentence each, that names the setting and what it may be. Refuses
nothing itself.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmgem.negatives import KINDS

if TYPE_CHECKING:
    from mmgem.config import Config, DataConfig, LossConfig, ModelConfig, StageConfig, TrainingConfig, VisionConfig

MOST_LANES = 10_000

PARTS = ("vision", "llm", "projections")
"""What can be frozen and given a learning rate. `projections`: h1, h2, h3, [EMB], [CAP] and logit_scale."""


def contradictions(config: Config) -> Iterator[str]:
    """All that is wrong, first things first."""
    for place in _not_finite(dataclasses.asdict(config)):
        yield f"{place[1:]} must be a finite number"
    yield from _of(
        (not 0 <= config.seed < 2**32, "seed must be 0 or more, and below 2^32"),
        (not config.stages, "stages: at least one stage is needed"),
    )
    names = [s.name for s in config.stages]
    yield from _of((len(set(names)) < len(names), f"stages: names must differ, given {names}"))
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            yield f"stages: {name!r} cannot be a folder's name; use letters, digits, '.', '_' and '-'"
    yield from _vision(config.model.vision)
    yield from _model(config.model)
    yield from _data(config.data, config.model.max_tokens)
    yield from _training(config.training)
    for number, stage in enumerate(config.stages):
        if stage.ema and config.training.strategy not in ("auto", "ddp"):
            yield f"stages.{number} ({stage.name}): ema wants whole weights; set training.strategy to ddp, or ema to 0"
        if stage.loss.kind == "sigmoid" and config.model.init_logit_bias is None:
            yield f"stages.{number} ({stage.name}): loss.kind=sigmoid needs model.init_logit_bias, e.g. -10"
        for message in (
            *_stage(stage),
            *_pictures(stage, config.model.vision),
            *_loss(stage.loss, stage.max_regions),
            *_negatives(stage),
        ):
            yield f"stages.{number} ({stage.name}): {message}"


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where a setting is infinite or no number; free-form `config`s are their library's."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if key != "config":
                yield from _not_finite(item, f"{place}.{key}")


def _of(*rules: tuple[Any, str]) -> Iterator[str]:
    """The messages of the rules that are broken."""
    yield from (message for broken, message in rules if broken)


def _at_least(place: str, settings: Any, lowest: int, *names: str) -> Iterator[str]:
    yield from (f"{place}{n} must be at least {lowest}" for n in names if getattr(settings, n) < lowest)


def _model(model: ModelConfig) -> Iterator[str]:
    llm = model.llm
    yield from _at_least("model.", model, 1, "max_tokens", "embed_dim", "roi_size")
    for name in ("visual_dropout", "head_dropout", "token_dropout"):
        if not 0 <= getattr(model, name) < 1:
            yield f"model.{name} must be at least 0 and below 1"
    yield from _of(
        (not 0 < model.h1_init <= 1, "model.h1_init must be above 0 and at most 1"),
        (model.init_logit_scale > math.log(100), "model.init_logit_scale must be at most ln 100 = 4.6052"),
        (llm.average_init < 0, "model.llm.average_init must be 0 (off) or more"),
        (llm.embedding_init is not None and llm.embedding_init <= 0, "model.llm.embedding_init must be above 0"),
        (
            llm.name is not None and (llm.average_init > 0 or llm.embedding_init is not None),
            "model.llm: average_init and embedding_init are for random LLMs; leave them out where name is given",
        ),
        (
            not llm.name and "model_type" not in llm.config,
            "model.llm needs a name (hub id or folder) or a config with model_type",
        ),
    )


def _data(data: DataConfig, max_tokens: int) -> Iterator[str]:
    for name in ("max_broken", "flip", "color_jitter"):
        if not 0 <= getattr(data, name) <= 1:
            yield f"data.{name} must be a share, from 0 to 1"
    yield from _at_least("data.", data, 1, "window", "lanes")
    if data.lanes > MOST_LANES:
        yield f"data.lanes must be at most {MOST_LANES}"
    weights = [source.weight for source in data.sources]
    yield from _of(
        (
            data.row_tokens < max_tokens + 3,
            f"data.row_tokens={data.row_tokens} cannot hold a text of model.max_tokens={max_tokens} and its 3 "
            f"special tokens; set it to at least {max_tokens + 3}",
        ),
        (data.workers < 0, "data.workers must be 0 or more"),
        (data.shard_cache_gb <= 0, "data.shard_cache_gb must be above 0"),
        (data.path and data.sources, "give data.path or data.sources, one of the two"),
        (any(weights) and None in weights, "data.sources: give each source a weight, or none of them"),
        (
            any(w is not None and not 0 < w < math.inf for w in weights),
            "data.sources: a weight must be a number above 0",
        ),
        (
            not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1,
            "data.crop_scale must be two shares, 0 < low <= high <= 1",
        ),
    )


def _training(training: TrainingConfig) -> Iterator[str]:
    yield from _at_least("training.", training, 1, "checkpoint_every", "keep_checkpoints")
    yield from _of(
        (training.sample_every < 0, "training.sample_every must be 0 (none) or more"),
        (training.val_every < 0, "training.val_every must be 0 (none) or more"),
        (training.val_every and training.val_samples < 2, "training.val_samples must be 2 or more"),
        (training.val_every and not training.val_tasks, "training.val_tasks names no task"),
        (
            training.val_every and training.strategy == "fsdp2",
            "training.val_every: fsdp2 keeps no whole model to evaluate between steps; set it to 0, or strategy to "
            "deepspeed_3",
        ),
        (training.threads is not None and training.threads < 1, "training.threads must be at least 1, or null"),
        (not 0 < training.late_after <= training.stop_after, "training.late_after must be above 0, up to stop_after"),
        (
            training.offload == "parameters" and training.strategy != "deepspeed_3",
            "training.offload=parameters needs strategy=deepspeed_3",
        ),
        (
            training.offload == "optimizer" and not training.strategy.startswith("deepspeed"),
            "training.offload=optimizer needs a strategy of DeepSpeed, e.g. deepspeed_2",
        ),
        (
            training.deepspeed and not training.strategy.startswith("deepspeed"),
            "training.deepspeed is for strategies of DeepSpeed, e.g. deepspeed_1",
        ),
        (
            training.precision == "64" and training.strategy.startswith("deepspeed"),
            "training.precision=64: DeepSpeed keeps no fp64; set strategy to ddp",
        ),
    )


def _vision(vision: VisionConfig) -> Iterator[str]:
    timm = vision.library == "timm"
    yield from _at_least("model.vision.", vision, 1, "image_size")
    yield from _of(
        (
            timm and vision.config_file is not None,
            "model.vision.config_file is for open_clip; for timm give name and config",
        ),
        (
            not timm and (vision.train_from or vision.join),
            "model.vision: train_from and join are for timm's towers; leave them out, and freeze vision as a whole",
        ),
        (timm and not vision.name, "model.vision.name is missing (a timm model name)"),
        (
            not timm and not (vision.name or vision.config or vision.config_file),
            "model.vision needs a name, a config or a config_file",
        ),
    )


def _stage(stage: StageConfig) -> Iterator[str]:
    lengths = [n for n in (stage.samples, stage.steps, stage.epochs) if n is not None]
    yield from _of(
        (len(lengths) != 1, "give samples, steps or epochs, one of the three"),
        (min(lengths, default=1) <= 0, "a stage's length must be above 0"),
        (stage.global_batch < 2, "global_batch must be at least 2, a contrastive loss needs negatives"),
        (stage.max_regions < 0, "max_regions must be 0 or more"),
        (stage.micro_batch is not None and stage.micro_batch < 1, "micro_batch must be at least 1, or null"),
        (
            stage.written_regions is not None and not 1 <= stage.written_regions <= stage.max_regions,
            "written_regions must be from 1 to max_regions, or null",
        ),
        (stage.lr <= 0, "lr must be above 0"),
        (not all(0 <= beta < 1 for beta in stage.betas), "betas must be at least 0 and below 1"),
        (any(factor < 0 for factor in stage.lr_scale.values()), "lr_scale: a factor is below 0"),
        (not 0 <= stage.ema < 1, "ema is a decay, at least 0 (no average) and below 1"),
        (set(stage.freeze) == set(PARTS), "everything is frozen, nothing would train"),
    )
    yield from _at_least("", stage, 1, "captions_per_image")
    for name in ("weight_decay", "clip_grad", "cached_views"):
        if getattr(stage, name) < 0:
            yield f"{name} must be 0 or more"
    for name in ("warmup", "min_lr"):
        if not 0 <= getattr(stage, name) <= 1:
            yield f"{name} is a share, from 0 to 1"
    if unknown := sorted(set(stage.lr_scale) - set(PARTS)):
        yield f"lr_scale: unknown part {', '.join(unknown)}; the parts are {', '.join(PARTS)}"


def _pictures(stage: StageConfig, vision: VisionConfig) -> Iterator[str]:
    dropout, cached = stage.patch_dropout, stage.cached_views > 0
    yield from _of(
        (stage.image_size is not None and stage.image_size < 1, "image_size must be at least 1, or null"),
        (not 0 <= dropout < 1, "patch_dropout must be at least 0 and below 1"),
        (
            dropout > 0 and stage.max_regions > 0,
            "patch_dropout leaves no full map for regions; set it to 0 or max_regions to 0",
        ),
        (
            dropout > 0 and cached,
            "patch_dropout does nothing to cached_views; set one of the two to 0",
        ),
        (
            cached and "vision" not in stage.freeze and vision.train_from is None,
            "cached_views needs a frozen tower: add vision to freeze, or set model.vision.train_from",
        ),
    )


def _loss(loss: LossConfig, max_regions: int) -> Iterator[str]:
    hard = loss.hard
    used = (loss.emb, loss.gen, hard.columns, hard.rank, hard.intra, hard.focal, hard.triplet, hard.written)
    used += (loss.region_emb, loss.region_gen) if max_regions else ()
    yield from _of(
        (min(used) < 0, "loss: a weight is below 0"),
        (not any(used), "loss: all weights that count here are 0, nothing would train"),
        (not 0 <= loss.label_smoothing < 1, "loss.label_smoothing must be at least 0 and below 1"),
    )


def _negatives(stage: StageConfig) -> Iterator[str]:
    made, hard = stage.negatives, stage.loss.hard
    of_texts = {name: getattr(hard, name) for name in ("rank", "intra", "focal", "triplet", "written")}
    used = any(of_texts.values()) or hard.columns
    for name in ("texts", "pictures"):
        if getattr(made, name) < 0:
            yield f"negatives.{name} must be 0 or more"
    unknown = [kind for kind in made.kinds if kind not in KINDS]
    unused = [name for name, weight in of_texts.items() if weight]
    yield from _of(
        (
            made.texts and made.source == "rules" and unknown,
            f"negatives.kinds: no rule makes {', '.join(unknown)}; the kinds are {', '.join(KINDS)}",
        ),
        (made.texts and made.source == "rules" and not made.kinds, "negatives.kinds names no kind"),
        (
            not made.texts and unused,
            f"loss.hard.{unused[0] if unused else ''} needs negative texts: set negatives.texts to 1 or more",
        ),
        (
            hard.columns and not made.texts and not made.pictures,
            "loss.hard.columns needs negatives: set negatives.texts or negatives.pictures to 1 or more",
        ),
        (
            (made.texts or made.pictures) and not used and not made.order_robust,
            "negatives are made, and no loss uses them: give one of loss.hard a weight",
        ),
        (made.max_words is not None and made.max_words < 1, "negatives.max_words must be at least 1, or null"),
        (made.pictures and made.patches < 2, "negatives.patches must be at least 2"),
        (
            made.pictures and stage.cached_views,
            "negatives.pictures does nothing to cached_views; set one of the two to 0",
        ),
        (
            made.drawn and (made.source != "data" or not made.texts),
            "negatives.drawn takes pictures that lie with the data: set negatives.source to data, and negatives.texts "
            "to 1 or more",
        ),
        (
            made.first and (made.source != "data" or not made.texts),
            "negatives.first asks for negatives that lie with the data: set negatives.source to data, and "
            "negatives.texts to 1 or more",
        ),
        (
            made.source == "data" and made.kinds and not set(made.first) <= set(made.kinds),
            "negatives.first names kinds that negatives.kinds has not",
        ),
        (made.drawn and stage.cached_views, "negatives.drawn does nothing to cached_views; set one of the two to 0"),
        (hard.triplet and not made.drawn, "loss.hard.triplet needs pictures of the negatives: set negatives.drawn"),
        (
            made.drawn and not hard.triplet and not hard.columns,
            "negatives.drawn: no loss uses the pictures; give loss.hard.triplet or loss.hard.columns a weight",
        ),
        (
            made.order_robust and made.drawn,
            "negatives.order_robust makes positives, and negatives.drawn is for negatives: unset one of the two",
        ),
        (
            made.order_robust and used,
            "negatives.order_robust makes positives, and loss.hard is for negatives: set one of the two to 0",
        ),
        (
            made.order_robust and made.texts and made.kinds != ["shuffle"],
            "negatives.order_robust is for words in another order: set negatives.kinds to [shuffle]",
        ),
        (hard.focal_gamma < 0, "loss.hard.focal_gamma must be 0 or more"),
        (not 0 <= hard.focal_smoothing < 1, "loss.hard.focal_smoothing must be at least 0 and below 1"),
    )
