"""How a rendered scene is drawn, with Pillow: the ground, then the objects from back to front.

Receives objects with their geometry as shares of the picture's side, a ground and a seed for its
grain. Gives the picture, and each object's mask, from which boxes and overlaps are taken. Equal to
the byte for equal arguments and one version of Pillow. Refuses nothing: `scenes` asks only for what
the tables below have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

RGB = tuple[int, int, int]
_RGB: dict[str, RGB] = {
    "black": (32, 32, 36), "blue": (38, 78, 215), "cyan": (50, 208, 212), "green": (38, 150, 52),
    "orange": (248, 134, 20), "pink": (250, 142, 196), "purple": (132, 48, 180),
    "red": (212, 34, 38), "white": (243, 243, 241), "yellow": (250, 222, 44),
}  # fmt: skip
# Stripes and dots are darker on these and lighter on the others.
_PALE = frozenset(("cyan", "orange", "pink", "white", "yellow"))


@dataclass(frozen=True, slots=True)
class Item:
    """An object to draw: centre and extent as shares of the picture's side, angle in radians."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    extent: float
    angle: float


# ----------------------------------------------------------------------------------------- outlines

Points = tuple[tuple[float, float], ...]


def _star() -> Points:
    steps = ((math.pi * (i / 5 - 0.5), 0.46 if i % 2 else 1.0) for i in range(10))
    return tuple((r * math.cos(angle), r * math.sin(angle)) for angle, r in steps)


def _heart() -> Points:
    turn = [2 * math.pi * i / 40 for i in range(40)]
    return tuple(
        (
            math.sin(t) ** 3,
            (-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 2.5) / 15,
        )
        for t in turn
    )


# In a square from -1 to 1, y downwards. The first three turn with the item's angle.
_POLYGONS: dict[str, Points] = {
    "star": _star(),
    "heart": _heart(),
    "triangle": ((0, -0.9), (1, 0.8), (-1, 0.8)),
    "cross": tuple(
        (sx * x, sy * y)
        for sx, sy, turn in ((1, -1, 1), (1, 1, -1), (-1, 1, 1), (-1, -1, -1))
        for x, y in ((0.36, 1), (0.36, 0.36), (1, 0.36))[::turn]
    ),
    "cube": ((-1, -0.45), (-0.45, -1), (1, -1), (1, 0.45), (0.45, 1), (-1, 1)),
    "cone": ((0, -1), (0.7, 0.74), (-0.7, 0.74)),
    "cylinder": ((-0.75, -0.72), (0.75, -0.72), (0.75, 0.72), (-0.75, 0.72)),
}
_UPRIGHT = frozenset(("cube", "cone", "cylinder"))
_Box = tuple[float, float, float, float]
_ELLIPSES: dict[str, tuple[_Box, ...]] = {
    "ball": ((-1, -1, 1, 1),),
    "ring": ((-1, -1, 1, 1),),
    "moon": ((-1, -1, 1, 1),),
    "cone": ((-0.7, 0.48, 0.7, 1),),
    "cylinder": ((-0.75, -1, 0.75, -0.44), (-0.75, 0.44, 0.75, 1)),
}
_PAD = 3
_MOON_TILT = -0.5


def _tile(item: Item, side: int) -> tuple[Image.Image, int, int]:
    """The item's silhouette, 0 or 255, on a tile just large enough, and where on a picture of
    `side` pixels the tile's corner lies."""
    radius = item.extent * side / 2
    width = 2 * math.ceil(radius) + 2 * _PAD
    tile = Image.new("L", (width, width))
    pen = ImageDraw.Draw(tile)
    polygon = _POLYGONS.get(item.shape)
    if polygon is not None:
        angle = 0.0 if item.shape in _UPRIGHT else item.angle
        pen.polygon(_scaled(_turned(polygon, angle), radius, width), fill=255)
    for ellipse in _ELLIPSES.get(item.shape, ()):
        pen.ellipse(_edges(ellipse, radius, width), fill=255)
    if item.shape == "ring":
        pen.ellipse(_edges((-0.52, -0.52, 0.52, 0.52), radius, width), fill=0)
    elif item.shape == "moon":
        ((x, y),) = _turned(((0.55, 0.0),), item.angle + _MOON_TILT)
        pen.ellipse(_edges((x - 0.8, y - 0.8, x + 0.8, y + 0.8), radius, width), fill=0)
    return tile, round(item.x * side - width / 2), round(item.y * side - width / 2)


