"""Ranks, recalls, chance and standard errors, against a naive full matrix and by hand."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmgem.evaluation.metrics.retrieval import (
    Positives,
    best_ranks,
    chance_precision,
    chance_recall,
    first_ranks,
    per_query,
    positive_ranks,
    ranks_both_ways,
    retrieval_scores,
    top_k,
    unit_vectors,
)
from mmgem.evaluation.metrics.scores import bootstrap_stderr, median_stderr
from mmgem.phrases import normalise_phrase


def naive_ranks(queries, gallery, lists):
    """Full matrix in float64, one query at a time."""
    q = torch.nn.functional.normalize(queries.double(), dim=1)
    g = torch.nn.functional.normalize(gallery.double(), dim=1)
    out = []
    for scores, right in zip(q @ g.T, lists, strict=True):
        best = scores[right].max()
        wrong = torch.ones(len(g), dtype=torch.bool)
        wrong[right] = False
        out.append(int((scores[wrong] >= best - 1e-6).sum()))
    return torch.tensor(out)


def random_case(seed, queries=37, gallery=90, dim=8):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, dim, generator=generator)
    g = torch.randn(gallery, dim, generator=generator)
    lists = []
    for _ in range(queries):
        count = int(torch.randint(1, 6, (1,), generator=generator))
        lists.append(torch.randperm(gallery, generator=generator)[:count].tolist())
    return q, g, lists


def naive_positive_ranks(queries, gallery, lists):
    """Wrong rows before each right one, full matrix in float64, one pair at a time."""
    unit = torch.nn.functional.normalize
    out = []
    for scores, right in zip(unit(queries.double(), dim=1) @ unit(gallery.double(), dim=1).T, lists, strict=True):
        wrong = torch.ones(len(gallery), dtype=torch.bool)
        wrong[right] = False
        out += [int((scores[wrong] >= scores[p] - 1e-6).sum()) for p in right]
    return out


@pytest.mark.parametrize("tiles", [(1024, 8192), (5, 7), (37, 90), (1, 1), (10, 64)])
def test_ranks_equal_the_naive_ones_whatever_the_tiles(tiles):
    for seed in range(3):
        q, g, lists = random_case(seed)
        found = best_ranks(q, g, Positives.from_lists(lists, len(g)), query_tile=tiles[0], gallery_tile=tiles[1])
        assert found.tolist() == naive_ranks(q, g, lists).tolist()


@pytest.mark.parametrize("tiles", [(1024, 8192), (4, 9)])
def test_ranks_with_many_exact_ties_equal_the_naive_ones(tiles):
    generator = torch.Generator().manual_seed(5)
    kinds = torch.randn(4, 16, generator=generator)
    g = kinds[torch.randint(0, 4, (60,), generator=generator)]
    q = kinds[torch.randint(0, 4, (20,), generator=generator)]
    _, _, lists = random_case(9, queries=20, gallery=60)
    found = best_ranks(q, g, Positives.from_lists(lists, 60), query_tile=tiles[0], gallery_tile=tiles[1])
    expected = naive_ranks(q, g, lists)
    assert found.tolist() == expected.tolist()
    assert int((expected > 0).sum()) > 10  # the ties do count against the query


def test_a_tie_with_a_wrong_item_is_a_loss():
    q = torch.tensor([[1.0, 0.0]])
    g = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])  # the first two are the same direction
    assert best_ranks(q, g, Positives.from_lists([[0]], 3)).tolist() == [1]
    assert best_ranks(q, g, Positives.from_lists([[0, 1]], 3)).tolist() == [0]


def test_a_model_that_maps_all_to_one_vector_gets_nothing():
    noise = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    same = torch.ones(50, 64) + 1e-7 * noise
    ids = torch.arange(50)
    assert best_ranks(same, same, Positives.from_ids(ids, ids)).min() == 49


def test_a_pair_never_competes_with_itself():
    """Where the right score comes from another product than its rivals', rounding costs hits."""
    x = torch.randn(300, 768, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(300)
    assert best_ranks(x, x.clone(), Positives.from_ids(ids, ids), gallery_tile=77).max() == 0


def test_recalls_by_hand():
    # Two images, three captions: 0 and 1 of image 0, caption 2 of image 1.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.6, 1.0]])
    to_image = Positives.from_ids(torch.tensor([0, 0, 1]), torch.arange(2))
    to_text = to_image.reversed()
    ranks = best_ranks(texts, images, to_image)
    assert ranks.tolist() == [0, 1, 0]
    image = retrieval_scores("image_retrieval", ranks, to_image, ks=(1, 2), samples=50)
    assert image.metrics == pytest.approx(
        {
            "image_retrieval_recall@1": 2 / 3,
            "image_retrieval_recall@2": 1.0,
            "image_retrieval_strict_recall@1": 2 / 3,
            "image_retrieval_strict_recall@2": 1.0,
            "image_retrieval_mAP": 5 / 6,
            "image_retrieval_mAP@R": 2 / 3,
            "image_retrieval_median_rank": 1.0,
        }
    )
    # Image 0: its caption 0 wins. Image 1: caption 1, which is not its own, stands before its own.
    assert best_ranks(images, texts, to_text).tolist() == [0, 1]
    assert image.chance["image_retrieval_recall@1"] == pytest.approx(0.5)
    assert image.chance["image_retrieval_recall@2"] == pytest.approx(1.0)


@pytest.mark.parametrize("tiles", [(None, None), (5, 7), (1, 1), (10, 64)])
@pytest.mark.parametrize("most", [6, 60])  # few right rows are counted in another way than many
def test_the_rank_of_every_right_row_equals_the_naive_one(tiles, most):
    for seed in range(2):
        q, g, _ = random_case(seed)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, most, (len(q),), generator=generator).tolist()
        lists = [torch.randperm(len(g), generator=generator)[:n].tolist() for n in counts]
        positives = Positives.from_lists(lists, len(g))
        found = positive_ranks(q, g, positives, query_tile=tiles[0], gallery_tile=tiles[1])
        assert found.tolist() == naive_positive_ranks(q, g, lists)
        assert first_ranks(found, positives).tolist() == naive_ranks(q, g, lists).tolist()


