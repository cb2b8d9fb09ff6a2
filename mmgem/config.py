"""The one tree of settings of a run.

Receives a YAML file and `key.path=value` overrides; gives a checked `Config`; refuses unknown keys (with the
nearest right name), wrong types and contradictions, each with its place. The resolved tree is saved with each run.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mmgem.config_rules import contradictions
from mmgem.errors import UserError, one_line
from mmgem.negatives import KINDS

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, kw_only=True)
class VisionConfig:
    library: Literal["timm", "open_clip"] = "timm"
    name: str | None = None
    """A model name of the library; for open_clip also `hf-hub:org/name`."""
    pretrained: str | None = None
    """A tag of the library, or a local checkpoint; null: random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """timm: arguments of `create_model`. open_clip: the tower's `vision_cfg`, which replaces `name`."""
    config_file: str | None = None
    """open_clip only: a model config in open_clip's JSON form, which replaces `name`."""
    layer: int | None = None
    """Which block's output is the feature map: null for the last with its norm, else an index, e.g. -2."""
    join: list[str] = field(default_factory=list)
    """timm towers that are a plain sequence: modules whose maps join the last one's channels, e.g. [blocks.4]; finer
    ones are averaged to its grid."""
    train_from: str | None = None
    """timm towers that are a plain sequence: the first module that may train, e.g. `blocks.5`."""
    image_size: int = 224
    resize: Literal["squash", "crop"] = "squash"
    """squash: the whole picture, its aspect lost. crop: short side to image_size, then the centre."""
    mean: tuple[float, float, float] | None = None
    """Null: what the library gives for this tower."""
    std: tuple[float, float, float] | None = None
    frozen_statistics: bool | None = None
    """Batch norms keep their statistics in training (small batches spoil them). Null: yes for pretrained towers."""
    standardise: bool = False
    """Bring the map's channels to mean 0 and deviation 1 over the training pictures, measured once at the start."""
    gradient_checkpointing: bool = False


@dataclass(config=_STRICT, kw_only=True)
class LlmConfig:
    name: str | None = None
    """A hub id or a local folder; null: random weights from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Architecture, as in a Hugging Face config.json (`model_type`, `hidden_size` …). `name`, if given, must agree.
    What the architecture does not know is refused when the model is built."""
    average_init: float = 0.0
    """Above 0, a random LLM of llama's layout starts as an average of its words instead of as a random mixture: the
    share of the average that each layer's attention adds."""
    embedding_init: float | None = None
    """Deviation of a random LLM's first word vectors; null: the architecture's own."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False


@dataclass(config=_STRICT, kw_only=True)
class TokenizerConfig:
    path: str | None = None
    """A hub id or a folder; null: the LLM's own, or, without one, trained on the training texts."""
    vocab_size: int = 4096
    lowercase: bool = True


@dataclass(config=_STRICT, kw_only=True)
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embed_dim: int = 512
    roi_size: int = 1
    """RoIAlign's output grid, averaged to one vector."""
    roi_sampling: int = -1
    """Sampling points an output bin and axis; -1: one a cell of the map, rounded up."""
    h1_init: float = 1.0
    """Size of h1's random first weights, as a share of in_features^-0.5; small: what is learned soon outweighs them."""
    visual_dropout: float = 0.0
    """Dropout on what h1 receives, in training."""
    head_dropout: float = 0.0
    """Dropout on what h2 and h3 receive, in training."""
    token_dropout: float = 0.0
    """Share of the input words of both streams hidden in training (their embedding zeroed)."""
    max_tokens: int = 64
    """Limit of a text's own tokens; longer ones are cut (before [EMB]) and counted."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Natural logarithm of the first factor on cosines; for the sigmoid loss ln 10 is usual (2.3026)."""
    init_logit_bias: float | None = None
    """First value of the sigmoid loss's bias, -10 is usual; null: there is none, as InfoNCE needs none."""


@dataclass(config=_STRICT, kw_only=True)
class SourceConfig:
    path: str
    """As `data.path`."""
    weight: float | None = None
    """Share of the samples seen, relative to the other sources'; null in all: the sources are read as one."""