def _turned(points: Points, angle: float) -> Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return tuple((x * cos - y * sin, x * sin + y * cos) for x, y in points)


def _scaled(points: Points, radius: float, width: int) -> list[tuple[float, float]]:
    return [(width / 2 + radius * x, width / 2 + radius * y) for x, y in points]


def _edges(box: _Box, radius: float, width: int) -> _Box:
    (x1, y1), (x2, y2) = _scaled(((box[0], box[1]), (box[2], box[3])), radius, width)
    return x1, y1, x2, y2


def mask_of(item: Item, side: int) -> Image.Image:
    """The item's whole silhouette, 0 or 255, on a picture of `side` pixels."""
    tile, left, top = _tile(item, side)
    mask = Image.new("L", (side, side))
    mask.paste(tile, (left, top))
    return mask


def visible(masks: Sequence[Image.Image]) -> list[Image.Image]:
    """Each mask without what those after it, which are in front of it, cover."""
    seen = list(masks)
    cover = masks[-1]
    for k in range(len(masks) - 2, -1, -1):
        seen[k] = ImageChops.subtract(masks[k], cover)
        cover = ImageChops.lighter(cover, masks[k])
    return seen


# ----------------------------------------------------------------------------------------- painting


def draw(items: Sequence[Item], texture: str, tone: str, *, size: int, grain: str) -> Image.Image:
    """The picture, `size` pixels square, RGB: `items` from back to front on a ground of `texture`
    and `tone` (`scene_text`); `grain` seeds the ground's hue, offset and noise."""
    side = 2 * size  # halved at the end: the edges come out smooth
    picture = _ground(texture, tone, side, Random(grain))
    shift = max(1, round(side / 70))
    for item in items:
        tile, left, top = _tile(item, side)
        picture.paste((0, 0, 0), (left + shift, top + shift), tile.point(_SHADOW))
        picture.paste(_paint(item, tile, side), (left, top), tile)
    return picture.reduce(2)


_SHADOW = [0] * 255 + [80]


