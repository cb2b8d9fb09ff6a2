"""The paired bootstrap: against formulas, a slow version of itself, and what it must not take for a difference."""

import numpy as np
import pytest

from mmgem.evaluation.metrics.captions import bleu, bleu_counts, caption_scores, tokenize
from mmgem.evaluation.metrics.paired import figure, paired_bootstrap, same_units
from mmgem.evaluation.metrics.scores import Items, mean_stderr, median_stderr, resample_weights

RNG = np.random.default_rng(0)


def items(values, combine="mean", unit=None):
    values = np.asarray(values, dtype=np.float64)
    return Items(values.reshape(len(values), -1), combine, unit)


def of(a, b, **more):
    return paired_bootstrap({"x": a}, {"x": b}, **{"samples": 2000, **more})["x"]


def test_the_standard_error_is_that_of_the_differences():
    hard = RNG.normal(size=400) * 10  # what makes an item hard for both
    a, b = hard + RNG.normal(size=400), hard + 0.3 + RNG.normal(size=400)
    found = of(items(a), items(b))
    assert found.difference == pytest.approx(np.mean(b - a)) and found.a == pytest.approx(a.mean())
    formula = (b - a).std(ddof=1) / 20
    assert found.stderr == pytest.approx(formula, rel=0.05)
    assert found.low == pytest.approx(found.difference - 1.96 * formula, abs=0.15 * formula)
    assert found.high == pytest.approx(found.difference + 1.96 * formula, abs=0.15 * formula)
    assert found.stderr < 0.2 * (b.std() / 20)  # unpaired it would be many times that
    assert found.samples == 2000


def test_two_models_that_are_the_same_do_not_differ():
    same = items(RNG.integers(0, 2, 100))
    found = of(same, same)
    assert (found.difference, found.stderr, found.low, found.high, found.p) == (0, 0, 0, 0, 1)
    swapped = of(items([1, 0] * 50), items([0, 1] * 50))
    assert swapped.difference == 0 and swapped.p > 0.5 and swapped.low < 0 < swapped.high


def test_p_is_small_where_b_is_better_on_all_and_even_under_the_null_hypothesis():
    a = RNG.normal(size=60)
    assert of(items(a), items(a + 0.1 + 0.01 * RNG.normal(size=60))).p == pytest.approx(2 / 2001)
    assert of(items(a), items(a - 0.1 + 0.01 * RNG.normal(size=60))).p == pytest.approx(2 / 2001)
    ps = [of(items(RNG.normal(size=50)), items(RNG.normal(size=50)), samples=200).p for _ in range(300)]
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.1
    assert 0.4 < np.mean(np.array(ps) < 0.5) < 0.6


def test_items_of_a_unit_are_drawn_together():
    unit = np.repeat(np.arange(40), 5)
    difference = np.repeat(RNG.normal(size=40), 5)
    a = RNG.normal(size=200)
    grouped, single = of(items(a, unit=unit), items(a + difference, unit=unit)), of(items(a), items(a + difference))
    assert grouped.stderr == pytest.approx(np.sqrt(5) * single.stderr, rel=0.1)
    other = mean_stderr(difference[:, None], groups=unit, samples=2000, seed=0)[0]
    assert grouped.stderr == pytest.approx(other)  # the same draws


def test_medians_are_those_of_numpy_in_each_draw():
    for count in (7, 12):
        a, b = RNG.integers(1, 9, count), RNG.integers(1, 9, count)
        unit = np.arange(count) // 2
        found = of(items(a, "median", unit), items(b, "median", unit), samples=150)
        differences = []
        for weights in resample_weights(int(unit.max()) + 1, 150, 0):
            for row in weights.astype(int):
                drawn = np.repeat(np.arange(count), row[unit])
                differences.append(np.median(b[drawn]) - np.median(a[drawn]))
        assert found.stderr == pytest.approx(np.std(differences, ddof=1))
        assert found.low == pytest.approx(np.percentile(differences, 2.5))
        assert found.difference == np.median(b) - np.median(a)
    values = RNG.normal(size=301)
    zero = items(np.zeros(301), "median")
    assert of(zero, items(values, "median")).stderr == pytest.approx(median_stderr(values, samples=2000), rel=0.02)


def test_bleu_is_that_of_the_drawn_corpus():
    references = [["a red ball on a table"], ["two green cubes and a cone"], ["the blue cone stands there alone"]] * 3
    one = ["a red ball", "two red cubes and a cone", "a blue cone stands there"] * 3
    two = ["a red ball on a box", "green cubes and a cone", "the blue cone stands alone"] * 3
    a, b = (caption_scores(written, references, samples=0).scores for written in (one, two))
    found = paired_bootstrap(a.items, b.items, samples=120)
    assert list(found) == ["BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4", "ROUGE_L", "CIDEr", "CIDEr_plain"]
    counts = [
        np.array([bleu_counts(tokenize(w), [tokenize(r) for r in rs]) for w, rs in zip(x, references, strict=True)])
        for x in (one, two)
    ]
    weights = np.concatenate(list(resample_weights(9, 120, 0)))
    slow = [
        [float(bleu(np.repeat(c, row.astype(int), axis=0).sum(axis=0, keepdims=True))[0, 3]) for c in counts]
        for row in weights
    ]
    assert found["BLEU@4"].stderr == pytest.approx(np.std([y - x for x, y in slow], ddof=1))
    for name in found:
        assert found[name].a == pytest.approx(a.metrics[name]) and found[name].b == pytest.approx(b.metrics[name])
        assert figure(a.items[name]) == pytest.approx(a.metrics[name])


def test_items_that_are_not_the_same_are_refused():
    unit = np.arange(4) // 2
    one = items(np.zeros(4), unit=unit)
    assert same_units(one, items(np.ones(4), unit=unit + 7))
    for other in (items(np.zeros(5)), items(np.zeros(4)), items(np.zeros(4), "median", unit)):
        assert not same_units(one, other)
        with pytest.raises(ValueError, match="x: .* not .* the same items"):
            of(one, other)
    assert paired_bootstrap({"x": one}, {"y": one}) == {}
