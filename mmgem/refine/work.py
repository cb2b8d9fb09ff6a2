"""What becomes of each raw sample, a unit of the source at a time.

Receives the units, encoders, a gate, and what makes captions and pictures. Gives a line of JSON a sample in
`WORK/units/UNIT.jsonl`, and the pictures that were made in `WORK/pictures/UNIT/`. A unit's files appear whole or not at
all: what is there is not done again. Refuses, with a UserError, work of other settings in the same folder.

A sample's way: unreadable pictures, texts too short or too long, pictures too narrow and what the classifiers do not
keep are out; a pair's texts that the gate lets through stay; where it lets none through, the captioner writes one, and
the gate decides again; so it is with a picture without text, and, with the painter, with a text without picture.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgem.data.audit.hashes import thumbnail
from mmgem.data.samples import SampleError, decode_image, parse_sample
from mmgem.errors import UserError
from mmgem.evaluation.result import write_text
from mmgem.refine.classify import Classifier
from mmgem.refine.encoders import Encoder, Tower
from mmgem.refine.gate import Combine, Floats, Gate
from mmgem.refine.makers import Captioner, Painter
from mmgem.refine.raw import Raw, Unit

BATCH = 64
CALIBRATION = 2000
"""Pairs, of the first units, by which heads are fitted and wrong pairs known."""

KEPT, REPAIRED, CAPTIONED, PAINTED, DROPPED = "kept", "repaired", "captioned", "painted", "dropped"
TOO_LONG = "text too long"
FATES = (KEPT, REPAIRED, CAPTIONED, PAINTED, DROPPED)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is looked at before any model is asked. words: of a text. aspect: the longer side by the shorter. short: a
    text of more words is also kept short, as its first sentences; 0: not."""

    min_words: int = 2
    max_words: int = 80
    max_aspect: float = 4.0
    min_side: int = 16
    short: int = 0

    def text(self, text: str) -> str:
        """Why it is out, or "" """
        count = len(text.split())
        return "text too short" if count < self.min_words else TOO_LONG if count > self.max_words else ""

    def shortened(self, text: str) -> str:
        """The first sentences, or "" where the text is short or none of them is."""
        if not self.short or len(text.split()) <= self.short:
            return ""
        taken = ""
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            longer = f"{taken} {sentence}".strip()
            if len(longer.split()) > self.short:
                break
            taken = longer
        return taken

    def picture(self, image: Image.Image) -> str:
        small, large = sorted(image.size)
        if small < self.min_side:
            return "picture too small"
        return "picture too narrow" if large > self.max_aspect * small else ""


@dataclass(slots=True)
class Outcome:
    """What became of a sample. texts: those it goes on with. scores: of each, and `cosines` by encoder. left: texts of
    the source that were left out, with their scores. log_p: of what the captioner wrote, by itself. picture: "" where
    it is the source's own, else the file's name.
    """

    key: str
    fate: str
    why: str = ""
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    cosines: list[list[float]] = field(default_factory=list)
    left: list[tuple[str, float]] = field(default_factory=list)
    made_by: str = ""
    log_p: float | None = None
    picture: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Seen:
    """A picture, its thumbnail, and its vector by each encoder."""

    image: Image.Image
    thumb: NDArray[np.uint8]
    vectors: list[Tensor]


@dataclass(slots=True)
class Shop:
    """All that the work needs."""

    encoders: list[Encoder]
    gate: Gate
    rules: Rules
    captioner: Captioner | None = None
    painter: Painter | None = None
    sure: float = 0.0
    """The least probability of what the captioner writes."""
    keep_texts: Sequence[Classifier] = ()
    keep_pictures: Sequence[Classifier] = ()

    def texts_out(self, texts: Sequence[str]) -> dict[str, str]:
        """Why each text is out, or "": by the rules, and then by the classifiers."""
        why = {text: self.rules.text(text) for text in texts}
        for classifier in self.keep_texts:
            left = [text for text in why if not why[text]]
            why |= dict(zip(left, classifier.refusals(left), strict=True))
        return why

    def pictures_out(self, images: dict[str, Image.Image]) -> dict[str, str]:
        """By key, as `texts_out`."""
        why = {key: self.rules.picture(image) for key, image in images.items()}
        for classifier in self.keep_pictures:
            left = [key for key in why if not why[key]]
            why |= dict(zip(left, classifier.refusals([images[key] for key in left]), strict=True))
        return why

    def see(self, images: dict[str, Image.Image]) -> dict[str, Seen]:
        """By key. Each picture goes through each encoder once."""
        if not images:
            return {}
        keys, pictures = list(images), list(images.values())
        by_encoder = [encoder.pictures(pictures, keys) for encoder in self.encoders]
        return {
            key: Seen(image, thumbnail(image), [vectors[n] for vectors in by_encoder])
            for n, (key, image) in enumerate(images.items())
        }

    def cosines(self, seen: Sequence[Seen], texts: Sequence[str]) -> Floats:
        """[K, N] of N pictures, each with its text."""
        if not texts:
            return np.zeros((len(self.encoders), 0))
        distinct = list(dict.fromkeys(texts))
        at_N = [distinct.index(text) for text in texts]
        rows = []
        for number, encoder in enumerate(self.encoders):
            pictures_NE = torch.stack([one.vectors[number] for one in seen])
            rows.append((pictures_NE * encoder.texts(distinct)[at_N]).sum(dim=1).double().numpy())
        return np.stack(rows)


