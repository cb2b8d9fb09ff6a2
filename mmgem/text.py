"""From a text to token ids and back, the two streams of the method, and their packing into rows.

Receives texts and a Hugging Face tokenizer. Gives token ids; the embedding stream `[BOS] x1 … xn [EMB]` and the caption
stream `[BOS] V_in [CAP] x1 … xn [EOS]`, packed; and a tokenizer trained on given texts. Refuses a tokenizer without an
end-of-text token and a row too short for a stream. Shared by training and use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmgem.errors import UserError, one_line

EMB, CAP = "[EMB]", "[CAP]"


class TextCodec:
    """A tokenizer with the method's special tokens.

    `[EMB]` and `[CAP]` get the two ids after the tokenizer's last; their embedding rows are the model's own parameters.
    Texts are cut to `max_tokens`, before [EMB], which is never cut off.
    """

    def __init__(self, tokenizer: Any, max_tokens: int):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token, so captions could never end; "
                "choose another"
            )
        self.vocab_size = 1 + max(i for t, i in tokenizer.get_vocab().items() if t not in (EMB, CAP))
        tokenizer.add_special_tokens({"additional_special_tokens": [EMB, CAP]})
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.emb_id: int = tokenizer.convert_tokens_to_ids(EMB)
        self.cap_id: int = tokenizer.convert_tokens_to_ids(CAP)
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The texts' own ids, without special tokens, each at most `max_tokens`; and which were cut.

        A text that spells a special token, e.g. "[EMB]", is read as the letters it is made of.
        """
        if not texts:
            return [], []
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )["input_ids"]
        return [i[: self.max_tokens] for i in ids], [len(i) > self.max_tokens for i in ids]

    def embedding_stream(self, ids: Sequence[int]) -> list[int]:
        """[BOS] x1 … xn [EMB]; [BOS] where the tokenizer has one."""
        return [*self.prefix, *ids, self.emb_id]

    @property
    def prefix(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids up to the first [EOS] -> text."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


class PrefixTree:
    """The texts that may be written, as a tree of their ids: what may follow a beginning, and which text an end is.

    Texts of the same ids are one, under the first one's row. Texts over `max_tokens` are cut.
    """

    def __init__(self, codec: TextCodec, texts: Sequence[str]):
        if not texts:
            raise ValueError("no texts to choose from")
        self._eos = codec.eos_id
        self._root: dict[int, Any] = {}
        self._rows: dict[tuple[int, ...], int] = {}
        for row, ids in enumerate(codec.encode(texts)[0]):
            node = self._root
            for token in ids:
                node = node.setdefault(token, {})
            node[self._eos] = {}
            self._rows.setdefault(tuple(ids), row)
        self.longest = max(map(len, self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def following(self, ids: Sequence[int]) -> list[int]:
        """Which ids may stand next; after the end, and after what begins no text, only the end."""
        node = self._root
        for token in ids:
            node = node.get(token)
            if not node:
                return [self._eos]
        return list(node)

    def row(self, ids: Sequence[int]) -> int:
        """Of the text that these ids (up to the first end) are, or -1."""
        ids = list(ids)
        if self._eos not in ids:
            return -1
        return self._rows.get(tuple(ids[: ids.index(self._eos)]), -1)


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Any:
    """A byte-level BPE tokenizer (nothing is out of vocabulary) trained on the texts; same texts, same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC()] + ([normalizers.Lowercase()] if lowercase else [])
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    # The leading space makes a word one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[BOS]", "[EOS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer from a hub id or a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as e:
        raise UserError(f"tokenizer {source}: cannot be loaded ({one_line(e)[:200]})") from e


# --- packing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """The streams of M texts, K of which are written, in n rows of length L. Indices are flat, into the n * L tokens.

    Equal texts share one embedding stream. A stream that was not asked for has empty indices.
    """

    ids_nL: Tensor
    """Token ids; 0 at padding and where a visual token goes."""
    segment_nL: Tensor
    """The stream a token belongs to, -1 for padding."""
    position_nL: Tensor
    """Restarts at 0 with each stream."""
    emb_index_M: Tensor
    """Where each text's [EMB] stands."""
    written_K: Tensor
    """The texts (0 … M-1) that have a caption stream, ascending."""
    visual_index_K: Tensor
    """Where each of them has its V_in."""
    word_index_W: Tensor
    """The texts' own words in both streams (inputs, without [BOS], V_in, [CAP] and [EMB])."""
    label_index_T: Tensor
    """The positions that predict: from [CAP] to the last word."""
    labels_T: Tensor
    """What they predict: the words and [EOS]."""
    label_text_T: Tensor
    """The text (0 … M-1) each label belongs to."""

    def to(self, device: Any, non_blocking: bool = False) -> PackedTexts:
        return PackedTexts(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    @property
    def useful_tokens(self) -> int:
        return int((self.segment_nL >= 0).sum())


def pack_texts(
    texts: Sequence[Sequence[int]],
    codec: TextCodec,
    row_tokens: int,
    *,
    embed: bool = True,
    write: Sequence[bool] | None = None,
) -> PackedTexts:
    """Puts the streams of the texts (their own ids) into as few rows of `row_tokens` as best-fit decreasing finds.

    embed: the stream [BOS] x [EMB]. write: which texts get the stream [BOS] V_in [CAP] x [EOS], of which [EOS] is a
    label only; all of them if left out.
    """
    written = [m for m in range(len(texts)) if write is None or write[m]]
    equal: dict[tuple[int, ...], list[int]] = {}
    for m, ids in enumerate(texts):
        equal.setdefault(tuple(ids), []).append(m)
    # Each with the texts it is for, and its number among the caption streams, if it is one.
    streams: list[tuple[list[int], list[int], int | None]] = []
    if embed:
        streams += [(codec.embedding_stream(ids), numbers, None) for ids, numbers in equal.items()]
    streams += [([*codec.prefix, 0, codec.cap_id, *texts[m]], [m], k) for k, m in enumerate(written)]
    places, rows = _best_fit([len(s[0]) for s in streams], row_tokens)

    shape = (max(rows, 1), row_tokens)
    ids_nL = np.zeros(shape, dtype=np.int64)
    segment_nL = np.full(shape, -1, dtype=np.int64)
    position_nL = np.zeros(shape, dtype=np.int64)
    emb_index = np.zeros(len(texts) if embed else 0, dtype=np.int64)
    visual_index = np.zeros(len(written), dtype=np.int64)
    words: list[np.ndarray] = []
    label_index: list[np.ndarray] = []
    labels: list[int] = []
    label_text: list[np.ndarray] = []
    before = len(codec.prefix)
    for number, ((ids, numbers, k), (row, start)) in enumerate(zip(streams, places, strict=True)):
        end = start + len(ids)
        ids_nL[row, start:end] = ids
        segment_nL[row, start:end] = number
        position_nL[row, start:end] = np.arange(len(ids))
        flat = row * row_tokens + start
        if k is None:
            emb_index[numbers] = flat + len(ids) - 1
            words.append(np.arange(flat + before, flat + len(ids) - 1))
            continue
        visual_index[k] = flat + before
        words.append(np.arange(flat + before + 2, flat + len(ids)))
        label_index.append(np.arange(flat + before + 1, flat + len(ids)))
        labels += [*ids[before + 2 :], codec.eos_id]
        label_text.append(np.full(len(ids) - before - 1, numbers[0]))
    return PackedTexts(
        ids_nL=torch.from_numpy(ids_nL),
        segment_nL=torch.from_numpy(segment_nL),
        position_nL=torch.from_numpy(position_nL),
        emb_index_M=torch.from_numpy(emb_index),
        written_K=torch.tensor(written, dtype=torch.int64),
        visual_index_K=torch.from_numpy(visual_index),
        word_index_W=_joined(words),
        label_index_T=_joined(label_index),
        labels_T=torch.tensor(labels, dtype=torch.int64),
        label_text_T=_joined(label_text),
    )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)


def _best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Longest first, each into the fullest row that still takes it. Gives each one's (row, start), and the rows."""
    if lengths and max(lengths) > capacity:
        raise UserError(f"a stream of {max(lengths)} tokens does not fit a row of {capacity}; raise data.row_tokens")
    places = [(0, 0)] * len(lengths)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rows = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        room = next((r for r in range(length, capacity + 1) if rows_with_room[r]), None)
        if room is None:
            row, room = rows, capacity
            rows += 1
        else:
            row = rows_with_room[room].pop()
        places[item] = (row, capacity - room)
        rows_with_room[room - length].append(row)
    return places, rows
