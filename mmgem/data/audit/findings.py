"""What was found: counted without end, named up to a bound.

Receives one finding after the other, each with the name of its sample or file. Gives them by reason. Refuses nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mmgem.data.index import OFF_MEMBER as OFF_MEMBER
from mmgem.data.index import OTHER_COUNT as OTHER_COUNT
from mmgem.data.samples import BOX_NO_NUMBERS, BOX_OUTSIDE, BOX_WITHOUT_AREA, EMPTY_CAPTION, EMPTY_PHRASE

MOST_NAMES = 10_000
"""Of one reason in one split; the count goes on."""

# Of a shard or an index. The reader's own reasons for a damaged shard join them.
UNREADABLE = "shard cannot be read"
BROKEN_TAR = "tar is broken"
OTHER_TOTALS = "totals are not those of the index"
# Of a sample that training takes.
BOX_OVER_BORDER = "box more than a pixel over the border"
OTHER_SIZE = "recorded size is not the picture's (no boxes)"
KEY_ELSEWHERE = "key is also in another split"
# Of what training never sees.
LEFT_OUT = "left out when the index was made"

WARNINGS = frozenset(
    {
        *(EMPTY_CAPTION, EMPTY_PHRASE, BOX_OUTSIDE, BOX_WITHOUT_AREA, BOX_NO_NUMBERS),
        *(BOX_OVER_BORDER, OTHER_SIZE, KEY_ELSEWHERE, LEFT_OUT),
    }
)
"""Training drops, clips, does not mind or does not see these. Every other finding makes the check fail."""


@dataclass
class Findings:
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Reason -> (name, detail) of the first MOST_NAMES."""

    def add(self, reason: str, name: str, detail: str = "", count: int = 1) -> None:
        """`count` of them with one name."""
        self.counts[reason] += count
        listed = self.named.setdefault(reason, [])
        if len(listed) < MOST_NAMES:
            listed.append((name, detail))

    def update(self, other: Findings) -> None:
        self.counts.update(other.counts)
        for reason, names in other.named.items():
            listed = self.named.setdefault(reason, [])
            listed += names[: MOST_NAMES - len(listed)]

    def rows(self) -> list[dict[str, Any]]:
        """One object a reason: failures first, then the most frequent."""
        order = sorted(self.counts, key=lambda reason: (reason in WARNINGS, -self.counts[reason], reason))
        return [
            {
                "reason": reason,
                "fails": reason not in WARNINGS,
                "count": self.counts[reason],
                "named": [{"name": name, "detail": detail} for name, detail in self.named[reason]],
            }
            for reason in order
        ]
