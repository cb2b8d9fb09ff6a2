"""MM-GEM: one path that retrieves and writes (Ma et al. 2024, arXiv 2405.19333), readable top to bottom.

    V    = vision(image)                      feature map, class token dropped
    v    = h1(mean(V))                        whole image
    r    = h1(roi_align(V, box))              one region
    t    = h2(LLM([BOS] x1 … xn [EMB]))       a text's vector, at [EMB]
    V_in = h3(v) or h3(r)                     ONE token; made from the very vector that is retrieved with
    LLM([BOS] V_in [CAP] x1 … xn) -> x1 … xn [EOS]

Receives normalised pictures, boxes as shares of the picture, packed texts. Gives vectors and logits. Training adds the
losses (`mmgem.losses`); use goes through the methods of the second half, which take PIL pictures and strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmgem.config import ModelConfig
from mmgem.errors import UserError
from mmgem.images import kept_share, move_boxes
from mmgem.model.aggregator import PoolAggregator
from mmgem.model.language import LanguageModel
from mmgem.model.vision import VisionTower, create_tower
from mmgem.text import PackedTexts, PrefixTree, TextCodec

MAX_LOGIT_SCALE = math.log(100)
_SCORED = 2048
"""Labels whose scores over the whole vocabulary are held at once."""
Boxes = Sequence[Sequence[float]]


class Output(NamedTuple):
    """What one training forward gives. M texts: first those of images, then the phrases of regions.

    A tuple, since DeepSpeed's ZeRO 3 looks for tensors in those, to gather parameters before their backward.
    """

    v_BE: Tensor
    r_RE: Tensor
    t_ME: Tensor
    """Empty (0 x E) if no embedding stream was packed."""
    hidden_TD: Tensor
    """At label positions; `logits` turns them into scores."""


class MMGem(nn.Module):
    map_mean_C: Tensor
    map_std_C: Tensor

    def __init__(self, config: ModelConfig, tokenizer: Any, load_weights: bool = True):
        """`load_weights=False` builds shapes only, e.g. on the meta device or before loading a checkpoint."""
        super().__init__()
        self.config = config
        self.codec = TextCodec(tokenizer, config.max_tokens)
        self.vision: VisionTower = create_tower(config.vision, load_weights)
        self.aggregator = PoolAggregator(config.roi_size, config.roi_sampling)
        self.language = LanguageModel(config.llm, self.codec, load_weights)
        C, D, E = self.vision.width, self.language.width, config.embed_dim
        # h1 is linear so that it commutes with the mean: one h1 serves images, boxes and single places.
        self.h1 = nn.Linear(C, E)
        self.h2 = nn.Linear(D, E)
        self.h3 = nn.Linear(E, D)
        self.register_buffer("map_mean_C", torch.zeros(C))
        self.register_buffer("map_std_C", torch.ones(C))
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))
        self.preprocess = self.vision.preprocess()
        for module, share in ((self.h1, config.h1_init), (self.h2, 1.0), (self.h3, 1.0)):
            nn.init.normal_(module.weight, std=share * module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    # --- the path -----------------------------------------------------------------------------------------------------

    def image_vectors_from_map(self, map_BCHW: Tensor) -> Tensor:
        """map_BCHW -> v_BE, not normalised."""
        return self.project_visual(self.aggregator.image(map_BCHW))

    def region_vectors_from_map(self, map_BCHW: Tensor, boxes_R4: Tensor, image_R: Tensor) -> Tensor:
        """map_BCHW, boxes as shares, each box's image -> r_RE, not normalised."""
        return self.project_visual(self.aggregator.regions(map_BCHW, boxes_R4, image_R))

    def project_visual(self, pooled: Tensor) -> Tensor:
        """… x C -> … x E: h1, after the map's standardisation. All affine, so pooling before or after is the same."""
        standard = ((pooled - self.map_mean_C) / self.map_std_C).to(pooled.dtype)
        return self.h1(F.dropout(standard, self.config.visual_dropout, self.training))

    def set_standard(self, pooled_NC: Tensor) -> None:
        """Sets the standardisation from pooled features of training pictures."""
        std_C = pooled_NC.float().std(dim=0)
        self.map_mean_C.copy_(pooled_NC.float().mean(dim=0))
        # A channel that hardly moves must not become noise.
        self.map_std_C.copy_(std_C.clamp(min=0.05 * float(std_C.mean())))

    def _head_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.head_dropout, self.training)

    def forward(
        self,
        pictures: Tensor,
        texts: PackedTexts,
        text_vector_M: Tensor,
        boxes_R4: Tensor | None = None,
        region_image_R: Tensor | None = None,
        from_trunk: bool = False,
    ) -> Output:
        """One step's forward: one pass of the tower, one of the LLM.

        pictures: B x 3 x S x S normalised, or, `from_trunk`, what `vision.trunk` gave for them.
        text_vector_M: which row of [v_BE; r_RE] each text belongs to.
        """
        map_BCHW = self.vision.rest(pictures) if from_trunk else self.vision(pictures)
        v_BE = self.image_vectors_from_map(map_BCHW)
        # Also without a box: each rank and micro-batch calls the same modules, as ZeRO 3 wants it.
        if boxes_R4 is not None and region_image_R is not None:
            r_RE = self.region_vectors_from_map(map_BCHW, boxes_R4, region_image_R)
        else:
            r_RE = v_BE.new_zeros(0, v_BE.shape[1])

        embedded_nLD = self.language.embed(texts.ids_nL)
        flat_ND = embedded_nLD.flatten(0, 1)
        if len(texts.word_index_W) and self.training and self.config.token_dropout:
            kept_W = torch.rand(len(texts.word_index_W), device=flat_ND.device) >= self.config.token_dropout
            kept_N = torch.ones(len(flat_ND), device=flat_ND.device, dtype=flat_ND.dtype)
            flat_ND = flat_ND * kept_N.index_put((texts.word_index_W,), kept_W.to(flat_ND.dtype))[:, None]
        # Also without a text to write: each rank's and micro-batch's graph holds the same parameters, as ZeRO wants it.
        visual_KD = self.h3(self._head_dropout(torch.cat([v_BE, r_RE]))[text_vector_M[texts.written_K]])
        flat_ND = flat_ND.index_put((texts.visual_index_K,), visual_KD.to(flat_ND.dtype))
        hidden_ND = self.language(flat_ND.view_as(embedded_nLD), texts.segment_nL, texts.position_nL).flatten(0, 1)
        t_ME = self.h2(self._head_dropout(hidden_ND[texts.emb_index_M]))
        return Output(v_BE, r_RE, t_ME, hidden_ND[texts.label_index_T])

    def text_draws(self) -> bool:
        """Whether the texts' vectors draw random numbers in training: they then depend on what else is packed."""
        if self.config.token_dropout or self.config.head_dropout:
            return True
        modules = self.language.modules()
        settings = self.language.hf.config.to_dict().items()
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules) or any(
            "drop" in name and isinstance(value, float) and value > 0 for name, value in settings
        )

    def clamp_logit_scale(self) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Every parameter under the part it is frozen and scheduled with."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {"vision": [], "llm": [], "projections": []}
        for name, parameter in self.named_parameters():
            if name.startswith("vision."):
                parts["vision"].append((name, parameter))
            elif name.startswith("language.hf."):
                parts["llm"].append((name, parameter))
            else:
                parts["projections"].append((name, parameter))
        return parts

    # --- use: pictures and strings in, vectors and captions out ---------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.h1.weight.device

    @torch.inference_mode()
    def image_and_region_vectors(
        self, images: Sequence[Image.Image], boxes: Sequence[Boxes], batch_size: int = 64
    ) -> tuple[Tensor, list[Tensor]]:
        """Pictures and their boxes (in pixels) -> v_NE, and R_i x E for each, from one vision pass; not normalised.

        A box that reaches over the border is clipped; UserError for one without area, or of which nothing is seen.
        """
        image_parts: list[Tensor] = []
        regions: list[Tensor] = []
        with self._evaluating():
            for start in range(0, len(images), batch_size):
                chunk = images[start : start + batch_size]
                chunk_boxes = [
                    self._shares(image, b) for image, b in zip(chunk, boxes[start : start + batch_size], strict=True)
                ]
                map_BCHW = self.vision(
                    torch.stack([self.preprocess(i) for i in chunk]).to(self.device, self.h1.weight.dtype)
                )
                image_parts.append(self.image_vectors_from_map(map_BCHW).float().cpu())
                counts = [len(b) for b in chunk_boxes]
                owner_R = torch.repeat_interleave(torch.arange(len(chunk)), torch.tensor(counts))
                r_RE = self.region_vectors_from_map(
                    map_BCHW, torch.cat(chunk_boxes).to(self.device), owner_R.to(self.device)
                )
                regions += list(r_RE.float().cpu().split(counts))
        v_NE = torch.cat(image_parts) if image_parts else torch.zeros(0, self.config.embed_dim)
        return v_NE, regions

    def sees(self, image: Image.Image, box: Sequence[float]) -> bool:
        """Whether any of a box (x1, y1, x2, y2 in pixels) lies in what the tower sees of its picture."""
        return kept_share([box], self.preprocess.window(*image.size))[0] > 0

    def _shares(self, image: Image.Image, boxes: Boxes) -> Tensor:
        """Boxes in the picture's pixels -> R x 4 shares of what the tower sees of it."""
        seen = self.preprocess.window(*image.size)
        for box in boxes:
            x1, y1, x2, y2 = box
            if not (x2 > x1 and y2 > y1):
                raise UserError(f"box {tuple(box)} has no area; x2 must be above x1 and y2 above y1")
            if not self.sees(image, box):
                raise UserError(
                    f"box {tuple(box)} lies outside what the model sees of a picture of {image.width} x {image.height} "
                    f"pixels, {seen}; give boxes as x1, y1, x2, y2 in its pixels"
                )
        return move_boxes(boxes, seen)

    def image_vectors(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """PIL pictures -> v_NE, not normalised, float32 on CPU."""
        return self.image_and_region_vectors(images, [[] for _ in images], batch_size)[0]

    def region_vectors(
        self, images: Sequence[Image.Image], boxes: Sequence[Boxes], batch_size: int = 64
    ) -> list[Tensor]:
        """PIL pictures and boxes in their pixels (x1, y1, x2, y2) -> one R_i x E for each picture, not normalised."""
        return self.image_and_region_vectors(images, boxes, batch_size)[1]

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Strings -> t_NE, not normalised, float32 on CPU. Texts over `config.max_tokens` are cut before [EMB]."""
        ids, _ = self.codec.encode(texts)
        out_NE = torch.zeros(len(ids), self.config.embed_dim)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with self._evaluating():
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                out_NE[chunk] = self._text_chunk([self.codec.embedding_stream(ids[i]) for i in chunk]).float().cpu()
        return out_NE

    def _text_chunk(self, streams: list[list[int]]) -> Tensor:
        """Padded on the right, where no token that counts can see it."""
        last_B = torch.tensor([len(s) - 1 for s in streams])
        length = int(last_B.max()) + 1
        ids_BL = torch.tensor([s + [0] * (length - len(s)) for s in streams])
        segment_BL = torch.where(torch.arange(length) <= last_B[:, None], 0, -1)
        position_BL = torch.arange(length).expand_as(ids_BL)
        hidden_BLD = self.language(
            self.language.embed(ids_BL.to(self.device)), segment_BL.to(self.device), position_BL.to(self.device)
        )
        return self.h2(hidden_BLD[torch.arange(len(streams)), last_B.to(self.device)])

    @torch.inference_mode()
    def write(
        self,
        vectors_NE: Tensor,
        *,
        num_beams: int = 1,
        max_new_tokens: int = 30,
        length_penalty: float = 1.0,
        rerank: float = 0.0,
        do_sample: bool = False,
        top_p: float = 1.0,
        temperature: float = 1.0,
        seed: int | None = None,
        batch_size: int = 256,
        use_cache: bool = True,
    ) -> list[str]:
        """Captions from un-normalised image or region vectors: greedy, beams, or nucleus sampling (`do_sample`).

        rerank: above 0, the model reads its beams: of them that one is given whose score (the mean log p of a token,
        with a `length_penalty` of 1) plus `rerank` times the cosine of its text vector and the given vector is highest.
        """
        if num_beams < 1 or max_new_tokens < 1 or not 0 < top_p <= 1 or temperature <= 0:
            raise UserError(
                f"captions cannot be written with beams={num_beams}, max_new_tokens={max_new_tokens}, top_p={top_p}, "
                f"temperature={temperature}: at least 1, at least 1, above 0 and up to 1, above 0"
            )
        if rerank < 0 or (rerank > 0 and (num_beams < 2 or do_sample)):
            raise UserError(
                f"captions cannot be reranked by {rerank} with beams={num_beams}, do_sample={do_sample}: it is 0 or "
                "more, and chooses among 2 beams or more"
            )
        positions = getattr(self.language.hf.config, "max_position_embeddings", None) or math.inf
        max_new_tokens = int(min(max_new_tokens, positions - len(self.codec.prefix) - 2))
        options: dict[str, Any] = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "use_cache": use_cache,
            "min_new_tokens": 1,
        }
        if num_beams > 1:
            options |= {"length_penalty": length_penalty, "early_stopping": False}
        if do_sample:
            options |= {"top_p": top_p, "temperature": temperature, "top_k": 0}
        options["suppress_tokens"] = self._never_written
        captions: list[str] = []
        with self._evaluating(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(vectors_NE), max(1, batch_size // num_beams)):
                chunk_BE = vectors_NE[start : start + max(1, batch_size // num_beams)].to(
                    self.device, self.h3.weight.dtype
                )
                prefix_BLD, eos_id = self._prefix(chunk_BE), self.codec.eos_id
                if rerank:
                    ids_BKT, score_BK = self.language.generate_beams(prefix_BLD, eos_id, eos_id, **options)
                    captions += self._best_read(chunk_BE, ids_BKT, score_BK, rerank)
                else:
                    ids_BT = self.language.generate(prefix_BLD, eos_id, eos_id, **options)
                    captions += [self.codec.decode(ids) for ids in ids_BT.tolist()]
        return captions

    def _best_read(self, vectors_BE: Tensor, ids_BKT: Tensor, score_BK: Tensor, rerank: float) -> list[str]:
        """Of each vector's K texts the one with the highest score + rerank · cos."""
        texts = [[self.codec.decode(ids) for ids in beams] for beams in ids_BKT.tolist()]
        t_BKE = self.text_vectors([text for beams in texts for text in beams]).unflatten(0, tuple(score_BK.shape))
        cos_BK = F.cosine_similarity(vectors_BE.float().cpu()[:, None], t_BKE, dim=-1)
        best_B = (score_BK.float().cpu() + rerank * cos_BK).argmax(dim=1)
        return [beams[k] for beams, k in zip(texts, best_B.tolist(), strict=True)]

    @property
    def _never_written(self) -> list[int]:
        codec = self.codec
        special = (codec.bos_id, codec.tokenizer.pad_token_id, codec.emb_id, codec.cap_id)
        return [i for i in special if i is not None and i != codec.eos_id]

    def prefix_tree(self, texts: Sequence[str]) -> PrefixTree:
        """For `choose`."""
        return PrefixTree(self.codec, texts)

    @torch.inference_mode()
    def choose(
        self, vectors_NE: Tensor, texts: PrefixTree, num_beams: int = 5, batch_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Writes for each vector (un-normalised) nothing but one of the texts, by a search with beams over their tree.

        Gives the rows of the `num_beams` best texts found, int64 [N, K], best first (-1: fewer were found), and their
        log p, sums over the tokens and the end: float32 [N, K].
        """
        beams = min(num_beams, len(texts))
        options: dict[str, Any] = {
            "num_beams": beams,
            "max_new_tokens": texts.longest + 1,
            "length_penalty": 0.0,
            "early_stopping": False,
            "suppress_tokens": self._never_written,
            "prefix_allowed_tokens_fn": lambda _, ids: texts.following(ids.tolist()),
        }
        rows: list[list[int]] = []
        scores: list[Tensor] = []
        eos_id = self.codec.eos_id
        with self._evaluating():
            for chunk_BE in vectors_NE.split(max(1, batch_size // beams)):
                prefix_BLD = self._prefix(chunk_BE.to(self.device, self.h3.weight.dtype))
                ids_BKT, score_BK = self.language.generate_beams(prefix_BLD, eos_id, eos_id, **options)
                found = [[texts.row(ids) for ids in beams] for beams in ids_BKT.tolist()]
                rows += found
                scores.append(score_BK.float().cpu())
        rows_NK = torch.tensor(rows, dtype=torch.int64).reshape(len(vectors_NE), beams)
        return rows_NK, torch.cat(scores) if scores else torch.zeros(0, beams)

    @torch.inference_mode()
    def log_likelihoods(
        self, vectors_NE: Tensor, texts: Sequence[str], vector_P: Tensor, text_P: Tensor, batch_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        """log p(text | vector) of P pairs, a sum over the text's tokens and its end: float32 [P]; and how many those
        are: int64 [P].

        vectors_NE: un-normalised, of images or regions. vector_P, text_P: rows of `vectors_NE` and `texts`, int64.
        Texts over `config.max_tokens` are cut, and end there.
        """
        ids = self.codec.encode(texts)[0]
        words_T = torch.tensor([len(i) for i in ids], dtype=torch.int64)
        words_P = words_T[text_P]
        sums_P = torch.zeros(len(text_P))
        with self._evaluating():
            for chunk_B in torch.argsort(words_P, stable=True).split(batch_size):
                rows = [ids[t] for t in text_P[chunk_B].tolist()]
                vectors_BE = vectors_NE[vector_P[chunk_B]].to(self.device, self.h3.weight.dtype)
                sums_P[chunk_B] = self._likelihood_chunk(vectors_BE, rows).cpu()
        return sums_P, words_P + 1

    def _likelihood_chunk(self, vectors_BE: Tensor, rows: list[list[int]]) -> Tensor:
        """Padded on the right, where no token that counts can see it -> [B]."""
        prefix_BLD = self._prefix(vectors_BE)
        before, longest = prefix_BLD.shape[1], max(map(len, rows))
        words_BW = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        words_B = torch.tensor([len(row) for row in rows], device=self.device)
        place_W = torch.arange(longest + 1, device=self.device)
        counts_BW = place_W <= words_B[:, None]
        ended_BW = torch.cat([words_BW, words_BW.new_zeros(len(rows), 1)], dim=1)
        labels_BW = torch.where(place_W == words_B[:, None], self.codec.eos_id, ended_BW)
        embedded_BLD = torch.cat([prefix_BLD, self.language.embed(words_BW).to(prefix_BLD.dtype)], dim=1)
        position_BL = torch.arange(before + longest, device=self.device).expand(len(rows), -1)
        segment_BL = torch.where(position_BL < before + words_B[:, None], 0, -1)
        hidden_TD = self.language(embedded_BLD, segment_BL, position_BL)[:, before - 1 :][counts_BW]
        labels_T = labels_BW[counts_BW]
        logp_T = torch.cat(
            [
                self.language.logits(hidden).float().log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
                for hidden, labels in zip(hidden_TD.split(_SCORED), labels_T.split(_SCORED), strict=True)
            ]
        )
        row_T = torch.repeat_interleave(torch.arange(len(rows), device=self.device), words_B + 1)
        return logp_T.new_zeros(len(rows)).index_add_(0, row_T, logp_T)

    def _prefix(self, vectors_BE: Tensor) -> Tensor:
        """[BOS] V_in [CAP] -> B x 3 x D (2 without [BOS])."""
        around = torch.tensor([*self.codec.prefix, self.codec.cap_id], device=self.device)
        around_BLD = self.language.embed(around).expand(len(vectors_BE), -1, -1)
        return torch.cat([around_BLD[:, :-1], self.h3(vectors_BE)[:, None], around_BLD[:, -1:]], dim=1)

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """PIL pictures -> N x E, each of length 1."""
        return F.normalize(self.image_vectors(images, batch_size), dim=-1)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Strings -> N x E, each of length 1."""
        return F.normalize(self.text_vectors(texts, batch_size), dim=-1)

    def embed_regions(
        self, images: Sequence[Image.Image], boxes: Sequence[Boxes], batch_size: int = 64
    ) -> list[Tensor]:
        """Pictures and their boxes (pixels) -> one R_i x E for each picture, each row of length 1."""
        return [F.normalize(r, dim=-1) for r in self.region_vectors(images, boxes, batch_size)]

    def caption(self, images: Sequence[Image.Image], **options: Any) -> list[str]:
        """A caption for each picture; options as for `write`."""
        return self.write(self.image_vectors(images), **options)

    def caption_regions(self, images: Sequence[Image.Image], boxes: Sequence[Boxes], **options: Any) -> list[list[str]]:
        """A caption for each box of each picture; options as for `write`."""
        vectors = self.region_vectors(images, boxes)
        written = iter(self.write(torch.cat(vectors), **options)) if vectors else iter(())
        return [[next(written) for _ in v] for v in vectors]

    @torch.inference_mode()
    def place_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> N x H x W x E, the vector of each place of the feature map; not normalised, float32 on CPU."""
        with self._evaluating():
            pixels_B3SS = torch.stack([self.preprocess(i) for i in images]).to(self.device, self.h1.weight.dtype)
            return self.project_visual(self.aggregator.locations(self.vision(pixels_B3SS))).float().cpu()

    def window(self, image: Image.Image) -> tuple[float, float, float, float]:
        """What the tower sees of a picture: x1, y1, x2, y2 in its pixels. Maps of places lie over it."""
        return self.preprocess.window(*image.size)

    def similarity_map(self, image: Image.Image, text: str) -> Tensor:
        """Cosine of each place of the feature map with a text: H x W, on the view that `preprocess` shows."""
        return F.normalize(self.place_vectors([image])[0], dim=-1) @ self.embed_texts([text])[0]

    def encode_image(self, pixels_B3SS: Tensor, normalize: bool = False) -> Tensor:
        """As CLIP's: pictures through `preprocess`, stacked -> B x E. Keeps the graph."""
        v_BE = self.image_vectors_from_map(self.vision(pixels_B3SS))
        return F.normalize(v_BE, dim=-1) if normalize else v_BE

    def encode_text(self, ids: Sequence[Sequence[int]] | Tensor, normalize: bool = False) -> Tensor:
        """As CLIP's: token ids from `tokenize` -> B x E. Keeps the graph."""
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(i) for i in ids]
        streams = [row[: row.index(self.codec.emb_id) + 1] for row in rows]
        t_BE = self._text_chunk(streams)
        return F.normalize(t_BE, dim=-1) if normalize else t_BE

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Strings -> B x L embedding streams, padded on the right with 0."""
        streams = [self.codec.embedding_stream(i) for i in self.codec.encode(texts)[0]]
        length = max(len(s) for s in streams)
        return torch.tensor([s + [0] * (length - len(s)) for s in streams])

    def _evaluating(self) -> _Evaluating:
        return _Evaluating(self)

    # --- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        from mmgem.model.pretrained import save_pretrained

        save_pretrained(self, Path(path))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> MMGem:
        """Loads what `save_pretrained` wrote, or a run folder (its `model/`)."""
        from mmgem.model.pretrained import from_pretrained

        return from_pretrained(Path(path), device, dtype)


class _Evaluating:
    """Switches a model to evaluation, and each of its modules back to what it was."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.training = [module for module in self.model.modules() if module.training]
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True
