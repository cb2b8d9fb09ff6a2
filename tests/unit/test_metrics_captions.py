"""BLEU, ROUGE_L, CIDEr, METEOR and the tokens, against coco-caption's own figures."""

import hashlib
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmgem.evaluation.metrics.captions import bleu_counts, caption_scores, cider, ciders, rouge_l, tokenize
from mmgem.evaluation.metrics.java_scores import _programs, java_kept, java_scores, why_absent

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "caption_scores.json").read_text(encoding="utf-8"))


def golden_scores(samples: int = 50):
    candidates = [item["candidate"] for item in GOLDEN["items"]]
    references = [item["references"] for item in GOLDEN["items"]]
    return caption_scores(candidates, references, samples=samples)


def test_tokens_equal_those_of_the_java_tokenizer():
    assert len(GOLDEN["tokens"]) >= 10
    for sentence, tokens in GOLDEN["tokens"].items():
        assert tokenize(sentence) == tokens


def test_tokens_of_odd_words_equal_those_of_the_java_tokenizer():
    assert len(GOLDEN["odd"]) >= 500
    assert {s: " ".join(tokenize(s)) for s in GOLDEN["odd"]} == GOLDEN["odd"]


def test_tokens_of_texts_without_spaces_come_in_time():
    for text in ("a-" * 5000, "a." * 5000, "'" * 5000, "x@" * 5000, "5," * 5000, "<" * 5000):
        assert len(tokenize(text + "!")) <= len(text)


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
    assert found.cider_plain_N == pytest.approx(GOLDEN["cider_plain"], abs=1e-9)


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


def test_plain_cider_by_hand():
    # Two items. Of the words of the candidate "a a b" only "b" is rare: it is in one of the two documents, "a" in
    # both. So b weighs log 2, a nothing, and of the bigrams "a a" (in none) and "a b" (in one) weigh log 2 as well.
    candidates = ["a a b".split(), ["a"]]
    references = [["a b".split()], [["a"]]]
    clipped, plain = ciders(candidates, references)
    unigrams, bigrams = 1.0, 1 / math.sqrt(2)
    assert plain[0] == pytest.approx(10 * (unigrams + bigrams) / 4)
    assert clipped[0] == pytest.approx(plain[0] * math.exp(-1 / 72))  # one bigram longer, nothing to clip
    repeated, _ = ciders(["a b b".split(), ["a"]], references)
    assert ciders(["a b b".split(), ["a"]], references)[1][0] == pytest.approx(10 * (1.0 + 1 / math.sqrt(2)) / 4)
    assert repeated[0] == pytest.approx(
        10 * (0.5 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    )  # 2 log 2 is cut to log 2


def test_five_captions_an_image_and_duplicates_by_hand():
    # A reference that stands twice counts twice in both CIDErs and changes neither BLEU nor ROUGE_L.
    texts = ["a dog runs", "a dog sits", "the cat", "one bird", "grass"]
    once = caption_scores(["a dog runs", "x"], [texts, ["y"]], samples=0)
    twice = caption_scores(["a dog runs", "x"], [[*texts, texts[0]], ["y"]], samples=0)
    assert once.scores.metrics["BLEU@4"] == twice.scores.metrics["BLEU@4"]
    assert once.rouge_N.tolist() == twice.rouge_N.tolist() == [1.0, 0.0]
    # The reference that is equal: a cosine of 1 for 1- to 3-grams. Of "a dog sits": 2 of 3 words, 1 of 2 bigrams.
    shared = 2 / 3 + 1 / 2
    assert once.cider_plain_N[0] == pytest.approx(10 * (3 + shared) / (4 * 5))
    assert twice.cider_plain_N[0] == pytest.approx(10 * (3 + shared + 3) / (4 * 6))


def test_absent_figures_say_why_and_are_not_zero(monkeypatch, tmp_path):
    texts, references = ["a dog"], [["a dog"]]
    for name in ("METEOR", "SPICE"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "pip install 'mmgem[eval]'" in (why_absent(name) or "")
        monkeypatch.undo()
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = java_scores(texts, references)
    assert found.scores.metrics == found.scores.stderr == found.per_item == {}
    assert all("no `java` on the PATH" in found.absent[name] for name in ("METEOR", "SPICE"))
    assert not any("\n" in reason for reason in found.absent.values())


def test_a_java_that_fails_is_told_and_does_not_end_the_evaluation(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = java_scores(["a dog"], [["a dog"]], names=["METEOR"])
    assert found.scores.metrics == {}
    assert found.absent["METEOR"].startswith("METEOR failed: ")


def test_java_scores_refuse_what_caption_scores_refuse():
    with pytest.raises(ValueError, match="0 candidates"):
        java_scores([], [])
    with pytest.raises(ValueError, match="item 1 has no reference"):
        java_scores(["a", "b"], [["a"], []])


@pytest.mark.slow
def test_meteor_equals_that_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    candidates = [item["candidate"] for item in GOLDEN["items"]]
    references = [item["references"] for item in GOLDEN["items"]]
    with java_kept():
        found = java_scores(candidates, references, samples=50)
        again = java_scores(candidates, references, names=["METEOR"], samples=50)
        (program,) = _programs[-1].values() if why_absent("SPICE") else [_programs[-1]["METEOR"]]
        assert program.process.poll() is None, "it is kept for the next texts"
    assert program.process.poll() is not None and not _programs
    assert again.scores.metrics["METEOR"] == found.scores.metrics["METEOR"]
    assert found.scores.metrics["METEOR"] == pytest.approx(GOLDEN["meteor"]["score"], abs=1e-9)
    assert found.per_item["METEOR"] == pytest.approx(GOLDEN["meteor"]["items"], abs=1e-9)
    assert 0 < found.scores.stderr["METEOR"] < 0.2
    assert set(found.scores.metrics) | set(found.absent) == {"METEOR", "SPICE"}


def checksum(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_tokens_and_scores_of_real_captions_equal_those_of_coco_caption():
    folder = Path(os.environ.get("MMGEM_TEST_DATA", "")) / "data" / "flickr8k"
    if not os.environ.get("MMGEM_TEST_DATA") or not folder.is_dir():
        pytest.skip("MMGEM_TEST_DATA names no folder with data/flickr8k")
    golden = GOLDEN["flickr8k"]
    rows = [json.loads(line) for line in (folder / "captions.jsonl").open(encoding="utf-8")]
    tokens = [" ".join(tokenize(caption)) for row in rows for caption in row["captions"]]
    assert {"count": len(tokens), "tokens": checksum(tokens)} == golden["captions"]
    with (folder / "regions.jsonl").open(encoding="utf-8") as lines:
        phrases = sorted({json.loads(line)["phrase"] for line in lines})
    tokens = [" ".join(tokenize(phrase)) for phrase in phrases]
    assert {"count": len(tokens), "tokens": checksum(tokens)} == golden["phrases"]
    val = [row for row in rows if row["split"] == golden["split"]]
    assert (len(val), checksum(row["image"] for row in val)) == (golden["sets"], golden["images"])
    assert len(val) >= 1000
    found = caption_scores([r["captions"][0] for r in val], [r["captions"][1:] for r in val], samples=0).scores
    assert found.metrics == pytest.approx(golden["scores"], abs=1e-6)
