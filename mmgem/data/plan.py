"""What a run asks of its data and machines, from the index alone: nothing is read, built or fetched.

Receives a Config and the machines. Gives for each stage its steps, what a rank and a node read, and the cache and
bandwidth that a node needs, as numbers and as text. Refuses, with a UserError that names the nearest setting that can,
what cannot work. Imports neither torch nor lightning, so that the answer comes at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmgem.config import Config, DataConfig, StageConfig
from mmgem.data.index import INDEX_NAME
from mmgem.data.order import Order
from mmgem.data.processes import cpus
from mmgem.data.shards import OPEN_SHARDS
from mmgem.data.sources import Sources, open_training_data, open_validation_data
from mmgem.data.store import is_url
from mmgem.errors import UserError

_POSITIONS = 1 << 18
"""So many are looked at to find a rank's lanes where they differ from step to step."""
_LOOKED_AHEAD = 2
"""torch's loader has so many batches under way for each worker."""
_MEMBERS = 1.01
"""The lists of the shards' members are kept beside them; the index does not say how large they are."""


@dataclass(frozen=True)
class Machines:
    nodes: int = 1
    gpus_per_node: int = 1
    """Each has one rank."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


# --- the length of a stage, and what cannot work whatever the machines are ----------------------------------------


def stage_length(stage: StageConfig) -> str:
    """As it is set."""
    if stage.epochs is not None:
        return f"{stage.epochs:g} epochs"
    return _many(stage.samples, "sample") if stage.samples is not None else _many(stage.steps or 0, "step")


def stage_steps(stage: StageConfig, samples_in_data: int) -> int:
    """Whole steps of a stage, at least one."""
    if stage.steps is not None:
        return stage.steps
    return max(1, _samples_asked(stage, samples_in_data) // stage.global_batch)


def _samples_asked(stage: StageConfig, samples_in_data: int) -> int:
    return stage.samples if stage.samples is not None else round((stage.epochs or 0) * samples_in_data)


def refuse_impossible(stages: Sequence[StageConfig], dataset: Sources, machines: Machines) -> None:
    """Raises UserError where a stage cannot work on these data and machines."""
    for stage in stages:
        refuse_uneven_ranks(stage, machines)
        refuse_missing_regions(dataset, stage)
        _refuse_nothing_to_learn(dataset, stage)
        _refuse_large_batch(stage, dataset, machines.ranks)
        _refuse_short(stage, len(dataset), machines.ranks)


def refuse_missing_regions(dataset: Sources, stage: StageConfig) -> None:
    if stage.max_regions and not dataset.has_regions:
        raise UserError(
            f"stage {stage.name}: max_regions={stage.max_regions}, but {dataset.name} has no regions; "
            "set max_regions: 0 or prepare data with boxes"
        )


def refuse_uneven_ranks(stage: StageConfig, machines: Machines) -> None:
    """Names the nearest batch, and the most of these ranks that divide the one that is set, as many on each node."""
    nodes, ranks_a_node, ranks, batch = machines.nodes, machines.gpus_per_node, machines.ranks, stage.global_batch
    if batch % ranks == 0:
        return
    fewer = [(n * r, n, r) for r in range(1, ranks_a_node + 1) for n in _divisors(batch, nodes) if batch % (n * r) == 0]
    near, near_nodes, near_ranks = max(fewer)
    raise UserError(
        f"stage {stage.name}: global_batch={batch} cannot be divided among {ranks} ranks; set it to "
        f"{max(1, (batch + ranks // 2) // ranks) * ranks}, or start {near} rank{'s' if near > 1 else ''} "
        f"({near_nodes} node{'s' if near_nodes > 1 else ''} x {near_ranks})"
    )


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _refuse_nothing_to_learn(dataset: Sources, stage: StageConfig) -> None:
    if not dataset.has_captions and not stage.max_regions:
        region = "set max_regions to 1 or more" if dataset.has_regions else "prepare data with captions"
        raise UserError(
            f"stage {stage.name}: {dataset.name} has no captions and max_regions is 0, nothing would train; {region}"
        )


def _refuse_large_batch(stage: StageConfig, dataset: Sources, ranks: int) -> None:
    batch, fitting = stage.global_batch, len(dataset)
    if dataset.weights:  # of each source a step has its share
        splits = zip(dataset.splits, dataset.weights, strict=True)
        fitting = min(math.floor(len(split) * sum(dataset.weights) / weight) for split, weight in splits)
    if batch > fitting:
        near = fitting // ranks * ranks
        mend = f"set it to {near}" if near > 1 else "prepare more data, or start fewer ranks"
        share = ", of a source with its weight" if dataset.weights else ""
        raise UserError(
            f"stage {stage.name}: global_batch={batch} is more than the {fitting} samples of the data{share}, a step "
            f"would hold pictures twice; {mend}"
        )


def _refuse_short(stage: StageConfig, samples: int, ranks: int) -> None:
    batch = stage.global_batch
    asked = batch if stage.steps is not None else _samples_asked(stage, samples)
    if asked < batch:
        what, enough = f"samples={asked} is", f"samples to {batch}"
        if stage.epochs is not None:
            what, enough = f"epochs={stage.epochs:g} is {asked} samples,", f"epochs to {_up(batch / samples)}"
        smaller = asked // ranks * ranks
        raise UserError(
            f"stage {stage.name}: {what} less than one step of global_batch={batch}; set {enough}"
            f"{f', or global_batch to {smaller}' if smaller > 1 else ''}"
        )


# --- what is read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a rank or a node reads; where they differ, the one that reads most."""

    lanes: int
    shards: int
    """Of `StagePlan.shards`."""
    at_once: int
    """Shards at a time, at most: one window at each lane, of each weighted source."""


