"""A run: stages one after the other, from nothing or from where it stopped.

Receives a Config. Gives the run's folder (config.yaml, run.json, log.jsonl, checkpoints/, stages/, model/). Refuses
what `RunFolder.begin`, the data and the model refuse.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmgem.config import Config, StageConfig
from mmgem.data.datamodule import StageData, open_split, stage_steps
from mmgem.data.samples import SampleError, decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.model import MMGem
from mmgem.model.pretrained import load_weights, model_folder
from mmgem.text import load_tokenizer, train_tokenizer
from mmgem.training.callbacks import BrokenSamples, CaptionSamples, Checkpoints, StepLog
from mmgem.training.checkpoint import RunFolder, RunState, read_state
from mmgem.training.features import feature_cache
from mmgem.training.module import StageModule

SAMPLE_PICTURES = 4


def train(config: Config, resume: str = "never") -> int:
    """Trains all stages. Gives 0 when the run is finished, 128 + signal number when it was asked to stop."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this version trains in one process; start it without torchrun, deepspeed or srun")
    _quieten()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    dataset = open_split(config.data.path, config.data.train_split)
    folder = RunFolder(config.run)
    checkpoint = folder.begin(config, resume)
    state, content = read_state(checkpoint) if checkpoint else (RunState(), None)
    L.seed_everything(config.seed, verbose=False)
    fresh = checkpoint is None and config.init_from is None
    model = MMGem(config.model, make_tokenizer(config, dataset, folder), load_weights=fresh)
    if checkpoint is None and config.init_from is not None:
        load_weights(model, model_folder(Path(config.init_from)))
    model.language.refuse_leaks()
    if content is not None:
        model.load_state_dict({k.removeprefix("model."): v for k, v in content["state_dict"].items()})
    folder.write_facts(
        seed=config.seed, data={config.data.train_split: dataset.checksum}, parameters=count_parameters(model)
    )
    _announce(config, dataset, model, state, checkpoint is not None)

    steps_before = 0
    for number, stage in enumerate(config.stages):
        steps = stage_steps(stage, len(dataset))
        finished = number < state.stage or (number == state.stage and state.samples >= steps * stage.global_batch)
        if number == state.stage and content is not None:
            folder.forget_log_after(steps_before + state.samples // stage.global_batch)
        if not finished:
            going_on = number == state.stage and state.samples > 0
            stopped_by = _run_stage(
                config, stage, number, steps_before, model, dataset, folder, str(checkpoint) if going_on else None
            )
            if stopped_by:
                print(
                    f"stopped; to go on: mmgem train --config {folder.path}/config.yaml --resume auto", file=sys.stderr
                )
                return 128 + stopped_by
        if not (folder.stages / stage.name / "config.json").is_file() or not finished:
            model.save_pretrained(folder.stages / stage.name)
        steps_before += steps
    model.save_pretrained(folder.model)
    folder.write_facts(finished=True)
    shutil.rmtree(folder.path / "cache", ignore_errors=True)
    print(f"finished: {folder.path}/model", file=sys.stderr)
    return 0


def _run_stage(
    config: Config,
    stage: StageConfig,
    number: int,
    steps_before: int,
    model: MMGem,
    dataset: ShardedDataset,
    folder: RunFolder,
    checkpoint: str | None,
) -> int | None:
    """Trains one stage. Gives the signal that stopped it, if one did."""
    cache = None
    if stage.cached_views:
        root = folder.path / "cache"
        cache = feature_cache(
            model.vision, dataset, config.data, config.seed, stage.cached_views, root, choose_device(config)
        )
    data = StageData(dataset, model.codec, model.preprocess, config.data, stage, config.seed, cache)
    module = StageModule(model, stage, number, data.steps, config.seed, from_trunk=cache is not None)
    checkpoints = Checkpoints(folder, config, steps_before)
    training = config.training
    trainer = L.Trainer(
        accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[training.device],
        devices=1,
        precision={"32": "32-true", "bf16": "bf16-mixed"}[training.precision],  # pyright: ignore[reportArgumentType]
        max_epochs=1,
        gradient_clip_val=stage.clip_grad or None,
        logger=list(_loggers(config, folder)),
        callbacks=[
            StepLog(folder, steps_before, training.log_every),
            BrokenSamples(config.data.max_broken),
            CaptionSamples(folder, sample_pictures(config, dataset), training.sample_every, steps_before),
            checkpoints,
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder.path,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return checkpoints.signal


def make_tokenizer(config: Config, dataset: ShardedDataset, folder: RunFolder) -> Any:
    """The configured tokenizer, or the LLM's, or one trained on the training texts (kept in the run's folder)."""
    if config.init_from is not None:
        return load_tokenizer(model_folder(Path(config.init_from)))
    source = config.model.tokenizer.path or config.model.llm.name
    if source:
        return load_tokenizer(source)
    if not folder.tokenizer.is_dir():
        settings = config.model.tokenizer
        tokenizer = train_tokenizer(dataset.iter_texts(), settings.vocab_size, settings.lowercase)
        tokenizer.save_pretrained(folder.tokenizer)
    return load_tokenizer(folder.tokenizer)


def sample_pictures(config: Config, train_set: ShardedDataset) -> list[Any]:
    """The first readable pictures of the validation split, or, without one, of the training split."""
    split = config.data.val_split
    has_val = split is not None and os.path.isfile(os.path.join(config.data.path, split, "index.json"))
    dataset = open_split(config.data.path, str(split)) if has_val else train_set
    pictures = []
    for index in range(min(len(dataset), 10 * SAMPLE_PICTURES)):
        try:
            sample = dataset.sample(index)
            pictures.append((sample.key, decode_image(sample), next(chain(sample.captions, [""]))))
        except SampleError:
            continue
        if len(pictures) == SAMPLE_PICTURES:
            break
    return pictures


def choose_device(config: Config) -> torch.device:
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda, but torch sees no GPU; set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def count_parameters(model: MMGem) -> dict[str, int]:
    counts = {part: sum(p.numel() for _, p in parameters) for part, parameters in model.parts().items()}
    return {**counts, "all": sum(counts.values())}


def _announce(config: Config, dataset: ShardedDataset, model: MMGem, state: RunState, resumed: bool) -> None:
    counts = ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in count_parameters(model).items())
    print(
        f"{config.run}: {len(dataset)} samples in {config.data.path}/{config.data.train_split}; parameters: {counts}",
        file=sys.stderr,
    )
    for stage in config.stages:
        steps = stage_steps(stage, len(dataset))
        print(f"  stage {stage.name}: {steps} steps of global_batch {stage.global_batch}", file=sys.stderr)
    if resumed:
        name = config.stages[state.stage].name
        print(f"  going on in stage {name} after {state.samples} samples", file=sys.stderr)


def _loggers(config: Config, folder: RunFolder) -> Iterator[Any]:
    try:
        if config.training.tensorboard:
            from lightning.pytorch.loggers import TensorBoardLogger

            yield TensorBoardLogger(str(folder.path), name="tensorboard", version="")
        if config.training.wandb_project:
            from lightning.pytorch.loggers import WandbLogger

            yield WandbLogger(project=config.training.wandb_project, name=folder.path.name, save_dir=str(folder.path))
    except ModuleNotFoundError as e:
        raise UserError(f"this logger is not installed ({e}): pip install 'mmgem[log]'") from e


def _quieten() -> None:
    """Lightning's greetings and hints that do not concern a user of mmgem."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*`isinstance.treespec, LeafSpec.` is deprecated.*", ".*srun.*"):
        warnings.filterwarnings("ignore", text)