def _mixed(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _paint(item: Item, tile: Image.Image, side: int) -> Image.Image:
    """The object's surface: its colour in light and shade, its material, its edges."""
    width, radius = tile.width, item.extent * side / 2
    colour = _RGB[item.colour]
    light = _light(item, width, radius)
    surface = Image.merge("RGB", [light.point(tints) for tints in _tints(colour)])
    if item.material in _PATTERNS:
        towards, share = ((10, 10, 25), 0.68) if item.colour in _PALE else ((255, 255, 255), 0.78)
        accent = _tints(_mixed(colour, towards, share))
        pattern = Image.new("L", (width, width))
        _PATTERNS[item.material](ImageDraw.Draw(pattern), width, 2 * radius)
        surface.paste(Image.merge("RGB", [light.point(tints) for tints in accent]), (0, 0), pattern)
    pen = ImageDraw.Draw(surface)
    rim = (105, 105, 112) if item.colour == "black" else _mixed(colour, (0, 0, 0), 0.6)
    thick = max(1, round(side / 224))
    for line in _CREASES.get(item.shape, ()):
        pen.line(_scaled(line, radius, width), fill=rim, width=thick)
    if item.shape == "cylinder":
        pen.ellipse(_edges(_ELLIPSES["cylinder"][0], radius, width), outline=rim, width=thick)
    edge = ImageChops.subtract(tile, tile.filter(ImageFilter.MinFilter(2 * thick + 1)))
    surface.paste(rim, (0, 0), edge)
    if item.material == "shiny":
        x, y = _GLEAMS.get(item.shape, (-0.28, -0.38))
        if item.shape == "moon":
            ((x, y),) = _turned(((-0.62, 0.0),), item.angle + _MOON_TILT)
        box = (x - 0.23, y - 0.2, x + 0.23, y + 0.2)
        pen.ellipse(_edges(box, radius, width), fill=(255, 255, 255))
    return surface


# Inner edges, by which a patterned cube is still a cube.
_CREASES: dict[str, tuple[Points, ...]] = {
    "cube": (((-1, -0.45), (0.45, -0.45), (1, -1)), ((0.45, -0.45), (0.45, 1))),
}
# Where the light is reflected, so that it lies on the shape.
_GLEAMS = {
    "cone": (-0.2, 0.1), "cross": (-0.1, -0.1), "cube": (-0.5, 0.0), "ring": (-0.5, -0.55),
    "star": (-0.12, -0.15), "triangle": (-0.2, 0.15),
}  # fmt: skip


@lru_cache(maxsize=32)
def _tints(base: RGB) -> tuple[list[int], list[int], list[int]]:
    """Per channel: brightness 0 … 255 to a shade of `base`, 128 being the colour itself."""
    dark, bright = _mixed(base, (0, 0, 12), 0.7), _mixed(base, (255, 255, 255), 0.7)
    shades = [_mixed(dark, base, k / 128) if k < 128 else _mixed(base, bright, (k - 128) / 127) for k in range(256)]
    red, green, blue = ([shade[channel] for shade in shades] for channel in range(3))
    return red, green, blue


def _light(item: Item, width: int, radius: float) -> Image.Image:
    """How light falls on the object, 0 … 255: strong on a shiny one, faint on the others."""
    strength = 1.0 if item.material == "shiny" else 0.45
    levels = [round(128 + (level - 128) * strength) for level in range(256)]
    if item.shape in ("ball", "cylinder", "cone"):
        return _gradient(item.shape, width).point(levels)
    light = _gradient("flat", width).point(levels)
    if item.shape == "cube":
        pen = ImageDraw.Draw(light)
        for face, level in (
            (((-1, -0.45), (-0.45, -1), (1, -1), (0.45, -0.45)), 215),
            (((0.45, -0.45), (1, -1), (1, 0.45), (0.45, 1)), 45),
        ):
            pen.polygon(_scaled(face, radius, width), fill=level)
    return light


@lru_cache(maxsize=512)
def _gradient(kind: str, width: int) -> Image.Image:
    if kind == "ball":
        # Pillow's radial gradient is dark in its middle: cut so that this lies up and to the left.
        glow = Image.radial_gradient("L").resize((width, width), box=(56, 56, 256, 256))
        return glow.point([max(0, 235 - level) for level in range(256)])
    ramp = Image.linear_gradient("L").resize((width, width))
    if kind == "flat":
        return ramp.point([185 - round(level * 0.45) for level in range(256)])
    across = ramp.transpose(Image.Transpose.ROTATE_90)
    return across.point([225 - round(level * 0.75) for level in range(256)])


def _stripes(pen: ImageDraw.ImageDraw, width: int, extent: float) -> None:
    period = extent * 0.3
    for k in range(-1, math.ceil(2 * width / period) + 1):
        start = k * period
        pen.line((start, 0, start - width, width), fill=255, width=max(1, round(period * 0.33)))


def _dots(pen: ImageDraw.ImageDraw, width: int, extent: float) -> None:
    period = extent * 0.26
    radius = period * 0.27
    count = math.ceil(width / period) + 1
    for row in range(count):
        for column in range(count):
            x = (column + 0.5 * (row % 2)) * period
            y = row * period * 0.87
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


_PATTERNS: dict[str, Callable[[ImageDraw.ImageDraw, int, float], None]] = {
    "striped": _stripes,
    "dotted": _dots,
}


# ------------------------------------------------------------------------------------------ grounds


def _ground(texture: str, tone: str, side: int, rng: Random) -> Image.Image:
    """A muted ground: a grey pattern, tinted between two near shades of one hue."""
    pattern = Image.new("L", (side, side), 160)
    rough = 0.16
    if texture == "sand":
        rough = 0.75
    elif texture == "plain":
        ramp = Image.linear_gradient("L").resize((side, side))
        pattern = ramp.transpose(rng.choice(tuple(Image.Transpose)))
    elif texture in ("wood", "grass"):
        fine, coarse = side // 2, side // (40 if texture == "wood" else 12)
        grid = (coarse, fine) if texture == "wood" else (fine, coarse)
        pattern = _noise(rng, grid).resize((side, side), Image.Resampling.BILINEAR)
    if texture in _GROUND_PENS:
        count, pen = _GROUND_PENS[texture]
        step = side / count
        start = (rng.random() - 1) * step, (rng.random() - 1) * step
        pen(ImageDraw.Draw(pattern), side, step, *start)
    grain = _noise(rng, (side // 2, side // 2)).resize((side, side), Image.Resampling.NEAREST)
    hue = _GROUND_HUES.get(texture) or rng.choice(_MUTED)
    if tone == "dark":
        one, other = _mixed(hue, (0, 0, 0), 0.68), _mixed(hue, (0, 0, 0), 0.36)
    else:
        one, other = _mixed(hue, (255, 255, 255), 0.2), _mixed(hue, (255, 255, 255), 0.66)
    return ImageOps.colorize(Image.blend(pattern, grain, rough), one, other)


def _noise(rng: Random, size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))


def _draw_stripes(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    while x < side:
        pen.rectangle((x, 0, x + step / 2, side), fill=70)
        x += step


def _draw_checks(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    half = step / 2
    while y < side:
        for k in range(math.ceil((side - x) / step)):
            pen.rectangle((x + k * step, y, x + k * step + half, y + half), fill=60)
            pen.rectangle((x + k * step + half, y + half, x + (k + 1) * step, y + step), fill=60)
        y += step


def _draw_polka_dots(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    while y < side:
        for k in range(math.ceil((side - x) / step)):
            left = x + k * step
            pen.ellipse((left, y, left + step * 0.55, y + step * 0.55), fill=45)
        y += step


def _draw_bricks(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    joint, row = max(1, side // 110), 0
    while y < side:
        pen.line((0, y, side, y), fill=255, width=joint)
        for k in range(math.ceil((side - x) / step) + 1):
            seam = x + (k + 0.5 * (row % 2)) * step
            pen.line((seam, y, seam, y + step / 2), fill=255, width=joint)
        y, row = y + step / 2, row + 1


def _draw_wood(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    while y < side:
        pen.line((0, y, side, y), fill=0, width=max(1, side // 90))
        y += step


def _draw_water(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    row = 0
    while y < side + step:
        for k in range(math.ceil((side - x) / step) + 1):
            left = x + (k + 0.5 * (row % 2) - 0.5) * step
            box = (left, y - step / 2, left + step, y + step / 2)
            pen.arc(box, 20, 160, fill=255, width=max(1, side // 75))
        y, row = y + step / 2, row + 1


def _draw_tiles(pen: ImageDraw.ImageDraw, side: int, step: float, x: float, y: float) -> None:
    joint = max(1, side // 70)
    while min(x, y) < side:
        pen.line((x, 0, x, side), fill=0, width=joint)
        pen.line((0, y, side, y), fill=0, width=joint)
        x, y = x + step, y + step


# How many of the pattern fit across a picture, and who draws it, given that step and its offset.
_GROUND_PENS: dict[str, tuple[float, Callable[..., None]]] = {
    "stripes": (6, _draw_stripes),
    "checks": (4.5, _draw_checks),
    "polka dots": (7, _draw_polka_dots),
    "bricks": (5, _draw_bricks),
    "wood": (5, _draw_wood),
    "water": (7, _draw_water),
    "tiles": (4.5, _draw_tiles),
}
_GROUND_HUES: dict[str, RGB] = {
    "sand": (190, 168, 120),
    "bricks": (166, 98, 82),
    "wood": (160, 118, 76),
    "grass": (104, 146, 84),
    "water": (98, 142, 178),
}
_MUTED: tuple[RGB, ...] = (
    (140, 140, 140), (160, 146, 122), (134, 146, 120), (120, 138, 156), (150, 130, 150)
)  # fmt: skip
