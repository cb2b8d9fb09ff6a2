"""What the ranks hold of the training state, and what one step does with it.

Receives a run's settings. Gives Lightning's strategy, and `Engine`, which forwards, goes back and steps through it,
whichever it is. Refuses what a strategy cannot do.

Each forward of a micro-batch goes through the wrapped model by itself, with its own backward: DistributedDataParallel
and DeepSpeed count on that. Lightning would wrap the whole training step instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmgem.config import Config, TrainingConfig
from mmgem.precision import at_least_fp32
from mmgem.ranks import Ranks
from mmgem.training.saved import TAG, Saved


class Engine:
    """The wrapped model of a trainer, for the time of one step."""

    def __init__(self, trainer: L.Trainer):
        self.trainer, self.strategy = trainer, trainer.strategy
        self.deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)

    def forward(self, *args: Any, last: bool = True, **options: Any) -> Any:
        """last: as in `backward`; DistributedDataParallel decides here whether the backward adds gradients up."""
        assert self.strategy.model is not None
        with self.trainer.precision_plugin.forward_context(), self._apart(last):
            return self.strategy.model(*args, **options)

    def backward(self, loss: Tensor, last: bool) -> None:
        """last: of the step's micro-batches; before it the ranks need not yet add up their gradients."""
        if self.deepspeed:
            engine: Any = self.strategy.model
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss, scale_wrt_gas=False)
            return
        with self._apart(last):
            loss.backward()

    def _apart(self, last: bool) -> AbstractContextManager[None]:
        model = self.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()

    def step(self, clip_grad: float, lr_factor: float) -> None:
        """Clips (DeepSpeed does it itself), sets the learning rate and moves the weights. Also counts the step."""
        optimizer: Any = self.trainer.lightning_module.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        if clip_grad and not self.deepspeed:
            torch.nn.utils.clip_grad_norm_(self.trainer.lightning_module.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()


def resolve(config: Config, ranks: Ranks, cuda: bool, saved: Saved | None) -> str:
    """The strategy's name, `auto` resolved: `none` on a single rank that needs no engine."""
    strategy = config.training.strategy
    if strategy == "auto" and saved is not None and saved.in_parts:
        return saved.strategy
    plain = any(stage.ema for stage in config.stages) or config.training.precision == "64"
    if strategy == "auto" and ranks.count > 1:
        strategy = "deepspeed_1" if cuda and not plain else "ddp"
    return "none" if ranks.count == 1 and strategy in ("auto", "ddp") else strategy


def make_strategy(
    name: str, training: TrainingConfig, ranks: Ranks, device: torch.device, clip_grad: float, universal: bool
) -> Any:
    """name: resolved. clip_grad: of the stage; DeepSpeed wants to know before. universal: the checkpoint to go on from
    is in that form."""
    if name == "none":
        return "auto"
    backend = "nccl" if device.type == "cuda" else "gloo"
    if name == "ddp":
        # A tower may have parameters that its map does not depend on.
        return DDP(process_group_backend=backend, find_unused_parameters=True)
    if name == "fsdp2":
        return FSDP2(
            data_parallel_size=ranks.count,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    _prepare_deepspeed(device)
    settings = deepspeed_settings(training, int(name[-1]), device, clip_grad)
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    kind = CpuDeepSpeed if device.type == "cpu" else DeepSpeed
    return kind(config=settings, process_group_backend=backend, exclude_frozen_parameters=True)


def deepspeed_settings(training: TrainingConfig, stage: int, device: torch.device, clip_grad: float) -> dict[str, Any]:
    """DeepSpeed's own settings: ours, under those of `training.deepspeed`."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": device.type == "cuda",
        "reduce_scatter": device.type == "cuda",  # gloo has none
    }
    if training.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if training.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own figures only, which nobody reads
        "gradient_clipping": clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _merged(ours, training.deepspeed)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _prepare_deepspeed(device: torch.device) -> None:
    if device.type != "cpu":
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # It would be compiled for most of a minute, and serves inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def save(trainer: L.Trainer, path: Path) -> None:
    """All ranks together. Raises OSError or RuntimeError on a rank that could not write."""
    trainer.save_checkpoint(path)
    error = getattr(trainer.strategy, "save_error", None)
    if error is not None:
        trainer.strategy.save_error = None  # pyright: ignore[reportAttributeAccessIssue]
        raise error


def whole_state(trainer: L.Trainer) -> dict[str, Tensor] | None:
    """The model's state, whole and in fp32, where the strategy has taken the model apart; all ranks must ask."""
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeed):
        return strategy.whole_state()
    if not isinstance(strategy, FSDP2):
        return None
    inner: Any = trainer.lightning_module.model
    whole = {name: p.detach() for name, p in inner.named_parameters(remove_duplicate=False)}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in whole.items()}
    return whole_buffers(trainer, inner) | {name: p.cpu().clone() for name, p in whole.items()}


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that repeat, in tower and LLM: the outermost lists of modules of one kind."""
    blocks: list[torch.nn.Module] = []
    for child in model.children():
        layers = list(child.children())
        listed = isinstance(child, torch.nn.ModuleList | torch.nn.Sequential)
        same = listed and len(layers) > 1 and len({type(layer) for layer in layers}) == 1
        blocks += layers if same else repeated_blocks(child)
    return blocks


def lay_out_plainly(module: torch.nn.Module) -> None:
    """Parameters in the order of their dimensions: engines send their bytes as they lie. Also 1 x 1 kernels, which
    count as contiguous in either layout."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def share_out(module: torch.nn.Module, blocks: Sequence[torch.nn.Module], mesh: Any) -> None:
    """FSDP2: each block's parameters are gathered while it runs, the others' while the module does."""
    lay_out_plainly(module)
    for block in blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])