@pytest.mark.parametrize("most", [6, 50])
def test_the_rank_of_every_right_row_among_ties_and_copies(most):
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(4, 256, generator=generator)
    g = kinds[torch.randint(0, 4, (60,), generator=generator)]
    q = kinds[torch.randint(0, 4, (20,), generator=generator)]
    lists = [torch.randperm(60, generator=generator)[: 1 + i * most // 20].tolist() for i in range(20)]
    found = positive_ranks(q, g, Positives.from_lists(lists, 60), query_tile=7, gallery_tile=13)
    assert found.tolist() == naive_positive_ranks(q, g, lists)
    assert max(map(len, lists)) > (32 if most == 50 else 4)


def test_every_figure_by_hand():
    # One image, two captions of it (a, b) and three others; the order of all is x a y b z.
    images = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.2, 0.4, 0.1, 0.3, 0.5])  # a b x y z
    texts = torch.stack([angles.cos(), angles.sin()], dim=1)
    positives = Positives.from_lists([[1, 0]], 5)  # b is named first: the order of naming is kept
    ahead = positive_ranks(images, texts, positives)
    assert ahead.tolist() == [2, 1]
    found = {name: float(values[0]) for name, values in per_query(ahead, positives, ks=(1, 2, 3, 4)).items()}
    assert found == pytest.approx(
        {
            "recall@1": 0.0,
            "recall@2": 1.0,
            "recall@3": 1.0,
            "recall@4": 1.0,
            "strict_recall@1": 0.0,
            "strict_recall@2": 0.5,
            "strict_recall@3": 0.5,
            "strict_recall@4": 1.0,
            "mAP": (1 / 2 + 2 / 4) / 2,
            "mAP@R": (0 + 1 / 2) / 2,  # the first two places: wrong, right
            "median_rank": 2.0,
        }
    )


