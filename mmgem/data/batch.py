"""Items of one micro-batch -> `Batch`, typed, with shapes.

Receives what the reader gave for each position: an `Item`, and before it the `Broken` ones whose place it took. Gives a
`Batch`, which names those. Refuses nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmgem.phrases import normalise_phrase
from mmgem.text import PackedTexts, TextCodec, pack_texts


@dataclass(frozen=True, slots=True)
class Item:
    """One sample as the model will see it."""

    key: str
    picture: Tensor
    """3 x S x S, or the frozen trunk's output."""
    captions: tuple[str, ...]
    boxes_R4: Tensor
    """Shares of the picture."""
    phrases: tuple[str, ...]
    entities: tuple[str, ...]
    """Equal for boxes of the sample that mean the same thing."""
    dropped: tuple[str, ...] = ()
    """What was wrong in its record and left out."""
    others: tuple[OtherText, ...] = ()
    made: tuple[Tensor, ...] = ()
    """The picture with its patches in another order, and then pictures that were drawn of `others`."""


@dataclass(frozen=True, slots=True)
class OtherText:
    """A text made of the sample's caption number `caption`, by the rule number `kind` of `mmgem.negatives.KINDS`."""

    caption: int
    text: str
    kind: int
    picture: int = -1
    """Which of the item's `made` was drawn of it; -1: none."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A sample whose place another one took, or, with `dropped`, a part of a sample that was left out of it."""

    key: str
    reason: str
    detail: str = ""
    shard: str | None = None
    """Set where the whole shard is at fault."""
    dropped: bool = False


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(slots=True)
class Batch:
    """B samples, M1 captions, R regions, X texts made of captions; M = M1 + R + X texts, in this order.

    The pictures are those of the samples, and then H that were made of these.
    """

    keys: list[str]
    pictures: Tensor
    texts: PackedTexts
    text_vector_M: Tensor
    """Which row of [pictures; regions] each text describes, or, of a negative, does not."""
    boxes_R4: Tensor
    region_image_R: Tensor
    image_id_B: Tensor
    caption_owner_M: Tensor
    """The image_id of each caption (length M1)."""
    caption_text_M: Tensor
    """Equal for equal captions."""
    entity_id_R: Tensor
    """Equal for boxes of one image that mean the same thing."""
    phrase_text_R: Tensor
    """Equal for phrases that evaluation takes for the same, too (`normalise_phrase`)."""
    texts_cut: int
    broken: list[Broken]
    embedded_texts: PackedTexts | None = None
    """The embedding streams alone, where vectors are computed once before the rest."""
    other_caption_X: Tensor = field(default_factory=_none)
    """Which caption (0 … M1-1) each was made of."""
    other_kind_X: Tensor = field(default_factory=_none)
    other_owner_X: Tensor = field(default_factory=_none)
    """The image_id of its picture where it is a positive, the one in `made_id_H` where a picture was drawn of it, and
    else an id that nothing has."""
    other_text_X: Tensor = field(default_factory=_none)
    """As `caption_text_M`."""
    other_picture_X: Tensor = field(default_factory=_none)
    """Which picture (0 … H-1 of those made) was drawn of it; -1: none."""
    made_id_H: Tensor = field(default_factory=_none)
    """Of the pictures that were made: that of the sample where they are positives, else an id of their own."""
    made_sample_H: Tensor = field(default_factory=_none)
    """Which sample (0 … B-1) each was made of."""

    @property
    def captions(self) -> int:
        return len(self.caption_owner_M)

    @property
    def samples(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        moved = {}
        for name in self.__slots__:
            value = getattr(self, name)
            moved[name] = value.to(device) if isinstance(value, (Tensor, PackedTexts)) else value
        return Batch(**moved)


class Share:
    """A rank's part of one step: at least one micro-batch.

    No dataclass: Lightning would look for tensors in one, and cast or move them.
    """

    def __init__(self, micros: list[Batch]):
        self.micros = micros

    @property
    def keys(self) -> list[str]:
        return [key for batch in self.micros for key in batch.keys]

    @property
    def broken(self) -> list[Broken]:
        return [one for batch in self.micros for one in batch.broken]

    @property
    def texts_cut(self) -> int:
        return sum(batch.texts_cut for batch in self.micros)

    @property
    def regions(self) -> int:
        return sum(len(batch.boxes_R4) for batch in self.micros)

    @property
    def made(self) -> int:
        """Pictures beside the samples' own."""
        return sum(len(batch.made_id_H) for batch in self.micros)


class Collate:
    """Items -> Batch. Which streams are packed (a loss of weight 0 needs none):

    `embed`: the embedding streams. `write_captions`: the captions' caption streams. `write_phrases`: those of at most
    so many phrases of each image, the first ones. `write_others`: those of the texts made of captions. `embed_first`:
    the embedding streams also alone. `order_robust`: texts and pictures made of others belong to the same image.
    """

    def __init__(
        self,
        codec: TextCodec,
        row_tokens: int,
        embed: bool = True,
        write_captions: bool = True,
        write_phrases: int = sys.maxsize,
        embed_first: bool = False,
        write_others: bool = False,
        order_robust: bool = False,
    ):
        self.codec = codec
        self.row_tokens = row_tokens
        self.embed = embed
        self.write_captions = write_captions
        self.write_phrases = write_phrases
        self.embed_first = embed_first
        self.write_others = write_others
        self.order_robust = order_robust

    def __call__(self, items: Sequence[Item | Broken]) -> Batch:
        broken = [i for i in items if isinstance(i, Broken)]
        good = [i for i in items if isinstance(i, Item)]
        broken += [Broken(item.key, reason, dropped=True) for item in good for reason in item.dropped]
        captions = [c for item in good for c in item.captions]
        phrases = [p for item in good for p in item.phrases]
        caption_image = [b for b, item in enumerate(good) for _ in item.captions]
        region_image = [b for b, item in enumerate(good) for _ in item.phrases]
        image_ids = [stable_id("image", item.key) for item in good]
        others = [(b, other) for b, item in enumerate(good) for other in item.others]
        made = [(b, picture) for b, item in enumerate(good) for picture in item.made]
        made_ids = [self._owner(image_ids[b], "made", good[b].key, str(n)) for n, (b, _) in enumerate(made)]
        first_caption = np.cumsum([0, *(len(item.captions) for item in good)]).tolist()
        first_made = np.cumsum([0, *(len(item.made) for item in good)]).tolist()
        ids, cut = self.codec.encode(captions + phrases + [other.text for _, other in others])
        write = [self.write_captions] * len(captions)
        write += [number < self.write_phrases for item in good for number in range(len(item.phrases))]
        write += [self.write_others] * len(others)
        alone = None
        if self.embed_first:
            alone = pack_texts(ids, self.codec, self.row_tokens, embed=self.embed, write=[False] * len(ids))
        return Batch(
            keys=[item.key for item in good],
            pictures=_stack([item.picture for item in good] + [picture for _, picture in made]),
            texts=pack_texts(ids, self.codec, self.row_tokens, embed=self.embed, write=write),
            text_vector_M=_long(
                [
                    *caption_image,
                    *range(len(good) + len(made), len(good) + len(made) + len(phrases)),
                    *(b for b, _ in others),
                ]
            ),
            boxes_R4=torch.cat([item.boxes_R4 for item in good]),
            region_image_R=_long(region_image),
            image_id_B=_long(image_ids),
            caption_owner_M=_long([image_ids[b] for b in caption_image]),
            caption_text_M=_long(list(map(_text_id, captions))),
            entity_id_R=_long([stable_id("entity", item.key, e) for item in good for e in item.entities]),
            phrase_text_R=_long([stable_id("text", normalise_phrase(p)) for p in phrases]),
            texts_cut=sum(cut),
            broken=broken,
            embedded_texts=alone,
            other_caption_X=_long([first_caption[b] + other.caption for b, other in others]),
            other_kind_X=_long([other.kind for _, other in others]),
            other_owner_X=_long(
                [
                    self._owner(image_ids[b], "negative", good[b].key, other.text)
                    if other.picture < 0
                    else made_ids[first_made[b] + other.picture]
                    for b, other in others
                ]
            ),
            other_text_X=_long([_text_id(other.text) for _, other in others]),
            other_picture_X=_long([-1 if other.picture < 0 else first_made[b] + other.picture for b, other in others]),
            made_id_H=_long(made_ids),
            made_sample_H=_long([b for b, _ in made]),
        )

    def _owner(self, image_id: int, *negative: str) -> int:
        return image_id if self.order_robust else stable_id(*negative)


def _stack(pictures: list[Tensor]) -> Tensor:
    # NumPy asks for huge pages where torch does not: a batch's memory is then there several times as fast.
    stacked = torch.from_numpy(np.empty((len(pictures), *pictures[0].shape), np.float32))
    return torch.stack(pictures, out=stacked)


def _long(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _text_id(caption: str) -> int:
    return stable_id("text", caption.strip().lower())


def stable_id(*parts: str) -> int:
    """The same 62-bit number for the same text in every process."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") >> 2