def whole_buffers(trainer: L.Trainer, model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's buffers in fp32, as they were before the strategy cast them, unless they have moved since."""
    names = set(model.state_dict(keep_vars=True))
    buffers = {name: b.detach().cpu().clone() for name, b in model.named_buffers() if name in names}
    kept = trainer.strategy.kept if isinstance(trainer.strategy, DeepSpeed) else {}
    return {name: _exact(buffer, kept.get(name)) for name, buffer in buffers.items()}


def kept_parameters(trainer: L.Trainer) -> dict[str, Tensor]:
    """Frozen parameters in fp32, on CPU, which DeepSpeed's own files leave out."""
    if not isinstance(trainer.strategy, DeepSpeed):
        return {}
    buffers = dict(trainer.lightning_module.model.named_buffers())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return {name: tensor for name, tensor in trainer.strategy.kept.items() if name not in buffers}


def _exact(now: Tensor, before: Tensor | None) -> Tensor:
    """In fp32: `before` where `now` is it, only cast."""
    if before is not None and torch.equal(before.to(now.dtype), now):
        return before
    return at_least_fp32(now) if now.is_floating_point() else now


class PlainFiles(TorchCheckpointIO):
    """Writes a checkpoint to its place. Lightning's own writes it to memory, then to the system's folder of temporary
    files, where a kill leaves it, and then there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


class _StepByStep(Strategy):
    """The training step itself is not wrapped: the forwards in it are. A checkpoint that a rank cannot write must not
    keep the others waiting: its error is kept for later, when all look for one."""

    save_error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except (OSError, RuntimeError) as e:
            self.save_error = e

    def training_step(self, *args: Any, **options: Any) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*args, **options)


class DDP(_StepByStep, DDPStrategy):
    pass


class FSDP2(_StepByStep, ModelParallelStrategy):
    pass


class DeepSpeed(_StepByStep, DeepSpeedStrategy):
    """Lightning's, for the parameters it finds; and the weights as they were before DeepSpeed took them apart."""

    def setup(self, trainer: L.Trainer) -> None:
        assert self.model is not None
        lay_out_plainly(self.model)
        inner: Any = self.model.model
        kept = [*inner.named_buffers(), *((n, p) for n, p in inner.named_parameters() if not p.requires_grad)]
        self.kept = {name: tensor.detach().cpu().clone() for name, tensor in kept}
        super().setup(trainer)
        for module in inner.modules():
            # torch's batch norm wants one type for all; DeepSpeed casts parameters and leaves buffers.
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    if buffer.is_floating_point():
                        buffer.data = buffer.data.to(next(inner.parameters()).dtype)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        engine: Any = self.model
        # They wait for nobody: where one fails, its rank must still come to where all wait for each other.
        places = [(engine.checkpoint_engine, "makedirs"), (engine.checkpoint_engine, "save")]
        places.append((engine, "_copy_recovery_script"))
        writers = [getattr(owner, name) for owner, name in places]
        for (owner, name), write in zip(places, writers, strict=True):
            setattr(owner, name, self._keeping_error(write))
        try:
            engine.save_checkpoint(
                str(filepath),
                tag=TAG,
                client_state={k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        finally:
            for (owner, name), write in zip(places, writers, strict=True):
                setattr(owner, name, write)

    def _keeping_error(self, write: Callable[..., None]) -> Callable[..., None]:
        def keeping(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except (OSError, RuntimeError) as e:
                self.save_error = e

        return keeping

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # From the universal form, ZeRO 3 gives all groups the first one's settings, e.g. its weight decay, and all one
        # counter of steps, which each of them then moves.
        optimizer: Any = self.optimizers[0]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        content = super().load_checkpoint(checkpoint_path, weights_only)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in optimizer.state.values():
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        return content

    @torch.no_grad()
    def whole_state(self) -> dict[str, Tensor]:
        """The inner model's state, whole and in fp32, on each rank; all ranks must ask."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        assert self.lightning_module is not None
        inner: Any = self.lightning_module.model
        state = whole_buffers(self.lightning_module.trainer, inner)
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if whole is None:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = _exact(parameter.detach().cpu().clone(), self.kept.get(name))
            state[name] = whole.detach().cpu()
        return state


class CpuDeepSpeed(DeepSpeed):
    """DeepSpeed over gloo, which Lightning allows on GPUs alone: for tests, and to look at a GPU's run without one."""

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)
