"""A whole split through a model: the vectors of images, boxes, captions and phrases.

Receives a model (`Encoder`, what MMGem offers) and a dataset that gives sample i. Gives `Encoded`:
un-normalised float32 vectors on the CPU, with the texts and the keys they belong to. Every image
passes the vision tower once, for itself and for all of its boxes; every distinct text passes the
LLM once. A broken sample is skipped, counted and named; more of them than `max_broken` are refused
with a UserError, and so is a split without a single readable image. Several ranks share the batches (see `ranks`), and
each gets the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import compress
from math import ceil, floor
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mmgem.data.samples import Box, Sample, SampleError, decode_image
from mmgem.errors import UserError
from mmgem.progress import Progress
from mmgem.ranks import Ranks
from mmgem.text import PrefixTree

T = TypeVar("T")

MAX_BROKEN = 0.01
"""The share of samples that may be broken."""
_CROP_BATCH = 64


class Codec(Protocol):
    """The part of TextCodec that is used here."""

    def encode(self, texts: Sequence[str], /) -> tuple[list[list[int]], list[bool]]: ...


class Encoder(Protocol):
    """The part of MMGem that encoding and evaluation use. Vectors come un-normalised."""

    @property
    def codec(self) -> Codec: ...

    def sees(self, image: Image.Image, box: Box) -> bool: ...

    def image_vectors(self, images: Sequence[Image.Image], batch_size: int = ...) -> Tensor: ...

    def image_and_region_vectors(
        self,
        images: Sequence[Image.Image],
        boxes: Sequence[Sequence[Box]],
        batch_size: int = ...,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def text_vectors(self, texts: Sequence[str], batch_size: int = ...) -> Tensor: ...

    def log_likelihoods(
        self, vectors_NE: Tensor, texts: Sequence[str], vector_P: Tensor, text_P: Tensor, batch_size: int = ...
    ) -> tuple[Tensor, Tensor]: ...

    def prefix_tree(self, texts: Sequence[str]) -> PrefixTree: ...

    def choose(self, vectors_NE: Tensor, texts: PrefixTree, num_beams: int = ...) -> tuple[Tensor, Tensor]: ...

    def place_vectors(self, images: Sequence[Image.Image]) -> Tensor: ...

    def window(self, image: Image.Image) -> Box: ...

    def write(
        self,
        vectors_NE: Tensor,
        *,
        num_beams: int = ...,
        max_new_tokens: int = ...,
        length_penalty: float = ...,
        rerank: float = ...,
    ) -> list[str]: ...


class Readable(Protocol):
    """A picture that is read when it is asked for; raises SampleError."""

    def read(self) -> Image.Image: ...


class Dataset(Protocol):
    """The part of ShardedDataset that is used here."""

    @property
    def keys(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def sample(self, index: int, /) -> Sample: ...


@dataclass(slots=True)
class Encoded:
    """One split, encoded. N images, M captions, R regions (one a box and phrase), P phrases."""

    image_vectors_NE: Tensor
    keys: list[str]
    positions: list[int]
    """[N] where each image stands in the dataset: skipped samples leave gaps."""
    meta: list[dict[str, Any]]
    """[N] what else the data say of each image (`Sample.meta`)."""
    captions: list[list[str]]
    text_vectors_ME: Tensor
    """Captions, image after image; [0, E] if texts were not asked for."""
    text_image: Tensor
    """[M] the image (0 … N-1) of each caption."""
    text_cut_M: Tensor
    """Whether each caption was longer than the model's max_tokens, and cut."""
    region_vectors_RE: Tensor
    """Regions of equal box have equal rows; [0, E] if regions were not asked for."""
    region_image: Tensor
    """[R] the image of each region."""
    region_boxes: list[Box]
    region_phrases: list[str]
    region_entities: list[str | None]
    region_types: list[tuple[str, ...]]
    """What kind of thing each region is, where the data say it ("types" of a region); else ()."""
    phrases: list[str]
    """The distinct phrases, as the data write them."""
    phrase_vectors_PE: Tensor
    phrase_cut_P: Tensor
    """As `text_cut_M`."""
    picture: Callable[[int], Image.Image]
    """Image 0 … N-1, read again; the last few are kept."""
    crop_vectors_RE: Tensor | None = None
    """The image vector of each box cut out as a picture of its own; the baseline."""
    skipped: list[str] = field(default_factory=list)
    """One line for each broken sample: its key and the reason."""
    regions_unseen: int = 0
    """Regions left out because the model sees nothing of their box (`resize: crop`)."""

    @property
    def caption_texts(self) -> list[str]:
        """[M] the captions in one list, in the order of `text_vectors_ME`."""
        return [caption for captions in self.captions for caption in captions]