@dataclass(frozen=True)
class StagePlan:
    name: str
    steps: int
    samples: int
    """Seen, by all ranks together."""
    epochs: tuple[float, ...]
    """Of each weighted source; else of all the data."""
    sample_bytes: float
    """Of an average sample seen."""
    shards: int
    """Different ones, in an epoch, or in the stage if that is shorter."""
    rank: Reads
    node: Reads
    fetched: float
    """Bytes of URLs that a node fetches in the stage: whole shards, once an epoch; once for all if all fit in the
    cache."""
    cache_least: int
    """Bytes of the largest shards of URLs that a node can be reading at a time. With less, each would give way before
    it is read, and be fetched again for nearly each of its samples."""
    cache_wanted: int
    """The same with one more window at each lane: what comes next is fetched while this one is read."""


@dataclass(frozen=True)
class Shards:
    """The shards of all sources, as far as a plan needs them. Groups: weighted sources, or all as one."""

    remote_bytes_S: np.ndarray
    """0 for shards that are on this machine."""
    groups: tuple[slice, ...]
    bytes: tuple[int, ...]
    """Of each group."""
    samples: tuple[int, ...]

    @classmethod
    def of(cls, dataset: Sources) -> Shards:
        sizes, remote = [], []
        for split in dataset.splits:
            below_url = is_url(split.name)
            sizes += [shard.bytes for shard in split.shards]
            remote += [is_url(shard.path) or (below_url and shard.path[:1] != "/") for shard in split.shards]
        ends = np.cumsum([count for count, _ in dataset.order_sources] or [len(sizes)]).tolist()
        groups = tuple(slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False))
        bytes_S = np.asarray(sizes, dtype=np.int64)
        return cls(
            bytes_S * np.asarray(remote),
            groups,
            tuple(int(bytes_S[group].sum()) for group in groups),
            tuple(int(dataset.sizes[group].sum()) for group in groups),
        )

    def at_once(self, shards: int) -> int:
        """At most so many of each group."""
        return sum(min(shards, group.stop - group.start) for group in self.groups)

    def largest_remote(self, shards: int) -> int:
        """Bytes of so many of each group's shards of URLs, the largest ones."""
        return sum(int(np.sort(self.remote_bytes_S[group])[::-1][:shards].sum()) for group in self.groups)


