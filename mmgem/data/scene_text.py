"""The words of the rendered scenes: vocabulary, captions and phrases (the pictures: `scenes`).

Receives the objects of a scene with their boxes, the ground's name and a `random.Random`. Gives
five captions, and for each object a phrase; every sentence is true of the objects it was made from,
its wording drawn from that generator alone. Refuses nothing: `scenes` makes sound scenes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SHAPES = (
    "ball", "cone", "cross", "cube", "cylinder", "heart", "moon", "ring", "star", "triangle",
)  # fmt: skip
COLOURS = (
    "black", "blue", "cyan", "green", "orange", "pink", "purple", "red", "white", "yellow",
)  # fmt: skip
SIZES = ("small", "medium", "large")
MATERIALS = ("matte", "shiny", "striped", "dotted")
# Row by row, three by three: PLACES[3 * row + column].
PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
TONES = ("dark", "light")
# The texture's name and how a sentence names the ground. "stripes" and "polka dots", not "striped"
# and "dotted": those words are for objects.
TEXTURES = {
    "plain": "a plain {tone} ground",
    "stripes": "{tone} stripes",
    "checks": "a {tone} checkered ground",
    "polka dots": "{tone} polka dots",
    "sand": "{tone} sand",
    "bricks": "{tone} bricks",
    "wood": "{tone} wood",
    "grass": "{tone} grass",
    "water": "{tone} water",
    "tiles": "{tone} tiles",
}
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS = ("no", "one", "two", "three", "four")

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "top": ("at the top",),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "on the right side"),
    "bottom": ("at the bottom",),
} | {
    f"{row} {column}": (f"at the {row} {column}", f"in the {row} {column} corner")
    for row in ("top", "bottom")
    for column in ("left", "right")
}
# Relations between box centres. The first wording of each can open a sentence, the second cannot.
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
# By how much of the picture's side two centres differ at least along a named direction.
RELATION_MARGIN = 0.15


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene. `box`: xyxy around what can be seen of it."""

    shape: str
    colour: str
    size: str
    material: str
    place: str
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle (x, y) of the box, in the box's units."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def ground_name(texture: str, tone: str) -> str:
    """How captions name a ground: `ground_name("sand", "dark") == "dark sand"`."""
    return TEXTURES[texture].format(tone=tone)


def attributes_of(phrase: str) -> tuple[str, str] | None:
    """(colour, shape) that `phrase` gives to the first shape it names, or None.

    The colour is the last colour word in front of that shape; None where either is missing. Shapes
    in the plural count as well. For generated text, so any string will do.
    """
    colour = None
    for word in re.findall(r"[a-z]+", phrase.lower()):
        if word in COLOURS:
            colour = word
        shape = _SINGULAR.get(word)
        if shape is not None:
            return None if colour is None else (colour, shape)
    return None


_SINGULAR = {shape: shape for shape in SHAPES} | {many: one for one, many in PLURALS.items()}


def phrase_of(thing: SceneObject, rng: Random) -> str:
    """A region phrase: colour and shape always, mostly with material and size; seldom an article.

    No word about the place: the box says where. At most 6,000 different phrases.
    """
    details = rng.choices((("size", "material"), ("material",), ("size",), ()), (45, 30, 15, 10))[0]
    phrase = _noun(thing, *details)
    if rng.random() < 0.1:
        return rng.choice((with_article(phrase), "the " + phrase))
    return phrase


def captions_of(objects: Sequence[SceneObject], side: float, ground: str, rng: Random) -> tuple[str, ...]:
    """Five captions of one scene: short, relation, count, places, and everything.

    `objects`: one to four, no two alike in both colour and shape; for every two, the centres of the
    boxes differ by `RELATION_MARGIN` of the picture's `side` along x or y. `ground`: its name.
    """
    return (
        _short(objects, ground, rng),
        _alone(objects[0], ground, rng) if len(objects) == 1 else _relation(objects, side, ground, rng),
        _count(objects, ground, rng),
        _places(objects, ground, rng),
        _everything(objects, ground, rng),
    )


