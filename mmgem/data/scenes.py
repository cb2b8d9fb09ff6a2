"""The embedded default data set: rendered pictures of one to four objects on textured grounds.

Receives a seed, a split's name, an index and a picture size. Gives a `Scene`: the picture, five
captions, and a tight box with a phrase for every object. A scene is a pure function of these four,
equal to the byte in any process and in any order; its words do not depend on the picture's size.
Some pairs of colour and shape (`HELD_OUT`) occur in the test split only.
Refuses, with a UserError: another split's name, a negative index, a size out of bounds.

What a picture shows is settled first (`plan_of`, on masks of a fixed size), then told
(`scene_text`), then drawn (`scene_draw`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from mmgem.data.samples import Region
from mmgem.data.scene_draw import Item, draw, mask_of, visible
from mmgem.data.scene_text import (
    COLOURS,
    MATERIALS,
    PLACES,
    RELATION_MARGIN,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    SceneObject,
    attributes_of,
    captions_of,
    ground_name,
    phrase_of,
)
from mmgem.errors import UserError

__all__ = [
    "COLOURS", "EXTENTS", "HELD_OUT", "MATERIALS", "PLACES", "REFERENCE", "SEEN", "SHAPES", "SIZES", "SPLITS",
    "TEXTURES", "TONES", "Plan", "Scene", "SceneObject", "attributes_of", "fit", "iter_scenes", "placed_item",
    "plan_of", "render_one", "render_scene", "stream",
]  # fmt: skip

SPLITS = ("train", "val", "test")
# (colour, shape): a tenth of the pairs, every colour and every shape in it once, so that each is
# well known from training in other company.
HELD_OUT = frozenset((COLOURS[i], SHAPES[(3 * i + 4) % 10]) for i in range(10))
HELD_OUT_SHARE = 1 / 3  # of the test scenes; each of these has one such object
SMALLEST_PICTURE, LARGEST_PICTURE = 48, 2048

SEEN = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
UNSEEN = tuple(sorted(HELD_OUT))
# The longer side, as a share of the picture's, from and to: far apart, so that a size can be seen.
EXTENTS = {"small": (0.18, 0.21), "medium": (0.27, 0.31), "large": (0.39, 0.44)}
REFERENCE = 112  # the size at which places and overlaps are judged, whatever the picture's size
_PLACE_MARGIN = 0.03  # a centre's least distance from the border of its third of the picture
_CENTRES_APART = RELATION_MARGIN + 0.03
_MOST_HIDDEN = 0.2  # at the reference size, so that it stays under 0.25 at any


@dataclass(frozen=True)
class Scene:
    """One picture and all that is known of it; boxes are xyxy in pixels of `image`."""

    index: int
    split: str
    ground: str
    objects: tuple[SceneObject, ...]
    image: Image.Image
    captions: tuple[str, ...]
    regions: tuple[Region, ...]

    @property
    def held_out(self) -> bool:
        """Whether an object's colour and shape never occur together in training."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.objects)

    @property
    def meta(self) -> dict[str, Any]:
        """For a sample's JSON: the ground, every object's attributes in the order of the regions,
        and `held_out`, by which the unseen pairs are scored apart."""
        kinds = ("shape", "colour", "size", "material", "place")
        objects = [{kind: getattr(thing, kind) for kind in kinds} for thing in self.objects]
        return {"ground": self.ground, "held_out": self.held_out, "objects": objects}


