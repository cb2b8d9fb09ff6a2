"""`mmgem refine negatives`: hard negatives of every caption, made once and kept with the samples.

    rules          those of `mmgem.negatives`, at no cost
    hf:NAME        a language model of Hugging Face, by its name or folder, is asked to change one thing of a caption

Receives a prepared split and makers. Gives the same split with `"negatives": [{"text", "kind", "caption"}]` in each
record, for `stages.N.negatives.source: data`; with a painter also a `"picture"` of each, for `negatives.drawn`. Those
that a record has already stay. With `benchmark` also `OUT/composition/made/`, the new ones in SugarCrepe's layout, a
file a kind, for `mmgem eval composition`. Refuses, with a UserError, a split without captions, makers and kinds that
are none, and makers that make nothing at all.

A negative that reads worse than its caption gives itself away. So what a language model writes is kept only where the
model itself finds it at most `margin` less likely (mean log p of a token) than the caption.

Work is done some samples at a time and kept in `OUT/.negatives/`; a stopped run goes on, and ranks share it.
"""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Protocol

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from mmgem import __version__
from mmgem.data.prepare.reading import Record
from mmgem.data.prepare.shard import JPEG_QUALITY
from mmgem.data.prepare.writing import prepare
from mmgem.data.samples import SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.data.writer import image_extension
from mmgem.errors import UserError, one_line
from mmgem.evaluation.result import write_json, write_text
from mmgem.negatives import KINDS, Negative, negatives_of, words_of
from mmgem.progress import Progress
from mmgem.ranks import Ranks
from mmgem.refine.folder import claim
from mmgem.refine.makers import Painter, make_painter

FOLDER = ".negatives"
BENCHMARK = "composition/made"
PART = 500
PROMPT = (
    "Change the {kind} in this caption so that it is no longer true, and nothing else. Keep its length and its style. "
    "Answer with the new caption alone.\nCaption: {caption}\nNew caption:"
)
CHANGES = ("colour", "count", "position", "verb", "object", "negation")
"""What a language model is asked to change."""


class Maker(Protocol):
    name: str

    def make(self, captions: Sequence[str], rng: Random) -> dict[int, list[Negative]]:
        """captions: all of one picture. Gives the negatives by the number of the caption."""
        ...


@dataclass
class Rules:
    kinds: Sequence[str]
    count: int
    frequency: Mapping[str, int]
    name: str = "rules"

    def make(self, captions: Sequence[str], rng: Random) -> dict[int, list[Negative]]:
        return {
            n: negatives_of(caption, self.kinds, rng, self.count, captions, self.frequency)
            for n, caption in enumerate(captions)
        }


