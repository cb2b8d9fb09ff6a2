"""Tokens, the two streams, and packing: nothing lost, nothing mixed, rows full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TEXTS, codec, tokenizer

from mmgem.errors import UserError
from mmgem.text import PackedTexts, TextCodec, load_tokenizer, pack_texts, train_tokenizer

# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_added_tokens_stand_after_the_vocabulary():
    tokens = tokenizer()
    size = len(tokens)
    texts = TextCodec(tokens, 8)
    assert texts.vocab_size == size
    assert (texts.emb_id, texts.cap_id) == (size, size + 1)
    assert texts.bos_id is not None and {texts.bos_id, texts.eos_id} < set(range(size))


def test_a_second_codec_and_a_saved_tokenizer_have_the_same_ids(tmp_path: Path):
    first = codec()
    first.tokenizer.save_pretrained(tmp_path)
    for tokens in (first.tokenizer, load_tokenizer(tmp_path)):
        again = TextCodec(tokens, 16)
        for name in ("vocab_size", "emb_id", "cap_id", "bos_id", "eos_id"):
            assert getattr(again, name) == getattr(first, name), name
        assert again.encode(TEXTS) == first.encode(TEXTS)


def test_words_come_back():
    texts = codec(64)
    ids, cut = texts.encode([*TEXTS, "Ünseen wörds, 象 and 🐕!"])
    assert not any(cut)
    assert [texts.decode(i) for i in ids] == [*TEXTS, "ünseen wörds, 象 and 🐕!"]
    assert texts.decode([*ids[0], texts.eos_id, *ids[1]]) == TEXTS[0]  # nothing after the end
    assert texts.decode([texts.bos_id or 0, *ids[0]]) == TEXTS[0]
    assert texts.decode([]) == ""


def test_a_long_text_is_cut_before_emb_and_counted():
    long, short = "dog " * 40, "a dog"
    whole = codec(200).encode([long])[0][0]
    texts = codec(12)
    ids, cut = texts.encode([long, short])
    assert cut == [True, False]
    assert ids[0] == whole[:12] and len(whole) >= 40
    stream = texts.embedding_stream(ids[0])
    assert stream == [texts.bos_id, *whole[:12], texts.emb_id]
    exact = codec(len(whole)).encode([long])
    assert exact == ([whole], [False])  # just at the limit


def test_special_tokens_in_a_text_are_letters():
    """A caption that spells [EMB] must not end its stream, nor ask for a score the head does not have."""
    texts = codec(64)
    spelled = "a [emb] and [EMB] then [CAP] [EOS] [BOS] [PAD] end"
    (ids,), _ = texts.encode([spelled])
    assert not {texts.emb_id, texts.cap_id, texts.eos_id, texts.bos_id, 0} & set(ids)
    assert texts.decode(ids) == spelled.lower()


def test_no_texts_no_ids():
    assert codec().encode([]) == ([], [])


def test_a_tokenizer_with_holes_in_its_ids():
    """The table must reach to the last id, not just be as long as the list."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"a": 0, "b": 7, "<eos>": 9, "<unk>": 3}, unk_token="<unk>"))
    texts = TextCodec(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>"), 4)
    assert texts.vocab_size == 10
    assert texts.bos_id is None and texts.prefix == []
    assert len({texts.emb_id, texts.cap_id, 0, 3, 7, 9}) == 6


def test_a_tokenizer_without_an_end_is_refused():
    tokens = tokenizer()
    tokens.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        TextCodec(tokens, 8)


def test_a_tokenizer_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: cannot be loaded"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_training_a_tokenizer_repeats():
    texts = [*TEXTS * 2, "ÉCOLE"]
    first, second = (train_tokenizer(iter(texts), 320, lowercase=True) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 320
    assert first(texts)["input_ids"] == second(texts)["input_ids"]
    cased = TextCodec(train_tokenizer(texts, 320, lowercase=False), 64)
    assert cased.decode(cased.encode(["A Red ÉCOLE"])[0][0]) == "A Red ÉCOLE"
    # A word is the same at the start and elsewhere.
    (start, within), _ = TextCodec(first, 64).encode(["dog", "a dog"])
    assert within[1:] == start


# --- packing ---------------------------------------------------------------------------------------------------------


def streams_of(packed: PackedTexts) -> list[tuple[list[int], list[int]]]:
    """Every segment's ids and positions, read back from the rows, in the order of segment numbers."""
    found = []
    for number in range(int(packed.segment_nL.max()) + 1):
        here = (packed.segment_nL == number).nonzero()
        assert len(set(here[:, 0].tolist())) == 1  # in one row
        columns = here[:, 1].tolist()
        assert columns == list(range(columns[0], columns[0] + len(columns)))  # and in one piece
        where = tuple(here.T)
        found.append((packed.ids_nL[where].tolist(), packed.position_nL[where].tolist()))
    return found


def random_ids(count: int, longest: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 270, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


@pytest.mark.parametrize(("embed", "write"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("row_tokens", [19, 40, 128])
def test_every_stream_is_in_the_rows_once(embed: bool, write: bool, row_tokens: int):
    texts, codes = random_ids(50, 16, 0), codec()
    texts[7] = []  # no word at all
    texts[9] = texts[8]
    packed = pack_texts(texts, codes, row_tokens, embed=embed, write=[write] * 50)
    distinct = dict.fromkeys(map(tuple, texts))  # equal texts have one embedding stream
    wanted = [[codes.bos_id, *t, codes.emb_id] for t in distinct] if embed else []
    wanted += [[codes.bos_id, 0, codes.cap_id, *t] for t in texts] if write else []
    found = streams_of(packed)
    assert [ids for ids, _ in found] == wanted
    assert all(positions == list(range(len(ids))) for ids, positions in found)
    padding = packed.segment_nL < 0
    assert not packed.ids_nL[padding].any() and not packed.position_nL[padding].any()
    assert packed.useful_tokens == sum(map(len, wanted)) == int((~padding).sum())
    assert packed.ids_nL.shape[1] == row_tokens


def test_the_indices_point_where_they_should():
    texts, codes = random_ids(30, 16, 1), codec()
    texts[4] = []
    texts[11] = texts[2]
    packed = pack_texts(texts, codes, 48)
    ids_N, segment_N = packed.ids_nL.flatten(), packed.segment_nL.flatten()
    distinct = list(dict.fromkeys(map(tuple, texts)))
    M, D = len(texts), len(distinct)
    assert D < M
    assert (ids_N[packed.emb_index_M] == codes.emb_id).all()
    assert segment_N[packed.emb_index_M].tolist() == [distinct.index(tuple(t)) for t in texts]
    assert packed.written_K.tolist() == list(range(M))
    assert segment_N[packed.visual_index_K].tolist() == list(range(D, D + M))
    assert (ids_N[packed.visual_index_K + 1] == codes.cap_id).all()
    assert (ids_N[packed.visual_index_K - 1] == codes.bos_id).all()
    assert ids_N[packed.word_index_W].tolist() == [i for t in [*distinct, *texts] for i in t]
    for m, text in enumerate(texts):
        mine = packed.label_text_T == m
        assert packed.labels_T[mine].tolist() == [*text, codes.eos_id]
        # A label is what stands one place further; the last is [EOS], which is not an input.
        index = packed.label_index_T[mine]
        assert (segment_N[index] == D + m).all()
        assert ids_N[index].tolist() == [codes.cap_id, *text]


def test_without_a_beginning_token():
    codes = codec()
    codes.bos_id = None
    packed = pack_texts([[5, 6, 7]], codes, 16)
    assert [ids for ids, _ in streams_of(packed)] == [[5, 6, 7, codes.emb_id], [0, codes.cap_id, 5, 6, 7]]
    ids_N = packed.ids_nL.flatten()
    assert ids_N[packed.label_index_T].tolist() == [codes.cap_id, 5, 6, 7]
    assert packed.labels_T.tolist() == [5, 6, 7, codes.eos_id]
    assert ids_N[packed.visual_index_K + 1].tolist() == [codes.cap_id]


def test_a_stream_that_is_not_asked_for_leaves_empty_indices():
    texts, codes = random_ids(5, 8, 2), codec()
    read = pack_texts(texts, codes, 32, write=[False] * 5)
    assert len(read.emb_index_M) == 5
    for name in ("written_K", "visual_index_K", "label_index_T", "labels_T", "label_text_T"):
        assert getattr(read, name).shape == (0,) and getattr(read, name).dtype == torch.int64, name
    assert pack_texts(texts, codes, 32, embed=False).emb_index_M.shape == (0,)
    nothing = pack_texts([], codes, 32)
    assert nothing.ids_nL.shape == (1, 32) and nothing.useful_tokens == 0


def test_some_texts_are_only_embedded():
    texts, codes = random_ids(6, 8, 2), codec()
    packed = pack_texts(texts, codes, 32, write=[False, True, False, True, True, False])
    assert packed.written_K.tolist() == [1, 3, 4]
    assert sorted(set(packed.label_text_T.tolist())) == [1, 3, 4]
    ids_N = packed.ids_nL.flatten()
    for m, place in zip((1, 3, 4), packed.visual_index_K.tolist(), strict=True):
        assert ids_N[place + 2 : place + 2 + len(texts[m])].tolist() == texts[m]
        assert packed.labels_T[packed.label_text_T == m].tolist() == [*texts[m], codes.eos_id]
    assert len(packed.emb_index_M) == 6


def test_rows_are_full():
    """Best fit: at most one row more than half empty, and near what any packing needs."""
    texts, codes = random_ids(400, 16, 3), codec()
    packed = pack_texts(texts, codes, 64)
    used = (packed.segment_nL >= 0).sum(dim=1)
    assert (used <= 32).sum() <= 1
    assert len(used) <= np.ceil(packed.useful_tokens / 64) * 1.03
    assert packed.useful_tokens / packed.ids_nL.numel() > 0.95


def test_packing_repeats():
    texts, codes = random_ids(60, 16, 4), codec()
    first, second = pack_texts(texts, codes, 40), pack_texts(texts, codes, 40)
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in first.__slots__)


def test_a_stream_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match=r"a stream of 19 tokens does not fit a row of 18; raise data.row_tokens"):
        pack_texts([list(range(3, 19))], codec(), 18)
    assert pack_texts([list(range(3, 19))], codec(), 19).ids_nL.shape == (2, 19)


def test_packed_texts_move_as_one():
    packed: Any = pack_texts(random_ids(3, 8, 5), codec(), 32).to("meta")
    assert {getattr(packed, n).device.type for n in packed.__slots__} == {"meta"}