def plan_stage(stage: StageConfig, data: DataConfig, order: Order, shards: Shards, machines: Machines) -> StagePlan:
    """Raises nothing: what cannot work was refused before."""
    steps = stage_steps(stage, order.samples)
    seen = steps * stage.global_batch
    drawn = order.drawn(seen)
    epochs = tuple(count / samples for count, samples in zip(drawn, shards.samples, strict=True))
    of_rank = _lanes_read(order, stage.global_batch, steps, machines.ranks, len(shards.groups) > 1)
    of_node = np.logical_or.reduce(of_rank.reshape(machines.nodes, machines.gpus_per_node, order.lanes), axis=1)

    def most_of(reads_NL: np.ndarray) -> tuple[Reads, float]:
        most, fetched, lanes = 0, 0.0, int(reads_NL.sum(axis=1).max())
        for reads_L in np.unique(reads_NL, axis=0):
            found = order.lane_shards(np.flatnonzero(reads_L), seen)
            most = max(most, sum(map(len, found)))
            whole = [int(shards.remote_bytes_S[one].sum()) for one in found]
            fetched = max(fetched, sum(size * max(1.0, times) for size, times in zip(whole, epochs, strict=True)))
        return Reads(lanes, most, min(most, shards.at_once(lanes * data.window))), fetched

    node, fetched = most_of(of_node)
    all_remote = int(shards.remote_bytes_S.sum())
    return StagePlan(
        name=stage.name,
        steps=steps,
        samples=seen,
        epochs=epochs,
        sample_bytes=sum(times * size for times, size in zip(epochs, shards.bytes, strict=True)) / seen,
        shards=sum(map(len, order.lane_shards(range(order.lanes), seen))),
        rank=most_of(of_rank)[0],
        node=node,
        fetched=min(fetched, all_remote) if all_remote <= data.shard_cache_gb * 1e9 else fetched,
        cache_least=shards.largest_remote(node.lanes * data.window),
        cache_wanted=shards.largest_remote(2 * node.lanes * data.window),
    )


