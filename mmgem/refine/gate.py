"""The scores of several encoders as one, and what passes.

Receives cosines of pairs by each encoder, and what cosines of wrong pairs look like. Gives one score a pair: how many
standard deviations a pair lies above those that do not belong together, so that encoders can be compared. Refuses, with
a UserError, too few pairs to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmgem.errors import UserError

Combine = Literal["min", "mean"]
Floats = NDArray[np.float64]

_FEWEST = 8


@dataclass(frozen=True, slots=True)
class Gate:
    """mean, deviation: of each encoder's cosines of wrong pairs. threshold: what a pair's score must reach.

    combine: `min`, all encoders have to reach it; `mean`, their mean has to.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    combine: Combine
    threshold: float

    @classmethod
    def of_wrong_pairs(cls, names: Sequence[str], cosines_KN: Floats, combine: Combine, threshold: float) -> Gate:
        """cosines_KN: of each of K encoders, those of N pairs put together by lot."""
        if cosines_KN.shape[1] < _FEWEST:
            raise UserError(f"{cosines_KN.shape[1]} pairs are too few to tell right from wrong; at least {_FEWEST}")
        deviation = np.maximum(cosines_KN.std(axis=1), 1e-6)
        return cls(tuple(names), tuple(cosines_KN.mean(axis=1)), tuple(deviation), combine, threshold)

    def standardised(self, cosines_KN: Floats) -> Floats:
        return (cosines_KN - np.array(self.mean)[:, None]) / np.array(self.deviation)[:, None]

    def scores(self, cosines_KN: Floats) -> Floats:
        """[N]"""
        standard_KN = self.standardised(cosines_KN)
        return standard_KN.min(axis=0) if self.combine == "min" else standard_KN.mean(axis=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "encoders": list(self.names),
            "wrong_pairs": {"mean": list(self.mean), "deviation": list(self.deviation)},
            "combine": self.combine,
            "threshold": self.threshold,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Gate:
        wrong = content["wrong_pairs"]
        return cls(
            tuple(content["encoders"]),
            tuple(wrong["mean"]),
            tuple(wrong["deviation"]),
            content["combine"],
            content["threshold"],
        )
