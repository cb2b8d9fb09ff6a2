"""Which sample stands where: pure arithmetic, no I/O, no state.

Receives the number of samples, a seed and a global position. Gives the epoch and the sample's number. The same
position means the same sample whatever read before it, so a run resumes exactly from one integer.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Order:
    """Positions 0, 1, 2 … of a stage: each epoch is another permutation of the samples."""

    def __init__(self, samples: int, seed: int):
        self.samples = samples
        self.seed = seed

    def at(self, position: int) -> tuple[int, int]:
        """Global position -> (epoch, number of the sample)."""
        epoch, offset = divmod(position, self.samples)
        return epoch, int(_permutation(self.samples, self.seed, epoch)[offset])


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def draws(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """Random numbers for one sample's views, captions or boxes; `purpose` keeps them independent of each other."""
    return np.random.default_rng([seed, epoch, sample, purpose])
