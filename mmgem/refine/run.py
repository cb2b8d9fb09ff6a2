"""`mmgem refine`: raw pairs → pairs to train on.

Receives a source, where to write, and settings. Gives a dataset, as `mmgem data prepare` writes them, in which each
sample says where its text and its picture come from; `refine.json` and `refine.html` with what became of everything;
and `OUT/.refine/`, by which a stopped run goes on and `mmgem refine thresholds` looks at other thresholds. Refuses,
with a UserError, a folder with work of other settings, and a source of which nothing passes. Nothing of the source
changes.

Ranks share the units; the first one then writes. The same source and settings give the same bytes, however many ranks
there were and how often they were stopped. What is finished is left as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgem import __version__
from mmgem.data.audit.hashes import hashes, near_pairs
from mmgem.data.prepare.reading import Record, safe_key
from mmgem.data.prepare.writing import prepare
from mmgem.errors import UserError
from mmgem.evaluation.result import write_json, write_text
from mmgem.progress import Progress
from mmgem.ranks import Ranks
from mmgem.refine.classify import make_classifier
from mmgem.refine.encoders import Tower, make_encoders
from mmgem.refine.folder import claim
from mmgem.refine.gate import Combine, Gate
from mmgem.refine.makers import make_captioner, make_painter
from mmgem.refine.page import render_page
from mmgem.refine.raw import Unit, units
from mmgem.refine.work import (
    CAPTIONED,
    DROPPED,
    FATES,
    REPAIRED,
    Rules,
    Shop,
    calibrate,
    do_unit,
    read_outcomes,
    unit_file,
)

FOLDER = ".refine"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the result depends on, beside the source. threshold: in standard deviations above wrong pairs. sure: the
    least probability that the captioner gives to the text that it writes; 0: any. duplicates:
    the least cosine of two pictures that look alike, to be one picture; above 1: duplicates are kept."""

    encoders: tuple[str, ...]
    combine: Combine = "min"
    threshold: float = 2.0
    captioner: str | None = None
    caption_prompt: str = ""
    sure: float = 0.0
    painter: str | None = None
    paint_prompt: str = ""
    duplicates: float = 0.95
    keep_texts: tuple[str, ...] = ()
    keep_pictures: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)


