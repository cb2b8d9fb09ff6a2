"""What a config would build and ask of each GPU, without building it: shapes on the meta device, and arithmetic.

Receives a Config, the machines, and what else is to be assumed. Gives a text, and the reason if it cannot work: it does
not fit the GPU. Refuses what cannot be built. Needs neither weights nor a GPU; an LLM named by a hub id is built from
`model.llm.config`, which therefore has to describe it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmgem.config import Config, ModelConfig, StageConfig
from mmgem.data.plan import Machines, stage_length, stage_steps
from mmgem.errors import UserError, one_line
from mmgem.model import MMGem
from mmgem.model.language import refuse_unknown_settings
from mmgem.text import train_tokenizer
from mmgem.training import arithmetic, estimate
from mmgem.training.arithmetic import Activations, StepFlops
from mmgem.training.estimate import Engine, Gpu, Memory, Time, Traffic, Weights

MOST_TRACED = 4096
"""Samples at a time; what more of them hold is a straight line through this many and half of them."""
MOST_PACKED = 1024
"""Samples whose texts are packed to see how much padding there is."""


@dataclass(frozen=True)
class Assumptions:
    gpu: str | None = None
    """A name of `estimate.GPUS`. Without it nothing is said of time, nor whether it fits."""
    mfu: float = 0.4
    """The share of the GPU's peak at which a step computes."""
    text_tokens: int = 16
    """Of an average text, without special tokens."""
    network: float | None = None
    """Bytes/s from a GPU to other machines; None: usual for its type."""


@dataclass(frozen=True)
class DataCounts:
    """From the index, where the data were looked at."""

    samples: int
    captions: int
    regions: int

    def share_of(self, stage: StageConfig) -> float:
        """Texts of an average step, of those of a step whose samples all have as many as the stage takes."""
        most = stage.captions_per_image + stage.max_regions
        captions = min(stage.captions_per_image, self.captions / self.samples)
        return (captions + min(stage.max_regions, self.regions / self.samples)) / most


@dataclass(frozen=True)
class Report:
    text: str
    refusal: str | None = None
    """Why the run cannot work, with the nearest setting that can."""
    estimates: tuple[Estimate, ...] = ()
    """Of each stage."""


def check(
    config: Config,
    machines: Machines | None = None,
    assumptions: Assumptions | None = None,
    data: DataCounts | None = None,
) -> Report:
    """Raises UserError for what cannot be built, and for assumptions that make no sense."""
    machines, assumptions = machines or Machines(), assumptions or Assumptions()
    gpu = _gpu(config, assumptions)
    shadows = Shadows(config, on_gpu=config.training.device != "cpu", text_tokens=assumptions.text_tokens)
    counts, shapes = shadows.counts, shadows.shapes
    width = max(len(part) for part in counts)
    lines = [f"{part:<{width}}  {count:>15,} parameters" for part, count in counts.items()]
    lines += [f"{name}: {value}" for name, value in shapes.items()]
    for stage in config.stages:
        regions = f", up to {stage.max_regions} regions an image" if stage.max_regions else ""
        frozen = ", ".join(stage.freeze) or "nothing"
        lines.append(
            f"stage {stage.name}: {stage_length(stage)}, global_batch {stage.global_batch}{regions}, frozen: {frozen}"
        )
    engine = estimate.engine_of(config.training, machines.ranks, shadows.on_gpu, _bf16(config))
    try:
        estimates = [_estimate(shadows, stage, engine, machines, assumptions, gpu, data) for stage in config.stages]
    except RuntimeError as e:  # e.g. experts, whose tokens are chosen by their values
        lines.append(f"note: this model's memory and FLOPs do not follow from shapes alone ({one_line(e)[:150]})")
        return Report("\n".join(lines))
    lines += ["", *_head(engine, machines, assumptions, gpu), *_table(estimates, gpu)]
    refusals = [_too_large(shadows, one, engine, gpu) for one in estimates] if gpu else []
    return Report("\n".join(lines), next((refusal for refusal in refusals if refusal), None), tuple(estimates))


