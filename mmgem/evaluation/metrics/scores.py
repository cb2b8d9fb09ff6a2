"""What every metric gives back, and the standard error that stands beside it.

Receives per-item sums; gives standard errors by resampling the items, and the items themselves for comparisons. Refuses
empty sets.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK_ELEMENTS = 4_000_000  # random draws held at once: 32 MB
_MAX_DRAWS = 50_000_000  # in all: past it fewer resamples are drawn, never fewer than 100


Combine = Literal["mean", "median", "BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4"]


@dataclass(frozen=True, slots=True)
class Items:
    """What a figure was made of, item by item, so that two models can be compared on the same items.

    values_NS: one row an item: [N, 1] of what is averaged or has a median, [N, 10] `bleu_counts`.
    unit_N: [N] int64, items of one number are drawn together (those of one image), or None.
    """

    values_NS: Floats
    combine: Combine = "mean"
    unit_N: Ints | None = None


@dataclass(slots=True)
class Scores:
    """Named figures: the value, its standard error, what a blind guess would get, and the items."""

    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    items: dict[str, Items] = field(default_factory=dict)

    def update(self, other: "Scores") -> None:
        """Take over the figures of `other`."""
        self.metrics.update(other.metrics)
        self.stderr.update(other.stderr)
        self.chance.update(other.chance)
        self.items.update(other.items)

    def prefixed(self, prefix: str) -> "Scores":
        """The same figures with `prefix` in front of every name."""

        def renamed(figures: dict[str, T]) -> dict[str, T]:
            return {prefix + name: value for name, value in figures.items()}

        return Scores(renamed(self.metrics), renamed(self.stderr), renamed(self.chance), renamed(self.items))

    @classmethod
    def of_means(
        cls,
        values: Mapping[str, Floats],
        *,
        chance: Mapping[str, float] | None = None,
        groups: Ints | None = None,
        samples: int = 1000,
        seed: int = 0,
    ) -> "Scores":
        """The means of named quantities [N] of the same N items, with standard errors (0 samples: without)."""
        values_NK = np.stack(list(values.values()), axis=1).astype(np.float64)
        out = cls(dict(zip(values, values_NK.mean(axis=0).tolist(), strict=True)), {}, dict(chance or {}))
        if samples:
            errors = mean_stderr(values_NK, groups=groups, samples=samples, seed=seed)
            out.stderr = dict(zip(values, errors.tolist(), strict=True))
        out.items = {name: Items(values_NK[:, k : k + 1], "mean", groups) for k, name in enumerate(values)}
        return out


def resample_weights(units: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn in each resample, in chunks [c, units]; seeded."""
    if units < 1:
        raise ValueError("nothing to resample: the set is empty")
    samples = max(min(samples, 100), min(samples, _MAX_DRAWS // units))
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // units)
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        draws = rng.integers(0, units, size=(rows, units))
        draws += np.arange(rows)[:, None] * units
        counts = np.bincount(draws.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)


def units_of(groups: Ints | None, items: int) -> Ints:
    """[items] number of the unit each item belongs to, from 0 on; without groups each its own."""
    if groups is None:
        return np.arange(items)
    if len(groups) != items:
        raise ValueError(f"{len(groups)} groups for {items} items")
    return np.unique(groups, return_inverse=True)[1]


def bootstrap_stderr(
    sums_NS: Floats,
    combine: Callable[[Floats], Floats],
    *,
    groups: Ints | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Floats:
    """Standard errors of figures that are functions of summed per-item quantities.

    sums_NS: one row an item (a mean has the columns value and 1; BLEU its n-gram counts).
    combine: maps summed rows [c, S] to figures [c, K].
    groups: items with one id are drawn together (captions of one image are not independent).
    Gives [K], the standard deviation over `samples` resamples with replacement (Efron 1979).
    """
    unit_N = units_of(groups, len(sums_NS))
    units = int(unit_N.max()) + 1 if len(unit_N) else 0
    sums_US = np.zeros((units, sums_NS.shape[1]))
    np.add.at(sums_US, unit_N, sums_NS)
    rows = [combine(weights @ sums_US) for weights in resample_weights(units, samples, seed)]
    return np.concatenate(rows).std(axis=0, ddof=1)


def mean_stderr(values_NK: Floats, *, groups: Ints | None = None, samples: int = 1000, seed: int = 0) -> Floats:
    """Standard errors [K] of the means of K quantities over N items."""
    sums = np.concatenate([values_NK, np.ones((len(values_NK), 1))], axis=1)
    return bootstrap_stderr(sums, lambda s: s[:, :-1] / s[:, -1:], groups=groups, samples=samples, seed=seed)


def median_stderr(values_N: Floats, *, groups: Ints | None = None, samples: int = 1000, seed: int = 0) -> float:
    """Standard error of the median of N values."""
    unit_N = units_of(groups, len(values_N))
    units = int(unit_N.max()) + 1 if len(unit_N) else 0
    order = np.argsort(values_N, kind="stable")
    medians = []
    for weights in resample_weights(units, samples, seed):
        for row in weights:  # one row at a time: [c, N] would be large where units are few
            cumulated = np.cumsum(row[unit_N[order]])
            medians.append(values_N[order[np.searchsorted(cumulated, cumulated[-1] / 2)]])
    return float(np.std(medians, ddof=1))
