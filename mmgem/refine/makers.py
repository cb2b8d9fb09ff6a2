"""What makes the half that is missing: a text for a picture, a picture for a text.

    mmgem:MODEL             writes captions, with beams
    hf:NAME                 any image-to-text model of Hugging Face, by its name or folder
    scenes                  draws what a text in the words of the rendered scenes says
    diffusers:NAME          a text-to-image model (pip install 'mmgem[t2i]')

Receives such names. Gives `Captioner`s and `Painter`s. A captioner also says how probable its text is, given the
picture: an encoder that is the same model, or has learned from the same pairs, finds nearly all that it writes fitting,
whether it is true or not, and its own doubt tells more. Refuses, with a UserError, names of none of these forms and
models that cannot be loaded. A text or a picture that comes out empty is given as none: the sample is then dropped, and
counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from mmgem.data.samples import Sample
from mmgem.errors import UserError, one_line


class Written(NamedTuple):
    """text: "" for none. log_p: of the whole text and its end, given the picture."""

    text: str
    log_p: float


class Captioner(Protocol):
    name: str

    def captions(self, images: Sequence[Image.Image]) -> list[Written]:
        """A text each."""
        ...


class Painter(Protocol):
    name: str

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]: ...

    def edits(self, sample: Sample, captions: Sequence[str], texts: Sequence[str]) -> list[Image.Image | None]:
        """The picture of a sample, by its record, as each text has it, which is made of a caption of the picture."""
        ...


@dataclass
class MmgemCaptioner:
    name: str
    model: Any
    beams: int = 4

    def captions(self, images: Sequence[Image.Image]) -> list[Written]:
        """The most probable of its beams, of whatever length: a word more is one more that may be wrong."""
        import torch

        vectors_NE, most = self.model.image_vectors(list(images)), self.model.config.max_tokens
        texts = self.model.write(vectors_NE, num_beams=self.beams, length_penalty=0.0, max_new_tokens=most)
        texts = [" ".join(text.split()) for text in texts]
        own_N = torch.arange(len(texts))
        return list(map(Written, texts, self.model.log_likelihoods(vectors_NE, texts, own_N, own_N)[0].tolist()))


@dataclass
class HuggingFaceCaptioner:
    """prompt: what the model is asked, where it takes one; as a user's turn, where it is made for conversations."""

    name: str
    model: Any
    processor: Any
    prompt: str = ""
    max_new_tokens: int = 40

    def captions(self, images: Sequence[Image.Image]) -> list[Written]:
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
            out = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences
        log_p_NT = torch.stack(out.logits, dim=1).float().log_softmax(dim=-1)
        new_NT = ids[:, ids.shape[1] - log_p_NT.shape[1] :]
        # What comes after the end is padding, of which the model thinks nothing.
        is_end_NT = torch.isin(new_NT, torch.tensor(self._ends, device=new_NT.device)).long()
        counts_NT = is_end_NT.cumsum(dim=1) == is_end_NT
        sums_N = (log_p_NT.gather(2, new_NT[..., None])[..., 0] * counts_NT).sum(dim=1)
        # What a decoder alone is given comes back with what it writes.
        given = inputs["input_ids"] if "input_ids" in inputs else ids[:, :0]
        if torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]
        written = self.processor.batch_decode(ids, skip_special_tokens=True)
        texts = [" ".join(text.strip().removeprefix(self.prompt).split()) for text in written]
        return list(map(Written, texts, sums_N.tolist()))

    @property
    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@dataclass
class ScenePainter:
    name: str = "scenes"
    seed: int = 0
    size: int = 112

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]:
        from mmgem.data.scene_from_text import scene_from_text

        return [scene_from_text(text, self.seed, size=self.size) for text in texts]

    def edits(self, sample: Sample, captions: Sequence[str], texts: Sequence[str]) -> list[Image.Image | None]:
        """Of a rendered scene the same with what differs changed (`edited_scene`); else drawn anew."""
        from mmgem.data.scene_edit import edited_scene

        match sample.meta.get("scene"):
            case {"seed": int(seed), "split": str(split), "index": int(index)}:
                both, size = zip(captions, texts, strict=True), sample.width
                return [edited_scene(seed, split, index, caption, text, size=size) for caption, text in both]
            case _:
                return self.pictures(texts)


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

    def edits(self, sample: Sample, captions: Sequence[str], texts: Sequence[str]) -> list[Image.Image | None]:
        """Drawn anew: the model takes no picture."""
        return self.pictures(texts)


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
