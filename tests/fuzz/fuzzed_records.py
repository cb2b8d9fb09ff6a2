"""KEY.json and KEY.txt: any JSON in any field; what is left is a sample that can be trained on."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from mutations import CHANGES, DAMAGES, SOMETIMES, changed, damaged
from reading import assert_whole, encoded, picture, refused

from mmgem.data.batch import stable_id
from mmgem.data.samples import OpenedPicture, SampleError, decode_image, merge_texts, parse_captions, parse_sample
from mmgem.data.transforms import plain_view, view_picture
from mmgem.images import Preprocess

HOW = Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
JPEG, PNG = encoded(picture(1, 80, 60)), encoded(picture(2, 80, 60), "PNG")
REGION = {"box": [1, 2.5, 30, 40], "phrase": "a thing", "entity": "7", "types": ["x"]}
RECORDS = [
    {"captions": ["a", "b"], "regions": [REGION, {**REGION, "box": [0, 0, 80, 60]}], "width": 80, "height": 60, "n": 1},
    {"caption": "a", "url": "x"},
    {"captions": ["a"], "width": 80, "height": 60},
    {"regions": [REGION], "exif": {"a": [1]}},
]
NUMBERS = [
    0.0,
    -0.0,
    5e-324,
    1e-200,
    1e-160,
    1e-30,
    79.99999999,
    80,
    80.0000001,
    1e17,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    -1,
    60,
]


def record(tree: dict[str, Any], boxes: list[list[float]], changes: Any, tear: bool, damages: Any) -> bytes:
    if "regions" in tree and boxes:
        tree = {**tree, "regions": [{**REGION, "box": box} for box in boxes]}
    made = changed(tree, changes)
    return damaged(made, damages) if tear else made


_BOX = st.lists(st.sampled_from(NUMBERS) | st.floats() | st.integers(), min_size=4, max_size=4)
INPUTS = st.tuples(
    st.builds(record, st.sampled_from(RECORDS), st.lists(_BOX, max_size=3), CHANGES, SOMETIMES, DAMAGES) | st.just(b""),
    st.sampled_from([b"", b"a caption", b" \n", b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"a" * 100_000]),
    st.sampled_from([JPEG, PNG]),
)


def check(content: tuple[bytes, bytes, bytes]) -> str:
    record, text, image = content
    try:
        meta = merge_texts("k", record, text)
        sample = parse_sample("k", image, meta)
        assert_whole(sample)
        assert parse_captions("k", meta) == sample.captions
    except SampleError as error:
        return refused(error)
    opened = OpenedPicture(sample)
    view = plain_view(HOW, *opened.size)
    boxes_R4, kept = view.boxes([region.box for region in sample.regions])
    assert torch.isfinite(boxes_R4).all() and boxes_R4.ge(0).all() and boxes_R4.le(1).all()
    for region in sample.regions:
        stable_id("entity", sample.key, region.entity or str(region.box))
    try:
        assert torch.isfinite(view_picture(opened, view, HOW, scaled=True)).all()
        decode_image(sample)
    except SampleError as error:
        assert error.reason == "size differs from record", error
        return "of another size"
    return "whole, parts dropped" if sample.dropped else "whole"


def warm_up() -> None:
    assert check((b'{"caption": "x"}', b"", JPEG)) == "whole"
