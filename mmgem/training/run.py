"""A run: stages one after the other, from nothing or from where it stopped.

Receives a Config. Gives the run's folder (config.yaml, run.json, log.jsonl, checkpoints/, stages/, model/). Refuses
what `RunFolder.begin`, the data and the model refuse.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from mmgem.config import Config, StageConfig
from mmgem.data.datamodule import StageData
from mmgem.data.plan import Machines, refuse_impossible, stage_steps
from mmgem.data.samples import SampleError, decode_image
from mmgem.data.sources import Sources, open_training_data, open_validation_data
from mmgem.errors import UserError, one_line
from mmgem.images import Preprocess
from mmgem.memory import hand_back_freed_memory
from mmgem.model import MMGem
from mmgem.model.pretrained import inherit, load_weights, model_folder, parse_config, read_config
from mmgem.progress import track
from mmgem.text import load_tokenizer, train_tokenizer
from mmgem.training.callbacks import BrokenSamples, CaptionSamples, Checkpoints, StepLog
from mmgem.training.checkpoint import RunFolder, RunState, read_state
from mmgem.training.features import FeatureCache, feature_cache
from mmgem.training.module import StageModule
from mmgem.training.ranks import Ranks, StartedRanks, process_group
from mmgem.training.signals import Stopped, stop_if_asked, stopping_at_once

SAMPLE_PICTURES = 4
STANDARD_PICTURES = 512


def train(config: Config, resume: str = "never") -> int:
    """Trains all stages. Gives 0 when the run is finished, 128 + signal number when it was asked to stop."""
    _quieten()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    folder = RunFolder(config.run)
    ranks = Ranks()
    try:
        with stopping_at_once(), process_group(choose_device(config).type == "cuda") as ranks:
            stopped_by = _train(config, resume, folder, ranks)
    except Stopped as e:
        stopped_by = e.number
    if not stopped_by:
        return 0
    file = shlex.quote(str(folder.config))
    if ranks.first:
        print(f"stopped; to go on: mmgem train --config {file} --resume auto", file=sys.stderr)
    return 128 + stopped_by


def _train(config: Config, resume: str, folder: RunFolder, ranks: Ranks) -> int | None:
    """The stages in order. Gives the signal that stopped them, if one did."""
    dataset = open_training_data(config.data)
    refuse_impossible(config.stages, dataset, Machines(ranks.nodes, ranks.local_count))
    checkpoint = ranks.by_first(lambda: folder.begin(config, resume, dataset.checksum))
    if ranks.by_first(lambda: resume == "auto" and folder.finished):
        if ranks.first:
            print(f"{folder.path}: this run is finished; its model: {folder.model}", file=sys.stderr)
        return None
    model, state = _build(config, dataset, folder, checkpoint, ranks)
    steps = [stage_steps(stage, len(dataset)) for stage in config.stages]

    def lay_out() -> None:
        folder.forget_after(sum(steps[: state.stage]) + state.samples // config.stages[state.stage].global_batch)
        folder.note_left_out(dataset.left_out())
        checksums = {config.data.train_split: dataset.checksum}
        folder.write_facts(seed=config.seed, data=checksums, parameters=count_parameters(model), finished=False)
        _announce(config, dataset, model, state, checkpoint is not None, ranks)

    ranks.by_first(lay_out)

    for number, stage in enumerate(config.stages):
        if number < state.stage:
            continue
        begun = state.samples if number == state.stage else 0
        if begun < steps[number] * stage.global_batch:
            resumed = str(checkpoint) if begun else None
            stopped_by = _run_stage(config, stage, number, sum(steps[:number]), model, dataset, folder, resumed, ranks)
            if stopped_by:
                return stopped_by
        elif (folder.stages / stage.name).is_dir():
            continue  # saved before the run was stopped, and others may have put a report beside it
        if ranks.first:
            model.save_pretrained(folder.stages / stage.name)
    if ranks.first:
        model.save_pretrained(folder.model)
        folder.write_facts(finished=True)
        shutil.rmtree(folder.path / "cache", ignore_errors=True)
        print(f"finished: {folder.model}", file=sys.stderr)
    return None


def _build(
    config: Config, dataset: Sources, folder: RunFolder, checkpoint: Path | None, ranks: Ranks
) -> tuple[MMGem, RunState]:
    """The model as it is before the first step to do: new, from `init_from`, or from the checkpoint."""
    state, content = read_state(checkpoint) if checkpoint else (RunState(), None)
    L.seed_everything(config.seed, verbose=False)
    fresh = checkpoint is None and config.init_from is None
    tokenizer = ranks.by_first(lambda: make_tokenizer(config, dataset, folder, fresh=checkpoint is None))
    settings, origin = config.model, None
    if content is not None and "architecture" in content:  # not in checkpoints of early versions
        settings = inherit(settings, parse_config(content["architecture"], str(checkpoint)))
    elif checkpoint is None and config.init_from is not None:
        origin = model_folder(Path(config.init_from))
        settings = inherit(settings, read_config(origin))
    model = MMGem(settings, tokenizer, load_weights=fresh)
    if origin is not None:
        load_weights(model, origin)
    model.language.refuse_leaks()
    if config.training.precision == "64":
        model.double()
    if fresh and config.model.vision.standardise:
        measure_standard(model, dataset, choose_device(config))
    if content is not None:
        try:
            model.load_state_dict({k.removeprefix("model."): v for k, v in content["state_dict"].items()})
        except RuntimeError as e:
            why = one_line(e)[:250]
            raise UserError(f"{checkpoint}: does not fit the model that the config describes ({why})") from e
        if state.stage >= len(config.stages):
            raise UserError(f"{checkpoint}: is of stage {state.stage + 1}, the config has {len(config.stages)}")
    model.vision.set_patch_dropout(max(stage.patch_dropout for stage in config.stages))  # refused now or never
    model.vision.set_patch_dropout(0)
    _refuse_picture_sizes(config, model)
    return model, state


def _run_stage(
    config: Config,
    stage: StageConfig,
    number: int,
    steps_before: int,
    model: MMGem,
    dataset: Sources,
    folder: RunFolder,
    checkpoint: str | None,
    ranks: Ranks,
) -> int | None:
    """Trains one stage. Gives the signal that stopped it, if one did."""
    cache, preprocess = None, stage_preprocess(model, stage)
    if stage.cached_views:
        root = Path(config.data.cache) if config.data.cache else folder.path / "cache"
        device, bf16 = choose_device(config), uses_bf16(config)

        def make_cache() -> FeatureCache:
            return feature_cache(
                model.vision, preprocess, dataset, config.data, config.seed, stage.cached_views, root, device, bf16
            )

        cache = ranks.by_first(make_cache)
    data = StageData(dataset, model.codec, preprocess, config.data, stage, config.seed, cache, ranks.rank, ranks.count)
    module = StageModule(model, stage, number, data.steps, config.seed, cache is not None, ranks.rank)
    checkpoints = Checkpoints(folder, config, steps_before, ranks)
    broken = BrokenSamples(folder, config.data.max_broken, stage.name, steps_before, ranks)
    training = config.training
    samples = sample_pictures(config, dataset) if ranks.first else []
    trainer = L.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu"}[choose_device(config).type],
        devices=ranks.local_count,
        num_nodes=ranks.nodes,
        strategy=_strategy(ranks, choose_device(config)),
        plugins=[StartedRanks(ranks)],
        use_distributed_sampler=False,  # the sampler is ours, see StageSampler
        precision="bf16-mixed" if uses_bf16(config) else "32-true",
        max_epochs=1,
        gradient_clip_val=stage.clip_grad or None,
        logger=list(_loggers(config, folder)),
        callbacks=[
            broken,
            StepLog(folder, steps_before, ranks, broken, training.log_keys),
            CaptionSamples(folder, samples, training.sample_every, steps_before),
            # Before the checkpoints, which hold it. Buffers follow the model: an average of counters is none.
            *([EMAWeightAveraging(decay=stage.ema, use_buffers=False)] if stage.ema else []),
            checkpoints,
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder.path,
    )
    hand_back_freed_memory()  # the data module's workers are forks
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert checkpoints.signal is not None or trainer.global_step == data.steps, (trainer.global_step, data.steps)
    return checkpoints.signal


def _strategy(ranks: Ranks, device: torch.device) -> Any:
    if ranks.count == 1:
        return "auto"
    # A rank whose share of a batch has no captions or boxes leaves parameters without gradient.
    backend = "nccl" if device.type == "cuda" else "gloo"
    return DDPStrategy(process_group_backend=backend, find_unused_parameters=True)


def stage_preprocess(model: MMGem, stage: StageConfig) -> Preprocess:
    """The tower's preprocessing, at the stage's size."""
    return dataclasses.replace(model.preprocess, size=stage.image_size or model.preprocess.size)


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


def sample_pictures(config: Config, train_set: Sources) -> list[Any]:
    """The first readable pictures of the validation split, or, without one, of the training split."""
    dataset = open_validation_data(config.data) or train_set
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


def count_parameters(model: MMGem) -> dict[str, int]:
    counts = {part: sum(p.numel() for _, p in parameters) for part, parameters in model.parts().items()}
    return {**counts, "all": sum(counts.values())}


def _announce(config: Config, dataset: Sources, model: MMGem, state: RunState, resumed: bool, ranks: Ranks) -> None:
    counts = ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in count_parameters(model).items())
    print(
        f"{config.run}: {len(dataset)} samples in {dataset.name}; parameters: {counts}",
        file=sys.stderr,
    )
    if ranks.count > 1:
        print(f"  {ranks.count} ranks on {ranks.nodes} machine{'s' if ranks.nodes > 1 else ''}", file=sys.stderr)
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
        raise UserError(f"this logger is not installed ({one_line(e)}): pip install 'mmgem[log]'") from e


def _quieten() -> None:
    """Lightning's greetings and hints that do not concern a user of mmgem."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hints = ("does not have many workers", "`isinstance.treespec, LeafSpec.` is deprecated", "srun")
    hints += ("your dataloader is not resumable",)  # ours is: see StageSampler
    hints += ("smaller than the logging interval", r"module\(s\) in eval mode at the start")
    for hint in hints:
        warnings.filterwarnings("ignore", f".*{hint}.*")
