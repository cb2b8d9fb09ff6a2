"""Two scenes that differ in one thing, and what is true of each: to see whether a model reads more than words.

Receives a kind, a seed, an index and a picture size. Gives a `ScenePair`: two pictures on one ground with the same
places and sizes, a caption that is true of the first and false of the second, one for which it is the other way round,
and a true and a false one of the first, between which the words alone do not tell. All objects are of pairs of colour
and shape that training shows.
A pair is a pure function of these four, as a scene is. Refuses nothing: `prepare_scenes` has looked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from mmgem.data.scene_draw import Item, draw, mask_of
from mmgem.data.scene_text import (
    COLOURS,
    MATERIALS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    TONES,
    SceneObject,
    ground_name,
    relations,
    with_article,
)
from mmgem.data.scenes import REFERENCE, SEEN, Plan, fit, placed_item, stream

__all__ = ["KINDS", "SAME_WORDS", "ScenePair", "render_pair"]

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_SIZES = ("small", "medium")  # two large ones seldom fit


@dataclass(frozen=True)
class ScenePair:
    """images, captions: two each, in one order. contrast: what is true of the first picture, and what is not."""

    kind: str
    images: tuple[Image.Image, Image.Image]
    captions: tuple[str, str]
    contrast: tuple[str, str]


_Words = tuple[str, str]
_Content = tuple[list[Item], list[Item], _Words, _Words]


def render_pair(kind: str, seed: int, index: int, *, size: int = 112) -> ScenePair:
    """kind: of KINDS. size: side of the square pictures in pixels."""
    rng = stream(seed, "test", index, f"pair of {kind}")
    texture, tone, grain = rng.choice(tuple(TEXTURES)), rng.choice(TONES), f"{rng.getrandbits(64):016x}"
    found = None
    while found is None:
        found = KINDS[kind](rng)
    first, second, captions, contrast = found
    images = [draw(tuple(items), texture, tone, size=size, grain=grain) for items in (first, second)]
    ending = rng.choice(("", f", on {ground_name(texture, tone)}"))
    said, told = ((one + ending, other + ending) for one, other in (captions, contrast))
    return ScenePair(kind, (images[0], images[1]), said, told)


# ------------------------------------------------------------------------------------ the kinds


def _swapped_colours(rng: Random) -> _Content | None:
    """A red cube and a blue ball; a blue cube and a red ball."""
    items = _placed(_two(rng), rng)
    if items is None:
        return None
    swapped = [replace(items[0], colour=items[1].colour), replace(items[1], colour=items[0].colour)]
    joint = rng.choice((" and ", " with ", " next to "))
    captions = joint.join(_nouns(items)), joint.join(_nouns(swapped))
    return items, swapped, captions, captions


def _borrowed_colour(rng: Random) -> _Content | None:
    """A red cube and a blue ball, and a cone, which is green; a green cube and a blue ball, and the cone is red."""
    one, other = _two(rng)
    free = [pair for pair in SEEN if _apart(one, pair) and pair[0] != other[0] and pair[1] != other[1]]
    items = _placed([one, other, rng.choice(free)], rng) if free else None
    if items is None:
        return None
    turned = [replace(items[0], colour=items[2].colour), items[1], replace(items[2], colour=items[0].colour)]
    joint, order = rng.choice((" and ", " with ", " next to ")), rng.choice((1, -1))
    here, there = (joint.join(_nouns(these[:2])[::order]) for these in (items, turned))
    return items, turned, (here, there), (here, there)


def _swapped_places(rng: Random) -> _Content | None:
    """A red cube left of a blue ball; a blue ball left of a red cube."""
    items = _placed(_two(rng), rng)
    if items is None:
        return None
    exchanged = [replace(a, x=b.x, y=b.y, extent=b.extent) for a, b in zip(items, reversed(items), strict=True)]
    held = [_relations(these) for these in (items, exchanged)]
    if len(held[0]) != 1 or held[1] != [_OPPOSITE[held[0][0]]] or not fit(exchanged):
        return None
    words = rng.randrange(2)
    relation, opposite = (RELATIONS[name][words] for name in (held[0][0], _OPPOSITE[held[0][0]]))
    copula = rng.choice(("", "is "))
    one, other = _nouns(items)
    here, there = f"{one} {copula}{relation} {other}", f"{other} {copula}{relation} {one}"
    return items, exchanged, (here, there), (here, f"{one} {copula}{opposite} {other}")


def _swapped_counts(rng: Random) -> _Content | None:
    """Two cubes and a ball; a cube and two balls. Or three of the one kind, so that no number is true more often."""
    many = rng.choice((2, 3))
    shapes = rng.sample(SHAPES, 2)
    free = [colour for colour in COLOURS if all((colour, shape) in SEEN for shape in shapes)]
    colours = rng.sample(free, many + 1)
    items = _placed([*((colour, shapes[0]) for colour in colours[:many]), (colours[many], shapes[1])], rng)
    if items is None:
        return None
    turned = [items[0], *(replace(item, shape=shapes[1]) for item in items[1:])]
    if not fit(turned):
        return None

    def said(*counts: int) -> str:
        of_each = zip(counts, shapes, strict=True)
        return " and ".join(with_article(s) if n == 1 else f"{NUMBERS[n]} {PLURALS[s]}" for n, s in of_each)

    return items, turned, (said(many, 1), said(1, many)), (said(many, 1), said(5 - many, 1))


def _negated(rng: Random) -> _Content | None:
    """A red cube but no blue ball; a blue ball but no red cube; beside either the same third object."""
    one, other = _two(rng)
    # As `other`, so that its words do not tell which of the two is asked for.
    third = rng.choice([pair for pair in SEEN if _apart(one, pair) and pair != other])
    items = _placed([one, third], rng)
    if items is None:
        return None
    exchanged = [replace(items[0], colour=other[0], shape=other[1]), items[1]]
    if not fit(exchanged):
        return None
    here, there, beside = (" ".join(pair) for pair in (one, other, third))
    captions = (f"{with_article(here)} but no {there}", f"{with_article(there)} but no {here}")
    asked = rng.choice((there, beside))  # so that neither wording is true more often
    both, without = f"{with_article(here)} and {with_article(asked)}", f"{with_article(here)} but no {asked}"
    return items, exchanged, captions, (without, both) if asked == there else (both, without)


KINDS: dict[str, Callable[[Random], _Content | None]] = {
    "attribute": _swapped_colours,
    "borrowed": _borrowed_colour,
    "relation": _swapped_places,
    "count": _swapped_counts,
    "negation": _negated,
}
"""By name what differs."""

SAME_WORDS = ("attribute", "relation", "count", "negation")
"""Kinds whose two captions are made of the same words, as Winoground's are."""


