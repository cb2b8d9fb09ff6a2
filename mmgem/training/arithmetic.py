"""What a training step computes and keeps, from shapes alone: parameters, FLOPs, bytes of activations.

Receives an MMGem, real or on the meta device, a stage's settings, and how much text a batch has. Gives counts; nothing
is computed, so neither weights nor a GPU are needed. Refuses what the model refuses (patches that it does not have).

FLOPs are those of matrix products, convolutions and attention, a multiplication and an addition as two.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from mmgem.config import StageConfig
from mmgem.losses.caption import parts_of_vocabulary
from mmgem.model import MMGem
from mmgem.precision import at_least_fp32
from mmgem.text import PackedTexts, TextCodec, pack_texts
from mmgem.training.optim import freeze, set_modes

# --- parameters -----------------------------------------------------------------------------------------------------


def count_parameters(model: MMGem, trained: bool = False) -> dict[str, int]:
    """By part, and all. trained: only those that have a gradient."""
    counts = {
        part: sum(p.numel() for _, p in parameters if p.requires_grad or not trained)
        for part, parameters in model.parts().items()
    }
    return {**counts, "all": sum(counts.values())}


def set_stage(model: MMGem, stage: StageConfig) -> None:
    """What trains in the stage, and the modes of its training: frozen parts stay in evaluation."""
    freeze(model.parts(), stage, {id(p) for p in model.vision.frozen_parameters()})
    model.vision.set_patch_dropout(stage.patch_dropout)
    set_modes(model.train())


def largest_block(model: MMGem) -> int:
    """Parameters of the largest of the layers that repeat, in tower and LLM."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    return max((sum(p.numel() for p in block.parameters()) for m in lists for block in m), default=0)


