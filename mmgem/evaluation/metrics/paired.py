"""Differences of figures between two models that were measured on the same items.

Receives the `Items` of both by figure. Gives for each figure both values, their difference, and what resampling says of
it: standard error, 95 % interval, p. Both models get the same draws of the same units, so what makes an item hard for
both does not count. Refuses items that are not the same ones, with a ValueError.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mmgem.evaluation.metrics.captions import bleu
from mmgem.evaluation.metrics.scores import Combine, Floats, Ints, Items, resample_weights, units_of


@dataclass(frozen=True, slots=True)
class Paired:
    """A figure of two models. difference: b - a. low, high: of its 95 % interval. p: two-sided. samples: drawn."""

    a: float
    b: float
    difference: float
    stderr: float
    low: float
    high: float
    p: float
    samples: int


def paired_bootstrap(
    a: Mapping[str, Items], b: Mapping[str, Items], *, samples: int = 10_000, seed: int = 0
) -> dict[str, Paired]:
    """For each figure in both: the paired bootstrap (Efron and Tibshirani 1993; for BLEU Koehn 2004).

    In each of `samples` resamples (fewer for many units, see `resample_weights`) units are drawn with replacement, all
    items of a unit together, and both models' figures are worked out from the same draw. The interval lies between the
    2.5th and the 97.5th percentile of the differences. p is twice the share of resamples, counted with one more, whose
    difference is 0 or on the other side of it: the interval inverted, at most 1.
    """
    out: dict[str, Paired] = {}
    for names in _of_same_units(a, b):
        unit_N = _units(a[names[0]])
        units = int(unit_N.max()) + 1 if len(unit_N) else 0
        pairs = {name: (_of_draw(a[name], unit_N, units), _of_draw(b[name], unit_N, units)) for name in names}
        rows: dict[str, list[Floats]] = {name: [] for name in names}
        for weights_CU in resample_weights(units, samples, seed):
            for name, (of_a, of_b) in pairs.items():
                rows[name].append(of_b(weights_CU) - of_a(weights_CU))
        for name in names:
            out[name] = _told(figure(a[name]), figure(b[name]), np.concatenate(rows[name]))
    return {name: out[name] for name in a if name in out}


def figure(items: Items) -> float:
    """What the items make: their mean, their median, or the BLEU of all."""
    unit_N = np.zeros(len(items.values_NS), dtype=np.int64)
    if items.combine == "median":
        return float(np.median(items.values_NS))
    return float(_of_draw(items, unit_N, 1)(np.ones((1, 1)))[0])


def same_units(a: Items, b: Items) -> bool:
    """Whether the items are the same in number, and drawn together in the same way."""
    return a.combine == b.combine and a.values_NS.shape == b.values_NS.shape and np.array_equal(_units(a), _units(b))


def _units(items: Items) -> Ints:
    return units_of(items.unit_N, len(items.values_NS))


def _of_same_units(a: Mapping[str, Items], b: Mapping[str, Items]) -> Iterator[list[str]]:
    """The figures in both, those drawn by the same units together: the draws are most of the work."""
    left = [name for name in a if name in b]
    for name in left:
        if not same_units(a[name], b[name]):
            raise ValueError(f"{name}: the two were not measured on the same items")
    while left:
        unit_N = _units(a[left[0]])
        same = [name for name in left if np.array_equal(_units(a[name]), unit_N)]
        yield same
        left = [name for name in left if name not in same]


def _of_draw(items: Items, unit_N: Ints, units: int) -> Callable[[Floats], Floats]:
    """The figure as a function of how often each unit is drawn, [C, U] → [C]."""
    if items.combine == "median":
        return _median(items.values_NS[:, 0], unit_N)
    sums_NS = np.concatenate([items.values_NS, np.ones((len(unit_N), 1))], axis=1)
    sums_US = np.zeros((units, sums_NS.shape[1]))
    np.add.at(sums_US, unit_N, sums_NS)
    combine = _combined(items.combine)
    return lambda weights_CU: combine(weights_CU @ sums_US)


def _combined(combine: Combine) -> Callable[[Floats], Floats]:
    """From summed rows, with the number of items last, to the figure."""
    if combine == "mean":
        return lambda sums_CS: sums_CS[:, 0] / sums_CS[:, -1]
    order = int(combine.removeprefix("BLEU@"))
    return lambda sums_CS: bleu(sums_CS[:, :-1])[:, order - 1]


def _median(values_N: Floats, unit_N: Ints) -> Callable[[Floats], Floats]:
    """As numpy's: the mean of the two in the middle where the number of items is even."""
    order_N = np.argsort(values_N, kind="stable")
    sorted_N, unit_N = values_N[order_N], unit_N[order_N]

    def of_draw(weights_CU: Floats) -> Floats:
        out = np.empty(len(weights_CU))
        for c, weights_U in enumerate(weights_CU):  # one row at a time: [C, N] would be large where units are few
            upto_N = np.cumsum(weights_U[unit_N])
            half = upto_N[-1] / 2
            first, second = np.searchsorted(upto_N, half), np.searchsorted(upto_N, half, side="right")
            out[c] = (sorted_N[first] + sorted_N[second]) / 2
        return out

    return of_draw


def _told(a: float, b: float, differences: Floats) -> Paired:
    count = len(differences)
    low, high = np.percentile(differences, [2.5, 97.5])
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (int(smaller) + 1) / (count + 1))
    return Paired(a, b, b - a, float(differences.std(ddof=1)), float(low), float(high), p, count)
