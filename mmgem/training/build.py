"""The model as a run begins or goes on with it.

Receives a Config, the training data, and the checkpoint to go on from, if there is one. Gives the model, built and
filled. Refuses a checkpoint that the config does not fit, and sizes of pictures that the tower does not take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmgem.config import Config
from mmgem.data.samples import SampleError, decode_image
from mmgem.data.sources import Sources
from mmgem.errors import UserError, one_line
from mmgem.model import MMGem
from mmgem.model.pretrained import config_json, inherit, load_weights, model_folder, parse_config, read_config
from mmgem.progress import track
from mmgem.ranks import Ranks
from mmgem.text import load_tokenizer, train_tokenizer
from mmgem.training import frozen
from mmgem.training.checkpoint import RunFolder
from mmgem.training.saved import Saved
from mmgem.training.signals import stop_if_asked

STANDARD_PICTURES = 512


def build(config: Config, dataset: Sources, folder: RunFolder, saved: Saved | None, whole: bool, ranks: Ranks) -> MMGem:
    """New, from `init_from`, or from a checkpoint. whole: with the weights that a checkpoint's parts hold, which an
    engine otherwise loads itself."""
    L.seed_everything(config.seed, verbose=False)
    fresh = saved is None and config.init_from is None
    tokenizer = ranks.by_first(lambda: make_tokenizer(config, dataset, folder, fresh=saved is None))
    settings, origin = config.model, None
    if saved is not None:
        settings = inherit(settings, parse_config(saved.architecture, str(saved.path)))
    elif config.init_from is not None:
        origin = model_folder(Path(config.init_from))
        settings = inherit(settings, read_config(origin))
    pretrained = fresh or (saved is not None and frozen.is_pretrained(saved.frozen))
    model = MMGem(settings, tokenizer, load_weights=pretrained)
    if origin is not None:
        load_weights(model, origin)
    model.language.refuse_leaks()
    if config.training.precision == "64":
        model.double()
    if fresh and config.model.vision.standardise:
        measure_standard(model, dataset, choose_device(config))
    if saved is not None:
        fill(model, saved, folder.path, whole)
        if saved.run_state.stage >= len(config.stages):
            raise UserError(
                f"{saved.path}: is of stage {saved.run_state.stage + 1}, the config has {len(config.stages)}"
            )
    model.vision.set_patch_dropout(max(stage.patch_dropout for stage in config.stages))  # refused now or never
    model.vision.set_patch_dropout(0)
    _refuse_picture_sizes(config, model)
    return model


def fill(model: MMGem, saved: Saved, run: Path, whole: bool) -> None:
    """A checkpoint's weights into a model of its kind, built with pretrained weights if it counts on them."""
    frozen.restore(saved.frozen, model, run, saved.path)
    try:
        weights = saved.weights() if whole or not saved.in_parts else {**saved.buffers, **saved.temperature["values"]}
        elsewhere = {name for record in saved.frozen for name in record["names"]}
        missing, unknown = model.load_state_dict(weights, strict=False)
        missing = sorted(set(missing) - elsewhere - _tied(model, weights.keys() | elsewhere))
        if unknown or (missing and (whole or not saved.in_parts)):
            raise RuntimeError(f"unknown: {sorted(unknown)[:3]}, missing: {missing[:3]}")
    except RuntimeError as e:
        why = one_line(e)[:250]
        raise UserError(f"{saved.path}: does not fit the model that the config describes ({why})") from e


def _tied(model: MMGem, given: set[str]) -> set[str]:
    """Names of parameters that are given under another name."""
    names = {id(p): set() for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {name for same in names.values() if same & given for name in same}


def rebuilt(model: MMGem, state: dict[str, torch.Tensor]) -> MMGem:
    """Another model of the same kind, with this state: what an engine has taken apart is not put together again."""
    settings = inherit(model.config, parse_config(config_json(model), "the model"))
    other = MMGem(settings, model.codec.tokenizer, load_weights=False)
    other.load_state_dict(state)
    return other


@torch.no_grad()
def _refuse_picture_sizes(config: Config, model: MMGem) -> None:
    model.eval()
    for stage in config.stages:
        if stage.image_size is None:
            continue
        try:
            model.vision(torch.zeros(1, 3, stage.image_size, stage.image_size, device=model.device))
        except (RuntimeError, AssertionError, ValueError) as e:
            why = one_line(e)[:150]
            raise UserError(
                f"stage {stage.name}: image_size={stage.image_size}: the tower is built for pictures of "
                f"{config.model.vision.image_size} ({why}); leave image_size out"
            ) from e


def make_tokenizer(config: Config, dataset: Sources, folder: RunFolder, fresh: bool) -> Any:
    """The configured tokenizer, or the LLM's, or one trained on the training texts (kept in the run's folder)."""
    if config.init_from is not None:
        return load_tokenizer(model_folder(Path(config.init_from)))
    source = config.model.tokenizer.path or config.model.llm.name
    if source:
        return load_tokenizer(source)
    if fresh or not folder.tokenizer.is_dir():
        settings = config.model.tokenizer
        tokenizer = train_tokenizer(dataset.iter_texts(), settings.vocab_size, settings.lowercase)
        tokenizer.save_pretrained(folder.tokenizer)
    return load_tokenizer(folder.tokenizer)


@torch.no_grad()
def measure_standard(model: MMGem, dataset: Sources, device: torch.device) -> None:
    """Runs the tower over pictures spread evenly over the training split and sets the map's standardisation."""
    model.to(device).eval()
    pooled: list[torch.Tensor] = []
    step = max(1, len(dataset) // STANDARD_PICTURES)
    for index in track(range(0, len(dataset), step), "measuring the map's channels", unit="pictures"):
        stop_if_asked()
        try:
            picture = model.preprocess(decode_image(dataset.sample(index)))
        except SampleError:
            continue
        pooled.append(model.aggregator.image(model.vision(picture[None].to(device))).float())
    if not pooled:
        raise UserError(f"{dataset.name}: no readable picture among {len(dataset)} samples; prepare the data again")
    model.set_standard(torch.cat(pooled))


def choose_device(config: Config) -> torch.device:
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda, but torch sees no GPU; set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def uses_bf16(config: Config) -> bool:
    """Whether products run in bf16: as asked, or, for `auto`, where there are instructions for it."""
    if config.training.precision != "auto":
        return config.training.precision == "bf16"
    if choose_device(config).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for a CPU's bf16 instructions.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
