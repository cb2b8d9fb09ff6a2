"""The model as a judge of texts: log p of pairs, and writing nothing but texts that are given."""

from __future__ import annotations

import pytest
import torch
from helpers import TEXTS, build, model_config, shared_model

from mmgem.inference.encode import choose_texts, pair_likelihoods
from mmgem.text import PrefixTree

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def by_hand(model, vector: torch.Tensor, text: str) -> float:
    """One text alone, token after token, through the LLM's own forward."""
    with torch.inference_mode():
        ids = [*model.codec.encode([text])[0][0], model.codec.eos_id]
        prefix = model._prefix(vector[None])
        total = 0.0
        for n, label in enumerate(ids):
            written = model.language.embed(torch.tensor([ids[:n]], dtype=torch.int64))
            hidden = model.language.backbone(inputs_embeds=torch.cat([prefix, written], dim=1)).last_hidden_state
            total += float(model.language.logits(hidden[:, -1]).double().log_softmax(-1)[0, label])
        return total


def test_pairs_equal_one_text_at_a_time() -> None:
    model = shared_model()
    texts = [TEXTS[0], TEXTS[2], "a", TEXTS[0] * 9]
    vector_P, text_P = torch.tensor([0, 1, 2, 2, 0, 1]), torch.tensor([0, 1, 2, 3, 3, 0])
    sums, tokens = model.log_likelihoods(VECTORS, texts, vector_P, text_P, batch_size=4)
    wanted = [by_hand(model, VECTORS[v], texts[t]) for v, t in zip(vector_P, text_P, strict=True)]
    assert sums.tolist() == pytest.approx(wanted, abs=1e-4)
    lengths = [len(ids) + 1 for ids in model.codec.encode(texts)[0]]
    assert tokens.tolist() == [lengths[t] for t in text_P] and max(lengths) == model.codec.max_tokens + 1
    again, counted = pair_likelihoods(model, VECTORS, texts, vector_P, text_P, progress=False)
    assert again.tolist() == pytest.approx(wanted, abs=1e-4) and counted.tolist() == tokens.tolist()


def test_a_text_is_judged_with_its_end() -> None:
    """The probabilities of all texts of one token, with any second token, add up to that of the first token."""
    model = build(model_config())
    with torch.inference_mode():
        hidden = model.language.backbone(inputs_embeds=model._prefix(VECTORS[:1])).last_hidden_state[:, -1]
        first = model.language.logits(hidden).double().log_softmax(-1)[0]
    text = "a"
    [ids] = model.codec.encode([text])[0]
    log_p, tokens = model.log_likelihoods(VECTORS, [text], torch.tensor([0]), torch.tensor([0]))
    assert len(ids) == 1 and tokens.tolist() == [2]
    assert float(log_p[0]) < float(first[ids[0]])


def test_no_pairs_are_no_error() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    log_p, tokens = pair_likelihoods(shared_model(), VECTORS, ["a"], none, none, progress=False)
    assert log_p.shape == tokens.shape == (0,)


def test_a_search_as_wide_as_the_set_finds_the_order_of_all_its_texts() -> None:
    model = shared_model()
    texts = ["a red ball", "a red cube", "two balls", "a", "a red"]
    tree = PrefixTree(model.codec, texts)
    rows = choose_texts(model, VECTORS, tree, num_beams=5, progress=False)
    for n, found in enumerate(rows.tolist()):
        pair = torch.full((5,), n), torch.arange(5)
        wanted = model.log_likelihoods(VECTORS, texts, *pair)[0].argsort(descending=True).tolist()
        assert found == wanted
    log_p = model.choose(VECTORS, tree, 5)[1]
    assert log_p[0].tolist() == pytest.approx(
        model.log_likelihoods(VECTORS, texts, torch.zeros(5, dtype=torch.int64), rows[0])[0].tolist(), abs=1e-4
    )


def test_a_narrow_search_gives_texts_of_the_set_only() -> None:
    model = shared_model()
    rows = model.choose(VECTORS, PrefixTree(model.codec, TEXTS), 2)[0]
    assert rows.shape == (3, 2) and set(rows.flatten().tolist()) <= set(range(len(TEXTS)))


def test_the_tree_says_what_may_follow_and_which_text_it_was() -> None:
    codec = shared_model().codec
    texts = ["a red ball", "a red cube", "a red ball", "a"]
    tree = PrefixTree(codec, texts)
    rows = [codec.encode([text])[0][0] for text in texts]
    assert len(tree) == 3 and tree.longest == max(map(len, rows))
    assert sorted(tree.following([])) == sorted({row[0] for row in rows})
    assert codec.eos_id in tree.following(rows[3]) and len(tree.following(rows[3])) == 2
    assert tree.following(rows[0]) == [codec.eos_id]
    assert tree.following([*rows[0], codec.eos_id, codec.eos_id]) == [codec.eos_id]
    assert tree.row([*rows[2], codec.eos_id, 5]) == 0  # the first of two that are alike
    assert tree.row([*rows[1], codec.eos_id]) == 1 and tree.row(rows[1]) == -1 and tree.row([codec.eos_id]) == -1
    with pytest.raises(ValueError, match="no texts"):
        PrefixTree(codec, [])