def refine(
    source: Path,
    out: Path,
    settings: Settings,
    *,
    split: str = "train",
    shard_size: int = 1000,
    overwrite: bool = False,
    device: str = "auto",
    labels: str | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Gives what refine.json has. labels: a field of the records that says which texts are right, for the page."""
    ranks = ranks or Ranks()
    found = units(source)
    work = out / FOLDER
    stated = {**asdict(settings), "source": str(source.resolve()), "mmgem": __version__}
    stated = json.loads(json.dumps(stated))  # as it will be read again
    finished = ranks.by_first(lambda: claim(work, stated, overwrite, out / split / "index.json", out / "refine.json"))
    if finished is not None:
        return finished
    left = [unit for unit in found if not unit_file(work, unit).is_file()]
    if left:
        shop = _open_shop(work, found, settings, device, ranks)
        with Progress("refine", len(found), "units") as progress:
            progress.advance(len(found) - len(left))
            for unit in ranks.own(left):
                do_unit(work, unit, shop)
                progress.advance(ranks.count)
    ranks.sums(1)  # all have finished
    result: dict[str, Any] = ranks.by_first(
        lambda: _finish(source, out, found, settings, split, shard_size, overwrite, labels, stated)
    )
    return result


def _open_shop(work: Path, found: Sequence[Unit], settings: Settings, device: str, ranks: Ranks) -> Shop:
    keep_texts = [make_classifier(name, "text") for name in settings.keep_texts]
    keep_pictures = [make_classifier(name, "picture") for name in settings.keep_pictures]
    encoders = make_encoders(settings.encoders, device)
    gate_file = work / "gate.json"

    def fit() -> None:
        if gate_file.is_file():
            return
        gate = calibrate(found, encoders, settings.combine, settings.threshold)
        for number, encoder in enumerate(encoders):
            if isinstance(encoder, Tower):
                np.savez(work / f"head{number}.npz", **encoder.state())  # pyright: ignore[reportArgumentType]
        write_json(gate_file, gate.to_json())

    ranks.by_first(fit)
    for number, encoder in enumerate(encoders):
        if isinstance(encoder, Tower):
            with np.load(work / f"head{number}.npz") as state:
                encoder.load(dict(state))
    captioner = make_captioner(settings.captioner, settings.caption_prompt, device) if settings.captioner else None
    painter = make_painter(settings.painter, settings.paint_prompt) if settings.painter else None
    gate = Gate.from_json(json.loads(gate_file.read_text(encoding="utf-8")))
    return Shop(encoders, gate, settings.rules, captioner, painter, settings.sure, keep_texts, keep_pictures)


# ----------------------------------------------------------------------------------------- after all units


def _finish(
    source: Path,
    out: Path,
    found: Sequence[Unit],
    settings: Settings,
    split: str,
    shard_size: int,
    overwrite: bool,
    labels: str | None,
    stated: dict[str, Any],
) -> dict[str, Any]:
    work = out / FOLDER
    again = _duplicates(work, found, settings.duplicates)
    fates: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for unit in found:
        for outcome in read_outcomes(unit_file(work, unit)):
            twice = f"{unit.name}/{outcome.key}" in again
            fates[DROPPED if twice else outcome.fate] += 1
            if twice or outcome.fate == DROPPED:
                reasons["duplicate" if twice else outcome.why] += 1
    result = {
        "source": str(source),
        "in": fates.total(),
        "out": fates.total() - fates[DROPPED],
        **{fate: fates[fate] for fate in FATES},
        "why": dict(reasons.most_common()),
        "gate": json.loads((work / "gate.json").read_text(encoding="utf-8")),
        "settings": stated,
    }
    write_json(out / "refine.json", result)
    write_text(out / "refine.html", render_page(result, found, work, labels))
    if not result["out"]:
        raise UserError(
            f"{source}: none of {result['in']} samples passes the gate; look at {out}/refine.html, lower --threshold"
        )
    plan = {"format": "refine", **stated, "split": split}
    prepare(
        lambda: _records(work, found, again, split), out, plan=plan, shard_size=shard_size, overwrite=overwrite,
        max_broken=0.0,
    )  # fmt: skip
    return result


def _records(work: Path, found: Sequence[Unit], again: set[str], split: str) -> Iterator[Record]:
    for unit in found:
        outcomes = {o.key: o for o in read_outcomes(unit_file(work, unit))}
        for raw in unit.read():
            own = outcomes[raw.key]
            if own.fate == DROPPED or f"{unit.name}/{raw.key}" in again:
                continue
            image = raw.image if not own.picture else (work / "pictures" / unit.name / own.picture).read_bytes()
            assert image is not None
            story: dict[str, Any] = {"fate": own.fate, "scores": own.scores, "cosines": own.cosines}
            story |= {"made_by": own.made_by} if own.made_by and own.fate != "kept" else {}
            story |= {"log_p": own.log_p} if own.fate in (REPAIRED, CAPTIONED) else {}
            story |= {"left_out": [list(one) for one in own.left if np.isfinite(one[1])]} if own.left else {}
            meta = {"captions": own.texts, **{k: v for k, v in own.meta.items() if k not in _SIZES}, "refine": story}
            yield Record(safe_key(f"{unit.name}/{raw.key}"), split, image, meta)


_SIZES = ("width", "height")


def _duplicates(work: Path, found: Sequence[Unit], cosine: float) -> set[str]:
    """UNIT/KEY of pictures that look like one before them, and whose vectors say so too."""
    if cosine > 1:
        return set()
    keys: list[str] = []
    thumbs, vectors = [], []
    for unit in found:
        keys += [f"{unit.name}/{o.key}" for o in read_outcomes(unit_file(work, unit)) if o.fate != DROPPED]
        with np.load(unit_file(work, unit).with_suffix(".npz")) as looks:
            if len(looks["thumbs"]):
                thumbs.append(looks["thumbs"])
                vectors.append(looks["vectors"])
    if len(keys) < 2:
        return set()
    thumbs_NC, vectors_NE = np.concatenate(thumbs), np.concatenate(vectors)
    pairs = [
        (int(max(i, j)), int(min(i, j)))
        for first, second, _ in near_pairs(hashes(thumbs_NC), thumbs_NC, np.arange(len(keys)))
        for i, j in zip(first, second, strict=True)
        if float(vectors_NE[i].astype(np.float32) @ vectors_NE[j].astype(np.float32)) >= cosine
    ]
    again: set[int] = set()
    for later, earlier in sorted(pairs):
        if earlier not in again:
            again.add(later)
    return {keys[n] for n in again}


def table(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"{'in':12}{result['in']:>9,}"]
    lines += [f"{fate:12}{result[fate]:>9,}" for fate in FATES]
    lines += [f"  {why:28}{count:>9,}" for why, count in result["why"].items()]
    return "\n".join([*lines, f"{'out':12}{result['out']:>9,}"])
