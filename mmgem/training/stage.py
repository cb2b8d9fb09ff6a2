"""One stage of a run: data, module, strategy and callbacks, brought together in a Trainer.

Receives the run and the model as the stage finds it. Gives the model as it leaves it. Refuses what the data and the
strategy refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging

from mmgem.config import Config, StageConfig
from mmgem.data.datamodule import StageData
from mmgem.data.samples import SampleError, decode_image
from mmgem.data.sources import Sources, open_validation_data
from mmgem.errors import UserError, one_line
from mmgem.evaluation.run import refuse_lacking
from mmgem.images import Preprocess
from mmgem.losses.caption import refuse_missing_kernel
from mmgem.memory import hand_back_freed_memory
from mmgem.model import MMGem
from mmgem.ranks import Ranks
from mmgem.training import frozen
from mmgem.training.build import choose_device, rebuilt, uses_bf16
from mmgem.training.callbacks import BrokenSamples, CaptionSamples, Checkpoints, StepLog
from mmgem.training.checkpoint import RunFolder
from mmgem.training.features import FeatureCache, feature_cache
from mmgem.training.module import NotFinite, ShardedStageModule, StageModule
from mmgem.training.ranks import StartedRanks
from mmgem.training.saved import Saved, for_ranks
from mmgem.training.strategy import PlainFiles, make_strategy, whole_state
from mmgem.training.throughput import Throughput
from mmgem.training.validation import Share, Validation, chosen_tasks
from mmgem.training.watchdog import Watchdog, WatchdogCallback

SAMPLE_PICTURES = 4


@dataclass(frozen=True)
class Run:
    """What the stages of a run have in common."""

    config: Config
    dataset: Sources
    folder: RunFolder
    ranks: Ranks
    watchdog: Watchdog
    strategy: str
    """Resolved."""
    steps: list[int]
    """Of each stage."""


def train_stage(run: Run, number: int, model: MMGem, saved: Saved | None) -> tuple[MMGem, int | None]:
    """Trains one stage, or goes on with it from a checkpoint. Gives the model as it ends, and the signal that stopped
    it, if one did."""
    config, ranks, folder = run.config, run.ranks, run.folder
    stage, device, steps_before = config.stages[number], choose_device(config), sum(run.steps[:number])
    refuse_missing_kernel(config.training.caption_kernel, device.type)
    preprocess = stage_preprocess(model, stage)
    cache = ranks.by_first(lambda: _feature_cache(run, stage, model, preprocess)) if stage.cached_views else None
    data = StageData(
        run.dataset, model.codec, preprocess, config.data, stage, config.seed, cache, ranks.rank, ranks.count
    )
    kind = ShardedStageModule if run.strategy == "fsdp2" else StageModule
    module = kind(
        model, stage, number, data.steps, config.seed, cache is not None, ranks, config.training.caption_kernel
    )
    # An average of the weights is kept with all of them.
    records = [] if stage.ema else ranks.by_first(lambda: frozen.records(model, config, number, folder.path))
    module.strict_loading = False  # `fill` has looked
    checkpoints = Checkpoints(folder, config, steps_before, ranks, run.strategy, records)
    place = ranks.by_first(lambda: for_ranks(saved, ranks.count, folder.scratch)) if saved else None
    trainer = L.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu"}[device.type],
        devices=ranks.local_count,
        num_nodes=ranks.nodes,
        strategy=make_strategy(
            run.strategy, config.training, ranks, device, stage.clip_grad, universal=bool(saved and place != saved.path)
        ),
        plugins=[StartedRanks(ranks), PlainFiles()],
        use_distributed_sampler=False,  # the sampler is ours, see StageSampler
        precision="bf16-mixed" if uses_bf16(config) else "32-true",
        max_epochs=1,
        logger=list(_loggers(config, folder)),
        callbacks=_callbacks(run, number, data, checkpoints, Throughput(model, stage, ranks, uses_bf16(config))),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder.path,
    )
    hand_back_freed_memory()  # the data module's workers are forks
    try:
        trainer.fit(module, datamodule=data, ckpt_path=place, weights_only=True)
        assert checkpoints.signal is not None or trainer.global_step == data.steps, (trainer.global_step, data.steps)
        state = whole_state(trainer) if checkpoints.signal is None else None
    except NotFinite as e:
        raise UserError(str(e)) from e
    finally:
        module.temperature.give_back()
    if state is not None:
        model = rebuilt(model, state | module.temperature.state_dict()["values"])
    return model, checkpoints.signal


def _callbacks(
    run: Run, number: int, data: StageData, checkpoints: Checkpoints, throughput: Throughput
) -> list[L.Callback]:
    config, ranks, folder = run.config, run.ranks, run.folder
    stage, training, steps_before = config.stages[number], config.training, sum(run.steps[:number])
    broken = BrokenSamples(folder, config.data.max_broken, stage.name, steps_before, ranks)
    # Under ZeRO 3 no rank holds the whole model. FSDP2's parameters are whole in a training step only.
    together = run.strategy == "deepspeed_3"
    wanted = training.sample_every and run.strategy != "fsdp2" and (ranks.first or together)
    samples = sample_pictures(config, run.dataset) if wanted else []
    return [
        broken,
        StepLog(folder, steps_before, ranks, broken, throughput, training.log_keys),
        CaptionSamples(folder, samples, training.sample_every, steps_before, ranks, together),
        # Before the checkpoints, which hold it. Buffers follow the model: an average of counters is none.
        *([EMAWeightAveraging(decay=stage.ema, use_buffers=False)] if stage.ema else []),
        checkpoints,
        *_validation(run, number, throughput, together),
        WatchdogCallback(run.watchdog, data, steps_before),
    ]


def _validation(run: Run, number: int, throughput: Throughput, together: bool) -> list[Validation]:
    training = run.config.training
    if not training.val_every:
        return []
    dataset = open_validation_data(run.config.data)
    if dataset is None:
        raise UserError(
            f"training.val_every={training.val_every}: there is no validation split {run.config.data.val_split!r} "
            "(data.val_split); prepare one, or set it to 0"
        )
    tasks = chosen_tasks(training.val_tasks)
    refuse_lacking(tasks, dataset, str(dataset.name))
    # Where no rank holds the whole model, all compute the same, together; else they share the work.
    ranks = Ranks() if together else run.ranks
    share = Share(dataset, training.val_samples, run.config.seed)
    steps_before = sum(run.steps[:number])
    file = run.folder.val if run.ranks.first else None
    return [Validation(file, share, tasks, training.val_every, steps_before, ranks, throughput, run.watchdog)]


def _feature_cache(run: Run, stage: StageConfig, model: MMGem, preprocess: Preprocess) -> FeatureCache:
    config = run.config
    root = Path(config.data.cache) if config.data.cache else run.folder.path / "cache"
    device, bf16 = choose_device(config), uses_bf16(config)
    return feature_cache(
        model.vision, preprocess, run.dataset, config.data, config.seed, stage.cached_views, root, device, bf16
    )


def stage_preprocess(model: MMGem, stage: StageConfig) -> Preprocess:
    """The tower's preprocessing, at the stage's size."""
    return dataclasses.replace(model.preprocess, size=stage.image_size or model.preprocess.size)


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
