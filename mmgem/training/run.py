"""A run: stages one after the other, from nothing or from where it stopped.

Receives a Config. Gives the run's folder (config.yaml, run.json, log.jsonl, checkpoints/, stages/, model/). Refuses
what `RunFolder.begin`, the data and the model refuse.
"""

from __future__ import annotations

import errno
import logging
import shlex
import shutil
import sys
import warnings

import torch

from mmgem.config import Config
from mmgem.data.plan import Machines, refuse_impossible, stage_steps
from mmgem.data.sources import Sources, open_training_data
from mmgem.errors import UserError
from mmgem.model import MMGem
from mmgem.ranks import Ranks, process_group
from mmgem.training.arithmetic import count_parameters
from mmgem.training.build import build, choose_device
from mmgem.training.checkpoint import RunFolder
from mmgem.training.saved import RunState, read_checkpoint, refuse_other_strategy
from mmgem.training.signals import Stopped, stopping_at_once
from mmgem.training.stage import Run, train_stage
from mmgem.training.strategy import resolve
from mmgem.training.watchdog import PeerLost, Watchdog


def train(config: Config, resume: str = "never") -> int:
    """Trains all stages. Gives 0 when the run is finished, 128 + signal number when it was asked to stop, 75 when other
    ranks were lost: the last two ask to be started again."""
    _quieten()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    folder = RunFolder(config.run)
    ranks = Ranks()
    training = config.training
    try:
        with (
            stopping_at_once(),
            process_group(choose_device(config).type == "cuda", training.strategy not in ("auto", "ddp")) as ranks,
            Watchdog(ranks, training.late_after, training.stop_after) as watchdog,
        ):
            stopped_by = _train(config, resume, folder, ranks, watchdog)
    except Stopped as e:
        stopped_by = e.number
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stands = folder.newest() or "no checkpoint"
        raise UserError(f"{folder.path}: {e.strerror}; {stands} stands; make room, and go on with --resume auto") from e
    except PeerLost as e:
        print(f"mmgem: error: {e}", file=sys.stderr)
        return PeerLost.exit_code
    if not stopped_by:
        return 0
    file = shlex.quote(str(folder.config))
    if ranks.first:
        print(f"stopped; to go on: mmgem train --config {file} --resume auto", file=sys.stderr)
    return 128 + stopped_by


def _train(config: Config, resume: str, folder: RunFolder, ranks: Ranks, watchdog: Watchdog) -> int | None:
    """The stages in order. Gives the signal that stopped them, if one did."""
    dataset = open_training_data(config.data)
    refuse_impossible(config.stages, dataset, Machines(ranks.nodes, ranks.local_count))
    checkpoint = ranks.by_first(lambda: folder.begin(config, resume, dataset.checksum))
    if ranks.by_first(lambda: resume == "auto" and folder.finished):
        if ranks.first:
            print(f"{folder.path}: this run is finished; its model: {folder.model}", file=sys.stderr)
        return None
    saved = read_checkpoint(checkpoint) if checkpoint else None
    strategy = resolve(config, ranks, choose_device(config).type == "cuda", saved)
    if saved is not None:
        refuse_other_strategy(saved, strategy)
    state = saved.run_state if saved is not None else RunState()
    steps = [stage_steps(stage, len(dataset)) for stage in config.stages]
    # A checkpoint of a later stage than the config has is refused when the model is built.
    stage = min(state.stage, len(steps) - 1)
    stage_done = state.samples >= steps[stage] * config.stages[stage].global_batch
    model = build(config, dataset, folder, saved, stage_done, ranks)
    run = Run(config, dataset, folder, ranks, watchdog, strategy, steps)

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
            model, stopped_by = train_stage(run, number, model, saved if begun else None)
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


def _quieten() -> None:
    """Lightning's greetings and hints that do not concern a user of mmgem."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hints = ("does not have many workers", "`isinstance.treespec, LeafSpec.` is deprecated", "srun")
    hints += ("your dataloader is not resumable",)  # ours is: see StageSampler
    hints += ("smaller than the logging interval", r"module\(s\) in eval mode at the start")
    for hint in hints:
        warnings.filterwarnings("ignore", f".*{hint}.*")