def relations(first: SceneObject, second: SceneObject, side: float) -> list[str]:
    """Which of RELATIONS hold of `first` towards `second`, in a picture `side` wide: the direction
    in which the centres differ most, if by `RELATION_MARGIN`; both where about equally."""
    dx = (first.centre[0] - second.centre[0]) / side
    dy = (first.centre[1] - second.centre[1]) / side
    # A slant of more than 3 to 2 is called by its longer side only, as people do.
    holds = []
    if abs(dx) >= RELATION_MARGIN and 1.5 * abs(dx) >= abs(dy):
        holds.append("left" if dx < 0 else "right")
    if abs(dy) >= RELATION_MARGIN and 1.5 * abs(dy) >= abs(dx):
        holds.append("above" if dy < 0 else "below")
    return holds


# ---------------------------------------------------------------- the five captions, in their order


def _short(objects: Sequence[SceneObject], ground: str, rng: Random) -> str:
    opening = rng.choice(("", "", "there is ", "a picture of ", "here is "))
    if len(objects) == 1:
        noun = with_article(_noun(objects[0], *rng.choice((("material",), ("size", "material")))))
        ending = rng.choice((_where(objects[0], rng), f"on {ground}"))
        return f"{opening}{noun} {ending}"
    first, second = rng.sample(list(objects), 2)
    detail = rng.choice(("size", "material", "place"))
    one = with_article(_noun(first, detail))
    if detail == "place":
        one = f"{one} {_where(first, rng)}"
    other = with_article(_noun(second, *rng.choice(((), (), ("material",)))))
    ending = rng.choice(("", "", f", on {ground}"))
    return f"{opening}{one} {rng.choice(('and', 'with'))} {other}{ending}"


def _relation(objects: Sequence[SceneObject], side: float, ground: str, rng: Random) -> str:
    first, second = rng.sample(list(objects), 2)
    plain, special = RELATIONS[rng.choice(relations(first, second, side))]
    detail, other_detail = rng.choice(
        ((("material",), ()), ((), ("material",)), (("size",), ()), (("size",), ("material",)))
    )
    one, other = with_article(_noun(first, *detail)), with_article(_noun(second, *other_detail))
    ending = rng.choice(("", f", on {ground}", f" on {ground}"))
    relation = rng.choice((plain, plain, special))
    return rng.choice(
        (
            f"{one} {relation} {other}{ending}",
            f"{one} is {relation} {other}{ending}",
            f"{plain} {other} there is {one}{ending}",
        )
    )


def _alone(thing: SceneObject, ground: str, rng: Random) -> str:
    noun = with_article(_noun(thing, *rng.choice(((), ("material",), ("size",)))))
    return rng.choice(
        (
            f"only {noun} {_where(thing, rng)}, on {ground}",
            f"{noun} all alone on {ground}",
            f"nothing but {noun} {_where(thing, rng)}",
        )
    )


def _count(objects: Sequence[SceneObject], ground: str, rng: Random) -> str:
    things = rng.choice(("objects", "things"))
    number = NUMBERS[len(objects)]
    if len(objects) == 1:
        one = with_article(_noun(objects[0], rng.choice(("size", "material"))))
        return rng.choice((f"one object on {ground}: {one}", f"just one thing on {ground}, {one}"))
    shared = [
        (kind, value)
        for kind in ("colour", "material", "size")
        for value in sorted({getattr(thing, kind) for thing in objects})
        if sum(getattr(thing, kind) == value for thing in objects) > 1
    ]
    if shared and rng.random() < 0.6:
        # Colours weigh double: the plainest thing to count by.
        kind, value = rng.choice([one for one in shared for _ in range(1 + (one[0] == "colour"))])
        return _group(objects, kind, value, ground, rng)
    listed = _by_shape(objects, rng)
    return rng.choice(
        (
            f"{number} {things} on {ground}: {listed}",
            f"{number} {things} on {ground}, {listed}",
            f"there are {number} {things} on {ground}: {listed}",
        )
    )