@dataclass(slots=True)
class _Loaded:
    """One batch from the disk: position, sample and picture of each readable sample."""

    items: list[tuple[int, Sample, Image.Image]]
    skipped: list[str]
    read: int


@dataclass(slots=True)
class _Part:
    """What one batch gives."""

    images: list[Tensor] = field(default_factory=list)
    regions: list[Tensor] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    regions_unseen: int = 0

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Part:
        """All of them as one."""
        whole = cls()
        for part in parts:
            for name in ("images", "regions", "crops", "positions", "samples", "skipped"):
                getattr(whole, name).extend(getattr(part, name))
            whole.regions_unseen += part.regions_unseen
        return whole


def encode_dataset(
    model: Encoder,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    progress: bool = True,
    texts: bool = True,
    regions: bool = True,
    crops: bool = False,
    max_broken: float = MAX_BROKEN,
    title: str = "encode",
    ranks: Ranks | None = None,
) -> Encoded:
    """Streams the split once and encodes it.

    texts: also the captions (without them only images). regions: also boxes and their phrases.
    crops: also each box's cut-out as an image of its own, one vision pass a distinct box.
    max_broken: the share of samples that may be broken (one always may). Raises UserError.
    """
    ranks = ranks or Ranks()
    parts: list[_Part] = []
    starts = range(0, len(dataset), batch_size)
    with _bar(title, len(dataset), "images", progress and ranks.first) as bar:
        for loaded in _batches(dataset, list(ranks.own(starts)), batch_size):
            part = _Part(skipped=loaded.skipped)
            parts.append(part)
            refuse_if_broken([line for p in parts for line in p.skipped], len(dataset), max_broken)
            if loaded.items:
                _encode_batch(model, loaded, part, regions, crops)
            if bar is not None:
                bar.advance(loaded.read * ranks.count)
    whole = _Part.of(ranks.joined(parts))
    refuse_if_broken(whole.skipped, len(dataset), max_broken)
    if not whole.samples:
        raise UserError(
            f"{title}: no readable image among {len(dataset)} samples"
            + (f", the first: {whole.skipped[0]}" if whole.skipped else "")
            + "; prepare the data again with `mmgem data prepare`"
        )
    return _assemble(model, dataset, whole, texts, regions, crops, progress, title, ranks)


def refuse_if_broken(skipped: Sequence[str], total: int, max_broken: float = MAX_BROKEN) -> None:
    """Raises UserError when more of `total` samples were skipped than the share; one always may be."""
    if len(skipped) > max(1.0, max_broken * total):
        raise UserError(
            f"{len(skipped)} of {total} samples are broken, more than the share of {max_broken:g} "
            f"that may be; the first: {skipped[0]}; prepare the data again with `mmgem data prepare`"
        )


def _batches(dataset: Dataset, starts: Sequence[int], batch_size: int) -> Iterator[_Loaded]:
    """Reads and decodes the next batch in a thread of its own while the model is at work."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = None
        for start in starts:
            following = pool.submit(_load, dataset, start, min(start + batch_size, len(dataset)))
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _load(dataset: Dataset, start: int, stop: int) -> _Loaded:
    loaded = _Loaded([], [], stop - start)
    for position in range(start, stop):
        try:
            sample = dataset.sample(position)
            loaded.items.append((position, sample, decode_image(sample)))
        except SampleError as error:
            loaded.skipped.append(str(error))
    return loaded


def _encode_batch(model: Encoder, loaded: _Loaded, part: _Part, regions: bool, crops: bool) -> None:
    """One vision pass for the images and their distinct boxes; boxes of several phrases once."""
    images = [image for _, _, image in loaded.items]
    samples = [_seen(model, sample, image) if regions else sample for _, sample, image in loaded.items]
    part.regions_unseen += sum(len(s.regions) for _, s, _ in loaded.items) - sum(len(s.regions) for s in samples)
    distinct = [list(dict.fromkeys(r.box for r in s.regions)) if regions else [] for s in samples]
    v_BE, r_RE = model.image_and_region_vectors(images, distinct, batch_size=len(images))
    part.images.append(_plain(v_BE))
    part.positions += [position for position, _, _ in loaded.items]
    part.samples += samples
    if not regions:
        return
    cut = [crop(image, box) for image, own in zip(images, distinct, strict=True) for box in own]
    cut_vectors = _plain(model.image_vectors(cut, batch_size=_CROP_BATCH)) if crops and cut else None
    done = 0
    for sample, boxes, vectors in zip(samples, distinct, r_RE, strict=True):
        rows = [boxes.index(region.box) for region in sample.regions]
        part.regions.append(_plain(vectors)[rows])
        if cut_vectors is not None:
            part.crops.append(cut_vectors[[done + row for row in rows]])
        done += len(boxes)


def _seen(model: Encoder, sample: Sample, image: Image.Image) -> Sample:
    """The sample without the regions of which the model sees nothing."""
    seen = [model.sees(image, region.box) for region in sample.regions]
    others = sample.meta.get("regions")
    meta = {**sample.meta, "regions": list(compress(others, seen))} if others else sample.meta
    return replace(sample, regions=tuple(compress(sample.regions, seen)), meta=meta)


def _types(sample: Sample) -> list[tuple[str, ...]]:
    """Of each region; a name alone is one type."""
    others = sample.meta.get("regions") or [{}] * len(sample.regions)
    found = [other.get("types", ()) for other in others]
    return [(types,) if isinstance(types, str) else tuple(map(str, types)) for types in found]


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The box cut out, its edges moved outwards to whole pixels."""
    x1, y1, x2, y2 = floor(box[0]), floor(box[1]), ceil(box[2]), ceil(box[3])
    return image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))


