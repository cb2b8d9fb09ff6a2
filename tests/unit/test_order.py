"""The order of samples: each once an epoch whoever reads them, exact shares of sources, and a shuffle as a uniform one.

The statistics at the end compare figures of the order with what a uniform random permutation gives. Each has a
p-value: how likely a uniform permutation is as far from its own mean. Below `LEAST` the order is not taken for uniform.
Seeds are fixed, so nothing here is left to chance; a sound order of other numbers would fail one of the about 70
figures with a chance below 1 %.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem.data.datamodule import StageSampler
from mmgem.data.order import PERIOD, Order, draws, permute
from mmgem.errors import UserError

# --- every sample once, whoever reads --------------------------------------------------------------------------------

any_of = settings(deadline=None, derandomize=True, database=None, max_examples=60)
"""The same examples in each run."""

SHARDS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 150]) | st.integers(0, 30), min_size=1, max_size=9).filter(any)
"""Sizes of a source's shards: some empty, some many times as large as others, or one sample in all."""
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**32 - 1),
    "window": st.integers(1, 12),
    "lanes": st.integers(1, 40),
}
READERS: dict[str, st.SearchStrategy[Any]] = {
    "ranks": st.integers(1, 5),
    "of_rank": st.integers(1, 7),
    "workers": st.integers(1, 3),
    "resumed": st.integers(0, 5),
}


@any_of
@given(sizes=SHARDS, **COMMON)
def test_every_sample_comes_once_an_epoch(sizes: list[int], seed: int, window: int, lanes: int):
    order, samples = Order(sizes, seed, window, lanes), sum(sizes)
    epoch_P, sample_P = order.places(range(3 * samples))
    assert epoch_P.tolist() == np.repeat(range(3), samples).tolist()
    assert np.array_equal(np.sort(sample_P.reshape(3, -1)), np.tile(np.arange(samples), (3, 1)))
    assert [order.at(p) for p in range(7)] == list(zip(*(x.tolist() for x in order.places(range(7))), strict=True))


@any_of
@given(sources=st.lists(st.tuples(SHARDS, st.integers(1, 9)), min_size=2, max_size=4), **COMMON)
def test_every_sample_of_a_weighted_source_comes_once_in_each_epoch_of_its_own(
    sources: list[tuple[list[int], int]], seed: int, window: int, lanes: int
):
    order = order_of(sources, seed, window, lanes)
    assert_own_epochs(*order.places(range(120)), [sum(sizes) for sizes, _ in sources])


