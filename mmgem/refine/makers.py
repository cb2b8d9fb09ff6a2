"""What makes the half that is missing: a text for a picture, a picture for a text.

    mmgem:MODEL             writes captions, with beams
    hf:NAME                 any image-to-text model of Hugging Face, by its name or folder
    scenes                  draws what a text in the words of the rendered scenes says
    diffusers:NAME          a text-to-image model (pip install 'mmgem[t2i]')

Receives such names. Gives `Captioner`s and `Painter`s. Refuses, with a UserError, names of none of these forms and
models that cannot be loaded. A text or a picture that comes out empty is given as none: the sample is then dropped, and
counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mmgem.errors import UserError, one_line


class Captioner(Protocol):
    name: str

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """A text each, "" for none."""
        ...


class Painter(Protocol):
    name: str

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]: ...


@dataclass
class MmgemCaptioner:
    name: str
    model: Any
    beams: int = 4

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        return [text.strip() for text in self.model.caption(list(images), num_beams=self.beams)]


@dataclass
class HuggingFaceCaptioner:
    """prompt: what the model is asked, where it takes one; as a user's turn, where it is made for conversations."""

    name: str
    model: Any
    processor: Any
    prompt: str = ""
    max_new_tokens: int = 40

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        import torch

        text = self.prompt
        if getattr(self.processor, "chat_template", None):
            content = [
                {"type": "image"},
                {"type": "text", "text": self.prompt or "Describe this picture in one sentence."},
            ]
            turns = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        asked: dict[str, Any] = {"text": [text] * len(images)} if text else {}
        inputs = self.processor(images=list(images), **asked, padding=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        # What a decoder alone is given comes back with what it writes.
        given = inputs["input_ids"] if "input_ids" in inputs else ids[:, :0]
        if torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]
        written = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.strip().removeprefix(self.prompt).split()) for text in written]


@dataclass
class ScenePainter:
    name: str = "scenes"
    seed: int = 0
    size: int = 112

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]:
        from mmgem.data.scene_from_text import scene_from_text

        return [scene_from_text(text, self.seed, size=self.size) for text in texts]


@dataclass
class DiffusersPainter:
    """prompt: put before each text. The same text gives the same picture."""

    name: str
    pipeline: Any
    prompt: str = ""

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]:
        import torch

        found: list[Image.Image | None] = []
        for text in texts:
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
            generator = torch.Generator(self.pipeline.device).manual_seed(seed)
            found.append(self.pipeline(f"{self.prompt}{text}", generator=generator).images[0])
        return found


# --- by name ---------------------------------------------------------------------------------------------------------


def make_captioner(name: str, prompt: str = "", device: str = "auto") -> Captioner:
    """Raises UserError."""
    kind, _, rest = name.partition(":")
    if kind == "mmgem" and rest:
        from mmgem.inference.use import load_model

        if not Path(rest).exists():
            raise UserError(f"--captioner {name}: {rest}: no such model")
        if prompt:
            raise UserError("--caption-prompt is for models of Hugging Face: mmgem's writes without one")
        return MmgemCaptioner(name, load_model(Path(rest), device))
    if kind == "hf" and rest:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            model = AutoModelForImageTextToText.from_pretrained(rest).eval()
            return HuggingFaceCaptioner(name, model, AutoProcessor.from_pretrained(rest), prompt)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
            raise UserError(f"--captioner {name}: cannot be loaded ({one_line(e)[:200]})") from e
    raise UserError(f"--captioner {name}: give mmgem:MODEL or hf:NAME")


def make_painter(name: str, prompt: str = "", seed: int = 0) -> Painter:
    """Raises UserError."""
    kind, _, rest = name.partition(":")
    if name == "scenes":
        return ScenePainter(seed=seed)
    if kind == "diffusers" and rest:
        try:
            from diffusers import AutoPipelineForText2Image  # pyright: ignore[reportMissingImports]

            made = AutoPipelineForText2Image.from_pretrained(rest)
        except ImportError as e:
            raise UserError(f"--painter {name}: diffusers is missing: pip install 'mmgem[t2i]'") from e
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise UserError(f"--painter {name}: cannot be loaded ({one_line(e)[:200]})") from e
        return DiffusersPainter(name, made, prompt)
    raise UserError(f"--painter {name}: give scenes or diffusers:NAME")