def _plain(x: Tensor) -> Tensor:
    """float32 on the CPU, free of graphs and of inference mode."""
    return x.detach().float().cpu().clone()


def _assemble(
    model: Encoder,
    dataset: Dataset,
    parts: _Part,
    texts: bool,
    regions: bool,
    crops: bool,
    progress: bool,
    title: str,
    ranks: Ranks,
) -> Encoded:
    captions = [list(sample.captions) for sample in parts.samples]
    owned = [(i, r) for i, s in enumerate(parts.samples) for r in s.regions] if regions else []
    flat = [caption for own in captions for caption in own] if texts else []
    phrases = list(dict.fromkeys(region.phrase for _, region in owned))
    distinct = list(dict.fromkeys([*flat, *phrases]))
    row = {text: i for i, text in enumerate(distinct)}
    image_NE = torch.cat(parts.images)
    _refuse_not_finite(image_NE, parts.samples, title)
    nothing = image_NE.new_zeros(0, image_NE.shape[1])
    vectors = embed_texts(model, distinct, progress=progress, title=title, ranks=ranks) if distinct else nothing
    cut = torch.tensor(model.codec.encode(distinct)[1], dtype=torch.bool)
    flat_rows, phrase_rows = (torch.tensor([row[t] for t in own], dtype=torch.int64) for own in (flat, phrases))
    counts = torch.tensor([len(own) for own in captions] if texts else [0] * len(captions))
    return Encoded(
        image_vectors_NE=image_NE,
        keys=[sample.key for sample in parts.samples],
        positions=parts.positions,
        meta=[sample.meta for sample in parts.samples],
        captions=captions,
        text_vectors_ME=vectors[flat_rows],
        text_image=torch.repeat_interleave(torch.arange(len(captions)), counts),
        text_cut_M=cut[flat_rows],
        region_vectors_RE=torch.cat([*parts.regions, nothing]),
        region_image=torch.tensor([i for i, _ in owned], dtype=torch.int64),
        region_boxes=[region.box for _, region in owned],
        region_phrases=[region.phrase for _, region in owned],
        region_entities=[region.entity for _, region in owned],
        region_types=[types for sample in parts.samples for types in _types(sample)] if regions else [],
        phrases=phrases,
        phrase_vectors_PE=vectors[phrase_rows],
        phrase_cut_P=cut[phrase_rows],
        picture=_reader(dataset, parts.positions),
        crop_vectors_RE=torch.cat([*parts.crops, nothing]) if crops and regions else None,
        skipped=parts.skipped,
        regions_unseen=parts.regions_unseen,
    )


def _refuse_not_finite(image_NE: Tensor, samples: list[Sample], title: str) -> None:
    bad = (~torch.isfinite(image_NE).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{title}: the model's vectors are not finite for {len(bad)} of {len(samples)} images, "
            f"the first is {samples[bad[0]].key}; its training has diverged, use an earlier "
            "checkpoint"
        )


def _reader(dataset: Dataset, positions: list[int]) -> Callable[[int], Image.Image]:
    @lru_cache(maxsize=64)
    def picture(row: int) -> Image.Image:
        return decode_image(dataset.sample(positions[row]))

    return picture