@dataclass(config=_STRICT, kw_only=True)
class DataConfig:
    path: str = ""
    """A dataset made by `mmgem data prepare`, or a folder of tars indexed by `mmgem data index`; a folder or a URL
    (`s3://`, `gs://`, `hf://`, `https://`)."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several of them to train on, in place of `path`."""
    train_split: str = "train"
    val_split: str | None = "val"
    """Of `path`, or of the first source."""
    window: int = 4
    """So many shards are read and mixed at a time, at each of the `lanes`."""
    lanes: int = 8
    """Places of the epoch that are read at once. A multiple of the number of nodes lets each read its own shards."""
    verify: bool = True
    """Compare each shard's sha256 with its index when it is first read."""
    shard_cache: str | None = None
    """Where shards of URLs are kept on this machine; null: the user's cache folder."""
    shard_cache_gb: float = 20.0
    """How much of them, for all ranks of a machine."""
    row_tokens: int = 128
    """Length of a packed row."""
    workers: int = 0
    """Processes that read samples ahead; 0: the step waits for each."""
    scaled_decoding: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still as large as what the tower takes."""
    max_broken: float = 0.001
    """The share of samples that may be broken before the run stops; a broken one's place is taken by the next one."""
    cache: str | None = None
    """Where `cached_views` are kept, for other runs too; null: in the run's folder until the run is finished."""
    flip: float = 0.0
    """Chance of a mirrored picture; leave at 0 where texts speak of left and right."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the area kept by a random crop; boxes that lose more than half of themselves are left out."""
    color_jitter: float = 0.0


@dataclass(config=_STRICT, kw_only=True)
class HardLossConfig:
    """Weights of the losses against hard negatives (`negatives` of the stage makes these)."""

    columns: float = 0.0
    """The contrastive loss with the negatives among its texts and pictures. `emb: 0`, `columns: 1` is NegCLIP's loss,
    `emb: 1`, `columns: mu` SPEC's."""
    rank: float = 0.0
    """CE-CLIP's rank loss with adaptive margin; 0.2 there."""
    intra: float = 0.0
    """CE-CLIP's, between the texts alone; 0.2 there."""
    triplet: float = 0.0
    """TripletCLIP's, of negatives that have a picture of their own (`negatives.drawn`); 1 there."""
    focal: float = 0.0
    """FSC-CLIP's; 0.5 there."""
    focal_gamma: float = 2.0
    focal_smoothing: float = 0.02
    written: float = 0.0
    """The caption is to be likelier written for its picture than its negative."""
    written_margin: float = 0.5
    """By so much, in mean log p of a token."""


@dataclass(config=_STRICT, kw_only=True)
class NegativesConfig:
    texts: int = 0
    """So many hard negatives of each caption; 0: none."""
    source: Literal["rules", "data"] = "rules"
    """rules: made as a caption is read. data: those that lie with the sample (`mmgem refine negatives`)."""
    kinds: list[str] = field(default_factory=lambda: [k for k in KINDS if k != "shuffle"])
    """Of the rules, or of those in the data."""
    max_words: int | None = None
    """Of captions of more words none are made or taken: one changed word hardly changes them. Null: of all."""
    pictures: int = 0
    """So many copies of each picture with its patches in another order; 0: none."""
    patches: int = 3
    """So many patches a side."""
    drawn: bool = False
    """With source `data`: take the pictures, too, that were drawn of the negatives (`mmgem refine negatives
    --painter`)."""
    first: list[str] = field(default_factory=list)
    """With source `data`: captions of which there are negatives of these kinds are chosen before others, so that kinds
    to which few captions lend themselves are met often."""
    order_robust: bool = False
    """Captions with their words (kind `shuffle`) and pictures with their patches in another order are no negatives but
    positives: the order is to be looked through. Other kinds are then refused."""