def test_five_captions_an_image_by_hand():
    # Image 0 finds its five captions at places 1 to 5, image 1 at 1, 2, 6, 7 and 10.
    ahead = torch.tensor([0, 0, 0, 0, 0, 5, 0, 3, 3, 0])
    positives = Positives.from_lists([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 10)
    found = retrieval_scores("x", ahead, positives, samples=20)
    precision = (1 / 1 + 2 / 2 + 3 / 6 + 4 / 7 + 5 / 10) / 5
    assert found.metrics == pytest.approx(
        {
            "x_recall@1": 1.0,
            "x_recall@5": 1.0,
            "x_recall@10": 1.0,
            "x_strict_recall@1": 0.2,
            "x_strict_recall@5": (1.0 + 0.4) / 2,
            "x_strict_recall@10": 1.0,
            "x_mAP": (1 + precision) / 2,
            "x_mAP@R": (1 + 0.4) / 2,
            "x_median_rank": 1.0,
        }
    )
    assert set(found.stderr) == set(found.metrics)
    assert found.stderr["x_recall@1"] == 0 < found.stderr["x_mAP"]
    assert retrieval_scores("x", ahead, positives, samples=0).stderr == {}


def test_ties_count_against_each_right_row():
    # All rows are one: each right row stands behind the three wrong ones, and only behind these.
    q, g = torch.ones(1, 8), torch.ones(5, 8)
    ahead = positive_ranks(q, g, Positives.from_lists([[0, 4]], 5))
    assert ahead.tolist() == [3, 3]
    found = per_query(ahead, Positives.from_lists([[0, 4]], 5), ks=(3, 4, 5))
    assert [float(found[f"strict_recall@{k}"][0]) for k in (3, 4, 5)] == [0.0, 0.5, 1.0]
    assert float(found["mAP"][0]) == pytest.approx((1 / 4 + 2 / 5) / 2)


def test_one_phrase_for_several_boxes_and_a_query_alone():
    # Boxes 0 and 2 are both "a dog": many-to-many, and each phrase is a query once.
    phrases = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    boxes = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.2, 1.0]])
    to_box = Positives.from_lists([[0, 2], [1]], 3)
    ahead = positive_ranks(phrases, boxes, to_box)
    assert ahead.tolist() == [0, 0, 0]  # box 1 has 0.0995 for the first phrase, box 2 has 0.196
    back = positive_ranks(boxes, phrases, to_box.reversed())
    assert back.tolist() == [0, 0, 1]
    found = retrieval_scores("x", back, to_box.reversed(), ks=(1,), samples=0).metrics
    assert found["x_recall@1"] == found["x_strict_recall@1"] == pytest.approx(2 / 3)
    assert found["x_mAP"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_all_figures_equal_naive_ones():
    q, g, lists = random_case(4, dim=4)
    positives = Positives.from_lists(lists, len(g))
    ahead = positive_ranks(q, g, positives)
    scores = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(g, dim=1).T
    strict, precision, cut = [], [], []
    for row, right in zip(scores, lists, strict=True):
        hits = torch.isin(row.argsort(descending=True), torch.tensor(right)).double()
        precisions = hits.cumsum(0) / torch.arange(1, len(g) + 1)
        strict.append(hits[:5].sum() / len(right))
        precision.append((precisions * hits).sum() / len(right))
        cut.append((precisions * hits)[: len(right)].sum() / len(right))
    found = retrieval_scores("x", ahead, positives, samples=30)
    assert found.metrics["x_strict_recall@5"] == pytest.approx(float(torch.stack(strict).mean()))
    assert found.metrics["x_mAP"] == pytest.approx(float(torch.stack(precision).mean()))
    assert found.metrics["x_mAP@R"] == pytest.approx(float(torch.stack(cut).mean()))


def test_chance_of_all_figures_is_the_expectation_over_all_orders():
    gallery, right = 5, 3
    orders = list(itertools.permutations(range(gallery)))
    positives = Positives.from_lists([list(range(right))] * len(orders), gallery)
    ahead = [sum(x >= right for x in order[: order.index(p)]) for order in orders for p in range(right)]
    found = retrieval_scores("x", torch.tensor(ahead), positives, ks=(1, 2, 4, 9), samples=0)
    for name, value in found.chance.items():
        assert found.metrics[name] == pytest.approx(value), name
    assert chance_precision(torch.tensor([1]), 1) == chance_precision(torch.tensor([1]), 1, cut=True) == 1.0


def test_vectors_of_other_dtypes_and_rows_of_zeros():
    q, g, lists = random_case(2)
    positives = Positives.from_lists(lists, len(g))
    half = positive_ranks(q.half(), g.half(), positives)
    assert half.tolist() == naive_positive_ranks(q.half().float(), g.half().float(), lists)
    g[lists[0]] = 0.0  # a row of zeros has the cosine 0 with all
    assert positive_ranks(q, g, positives).tolist() == naive_positive_ranks(q, g, lists)
    assert unit_vectors(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("most", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize("tiles", [(1, 1), (7, 13), (1000, 1000)])
def test_both_ways_from_one_product(tiles, most):
    """With ties, duplicates, queries of many right rows, and gallery rows that answer nothing."""
    generator = torch.Generator().manual_seed(most)
    q, g = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (50, 60))
    lists = [torch.randperm(55, generator=generator)[: 1 + n % most].tolist() for n in range(50)]
    positives = Positives.from_lists(lists, 60)
    back = positives.reversed()
    assert (back.counts == 0).any()
    forth, found = ranks_both_ways(q, g, positives, query_tile=tiles[0], gallery_tile=tiles[1])
    assert forth.tolist() == naive_positive_ranks(q, g, lists)
    asking = back.counts > 0
    turned = [back.items[a:b].tolist() for a, b in zip(back.starts[:-1], back.starts[1:], strict=True)]
    assert found.tolist() == naive_positive_ranks(g[asking], q, [own for own in turned if own])


def test_positive_ranks_hold_no_copy_of_the_vectors():
    """A child reads 200 MB of vectors and may take 40 MB more."""
    script = """
import torch
from mmgem.evaluation.metrics.retrieval import Positives, positive_ranks
torch.set_num_threads(1)
def peak():
    (line,) = (x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
g = torch.zeros(400_000, 128)
g[:, 0] = 1
q = torch.eye(2, 128)
positive_ranks(q, g[:5000], Positives.from_lists([[0], [1]], 5000))
before = peak()
positive_ranks(q, g, Positives.from_lists([[0], [1]], 400_000))
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 40


def test_positives_from_ids_from_lists_and_reversed_agree():
    query_ids, gallery_ids = torch.tensor([3, 7, 3, 9]), torch.tensor([9, 3, 3, 7, 7, 7])
    by_ids = Positives.from_ids(query_ids, gallery_ids)
    by_lists = Positives.from_lists([[1, 2], [3, 4, 5], [1, 2], [0]], 6)
    assert by_ids.starts.tolist() == by_lists.starts.tolist() == [0, 2, 5, 7, 8]
    assert by_ids.items.tolist() == by_lists.items.tolist()
    turned = by_ids.reversed()
    assert turned.counts.tolist() == [1, 2, 2, 1, 1, 1]
    assert turned.items.tolist() == [3, 0, 2, 0, 2, 1, 1, 1]
    assert turned.reversed().items.tolist() == by_ids.items.tolist()


def test_chance_is_the_expectation_over_all_orders():
    gallery, positives, k = 5, 2, 2
    orders = list(itertools.permutations(range(gallery)))
    hits = sum(min(order[:k]) < positives for order in orders)
    assert chance_recall(torch.tensor([positives]), gallery, k) == pytest.approx(hits / len(orders))
    assert chance_recall(torch.tensor([1]), 4, 10) == 1.0
    assert chance_recall(torch.tensor([1, 3]), 4, 1) == pytest.approx((0.25 + 0.75) / 2)


def test_random_vectors_get_about_chance():
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.randn(n, 32, generator=generator) for n in (2000, 300))
    positives = Positives.from_ids(torch.arange(2000) % 300, torch.arange(300))
    found = retrieval_scores("x", positive_ranks(q, g, positives), positives, samples=200)
    for k in (1, 5, 10):
        name = f"x_recall@{k}"
        assert abs(found.metrics[name] - found.chance[name]) < 4 * found.stderr[name] + 1e-3


def test_vectors_that_are_not_finite_are_refused():
    x = torch.eye(3)
    bad = x.clone()
    bad[1, 0] = torch.nan
    positives = Positives.from_ids(torch.arange(3), torch.arange(3))
    for q, g in ((bad, x), (x, bad)):
        with pytest.raises(ValueError, match="1 vectors are not finite, the first is row 1"):
            best_ranks(q, g, positives)


def test_queries_without_answer_and_wrong_sizes_are_refused():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="1 queries have no right answer"):
        best_ranks(x, x, Positives.from_lists([[0], [], [2]], 3))
    with pytest.raises(ValueError, match="positives are for 2 x 3"):
        best_ranks(x, x, Positives.from_lists([[0], [1]], 3))
    with pytest.raises(ValueError, match="outside the gallery"):
        Positives.from_lists([[3]], 3)


def test_standard_error_of_a_share_is_the_binomial_one_and_seeded():
    hits = (np.arange(400) % 4 == 0).astype(float)
    ranks = torch.tensor(np.where(hits, 0, 9))
    positives = Positives.from_ids(torch.arange(400), torch.arange(400))
    one = retrieval_scores("x", ranks, positives, ks=(1,), samples=2000, seed=3)
    two = retrieval_scores("x", ranks, positives, ks=(1,), samples=2000, seed=3)
    assert one.stderr == two.stderr
    assert one.stderr["x_recall@1"] == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    assert one.stderr["x_median_rank"] == 0.0


def test_queries_of_one_image_are_drawn_together():
    rng = np.random.default_rng(0)
    of_image = rng.random((50, 1)) + 0.3 * rng.normal(size=(50, 5))
    values, groups = of_image.reshape(-1, 1), np.repeat(np.arange(50), 5)
    sums = np.concatenate([values, np.ones_like(values)], axis=1)

    def mean(s):
        return s[:, :1] / s[:, 1:]

    alone = bootstrap_stderr(sums, mean, samples=2000)
    grouped = bootstrap_stderr(sums, mean, groups=groups, samples=2000)
    assert alone[0] == pytest.approx(values.std() / 250**0.5, rel=0.08)
    assert grouped[0] == pytest.approx(of_image.mean(axis=1).std() / 50**0.5, rel=0.08)
    assert grouped[0] > 1.2 * alone[0]
    assert median_stderr(values[:, 0], groups=groups) > 0


def test_top_k_equals_a_full_sort_across_tiles():
    q, g, _ = random_case(1)
    values, rows = top_k(q, g, 5, gallery_tile=11)
    unit = torch.nn.functional.normalize
    full = (unit(q, dim=1) @ unit(g, dim=1).T).topk(5, dim=1)
    assert rows.tolist() == full.indices.tolist()
    assert torch.allclose(values, full.values, atol=1e-6)
    assert top_k(q, g[:3], 5)[1].shape == (37, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A red  Ball.", "the red ball"),
        ("boy's shirt", "boy 's shirt"),
        ("an apple", "Apple"),
        ("t-shirt", "T shirt"),
    ],
)
def test_phrases_that_are_the_same(one, other):
    assert normalise_phrase(one) == normalise_phrase(other)


def test_phrases_that_differ_stay_apart_and_none_becomes_empty():
    assert normalise_phrase("two dogs") != normalise_phrase("dogs")
    assert normalise_phrase("his dog") != normalise_phrase("the dog")
    assert normalise_phrase("The") == "the"
    assert normalise_phrase("another dog") == "another dog"
    assert normalise_phrase("?!") == "?!"
