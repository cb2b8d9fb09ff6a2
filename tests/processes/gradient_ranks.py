"""Ranks that take the first step of many stages, one after another, and save what moves the weights in each.

Receives a folder, a number of ranks and a JSON list of cases. Gives CASE.RANK.pt in the folder for each: the step's
figures, and every trained parameter's whole gradient as the optimizer sees it. All ranks are forks of one process, for
the imports take longer than the steps.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import os
import random
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from mmgem import MMGem
from mmgem.config import LlmConfig, LossConfig, ModelConfig, StageConfig, TrainingConfig, VisionConfig
from mmgem.data.batch import Batch, Collate, Item, Share, stable_id
from mmgem.data.datamodule import Shares
from mmgem.losses.caption import caption_loss
from mmgem.losses.contrastive import contrastive_loss
from mmgem.losses.gather import sum_over_ranks
from mmgem.ranks import Ranks, process_group
from mmgem.text import train_tokenizer
from mmgem.training.module import ShardedStageModule, StageModule
from mmgem.training.ranks import StartedRanks
from mmgem.training.strategy import make_strategy

GLOBAL_BATCH = 32
SEED = 4
"""Of the first weights: one with which little cancels, for fp32 is compared to 1e-5."""
SIZE = 32
"""Of the pictures."""

CNN = VisionConfig(
    name="resnet10t",
    config={"channels": [8, 16, 24, 32], "stem_width": 8, "output_stride": 8},
    image_size=SIZE,
    frozen_statistics=True,  # a batch norm that trains counts over a rank's own pictures
)
VIT = VisionConfig(
    name="vit_tiny_patch16_224",
    config={"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
    image_size=SIZE,
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,  # texts then differ clearly, and gradients do not cancel
    "tie_word_embeddings": True,
}
PHI = {**LLAMA, "model_type": "phi", "tie_word_embeddings": False, "resid_pdrop": 0.0}
"""A head of its own, with a bias."""
DROPPING = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.2,
}
MODELS: dict[str, tuple[VisionConfig, dict[str, Any], dict[str, Any]]] = {
    "cnn_tied": (CNN, LLAMA, {}),
    "vit_untied": (VIT, PHI, {}),
    "dropout": (VIT, DROPPING, {"token_dropout": 0.2, "head_dropout": 0.2, "visual_dropout": 0.2}),
    "visual_dropout": (VIT, PHI, {"visual_dropout": 0.2}),
}


@dataclass(frozen=True)
class Case:
    model: str
    regions: bool
    kind: str = "infonce"
    strategy: str = "none"
    """`by_hand`: the step is written out here, without the module's own, a Trainer or a strategy."""
    micro_batch: int | None = None
    patch_dropout: float = 0.0
    freeze: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        cached = "at once" if self.micro_batch is None else f"micro {self.micro_batch}"
        parts = [self.strategy, f"stage {2 if self.regions else 1}", self.kind, cached, self.model]
        parts += [f"frozen {part}" for part in self.freeze] + ([f"seed {self.seed}"] if self.seed else [])
        return ", ".join(parts)


# --- the samples ------------------------------------------------------------------------------------------------------

WORDS = (
    "red blue tiny round tram robot yard shelf cat book lamp under over beside near sleeps waves reads the a".split()
)
PHRASES = ("a red tram", "the robot", "a lamp beside the shelf", "the cat", "a tiny book", "the yard")
NO_OWNER = "not"
"""A caption that begins so is a hard negative: no image has it."""