@dataclass(config=_STRICT, kw_only=True)
class LossConfig:
    kind: Literal["infonce", "sigmoid"] = "infonce"
    """Of `emb` and `region_emb`. sigmoid: SigLIP's, for which `model.init_logit_bias` is to be set."""
    emb: float = 1.0
    gen: float = 1.0
    region_emb: float = 1.0
    region_gen: float = 1.0
    label_smoothing: float = 0.0
    hard: HardLossConfig = field(default_factory=HardLossConfig)

    def weight(self, name: str) -> float:
        """Of a loss by the name that the log has: `hard_rank` is `hard.rank`."""
        return getattr(self.hard, name.removeprefix("hard_")) if name.startswith("hard_") else getattr(self, name)

    def needs_vectors(self, regions: bool) -> bool:
        """Whether a text's vector counts for anything."""
        hard = self.hard
        of_hard = (hard.columns, hard.rank, hard.intra, hard.focal, hard.triplet)
        return any((self.emb, regions and self.region_emb, *of_hard))


@dataclass(config=_STRICT, kw_only=True)
class StageConfig:
    name: str = "global"
    samples: int | None = None
    """Length of the stage in samples seen; or give `steps`, or `epochs`."""
    steps: int | None = None
    epochs: float | None = None
    """In sizes of the training data, all sources together."""
    global_batch: int = 64
    """Samples a step, over all ranks: what the result depends on."""
    micro_batch: int | None = None
    """At most so many samples at a time on a rank: what has to fit in memory. The contrastive loss is still that of the
    whole global_batch (GradCache), for one more forward of tower and texts. Null: a rank's whole share at once."""
    captions_per_image: int = 1
    max_regions: int = 0
    """0: pairs only. Else at most so many boxes an image, with their phrases, beside the pairs."""
    written_regions: int | None = None
    """At most so many of an image's drawn boxes are also written (`loss.region_gen`); null: all."""
    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on `lr` by part, e.g. {vision: 0.1}."""
    min_lr: float = 0.0
    """Share of `lr` at the end of the cosine."""
    warmup: float = 0.05
    """Share of the stage's samples."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_grad: float = 1.0
    ema: float = 0.0
    """Decay a step of the weights' exponential moving average, which the stage then ends with; 0: none is kept."""
    freeze: list[Literal["vision", "llm", "projections"]] = field(default_factory=list)
    loss: LossConfig = field(default_factory=LossConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    image_size: int | None = None
    """Side of the pictures in this stage; null: the tower's. Smaller is cheaper."""
    patch_dropout: float = 0.0
    """Share of a ViT's patches left out in training; only without regions."""
    cached_views: int = 0
    """Above 0: the frozen part of the tower is computed once for so many views of each picture and kept on disk."""

    @property
    def made_pictures(self) -> int:
        """At most so many pictures go through the tower beside each sample's own."""
        made = self.negatives
        return made.pictures + (self.captions_per_image * made.texts if made.drawn else 0)


@dataclass(config=_STRICT, kw_only=True)
class TrainingConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "32", "bf16", "64"] = "32"
    """bf16: matrix products in bf16, weights in fp32. auto: bf16 where the machine computes it fast, else 32. 64: slow,
    to tell a difference in what is computed from one of rounding."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    strategy: Literal["auto", "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp2"] = "auto"
    """What the ranks hold of the optimizer (ZeRO 1), gradients (2) and parameters (3). auto: deepspeed_1 on several
    GPUs, ddp on several CPU ranks, and neither on one rank."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """DeepSpeed: what is kept in the machine's memory instead of the GPU's. parameters (deepspeed_3): the optimizer,
    too."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own settings, e.g. {zero_optimization: {reduce_bucket_size: 5.0e+8}}; they go before ours."""
    caption_kernel: Literal["torch", "liger", "cce"] = "torch"
    """What computes the caption loss. liger, cce: a fused kernel on GPUs, to be installed beside mmgem."""
    late_after: float = 120.0
    """Seconds after which a rank that does not come to its next step is named, with what it was to read."""
    stop_after: float = 1800.0
    """Seconds after which the others stop waiting for it, and the run stops with an error."""
    sample_every: int = 500
    """Steps between samples of captions in the log; 0: none."""
    val_every: int = 0
    """Steps between evaluations on the validation split, and one at each stage's end: val.jsonl, and the loggers under
    `val/`; 0: none."""
    val_tasks: list[
        Literal["retrieval", "captioning", "region-retrieval", "region-captioning", "rerank", "similarity-map"]
    ] = field(default_factory=lambda: ["retrieval"])
    val_samples: int = 500
    """Of the validation split, drawn by lot once: the same at each evaluation and in each run."""
    log_keys: bool = False
    """Also write which samples each step saw, in order: keys.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also made at each stage's end and when the run is stopped."""
    keep_checkpoints: int = 1
    """The newest so many are kept."""
    keep_best: bool = False
    """Keep also the one before which the loss was lowest, as a mean over the steps since the one before it."""
    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(config=_STRICT, kw_only=True)