@dataclass
class LanguageModel:
    """prompt: has {kind} and {caption}. margin: in mean log p of a token."""

    name: str
    model: Any
    tokenizer: Any
    kinds: Sequence[str]
    count: int
    prompt: str = PROMPT
    margin: float = 0.5

    def make(self, captions: Sequence[str], rng: Random) -> dict[int, list[Negative]]:
        asked = [
            (n, kind)
            for n in range(len(captions))
            for kind in rng.sample(list(self.kinds), min(self.count, len(self.kinds)))
        ]
        written = self._written([self.prompt.format(kind=kind, caption=captions[n]) for n, kind in asked])
        likely = self.log_likelihoods([*captions, *written])
        found: dict[int, list[Negative]] = {}
        for (n, kind), text, log_p in zip(asked, written, likely[len(captions) :], strict=True):
            if text and log_p >= likely[n] - self.margin:
                found.setdefault(n, []).append(Negative(text, kind))
        return found

    def _written(self, prompts: Sequence[str]) -> list[str]:
        """The first line of each answer, greedily."""
        import torch

        if getattr(self.tokenizer, "chat_template", None):
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, max_new_tokens=60, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join((answer.strip().splitlines() or [""])[0].strip(' "').split()) for answer in answers]

    def log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Mean log p of a token after the first, of each text; −inf for an empty one."""
        import torch

        out = []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt").to(self.model.device)["input_ids"]
            if ids.shape[1] < 2:
                out.append(float("-inf"))
                continue
            with torch.inference_mode():
                out.append(-float(self.model(input_ids=ids, labels=ids).loss))
        return out


def make_maker(
    name: str, kinds: Sequence[str], count: int, prompt: str, margin: float, frequency: Mapping[str, int]
) -> Maker:
    """Raises UserError."""
    if name == "rules":
        chosen = list(kinds) or [kind for kind in KINDS if kind != "shuffle"]
        if unknown := [kind for kind in chosen if kind not in KINDS]:
            raise UserError(f"--kinds: no rule makes {', '.join(unknown)}; the kinds are {', '.join(KINDS)}")
        return Rules(chosen, count, frequency)
    if not name.startswith("hf:") or not name[3:]:
        raise UserError(f"--maker {name}: give rules or hf:NAME")
    asked = prompt or PROMPT
    if "{caption}" not in asked:
        raise UserError("--prompt: it needs {caption}, where the caption goes, and may have {kind}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name[3:]).eval()
        tokenizer = AutoTokenizer.from_pretrained(name[3:], padding_side="left")
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise UserError(f"--maker {name}: cannot be loaded ({one_line(e)[:200]})") from e
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return LanguageModel(name, model, tokenizer, list(kinds) or CHANGES, count, asked, margin)


# ------------------------------------------------------------------------------------------- the work


def add_negatives(
    data: Path,
    out: Path,
    split: str,
    *,
    makers: Sequence[str] = ("rules",),
    kinds: Sequence[str] = (),
    count: int = 3,
    prompt: str = "",
    margin: float = 0.5,
    painter: str | None = None,
    paint_prompt: str = "",
    benchmark: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """count: of each caption, by each maker. Gives what `OUT/negatives.json` has: how many of each kind, and how many
    were drawn."""
    if count < 1:
        raise UserError(f"--count {count}: at least 1")
    ranks = ranks or Ranks()
    dataset = ShardedDataset(data / split)
    if not dataset.has_captions:
        raise UserError(f"{data}/{split} has no captions to make negatives of")
    stated = {"data": str(data.resolve()), "split": split, "makers": list(makers), "kinds": list(kinds), "count": count}
    stated |= {"prompt": prompt, "margin": margin, "painter": painter, "paint_prompt": paint_prompt}
    stated |= {"benchmark": benchmark, "seed": seed, "mmgem": __version__}
    work = out / FOLDER
    finished = ranks.by_first(
        lambda: claim(work, stated, overwrite, out / split / "index.json", out / "negatives.json")
    )
    if finished is not None:
        return finished
    parts = list(range(0, len(dataset), PART))
    left = [start for start in parts if not _file(work, start).is_file()]
    if left:
        frequency = words_of(text for n in range(min(len(dataset), PART)) for text in dataset.captions(n))
        shop = [make_maker(name, kinds, count, prompt, margin, frequency) for name in makers]
        draws = make_painter(painter, paint_prompt, seed) if painter else None
        with Progress("negatives", len(dataset), "samples") as progress:
            progress.advance(PART * (len(parts) - len(left)))
            for start in ranks.own(left):
                _do_part(work, dataset, range(start, min(start + PART, len(dataset))), shop, draws, seed)
                progress.advance(min(PART, len(dataset) - start) * ranks.count)
    ranks.sums(1)  # all have finished
    found: dict[str, Any] = ranks.by_first(lambda: _finish(out, dataset, parts, split, stated, overwrite))
    return found


def _file(work: Path, start: int) -> Path:
    return work / f"{start:09d}.jsonl"


def _do_part(
    work: Path, dataset: ShardedDataset, samples: range, shop: Sequence[Maker], painter: Painter | None, seed: int
) -> None:
    lines = []
    for number in samples:
        captions = dataset.captions(number)
        true = {caption.strip().lower() for caption in captions}
        made: list[dict[str, Any]] = []
        for maker in shop:
            rng = Random(f"mmgem-negatives-1/{seed}/{maker.name}/{dataset.key(number)}")
            for caption, some in sorted(maker.make(captions, rng).items()):
                for one in some:
                    if one.text.strip().lower() not in true and one.text not in {other["text"] for other in made}:
                        made.append({"text": one.text, "kind": one.kind, "caption": caption, "by": maker.name})
        if painter is not None and made:
            _draw(made, painter, dataset, number)
        lines.append(json.dumps(made, ensure_ascii=False) + "\n")
    write_text(_file(work, samples.start), "".join(lines))


def _draw(made: list[dict[str, Any]], painter: Painter, dataset: ShardedDataset, number: int) -> None:
    """A picture of each, kept as the sample's own is, so that its traces do not give it away."""
    try:
        sample = dataset.sample(number)
    except SampleError:
        return
    captions = [sample.captions[one["caption"]] for one in made]
    pictures = painter.edits(sample, captions, [one["text"] for one in made])
    for one, drawn in zip(made, pictures, strict=True):
        if drawn is not None:
            one |= {"picture": b64encode(_kept_like(sample.image, drawn)).decode(), "drawn_by": painter.name}


