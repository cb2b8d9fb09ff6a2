"""The one LLM: packed rows in, hidden states out; logits where they are wanted; captions written with a cache.

Receives an LlmConfig (any Hugging Face causal LM: hub id, folder, or random from a config). Gives `LanguageModel`.
Refuses models whose packed segments see each other (found by trying) and configs that contradict what is loaded.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmgem.config import LlmConfig
from mmgem.errors import UserError, one_line
from mmgem.text import TextCodec

SELF_ATTENTION = 0.4
"""Scale of queries times keys that start as identities: a word's score on itself is this times √head_dim, on another
word about 0; with heads of 64, 3.2 to 0, so that it sees itself about as much as twenty others."""

_OLDER_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "torch_dtype")
"""Settings that transformers takes by these names and keeps under others."""


HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class OutputHead(nn.Linear):
    """An LM's output head that can also do something else than logits with its weights."""

    @staticmethod
    def of(head: Any) -> OutputHead:
        """The same weights, shared with the input embeddings where they were. Raises UserError for an unusual head."""
        if type(head) is not nn.Linear:
            raise UserError(f"model.llm: its output head is a {type(head).__name__}; choose an LLM with a linear one")
        ours = OutputHead(head.in_features, head.out_features, head.bias is not None, device="meta")
        ours.weight, ours.bias = head.weight, head.bias
        return ours

    def forward(self, input: Tensor, function: HeadFunction | None = None) -> Tensor:
        # Within the head's own forward: only there, and in its backward, are the weights whole where ZeRO shares them
        # out among the ranks.
        return super().forward(input) if function is None else function(input, self.weight, self.bias)


class AddedRows(nn.Module):
    """The input rows of [EMB] and [CAP]. A module of their own: ZeRO 3 gathers a module's weights while it runs."""

    def __init__(self, rows_2D: Tensor, emb_id: int, cap_id: int):
        super().__init__()
        self.rows_2D = nn.Parameter(rows_2D)
        self.emb_id, self.cap_id = emb_id, cap_id

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        rows_2D = self.rows_2D.to(embedded.dtype)
        embedded = torch.where((ids == self.emb_id)[..., None], rows_2D[0], embedded)
        return torch.where((ids == self.cap_id)[..., None], rows_2D[1], embedded)


