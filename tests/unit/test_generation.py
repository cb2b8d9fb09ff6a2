"""Captions: the cached loop writes what a naive one writes, beams search, sampling repeats by its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import LLAMA, build, model_config, picture, shared_model, tokenizer
from torch import Tensor, nn

from mmgem import MMGem
from mmgem.errors import UserError

LENGTH = 12


def vectors(count: int = 8) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(9)) * 1.5


def written(model: MMGem, vectors_NE: Tensor, **options: Any) -> list[list[int]]:
    """What `write` writes, as ids up to the end, since bytes of half a letter do not survive as text."""
    decode = model.codec.decode
    found: list[list[int]] = []

    def keep(ids: Sequence[int]) -> str:
        ids = list(ids)
        found.append(ids[: ids.index(model.codec.eos_id)] if model.codec.eos_id in ids else ids)
        return decode(ids)

    model.codec.decode = keep
    try:
        texts = model.write(vectors_NE, **{"max_new_tokens": LENGTH, **options})
    finally:
        model.codec.decode = decode
    assert texts == [decode(ids) for ids in found]
    return found


def prefix(model: MMGem, v_E: Tensor) -> list[Tensor]:
    codec = model.codec
    before = [] if codec.bos_id is None else [model.language.embed(torch.tensor([codec.bos_id]))]
    return [*before, model.h3(v_E)[None], model.language.embed(torch.tensor([codec.cap_id]))]


@torch.no_grad()
def scores(model: MMGem, v_E: Tensor, ids: Sequence[int]) -> Tensor:
    """Scores of the next token after each of [CAP] x1 … xn, from one pass over the whole prefix."""
    pieces = prefix(model, v_E) + ([model.language.embed(torch.tensor(ids))] if len(ids) else [])
    logits_LV = model.language.hf(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits[0]
    logits_LV[:, [i for i in (model.codec.bos_id, model.codec.tokenizer.pad_token_id) if i is not None]] = -math.inf
    logits_LV = logits_LV[len(prefix(model, v_E)) - 1 :]
    logits_LV[0, model.codec.eos_id] = -math.inf  # at least one word
    return logits_LV


def naive_greedy(model: MMGem, v_E: Tensor) -> list[int]:
    """A loop over the whole prefix each time."""
    ids: list[int] = []
    while len(ids) < LENGTH:
        token = int(scores(model, v_E, ids)[-1].argmax())
        if token == model.codec.eos_id:
            break
        ids.append(token)
    return ids


def end_now_and_then(model: MMGem) -> MMGem:
    """Makes [EOS] likely enough that captions differ in length."""
    with torch.no_grad():
        model.language.hf.get_output_embeddings().weight[model.codec.eos_id] *= 2.0
    return model


def gpt2() -> MMGem:
    config = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.2,
    }
    return end_now_and_then(build(model_config(config, "eager")))


def llama() -> MMGem:
    return end_now_and_then(build())


def llama_without_bos() -> MMGem:
    torch.manual_seed(0)
    tokens = tokenizer()
    tokens.bos_token = None
    return end_now_and_then(MMGem(model_config(), tokens).eval())


@pytest.mark.parametrize("make", [llama, gpt2, llama_without_bos])
def test_greedy_is_the_naive_loop(make: Any):
    model = make()
    wanted = [naive_greedy(model, v_E) for v_E in vectors()]
    lengths = {len(ids) for ids in wanted}
    assert len(lengths) > 1 and min(lengths) < LENGTH  # some ended by themselves
    assert len({tuple(ids) for ids in wanted}) > 1
    assert written(model, vectors()) == wanted
    assert written(model, vectors(), batch_size=3) == wanted


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.8, "temperature": 1.3, "seed": 5}],
    ids=["greedy", "beams", "nucleus"],
)
def test_the_cache_changes_no_token(make: Any, options: dict[str, Any]):
    model = make()
    cached = written(model, vectors(), **options)
    assert cached == written(model, vectors(), use_cache=False, **options)
    assert len({tuple(ids) for ids in cached}) > 1


def test_beams_find_likelier_captions():
    """By the mean log probability of a token and the end, which is what they search for."""

    def likelihood(model: MMGem, v_E: Tensor, ids: list[int]) -> float:
        logits = scores(model, v_E, ids).log_softmax(dim=-1)
        targets = [*ids, model.codec.eos_id][: len(logits)]
        if len(ids) == LENGTH:
            targets, logits = targets[:LENGTH], logits[:LENGTH]
        return logits[range(len(targets)), targets].sum().item() / len(targets)

    model = llama()
    greedy, beams = written(model, vectors()), written(model, vectors(), num_beams=4)
    gains = [
        likelihood(model, v, b) - likelihood(model, v, g) for v, b, g in zip(vectors(), beams, greedy, strict=True)
    ]
    assert min(gains) > -1e-4
    assert sum(gain > 0.01 for gain in gains) >= 2
    assert written(model, vectors(), num_beams=4, batch_size=8) == beams  # two at a time


def test_nucleus_sampling():
    model = llama()
    sampled: dict[str, Any] = {"do_sample": True, "top_p": 0.9}
    first = written(model, vectors(), **sampled, seed=1)
    before = torch.get_rng_state()
    assert written(model, vectors(), **sampled, seed=1) == first
    assert torch.equal(torch.get_rng_state(), before)  # a seed is its own, nobody else's draws move
    assert written(model, vectors(), **sampled, seed=2) != first
    torch.manual_seed(1)
    assert written(model, vectors(), **sampled) == first  # without one, torch's
    greedy = written(model, vectors())
    assert written(model, vectors(), do_sample=True, top_p=1e-6, seed=3) == greedy
    assert written(model, vectors(), do_sample=True, temperature=1e-4, seed=3) == greedy
    # Only words of the nucleus: the smallest set of likeliest words with half of the probability.
    v_E = vectors(1)[0]
    probabilities, order = scores(model, v_E, [])[0].softmax(dim=-1).sort(descending=True)
    nucleus = set(order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist())
    many = written(model, v_E.expand(200, -1), do_sample=True, top_p=0.5, seed=4, max_new_tokens=1)
    assert {ids[0] for ids in many} <= nucleus
    assert len({ids[0] for ids in many}) > 1


def test_options_reach_generate(monkeypatch: pytest.MonkeyPatch):
    model, seen = shared_model(), []
    generate = model.language.generate

    def spy(embedded_BLD: Tensor, eos_id: int, pad_id: int, **options: Any) -> Tensor:
        seen.append({"rows": len(embedded_BLD), **options})
        return generate(embedded_BLD, eos_id, pad_id, **options)

    monkeypatch.setattr(model.language, "generate", spy)
    model.write(vectors(5), num_beams=2, max_new_tokens=4, length_penalty=0.5, batch_size=6)
    assert [call["rows"] for call in seen] == [3, 2]  # so many beams in memory as batch_size says
    assert seen[0] == {**seen[0], "num_beams": 2, "max_new_tokens": 4, "length_penalty": 0.5, "do_sample": False}
    model.write(vectors(1), do_sample=True, top_p=0.7, temperature=0.4, use_cache=False, seed=0)
    assert seen[-1] == {**seen[-1], "do_sample": True, "top_p": 0.7, "temperature": 0.4, "use_cache": False}
    assert seen[-1]["top_k"] == 0  # none unless asked for
    assert all(len(ids) <= 3 for ids in written(model, vectors(), max_new_tokens=3))


def test_reranked_beams_are_those_that_the_model_reads_best(monkeypatch: pytest.MonkeyPatch):
    """Of the same beams: with a small weight the likeliest, with a large one that of the highest cosine."""
    model, v_NE = llama(), vectors()
    options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 6}
    seen: list[tuple[Tensor, Tensor]] = []
    search = model.language.generate_beams
    monkeypatch.setattr(model.language, "generate_beams", lambda *a, **o: seen.append(search(*a, **o)) or seen[-1])
    plain = model.write(v_NE, **options)
    assert model.write(v_NE, rerank=1e-6, **options) == plain
    read = model.write(v_NE, rerank=1e6, **options)
    assert read == model.write(v_NE, rerank=1e6, batch_size=8, **options)

    def cosines(texts: list[str]) -> Tensor:
        return torch.cosine_similarity(model.text_vectors(texts), v_NE, dim=1)

    gain_N = cosines(read) - cosines(plain)
    assert gain_N.min() > -1e-5 and (gain_N > 1e-3).sum() >= 2
    between = model.write(v_NE, rerank=1.0, **options)
    assert (cosines(between) - cosines(plain)).min() > -1e-5
    ids_BKT, score_BK = seen[-1]
    assert ids_BKT.shape[:2] == score_BK.shape == (len(v_NE), 4)
    assert (score_BK.diff(dim=1) <= 0).all()  # the likeliest first
    for ids_KT, score_K, text, v_E in zip(ids_BKT.tolist(), score_BK, between, v_NE, strict=True):
        own = [model.codec.decode(ids) for ids in ids_KT]
        value_K = score_K + torch.cosine_similarity(model.text_vectors(own), v_E[None], dim=1)
        assert own[int(value_K.argmax())] == text


@pytest.mark.parametrize(
    "options", [{"rerank": -1.0}, {"rerank": 1.0}, {"rerank": 1.0, "num_beams": 2, "do_sample": True}]
)
def test_reranking_without_beams_is_refused(options: dict[str, Any]):
    with pytest.raises(UserError, match="captions cannot be reranked"):
        shared_model().write(vectors(1), **options)


def test_a_longer_penalty_gives_longer_captions():
    model = llama()

    def mean_length(penalty: float) -> float:
        ids = written(model, vectors(), num_beams=4, length_penalty=penalty)
        return sum(map(len, ids)) / len(ids)

    assert mean_length(-3.0) < mean_length(3.0)


def test_special_tokens_are_never_written():
    """Even where they score highest, and where the LLM has spare rows with the ids of [EMB] and [CAP]."""
    model = build(model_config({**LLAMA, "tie_word_embeddings": False, "vocab_size": 320}))
    head, codec = model.language.hf.get_output_embeddings(), model.codec
    biased = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        biased.bias[[codec.bos_id, codec.tokenizer.pad_token_id, codec.emb_id, codec.cap_id]] = 100.0
    model.language.hf.set_output_embeddings(biased)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 0}):
        ids = {i for caption in written(model, vectors(), **options) for i in caption}
        assert ids and not ids & {codec.bos_id, codec.tokenizer.pad_token_id, codec.emb_id, codec.cap_id}
    # The end only after a word.
    biased.bias.data[codec.eos_id] = 200.0
    assert {len(ids) for ids in written(model, vectors())} == {1}


def test_captions_of_pictures_and_of_boxes():
    model = llama()
    pictures = [picture(n, 60 + 10 * n, 70) for n in range(4)]
    boxes = [[(0.0, 0.0, 30.0, 30.0), (20.0, 5.0, 60.0, 70.0)], [], [(5.0, 5.0, 50.0, 60.0)], []]
    v_NE, r = model.image_and_region_vectors(pictures, boxes)
    assert model.caption(pictures, max_new_tokens=6) == model.write(v_NE, max_new_tokens=6)
    captions = model.caption_regions(pictures, boxes, max_new_tokens=6)
    assert [len(c) for c in captions] == [2, 0, 1, 0]
    assert [c for own in captions for c in own] == model.write(torch.cat(r), max_new_tokens=6)
    assert model.caption([]) == [] and model.caption_regions([], []) == []
    assert model.caption_regions(pictures[:1], [[]]) == [[]]
    assert model.write(torch.zeros(0, 32)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"max_new_tokens": 0},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "temperature": 0.0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]):
    model = shared_model()
    with pytest.raises(UserError, match="captions cannot be written"):
        model.write(torch.zeros(1, model.config.embed_dim), **options)
