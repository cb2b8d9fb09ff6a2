"""BLEU, ROUGE_L, CIDEr and the tokens, against coco-caption's own figures."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mmgem.evaluation.metrics.captions import bleu_counts, caption_scores, cider, rouge_l, tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "caption_scores.json").read_text(encoding="utf-8"))


def golden_scores(samples: int = 50):
    candidates = [item["candidate"] for item in GOLDEN["items"]]
    references = [item["references"] for item in GOLDEN["items"]]
    return caption_scores(candidates, references, samples=samples)


def test_tokens_equal_those_of_the_java_tokenizer():
    assert len(GOLDEN["tokens"]) >= 10
    for sentence, tokens in GOLDEN["tokens"].items():
        assert tokenize(sentence) == tokens


def test_tokens_do_not_depend_on_case_or_on_spaces_before_punctuation():
    assert tokenize("A DOG runs , fast .") == tokenize("a dog runs, fast.")
    assert tokenize("") == tokenize(" . ") == tokenize('"..."') == []


def test_scores_equal_those_of_coco_caption():
    found = golden_scores()
    assert set(found.scores.metrics) == set(GOLDEN["scores"])
    for name, value in GOLDEN["scores"].items():
        assert found.scores.metrics[name] == pytest.approx(value, abs=1e-9), name
    assert found.rouge_N == pytest.approx(GOLDEN["rouge"], abs=1e-9)
    assert found.cider_N == pytest.approx(GOLDEN["cider"], abs=1e-9)


def test_bleu_counts_by_hand():
    # "the" is clipped to the most any one reference has (2), not to their sum (3).
    counts = bleu_counts("the the the cat".split(), ["the cat the".split(), ["the"]])
    assert counts == [4, 3, 2, 1, 3, 1, 0, 0, 4, 3]


def test_bleu_takes_the_closest_reference_and_of_two_as_close_the_shorter():
    candidate = "a b c".split()
    refs = ["a b c d".split(), "a b".split(), "a b c d e f".split()]
    assert bleu_counts(candidate, refs)[-1] == 2


def test_perfect_captions_score_one_and_ten():
    texts = ["a dog runs over grass", "two men talk near a car", "a red bus at night here"]
    found = caption_scores(texts, [[t] for t in texts], samples=20).scores
    for name in ("BLEU@1", "BLEU@4", "ROUGE_L"):
        assert found.metrics[name] == pytest.approx(1.0, abs=1e-6)
    assert found.metrics["CIDEr"] == pytest.approx(10.0)
    assert found.stderr["BLEU@4"] == pytest.approx(0.0, abs=1e-6)


def test_rouge_by_hand():
    # Longest common subsequence "a c d": precision 3/4, recall 3/3.
    precision, recall, square = 0.75, 1.0, 1.44
    expected = (1 + square) * precision * recall / (recall + square * precision)
    assert rouge_l("a b c d".split(), ["a c d".split()]) == pytest.approx(expected)
    assert rouge_l([], [["a"]]) == 0.0
    assert rouge_l(["a"], [[]]) == 0.0


def test_cider_of_one_item_is_zero_as_every_word_stands_in_every_document():
    assert cider([["a", "dog"]], [[["a", "dog"]]]) == pytest.approx([0.0])


def test_empty_candidates_are_scored_and_empty_sets_refused():
    found = caption_scores(["", "a dog"], [["a cat"], ["a dog"]], samples=10).scores
    assert 0 < found.metrics["BLEU@1"] < 1
    with pytest.raises(ValueError, match="0 candidates"):
        caption_scores([], [])
    with pytest.raises(ValueError, match="item 1 has no reference"):
        caption_scores(["a", "b"], [["a"], []])


def test_standard_errors_are_seeded_and_shrink_with_the_set():
    one, two = golden_scores(200).scores, golden_scores(200).scores
    assert one.stderr == two.stderr
    assert all(value > 0 for value in one.stderr.values())
    candidates = [item["candidate"] for item in GOLDEN["items"]] * 4
    references = [item["references"] for item in GOLDEN["items"]] * 4
    large = caption_scores(candidates, references, samples=200).scores
    assert large.stderr["BLEU@1"] < 0.75 * one.stderr["BLEU@1"]


def test_items_of_one_group_are_drawn_together():
    candidates = [item["candidate"] for item in GOLDEN["items"]] * 4
    references = [item["references"] for item in GOLDEN["items"]] * 4
    groups = np.tile(np.arange(len(GOLDEN["items"])), 4)
    alone = caption_scores(candidates, references, samples=300).scores
    grouped = caption_scores(candidates, references, groups=groups, samples=300).scores
    assert grouped.metrics == alone.metrics
    assert grouped.stderr["ROUGE_L"] > 1.5 * alone.stderr["ROUGE_L"]


def test_equals_pycocoevalcap_on_real_captions():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    folder = Path(os.environ.get("MMGEM_TEST_DATA", "")) / "data" / "flickr8k"
    if not os.environ.get("MMGEM_TEST_DATA") or not folder.is_dir():
        pytest.skip("MMGEM_TEST_DATA names no folder with data/flickr8k")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").open(encoding="utf-8")]
    captions = [row["captions"] for row in rows if row["split"] == "val"][:400]
    ours = caption_scores([c[0] for c in captions], [c[1:] for c in captions], samples=2)
    res = {i: [" ".join(tokenize(c[0]))] for i, c in enumerate(captions)}
    gts = {i: [" ".join(tokenize(r)) for r in c[1:]] for i, c in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    theirs = {f"BLEU@{n + 1}": b for n, b in enumerate(bleu)}
    theirs["ROUGE_L"] = Rouge().compute_score(gts, res)[0]
    theirs["CIDEr"] = Cider().compute_score(gts, res)[0]
    for name, value in theirs.items():
        assert ours.scores.metrics[name] == pytest.approx(value, abs=1e-4), name