class LanguageModel(nn.Module):
    """A causal LM with two added input rows, for [EMB] and [CAP].

    The rows are a parameter of their own, so that they train while the LLM is frozen. Neither token is ever written,
    so there are no output rows for them.
    """

    def __init__(self, config: LlmConfig, codec: TextCodec, load_weights: bool = True):
        super().__init__()
        self.hf = create_llm(config, codec, load_weights)
        self.hf.set_output_embeddings(OutputHead.of(self.hf.get_output_embeddings()))
        self.emb_id, self.cap_id = codec.emb_id, codec.cap_id
        self.width = int(self.hf.get_input_embeddings().embedding_dim)
        table = self.hf.get_input_embeddings().weight
        std = 0.02 if table.is_meta else float(table.detach().float().std())
        self.added = AddedRows(torch.randn(2, self.width) * std, self.emb_id, self.cap_id)
        if config.average_init and load_weights:
            nn.init.zeros_(self.added.rows_2D[0])  # so that [EMB]'s state begins as the average alone
        positions = getattr(self.hf.config, "max_position_embeddings", None)
        if positions is not None and positions < codec.max_tokens + 3:
            raise UserError(
                f"model.max_tokens={codec.max_tokens} and its 3 special tokens do not fit the LLM's {positions} "
                f"positions; set it to at most {positions - 3}"
            )

    @property
    def backbone(self) -> nn.Module:
        """The LM without its output head."""
        return self.hf.get_decoder() if hasattr(self.hf, "get_decoder") else self.hf.base_model

    def embed(self, ids: Tensor) -> Tensor:
        """ids of any shape -> the same shape x D."""
        known = ids.masked_fill((ids == self.emb_id) | (ids == self.cap_id), 0)
        return self.added(ids, self.hf.get_input_embeddings()(known))

    def forward(self, embedded_nLD: Tensor, segment_nL: Tensor, position_nL: Tensor) -> Tensor:
        """Packed rows -> hidden states n x L x D after the last norm.

        segment_nL: which stream a token belongs to (the same number: the same stream; padding: -1).
        position_nL: restarts at 0 with each stream.
        """
        mask_n1LL = packed_mask(segment_nL, embedded_nLD.dtype)
        # use_cache=False: with a cache transformers drops the isolation of packed segments, silently.
        return self.backbone(
            inputs_embeds=embedded_nLD, attention_mask=mask_n1LL, position_ids=position_nL, use_cache=False
        ).last_hidden_state

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states at the wanted positions -> N x vocabulary."""
        logits = self.hf.get_output_embeddings()(hidden_ND)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def softcap(self) -> float | None:
        return getattr(self.hf.config, "final_logit_softcapping", None)

    def with_head(self, hidden_ND: Tensor, function: HeadFunction) -> Tensor:
        """function(hidden_ND, weight_VD, bias_V) of the output head, for what is to be had without the logits."""
        return self.hf.get_output_embeddings()(hidden_ND, function)

    @torch.no_grad()
    def generate(self, embedded_BLD: Tensor, eos_id: int, pad_id: int, **options: Any) -> Tensor:
        """Writes on after a prefix, which is equally long for all, so nothing is padded. Gives B x T ids."""
        return self.hf.generate(  # pyright: ignore[reportCallIssue]
            inputs_embeds=embedded_BLD,
            attention_mask=torch.ones(embedded_BLD.shape[:2], dtype=torch.long, device=embedded_BLD.device),
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            **options,
        )

    def generate_beams(self, embedded_BLD: Tensor, eos_id: int, pad_id: int, **options: Any) -> tuple[Tensor, Tensor]:
        """As `generate` with `num_beams` K, all K ends of the search: B x K x T ids, and B x K scores, which are sums
        of log p over the tokens, divided by their number to the power of `length_penalty`."""
        beams = options["num_beams"]
        out: Any = self.generate(
            embedded_BLD, eos_id, pad_id, num_return_sequences=beams, return_dict_in_generate=True, output_scores=True,
            **options,
        )  # fmt: skip
        return out.sequences.unflatten(0, (-1, beams)), out.sequences_scores.unflatten(0, (-1, beams))

    @torch.no_grad()
    def refuse_leaks(self) -> None:
        """Runs two streams packed, alone, and through the LM's own forward; raises UserError if they differ.

        Such an LM cannot be packed, or does more to its scores than `logits` knows.
        """
        training = self.training
        self.eval()
        parameter = next(self.hf.parameters())
        generator = torch.Generator().manual_seed(0)
        rows_1LD = torch.randn(1, 9, self.width, generator=generator).to(parameter.device, parameter.dtype)
        rows_1LD = rows_1LD * self.added.rows_2D.std().to(parameter.dtype)
        segment_1L = torch.tensor([[0] * 4 + [1] * 5], device=parameter.device)
        position_1L = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=parameter.device)
        name = self.hf.config.model_type
        try:
            packed = self(rows_1LD, segment_1L, position_1L)[:, 4:]
            alone = self(rows_1LD[:, 4:], segment_1L[:, 4:], position_1L[:, 4:])
            own_scores = self.hf(inputs_embeds=rows_1LD[:, 4:], use_cache=False).logits
        except (TypeError, ValueError, RuntimeError) as e:
            reason = one_line(e)[:150]
            raise UserError(f"model.llm: {name} takes no packed rows ({reason}); choose another LLM") from e
        finally:
            self.train(training)
        tolerance = 1e-4 if parameter.dtype == torch.float32 else 5e-2
        for what, is_, should in (
            ("does not keep packed texts apart", packed, alone),
            ("has scores or a mask of its own kind", self.logits(alone), own_scores),
        ):
            difference = ((is_ - should).float().norm() / should.float().norm()).item()
            if not difference < tolerance:
                raise UserError(
                    f"model.llm: {name} {what} (difference {difference:.1e}); "
                    "choose an LLM with ordinary causal attention"
                )


def packed_mask(segment_nL: Tensor, dtype: torch.dtype) -> Tensor:
    """Block-diagonal causal mask n x 1 x L x L, added to the attention scores: 0 to see, the type's lowest to hide.

    Padding sees itself only, so that no row of the soft-max is empty. Additive and not bool: transformers' eager
    attention adds whatever it is given.
    """
    length = segment_nL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segment_nL.device).tril()
    same_nLL = (segment_nL[:, :, None] == segment_nL[:, None, :]) & causal_LL
    padding_nL = segment_nL < 0
    own_LL = torch.eye(length, dtype=torch.bool, device=segment_nL.device)
    same_nLL = torch.where(padding_nL[:, :, None], own_LL, same_nLL)
    mask_nLL = torch.zeros(same_nLL.shape, dtype=dtype, device=segment_nL.device)
    return mask_nLL.masked_fill(~same_nLL, torch.finfo(dtype).min)[:, None]


# --- building -------------------------------------------------------------------------------------------------------


def create_llm(config: LlmConfig, codec: TextCodec, load_weights: bool = True) -> Any:
    """The Hugging Face causal LM. A random one gets the tokenizer's rows and ids; a loaded one must have enough."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    vocab_size = codec.vocab_size
    if config.name and load_weights:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                config.name, attn_implementation=config.attention, dtype=torch.float32
            )
            # What an LLM's authors suggest for chat (a repetition penalty, a top_k) is not meant for captions, and is
            # not kept with the model.
            model.generation_config = GenerationConfig()
        except (OSError, ValueError, StrictDataclassError) as e:
            raise UserError(f"model.llm.name={config.name}: cannot be loaded ({_reason(e, config)})") from e
        refuse_unknown_settings(config.config, model.config)
        _refuse_contradictions(config, model.config.to_dict())
        if model.get_input_embeddings().num_embeddings < vocab_size:
            raise UserError(
                f"model.llm.name={config.name}: {model.get_input_embeddings().num_embeddings} embedding rows for a "
                f"tokenizer of {vocab_size} tokens; leave model.tokenizer.path empty to use the LLM's own"
            )
    else:
        settings = copy.deepcopy(config.config)
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise UserError("model.llm.config: model_type is missing, e.g. llama")
        settings["vocab_size"] = max(vocab_size, settings.get("vocab_size", 0))
        settings |= {"bos_token_id": codec.bos_id, "eos_token_id": codec.eos_id, "pad_token_id": None}
        try:
            hf_config = AutoConfig.for_model(model_type, **settings)
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=config.attention)
        except (ValueError, TypeError, KeyError, AssertionError, ImportError, StrictDataclassError) as e:
            raise UserError(f"model.llm.config: transformers cannot build it ({_reason(e, config)})") from e
        if load_weights:
            refuse_unknown_settings(config.config, model.config)
            if config.embedding_init is not None:
                nn.init.normal_(model.get_input_embeddings().weight, std=config.embedding_init)
            if config.average_init:
                start_as_average(model, config.average_init)
    if config.gradient_checkpointing:
        # Renamed within transformers 5; both names are in use.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