@functools.cache
def items() -> list[Item]:
    """32 samples, of which four ranks get 8 each: captions of 1, 6, 24 and 60 words; boxes for all but the second one;
    captions and phrases that come again elsewhere; a picture that comes twice; and some without captions: without boxes
    a micro-batch of them has no text at all."""
    chance = random.Random(0)
    made = []
    for number in range(GLOBAL_BATCH):
        rank = number // 8
        captions = [" ".join(chance.choices(WORDS, k=(1, 6, 24, 60)[rank]))]
        if number % 8 == 2:
            captions.append(f"{NO_OWNER} {captions[0]}")
        if number in (4, 13, 30):
            captions = ["the robot waves near the tram"]
        if number in (6, 7, 22):
            captions = []
        boxes = 0 if rank == 1 else (number * (rank + 1)) % 5
        corners = torch.rand(boxes, 2, generator=torch.Generator().manual_seed(number)) * 0.5
        made.append(
            Item(
                key="twice" if number in (5, 29) else f"s{number}",
                picture=picture(number),
                captions=tuple(captions),
                boxes_R4=torch.cat([corners, corners + 0.45], dim=1),
                phrases=tuple(chance.choice(PHRASES) for _ in range(boxes)),
                entities=tuple(f"e{box // 2}" for box in range(boxes)),
            )
        )
    return made


def picture(number: int) -> Tensor:
    """A few large squares: pictures that differ clearly, as wide first weights have it for texts."""
    rough = 2 * torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(100 + number))
    return rough.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)


def share(case: Case, model: MMGem, ranks: Ranks) -> Share:
    """This rank's part, packed as for training."""
    collate = Collate(model.codec, row_tokens=128, embed_first=case.micro_batch is not None)
    size = GLOBAL_BATCH // ranks.count
    own = items()[ranks.rank * size : (ranks.rank + 1) * size]
    if not case.regions:
        none = {"boxes_R4": torch.zeros(0, 4), "phrases": (), "entities": ()}
        own = [dataclasses.replace(item, **none) for item in own]
    micro = case.micro_batch or size
    batches = []
    for start in range(0, size, micro):
        chosen = own[start : start + micro]
        batch = collate(chosen)
        captions = [caption for item in chosen for caption in item.captions]
        for number, caption in enumerate(captions):
            if caption.startswith(NO_OWNER):
                batch.caption_owner_M[number] = stable_id("nobody", caption)
        batches.append(batch)
    return Share(batches)


# --- one step ---------------------------------------------------------------------------------------------------------


@functools.cache
def first_model(name: str) -> MMGem:
    vision, llm, dropouts = MODELS[name]
    texts = [caption for item in items() for caption in (*item.captions, *PHRASES)]
    config = ModelConfig(
        vision=vision, llm=LlmConfig(config=llm), embed_dim=24, max_tokens=96, init_logit_bias=-2.0, **dropouts
    )
    torch.manual_seed(SEED)
    model = MMGem(config, train_tokenizer(texts, 300, lowercase=True))
    with torch.no_grad():
        for parameter in model.vision.parameters():
            if parameter.ndim == 1:  # biases of 0 and norms of 0, behind which nothing would have a gradient
                parameter += 0.5 * torch.randn_like(parameter)
        # As `standardise` would: without it all pictures' vectors point nearly one way, and gradients cancel.
        pictures = torch.stack([item.picture for item in items()])
        model.set_standard(model.aggregator.image(model.vision.eval()(pictures)))
    return model


def stage_module(case: Case, ranks: Ranks) -> StageModule:
    stage = StageConfig(
        steps=1,
        global_batch=GLOBAL_BATCH,
        micro_batch=case.micro_batch,
        max_regions=5 if case.regions else 0,
        clip_grad=0.0,
        freeze=list(case.freeze),  # pyright: ignore[reportArgumentType]
        # No two alike, so that none stands for another.
        loss=LossConfig(kind=case.kind, emb=1.0, gen=0.7, region_emb=1.3, region_gen=0.4),  # pyright: ignore
        patch_dropout=case.patch_dropout,
    )
    model = copy.deepcopy(first_model(case.model))
    kind = ShardedStageModule if case.strategy == "fsdp2" else StageModule
    return kind(model, stage, stage_number=0, steps=1, seed=case.seed, ranks=ranks)


class Kept(L.Callback):
    """The gradients with which the optimizers move the weights."""

    def __init__(self, module: StageModule):
        self.gradients: dict[str, Tensor | None] = {}
        module.temperature.optimizer.register_step_pre_hook(lambda *_: self.keep(module.temperature.parameters))

    def keep(self, parameters: dict[str, Any]) -> None:
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                gradient = whole_gradient(parameter)
                self.gradients[name] = None if gradient is None else gradient.detach().clone()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, StageModule)
        self.keep(dict(pl_module.model.named_parameters()))


