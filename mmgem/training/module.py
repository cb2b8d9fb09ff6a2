"""One stage as a LightningModule: batch → path → losses → step.

Receives the model and a stage's settings. Gives the loss and what the log wants. Refuses a loss that is not finite,
and names the samples.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mmgem.config import StageConfig
from mmgem.data.batch import Batch
from mmgem.errors import UserError
from mmgem.losses.caption import caption_loss
from mmgem.losses.contrastive import contrastive_loss
from mmgem.losses.gather import ranks, sum_over_ranks
from mmgem.model import MMGem, Output
from mmgem.precision import at_least_fp32
from mmgem.training.optim import freeze, make_optimizer, schedule


class StageModule(L.LightningModule):
    def __init__(
        self,
        model: MMGem,
        stage: StageConfig,
        stage_number: int,
        steps: int,
        seed: int,
        from_trunk: bool = False,
        rank: int = 0,
    ):
        """steps: of the whole stage. from_trunk: batches carry the frozen trunk's output instead of pictures."""
        super().__init__()
        self.rank = rank
        self.model = model
        self.stage, self.stage_number, self.steps, self.seed = stage, stage_number, steps, seed
        self.from_trunk = from_trunk
        self.lr_factor = schedule(stage, steps)
        self.last: dict[str, float] = {}
        """The latest step's figures, for the log."""
        freeze(model.parts(), stage, {id(p) for p in model.vision.frozen_parameters()})
        model.vision.set_patch_dropout(stage.patch_dropout)
        self.train()  # Lightning leaves the modes as they are

    def train(self, mode: bool = True) -> StageModule:
        """Frozen parts, and a trunk before `train_from`, stay in evaluation: no dropout, no moving statistics."""
        super().train(mode)
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
                # transformers recomputes activations in training only, and a gradient may pass through a frozen LLM.
                module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # All randomness of a step follows from its number, so a resumed run draws what an unbroken one would have.
        seed = (self.seed * 1_000_003 + self.stage_number) * 1_000_003 + batch_idx
        torch.manual_seed((seed + self.rank * 1_000_000_007) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out: Output = self.model(
            batch.pictures.to(self.model.h1.weight.dtype),
            batch.texts,
            batch.text_vector_M,
            batch.boxes_R4,
            batch.region_image_R,
            self.from_trunk,
        )
        losses = stage_losses(self.model, out, batch, self.stage)
        # Zero times all outputs: a batch without captions or boxes is a step too, so that steps, samples and ranks stay
        # in line.
        loss = at_least_fp32(out.v_BE.sum() + out.t_ME.sum() + out.r_RE.sum() + out.hidden_TD.sum()) * 0
        for name, value in losses.items():
            loss = loss + getattr(self.stage.loss, name) * value
        # Each is the mean over the ranks (see `caption_loss`).
        figures = (sum_over_ranks(torch.stack([loss, *losses.values()])) / ranks()).tolist()
        figures = dict(zip(["loss", *(f"loss_{name}" for name in losses)], figures, strict=True))
        if not math.isfinite(figures["loss"]):
            text = ", ".join(f"{k.removeprefix('loss_')} {v:.4g}" for k, v in figures.items() if k != "loss")
            raise UserError(
                f"stage {self.stage.name}, step {batch_idx}: the loss is not finite ({text}); samples of the batch: "
                f"{', '.join(batch.keys[:8])}{' …' if len(batch.keys) > 8 else ''}; "
                "lower the learning rate or clip_grad, or look at them"
            )
        self.last = {**figures, "logit_scale": math.exp(self.model.logit_scale.item())}
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in a hook after the batch: checkpoints are saved before that one runs.
        self.model.clamp_logit_scale()

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model.parts(), self.stage)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def stage_losses(model: MMGem, out: Output, batch: Batch, stage: StageConfig) -> dict[str, Tensor]:
    """The losses with a weight, unweighted, by the names of LossConfig.

    emb: images and their captions. gen: captions after images. region_emb, region_gen: the same for boxes and phrases.
    """
    weights, losses = stage.loss, {}
    captions = batch.captions
    of_caption_T = batch.texts.label_text_T < captions
    # All ranks must compute the same losses: a rank without captions or boxes has its part in those of the others.
    here = torch.tensor([captions, len(batch.boxes_R4), int(of_caption_T.sum()), int((~of_caption_T).sum())])
    with_captions, with_boxes, captions_written, phrases_written = sum_over_ranks(here.to(out.v_BE.device)).tolist()
    if weights.emb and with_captions:
        losses["emb"] = contrastive_loss(
            out.v_BE,
            batch.image_id_B,
            out.t_ME[:captions],
            batch.caption_owner_M,
            batch.caption_text_M,
            model.logit_scale,
        )
    if weights.region_emb and with_boxes:
        losses["region_emb"] = contrastive_loss(
            out.r_RE,
            batch.entity_id_R,
            out.t_ME[captions:],
            batch.entity_id_R,
            batch.phrase_text_R,
            model.logit_scale,
        )
    written = (("gen", of_caption_T, captions_written), ("region_gen", ~of_caption_T, phrases_written))
    for name, wanted_T, anywhere in written:
        if getattr(weights, name) and anywhere:
            logits_TV = model.language.logits(out.hidden_TD[wanted_T])
            losses[name] = caption_loss(logits_TV, batch.texts.labels_T[wanted_T], weights.label_smoothing)
    return losses