def assert_own_epochs(epoch_P: np.ndarray, sample_P: np.ndarray, samples_of_sources: Sequence[int]) -> None:
    """What positions 0 … P - 1 hold of each source are its epochs, one after the other, the last one cut off."""
    ends = np.cumsum(samples_of_sources)
    source_P = np.searchsorted(ends, sample_P, side="right")
    for number, samples in enumerate(samples_of_sources):
        own_P = source_P == number
        epoch_N, sample_N = epoch_P[own_P], sample_P[own_P] - (ends[number] - samples)
        assert np.array_equal(epoch_N, np.arange(len(epoch_N)) // samples)
        whole, rest = divmod(len(sample_N), samples)
        epochs = np.sort(sample_N[: whole * samples].reshape(whole, samples))
        assert np.array_equal(epochs, np.tile(np.arange(samples), (whole, 1)))
        assert len(np.unique(sample_N[whole * samples :])) == rest


@any_of
@given(sources=st.lists(st.tuples(SHARDS, st.integers(1, 9)), min_size=1, max_size=3), **COMMON, **READERS)
def test_global_batches_depend_neither_on_ranks_nor_on_workers_nor_on_what_was_read_before(
    sources: list[tuple[list[int], int]],
    seed: int,
    window: int,
    lanes: int,
    ranks: int,
    of_rank: int,
    workers: int,
    resumed: int,
):
    order, steps, batch = order_of(sources, seed, window, lanes), 6, ranks * of_rank
    alone = list(StageSampler(order, 0, steps, batch))
    assert [sorted(step) for step in alone] == np.arange(steps * batch).reshape(steps, batch).tolist()

    of_ranks = [list(StageSampler(order, 0, steps, batch, rank, ranks)) for rank in range(ranks)]
    assert [len(positions) for positions in of_ranks] == [steps] * ranks
    assert {len(part) for positions in of_ranks for part in positions} == {of_rank}
    assert [list(itertools.chain(*parts)) for parts in zip(*of_ranks, strict=True)] == alone

    # Worker w of W reads the batches w, w + W …, each with a copy of the order.
    copies = [pickle.loads(pickle.dumps(order)) for _ in range(workers)]
    epoch_P, sample_P = order.places(range(steps * batch))
    for positions in of_ranks:
        for number, part in enumerate(positions):
            epoch_B, sample_B = copies[number % workers].places(part)
            assert np.array_equal(epoch_B, epoch_P[part]) and np.array_equal(sample_B, sample_P[part])

    fresh = order_of(sources, seed, window, lanes)
    for rank, positions in enumerate(of_ranks):
        rest = StageSampler(fresh, resumed * batch, steps, batch, rank, ranks)
        assert list(rest) == positions[resumed:] and len(rest) == steps - resumed
    assert np.array_equal(fresh.places(range(resumed * batch, steps * batch))[1], sample_P[resumed * batch :])


def order_of(sources: Sequence[tuple[list[int], int]], seed: int, window: int, lanes: int) -> Order:
    """One source has no weight."""
    sizes = [size for shards, _ in sources for size in shards]
    weighted = [(len(shards), float(weight)) for shards, weight in sources] if len(sources) > 1 else []
    return Order(sizes, seed, window, lanes, weighted)


@any_of
@given(sizes=st.lists(st.integers(1, 30) | st.integers(1, 300), min_size=1, max_size=8), seed=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(sizes: list[int], seed: int):
    size_P = np.repeat(sizes, sizes)
    index_P = np.concatenate([np.arange(size) for size in sizes])
    found_P = permute(index_P, size_P, np.full(len(size_P), seed, dtype=np.uint64))
    for begin, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        assert sorted(found_P[begin : begin + size].tolist()) == list(range(size))


def test_the_order_is_the_same_in_every_version():
    """Written down, so that a run can be resumed by a later version."""
    order = Order([5, 0, 3, 4], seed=0, window=2, lanes=2)
    assert order.places(range(24))[1].tolist() == [
        *(9, 8, 6, 3, 11, 1, 10, 0, 5, 4, 7, 2),
        *(0, 8, 3, 5, 1, 7, 2, 6, 4, 11, 10, 9),
    ]
    weighted = Order([5, 0, 3, 4], seed=1, sources=[(3, 2.0), (1, 1.0)])
    assert [weighted.at(p) for p in range(8)] == [(0, n) for n in (1, 3, 8, 6, 10, 7, 9, 0)]
    assert weighted.step(2, 8).tolist() == [16, 19, 17, 23, 18, 20, 21, 22]


def test_draws_are_independent_of_each_other():
    keys = list(itertools.product((0, 1, 2**31), (0, 1), (0, 1, 2**33), (0, 1)))
    values = [tuple(draws(*key).integers(1 << 30, size=3)) for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [tuple(draws(*key).integers(1 << 30, size=3)) for key in keys]


# --- windows, lanes, sizes -------------------------------------------------------------------------------------------


def test_a_lane_reads_one_window_of_shards_after_the_other():
    """Two lanes of 500: a rank that has one reads two shards at a time, and a batch has samples of four."""
    order = Order(np.full(10, 100), seed=0, window=2, lanes=2)
    for rank in range(2):
        met = [order.step(step, 20, rank, 2) for step in range(50)]
        assert all(set(positions % 2) == {rank} for positions in met)
        for positions in met:
            assert {sample // 100 for sample in order.places(positions)[1].tolist()} <= set(order.shards(positions))
        windows = [tuple(order.shards(positions)) for positions in met]
        changes = [window for window, _ in itertools.groupby(windows)]
        assert [len(window) for window in changes] == [2, 2, 2] and len(set(itertools.chain(*changes))) == 6
    assert len(order.shards(order.step(0, 20))) == 4


def test_what_comes_next_is_of_the_same_lanes():
    """In each source, whatever the others' shares: a reader fetches no shards ahead that are another's."""
    order = Order(np.full(64, 10), 0, window=2, lanes=4, sources=[(32, 0.7), (32, 0.3)])
    lane_P = order.lanes_of(np.arange(1200))
    for lane in range(4):
        visits = [(p, tuple(order.shards([p]))) for p in np.flatnonzero(lane_P == lane).tolist()]
        for source in (range(32), range(32, 64)):
            own = [(p, window) for p, window in visits if window[0] in source][:80]  # its first epoch in this lane
            windows = [window for window, _ in itertools.groupby(window for _, window in own)]
            following = dict(itertools.pairwise(windows))
            assert len(following) == 3
            assert all(tuple(order.shards([p], windows_on=1)) == following[w] for p, w in own if w in following)


def test_shards_are_numbered_through_all_sources():
    order = Order([4, 4, 4, 7, 7], seed=0, window=1, lanes=1, sources=[(3, 1.0), (2, 1.0)])
    starts = np.array([0, 4, 8, 12, 19])
    for position in range(200):
        shard = int(np.searchsorted(starts, order.at(position)[1], side="right")) - 1
        assert order.shards([position]) == [shard]


def test_ten_billion_samples_are_planned_in_under_a_second_and_in_little_memory():
    sizes = np.random.default_rng(0).integers(50_000, 150_001, 100_000)
    started = time.process_time()
    order = Order(sizes, seed=0)
    order.places(order.step(0, 4096))
    assert time.process_time() - started < 1
    assert order.samples > 9_900_000_000
    tracemalloc.start()
    measured = Order(sizes, seed=0)
    measured.places(measured.step(0, 4096))
    assert tracemalloc.get_traced_memory()[1] < 20 << 20  # 200 bytes a shard
    tracemalloc.stop()


@pytest.mark.parametrize("epoch", [0, 1, 40_000_000])
def test_ten_billion_samples_have_each_its_place(epoch: int):
    """Whole windows of the first and the last lane hold all samples of their shards, each once."""
    sizes = np.random.default_rng(1).integers(5, 200_000, 100_000)
    order, ends = Order(sizes, seed=5, window=2, lanes=8), np.cumsum(sizes)
    first = epoch * order.samples
    assert order.at(first)[0] == order.at(first + order.samples - 1)[0] == epoch
    assert order.at(first + order.samples) == Order(sizes, seed=5, window=2, lanes=8).at(first + order.samples)
    shards = [order.shards([first])]
    count = int(sizes[shards[0]].sum())
    shards.append(order.shards([first + 8 * count]))
    count += int(sizes[shards[1]].sum())
    epoch_P, sample_P = order.places(first + 8 * np.arange(count))
    assert set(epoch_P.tolist()) == {epoch}
    wanted = [np.arange(ends[shard] - sizes[shard], ends[shard]) for shard in sorted(itertools.chain(*shards))]
    assert len(wanted) == 4 and np.array_equal(np.sort(sample_P), np.concatenate(wanted))
    anywhere = first + np.random.default_rng(2).choice(order.samples, 100_000)
    found = order.places(anywhere)[1]
    assert found.min() >= 0 and found.max() < order.samples
    assert len(np.unique(found)) == len(np.unique(anywhere))


# --- shares of sources -----------------------------------------------------------------------------------------------

SHARES = (0.6, 0.3, 0.0777, 0.0223)
"""Of ten, five, two and one shards of 100 samples."""


@functools.cache
def weighted_order() -> Order:
    weights = [7 * share for share in SHARES]
    return Order(np.full(18, 100), 3, sources=list(zip([10, 5, 2, 1], weights, strict=True)))


def sources_of(positions: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.searchsorted([1000, 1500, 1700], weighted_order().places(positions)[1], side="right")


def test_own_epochs_go_on_over_the_periods_of_the_pattern():
    assert_own_epochs(*weighted_order().places(np.arange(4 * PERIOD)), [1000, 500, 200, 100])


def test_any_ten_thousand_positions_have_the_exact_shares():
    source_P = sources_of(np.arange(4 * PERIOD))
    for begin in (0, 1, 2_500, 9_999, 17_321, 30_000):
        counts = np.bincount(source_P[begin : begin + PERIOD])
        assert counts.tolist() == [6000, 3000, 777, 223]


def test_shares_that_are_no_whole_positions_are_kept_to_one():
    order = Order([200] * 7, 0, sources=[(1, weight) for weight in (1, 1, 1, 2.5, 0.003, math.pi, math.e)])
    share = np.array([1, 1, 1, 2.5, 0.003, math.pi, math.e])
    counts = np.bincount(order.places(range(123, 123 + PERIOD))[1] // 200)
    assert counts.sum() == PERIOD
    assert (abs(counts - PERIOD * share / share.sum()) < 1).all()  # 0.01 %; 0.1 % is what is promised


def test_batches_have_the_shares_and_so_has_each_rank():
    """A source's places are spread evenly: a batch has its share to within so many samples as there are sources."""
    order, share = weighted_order(), np.array(SHARES)
    for step in range(100):
        counts = np.bincount(sources_of(order.step(step, 256)), minlength=4)
        assert (abs(counts - 256 * share) <= 4).all()
    of_rank = [np.concatenate([order.step(step, 256, rank, 4) for step in range(200)]) for rank in range(4)]
    for positions in of_rank:
        assert (abs(np.bincount(sources_of(positions)) / len(positions) - share) < 0.01).all()


def test_a_weight_that_has_no_position_is_refused():
    Order([10, 10], 0, sources=[(1, 1.0), (1, 1e-4)])
    with pytest.raises(UserError, match=r"data.sources: a weight is below 1/10000 of their sum \(\[1.0, 4e-05\]\)"):
        Order([10, 10], 0, sources=[(1, 1.0), (1, 4e-5)])


# --- as good as a uniform shuffle ------------------------------------------------------------------------------------

LEAST = 1e-4


def of_normal(value: float) -> float:
    """Two-sided p-value of a standard normal figure."""
    return math.erfc(abs(value) / math.sqrt(2))


def of_chi_square(statistic: float, freedom: float) -> float:
    """Two-sided: what fits too well is no shuffle either."""
    above = torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()).item()
    return 2 * min(above, 1 - above)


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's statistic."""
    return float(((found - wanted) ** 2 / wanted).sum())


def assert_uniform(shuffles_KN: np.ndarray) -> None:
    """K permutations of 0 … N - 1 (place -> number) look uniform and independent."""
    found = {**figures_of_places(shuffles_KN), **figures_of_neighbours(shuffles_KN)}
    assert min(found.values()) > LEAST, found


def figures_of_places(shuffles_KN: np.ndarray) -> dict[str, float]:
    """Where numbers come to. In the table of 8 parts of the places by 8 parts of the numbers, whose margins are fixed,
    Pearson's statistic times (N - 1) / N has mean 7 x 7 (Haldane 1940). The number of fixed points has mean and
    variance 1. The correlation of place and number has mean 0 and variance 1 / (N - 1) (Kendall 1948)."""
    count, size = shuffles_KN.shape
    part_N = np.arange(size) * 8 // size
    cell_KN = (np.arange(count)[:, None] * 8 + part_N) * 8 + part_N[shuffles_KN]
    table_K88 = np.bincount(cell_KN.ravel(), minlength=count * 64).reshape(count, 8, 8)
    margin_8 = np.bincount(part_N)
    wanted_88 = np.outer(margin_8, margin_8) / size
    shrunk = (size - 1) / size
    fixed = int((shuffles_KN == np.arange(size)).sum())
    centred_N = np.arange(size) - (size - 1) / 2
    correlation_K = centred_N[shuffles_KN] @ centred_N / (centred_N @ centred_N)
    return {
        "places in each permutation": of_chi_square(shrunk * deviation(table_K88, wanted_88), 49 * count),
        "places in all": of_chi_square(shrunk * deviation(table_K88.sum(0), count * wanted_88), 49),
        "fixed points": of_normal((fixed - count) / math.sqrt(count)),
        "correlation of place and number": of_normal(correlation_K.sum() * math.sqrt((size - 1) / count)),
        "its square": of_chi_square((size - 1) * float((correlation_K**2).sum()), count),
    }


def figures_of_neighbours(shuffles_KN: np.ndarray) -> dict[str, float]:
    """What stands side by side. Two neighbours are d apart with chance 2 (N - d) / (N (N - 1)): compared for each d,
    over pairs that have no number in common. Of all neighbours 2 (N - 1) / N are 1 apart, with variance 2 for large N
    (Kaplansky 1945). The sum of the products of neighbours, of deviation 1, has mean -1 and variance N for large N
    (Wald and Wolfowitz 1943)."""
    count, size = shuffles_KN.shape
    pairs_P2 = shuffles_KN[:, : size // 2 * 2].reshape(-1, 2)
    distance_D = np.arange(1, size)
    wanted_D = len(pairs_P2) * 2 * (size - distance_D) / (size * (size - 1))
    found_D = np.bincount(abs(pairs_P2[:, 0] - pairs_P2[:, 1]), minlength=size)[1:]
    bin_D = np.unique((np.cumsum(wanted_D) / 10).astype(np.int64), return_inverse=True)[1]  # of about ten or more
    found, wanted = np.bincount(bin_D, found_D), np.bincount(bin_D, wanted_D)
    side_by_side = int((abs(np.diff(shuffles_KN)) == 1).sum()) - count * 2 * (size - 1) / size
    scaled_KN = (shuffles_KN - (size - 1) / 2) / math.sqrt((size**2 - 1) / 12)
    products_K = (scaled_KN[:, 1:] * scaled_KN[:, :-1]).sum(1)
    return {
        "distances of neighbours": of_chi_square(deviation(found, wanted), len(wanted) - 1),
        "neighbours 1 apart": of_normal(side_by_side / math.sqrt(2 * count)),
        "products of neighbours": of_normal(float((products_K + 1).sum()) / math.sqrt(size * count)),
    }


def after(first_KN: np.ndarray, second_KN: np.ndarray) -> np.ndarray:
    """Which place in the second has what is at each place of the first: uniform where they are independent."""
    return np.take_along_axis(np.argsort(second_KN), first_KN, axis=1)


@functools.cache
def walked(seed: int, epoch: int) -> np.ndarray:
    """The samples of 1,000 shards of 1,000 as 8 lanes walk through them, one lane after the other."""
    order = Order(np.full(1000, 1000), seed, window=4, lanes=8)
    positions = epoch * order.samples + np.arange(order.samples).reshape(-1, 8).T.ravel()
    return order.places(positions)[1]


def windows_of(seed: int, epoch: int) -> np.ndarray:
    """The permutation in each window of four shards, whose samples are numbered by shard."""
    sample_WN = walked(seed, epoch).reshape(250, 4000)
    shards_W4 = np.sort(sample_WN // 1000, axis=1)[:, ::1000]
    whole_WN = (1000 * shards_W4[:, :, None] + np.arange(1000)).reshape(250, 4000)
    assert np.array_equal(np.sort(sample_WN), whole_WN)
    slot = np.empty(1000, dtype=np.int64)
    slot[shards_W4] = np.arange(4)
    return 1000 * slot[sample_WN // 1000] + sample_WN % 1000


def inside_shards(seed: int, epoch: int) -> np.ndarray:
    """The order in which each shard's samples come."""
    place_SN = np.empty(1_000_000, dtype=np.int64)
    place_SN[walked(seed, epoch)] = np.arange(1_000_000)
    return np.argsort(place_SN.reshape(1000, 1000))


@functools.cache
def orders_of_shards() -> np.ndarray:
    """Of 300 epochs."""
    return Order(np.ones(1000), seed=0, window=1, lanes=1).places(np.arange(300_000))[1].reshape(300, 1000)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_few_are_as_likely(size: int):
    drawn = _permutations(size, 6000)
    counts = np.unique(drawn @ 10 ** np.arange(size), return_counts=True)[1]
    each = math.factorial(size)
    assert len(counts) == each
    assert of_chi_square(deviation(counts, np.full(each, 6000 / each)), each - 1) > LEAST


@pytest.mark.parametrize("size", [7, 8, 9, 21, 25, 49])
def test_half_of_all_permutations_are_odd(size: int):
    """Whatever the sides of the network: with two odd ones none would be."""
    drawn, odd = _permutations(size, 2000), np.zeros(2000, dtype=bool)
    for one, other in itertools.combinations(range(size), 2):
        odd ^= drawn[:, one] > drawn[:, other]
    assert of_normal((odd.sum() - 1000) / math.sqrt(500)) > LEAST


def _permutations(size: int, keys: int) -> np.ndarray:
    index_P, size_P = np.tile(np.arange(size), keys), np.full(keys * size, size)
    return permute(index_P, size_P, np.repeat(np.arange(keys, dtype=np.uint64), size)).reshape(keys, size)


def test_windows_are_shuffled_and_each_in_its_own_way():
    windows_WN = windows_of(0, 0)
    assert_uniform(windows_WN)
    assert_uniform(after(windows_WN[::2], windows_WN[1::2]))
    assert_uniform(after(windows_WN, windows_of(0, 1)))


def test_another_epoch_and_another_seed_have_another_order_of_samples():
    inside_SN = inside_shards(0, 0)
    assert_uniform(inside_SN)
    assert_uniform(after(inside_SN, inside_shards(0, 1)))
    assert_uniform(after(inside_SN, inside_shards(1, 0)))


def test_shards_are_shuffled_in_each_epoch_with_each_seed_and_in_each_source():
    orders_EN = orders_of_shards()
    assert_uniform(orders_EN)
    assert_uniform(after(orders_EN[::2], orders_EN[1::2]))
    seeds_KN = np.stack([Order(np.ones(500), seed, 1, 1).places(np.arange(500))[1] for seed in range(200)])
    assert_uniform(after(seeds_KN[::2], seeds_KN[1::2]))
    # A hundred sources of a hundred shards have each an epoch in so many positions.
    sample_P = Order(np.ones(PERIOD), 0, 1, 1, [(100, 1.0)] * 100).places(np.arange(PERIOD))[1]
    sources_KN = sample_P[np.argsort(sample_P // 100, kind="stable")].reshape(100, 100) % 100
    assert_uniform(after(sources_KN[::2], sources_KN[1::2]))


def test_shards_share_a_window_by_chance_only():
    """Of 1,500 pairs of an epoch 3 in 999 share one in the next epoch too; over 299 epochs by Poisson's law."""
    shard_EW4 = Order(np.ones(1000), seed=0, window=4, lanes=1).places(np.arange(300_000))[1].reshape(300, 250, 4)
    pairs = [
        {tuple(pair) for window in windows.tolist() for pair in itertools.combinations(window, 2)}
        for windows in np.sort(shard_EW4)
    ]
    again = sum(len(one & other) for one, other in itertools.pairwise(pairs))
    wanted = 299 * 1500 * 3 / 999
    assert of_normal((again - wanted) / math.sqrt(wanted)) > LEAST


@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_neighbours_are_neighbours_again_by_chance_only(other: tuple[int, int]):
    """Of 250 x 3,999 pairs of neighbours in windows those of one shard (999 in 3,999) meet again with chance 2 / 4,000;
    the rest must first share a window, with chance 3 / 999. That is about 126, by Poisson's law."""
    place_N = np.empty(1_000_000, dtype=np.int64)
    place_N[walked(*other)] = np.arange(1_000_000)
    again = int((abs(np.diff(place_N[walked(0, 0)])) == 1).sum())
    wanted = 250 * (999 + 3000 * 3 / 999) * 2 / 4000
    assert of_normal((again - wanted) / math.sqrt(wanted)) > LEAST


def test_a_batch_draws_from_all_shards_of_its_windows():
    """A batch of 256 has 32 samples of each of 8 lanes. Those of one window are of its four shards, as if drawn from
    the 4,000 at random: Pearson's statistic has mean 3 (4000 - 32) / 3999, its variance is nearly 6."""
    order, steps = Order(np.full(1000, 1000), seed=0, window=4, lanes=8), np.arange(0, 3906, 5)
    positions = np.concatenate([order.step(step, 256) for step in steps.tolist()])
    shard_SL = order.places(positions)[1].reshape(-1, 8, 32) // 1000
    first_SL = 125_000 * np.arange(8) + 32 * steps[:, None]
    in_one = first_SL // 4000 == (first_SL + 31) // 4000
    slots = [np.unique(shards, return_counts=True)[1] for shards in shard_SL[in_one]]
    assert {len(counts) for counts in slots} <= {3, 4}
    statistics = [(counts**2).sum() / 8 - 32 for counts in slots]
    z = (np.mean(statistics) - 3 * 3968 / 3999) / math.sqrt(6 / len(slots))
    assert of_normal(float(z)) > LEAST
    of_batch = np.array([len(np.unique(shards)) for shards in shard_SL[in_one.all(1)]])
    assert len(of_batch) > 500 and of_batch.max() == 32 and of_batch.mean() > 31.9