def whole_gradient(parameter: Any) -> Tensor | None:
    """Of all ranks, which must ask together."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_fp32_grad_for_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return parameter.get_full_hp_grad()
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def trained(case: Case, ranks: Ranks) -> tuple[dict[str, float], dict[str, Tensor | None]]:
    module = stage_module(case, ranks)
    own, kept = share(case, module.model, ranks), Kept(module)
    # Without it all parameters of so small a model stay whole on each rank.
    parts = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}
    settings = TrainingConfig(deepspeed=parts if case.strategy == "deepspeed_3" else {})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks.local_count,
        strategy=make_strategy(case.strategy, settings, ranks, torch.device("cpu"), clip_grad=0.0, universal=False),
        plugins=[StartedRanks(ranks)],
        use_distributed_sampler=False,
        precision="32-true",
        max_epochs=1,
        logger=False,
        callbacks=[kept],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shares: Any = Shares(own.micros, 1, len(own.micros))  # pyright: ignore[reportArgumentType]
    trainer.fit(module, train_dataloaders=shares)
    return module.last, kept.gradients


def by_hand(case: Case, ranks: Ranks) -> tuple[dict[str, float], dict[str, Tensor | None]]:
    """The same random numbers, but every micro-batch forwarded once, with its graph, and one loss over all of them."""
    module = stage_module(case, ranks)
    model, micros = module.model, share(case, module.model, ranks).micros
    loss = module.stage.loss
    outs, sums = [], []
    for number, batch in enumerate(micros):
        module._seed(0, number)
        out, of_texts = module(batch, write=True)
        outs.append((out.v_BE, out.r_RE, out.t_ME[: batch.captions], out.t_ME[batch.captions :]))
        sums.append(of_texts)

    def ids(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in micros])

    def labels(batch: Batch, of_phrases: bool) -> int:
        return int(((batch.texts.label_text_T >= batch.captions) == of_phrases).sum())

    v_BE, r_RE, captions_ME, phrases_RE = (torch.cat(kind) for kind in zip(*outs, strict=True))
    scale, bias = model.logit_scale, model.logit_bias
    images = (ids("image_id_B"), captions_ME, ids("caption_owner_M"), ids("caption_text_M"))
    losses = {"emb": contrastive_loss(v_BE, *images, scale, bias, case.kind)}
    if case.regions:
        boxes = (ids("entity_id_R"), phrases_RE, ids("entity_id_R"), ids("phrase_text_R"))
        losses["region_emb"] = contrastive_loss(r_RE, *boxes, scale, bias, case.kind)
    for name in ("gen", "region_gen") if case.regions else ("gen",):
        tokens = int(ranks.sums(sum(labels(batch, name == "region_gen") for batch in micros))[0])
        losses[name] = caption_loss(torch.stack([part[name] for part in sums]).sum(), tokens)
    total = sum((getattr(loss, name) * value for name, value in losses.items()), start=torch.zeros(()))
    total.backward()

    figures = {"loss": total, **{f"loss_{name}": value for name, value in losses.items()}}
    means = {name: float(sum_over_ranks(value)) / ranks.count for name, value in figures.items()}
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in (*model.named_parameters(), *module.temperature.parameters.items()):
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = sum_over_ranks(own) / ranks.count
    return means, gradients


# --- the processes ----------------------------------------------------------------------------------------------------


def work(rank: int, count: int, port: int, out: Path, cases: list[Case]) -> None:
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(number) for name, number in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with process_group(cuda=False) as ranks:
        for case in cases:
            figures, gradients = by_hand(case, ranks) if case.strategy == "by_hand" else trained(case, ranks)
            torch.save({"figures": figures, "gradients": gradients}, out / f"{case.name}.{rank}.pt")


def main(out: Path, count: int, cases: list[Case]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(work, (count, port, out, cases), nprocs=count, start_method="fork")


if __name__ == "__main__":
    listed = [Case(**{**case, "freeze": tuple(case["freeze"])}) for case in json.loads(sys.argv[3])]
    main(Path(sys.argv[1]), int(sys.argv[2]), listed)