# --------------------------------------------------------------------------- wrong pairs, and the heads


def calibrate(units: Sequence[Unit], encoders: Sequence[Encoder], combine: Combine, threshold: float) -> Gate:
    """Fits the heads of towers, and sees what cosines wrong pairs have: each picture with the text of another one.

    The same on each rank and in each run: it reads the first units. Raises UserError.
    """
    keys, images, texts = [], [], []
    for raw in (raw for unit in units for raw in unit.read()):
        if raw.image is not None and raw.texts and (image := _opened(raw)) is not None:
            keys.append(raw.key)
            images.append(image)
            texts.append(raw.texts[0])
        if len(keys) == CALIBRATION:
            break
    if len(keys) < 8:
        raise UserError(
            f"the source has {len(keys)} readable pairs; the gate needs some, to see what wrong ones look like"
        )
    vectors = []
    for encoder in encoders:
        written = torch.cat([encoder.texts(texts[n : n + BATCH]) for n in range(0, len(texts), BATCH)])
        if isinstance(encoder, Tower) and encoder.heads is None:
            features = [encoder.features(images[n : n + BATCH]) for n in range(0, len(images), BATCH)]
            encoder.fit(torch.cat(features), written, keys)
        seen = [encoder.pictures(images[n : n + BATCH], keys[n : n + BATCH]) for n in range(0, len(images), BATCH)]
        vectors.append((torch.cat(seen), written))
    rng = np.random.default_rng(0)
    other_N = (np.arange(len(keys)) + rng.integers(1, len(keys), size=len(keys))) % len(keys)
    cosines = [(pictures * written[torch.from_numpy(other_N)]).sum(dim=1) for pictures, written in vectors]
    names = [encoder.name for encoder in encoders]
    return Gate.of_wrong_pairs(names, torch.stack(cosines).double().numpy(), combine, threshold)


# -------------------------------------------------------------------------------------------- one unit


def unit_file(work: Path, unit: Unit) -> Path:
    return work / "units" / f"{unit.name}.jsonl"


def do_unit(work: Path, unit: Unit, shop: Shop) -> int:
    """Writes the unit's files: outcomes, pictures that were made, and what duplicates are found by. Gives how many
    samples it had."""
    pictures = work / "pictures" / unit.name
    unfinished = work / "pictures" / f".{unit.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    outcomes: list[Outcome] = []
    thumbs: list[NDArray[np.uint8]] = []
    vectors: list[NDArray[np.float16]] = []
    for batch in _batches(unit.read()):
        done, seen = _do_batch(batch, shop, unfinished)
        outcomes += done
        for one in (seen[outcome.key] for outcome in done if outcome.fate != DROPPED):
            thumbs.append(one.thumb)
            vectors.append(one.vectors[0].numpy().astype(np.float16))
    if unfinished.is_dir():
        shutil.rmtree(pictures, ignore_errors=True)
        os.replace(unfinished, pictures)
    looks = unit_file(work, unit).with_suffix(".npz")
    looks.parent.mkdir(parents=True, exist_ok=True)
    half = looks.with_name(f".{looks.name}.unfinished.npz")
    nothing = np.zeros((0, 0))
    np.savez(half, thumbs=np.stack(thumbs) if thumbs else nothing, vectors=np.stack(vectors) if vectors else nothing)
    os.replace(half, looks)
    write_text(unit_file(work, unit), "".join(json.dumps(asdict(o), ensure_ascii=False) + "\n" for o in outcomes))
    return len(outcomes)


def read_outcomes(file: Path) -> Iterator[Outcome]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            content = json.loads(line)
            yield Outcome(**{**content, "left": [tuple(one) for one in content["left"]]})


