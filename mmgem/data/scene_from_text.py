"""A rendered scene of which a caption is true: what stands in for a text-to-image model where there are no weights.

Receives a text in the words of `scene_text`. Gives a picture, or None for a text that names no object, or that nothing
can be drawn for. What the text leaves open is drawn by lot, the same for the same text and seed. Refuses nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from PIL import Image

from mmgem.data.scene_draw import Item, draw, mask_of
from mmgem.data.scene_text import (
    COLOURS,
    MATERIALS,
    NUMBERS,
    PLACE_PHRASES,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    ground_name,
    relations,
)
from mmgem.data.scenes import REFERENCE, SEEN, Plan, placed_item

_MOST_OBJECTS = 4
_TRIES = 60
_SINGULAR = {**{shape: shape for shape in SHAPES}, **{many: one for one, many in PLURALS.items()}}
_PLACES = {phrase: place for place, phrases in PLACE_PHRASES.items() for phrase in phrases}
_PLACE = re.compile("|".join(sorted(map(re.escape, _PLACES), key=len, reverse=True)))
_RELATION_WORDS = {words: name for name, both in RELATIONS.items() for words in both}
_RELATION = re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, _RELATION_WORDS), key=len, reverse=True)) + r")\b")
_GROUNDS = {ground_name(texture, tone): (texture, tone) for texture in TEXTURES for tone in TONES}
_SHARED = {"colour": COLOURS, "size": SIZES, "material": MATERIALS}
_GROUP = re.compile(r"\b(" + "|".join(NUMBERS) + r") (\w+) (?:things|objects)\b")


@dataclass(slots=True)
class Wanted:
    """What a text says of an object; None, and "" for its shape: nothing. at: where its shape stands in the text."""

    shape: str
    at: int
    colour: str | None
    size: str | None
    material: str | None
    place: str | None


def scene_from_text(text: str, seed: int = 0, *, size: int = 112) -> Image.Image | None:
    """A square picture of `size` pixels."""
    text = " ".join(text.lower().split())
    ground, wanted = ground_in(text), wanted_in(text)
    if not 1 <= len(wanted) <= _MOST_OBJECTS:
        return None
    rng = Random(f"mmgem-scene-from-text-1/{seed}/{text}")
    texture, tone = _GROUNDS[ground] if ground else (rng.choice(tuple(TEXTURES)), rng.choice(TONES))
    relation = wanted_relation(text, wanted)
    for _ in range(_TRIES):
        items = _placed(wanted, rng)
        if items is not None and (relation is None or _holds(items, *relation)):
            return draw(tuple(items), texture, tone, size=size, grain=f"{rng.getrandbits(64):016x}")
    return None


def ground_in(text: str) -> str | None:
    """The name of the ground that a text in small letters speaks of."""
    return next((name for name in _GROUNDS if name in text), None)


def wanted_in(text: str) -> list[Wanted]:
    """The objects that a text speaks of, in its order; not its ground."""
    text = " ".join(text.lower().split())
    ground = ground_in(text)
    return _wanted_objects(text.replace(ground, "#" * len(ground)) if ground else text)


def _wanted_objects(text: str) -> list[Wanted]:
    found: list[Wanted] = []
    group = _GROUP.search(text)
    shared = group[2] if group else ""
    of_group = NUMBERS.index(group[1]) if group else 0
    one_named = bool(group) and "one is a" in text  # "two green things, one is a star": the others are any
    named = 1 if one_named else of_group
    last = 0
    for match in re.finditer(r"[a-z]+", text):
        shape = _SINGULAR.get(match[0])
        if shape is None:
            continue
        said = text[last : match.start()]
        words = re.findall(r"[a-z]+", said)[-4:]
        last = match.end()
        count = NUMBERS.index(words[0 if len(words) == 1 else -1]) if words and words[-1] in NUMBERS else 1
        colour = next((w for w in reversed(words) if w in COLOURS), None)
        material = next((w for w in reversed(words) if w in MATERIALS), None)
        extent = next((w for w in reversed(words) if w in SIZES), None)
        if len(found) < named:  # "two green things: a star and a cone"
            colour = colour or (shared if shared in COLOURS else None)
            material = material or (shared if shared in MATERIALS else None)
            extent = extent or (shared if shared in SIZES else None)
        for _ in range(max(count, 1)):
            found.append(Wanted(shape, match.start(), colour, extent, material, None))
    if one_named and found:
        of_shared = {kind: shared if shared in words else None for kind, words in _SHARED.items()}
        for _ in range(of_group - 1):
            found.insert(1, Wanted("", found[0].at, place=None, **of_shared))
    places = [(m.start(), m.end(), _PLACES[m[0]]) for m in _PLACE.finditer(text)]
    before = any(start < found[0].at for start, _, _ in places) if found else False
    for n, thing in enumerate(found):
        begin = found[n - 1].at if n else 0
        end = found[n + 1].at if n + 1 < len(found) else len(text)
        span = (begin, thing.at) if before else (thing.at, end)
        thing.place = next((place for start, _, place in places if span[0] <= start < span[1]), None)
    return found


def wanted_relation(text: str, wanted: list[Wanted]) -> tuple[int, int, str] | None:
    """(first, second, name): of which two objects the text says how they stand to each other."""
    match = _RELATION.search(_PLACE.sub(lambda m: "#" * len(m[0]), text))
    if match is None or len(wanted) < 2:
        return None
    after = [n for n, thing in enumerate(wanted) if thing.at > match.start()]
    before = [n for n, thing in enumerate(wanted) if thing.at < match.start()]
    name = _RELATION_WORDS[match[0]]
    if before and after:
        return before[-1], after[0], name
    return (after[1], after[0], name) if len(after) > 1 else None  # "left of a ball there is a cube"


def _placed(wanted: list[Wanted], rng: Random) -> list[Item] | None:
    """One item a wanted object, in their order; no two of one colour and shape."""
    items: list[Item] = []
    for thing in wanted:
        taken = {(item.colour, item.shape) for item in items}
        free = [
            (colour, shape)
            for colour, shape in SEEN
            if (colour, shape) not in taken and thing.shape in ("", shape) and thing.colour in (None, colour)
        ]
        # A pair that training never shows is drawn where the text asks for it.
        colour, shape = rng.choice(free) if free else (thing.colour or rng.choice(COLOURS), thing.shape)
        if not shape or (colour, shape) in taken:
            return None
        extent, material = thing.size or rng.choice(SIZES[:2]), thing.material or rng.choice(MATERIALS)
        look = Item(shape, colour, extent, material, 0, 0, 0, rng.uniform(-0.3, 0.3))
        masks = [mask_of(item, 2 * REFERENCE) for item in items]
        placed = placed_item(look, items, masks, rng, thing.place)
        if placed is None or (thing.size and placed[0].size != thing.size):
            return None
        items.append(placed[0])
    return items


def _holds(items: list[Item], first: int, second: int, name: str) -> bool:
    things = {(t.colour, t.shape): t for t in Plan("plain", "light", tuple(items), "").things(REFERENCE)}
    one, other = (things.get((items[n].colour, items[n].shape)) for n in (first, second))
    return one is not None and other is not None and name in relations(one, other, REFERENCE)
