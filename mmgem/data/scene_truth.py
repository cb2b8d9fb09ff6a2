"""Whether a text in the words of the rendered scenes is true of a scene, as far as it says anything.

Receives a text and what is known of a scene. Gives True or False; None for a text that says nothing of objects, or in
other words. So what a model wrote for a scene, and what was put together wrongly, can be told apart without people.
Refuses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from mmgem.data.scene_draw import Item
from mmgem.data.scene_from_text import Wanted, ground_in, wanted_in, wanted_relation
from mmgem.data.scene_text import NUMBERS, SceneObject, relations

_TOTAL = re.compile(r"\b(" + "|".join(NUMBERS) + r"|just one) (?:objects?|things?)\b")
_ALONE = ("only ", "nothing but ", "all alone", "just one thing", "one object")


def is_true(text: str, meta: Mapping[str, Any], boxes: Sequence[Sequence[float]], side: float) -> bool | None:
    """meta: of the sample (`objects`, `ground`). boxes: of its regions, in the same order. side: of the picture."""
    things = [
        SceneObject(o["shape"], o["colour"], o["size"], o["material"], o["place"], tuple(box))  # type: ignore[arg-type]
        for o, box in zip(meta["objects"], boxes, strict=True)
    ]
    return is_true_of(text, things, meta["ground"], side)


def is_true_of(text: str, things: Sequence[SceneObject], ground: str, side: float) -> bool | None:
    """things: all of the picture, `side` wide. ground: its name."""
    text = " ".join(text.lower().split())
    said = wanted_in(text)
    if not said:
        return None
    if ground_in(text) not in (None, ground):
        return False
    total = _TOTAL.search(text)
    if total and NUMBERS.index(total[1].replace("just ", "")) != len(things):
        return False
    if any(words in text for words in _ALONE) and len(things) != 1:
        return False
    relation = wanted_relation(text, said)
    for chosen in permutations(things, len(said)):
        if all(fits(one, thing) and one.place in (None, thing.place) for one, thing in zip(said, chosen, strict=True)):
            if relation is None:
                return True
            first, second, name = relation
            if name in relations(chosen[first], chosen[second], side):
                return True
    return False


def fits(said: Wanted, thing: SceneObject | Item) -> bool:
    """Whether it has the looks that a text gives it."""
    pairs = (
        (said.shape, thing.shape), (said.colour, thing.colour), (said.size, thing.size),
        (said.material, thing.material),
    )  # fmt: skip
    return all(word in (None, "", real) for word, real in pairs)
