"""The sections of a report: all kinds of examples, curves and confusions, folding, tasks without words of their own."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, Page

from mmgem.evaluation.curves import confusion_parts, curve_chart
from mmgem.evaluation.report import About, render_report
from mmgem.evaluation.result import (
    CaptionExample,
    ChoiceExample,
    Confusion,
    Curve,
    Hit,
    MapExample,
    SearchExample,
    TaskResult,
)
from mmgem.page import heated


def blank(row):
    return Image.new("RGB", (60, 40), (row % 250, 90, 90))


def result(task, examples=(), model="m", **more):
    return TaskResult(task, {"images": 1000}, {"x": 0.5}, {}, {}, list(examples), model=model, picture=blank, **more)


def page_of(*results):
    html = render_report(results, About())
    return Page(html), html


def choice(n=0, kind="drawn", taken=True, question="What is it?"):
    choices = (("a red ball", 0.31, True), ("a blue cube", 0.2, False))
    choices = choices if taken else (("a blue cube", 0.35, False), choices[0])
    return ChoiceExample(kind, n, question, choices, taken)


MAP = MapExample("drawn", 3, "a red ball", (10.0, 0.0, 50.0, 40.0), ((0.1, 0.2), (0.9, 0.1)),
                 ((5.0, 20.0, 30.0, 40.0),), (20.0, 30.0), True)  # fmt: skip


@pytest.mark.parametrize("task", ["zero-shot", "composition"])
def test_choices_are_cards_with_scores_and_marks(task):
    page, html = page_of(
        result(task, [choice(), choice(1, taken=False)], "one"), result(task, [choice(taken=False)], "two")
    )
    assert page.count("article") == 2 and page.count("ol", "choices") == 3
    assert page.text.count("a red ball ✓") == 3 and page.text.count("a blue cube ✓") == 0
    assert page.text.count("a blue cube ✗") == 2  # taken and wrong
    assert "0.310" in page.text and page.text.count("What is it?") == 2
    assert {"zero-shot": "Which class", "composition": "Which text is true"}[task] in page.text


def test_questions_of_one_picture_stay_apart():
    again = ChoiceExample("drawn", 0, "What is it?", (("a cone", 0.5, True), ("a cube", 0.1, False)), True)
    page, _ = page_of(*(result("composition", [choice(), choice(question="And this?"), again], m) for m in "ab"))
    assert page.count("article") == 3 and "And this?" in page.text
    assert page.text.count("a cone ✓") == 2


def test_a_map_is_drawn_with_its_boxes_and_its_peak():
    missed = replace(MAP, hit=False)
    page, html = page_of(result("similarity-map", [MAP], "one"), result("similarity-map", [missed], "two"))
    assert "Where a text is seen" in page.text and "cosines 0.10 to 0.90" in page.text
    assert page.count("article", "map") == 2 and page.count("rect", "box") == 2
    assert html.count('<circle class="box" cx="20.0" cy="30.0"') == 2
    assert html.count('x="5.0" y="20.0" width="25.0" height="20.0"') == 4
    assert "✓ “a red ball”" in page.text and "✗ “a red ball”" in page.text


def test_heat_lies_over_the_window_and_is_brightest_at_the_greatest():
    grey = Image.new("RGB", (60, 40), (128, 128, 128))
    pixels = np.asarray(heated(grey, MAP.scores, MAP.window)).astype(int)
    assert (pixels[:, :10] == 128).all() and (pixels[:, 50:] == 128).all()
    brightness = pixels[:, 10:50].sum(axis=2)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert x < 20 and y >= 20  # the second row's first cell
    assert brightness.min() < 3 * 128 < brightness.max()
    assert (np.asarray(grey) == 128).all()
    even = np.asarray(heated(grey, ((0.5, 0.5),), (0.0, 0.0, 60.0, 40.0)))
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1
    assert heated(grey, MAP.scores, (-20.0, -20.0, 80.0, 60.0)).size == (60, 40)


@pytest.mark.parametrize("task", ["rerank", "some-task"])
def test_searches_and_captions_work_for_any_task(task):
    search = SearchExample("drawn", "a query", 7, (Hit(0, None, 0.5, False),), Hit(1, None, 0.2, True))
    caption = CaptionExample("worst", 2, "what it wrote", ("a reference",), 0.25)
    page, html = page_of(result(task, [search, caption]))
    assert "right answer at place 7 of 1,000" in page.text and page.count("figure", "wanted") == 1
    assert "what it wrote" in page.text and "Where it fails" in page.text
    assert (task == "rerank") == ("Ranked again" in page.text) and (task == "some-task") == ("Some task" in page.text)


def test_six_are_shown_and_the_others_folded():
    page, html = page_of(
        result("zero-shot", [*(choice(n) for n in range(20)), *(choice(n, "worst") for n in range(20, 26))])
    )
    folded = re.findall(r'<details class="more"><summary>(.*?)</summary>(.*?)</details>', html, re.S)
    assert [words for words, _ in folded] == ["14 more"]
    assert folded[0][1].count("<article") == 14 and page.count("article") == 26


def test_the_worst_are_those_of_the_last_model():
    one = result("captioning", [CaptionExample("worst", 0, "of one", (), 0.1)], "one")
    two = result("captioning", [CaptionExample("worst", 1, "of two", (), 0.1)], "two")
    page, _ = page_of(one, two)
    assert "of two" in page.text and "of one" not in page.text
    assert "Where it fails: the lowest CIDEr of two" in page.text


def test_a_task_without_pictures_or_examples_has_no_section():
    bare = result("captioning", [CaptionExample("drawn", 0, "x", (), 0.1)])
    bare.picture = None
    page, _ = page_of(bare, result("retrieval"))
    assert "Captions" not in page.text and page.count("article") == 0


def test_hostile_texts_in_choices_maps_and_classes_are_escaped():
    options = ((HOSTILE, 0.5, False), (HOSTILE, 0.4, True))
    examples = [ChoiceExample("drawn", 0, HOSTILE, options, False), replace(MAP, text=HOSTILE)]
    confused = Confusion([HOSTILE, "b"], [[1, 2], [3, 4]])
    curves = [Curve(HOSTILE, [(1.0, 0.1), (10.0, 0.5)])]
    page, html = page_of(result("zero-shot", examples, HOSTILE, confusion=confused, curves=curves))
    assert "<script" not in html.lower() and page.count("img") == 0
    assert page.text.count('alert("x")') > 6


# --- curves and confusions -------------------------------------------------------------------


def test_curves_of_all_models_are_one_chart_on_a_scale_of_logarithms():
    curve = [Curve("image → text", [(1.0, 0.1), (10.0, 0.5), (1000.0, 1.0)]), Curve("text → image", [(1.0, 0.2)])]
    drawn = curve_chart("retrieval", [result("retrieval", model=m, curves=curve) for m in ("one", "two")])
    assert drawn is not None
    lines = re.findall(r'<polyline class="(line\d)" stroke-dasharray="([^"]+)" points="([^"]+)"', drawn.svg)
    assert [line[:2] for line in lines] == [(c, d) for c in ("line0", "line1") for d in ("none", "7 4")]
    xs = [float(p.split(",")[0]) for p in lines[0][2].split()]
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 3, abs=0.1)
    ys = [float(p.split(",")[1]) for p in lines[0][2].split()]
    assert ys[0] > ys[1] > ys[2]
    assert [re.sub(r"<[^>]+>", "", t) for t in re.findall(r'<text class="x"[^>]*>.*?</text>', drawn.svg)] == [
        "1", "10", "100", "1000"
    ]  # fmt: skip
    assert [name for *_, name in drawn.legend] == [f"{m}, {c.name}" for m in ("one", "two") for c in curve]
    page, _ = page_of(*(result("retrieval", model=m, curves=curve) for m in ("one", "two")))
    assert page.count("svg", "chart") == 1 and "one, image → text" in page.text


def test_curves_that_are_flat_or_single_points_or_below_zero_are_drawn():
    for points in ([(1.0, 0.0)], [(0.0, 0.5), (3.0, 0.5)], [(-1.0, -2.0), (1.0, -1.0)]):
        drawn = curve_chart("x", [result("x", curves=[Curve("c", points)])])
        assert drawn is not None and "nan" not in drawn.svg and "inf" not in drawn.svg
    assert curve_chart("x", [result("x")]) is None


def test_few_classes_are_a_whole_table_and_many_their_worst_pairs():
    page, html = page_of(result("zero-shot", confusion=Confusion(["a", "b"], [[3, 1], [0, 2]])))
    assert page.count("table", "confusion") == 1 and page.count("td", "yes") == page.count("td", "no") == 2
    assert '<td class="no" style="--s:25%">1</td>' in html
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (30, 30))
    counts[4, 7] = 100
    parts = confusion_parts(Confusion([f"c{i}" for i in range(30)], counts.tolist()))
    assert parts["rows"] == [] and len(parts["pairs"]) == 20
    first = parts["pairs"][0]
    assert (first["true"], first["taken"], first["count"]) == ("c4", "c7", 100)
    assert first["share"] == f"{100 / counts[4].sum():.0%}"
    sizes = [pair["count"] for pair in parts["pairs"]]
    assert sizes == sorted(sizes, reverse=True) and all(pair["true"] != pair["taken"] for pair in parts["pairs"])
    perfect = Confusion([str(i) for i in range(13)], np.eye(13, dtype=int).tolist())
    page, _ = page_of(result("zero-shot", confusion=perfect))
    assert "Nothing was taken for anything else" in page.text