# --------------------------------------------------------------------------------------------- pieces


def _two(rng: Random) -> list[tuple[str, str]]:
    """(colour, shape) of two objects."""
    while True:
        one, other = rng.sample(SEEN, 2)
        if _apart(one, other):
            return [one, other]


def _apart(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether they have neither in common; and with colours exchanged they are known from training."""
    exchanged = {(one[0], other[1]), (other[0], one[1])}
    return one[0] != other[0] and one[1] != other[1] and exchanged <= set(SEEN)


def _placed(looks: Sequence[tuple[str, str]], rng: Random) -> list[Item] | None:
    """The objects, all of one size and material, or None where they found no room."""
    size, material = rng.choice(_SIZES), rng.choice(MATERIALS)
    items: list[Item] = []
    for colour, shape in looks:
        look = Item(shape, colour, size, material, 0, 0, 0, rng.uniform(-0.3, 0.3))
        masks = [mask_of(item, 2 * REFERENCE) for item in items]
        placed = placed_item(look, items, masks, rng)
        if placed is None or placed[0].size != size:
            return None
        items.append(placed[0])
    return items


def _things(items: Sequence[Item]) -> dict[tuple[str, str], SceneObject]:
    """What is seen of each, by colour and shape."""
    things = Plan("plain", "light", tuple(items), "").things(REFERENCE)
    return {(thing.colour, thing.shape): thing for thing in things}


def _relations(items: Sequence[Item]) -> list[str]:
    """Of the first towards the second."""
    seen = _things(items)
    first, second = (seen[item.colour, item.shape] for item in items)
    return relations(first, second, REFERENCE)


def _nouns(items: Sequence[Item]) -> list[str]:
    return [with_article(f"{item.colour} {item.shape}") for item in items]