def _batches(raws: Iterator[Raw]) -> Iterator[list[Raw]]:
    batch: list[Raw] = []
    for raw in raws:
        batch.append(raw)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _do_batch(batch: Sequence[Raw], shop: Shop, pictures: Path) -> tuple[list[Outcome], dict[str, Seen]]:
    """In the order of the batch; and what was seen of each that has a picture."""
    outcomes = {raw.key: Outcome(raw.key, DROPPED, meta=raw.meta) for raw in batch}
    images: dict[str, Image.Image] = {}
    asked: list[tuple[str, str]] = []  # (key, text), to be judged
    to_write: list[str] = []
    to_paint: list[tuple[str, str]] = []
    opened = {raw.key: image for raw in batch if raw.image is not None and (image := _opened(raw)) is not None}
    pictures_out = shop.pictures_out(opened)
    texts_out = shop.texts_out(list(dict.fromkeys(text for raw in batch for text in raw.texts)))
    for raw in batch:
        own = outcomes[raw.key]
        good: list[str] = []
        for text in dict.fromkeys(raw.texts):
            if why := texts_out[text]:
                own.why = own.why or why
                own.left.append((text, float("-inf")))
            else:
                good.append(text)
            if why in ("", TOO_LONG) and (short := shop.rules.shortened(text)):
                good.append(short)
        good = list(dict.fromkeys(good))
        if raw.image is None:
            own.why = "" if good else own.why
            to_paint += [(raw.key, good[0])] if good else []
            continue
        if raw.key not in opened:
            own.why = "picture unreadable"
        elif why := pictures_out[raw.key]:
            own.why = why
        else:
            images[raw.key], own.why = opened[raw.key], ""
            asked += [(raw.key, text) for text in good]
            to_write += [] if good else [raw.key]
    seen = shop.see(images)
    _judge(asked, seen, shop, outcomes, KEPT)
    had_text = {key for key, _ in asked}
    to_write += [key for key in dict.fromkeys(key for key, _ in asked) if outcomes[key].fate == DROPPED]
    _write(to_write, seen, shop, outcomes, had_text)
    seen |= _paint(to_paint, shop, outcomes, pictures)
    return list(outcomes.values()), seen


def _judge(
    pairs: Sequence[tuple[str, str]], seen: dict[str, Seen], shop: Shop, outcomes: dict[str, Outcome], fate: str
) -> None:
    """Each pair that passes is its sample's; the others are left."""
    cosines_KN = shop.cosines([seen[key] for key, _ in pairs], [text for _, text in pairs])
    scores_N = shop.gate.scores(cosines_KN) if pairs else np.zeros(0)
    for (key, text), score, cosines in zip(pairs, scores_N.tolist(), cosines_KN.T.tolist(), strict=True):
        own = outcomes[key]
        if score >= shop.gate.threshold:
            own.fate, own.why = fate, ""
            own.texts.append(text)
            own.scores.append(round(score, 4))
            own.cosines.append([round(cosine, 5) for cosine in cosines])
        else:
            own.left.append((text, round(score, 4)))


def _write(
    keys: Sequence[str], seen: dict[str, Seen], shop: Shop, outcomes: dict[str, Outcome], had_text: set[str]
) -> None:
    if shop.captioner is None:
        for key in keys:
            outcomes[key].why = "wrong pair" if key in had_text else "no text"
        return
    written = shop.captioner.captions([seen[key].image for key in keys]) if keys else []
    texts_out = shop.texts_out(list(dict.fromkeys(one.text for one in written if one.text)))
    for repaired in (True, False):
        fate = REPAIRED if repaired else CAPTIONED
        own = [(key, one) for key, one in zip(keys, written, strict=True) if (key in had_text) == repaired]
        for key, (text, log_p) in own:
            outcomes[key].made_by, outcomes[key].log_p = shop.captioner.name, round(log_p, 4)
            already = {left for left, _ in outcomes[key].left}
            if text in already:
                outcomes[key].why = "captioner wrote the same text"
            elif text and not texts_out[text] and shop.sure and log_p < math.log(shop.sure):
                outcomes[key].why = "captioner was not sure"
            else:
                outcomes[key].why = texts_out[text] if text else "captioner wrote nothing"
        pairs = [(key, one.text) for key, one in own if not outcomes[key].why]
        _judge(pairs, seen, shop, outcomes, fate)
        for key, _ in pairs:
            if outcomes[key].fate == DROPPED:
                outcomes[key].why = "written text does not fit"


def _paint(pairs: Sequence[tuple[str, str]], shop: Shop, outcomes: dict[str, Outcome], folder: Path) -> dict[str, Seen]:
    """Gives what was painted."""
    if shop.painter is None:
        for key, _ in pairs:
            outcomes[key].why = "no picture"
        return {}
    painted = shop.painter.pictures([text for _, text in pairs]) if pairs else []
    images = {key: image for (key, _), image in zip(pairs, painted, strict=True) if image is not None}
    why = shop.pictures_out(images)
    seen = shop.see({key: image for key, image in images.items() if not why[key]})
    for key, _ in pairs:
        outcomes[key].made_by = shop.painter.name
        outcomes[key].why = why.get(key, "painter drew nothing")
    _judge([pair for pair in pairs if pair[0] in seen], seen, shop, outcomes, PAINTED)
    for key, one in seen.items():
        own = outcomes[key]
        if own.fate == DROPPED:
            own.why = "drawn picture does not fit"
            continue
        own.picture = hashlib.blake2b(key.encode(), digest_size=8).hexdigest() + ".png"
        folder.mkdir(parents=True, exist_ok=True)
        one.image.save(folder / own.picture, "PNG")
    return seen


# ---------------------------------------------------------------------------------------------- pieces


def _opened(raw: Raw) -> Image.Image | None:
    assert raw.image is not None
    try:
        return decode_image(parse_sample(raw.key, raw.image, {"captions": ["-"]}))
    except SampleError:
        return None