def _gpu(config: Config, assumptions: Assumptions) -> Gpu | None:
    if not 0 < assumptions.mfu <= 1:
        raise UserError(f"--mfu {assumptions.mfu:g}: give a share above 0, up to 1")
    if not 1 <= assumptions.text_tokens <= config.model.max_tokens:
        raise UserError(
            f"--text-tokens {assumptions.text_tokens}: give 1 to {config.model.max_tokens}, which is model.max_tokens"
        )
    if assumptions.network is not None and not 0 < assumptions.network < math.inf:
        raise UserError("--network-gbit: give a number above 0")
    if assumptions.gpu is None:
        return None
    if config.training.device == "cpu":
        raise UserError(f"--gpu {assumptions.gpu}: training.device is cpu; set it to auto, or leave --gpu out")
    return estimate.gpu_of(assumptions.gpu)


def _bf16(config: Config) -> bool:
    if config.training.precision != "auto" or config.training.device != "cpu":
        return config.training.precision in ("auto", "bf16")
    from mmgem.training.build import uses_bf16

    return uses_bf16(config)


# --- the model without its weights --------------------------------------------------------------------------------


def meta_counts(config: Config) -> tuple[dict[str, int], dict[str, str]]:
    """Parameters by part, and the shapes along the path for one picture, from a model on the meta device."""
    return _describe(_on_meta(config))


def _describe(model: MMGem) -> tuple[dict[str, int], dict[str, str]]:
    size = model.config.vision.image_size
    with torch.device("meta"):
        map_BCHW = model.vision.eval()(torch.zeros(1, 3, size, size))
    shapes = {
        "feature map": "C x H x W = " + " x ".join(str(s) for s in map_BCHW.shape[1:]),
        "embedding": f"E = {model.config.embed_dim}",
        "LLM width": f"D = {model.language.width}",
    }
    return arithmetic.count_parameters(model), shapes


def _on_meta(config: Config) -> MMGem:
    settings = copy.deepcopy(config.model)
    _refuse_unknown_sizes(settings)
    # Any tokenizer does: the vocabulary of a named LLM or tokenizer is in llm.config, and one that is trained has the
    # size that is set.
    tokenizer = train_tokenizer(["a"], 300, lowercase=True)
    if not (settings.llm.name or settings.tokenizer.path):
        settings.llm.config["vocab_size"] = max(settings.tokenizer.vocab_size, settings.llm.config.get("vocab_size", 0))
    with torch.device("meta"):
        model = MMGem(settings, tokenizer, load_weights=False)
    refuse_unknown_settings(config.model.llm.config, model.language.hf.config)
    return model


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


