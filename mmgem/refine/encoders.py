"""How near a picture and a text are, by encoders of different kinds.

    mmgem:MODEL                 a model of ours: both sides
    open_clip:NAME[:WEIGHTS]    a model of open_clip: both sides
    timm:NAME[?K=V&…][:WEIGHTS] a tower alone, with timm's settings, and the weights of a tag or a file. Its pooled
                                features are brought to the texts by a linear head, ridge regression on the source's own
                                pairs, most of which must be right. The texts' vectors are those of the first encoder
                                that has some

Receives such names. Gives `Encoder`s: vectors of pictures and of texts, whose cosine is the score. Refuses, with a
UserError, names of none of these forms, and a timm tower where no other encoder reads texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from mmgem.errors import UserError, one_line

RIDGE = 0.01
"""Of the features' mean variance: what is added to it in the regression."""


class Encoder(Protocol):
    """name: as the user gave it."""

    name: str

    def pictures(self, images: Sequence[Image.Image], keys: Sequence[str]) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> Tensor: ...


@dataclass
class Mmgem:
    name: str
    model: Any

    def pictures(self, images: Sequence[Image.Image], keys: Sequence[str]) -> Tensor:
        """N x E, each of length 1, as all here."""
        return self.model.embed_images(list(images))

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.embed_texts(list(texts))


@dataclass
class OpenClip:
    name: str
    model: Any
    preprocess: Any
    tokenizer: Any

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image], keys: Sequence[str]) -> Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(i) for i in images]), normalize=True).float()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)), normalize=True).float()


@dataclass
class Tower:
    """heads: two, each fitted on the half of the samples that the other is used for, so that no pair is judged by a
    head that has seen it."""

    name: str
    model: Any
    preprocess: Any
    reads: Encoder
    heads: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """N x (C + 1), the last one 1."""
        pooled_NC = self.model(torch.stack([self.preprocess(image) for image in images])).float()
        return F.pad(pooled_NC, (0, 1), value=1.0)

    def pictures(self, images: Sequence[Image.Image], keys: Sequence[str]) -> Tensor:
        assert self.heads is not None
        features = self.features(images)
        by_half = torch.stack([F.normalize(features @ head, dim=1) for head in self.heads])
        return by_half[torch.tensor([half_of(key) for key in keys]), torch.arange(len(keys))]

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.reads.texts(texts)

    def fit(self, features_NF: Tensor, texts_NE: Tensor, keys: Sequence[str]) -> None:
        """Head h is fitted on the other half. In float64, so that it is the same however the threads cut it up."""
        half_N = torch.tensor([half_of(key) for key in keys])
        if min(int((half_N == h).sum()) for h in (0, 1)) < 2:
            raise UserError(f"{self.name}: {len(keys)} pairs are too few to fit its head on")
        self.heads = (
            _ridge(features_NF[half_N == 1], texts_NE[half_N == 1]),
            _ridge(features_NF[half_N == 0], texts_NE[half_N == 0]),
        )

    def state(self) -> dict[str, np.ndarray]:
        assert self.heads is not None
        return {f"head{n}": head.numpy() for n, head in enumerate(self.heads)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.heads = (torch.from_numpy(state["head0"]), torch.from_numpy(state["head1"]))


def half_of(key: str) -> int:
    """0 or 1, by lot and for good."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] & 1


def _ridge(features_NF: Tensor, wanted_NE: Tensor) -> Tensor:
    x, y = features_NF.double(), wanted_NE.double()
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal()[:-1].mean() * torch.eye(len(gram), dtype=torch.float64)
    penalty[-1, -1] = 0  # the constant is free
    return torch.linalg.solve(gram + penalty, x.T @ y).float()


# --- by name ---------------------------------------------------------------------------------------------------------


def make_encoders(names: Sequence[str], device: str = "auto") -> list[Encoder]:
    """Raises UserError."""
    if not names:
        raise UserError("name an encoder with --encoder, e.g. mmgem:runs/quickstart")
    if len(set(names)) < len(names):
        raise UserError(f"--encoder: {next(n for n in names if list(names).count(n) > 1)} is named twice")
    made: list[Encoder] = []
    for name in sorted(names, key=lambda name: name.startswith("timm:")):
        kind, _, rest = name.partition(":")
        if kind not in _KINDS or not rest:
            raise UserError(f"--encoder {name}: give mmgem:MODEL, open_clip:NAME[:WEIGHTS] or timm:NAME[:WEIGHTS]")
        made.append(_KINDS[kind](name, rest, made, device))
    return [next(one for one in made if one.name == name) for name in names]


def _mmgem(name: str, rest: str, _: Sequence[Encoder], device: str) -> Encoder:
    from mmgem.inference.use import load_model

    if not Path(rest).exists():
        raise UserError(f"--encoder {name}: {rest}: no such model")
    return Mmgem(name, load_model(Path(rest), device))


def _open_clip(name: str, rest: str, _: Sequence[Encoder], device: str) -> Encoder:
    import open_clip

    # A folder of open_clip's is `local-dir:PATH`, which has a colon of its own.
    model_name, _sep, weights = (rest, "", "") if rest.startswith("local-dir:") else rest.partition(":")
    try:
        model, _train, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=weights or None)
        return OpenClip(name, model.eval(), preprocess, open_clip.get_tokenizer(model_name))
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"--encoder {name}: cannot be loaded ({one_line(e)[:200]})") from e


def _timm(name: str, rest: str, made: Sequence[Encoder], device: str) -> Encoder:
    import timm
    from timm.data import create_transform, resolve_model_data_config  # pyright: ignore[reportPrivateImportUsage]
    from timm.models import load_state_dict  # pyright: ignore[reportPrivateImportUsage]

    if not made:
        raise UserError(f"--encoder {name}: a tower reads no texts; name an mmgem or open_clip encoder beside it")
    described, _, weights = rest.partition(":")
    model_name, _, query = described.partition("?")
    try:
        given = {key: yaml.safe_load(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
        looks = {key: given.pop(key) for key in _LOOKS if key in given}
        torch.manual_seed(0)  # a random tower is the same one on each rank and in each run
        local = bool(weights) and Path(weights).is_file()
        tag = f".{weights}" if weights and not local else ""
        model: Any = timm.create_model(model_name + tag, pretrained=bool(tag), num_classes=0, **given)
        if local:
            state = load_state_dict(weights, use_ema=False)
            classifier = model.pretrained_cfg.get("classifier") or ()
            heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
            model.load_state_dict({k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))})
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        raise UserError(f"--encoder {name}: cannot be loaded ({one_line(e)[:200]})") from e
    transform = create_transform(**{**resolve_model_data_config(model), **looks}, is_training=False)
    return Tower(name, model.float().eval(), transform, made[0])


_LOOKS = ("mean", "std", "interpolation", "crop_pct")
"""Of timm's settings those that are of the pictures, and not of the model."""


_KINDS = {"mmgem": _mmgem, "open_clip": _open_clip, "timm": _timm}