def embed_pictures(
    model: Encoder,
    pictures: Sequence[Readable],
    *,
    progress: bool = True,
    title: str = "pictures",
    ranks: Ranks | None = None,
    batch_size: int = 64,
    max_broken: float = MAX_BROKEN,
) -> tuple[Tensor, list[int], list[str]]:
    """[N, E] un-normalised vectors of the N readable pictures, which these are, and a line for each that was skipped.
    Raises UserError."""

    def work(numbers: range) -> tuple[list[Tensor], list[int], list[str]]:
        images, kept, skipped = [], [], []
        for number in numbers:
            try:
                images.append(pictures[number].read())
                kept.append(number)
            except SampleError as e:
                skipped.append(str(e))
        return [_plain(model.image_vectors(images, batch_size=batch_size))] if images else [], kept, skipped

    pieces = in_pieces(range(len(pictures)), work, title, progress, ranks, size=batch_size, unit="images")
    skipped = [line for _, _, own in pieces for line in own]
    kept = [number for _, own, _ in pieces for number in own]
    refuse_if_broken(skipped, len(pictures), max_broken)
    if not kept:
        raise UserError(f"{title}: no readable picture among {len(pictures)}, the first: {skipped[0]}")
    return torch.cat([vectors for own, _, _ in pieces for vectors in own]), kept, skipped


def embed_texts(
    model: Encoder,
    texts: Sequence[str],
    *,
    progress: bool = True,
    title: str = "encode",
    ranks: Ranks | None = None,
) -> Tensor:
    """[N, E] un-normalised vectors, in pieces so that progress can be shown, and ranks can share them."""
    # Short texts together: the model pads to the longest of a batch.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    shuffled = torch.cat(
        in_pieces([texts[i] for i in order], lambda piece: _plain(model.text_vectors(piece)), title, progress, ranks)
    )
    out = torch.empty_like(shuffled)
    out[torch.tensor(order)] = shuffled
    return out


def write_texts(
    model: Encoder,
    vectors_NE: Tensor,
    *,
    progress: bool = True,
    title: str = "write",
    ranks: Ranks | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes for each vector (un-normalised); options as for `MMGem.write`."""
    pieces = in_pieces(vectors_NE, lambda piece: model.write(piece, **options), title, progress, ranks)
    return [text for piece in pieces for text in piece]


def pair_likelihoods(
    model: Encoder,
    vectors_NE: Tensor,
    texts: Sequence[str],
    vector_P: Tensor,
    text_P: Tensor,
    *,
    progress: bool = True,
    title: str = "score",
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(text | vector) of P pairs, float32 [P], and the tokens of each text with its end, int64 [P]; as
    `MMGem.log_likelihoods`."""
    # Texts of about one length together, as the model wants them.
    length_T = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    order_P = torch.argsort(length_T[text_P], stable=True)

    def score(piece: Tensor) -> tuple[Tensor, Tensor]:
        used, at = torch.unique(text_P[piece], return_inverse=True)
        rows: list[int] = used.tolist()
        return model.log_likelihoods(vectors_NE, [texts[t] for t in rows], vector_P[piece], at)

    pieces = in_pieces(order_P, score, title, progress, ranks, size=1024, unit="pairs")
    log_p_P, tokens_P = torch.zeros(len(text_P)), torch.zeros(len(text_P), dtype=torch.int64)
    if pieces:
        log_p_P[order_P] = torch.cat([log_p for log_p, _ in pieces])
        tokens_P[order_P] = torch.cat([tokens for _, tokens in pieces])
    return log_p_P, tokens_P


def choose_texts(
    model: Encoder,
    vectors_NE: Tensor,
    texts: PrefixTree,
    *,
    num_beams: int = 5,
    progress: bool = True,
    title: str = "choose",
    ranks: Ranks | None = None,
) -> Tensor:
    """Rows of the texts that the model writes for each vector when it may write nothing else: [N, K], best first."""
    pieces = in_pieces(vectors_NE, lambda piece: model.choose(piece, texts, num_beams)[0], title, progress, ranks)
    return torch.cat(pieces)


def in_pieces(
    items: Any,
    work: Callable[[Any], T],
    title: str,
    progress: bool = True,
    ranks: Ranks | None = None,
    *,
    size: int = 256,
    unit: str = "texts",
) -> list[T]:
    """The work's results for each slice of the items, of which each rank does its own."""
    ranks = ranks or Ranks()
    own: list[T] = []
    with _bar(title, len(items), unit, progress and ranks.first) as bar:
        for start in ranks.own(range(0, len(items), size)):
            piece = items[start : start + size]
            own.append(work(piece))
            if bar is not None:
                bar.advance(len(piece) * ranks.count)
    return ranks.joined(own)


def _bar(title: str, total: int, unit: str, show: bool) -> AbstractContextManager[Progress | None]:
    return Progress(title, total, unit) if show else nullcontext()
