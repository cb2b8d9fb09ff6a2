"""A model of open_clip under `mmgem eval`: the same data, protocol, figures and report as for one of ours.

Receives an open_clip model with its evaluation transform and tokenizer, or their names. Gives an `Encoder`
(`mmgem.inference.encode`), e.g. for `mmgem.evaluation.run.evaluate({"ViT-B-32": encoder}, data, split, ["retrieval"],
out)`. Refuses, with a UserError, boxes and captioning: open_clip's models have one vector an image, and write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from mmgem.data.samples import Box
from mmgem.errors import UserError, one_line
from mmgem.text import PrefixTree

Tokenizer = Callable[..., Tensor]


class OpenClipCodec:
    """The part of `mmgem.text.TextCodec` that evaluation uses, over a tokenizer of open_clip."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        """As open_clip counts: with the tokens for start and end."""

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The padded ids of each text; and which texts were cut: with room for one more token they would use it."""
        if not texts:
            return [], []
        longer = self.tokenizer(["", *texts], context_length=self.max_tokens + 1)
        padding = longer[0, -1]
        return self.tokenizer(list(texts), context_length=self.max_tokens).tolist(), [
            bool(last != padding) for last in longer[1:, -1]
        ]


class OpenClipEncoder(nn.Module):
    """An open_clip model as an `Encoder`. Vectors are un-normalised, float32, on the CPU."""

    writes = False

    def __init__(self, model: nn.Module, preprocess: Callable[[Image.Image], Tensor], tokenizer: Tokenizer) -> None:
        """preprocess: the transform for evaluation, the third of `open_clip.create_model_and_transforms`."""
        super().__init__()
        self.clip: Any = model.eval()
        self.preprocess = preprocess
        context = getattr(model, "context_length", None) or getattr(tokenizer, "context_length", None)
        if not isinstance(context, int):
            raise UserError("the open_clip model and its tokenizer do not say how many tokens a text may have")
        self.codec = OpenClipCodec(tokenizer, context)

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @torch.inference_mode()
    def image_vectors(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """PIL pictures -> N x E."""
        parts = []
        for start in range(0, len(images), batch_size):
            pixels_B3HW = torch.stack([self.preprocess(image) for image in images[start : start + batch_size]])
            parts.append(self.clip.encode_image(pixels_B3HW.to(self.device)).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 0)

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Strings -> N x E."""
        parts = []
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            ids_BL = self.codec.tokenizer(chunk, context_length=self.codec.max_tokens)
            parts.append(self.clip.encode_text(ids_BL.to(self.device)).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 0)

    def image_and_region_vectors(
        self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]], batch_size: int = 64
    ) -> tuple[Tensor, list[Tensor]]:
        """As `image_vectors`, with nothing for the boxes. Raises UserError if there is one."""
        if any(boxes):
            _refuse("vectors of boxes", "evaluate it on retrieval")
        v_NE = self.image_vectors(images, batch_size)
        return v_NE, [v_NE.new_zeros(0, v_NE.shape[1]) for _ in images]

    def sees(self, image: Image.Image, box: Box) -> bool:
        _refuse("vectors of boxes", "evaluate it on retrieval")

    def write(
        self,
        vectors_NE: Tensor,
        *,
        num_beams: int = 1,
        max_new_tokens: int = 30,
        length_penalty: float = 1.0,
        rerank: float = 0.0,
    ) -> list[str]:
        _refuse("captions", "evaluate it on retrieval")

    def log_likelihoods(
        self, vectors_NE: Tensor, texts: Sequence[str], vector_P: Tensor, text_P: Tensor, batch_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        _refuse("likelihoods of texts", "evaluate it on retrieval or zero-shot")

    def prefix_tree(self, texts: Sequence[str]) -> PrefixTree:
        _refuse("captions", "evaluate it on retrieval or zero-shot")

    def choose(self, vectors_NE: Tensor, texts: PrefixTree, num_beams: int = 5) -> tuple[Tensor, Tensor]:
        _refuse("captions", "evaluate it on retrieval or zero-shot")

    def place_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        _refuse("vectors of places", "evaluate it on retrieval or zero-shot")

    def window(self, image: Image.Image) -> Box:
        _refuse("vectors of places", "evaluate it on retrieval or zero-shot")


def _refuse(what: str, instead: str) -> NoReturn:
    raise UserError(f"a model of open_clip gives no {what}; {instead}")


def load_open_clip(name: str, pretrained: str | None = None, device: str = "cpu") -> OpenClipEncoder:
    """name: a config of open_clip, or `local-dir:FOLDER`, `hf-hub:ORG/NAME`. pretrained: a file, a tag that
    open_clip downloads, or none for random weights. Raises UserError for unknown names and files that do not load.
    """
    import open_clip

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(f"open_clip model {name} ({pretrained}): cannot be loaded ({one_line(error)[:250]})") from error
    return OpenClipEncoder(model, preprocess, tokenizer)  # pyright: ignore[reportArgumentType]
