"""The rendered scenes: equal wherever made, true in every sentence, tight in every box.

Captions are checked by a reader of their own (`_read`), which knows the grammar of English frames
but nothing of how `scene_text` makes a caption, and refuses any word that it does not understand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations

import pytest
from PIL import ImageChops, ImageStat

from mmgem.data import scenes
from mmgem.data.scene_draw import draw, mask_of, visible
from mmgem.data.scene_text import PLACE_PHRASES, PLURALS, RELATIONS, TEXTURES, TONES
from mmgem.data.scenes import (
    COLOURS,
    HELD_OUT,
    MATERIALS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    attributes_of,
    iter_scenes,
    render_scene,
)
from mmgem.errors import UserError

SMALL = 48  # the words do not depend on the size (tested below), so most tests draw small pictures
GOLDEN = "18b47c9491676ca0"


@cache
def _scenes(split: str, count: int) -> tuple[Scene, ...]:
    return tuple(iter_scenes(0, split, count, size=SMALL))


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.colour, thing.shape) for thing in scene.objects]


def _digest(scene: Scene) -> str:
    words = json.dumps([scene.captions, scene.meta, [[r.box, r.phrase] for r in scene.regions]])
    return hashlib.sha256(words.encode() + scene.image.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------ determinism


def test_same_in_another_process_and_order() -> None:
    wanted = [("train", 0), ("test", 7), ("val", 3), ("train", 123_456)]
    here = {name: _digest(render_scene(5, *name)) for name in wanted}
    again = {name: _digest(render_scene(5, *name)) for name in reversed(wanted)}
    assert here == again
    program = (
        "import hashlib, json\n"
        "from mmgem.data.scenes import render_scene\n"
        f"for split, index in {list(reversed(wanted))!r}:\n"
        "    s = render_scene(5, split, index)\n"
        "    t = json.dumps([s.captions, s.meta, [[r.box, r.phrase] for r in s.regions]])\n"
        "    print(hashlib.sha256(t.encode() + s.image.tobytes()).hexdigest())\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, timeout=60, env=env,
    )  # fmt: skip
    assert run.stdout.split() == [here[name] for name in reversed(wanted)]
    assert len(set(here.values())) == len(wanted)


def test_golden_words() -> None:
    """Text only: another version of Pillow may draw an edge otherwise. The figure is what this test
    computes; who changes it changes the data set, and so the version in `scenes.stream`."""
    words = [
        [scene.captions, [region.phrase for region in scene.regions], scene.meta]
        for split in scenes.SPLITS
        for scene in _scenes(split, 20)
    ]
    assert hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16] == GOLDEN


def test_words_do_not_depend_on_size_and_boxes_scale() -> None:
    for index in range(25):
        small, usual = (render_scene(1, "test", index, size=size) for size in (48, 112))
        assert small.captions == usual.captions
        assert small.meta == usual.meta
        assert small.image.size == (48, 48) and usual.image.size == (112, 112)
        for one, other in zip(small.regions, usual.regions, strict=True):
            assert one.phrase == other.phrase
            scaled = [edge * 112 / 48 for edge in one.box]
            assert scaled == pytest.approx(list(other.box), abs=3.5)


def test_seed_split_and_index_make_different_scenes() -> None:
    made = [
        _digest(render_scene(seed, split, index, size=SMALL))
        for seed in (0, 1)
        for split in scenes.SPLITS
        for index in range(10)
    ]
    assert len(set(made)) == len(made)


def test_iter_scenes_is_render_scene() -> None:
    listed = [_digest(scene) for scene in iter_scenes(3, "val", 3, start=4, size=SMALL)]
    assert listed == [_digest(render_scene(3, "val", index, size=SMALL)) for index in (4, 5, 6)]


@pytest.mark.parametrize(
    ("split", "index", "size", "named"),
    [("dev", 0, 112, "'dev'"), ("train", -1, 112, "-1"), ("train", 0, 8, "8 px")],
)
def test_bad_arguments_are_named(split: str, index: int, size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        render_scene(0, split, index, size=size)


# ------------------------------------------------------------------------------- what there is


def test_held_out_pairs_are_in_test_only() -> None:
    assert 0.08 <= len(HELD_OUT) / (len(COLOURS) * len(SHAPES)) <= 0.1
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    seen = {"train": Counter(), "val": Counter(), "test": Counter()}
    for split, pairs in seen.items():
        for scene in _scenes(split, 500):
            here = _pairs(scene)
            pairs.update(here)
            assert scene.held_out == bool(HELD_OUT & set(here)) == scene.meta["held_out"]
    assert not HELD_OUT & set(seen["train"])
    assert not HELD_OUT & set(seen["val"])
    assert HELD_OUT <= set(seen["test"])
    assert len(seen["train"]) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    share = sum(scene.held_out for scene in _scenes("test", 500)) / 500
    assert share == pytest.approx(1 / 3, abs=0.07)


def test_everything_occurs_often_enough() -> None:
    drawn = _scenes("train", 500)
    things = [thing for scene in drawn for thing in scene.objects]
    for kind, values in (
        ("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("material", MATERIALS),
        ("place", PLACES),
    ):  # fmt: skip
        counts = Counter(getattr(thing, kind) for thing in things)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.4 * len(things) / len(values)
    assert set(Counter(len(scene.objects) for scene in drawn)) == {1, 2, 3, 4}
    assert len({scene.ground for scene in drawn}) == len(TEXTURES) * len(TONES)
    for scene in drawn:
        assert len(set(_pairs(scene))) == len(scene.objects)


def test_regions_are_the_objects() -> None:
    phrases: Counter[str] = Counter()
    for scene in _scenes("train", 500):
        assert json.loads(json.dumps(scene.meta)) == scene.meta
        assert len(scene.regions) == len(scene.objects) == len(scene.meta["objects"])
        for thing, region, meta in zip(scene.objects, scene.regions, scene.meta["objects"], strict=True):
            assert region.box == thing.box
            assert meta == {kind: getattr(thing, kind) for kind in meta} and len(meta) == 5
            assert attributes_of(region.phrase) == (thing.colour, thing.shape)
            words = re.sub(r"^(an?|the) ", "", region.phrase)
            (mention,) = _read(("an " if words[0] in "aeiou" else "a ") + words).mentions
            assert all(getattr(thing, kind) == value for kind, value in mention.items())
            assert "place" not in mention
            phrases[region.phrase] += 1
    assert 300 < len(phrases) < 3000
    assert sum(count for count in phrases.values() if count > 1) > 0.25 * sum(phrases.values())
    with_article = sum(n for phrase, n in phrases.items() if re.match(r"(an?|the) ", phrase))
    assert 0.02 < with_article / sum(phrases.values()) < 0.2


@pytest.mark.parametrize(
    ("phrase", "attributes"),
    [
        ("a small shiny red cube", ("red", "cube")),
        ("The Striped BLUE ring.", ("blue", "ring")),
        ("two white crosses", ("white", "cross")),
        ("a black ball and a pink moon", ("black", "ball")),
        ("a red blue cone", ("blue", "cone")),
        ("a shiny cube", None),
        ("a cube that is red", None),
        ("something green", None),
        ("a cubered redcube", None),
        ("", None),
    ],
)
def test_attributes_of(phrase: str, attributes: tuple[str, str] | None) -> None:
    assert attributes_of(phrase) == attributes


# ---------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("size", [64, 112])
def test_boxes_are_tight_round_the_drawn_objects(size: int) -> None:
    """Drawn twice, one object in another colour: the pixels that differ are that object."""
    for index in range(20):
        scene = render_scene(2, "test", index, size=size)
        plan = scenes.plan_of(2, "test", index)
        boxes = {(thing.colour, thing.shape): thing.box for thing in scene.objects}
        for k, item in enumerate(plan.items):
            other = "cyan" if item.colour in ("red", "orange", "pink", "purple", "yellow") else "red"
            items = list(plan.items)
            items[k] = replace(item, colour=other)
            changed = draw(items, plan.texture, plan.tone, size=size, grain=plan.grain)
            difference = ImageChops.difference(scene.image, changed).convert("L")
            drawn = difference.point([0] * 8 + [255] * 248).getbbox()
            assert drawn is not None
            box = boxes[item.colour, item.shape]
            assert list(drawn) == pytest.approx(list(box), abs=1.5)
            assert 0 <= box[0] < box[2] <= size and 0 <= box[1] < box[3] <= size


@pytest.mark.parametrize("size", [48, 112])
def test_no_object_hides_much_of_another(size: int) -> None:
    touching = 0
    for index in range(60):
        masks = [mask_of(item, 2 * size) for item in scenes.plan_of(2, "train", index).items]
        for whole, seen in zip(masks, visible(masks), strict=True):
            share = ImageStat.Stat(seen).sum[0] / ImageStat.Stat(whole).sum[0]
            assert share > 0.75
            touching += share < 1
    assert touching > 5


def test_colours_and_sizes_are_what_they_are_called() -> None:
    paint = {
        "black": (30, 30, 35), "blue": (40, 80, 215), "cyan": (50, 210, 210),
        "green": (40, 150, 50), "orange": (250, 135, 20), "pink": (250, 140, 195),
        "purple": (130, 50, 180), "red": (210, 35, 40), "white": (245, 245, 240),
        "yellow": (250, 220, 45),
    }  # fmt: skip
    longest: dict[str, list[float]] = {size: [] for size in SIZES}
    looked = 0
    for index in range(60):
        scene = render_scene(4, "train", index)
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            longest[thing.size].append(max(x2 - x1, y2 - y1) / 112)
            covered = any(
                other is not thing
                and min(x2, other.box[2]) > max(x1, other.box[0])
                and min(y2, other.box[3]) > max(y1, other.box[1])
                for other in scene.objects
            )
            if thing.material != "matte" or thing.shape in ("ring", "moon") or covered:
                continue
            pixel = scene.image.getpixel((round(thing.centre[0]), round(thing.centre[1])))
            assert isinstance(pixel, tuple)
            far = {name: sum((a - b) ** 2 for a, b in zip(pixel, rgb, strict=True)) for name, rgb in paint.items()}
            assert min(far, key=far.__getitem__) == thing.colour
            looked += 1
    assert looked > 15
    # Apart from one another, also where a little is hidden.
    assert max(longest["small"]) < min(longest["medium"])
    assert max(longest["medium"]) < min(longest["large"])


# ----------------------------------------------------------------------------- a reader of captions

Attributes = dict[str, str]


@dataclass
class Facts:
    """What a caption says. Its mentions are of different objects; counts are exact."""

    ground: str | None = None
    total: int | None = None
    mentions: list[Attributes] = field(default_factory=list)
    counts: list[tuple[Attributes, int]] = field(default_factory=list)
    relation: str | None = None  # between the first two mentions


GROUNDS = {text.format(tone=tone) for text in TEXTURES.values() for tone in TONES}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
KINDS = {"size": SIZES, "material": MATERIALS, "colour": COLOURS, "shape": SHAPES}
KIND_OF = {value: kind for kind, values in KINDS.items() for value in values}
PLACE_OF = {text: place for place, texts in PLACE_PHRASES.items() for text in texts}
RELATION_OF = {text: relation for relation, texts in RELATIONS.items() for text in texts}
FILLER = {
    "and", "with", "is", "there is", "there are", "here is", "a picture of", "both", "all", "on",
    "only", "nothing but", "all alone", "just", "one is",
}  # fmt: skip


def _any(words: Sequence[str] | set[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_OPTIONAL = "".join(f"(?:{_any(KINDS[kind])} )?" for kind in ("size", "material", "colour"))
_TOKEN = re.compile(
    rf"(?P<ground>\b{_any(GROUNDS)})"
    rf"|(?P<one>\ban? {_OPTIONAL}{_any(SHAPES)}\b)"
    rf"|(?P<alike>\b{_any(set(NUMBERS))} {_any(set(PLURALS.values()))}\b)"
    rf"|(?P<total>\b{_any(set(NUMBERS))} (?:objects?|things?)\b)"
    rf"|(?P<group>\b{_any(set(NUMBERS))} {_any(set(KIND_OF))} (?:objects|things)\b)"
    rf"|(?P<place>\b{_any(set(PLACE_OF))}(?!\w))"
    rf"|(?P<relation>\b{_any(set(RELATION_OF))}\b)"
    rf"|(?P<filler>\b{_any(FILLER)}\b)|(?P<mark>[,:])"
)


def _read(caption: str) -> Facts:
    """The facts of a caption; an AssertionError for whatever cannot be understood."""
    assert re.fullmatch(r"[a-z]+([,:]? [a-z]+)*", caption), caption
    tokens = [(match.lastgroup, match[0]) for match in _TOKEN.finditer(caption)]
    left = re.sub(r"\s+", "", _TOKEN.sub("", caption))
    assert not left, f"not understood: {left!r} in {caption!r}"
    facts = Facts()
    group: Attributes = {}  # what the members of "two green things, …" share
    waiting: str | None = None  # a place whose object follows
    for position, (kind, text) in enumerate(tokens):
        words = text.split()
        if kind == "ground":
            assert facts.ground is None
            facts.ground = text
        elif kind == "one":
            assert (words[0] == "an") == (words[1][0] in "aeiou"), caption
            mention = {KIND_OF[word]: word for word in words[1:]}
            mention |= {key: value for key, value in group.items() if key not in mention}
            if waiting is not None:
                mention["place"], waiting = waiting, None
            facts.mentions.append(mention)
        elif kind == "alike":
            facts.counts.append(({"shape": _singular(words[1])}, NUMBERS[words[0]]))
        elif kind == "total":
            assert (words[0] == "one") == (words[1] in ("object", "thing")), caption
            facts.total = NUMBERS[words[0]]
        elif kind == "group":
            group = {KIND_OF[words[1]]: words[1]}
            facts.counts.append((group, NUMBERS[words[0]]))
        elif kind == "place":
            before = tokens[position - 1] if position else (None, "")
            follows = before[0] == "one" or (before[1] == "is" and tokens[position - 2][0] == "one")
            if follows:
                assert "place" not in facts.mentions[-1]
                facts.mentions[-1]["place"] = PLACE_OF[text]
            else:
                waiting = PLACE_OF[text]
        elif kind == "relation":
            assert facts.relation is None
            facts.relation = RELATION_OF[text]
            if not facts.mentions:  # "above a red cube there is a blue ball"
                facts.relation += " reversed"
        elif text in ("only", "nothing but", "all alone"):
            facts.total = 1
        elif text in ("with", "and") and group and tokens[position - 1] == ("mark", ","):
            group = {}  # ", with a yellow cone": the rest, outside the group
    assert waiting is None, caption
    if facts.relation is not None:
        assert len(facts.mentions) == 2
        if facts.relation.endswith(" reversed"):
            facts.relation = facts.relation.removesuffix(" reversed")
            facts.mentions.reverse()
    return facts


def _singular(plural: str) -> str:
    return {many: one for one, many in PLURALS.items()}[plural]


def _true(facts: Facts, scene: Scene, margin: float) -> bool:
    """Whether all that `facts` say holds of `scene`; relations by at least `margin` of the side."""
    if facts.ground not in (None, scene.ground) or facts.total not in (None, len(scene.objects)):
        return False
    for attributes, count in facts.counts:
        if sum(_fits(attributes, thing) for thing in scene.objects) != count:
            return False
    if not all(any(_fits(one, thing) for thing in scene.objects) for one in facts.mentions):
        return False
    return any(
        all(_fits(one, thing) for one, thing in zip(facts.mentions, chosen, strict=True))
        and (facts.relation is None or _related(facts.relation, chosen[0], chosen[1], margin))
        for chosen in permutations(scene.objects, len(facts.mentions))
    )


def _fits(attributes: Attributes, thing: SceneObject) -> bool:
    return all(getattr(thing, kind) == value for kind, value in attributes.items())


def _related(relation: str, one: SceneObject, other: SceneObject, margin: float) -> bool:
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return sign * (one.centre[axis] - other.centre[axis]) / SMALL > margin


# ----------------------------------------------------------------------------------- the captions


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_captions_are_true(split: str) -> None:
    for scene in _scenes(split, 500):
        assert len(scene.captions) == len(set(scene.captions)) == 5
        for thing in scene.objects:
            column, row = (int(middle * 3 / SMALL) for middle in thing.centre)
            assert thing.place == PLACES[3 * row + column]
        for caption in scene.captions:
            assert _true(_read(caption), scene, margin=0.1), (caption, scene.meta)


def test_captions_are_of_their_five_kinds() -> None:
    for scene in _scenes("train", 300):
        things = scene.objects
        short, relation, count, places, everything = map(_read, scene.captions)
        assert len(short.mentions) == min(2, len(things))
        assert all({"colour", "shape"} <= set(mention) for mention in short.mentions)
        assert max(len(mention) for mention in short.mentions) >= 3
        assert (relation.relation is not None) == (len(things) > 1)
        named = len(count.mentions) + sum(n for told, n in count.counts if "shape" in told)
        assert named == len(things) or "one is" in scene.captions[2]
        assert len(places.mentions) >= min(2, len(things))
        assert all("place" in mention for mention in places.mentions)
        assert everything.ground == scene.ground
        assert len(everything.mentions) == len(things)
        assert all(len(mention) == 5 for mention in everything.mentions)


def test_a_caption_tells_its_picture_among_500() -> None:
    """At least 80 % of the captions are true of at most 3 of 500 test pictures, theirs included."""
    drawn = _scenes("test", 500)
    asked = drawn[:100]
    telling = [0] * 5
    for scene in asked:
        for kind, caption in enumerate(scene.captions):
            facts = _read(caption)
            telling[kind] += sum(_true(facts, other, margin=0.0) for other in drawn) <= 3
    shares = [count / len(asked) for count in telling]
    print("captions true of at most 3 of 500, by kind:", shares)
    assert sum(shares) / 5 >= 0.8
    assert min(shares) >= 0.7
    assert shares[4] == 1
    # And the measure can fail: one colour and shape alone are true of many.
    for colour, shape in (("red", "cube"), ("cyan", "moon")):
        with_it = sum((colour, shape) in _pairs(scene) for scene in drawn)
        facts = _read(f"a picture of a {colour} {shape}")
        assert sum(_true(facts, other, margin=0.0) for other in drawn) == with_it > 3


def test_a_false_caption_is_noticed() -> None:
    """The reader is worth something: of other scenes nearly every full description is false."""
    drawn = _scenes("test", 60)
    told = [_read(scene.captions[4]) for scene in drawn]
    assert sum(_true(facts, scene, 0.1) for facts in told for scene in drawn) == len(drawn)
    with pytest.raises(AssertionError, match="not understood"):
        _read("a red cube and a nice dog")


def test_words_are_few_and_wordings_many() -> None:
    texts = [caption for scene in _scenes("train", 500) for caption in scene.captions]
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert 80 < len(words) < 140
    assert max(len(re.findall(r"[a-z]+|[,:]", text)) for text in texts) <= 64
    named = {*COLOURS, *SHAPES, *SIZES, *MATERIALS}
    frames = {" ".join("_" if word in named else word for word in text.split()) for text in texts}
    assert len(frames) > 500