def _kept_like(content: bytes, picture: Image.Image) -> bytes:
    """The bytes of a picture file, in the form of another, of a JPEG's quality and subsampling, too."""
    file = BytesIO()
    with Image.open(BytesIO(content)) as model:
        if isinstance(model, JpegImageFile):
            settings = {"qtables": model.quantization, "subsampling": get_sampling(model)}
            picture.convert("RGB").save(file, "JPEG", **settings)
        elif model.format == "PNG":
            picture.save(file, "PNG")
        else:
            picture.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _finish(
    out: Path, dataset: ShardedDataset, parts: Sequence[int], split: str, stated: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    work = out / FOLDER
    kinds = Counter(one["kind"] for made in _made(work, parts) for one in made)
    if not kinds:
        raise UserError(f"nothing was made of the captions of {stated['data']}/{split}: choose other makers or kinds")
    result = {
        "samples": len(dataset),
        "negatives": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "drawn": sum("picture" in one for made in _made(work, parts) for one in made),
        "settings": stated,
    }
    if stated["painter"] and not result["drawn"]:
        raise UserError(f"--painter {stated['painter']}: of {result['negatives']} negatives it drew none")
    write_json(out / "negatives.json", result)
    if stated["benchmark"]:
        _write_benchmark(out / BENCHMARK, dataset, _made(work, parts))
    prepare(
        lambda: _records(dataset, _made(work, parts), split),
        out,
        plan={"format": "negatives", **stated},
        overwrite=overwrite,
        max_broken=0.0,
    )
    return result


def _write_benchmark(folder: Path, dataset: ShardedDataset, made: Iterator[list[dict[str, Any]]]) -> None:
    """SugarCrepe's layout: KIND.json, {number: {filename, caption, negative_caption}}, and images/. Whole or not."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "images").mkdir(parents=True)
    items: dict[str, dict[str, dict[str, str]]] = {}
    for number, negatives in enumerate(made):
        try:
            sample = dataset.sample(number) if negatives else None
        except SampleError:
            continue
        if sample is None:
            continue
        name = f"{number:08d}.{image_extension(sample.image)}"
        (unfinished / "images" / name).write_bytes(sample.image)
        for one in negatives:
            of_kind = items.setdefault(one["kind"], {})
            texts = {"caption": sample.captions[one["caption"]], "negative_caption": one["text"]}
            of_kind[str(len(of_kind))] = {"filename": name, **texts}
    for kind, of_kind in items.items():
        (unfinished / f"{kind}.json").write_text(json.dumps(of_kind, ensure_ascii=False, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def _made(work: Path, parts: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Of each sample, in the order of the split."""
    for start in parts:
        with _file(work, start).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _records(dataset: ShardedDataset, made: Iterator[list[dict[str, Any]]], split: str) -> Iterator[Record]:
    for number, negatives in enumerate(made):
        try:
            sample = dataset.sample(number)
        except SampleError:
            continue
        regions = [
            {"box": list(region.box), "phrase": region.phrase} | ({"entity": region.entity} if region.entity else {})
            for region in sample.regions
        ]
        others = sample.meta.get("regions") or [{}] * len(regions)
        meta = {key: value for key, value in sample.meta.items() if key != "regions"}
        meta |= {"captions": list(sample.captions), "width": sample.width, "height": sample.height}
        meta |= {"regions": [{**own, **more} for own, more in zip(regions, others, strict=True)]} if regions else {}
        yield Record(sample.key, split, sample.image, {**meta, "negatives": _added(meta.get("negatives"), negatives)})


def _added(before: Any, made: list[dict[str, Any]]) -> list[Any]:
    """What a sample has already, and what it has not."""
    kept = list(before) if isinstance(before, list) else []
    # A list: what others wrote there may be nothing that can be hashed.
    known = [(one.get("caption", 0), one.get("text")) for one in kept if isinstance(one, dict)]
    return kept + [one for one in made if (one["caption"], one["text"]) not in known]
