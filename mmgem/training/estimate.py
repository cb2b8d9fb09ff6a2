"""What a step asks of a GPU: bytes of memory, bytes sent, seconds. Pure arithmetic on counts.

Receives counts of parameters, activations and FLOPs (`mmgem.training.arithmetic`), the engine that shares the work out
among the ranks, and a type of GPU. Gives what one rank holds, sends and takes. Refuses an unknown type of GPU.

Sizes are bytes; memory and bandwidths are those of data sheets, in powers of 1000.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from mmgem.config import StageConfig, TrainingConfig
from mmgem.errors import UserError
from mmgem.losses.contrastive import TILE

FP32 = 4
MOMENTS = 2 * FP32
"""AdamW's two, of each trained parameter."""
PLAIN = "plain"
STRATEGIES = ("ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp2")
USABLE = 0.95
"""Of a GPU's memory; an assumption. The rest is for the CUDA context, NCCL and gaps that the allocator leaves."""


# --- GPUs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    bf16: float
    """Dense FLOP/s with sums in fp32."""
    fp32: float
    """Not TF32, which torch does not use unless it is told to."""
    memory: float
    bandwidth: float
    """Bytes/s of its own memory."""
    link: float
    """Bytes/s to another GPU of the machine, one way: data sheets give the sum of both ways."""
    network: float
    """Bytes/s to another machine, a GPU, one way."""


