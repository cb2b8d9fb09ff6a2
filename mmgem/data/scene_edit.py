"""A rendered scene with one thing changed, exactly: what stands in for text-guided editing of a picture.

Receives a scene by its seed, split and index, a caption of it, and a text that says nearly the same of another scene.
Gives the same picture, with the same ground, but for what the two texts tell differently; or None where they tell of
different numbers of objects, where the text is true already, and where what it asks for cannot be drawn. What an object
gets that another one of the picture has, which neither text speaks of, that one gives for it: so the pictures differ in
what belongs together, not in what there is. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import permutations
from random import Random

from PIL import Image

from mmgem.data.scene_draw import Item, draw
from mmgem.data.scene_from_text import Wanted, wanted_in
from mmgem.data.scene_text import SceneObject, ground_name
from mmgem.data.scene_truth import fits, is_true_of
from mmgem.data.scenes import EXTENTS, REFERENCE, SEEN, Plan, fit, plan_of

_LOOKS = ("shape", "colour", "size", "material")
_plan_of = lru_cache(maxsize=1)(plan_of)  # one scene is edited again and again


def edited_scene(seed: int, split: str, index: int, caption: str, text: str, *, size: int = 112) -> Image.Image | None:
    """size: side of the picture in pixels."""
    plan = _plan_of(seed, split, index)
    said, told = wanted_in(caption), wanted_in(text)
    before = {(item.colour, item.shape) for item in plan.items}
    if len(said) != len(told) or not _true(caption, plan) or _true(text, plan):
        return None
    rng = Random(f"mmgem-scene-edit-1/{seed}/{split}/{index}/{text}")
    for items in _edits(plan.items, said, told, rng):
        edited = replace(plan, items=items)
        after = {(item.colour, item.shape) for item in items}
        sound = after <= before | set(SEEN) and len(after) == len(items)
        if sound and fit(items) and _true(text, edited) and not _true(caption, edited):
            return draw(items, plan.texture, plan.tone, size=size, grain=plan.grain)
    return None


def _edits(
    items: tuple[Item, ...], said: Sequence[Wanted], told: Sequence[Wanted], rng: Random
) -> Iterable[tuple[Item, ...]]:
    """Of each way in which the caption's objects may be those of the picture."""
    for chosen in permutations(range(len(items)), len(said)):
        if not all(fits(one, items[n]) for one, n in zip(said, chosen, strict=True)):
            continue
        made = list(items)
        for n, one, other in zip(chosen, said, told, strict=True):
            for kind in _LOOKS:
                wanted = getattr(other, kind)
                if wanted and wanted != getattr(one, kind):
                    _give(made, n, kind, wanted, chosen, rng)
        if made != list(items):
            yield tuple(made)
        elif len(chosen) == 2:
            first, second = (items[n] for n in chosen)
            made[chosen[0]] = replace(first, x=second.x, y=second.y)
            made[chosen[1]] = replace(second, x=first.x, y=first.y)
            yield tuple(made)


def _give(made: list[Item], n: int, kind: str, value: str, chosen: Sequence[int], rng: Random) -> None:
    givers = [m for m, item in enumerate(made) if m not in chosen and getattr(item, kind) == value]
    if givers:
        m = rng.choice(givers)
        made[m] = _with(made[m], kind, getattr(made[n], kind), rng)
    made[n] = _with(made[n], kind, value, rng)


def _with(item: Item, kind: str, value: str, rng: Random) -> Item:
    extent = rng.uniform(*EXTENTS[value]) if kind == "size" else item.extent
    return replace(item, extent=extent, **{kind: value})


def _true(text: str, plan: Plan) -> bool:
    things: tuple[SceneObject, ...] = plan.things(REFERENCE)
    return is_true_of(text, things, ground_name(plan.texture, plan.tone), REFERENCE) is True