class Config:
    run: str = "runs/run"
    """The run's folder."""
    init_from: str | None = None
    """An mmgem run or model whose weights and tokenizer the run begins with; `model` must describe the same shapes."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    training: TrainingConfig = field(default_factory=TrainingConfig)


# --- reading --------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides (list items by number: `stages.0.lr=1e-4`), checks it.

    `stages.1=null` leaves that stage of the file out; numbers stay those of the file.

    Raises UserError for a missing file, broken YAML, an unknown key, a wrong type or a contradiction.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; the shipped ones are in configs/") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a config file ({e})") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {one_line(e)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    if overrides and isinstance(tree.get("stages"), list):
        tree["stages"] = [stage for stage in tree["stages"] if stage is not None]
    return config_from_tree(tree, str(path))


def config_from_tree(tree: dict[str, Any], source: str) -> Config:
    """Checks a plain tree and gives the Config. `source` is named in errors."""
    _refuse_unknown(tree, Config, "", source)
    try:
        config = TypeAdapter(Config).validate_python(_words(_numbers(tree)))
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"] if not str(p).startswith("function-"))
        raise UserError(f"{source}: {place}: {first['msg']} (given: {first['input']!r})") from None
    for message in contradictions(config):
        raise UserError(f"{source}: {message}")
    return config


def to_tree(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain dicts, lists and scalars."""
    return _plain(dataclasses.asdict(config))


def config_text(config: Config) -> str:
    """What `load_config` reads."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; users write it as a number."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _words(tree: dict[str, Any]) -> dict[str, Any]:
    """YAML reads `precision: 32`, `run: 2024` and the like as numbers; they are words."""
    tree = copy.deepcopy(tree)
    training, stages, data = tree.get("training"), tree.get("stages"), tree.get("data")
    if isinstance(data, dict) and data.get("path", "") is None:
        data["path"] = ""  # as `data.path=` on the command line says
    places = [(tree, "run"), (training, "precision")]
    places += [(stage, "name") for stage in stages] if isinstance(stages, list) else []
    for place, key in places:
        if isinstance(place, dict) and type(place.get(key)) is int:
            place[key] = str(place[key])
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key.path=value, e.g. stages.0.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML; put it in quotes") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{override!r}: {'.'.join(parents)} has no keys below it")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if not isinstance(node, dict):
        raise UserError(f"{override!r}: nothing below the part before {part!r}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{override!r}: {part!r} is not one of the list's numbers 0 … {len(node) - 1}")
    return int(part)


def _refuse_unknown(tree: Any, cls: Any, place: str, source: str) -> None:
    """Walks tree and dataclass together; the first unknown key is an error with the nearest right name."""
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        where = f"{place}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {place}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: unknown key {where}; {hint}")
        inner, is_list = _dataclass_of(hints[key])
        if inner is None:
            continue
        items = value if is_list and isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if isinstance(item, dict):
                prefix = f"{where}.{number}." if is_list else f"{where}."
                _refuse_unknown(item, inner, prefix, source)


def _dataclass_of(hint: Any) -> tuple[Any, bool]:
    if dataclasses.is_dataclass(hint):
        return hint, False
    origin = typing.get_origin(hint)
    if origin is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return typing.get_args(hint)[0], True
    if origin in (typing.Union, types.UnionType):
        for arg in typing.get_args(hint):
            if dataclasses.is_dataclass(arg):
                return arg, False
    return None, False
