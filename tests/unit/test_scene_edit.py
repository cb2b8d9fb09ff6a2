"""A rendered scene with one thing changed: that and nothing else, and true of the text that asked for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from mmgem.data.scene_draw import Item, draw
from mmgem.data.scene_edit import edited_scene
from mmgem.data.scenes import iter_scenes, plan_of
from mmgem.negatives import negatives_of


def drawn(index: int, *items: Item) -> Image.Image:
    plan = plan_of(0, "train", index)
    return draw(items, plan.texture, plan.tone, size=112, grain=plan.grain)


def scene_of_two() -> tuple[int, Item, Item]:
    """The first one of two objects with nothing in common, of which the first may have the other's colour."""
    for index in range(400):
        one, *others = plan_of(0, "train", index).items
        kinds = ("colour", "shape", "size", "material")
        if len(others) == 1 and all(getattr(one, kind) != getattr(others[0], kind) for kind in kinds):
            caption, text = (f"a {c} {one.shape} and a {others[0].shape}" for c in (one.colour, others[0].colour))
            if edited_scene(0, "train", index, caption, text):
                return index, one, others[0]
    raise AssertionError("no such scene")


def test_what_the_texts_tell_differently_is_changed_and_nothing_else() -> None:
    index, one, other = scene_of_two()
    a, b = f"{one.colour} {one.shape}", f"{other.colour} {other.shape}"

    def edit(caption: str, text: str) -> Image.Image | None:
        return edited_scene(0, "train", index, caption, text)

    recoloured = edit(f"a {a} and a {b}", f"a {other.colour} {one.shape} and a {other.colour} {other.shape}")
    assert recoloured == drawn(index, replace(one, colour=other.colour), other)
    matter = edit(f"a {one.material} {one.shape}", f"a {other.material} {one.shape}")
    # The other one, of which neither text speaks, gives it and takes what this one had.
    assert matter == drawn(index, replace(one, material=other.material), replace(other, material=one.material))
    assert edit(f"a {a} and a {b}", f"a {a}") is None  # another number of objects
    assert edit(f"a {other.material} {one.shape}", f"a {one.material} {one.shape}") is None  # not the scene's caption
    assert edit(f"a {a} and a {b}", f"a {b} with a {a}") is None  # as true as the caption
    assert edit("a dog", "a cat") is None


@pytest.mark.parametrize("kind", ["colour", "size", "object", "swap", "leak", "borrow", "exchange", "relation"])
def test_negatives_of_many_scenes(kind: str) -> None:
    """Each kind is drawn for a good part of the captions; the ground never changes."""
    rng, made = Random(0), Counter[bool]()
    for scene in iter_scenes(0, "train", 40):
        for caption in scene.captions[:3]:
            for one in negatives_of(caption, [kind], rng, 1, scene.captions):
                picture = edited_scene(0, "train", scene.index, caption, one.text)
                made[picture is not None] += 1
                if picture is None:
                    continue
                assert picture.size == (112, 112) and picture != scene.image
                again = edited_scene(0, "train", scene.index, caption, one.text)
                assert again == picture
                assert edited_scene(0, "train", scene.index, caption, caption) is None
                corners = [(0, 0), (111, 0), (0, 111), (111, 111)]
                same = [picture.getpixel(at) == scene.image.getpixel(at) for at in corners]
                assert sum(same) >= 2
    assert made[True] > 20, made