def _lanes_read(order: Order, batch: int, steps: int, ranks: int, weighted: bool) -> np.ndarray:
    """Which lanes each rank reads: ranks x lanes, boolean. Which they are repeats after `lanes` steps, but where an
    epoch ends, and where sources have weights: there so many steps are looked at that few are missed."""
    steps = min(steps, max(order.lanes, _POSITIONS // batch if weighted else 1))
    lanes_NG = np.sort(order.lanes_of(np.arange(steps * batch)).reshape(steps, batch), axis=1)
    rank_G = np.arange(batch) // (batch // ranks)
    reads = np.zeros((ranks, order.lanes), dtype=bool)
    reads[np.broadcast_to(rank_G, lanes_NG.shape), lanes_NG] = True
    return reads


# --- all of it ----------------------------------------------------------------------------------------------------


def data_plan(config: Config, machines: Machines, samples_per_second: float = 100.0, look: bool = True) -> str:
    """What a run on these machines asks of its data, as text. `samples_per_second`: of each rank, which bandwidth
    follows from. `look`: whether the data are there to be looked at. Raises UserError for what cannot work."""
    _refuse_numbers(machines, samples_per_second)
    for stage in config.stages:
        refuse_uneven_ranks(stage, machines)
        if stage.epochs is None:
            _refuse_short(stage, 0, machines.ranks)
    workers = config.data.workers
    ahead = f": {_LOOKED_AHEAD * workers} steps ahead" if workers else ": each step waits for its samples"
    head = (
        f"ranks: {machines.ranks} ({_many(machines.nodes, 'node')} x {machines.gpus_per_node}), "
        f"{_many(workers, 'worker')} each{ahead}"
    )
    notes = list(_worker_notes(config.data, machines))
    if not look:
        lines = ["data: not looked at (--no-data)", head]
        lines += [line for stage in config.stages for line in _blind_lines(stage, machines)]
        return "\n".join([*lines, *notes])
    dataset = open_training_data(config.data)
    refuse_impossible(config.stages, dataset, machines)
    notes += _validation_notes(config.data)
    order = Order(dataset.sizes, config.seed, config.data.window, config.data.lanes, dataset.order_sources)
    shards = Shards.of(dataset)
    lines = [*_data_lines(dataset), head]
    for stage in config.stages:
        plan = plan_stage(stage, config.data, order, shards, machines)
        _refuse_small_cache(plan, config.data, shards)
        lines += _stage_lines(stage, plan, config.data, machines, samples_per_second)
        notes += _stage_notes(stage, plan, config.data, machines)
    return "\n".join([*lines, *dict.fromkeys(notes)])


def _refuse_numbers(machines: Machines, samples_per_second: float) -> None:
    for option, value in (("--nodes", machines.nodes), ("--gpus-per-node", machines.gpus_per_node)):
        if value < 1:
            raise UserError(f"{option} {value}: there must be at least 1")
    if not 0 < samples_per_second < math.inf:
        raise UserError(f"--samples-per-second {samples_per_second:g}: give a number above 0, e.g. 100")


def _refuse_small_cache(plan: StagePlan, data: DataConfig, shards: Shards) -> None:
    if plan.cache_least <= data.shard_cache_gb * 1e9:
        return
    windows = range(data.window - 1, 0, -1)
    smaller = (w for w in windows if shards.largest_remote(plan.node.lanes * w) <= data.shard_cache_gb * 1e9)
    window = next(smaller, None)
    raise UserError(
        f"stage {plan.name}: data.shard_cache_gb={data.shard_cache_gb:g} has no room for the {_size(plan.cache_least)} "
        f"of shards that a node reads at a time, each would be fetched again and again; set it to "
        f"{_up(plan.cache_least * _MEMBERS / 1e9)} ({_up(plan.cache_wanted * _MEMBERS / 1e9)}: the next ones come "
        f"meanwhile){f', or data.window to {window}' if window else ''}"
    )


# --- text ---------------------------------------------------------------------------------------------------------


def _data_lines(dataset: Sources) -> list[str]:
    lines, weights = [], dataset.weights or (0.0,) * len(dataset.splits)
    for split, weight in zip(dataset.splits, weights, strict=True):
        size = sum(shard.bytes for shard in split.shards)
        share = f"; {weight / sum(weights):.1%} of the samples seen" if dataset.weights else ""
        lines.append(
            f"data: {split.name}: {_many(len(split), 'sample')} in {_many(len(split.shards), 'shard')}, "
            f"{_size(size)} ({_size(size / len(split))} a sample), {_many(split.totals['captions'], 'caption')}, "
            f"{_many(split.totals['regions'], 'region')}{share}"
        )
    return lines


def _blind_lines(stage: StageConfig, machines: Machines) -> list[str]:
    length = stage_length(stage) if stage.epochs is not None else _many(stage_steps(stage, 0), "step")
    return [f"stage {stage.name}: {length} of global_batch {stage.global_batch}", f"  a rank: {_step(stage, machines)}"]


def _step(stage: StageConfig, machines: Machines) -> str:
    count = stage.global_batch // machines.ranks
    boxes = f", up to {_many(count * stage.max_regions, 'box', 'boxes')}" if stage.max_regions else ""
    captions = f"up to {_many(count * stage.captions_per_image, 'caption')}"
    return f"{_many(count, 'sample')} a step ({captions}{boxes})"


def _stage_lines(stage: StageConfig, plan: StagePlan, data: DataConfig, machines: Machines, rate: float) -> list[str]:
    epochs = ", ".join(f"{number:.3g}" for number in plan.epochs)
    of_sources = " (of each source)" if len(plan.epochs) > 1 else ""
    of_rank, of_node = plan.samples / machines.ranks, plan.samples / machines.nodes
    lines = [
        f"stage {stage.name}: {_many(plan.steps, 'step')} of global_batch {stage.global_batch} = "
        f"{plan.samples:,} samples = {epochs} epochs{of_sources}",
        f"  a rank: {_step(stage, machines)}, {_size(of_rank / plan.steps * plan.sample_bytes)}; in the stage "
        f"{_size(of_rank * plan.sample_bytes)}; {_reads(plan.rank, plan, data)}",
    ]
    seconds = of_rank / rate
    flow = f"reads {_size(of_node * plan.sample_bytes / seconds)}/s"
    if plan.cache_least:
        flow += f", fetches {_size(plan.fetched / seconds)}/s ({_size(plan.fetched)} in the stage),"
    lines.append(f"  a node: {_reads(plan.node, plan, data)}; {flow} at {rate:g} samples/s a rank")
    if plan.cache_least:
        lines.append(
            f"  cache of a node: {_size(plan.cache_least)} for the shards read at a time, {_size(plan.cache_wanted)} "
            f"with the next ones; data.shard_cache_gb={data.shard_cache_gb:g}"
        )
    return lines


def _reads(reads: Reads, plan: StagePlan, data: DataConfig) -> str:
    epoch = " an epoch" if max(plan.epochs) >= 1 else ""
    return (
        f"{_many(reads.lanes, 'lane')} of {data.lanes}: {_many(reads.shards, 'shard')}{epoch}, "
        f"{reads.at_once:,} at a time"
    )


def _worker_notes(data: DataConfig, machines: Machines) -> list[str]:
    processes = machines.gpus_per_node * data.workers
    if processes <= cpus():
        return []
    fitting = cpus() // machines.gpus_per_node
    return [
        f"note: {processes} workers a node ({machines.gpus_per_node} x data.workers={data.workers}), this machine has "
        f"{_many(cpus(), 'CPU')}: if the nodes are like it, set data.workers to {fitting}"
    ]


def _validation_notes(data: DataConfig) -> list[str]:
    """Raises UserError for a validation split that was named, and is not there."""
    if data.val_split is None or open_validation_data(data) is not None:
        return []
    path = data.path or data.sources[0].path
    found = [] if is_url(path) else sorted(index.parent.name for index in Path(path).glob(f"*/{INDEX_NAME}"))
    has = f"; it has {', '.join(found)}" if found else ""
    what = f"data.val_split={data.val_split}: no such split in {path}{has}"
    if data.val_split != DataConfig().val_split:
        raise UserError(f"{what}: name one that it has, or set it to null")
    return [f"note: {what}; captions in the log will be of training pictures"]


def _stage_notes(stage: StageConfig, plan: StagePlan, data: DataConfig, machines: Machines) -> list[str]:
    notes = []
    if plan.cache_least <= data.shard_cache_gb * 1e9 < plan.cache_wanted:
        notes.append(
            f"note: stage {stage.name}: steps will wait for shards: data.shard_cache_gb="
            f"{_up(plan.cache_wanted * _MEMBERS / 1e9)} lets the next ones come meanwhile"
        )
    if plan.rank.at_once > OPEN_SHARDS:
        notes.append(
            f"note: stage {stage.name}: a rank reads {plan.rank.at_once} shards at a time, a process keeps "
            f"{OPEN_SHARDS} open, and opens the others anew: slow; lower data.window or data.lanes"
        )
    uneven = data.lanes % machines.nodes != 0 or stage.global_batch % data.lanes != 0
    if machines.nodes > 1 and uneven:
        fitting = [n for n in _divisors(stage.global_batch, stage.global_batch) if n % machines.nodes == 0]
        near = min(fitting, key=lambda n: (abs(n - data.lanes), n))
        times = plan.node.shards * machines.nodes / plan.shards
        notes.append(
            f"note: stage {stage.name}: nodes share shards: each reads {plan.node.shards:,}, {times:.3g} times its "
            f"share, as data.lanes={data.lanes} is no multiple of {machines.nodes} nodes that divides global_batch; "
            f"data.lanes={near} lets each read its own"
        )
    return notes


def _many(count: int, one: str, several: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _size(count: float) -> str:
    """Bytes, in units of 1000."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, max(0, int(math.log10(count * 1.0005) // 3))) if count > 0 else 0
    return f"{count / 1000**power:.3g} {units[power]}"


def _up(value: float) -> str:
    """To three digits, never below `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:g}"