def _by_shape(objects: Sequence[SceneObject], rng: Random) -> str:
    """ "a ring and two hearts": every object, counted by shape; some single ones with a detail."""
    by_shape: dict[str, list[SceneObject]] = {}
    for thing in rng.sample(list(objects), len(objects)):
        by_shape.setdefault(thing.shape, []).append(thing)
    parts = []
    for shape, alike in by_shape.items():
        if len(alike) > 1:
            parts.append(f"{NUMBERS[len(alike)]} {PLURALS[shape]}")
        else:
            detail = rng.choice(("", "colour", "colour", "material"))
            parts.append(with_article(f"{getattr(alike[0], detail)} {shape}" if detail else shape))
    return _list(parts)


def _group(objects: Sequence[SceneObject], kind: str, value: str, ground: str, rng: Random) -> str:
    """ "two green things, one is a star, and a yellow cone": who shares `value`, and the rest."""
    inside = [thing for thing in objects if getattr(thing, kind) == value]
    rest = [thing for thing in objects if getattr(thing, kind) != value]
    rng.shuffle(inside)
    # The group's own colour or material is not said a second time.
    names = [with_article(thing.shape if kind == "colour" else _noun(thing)) for thing in inside]
    members = rng.choice((_list(names), f"one is {names[0]}" if len(inside) < 3 else _list(names)))
    head = f"{NUMBERS[len(inside)]} {value} {rng.choice(('things', 'objects'))}"
    if not rest:
        return f"{head} on {ground}, {members}"
    others = _list([with_article(_noun(thing)) for thing in rest])
    joint = rng.choice(("and", "with")) if len(rest) == 1 else "with"
    ending = rng.choice(("", f", on {ground}"))
    return f"{head}, {members}, {joint} {others}{ending}"


def _places(objects: Sequence[SceneObject], ground: str, rng: Random) -> str:
    chosen = rng.sample(list(objects), min(len(objects), rng.choice((2, 2, 3))))
    nouns = [with_article(_noun(thing, *rng.choice(((), ("size",), ("material",))))) for thing in chosen]
    wheres = [_where(thing, rng) for thing in chosen]
    after = [f"{noun} {where}" for noun, where in zip(nouns, wheres, strict=True)]
    copula = [f"{noun} is {where}" for noun, where in zip(nouns, wheres, strict=True)]
    before = [f"{wheres[0]} there is {nouns[0]}"]
    before += [f"{where} {noun}" for noun, where in zip(nouns[1:], wheres[1:], strict=True)]
    ending = f", on {ground}" if len(chosen) == 1 or rng.random() < 0.4 else ""
    return rng.choice((", ".join(after), _list(after), _list(copula), _list(before))) + ending


def _everything(objects: Sequence[SceneObject], ground: str, rng: Random) -> str:
    order = rng.sample(list(objects), len(objects))
    full = [with_article(_noun(thing, "size", "material")) for thing in order]
    wheres = [_where(thing, rng) for thing in order]
    after = _list([f"{noun} {where}" for noun, where in zip(full, wheres, strict=True)])
    before = _list([f"{where} {noun}" for noun, where in zip(full, wheres, strict=True)])
    number = NUMBERS[len(order)] + (" object" if len(order) == 1 else " objects")
    return rng.choice(
        (
            f"{number} on {ground}: {after}",
            f"a picture of {number} on {ground}: {after}",
            f"{after}, {('', 'both ', 'all ', 'all ')[len(order) - 1]}on {ground}",
            f"{ground} with {after}",
            f"on {ground}, {before}",
        )
    )


# ------------------------------------------------------------------------------ pieces of sentences


def _noun(thing: SceneObject, *details: str) -> str:
    """ "small shiny red cube", with those of "size" and "material" that `details` names."""
    words = [getattr(thing, kind) for kind in ("size", "material") if kind in details]
    return " ".join((*words, thing.colour, thing.shape))


def with_article(noun: str) -> str:
    """ "ball" → "a ball"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _where(thing: SceneObject, rng: Random) -> str:
    return rng.choice(PLACE_PHRASES[thing.place])


def _list(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