GPUS: dict[str, Gpu] = {
    # NVIDIA H200 data sheet, SXM: BF16 1,979 TFLOPS with sparsity, so half of it dense; FP32 67; 141 GB; 4.8 TB/s;
    # NVLink 900 GB/s. DGX H200 data sheet: 8 x 400 Gb/s for 8 GPUs.
    "h200": Gpu(989.5e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    # NVIDIA H100 data sheet, SXM: BF16 1,979 with sparsity; FP32 67; 80 GB; 3.35 TB/s; NVLink 900 GB/s. DGX H100 data
    # sheet: 8 x 400 Gb/s.
    "h100": Gpu(989.5e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    # NVIDIA A100 data sheet, 80 GB SXM: BF16 312 dense; FP32 19.5; 2,039 GB/s; NVLink 600 GB/s. DGX A100 data sheet:
    # 8 x 200 Gb/s.
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    # The same, 40 GB SXM: 1,555 GB/s.
    "a100-40": Gpu(312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9),
    # NVIDIA L40S data sheet: BF16 362.05 dense; FP32 91.6; 48 GB; 864 GB/s; PCIe 4.0 x16, 64 GB/s. Network: assumed
    # 100 Gb/s.
    "l40s": Gpu(362.05e12, 91.6e12, 48e9, 864e9, 32e9, 12.5e9),
    # NVIDIA Ada GPU architecture white paper, appendix A: BF16 with FP32 accumulate 165.2 dense; FP32 82.6; 24 GB;
    # 1,008 GB/s; PCIe 4.0 x16. Network: assumed 25 Gb/s.
    "rtx4090": Gpu(165.2e12, 82.6e12, 24e9, 1.008e12, 32e9, 3.125e9),
}


def gpu_of(name: str) -> Gpu:
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    raise UserError(f"--gpu {name}: {f'did you mean {near[0]}?' if near else 'unknown;'} known: {', '.join(GPUS)}")


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    strategy: str
    """One of STRATEGIES, or PLAIN: one rank."""
    ranks: int
    weight: int
    """Bytes of a parameter as the model computes with it, and of its gradient."""
    autocast: bool = False
    """Products in bf16 over weights in fp32."""
    offload: str = "none"
    on_gpu: bool = True
    bucket: int = 500_000_000
    """Elements of DeepSpeed's `reduce_bucket_size`, its default."""
    overlap: bool = True
    """Two buckets: one is filled while the other is reduced."""
    gathered: int = 1_000_000_000
    """Elements of DeepSpeed's `stage3_max_live_parameters`, its default."""

    @property
    def zero(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return int(self.strategy[-1]) if self.strategy.startswith("deepspeed") else 0

    @property
    def bf16(self) -> bool:
        return self.weight == 2 or self.autocast


def engine_of(training: TrainingConfig, ranks: int, on_gpu: bool, bf16: bool) -> Engine:
    """What `training` means on so many ranks. bf16: whether products are, which precision=auto leaves to the machine.

    With DeepSpeed bf16 means weights and gradients in bf16 and master copies in fp32; else autocast over fp32.
    """
    strategy = training.strategy
    if strategy == "auto":
        strategy = "deepspeed_1" if on_gpu and ranks > 1 else "ddp"
    if strategy == "ddp" and ranks == 1:
        strategy = PLAIN
    deepspeed = strategy.startswith("deepspeed")
    settings = training.deepspeed.get("zero_optimization", {}) if deepspeed else {}
    engine = Engine(
        strategy=strategy,
        ranks=ranks,
        weight=2 if deepspeed and bf16 else 8 if training.precision == "64" else FP32,
        autocast=bf16 and not deepspeed,
        offload=training.offload,
        on_gpu=on_gpu,
        overlap=on_gpu,
    )
    known = {
        "reduce_bucket_size": "bucket",
        "overlap_comm": "overlap",
        "stage3_max_live_parameters": "gathered",
    }
    set_ = {field: settings[key] for key, field in known.items() if isinstance(settings.get(key), (int, float))}
    return dataclasses.replace(engine, **{field: type(getattr(engine, field))(value) for field, value in set_.items()})


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters."""

    all: int
    trained: int
    block: int
    """Of the largest layer that repeats."""


# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, on its GPU but for `host`."""

    weights: float
    gradients: float
    optimizer: float
    """Master copies in fp32, where the weights are not or are shared out; two moments."""
    average: float = 0.0
    """The moving average of the weights (`ema`)."""
    buffers: float = 0.0
    """What communication is made in, and layers gathered from the other ranks."""
    activations: float = 0.0
    apart: float = 0.0
    """Of activations and gradients, what is never there at once: gradients come as activations go."""
    vectors: float = 0.0
    """Vectors of the rank's share and of all texts, with their gradients, and tiles of scores."""
    update: float = 0.0
    """What the optimizer's step makes in passing, when no activations are held."""
    host: float = 0.0
    """In the machine's memory (`offload`)."""

    @property
    def total(self) -> float:
        fixed = self.weights + self.gradients + self.optimizer + self.average + self.buffers
        return fixed + max(self.activations + self.vectors - self.apart, self.update)


def memory(held: Memory, activations: int, with_gradients: int, vectors: float, one_pass: bool) -> Memory:
    """All of a rank: to its `states`, what a step of these `Activations` adds. one_pass: gradients are whole, and of
    one micro-batch; with several, those of earlier ones are held throughout."""
    apart = max(0.0, activations + held.gradients - with_gradients) if one_pass else 0.0
    return dataclasses.replace(held, activations=activations, apart=apart, vectors=vectors)


def states(engine: Engine, weights: Weights, average: bool = False) -> Memory:
    """What a rank holds whatever the batch is.

    ZeRO: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5, with the master copies, buckets and fp32 gradients of
    the step as DeepSpeed's stage_1_and_2.py and stage3.py make them. DDP's buckets are as large as the gradients, and
    beside them (`gradient_as_bucket_view=False`, its default).
    """
    P, T, W, w = weights.all, weights.trained, engine.ranks, engine.weight
    copy = P * w if average else 0
    # On GPUs torch's AdamW takes the root of all second moments at once; on CPU one parameter after the other.
    if engine.strategy in (PLAIN, "ddp"):
        update = T * w if engine.on_gpu else 2 * w * weights.block
        buckets = T * w if engine.strategy == "ddp" else 0
        return Memory(P * w, T * w, 2 * T * w, copy, buckets, update=update)
    if engine.strategy == "fsdp2":
        # The layer at work and the next one, and in the backward pass their gradients before they are shared out.
        gathered = 2 * 2 * weights.block * w
        return Memory(P * w / W, T * w / W, 2 * T * w / W, copy / W, gathered, update=T * w / W)
    master = T * (FP32 + MOMENTS) / W
    bucket = engine.bucket * w
    if engine.zero == 3:
        held, gradients = P * w / W, T * w / W
        buffers = bucket + min(P, engine.gathered) * w
    else:
        held, gradients = P * w, T * w / (W if engine.zero == 2 else 1)
        buffers = bucket * (2 if engine.overlap else 1)
    if engine.offload == "none":
        return Memory(held, gradients, master, copy, buffers, update=2 * FP32 * T / W)
    # The optimizer in the machine's memory, with the fp32 gradients of the rank's share that it reads.
    host = master + FP32 * T / W
    if engine.zero > 1:
        gradients = 0
    if engine.offload == "parameters":
        held, host = 0, host + held
    return Memory(held, gradients, 0, copy, buffers, host=host)


def held_vectors(stage: StageConfig, samples: int, texts: int, embed_dim: int, ranks: int) -> float:
    """Of a rank's share of `samples` with `texts`: with micro-batches (GradCache) the vectors of all of them and their
    gradients are held; the contrastive loss holds those of all ranks' texts, their gradient, and the sum it sends."""
    images = samples * (1 + stage.made_pictures + stage.max_regions)
    rows = images + texts
    own = 2 * rows if stage.micro_batch is not None and stage.micro_batch < samples else 0
    scores = min(TILE, images * texts * ranks)
    return FP32 * (embed_dim * (own + 3 * texts * ranks) + 3 * scores)


# --- communication --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, and receives, in a step."""

    gradients: float
    weights: float
    vectors: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.vectors


def traffic(engine: Engine, weights: Weights, micro_batches: int, texts: int, embed_dim: int) -> Traffic:
    """Ring algorithms: an all-gather or reduce-scatter of n bytes sends n (W - 1) / W, an all-reduce twice that.

    DDP reduces gradients to all, ZeRO 1 to their owner, which sends new weights: once a step. ZeRO 2 reduces in each
    micro-batch; ZeRO 3 and FSDP also gather in it, forward and backward, and micro-batches have one more forward.
    texts: of one rank; their vectors are gathered in fp32, their gradients sent back, three sums a text reduced.
    """
    share = (engine.ranks - 1) / engine.ranks
    P, T = weights.all * engine.weight, weights.trained * engine.weight
    forwards = 2 * micro_batches if micro_batches > 1 else 1
    gathers = forwards + micro_batches
    sent = {
        PLAIN: (0, 0),
        "ddp": (2 * T, 0),
        "deepspeed_1": (T, T),
        "deepspeed_2": (micro_batches * T, T),
        "deepspeed_3": (micro_batches * T, gathers * P),
        "fsdp2": (micro_batches * T, gathers * P),
    }
    gradients, parameters = sent[engine.strategy]
    everywhere = texts * engine.ranks
    vectors = FP32 * everywhere * (2 * embed_dim + 3 * 2)
    return Traffic(gradients * share, parameters * share, vectors * share)


# --- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds of a step."""

    compute: float
    update: float
    """The optimizer's step, as fast as memory can be read and written."""
    communication: float

    @property
    def overlapped(self) -> float:
        """If all communication goes on beside computing."""
        return max(self.compute, self.communication) + self.update

    @property
    def total(self) -> float:
        """If none does."""
        return self.compute + self.communication + self.update


def step_time(
    flops: float, sent: float, engine: Engine, weights: Weights, gpu: Gpu, nodes: int, mfu: float, network: float | None
) -> Time:
    """flops: all that a rank computes; mfu: the share of the GPU's peak that it is computed at. network: bytes/s a
    GPU to other machines; None: the type's usual one."""
    wire = gpu.link if nodes == 1 else network or gpu.network
    shared = engine.zero > 0 or engine.strategy == "fsdp2"
    # AdamW reads weight, gradient and two moments, and writes all but the gradient.
    touched = 7 * FP32 * weights.trained / (engine.ranks if shared else 1)
    return Time(flops / (mfu * (gpu.bf16 if engine.bf16 else gpu.fp32)), touched / gpu.bandwidth, sent / wire)