@torch.no_grad()
def start_as_average(model: Any, share: float) -> None:
    """Sets a random LLM so that each state begins as its own word plus an average of the words up to it.

    Values and attention outputs become identities times √share, so each layer adds `share` of what it sees, normed;
    queries and keys become identities times √SELF_ATTENTION, so a word sees itself first, and [EMB], whose own row
    starts at 0, all words evenly. The MLPs add nothing yet. After Trockman and Kolter (2023, "Mimetic Initialization
    of Self-Attention Layers"), who start both products near what trained weights have.
    """
    seen = set()
    for name, parameter in model.named_parameters():
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if parameter.ndim != 2 or parameter.shape[0] != parameter.shape[1]:
                raise UserError(
                    f"model.llm.average_init: {name} is {'x'.join(map(str, parameter.shape))}, not square; set "
                    "num_key_value_heads to num_attention_heads, and leave head_dim out"
                )
            factor = share if part in ("v_proj", "o_proj") else SELF_ATTENTION
            parameter.copy_(math.sqrt(factor) * torch.eye(len(parameter)))
        elif part == "down_proj":
            parameter.zero_()
        else:
            continue
        seen.add(part)
    missing = {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"} - seen
    if missing:
        raise UserError(
            f"model.llm.average_init: {model.config.model_type} has no {', '.join(sorted(missing))}; it is for LLMs of "
            "llama's layout, e.g. llama, stablelm, qwen2"
        )


def _reason(error: Exception, config: LlmConfig) -> str:
    text = one_line(error)
    if config.attention != "eager" and "attention implementation" in text:
        return f"it has no {config.attention} attention; set model.llm.attention to eager"
    return text[:250]


def refuse_unknown_settings(settings: dict[str, Any], hf_config: Any) -> None:
    """transformers keeps settings that an architecture does not know, and builds its default size without a word."""
    default = type(hf_config)()
    known = {*default.to_dict(), *vars(default), *default.attribute_map, *_OLDER_NAMES}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.llm.config.{key}: {hf_config.model_type} has no such setting{hint}")


def _refuse_contradictions(config: LlmConfig, loaded: dict[str, Any]) -> None:
    for key, value in config.config.items():
        if key in loaded and loaded[key] != value:
            raise UserError(
                f"model.llm.config.{key}={value}, but {config.name} has {loaded[key]}; correct it or leave it out"
            )