def render_scene(seed: int, split: str, index: int, *, size: int = 112) -> Scene:
    """Scene number `index` of a split; `size` is the side of the square picture in pixels."""
    if split not in SPLITS:
        raise UserError(f"scenes have no split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise UserError(f"scene index {index} is negative: count from 0")
    if not SMALLEST_PICTURE <= size <= LARGEST_PICTURE:
        raise UserError(f"scene size {size} px: choose one from {SMALLEST_PICTURE} to {LARGEST_PICTURE}")
    plan = plan_of(seed, split, index)
    ground = ground_name(plan.texture, plan.tone)
    words = stream(seed, split, index, "words")
    told = plan.things(REFERENCE)
    captions = captions_of(told, REFERENCE, ground, words)
    objects = told if size == REFERENCE else plan.things(size)
    regions = tuple(Region(box=thing.box, phrase=phrase_of(thing, words)) for thing in objects)
    image = draw(plan.items, plan.texture, plan.tone, size=size, grain=plan.grain)
    return Scene(index, split, ground, objects, image, captions, regions)


def render_one(seed: int, split: str, index: int, *, size: int = 112) -> tuple[Image.Image, str, str]:
    """A picture of one object, its colour and shape: all pairs in turn in the test split, else those of training."""
    if split not in SPLITS:
        raise UserError(f"scenes have no split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = stream(seed, split, index, "one object")
    pairs = sorted({*SEEN, *UNSEEN}) if split == "test" else SEEN
    colour, shape = pairs[index % len(pairs)]
    extent, material, angle = rng.choices(SIZES, (35, 40, 25))[0], rng.choice(MATERIALS), rng.uniform(-0.3, 0.3)
    look = Item(shape, colour, extent, material, 0, 0, 0, angle)
    placed = None
    while placed is None:
        placed = placed_item(look, [], [], rng)
    texture, tone, grain = rng.choice(tuple(TEXTURES)), rng.choice(TONES), f"{rng.getrandbits(64):016x}"
    return draw((placed[0],), texture, tone, size=size, grain=grain), colour, shape


def iter_scenes(seed: int, split: str, count: int, *, start: int = 0, size: int = 112) -> Iterator[Scene]:
    """Scenes `start` … `start + count - 1` of a split, in order, one at a time."""
    for index in range(start, start + count):
        yield render_scene(seed, split, index, size=size)


# ----------------------------------------------------------------------- what the picture will show


@dataclass(frozen=True, slots=True)
class Plan:
    """What the picture will show: `items` from back to front; `grain` seeds the ground's noise."""

    texture: str
    tone: str
    items: tuple[Item, ...]
    grain: str

    def things(self, size: int) -> tuple[SceneObject, ...]:
        """The objects, with boxes in pixels of a picture of `size` around what is visible of them.
        From left to right by centre, so that the order says nothing about depth or size."""
        seen = visible([mask_of(item, 2 * size) for item in self.items])
        things = []
        for item, mask in sorted(zip(self.items, seen, strict=True), key=lambda pair: pair[0].x):
            column, row = _cell(item)
            place, box = PLACES[3 * row + column], _halved(mask)
            looks = (item.shape, item.colour, item.size, item.material)
            things.append(SceneObject(*looks, place, box))
        return tuple(things)


def _cell(item: Item) -> tuple[int, int]:
    """(column, row) of the third of the picture in which the item's centre lies."""
    return int(item.x * 3), int(item.y * 3)


def _halved(mask: Image.Image) -> tuple[float, float, float, float]:
    """The box of what is not 0 in a mask of twice the picture's size, in pixels of the picture."""
    x1, y1, x2, y2 = mask.getbbox() or (0, 0, 0, 0)
    return x1 / 2, y1 / 2, x2 / 2, y2 / 2


def stream(seed: int, split: str, index: int, purpose: str) -> Random:
    """One stream a scene and purpose; the version in the name changes when the pictures do."""
    return Random(f"mmgem-scenes-1/{seed}/{split}/{index}/{purpose}")


def plan_of(seed: int, split: str, index: int) -> Plan:
    """What scene number `index` of a split shows."""
    rng = stream(seed, split, index, "plan")
    texture, tone = rng.choice(tuple(TEXTURES)), rng.choice(TONES)
    count = rng.choices((1, 2, 3, 4), (10, 30, 35, 25))[0]
    looks = [
        (colour, shape, rng.choices(SIZES, (35, 40, 25))[0], rng.choice(MATERIALS))
        for colour, shape in _draw_pairs(rng, count, split)
    ]
    # The large ones are placed first and lie behind, so that they hide nothing small.
    looks.sort(key=lambda look: -SIZES.index(look[2]))
    items: list[Item] = []
    masks: list[Image.Image] = []
    for colour, shape, size, material in looks:
        angle = rng.uniform(-0.3, 0.3)
        placed = placed_item(Item(shape, colour, size, material, 0, 0, 0, angle), items, masks, rng)
        if placed is not None:
            items.append(placed[0])
            masks.append(placed[1])
    return Plan(texture, tone, tuple(items), f"{rng.getrandbits(64):016x}")


def _draw_pairs(rng: Random, count: int, split: str) -> list[tuple[str, str]]:
    """`count` different (colour, shape). Some share their colour or shape with an earlier one, so
    that there is something to count and to tell apart."""
    pairs: list[tuple[str, str]] = []
    if split == "test" and rng.random() < HELD_OUT_SHARE:
        pairs.append(rng.choice(UNSEEN))
    while len(pairs) < count:
        free = [pair for pair in SEEN if pair not in pairs]
        if pairs and rng.random() < 0.35:
            kind = rng.randrange(2)
            model = rng.choice(pairs)
            free = [pair for pair in free if pair[kind] == model[kind]]
        pairs.append(rng.choice(free))
    return pairs


def placed_item(
    look: Item,
    items: Sequence[Item],
    masks: Sequence[Image.Image],
    rng: Random,
    place: str | None = None,
) -> tuple[Item, Image.Image] | None:
    """`look` somewhere, or at a place, in front of `items`, smaller where it fits nowhere; None: not even small."""
    taken = {_cell(item) for item in items}
    cells = [(column, row) for row in range(3) for column in range(3) if (column, row) not in taken]
    if place is not None:
        row, column = divmod(PLACES.index(place), 3)
        cells = [cell for cell in cells if cell == (column, row)]
    if not cells:
        return None
    for size in SIZES[SIZES.index(look.size) :: -1]:
        for _ in range(30):
            column, row = rng.choice(cells)
            extent = rng.uniform(*EXTENTS[size])
            x, y = (_coordinate(third, extent, rng) for third in (column, row))
            item = Item(look.shape, look.colour, size, look.material, x, y, extent, look.angle)
            mask = mask_of(item, 2 * REFERENCE)
            if fit([*items, item], [*masks, mask]):
                return item, mask
    return None


def _coordinate(third: int, extent: float, rng: Random) -> float:
    low = max(third / 3 + 0.04, extent / 2 + 0.015)
    high = min((third + 1) / 3 - 0.04, 1 - extent / 2 - 0.015)
    return rng.uniform(low, high)


def fit(items: Sequence[Item], masks: Sequence[Image.Image] | None = None) -> bool:
    """Whether nobody is hidden too much, and every visible box is where its item's place says, with
    a margin, and apart from the others' by enough for a relation. masks: of the items, 2 `REFERENCE` wide."""
    masks = [mask_of(item, 2 * REFERENCE) for item in items] if masks is None else masks
    centres: list[tuple[float, float]] = []
    for item, whole, part in zip(items, masks, visible(masks), strict=True):
        if part.histogram()[255] < (1 - _MOST_HIDDEN) * whole.histogram()[255]:
            return False
        x1, y1, x2, y2 = _halved(part)
        x, y = (x1 + x2) / 2 / REFERENCE, (y1 + y2) / 2 / REFERENCE
        for centre, third in zip((x, y), _cell(item), strict=True):
            if not third / 3 + _PLACE_MARGIN <= centre <= (third + 1) / 3 - _PLACE_MARGIN:
                return False
        if any(max(abs(x - a), abs(y - b)) < _CENTRES_APART for a, b in centres):
            return False
        centres.append((x, y))
    return True