class Shadows:
    """A config's model without weights: what is counted on it, kept for the next question."""

    def __init__(self, config: Config, on_gpu: bool, text_tokens: int):
        self.config, self.on_gpu, self.text_tokens = config, on_gpu, text_tokens
        self.meta = _on_meta(config)
        self.counts, self.shapes = _describe(self.meta)
        self.models: dict[torch.dtype, tuple[MMGem, arithmetic.FakeTensorMode]] = {}
        self.traced: dict[tuple[str, int, int, bool], Activations] = {}

    def texts(self, stage: StageConfig, samples: int) -> arithmetic.PackedTexts:
        row = self.config.data.row_tokens
        return arithmetic.made_up_texts(stage, samples, self.text_tokens, self.meta.codec, row)

    def weights(self, stage: StageConfig) -> tuple[Weights, dict[str, int]]:
        """And the parameters that train, by part."""
        arithmetic.set_stage(self.meta, stage)
        trained = arithmetic.count_parameters(self.meta, trained=True)
        return Weights(self.counts["all"], trained["all"], arithmetic.largest_block(self.meta)), trained

    def flops(self, stage: StageConfig, samples: int, ranks: int, share: float) -> tuple[StepFlops, int, int]:
        """Of a rank's step; its texts, and tokens with padding. share: of the texts that there could be."""
        arithmetic.set_stage(self.meta, stage)
        packed = min(samples, MOST_PACKED)
        texts = arithmetic.TextCounts.of(self.texts(stage, packed)).times(samples / packed * share)
        boxes = round(samples * stage.max_regions * share)
        shapes = arithmetic.measure_shapes(self.meta, stage)
        flops = arithmetic.step_flops(shapes, stage, samples, texts, boxes, ranks)
        return flops, texts.texts, texts.padded_tokens

    def activations(self, stage: StageConfig, engine: Engine, samples: int) -> Activations:
        if samples <= MOST_TRACED:
            return self._trace(stage, engine, samples)
        low, high = (self._trace(stage, engine, n) for n in (MOST_TRACED // 2, MOST_TRACED))
        beyond = (samples - MOST_TRACED) / (MOST_TRACED // 2)
        alone = round(high.alone + beyond * (high.alone - low.alone))
        more = round(high.with_gradients + beyond * (high.with_gradients - low.with_gradients))
        return Activations(alone, max(alone, more))

    def _trace(self, stage: StageConfig, engine: Engine, samples: int) -> Activations:
        key = (stage.name, samples, engine.weight, engine.autocast)
        if key not in self.traced:
            dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[engine.weight]
            if dtype not in self.models:
                model = _on_meta(self.config).to(dtype)
                self.models[dtype] = model, arithmetic.without_memory(model)
            model, mode = self.models[dtype]
            arithmetic.set_stage(model, stage)
            self.traced[key] = arithmetic.step_activations(
                model, mode, stage, samples, self.texts(stage, samples), engine.autocast, self.on_gpu
            )
        return self.traced[key]


# --- a stage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    stage: StageConfig
    trained: dict[str, int]
    weights: Weights
    share: int
    """Samples of a rank in a step."""
    at_once: int
    """Of them, in a micro-batch."""
    memory: Memory
    traffic: Traffic
    flops: StepFlops
    tokens: int
    time: Time | None
    steps: int | None


def _estimate(
    shadows: Shadows,
    stage: StageConfig,
    engine: Engine,
    machines: Machines,
    assumptions: Assumptions,
    gpu: Gpu | None,
    data: DataCounts | None,
) -> Estimate:
    share = max(1, stage.global_batch // machines.ranks)
    at_once = min(stage.micro_batch or share, share)
    weights, trained = shadows.weights(stage)
    embed_dim = shadows.config.model.embed_dim
    flops, texts, tokens = shadows.flops(stage, share, engine.ranks, data.share_of(stage) if data else 1.0)
    sent = estimate.traffic(engine, weights, math.ceil(share / at_once), texts, embed_dim)
    time = None
    if gpu:
        time = estimate.step_time(
            flops.done, sent.total, engine, weights, gpu, machines.nodes, assumptions.mfu, assumptions.network
        )
    known = data is not None or stage.epochs is None
    return Estimate(
        stage=stage,
        trained=trained,
        weights=weights,
        share=share,
        at_once=at_once,
        memory=_memory(shadows, stage, engine, weights, share, at_once),
        traffic=sent,
        flops=flops,
        tokens=tokens,
        time=time,
        steps=stage_steps(stage, data.samples if data else 0) if known else None,
    )


def _memory(shadows: Shadows, stage: StageConfig, engine: Engine, weights: Weights, share: int, at_once: int) -> Memory:
    texts = share * (stage.captions_per_image + stage.max_regions)
    set_ = dataclasses.replace(stage, micro_batch=at_once)
    vectors = estimate.held_vectors(set_, share, texts, shadows.config.model.embed_dim, engine.ranks)
    held = shadows.activations(stage, engine, at_once)
    fixed = estimate.states(engine, weights, stage.ema > 0)
    one_pass = at_once == share and fixed.gradients == weights.trained * engine.weight
    return estimate.memory(fixed, held.alone, held.with_gradients, vectors, one_pass)


# --- what does not fit --------------------------------------------------------------------------------------------


def _too_large(shadows: Shadows, one: Estimate, engine: Engine, gpu: Gpu) -> str | None:
    """Why the stage does not fit the GPU, and the nearest setting that does; None if it fits."""
    room = estimate.USABLE * gpu.memory
    if one.memory.total <= room:
        return None
    number = next(n for n, stage in enumerate(shadows.config.stages) if stage is one.stage)
    return (
        f"stage {one.stage.name}: a rank needs {size(one.memory.total)}, of the GPU's {size(gpu.memory)} "
        f"{size(room)} are usable; {_mend(shadows, one, engine, room, f'stages.{number}.micro_batch')}"
    )


def _mend(shadows: Shadows, one: Estimate, engine: Engine, room: float, setting: str) -> str:
    largest = _largest(shadows, one, engine, room)
    if largest:
        return f"set {setting} to {largest}"
    for other in _smaller_engines(engine):
        strategy = f"training.strategy to {other.strategy}" if other.strategy != engine.strategy else ""
        offload = f"training.offload to {other.offload}" if other.offload != engine.offload else ""
        settings = [text for text in (strategy, offload) if text]
        largest = _largest(shadows, one, other, room)
        if largest:
            settings += [f"{setting} to {largest}"] if largest < one.at_once else []
            return f"set {', '.join(settings)}"
    more = "more GPUs, " if engine.zero == 3 else ""
    return f"no setting makes it fit: take {more}GPUs with more memory, or a smaller model"


def _smaller_engines(engine: Engine) -> Iterator[Engine]:
    """Those that hold less on a GPU, the nearest first."""
    weight = 2 if engine.bf16 else engine.weight
    order = [f"deepspeed_{zero}" for zero in (1, 2, 3)]
    later = order[order.index(engine.strategy) + 1 :] if engine.strategy in order else order
    shared = [dataclasses.replace(engine, strategy=name, weight=weight, autocast=False) for name in later]
    if engine.ranks > 1 and engine.offload == "none":
        yield from shared
    last = dataclasses.replace(engine, strategy="deepspeed_3", weight=weight, autocast=False)
    if engine.offload == "none":
        second = dataclasses.replace(last, strategy="deepspeed_2", offload="optimizer")
        yield from (second, dataclasses.replace(last, offload="optimizer"))
    if engine.offload != "parameters":
        yield dataclasses.replace(last, offload="parameters")


def _largest(shadows: Shadows, one: Estimate, engine: Engine, room: float) -> int:
    """The largest micro-batch, up to the stage's, that fits and cuts the share evenly; 0: not even one sample does."""
    largest = _largest_of_any(shadows, one, engine, room)
    if largest in (0, one.at_once):
        return largest
    return math.ceil(one.share / math.ceil(one.share / largest))


def _largest_of_any(shadows: Shadows, one: Estimate, engine: Engine, room: float) -> int:
    def total(at_once: int) -> float:
        return _memory(shadows, one.stage, engine, one.weights, one.share, at_once).total

    most, least = one.at_once, 1
    high = total(most)
    if high <= room:
        return most
    low = total(least)
    if low > room:
        return 0
    while most - least > 1:
        # A straight line between two that were tried, and a little less, for it is not quite one.
        guess = least + int((most - least) * (room - low) / (high - low) * 0.99)
        guess = min(max(guess, least + 1), most - 1)
        needed = total(guess)
        if needed > room:
            most, high = guess, needed
        elif guess >= 0.95 * most or room - needed < 0.02 * room:
            return guess
        else:
            least, low = guess, needed
    return least


# --- text -----------------------------------------------------------------------------------------------------------


def _head(engine: Engine, machines: Machines, assumptions: Assumptions, gpu: Gpu | None) -> list[str]:
    precision = "weights and gradients in bf16, master copies in fp32" if engine.weight == 2 else "weights in fp32"
    precision = "weights in fp64" if engine.weight == 8 else precision
    precision += ", products in bf16" if engine.autocast else ""
    strategy = "one rank" if engine.strategy == estimate.PLAIN else f"{engine.strategy}, {engine.ranks} ranks"
    offload = "" if engine.offload == "none" else f", offload: {engine.offload}"
    lines = [f"engine: {strategy}, {precision}{offload}"]
    assumed = [f"texts of {assumptions.text_tokens} tokens (--text-tokens)"]
    if gpu:
        peak = gpu.bf16 if engine.bf16 else gpu.fp32
        wire = gpu.link if machines.nodes == 1 else assumptions.network or gpu.network
        assumed.append(f"{assumptions.mfu:g} of {assumptions.gpu}'s {peak / 1e12:.4g} TFLOP/s (--mfu)")
        if engine.ranks > 1:
            assumed.append(f"{size(wire)}/s sent by a GPU{' (--network-gbit)' if machines.nodes > 1 else ''}")
    lines.append(f"assumed: {', '.join(assumed)}")
    if gpu is None and engine.on_gpu:
        lines.append(f"not known without --gpu ({', '.join(estimate.GPUS)}): whether it fits, and how long it takes")
    return lines


def _table(estimates: list[Estimate], gpu: Gpu | None) -> list[str]:
    """A row for each figure, a column for each stage; rows of which no stage has anything are left out."""
    columns = [_column(one, gpu) for one in estimates]
    names = [name for name in columns[0] if any(column[name] not in ("", "0 B", "0 FLOP") for column in columns)]
    rows = [("", *(one.stage.name for one in estimates))]
    rows += [(name, *(column[name] for column in columns)) for name in names]
    first, *widths = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        lines.append(f"{name:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return lines


def _column(one: Estimate, gpu: Gpu | None) -> dict[str, str]:
    held, sent, flops = one.memory, one.traffic, one.flops
    column = {f"trained: {part}": f"{count:,}" for part, count in one.trained.items()}
    column |= {"samples of a rank, a step": f"{one.share:,}", "  at a time": f"{one.at_once:,}"}
    column |= {"tokens of a rank, a step": f"{one.tokens:,}"}
    column |= {
        "memory of a rank": size(held.total),
        "  weights": size(held.weights),
        "  gradients": size(held.gradients),
        "  optimizer": size(held.optimizer),
        "  moving average": size(held.average),
        "  buffers of the engine": size(held.buffers),
        "  activations": size(held.activations),
        "  vectors and scores": size(held.vectors),
        "  less: not at once": size(held.apart),
        "  or, later: the update": size(held.update),
        "  of the GPU's": f"{held.total / gpu.memory:.0%} of {size(gpu.memory)}" if gpu else "",
        "in the machine, a rank": size(held.host),
        "sent by a rank, a step": size(sent.total),
        "  of gradients": size(sent.gradients),
        "  of weights": size(sent.weights),
        "  of text vectors": size(sent.vectors),
        "FLOPs of a rank, a step": flop(flops.done),
        "  forward": flop(flops.forward),
        "  backward": flop(flops.backward),
        "  vectors first": flop(flops.embedded_again),
        "  recomputed": flop(flops.recomputed),
        "  padding": flop(flops.padding),
    }
    return column | _times(one)


def _times(one: Estimate) -> dict[str, str]:
    time = one.time
    if time is None:
        return {}
    batch = one.stage.global_batch
    rows = {
        "seconds of a step": _between(time.overlapped, time.total, "{:.3g}"),
        "  computing": f"{time.compute:.3g}",
        "  update": f"{time.update:.3g}",
        "  sending": f"{time.communication:.3g}",
        "samples/s of all ranks": _between(batch / time.total, batch / time.overlapped, "{:,.0f}"),
    }
    if one.steps is None:
        return rows | {"days of the stage": "? (needs the data)"}
    days = one.steps / 86400
    rows["days of the stage"] = _between(days * time.overlapped, days * time.total, "{:.3g}")
    return rows


def _between(low: float, high: float, form: str) -> str:
    texts = [form.format(value) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else " - ".join(texts)


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    return _scaled(count, "B", ("", "k", "M", "G", "T", "P"))


def flop(count: float) -> str:
    return _scaled(count, "FLOP", ("", "k", "M", "G", "T", "P", "E"))


def _scaled(count: float, unit: str, prefixes: tuple[str, ...]) -> str:
    power = min(len(prefixes) - 1, max(0, int(math.log10(count * 1.0005) // 3))) if count > 0 else 0
    return f"{count / 1000**power:.3g} {prefixes[power]}{unit}"