# --- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextCounts:
    """How much text a batch has. A pair is a token and one that it sees, itself included."""

    tokens: int
    """Of both streams, without padding."""
    pairs: int
    embed_tokens: int
    """Of the embedding streams, of which equal texts share one."""
    embed_pairs: int
    labels: int
    texts: int
    written: int
    padded_tokens: int
    """With padding: rows times their length."""
    padded_pairs: int
    """Rows times their length squared: what an attention kernel that is given a mask computes."""

    @classmethod
    def of(cls, texts: PackedTexts) -> TextCounts:
        """Counts a real batch. On a GPU this waits for it: count before the batch is moved there."""
        rows, length = texts.ids_nL.shape
        seen_N = (texts.position_nL + 1)[texts.segment_nL >= 0]
        embed_S = texts.position_nL.flatten()[texts.emb_index_M.unique()] + 1
        return cls(
            tokens=len(seen_N),
            pairs=int(seen_N.sum()),
            embed_tokens=int(embed_S.sum()),
            embed_pairs=int((embed_S * (embed_S + 1) // 2).sum()),
            labels=len(texts.labels_T),
            texts=len(texts.emb_index_M),
            written=len(texts.written_K),
            padded_tokens=rows * length,
            padded_pairs=rows * length**2,
        )

    @classmethod
    def sum(cls, counts: Sequence[TextCounts]) -> TextCounts:
        return cls(*(sum(getattr(c, f.name) for c in counts) for f in fields(cls)))

    def times(self, factor: float) -> TextCounts:
        return TextCounts(*(round(getattr(self, f.name) * factor) for f in fields(self)))


def made_up_texts(stage: StageConfig, samples: int, tokens: int, codec: TextCodec, row_tokens: int) -> PackedTexts:
    """A batch's texts if each sample has all its captions, boxes and negatives, and each text so many tokens."""
    loss, regions = stage.loss, stage.max_regions
    captions, phrases = samples * stage.captions_per_image, samples * regions
    written = regions if stage.written_regions is None else stage.written_regions
    negatives = captions * stage.negatives.texts
    texts = [_different(number, tokens) for number in range(captions + phrases + negatives)]
    write = [loss.gen > 0 or loss.hard.written > 0] * captions
    write += [loss.region_gen > 0 and number % regions < written for number in range(phrases)]
    write += [loss.hard.written > 0] * negatives
    return pack_texts(texts, codec, row_tokens, embed=loss.needs_vectors(regions > 0), write=write)


def _different(number: int, tokens: int) -> list[int]:
    """Ids of a text unlike those of other numbers; 200 words are in every vocabulary of a byte-level tokenizer."""
    return [5 + number // 200**place % 200 for place in range(tokens)]


# --- FLOPs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """FLOPs of one forward, by what they grow with, and what of it trains in a stage."""

    picture: float
    """The whole tower."""
    trunk: float
    """Of it, what never trains (`train_from`, or all of a frozen tower)."""
    token: float
    """The LLM's layers without its attention."""
    pair: float
    """Attention of all layers, for a token and one that it sees."""
    label: float
    """The output head."""
    projected: tuple[int, int, int]
    """C, D, E."""
    trained: frozenset[str]
    """Parts with a parameter that trains."""
    recomputed: frozenset[str]
    """Parts that recompute their activations (gradient checkpointing)."""
    cached: bool
    """The trunk's output is read from disk."""

    @property
    def llm_backward(self) -> bool:
        """Whether a gradient passes through the LLM: to its weights, or to the visual token and the added rows."""
        return bool(self.trained)


def measure_shapes(model: MMGem, stage: StageConfig) -> Shapes:
    """Counts one forward of tower and LLM on the meta device. The model's own weights and device do not matter.

    The model is to be as training has it (`set_stage`, or within a StageModule), and its weights whole: call it before
    ZeRO or FSDP shares them out.
    """
    size, pictures = stage.image_size or model.config.vision.image_size, 2  # a batch norm that trains wants two
    images = torch.empty(pictures, 3, size, size, device="meta")
    picture = _flops(model.vision, "forward", images) / pictures
    trained = {part for part, count in count_parameters(model, trained=True).items() if count and part != "all"}
    trunk = picture if "vision" not in trained else 0.0
    if not trunk and model.vision.frozen_parameters():
        trunk = _flops(model.vision, "trunk", images) / pictures
    D = model.language.width
    short, long = 32, 64

    def layers(length: int) -> int:
        places = torch.empty(1, length, dtype=torch.int64, device="meta")
        return _flops(model.language, "forward", torch.empty(1, length, D, device="meta"), places, places)

    # An unmasked product of queries and keys has length² pairs: a · length + b · length² at two lengths gives both.
    pair = (layers(long) / long - layers(short) / short) / (long - short)
    head = model.language.hf.get_output_embeddings().weight
    config = model.config
    again = {"vision": config.vision.gradient_checkpointing, "llm": config.llm.gradient_checkpointing}
    return Shapes(
        picture=picture,
        trunk=trunk,
        token=layers(short) / short - short * pair,
        pair=pair,
        label=2.0 * head.shape[0] * D,
        projected=(model.vision.width, D, config.embed_dim),
        trained=frozenset(trained),
        recomputed=frozenset(part for part, on in again.items() if on),
        cached=stage.cached_views > 0,
    )


class _Call(nn.Module):
    """A method of a module as a module, for `functional_call`."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.module, self.method)(*inputs)


def _flops(module: nn.Module, method: str, *inputs: Tensor) -> int:
    call = _Call(module, method)
    tensors = {}
    for name, tensor in [*call.named_parameters(), *call.named_buffers()]:
        float_ = tensor.is_floating_point()
        tensors[name] = torch.empty(tensor.shape, dtype=torch.float32 if float_ else tensor.dtype, device="meta")
        # With a gradient in view, attention is not taken by a fused kernel for inference, which is not counted.
        tensors[name].requires_grad_(float_ and isinstance(tensor, nn.Parameter))
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        functional_call(call, tensors, inputs)
    return counter.get_total_flops()


@dataclass(frozen=True)
class StepFlops:
    """Of one rank."""

    forward: float
    backward: float
    embedded_again: float = 0.0
    """The forward of tower and embedding streams that micro-batches do twice (GradCache)."""
    recomputed: float = 0.0
    """The forward of checkpointed layers, and the caption loss's scores, once more in the backward pass."""
    padding: float = 0.0
    """On padding, and on pairs of tokens that do not see each other."""

    @property
    def model(self) -> float:
        """What the method needs: what MFU counts."""
        return self.forward + self.backward

    @property
    def done(self) -> float:
        return self.model + self.embedded_again + self.recomputed + self.padding


def step_flops(
    shapes: Shapes,
    stage: StageConfig,
    samples: int,
    texts: TextCounts,
    boxes: int = 0,
    ranks: int = 1,
    made: int | None = None,
) -> StepFlops:
    """A step of so many samples of one rank and all their texts and boxes, all micro-batches together. made: pictures
    that were made of theirs; None: as many as there can be.

    Backward of a product that trains: twice its forward, for its input and for its weights (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1); of a frozen one that a gradient passes through, once. Attention has no weights:
    twice. The contrastive loss: each rank's rows against the texts of all, once forward, once more and two products
    in the backward pass.
    """
    C, D, E = shapes.projected
    pictures = samples + (samples * stage.made_pictures if made is None else made)
    trunk = 0.0 if shapes.cached else pictures * shapes.trunk
    rest = pictures * (shapes.picture - shapes.trunk)
    heads = 2.0 * E * ((pictures + boxes) * C + (texts.texts + texts.written) * D)
    layers, attention = texts.tokens * shapes.token, texts.pairs * shapes.pair
    words = texts.labels * shapes.label
    contrast = 2.0 * E * (pictures + boxes) * texts.texts * ranks
    forward = trunk + rest + heads + layers + attention + words + contrast

    passes = 1.0 if shapes.llm_backward else 0.0
    both = passes + ("llm" in shapes.trained)
    backward = 2 * rest * ("vision" in shapes.trained) + 2 * heads * passes + 2 * contrast
    backward += both * (layers + words) + 2 * passes * attention
    embedded = texts.embed_tokens * shapes.token + texts.embed_pairs * shapes.pair
    in_micro_batches = stage.micro_batch is not None and stage.micro_batch < samples
    again_llm = float("llm" in shapes.recomputed) * passes
    empty_tokens = (texts.padded_tokens - texts.tokens) * shapes.token
    empty_pairs = (texts.padded_pairs - texts.pairs) * shapes.pair
    return StepFlops(
        forward=forward,
        backward=backward,
        embedded_again=(trunk + rest + embedded + heads) if in_micro_batches else 0.0,
        recomputed=rest * ("vision" in shapes.recomputed and "vision" in shapes.trained)
        + again_llm * (layers + attention)
        + passes * words
        + contrast,
        padding=empty_tokens * (1 + both + again_llm) + empty_pairs * (1 + 2 * passes + again_llm),
    )


# --- activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that a step holds at the most: what is saved for the backward pass, what is in passing, the pictures."""

    alone: int
    """Beside weights, gradients and optimizer."""
    with_gradients: int
    """Together with the gradients, of all parameters that train, which come one by one in the backward pass."""


def without_memory(model: MMGem) -> FakeTensorMode:
    """Gives a model on the meta device weights that are of the CPU by name, but hold nothing; and the mode in which it
    runs. Unlike on the meta device, torch then takes the operators of a real step: autocast, and fused attention."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    return mode


def step_activations(
    model: MMGem,
    mode: FakeTensorMode,
    stage: StageConfig,
    samples: int,
    texts: PackedTexts,
    autocast: bool = False,
    on_gpu: bool = True,
) -> Activations:
    """Of a step of so many samples, in one micro-batch. Forward, losses and backward run on shapes alone, and each
    tensor's life is noted.

    model, mode: as `without_memory` gives them, and `set_stage`. autocast: products in bf16 over weights in fp32.
    on_gpu: attention with dropout keeps no scores there, on a CPU it does.
    """
    size = stage.image_size or model.config.vision.image_size
    dtype = model.h1.weight.dtype
    with mode, _regions_without_values(model), _no_attention_dropout(on_gpu):
        indices = PackedTexts(*(mode.from_tensor(getattr(texts, name)) for name in PackedTexts.__slots__))
        of_sample = stage.captions_per_image * (1 + stage.negatives.texts) + stage.max_regions
        vector_M = torch.empty(samples * of_sample, dtype=torch.int64)
        boxes_R4 = torch.empty(stage.max_regions * samples, 4)
        image_R = torch.empty(len(boxes_R4), dtype=torch.int64)
        from_trunk = stage.cached_views > 0
        count = samples * (1 + stage.made_pictures)
        with _LiveBytes(model) as live:
            if from_trunk:
                kept = model.vision.trunk(torch.empty(1, 3, size, size, dtype=dtype)).shape[1:]
                live.forget()
                pictures = torch.empty(count, *kept, dtype=dtype)
            else:
                pictures = torch.empty(count, 3, size, size).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(pictures, indices, vector_M, boxes_R4, image_R, from_trunk)
                loss = at_least_fp32(out.v_BE.sum() + out.t_ME.sum() + out.r_RE.sum())
                if len(out.hidden_TD):
                    head = model.language.hf.get_output_embeddings().weight
                    products = torch.bfloat16 if autocast else out.hidden_TD.dtype
                    loss = loss + _CaptionLoss.apply(out.hidden_TD, head, products)
            del out
            loss.backward()
    return Activations(live.most(), live.most(gradients=True))


class _LiveBytes(TorchDispatchMode):
    """Notes when memory of a tensor comes and goes, parameters and buffers aside, and which of it are gradients."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.changes: list[int] = []
        self.gradients: dict[int, int] = {}
        """Which of the changes are gradients that came, and their sizes."""
        self.begun: dict[int, int] = {}
        """The place in `changes` of each storage that lives."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def __enter__(self) -> _LiveBytes:
        self.hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in self.parameters]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known or key in self.begun:
            return
        self.begun[key] = len(self.changes)
        self.changes.append(storage.nbytes())
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        if self.begun.pop(key, None) is not None:
            self.changes.append(-size)

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        place = self.begun.pop(parameter.grad.untyped_storage()._cdata, None)
        if place is not None:
            self.gradients[place], self.changes[place] = self.changes[place], 0
        parameter.grad = None

    def forget(self) -> None:
        self.changes, self.begun = [], {}

    def most(self, gradients: bool = False) -> int:
        changes = list(self.changes)
        for place, size in self.gradients.items() if gradients else ():
            changes[place] = size
        return max(accumulate(changes), default=0)


class _CaptionLoss(torch.autograd.Function):
    """Makes and keeps what `sum_of_caption_losses` does, whose course depends on the labels' values."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, products: torch.dtype) -> Tensor:
        hidden = hidden_TD.to(products)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for part in parts_of_vocabulary(len(hidden_TD), len(weight_VD)):
            total = total + at_least_fp32(hidden @ weight_VD[part].to(products).T).sum()
        ctx.save_for_backward(hidden_TD, weight_VD)
        ctx.products = products
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD = ctx.saved_tensors
        hidden = hidden_TD.to(ctx.products)
        dhidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        dweight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        for part in parts_of_vocabulary(len(hidden_TD), len(weight_VD)):
            d_Tc = at_least_fp32(hidden @ weight_VD[part].to(ctx.products).T).to(ctx.products)
            dhidden_TD += d_Tc @ weight_VD[part].to(ctx.products)
            if dweight_VD is not None:
                dweight_VD[part] = d_Tc.T @ hidden
        return dhidden_TD.to(hidden_TD.dtype), dweight_VD, None


@contextmanager
def _regions_without_values(model: MMGem) -> Iterator[None]:
    """Boxes are pooled by their number alone, as many in each image; RoIAlign and their counting need values."""

    def regions(map_BCHW: Tensor, boxes_R4: Tensor, image_R: Tensor) -> Tensor:
        images, places = len(map_BCHW), map_BCHW.shape[2] * map_BCHW.shape[3]
        with torch.autocast("cpu", enabled=False):
            map_BNC = at_least_fp32(map_BCHW).flatten(2).transpose(1, 2)
            weights_BKN = map_BNC.new_zeros(images, len(boxes_R4) // images, places)
            place_R = torch.empty_like(image_R)
            return torch.bmm(weights_BKN, map_BNC)[image_R, place_R].to(map_BCHW.dtype)

    model.aggregator.regions = regions
    try:
        yield
    finally:
        del model.aggregator.regions


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def _no_attention_dropout(wanted: bool) -> Iterator[None]:
    """torch's fused attention on CPU knows no dropout and would give way to one that keeps all scores."""
    if not wanted:
        yield
        return
    with _NoDropout():
        yield
