"""One stage as a LightningModule: share → vectors → losses → gradients → step.

Receives the model and a stage's settings. Gives the loss and what the log wants. Refuses a loss that is not finite,
and names the samples.

A rank's share of a step is one micro-batch, or several. With several the contrastive losses are still those of the
whole global batch: see `mmgem.losses.cached`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mmgem.config import StageConfig
from mmgem.data.batch import Batch, Share
from mmgem.losses.cached import Vectors, refuse_other_vectors, surrogate, vector_gradients
from mmgem.losses.caption import caption_kernel, caption_loss, caption_losses
from mmgem.losses.contrastive import contrastive_loss
from mmgem.losses.gather import sum_over_ranks
from mmgem.losses.negatives import focal_loss, hard_scores, intra_modal_loss, rank_loss, triplet_loss, written_loss
from mmgem.model import MMGem, Output
from mmgem.negatives import KIND_NUMBERS
from mmgem.precision import at_least_fp32
from mmgem.ranks import Ranks
from mmgem.training.optim import freeze, make_optimizer, schedule, set_modes
from mmgem.training.strategy import Engine, repeated_blocks, share_out
from mmgem.training.temperature import Temperature

VECTOR_LOSSES = ("emb", "region_emb", "hard_columns", "hard_rank", "hard_intra", "hard_focal", "hard_triplet")
WRITTEN_LOSSES = ("gen", "region_gen", "hard_written")


class NotFinite(Exception):
    """The loss of a step is not finite. The weights are still those before it."""


class StageModule(L.LightningModule):
    def __init__(
        self,
        model: MMGem,
        stage: StageConfig,
        stage_number: int,
        steps: int,
        seed: int,
        from_trunk: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008 - it is frozen
        caption_kernel: str = "torch",
    ):
        """steps: of the whole stage. from_trunk: batches carry the frozen trunk's output instead of pictures."""
        super().__init__()
        self.automatic_optimization = False
        self.ranks = ranks
        self.model = model
        self.stage, self.stage_number, self.steps, self.seed = stage, stage_number, steps, seed
        self.from_trunk, self.caption_kernel = from_trunk, caption_kernel
        self.lr_factor = schedule(stage, steps)
        self.last: dict[str, float] = {}
        """The latest step's figures, for the log."""
        freeze(model.parts(), stage, {id(p) for p in model.vision.frozen_parameters()})
        self.temperature = Temperature(model, stage)
        model.vision.set_patch_dropout(stage.patch_dropout)
        self.train()  # Lightning leaves the modes as they are

    def train(self, mode: bool = True) -> StageModule:
        super().train(mode)
        set_modes(self.model)
        return self

    # --- one step -----------------------------------------------------------------------------------------------------

    def training_step(self, share: Share, step: int) -> None:
        engine = Engine(self.trainer)
        losses = self._count(share)
        if len(share.micros) == 1:
            figures = self._at_once(engine, share.micros[0], losses, step)
        else:
            figures = self._cached(engine, share.micros, losses, step)
        self._note(engine, share, figures, step)
        engine.step(self.stage.clip_grad, self.lr_factor(step))
        self.temperature.step(self.lr_factor(step))

    def _count(self, share: Share) -> dict[str, int]:
        """The losses with a weight that have something to count anywhere, and what they count over all ranks: captions,
        boxes, tokens or negatives. All ranks then compute the same ones, for one without has its part in those of the
        others."""
        of_texts = [_parts_of_texts(batch) for batch in share.micros]
        negatives = 0 if self.stage.negatives.order_robust else sum(len(b.other_caption_X) for b in share.micros)
        asked = sum(len(b.other_caption_X.unique()) for b in share.micros) if negatives else 0
        here = {
            "emb": sum(batch.captions for batch in share.micros),
            "region_emb": share.regions,
            "gen": sum(int(captions_T.sum()) for captions_T, _ in of_texts),
            "region_gen": sum(int(phrases_T.sum()) for _, phrases_T in of_texts),
            "hard_columns": sum(batch.captions for batch in share.micros),
            "hard_rank": negatives,
            "hard_intra": asked,
            "hard_focal": asked,
            "hard_triplet": sum(int((b.other_picture_X >= 0).sum()) for b in share.micros),
            "hard_written": negatives,
        }
        anywhere = sum_over_ranks(torch.tensor(list(here.values()), device=self.device)).tolist()
        counts = dict(zip(here, anywhere, strict=True))
        return {name: count for name, count in counts.items() if count and self.stage.loss.weight(name)}

    def _at_once(self, engine: Engine, batch: Batch, counts: dict[str, int], step: int) -> dict[str, Tensor]:
        batch = batch.to(self.device)
        self._seed(step)
        out, sums = engine.forward(batch, write=True)
        losses = self._vector_losses(_vectors(out, batch), [batch], counts)
        losses |= _written(sums, counts)
        loss = self._weighed(losses) + _nothing(out, sums)
        engine.backward(loss, last=True)
        return {"loss": loss.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _cached(self, engine: Engine, micros: Sequence[Batch], counts: dict[str, int], step: int) -> dict[str, Tensor]:
        """Vectors of all micro-batches without a graph; the losses over them, and their gradients; then each micro-
        batch once more, with a graph and its captions, under the same random numbers."""
        first: list[Vectors] = []
        with torch.no_grad(), _still_statistics(self.model):
            for number, batch in enumerate(micros):
                batch = batch.to(self.device)
                self._seed(step, number)
                out, _ = engine.forward(batch, write=False)
                first.append(_vectors(out, batch))
        losses: dict[str, Tensor] = {}

        def loss_of(vectors: Vectors) -> Tensor:
            losses.update(self._vector_losses(vectors, micros, counts))
            return self._weighed(losses)

        _, gradients = vector_gradients(first, loss_of)
        losses = {name: loss.detach() for name, loss in losses.items()}
        losses |= {name: torch.zeros((), device=self.device) for name in WRITTEN_LOSSES if name in counts}
        for number, batch in enumerate(micros):
            last = number == len(micros) - 1
            batch = batch.to(self.device)
            self._seed(step, number)
            out, sums = engine.forward(batch, write=True, last=last)
            vectors = _vectors(out, batch)
            refuse_other_vectors(first[number], vectors)
            written = _written(sums, counts)
            loss = surrogate(vectors, gradients[number]) + self._weighed(written) + _nothing(out, sums)
            engine.backward(loss, last)
            losses |= {name: losses[name] + part.detach() for name, part in written.items()}
        return {"loss": self._weighed(losses), **losses}

    def forward(self, batch: Batch, write: bool) -> tuple[Output, dict[str, Tensor]]:
        """The path, and the sums of the caption losses' tokens; `write=False`: vectors alone, without captions."""
        draws = self.model.text_draws()
        texts = batch.texts if write or draws or batch.embedded_texts is None else batch.embedded_texts
        out: Output = self.model(
            batch.pictures.to(self.model.h1.weight.dtype),
            texts,
            batch.text_vector_M,
            batch.boxes_R4 if self.stage.max_regions else None,
            batch.region_image_R,
            self.from_trunk,
        )
        sums: dict[str, Tensor] = {}
        if write and any(self.stage.loss.weight(name) for name in WRITTEN_LOSSES):
            sums = self._sums_of_tokens(out.hidden_TD, batch)
        return out, sums

    def _sums_of_tokens(self, hidden_TD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of captions, phrases and negatives, each where it has a weight; through the head once: ZeRO wants it so."""
        language, loss, labels_T = self.model.language, self.stage.loss, batch.texts.labels_T
        wanted = dict(zip(("gen", "region_gen"), _parts_of_texts(batch), strict=True))
        wanted = {name: chosen_T for name, chosen_T in wanted.items() if loss.weight(name)}
        names = [*wanted, *(["hard_written"] if loss.hard.written else [])]

        def sums(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
            parts = []
            for chosen_T in wanted.values():
                kernel = caption_kernel(self.caption_kernel, labels_T[chosen_T], loss.label_smoothing, language.softcap)
                parts.append(kernel(hidden_TD[chosen_T], weight_VD, bias_V))
            if loss.hard.written:
                # Of captions without negatives not even the scores are needed.
                of_T = _compared_texts(batch)[batch.texts.label_text_T]
                cost_T = caption_losses(hidden_TD[of_T], weight_VD, bias_V, labels_T[of_T], softcap=language.softcap)
                text_T = batch.texts.label_text_T[of_T]
                tokens_M = torch.bincount(text_T, minlength=len(batch.text_vector_M))
                log_p_M = -cost_T.new_zeros(len(tokens_M)).index_add(0, text_T, cost_T) / tokens_M.clamp(min=1)
                negative_K = log_p_M[len(log_p_M) - len(batch.other_caption_X) :]
                own_K = log_p_M[batch.other_caption_X]
                parts.append(written_loss(negative_K, own_K, loss.hard.written_margin))
            return torch.stack(parts)

        return dict(zip(names, language.with_head(hidden_TD, sums).unbind(), strict=True))

    def _vector_losses(self, vectors: Vectors, micros: Sequence[Batch], counts: dict[str, int]) -> dict[str, Tensor]:
        """emb: images and captions. region_emb: boxes and phrases. hard_…: with hard negatives. Unweighted."""
        v_BE, r_RE, captions_ME, phrases_RE, others_XE, made_HE = vectors
        model, losses, robust = self.model, {}, self.stage.negatives.order_robust

        def ids(name: str) -> Tensor:
            return torch.cat([getattr(batch, name) for batch in micros]).to(self.device)

        for name, with_others in (("emb", robust), ("hard_columns", True)):
            if name not in counts:
                continue
            images, image_ids = v_BE, ids("image_id_B")
            texts, owners, text_ids = captions_ME, ids("caption_owner_M"), ids("caption_text_M")
            if with_others:
                images, image_ids = torch.cat([images, made_HE]), torch.cat([image_ids, ids("made_id_H")])
                texts, owners = torch.cat([texts, others_XE]), torch.cat([owners, ids("other_owner_X")])
                text_ids = torch.cat([text_ids, ids("other_text_X")])
            losses[name] = contrastive_loss(
                images, image_ids, texts, owners, text_ids, model.logit_scale, model.logit_bias, self.stage.loss.kind
            )
        if {"hard_rank", "hard_intra", "hard_focal", "hard_triplet"} & counts.keys():
            losses |= self._hard_losses(v_BE, captions_ME, others_XE, made_HE, micros, counts)
        if "region_emb" in counts:
            entities = ids("entity_id_R")
            losses["region_emb"] = contrastive_loss(
                r_RE, entities, phrases_RE, entities, ids("phrase_text_R"),
                model.logit_scale, model.logit_bias, self.stage.loss.kind,
            )  # fmt: skip
        return losses

    def _hard_losses(
        self,
        v_BE: Tensor,
        captions_ME: Tensor,
        others_XE: Tensor,
        made_HE: Tensor,
        micros: Sequence[Batch],
        counts: dict[str, int],
    ) -> dict[str, Tensor]:
        images, captions, made = 0, 0, 0
        image_M, caption_X, drawn_X = [], [], []
        for batch in micros:
            image_M.append(batch.text_vector_M[: batch.captions] + images)
            caption_X.append(batch.other_caption_X + captions)
            drawn_X.append(torch.where(batch.other_picture_X < 0, -1, batch.other_picture_X + made))
            images, captions = images + batch.samples, captions + batch.captions
            made += len(batch.made_id_H)
        picture_ME = v_BE[torch.cat(image_M).to(self.device)]
        kind_X = torch.cat([batch.other_kind_X for batch in micros]).to(self.device)
        caption_X = torch.cat(caption_X).to(self.device)
        scores = hard_scores(picture_ME, captions_ME, others_XE, caption_X, kind_X, self.model.logit_scale)
        hard = self.stage.loss.hard

        def triplet(count: int) -> Tensor:
            own_X = torch.cat(drawn_X).to(self.device)
            asked_X = own_X >= 0
            caption_K = caption_X[asked_X]
            return triplet_loss(
                picture_ME[caption_K], captions_ME[caption_K], made_HE[own_X[asked_X]], others_XE[asked_X],
                self.model.logit_scale, count,
            )  # fmt: skip

        ways: dict[str, Callable[[int], Tensor]] = {
            "hard_rank": lambda count: rank_loss(scores, count, len(KIND_NUMBERS) + 1),
            "hard_intra": lambda count: intra_modal_loss(scores, count),
            "hard_focal": lambda count: focal_loss(scores, count, hard.focal_gamma, hard.focal_smoothing),
            "hard_triplet": triplet,
        }
        return {name: loss(counts[name]) for name, loss in ways.items() if name in counts}

    def _weighed(self, losses: dict[str, Tensor]) -> Tensor:
        terms = (self.stage.loss.weight(name) * value for name, value in losses.items())
        return sum(terms, start=torch.zeros((), device=self.device))

    def _seed(self, step: int, micro: int = 0) -> None:
        # All randomness of a step follows from its number, so a resumed run draws what an unbroken one would have.
        seed = (self.seed * 1_000_003 + self.stage_number) * 1_000_003 + step
        torch.manual_seed((seed + self.ranks.rank * 1_000_000_007 + micro * 1_000_000_009) % 2**63)

    def _note(self, engine: Engine, share: Share, losses: dict[str, Tensor], step: int) -> None:
        """The figures of all ranks, for the log. Raises NotFinite, on all ranks together."""
        names = [name if name == "loss" else f"loss_{name}" for name in losses]
        # The contrastive losses are the same on each rank, the caption losses' parts have the loss as their mean.
        means = (
            sum_over_ranks(torch.stack([at_least_fp32(loss) for loss in losses.values()])) / self.ranks.count
        ).tolist()
        figures = dict(zip(names, means, strict=True))
        if not math.isfinite(figures["loss"]):
            text = ", ".join(f"{k.removeprefix('loss_')} {v:.4g}" for k, v in figures.items() if k != "loss")
            named = self.ranks.lists(self._suspects(engine, share, step))
            samples = f"it comes from {', '.join(named[:8])}{' …' if len(named) > 8 else ''}"
            raise NotFinite(
                f"stage {self.stage.name}, step {step + 1}: the loss is not finite ({text}); "
                f"{samples if named else 'no sample by itself gives such a vector'}; look at "
                f"{'them' if len(named) > 1 else 'it'}, or lower the learning rate or clip_grad; the weights are still "
                "those of the step before"
            )
        self.last = {**figures, "logit_scale": math.exp(self.model.logit_scale.item())}

    @torch.no_grad()
    def _suspects(self, engine: Engine, share: Share, step: int) -> list[str]:
        """Keys of this rank's samples with a picture, or, where none has one, with a vector that is not finite."""

        def bad(rows: Tensor) -> Tensor:
            return ~rows.flatten(1).isfinite().all(dim=1)

        found: list[str] = []
        vectors: list[str] = []
        for number, batch in enumerate(share.micros):
            found += [batch.keys[i] for i in bad(batch.pictures[: batch.samples]).nonzero()[:, 0].tolist()]
            batch = batch.to(self.device)
            self._seed(step, number)
            out, _ = engine.forward(batch, write=False)
            own_B = torch.arange(batch.samples, device=self.device)
            owner_BR = torch.cat([own_B, batch.made_sample_H, batch.region_image_R])
            owner_M = owner_BR[batch.text_vector_M][: len(out.t_ME)]
            owners = torch.cat([owner_BR[bad(torch.cat([out.v_BE, out.r_RE]))], owner_M[bad(out.t_ME)]])
            vectors += [batch.keys[i] for i in owners.unique().tolist()]
        return found if self.ranks.sums(len(found))[0] else vectors

    # --- for Lightning ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model.parts(), self.stage)

    def on_fit_start(self) -> None:
        self.temperature.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["temperature"] = self.temperature.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.temperature.load_state_dict(checkpoint["temperature"])


class ShardedStageModule(StageModule):
    """For fsdp2, whose strategy leaves it to the module to be shared out."""

    def configure_model(self) -> None:
        share_out(self, repeated_blocks(self.model), self.device_mesh)


def _vectors(out: Output, batch: Batch) -> Vectors:
    """Images, boxes, captions, phrases; texts and pictures made of these."""
    counts = (batch.captions, len(batch.boxes_R4), len(batch.other_caption_X))
    texts = out.t_ME.split(counts) if len(out.t_ME) else (out.t_ME,) * 3  # none, where nothing asks for them
    return out.v_BE[: batch.samples], out.r_RE, *texts, out.v_BE[batch.samples :]


def _parts_of_texts(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which labels are of captions, and which of phrases; the others are of texts made of captions."""
    text_T = batch.texts.label_text_T
    of_captions_T = text_T < batch.captions
    return of_captions_T, ~of_captions_T & (text_T < batch.captions + len(batch.boxes_R4))


def _compared_texts(batch: Batch) -> Tensor:
    """[M] negatives, and captions that have some."""
    of_M = torch.zeros(len(batch.text_vector_M), dtype=torch.bool, device=batch.text_vector_M.device)
    of_M[batch.other_caption_X] = True
    of_M[len(of_M) - len(batch.other_caption_X) :] = True
    return of_M


def _written(sums: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    """This rank's and micro-batch's part of each mean."""
    return {name: caption_loss(sums[name], counts[name]) for name in sums if name in counts}


def _nothing(out: Output, sums: dict[str, Tensor]) -> Tensor:
    """Zero times all outputs: a batch without captions or boxes is a step too, so that steps, samples and ranks stay in
    line, and each parameter has a gradient on each rank."""
    total = out.v_BE.sum() + out.t_ME.sum() + out.r_RE.sum() + out.hidden_TD.sum()
    return at_least_fp32(total) * 0 + sum((value * 0 for value in sums.values()), start=torch.zeros_like(total))


class _still_statistics:
    """Within, batch norms that train do not move their statistics: each picture shall count once."""

    def __init__(self, model: MMGem):
        self.norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.buffers = [{n: b.clone() for n, b in norm.named_buffers()} for norm in self.norms]

    def __exit__(self, *exception: Any) -> None:
        for norm, before in zip(self.norms, self.buffers, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(before[name])
