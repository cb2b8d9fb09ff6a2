"""How fast a run is, against what its own arithmetic says.

Receives each step's share and how long the step took. Gives samples, tokens and FLOPs a second, the share of the GPU's
peak that those are (MFU), and memory. Refuses nothing.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from mmgem.config import StageConfig
from mmgem.data.batch import Share
from mmgem.model import MMGem
from mmgem.ranks import Ranks
from mmgem.training.arithmetic import TextCounts, measure_shapes, step_flops
from mmgem.training.estimate import GPUS


class Throughput:
    """Figures of one step after the other. The model must still be whole: before a strategy takes it apart."""

    def __init__(self, model: MMGem, stage: StageConfig, ranks: Ranks, bf16: bool):
        self.stage, self.ranks, self.bf16 = stage, ranks, bf16
        self.shapes = measure_shapes(model, stage)
        self.clock = time.monotonic()

    def start(self) -> None:
        self.clock = time.monotonic()

    def counts(self, share: Share) -> tuple[int, float]:
        """This rank's: tokens of both streams, without padding; FLOPs that the model asks for, forward and backward,
        without what GradCache, checkpointing and padding add."""
        texts = [TextCounts.of(batch.texts) for batch in share.micros]
        total = TextCounts.sum(texts)
        counts = (len(share.keys), total, share.regions, self.ranks.count, share.made)
        flops = step_flops(self.shapes, self.stage, *counts).model
        return total.tokens, flops

    def figures(self, tokens: float, flops: float) -> dict[str, float]:
        """Of the step since the last call, from the sums over all ranks."""
        now = time.monotonic()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        of_rank = flops / seconds / self.ranks.count
        found = {
            "samples_per_s": round(self.stage.global_batch / seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "tflops": float(f"{of_rank / 1e12:.4g}"),
            "memory_gb": round(peak_memory() / 1e9, 3),
        }
        peak = peak_flops(self.bf16)
        return found if peak is None else {**found, "mfu": float(f"{of_rank / peak:.4g}")}


def peak_flops(bf16: bool) -> float | None:
    """Of this process's GPU, dense; None where there is none, or an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    known = next((gpu for key, gpu in GPUS.items() if key in name), None)
    return None if known is None else known.bf16 if bf16 else known.fp32


def peak_memory() -> int:
    """The most so far, in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
