"""The report and its charts: parsed, complete, self-contained, and safe against hostile texts."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_standin import ColourModel
from PIL import Image
from test_tasks import OPTIONS, SAMPLES, SPLIT_TASKS, halves, make_sample, write_split

from mmgem.evaluation.charts import charts, read_log
from mmgem.evaluation.report import About, number, render_report
from mmgem.evaluation.result import CaptionExample, TaskResult, write_json
from mmgem.evaluation.run import describe_config, evaluate, find_run
from mmgem.page import Mark, cutout, jpeg_uri, label, picture, ticks

HOSTILE = '<script>alert("x")</script> & "quotes" </svg><img src=x onerror=alert(1)>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []
        self.feed(text.replace("<wbr>", ""))
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag, css=None):
        return sum(t == tag and (css is None or css in (a.get("class") or "").split()) for t, a in self.tags)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def write_log(run, lines):
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def log_lines(steps=30):
    for step in range(1, steps + 1):
        yield {
            "step": step,
            "stage": "global" if step <= 20 else "regions & <b>",
            "samples": step * 8,
            "loss": 5 - step / 10,
            "loss_emb": 3 - step / 15,
            "loss_gen": 2 - step / 30,
            "lr": 1e-3 * step / steps,
            "logit_scale": 14.3,
            "samples_per_s": 100.0,
        }


@pytest.fixture
def run(tmp_path):
    """A run folder with two models' worth of results on data with a hostile sample."""
    extra = [
        make_sample("e", "black", "white", [HOSTILE], halves("black", "white")),
        *(make_sample(f"f{i}", "cyan", "blue", [f"cyan blue {i}"], halves("cyan", "blue")) for i in range(6)),
    ]
    data = write_split(tmp_path / "data", [*SAMPLES, *extra])
    run = tmp_path / "run"
    write_log(run, log_lines())
    (run / "config.yaml").write_text(
        "model: {vision: {library: timm, name: tower_x, image_size: 96}, llm: {config: {model_type: llama,"
        " num_hidden_layers: 3, hidden_size: 64}}}\nstages:\n- {name: global, samples: 1200, lr: 0.001,"
        " global_batch: 8}\n"
    )
    evaluate(
        {"stage1": ColourModel("cube"), "stage2": ColourModel("ball")},
        data,
        "test",
        SPLIT_TASKS,
        run / "report",
        options=OPTIONS,
        crop_baseline={"stage1"},
        run_dir=run,
    )
    return run


@pytest.fixture
def html(run):
    return (run / "report" / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_has_figures_charts_and_pictures(html):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.count("svg", "chart") == 6 + 1  # of training, and the recalls of retrieval
    shown = page.count("image") - page.count("symbol") + page.count("use")
    assert page.count("svg", "picture") > 30 and shown == page.count("svg", "picture")
    assert page.count("figure", "hit") > 0 and page.count("figure", "wanted") > 0
    assert page.count("rect", "box") > 10
    for name in ("text_retrieval_recall@1", "CIDEr", "crop_region_image_retrieval_recall@1"):
        assert name in page.text
    for words in (
        "stage2 ÷ stage1",
        "chance",
        "tower_x, of timm, random weights, 96 pixels",
        "1,200 samples",
    ):
        assert words in page.text
    assert "data/test: 11 images" in page.text


def test_the_table_shows_every_figure_with_its_error_chance_and_ratio(run, html):
    results = json.loads((run / "report" / "metrics.json").read_text())
    rows = {
        cells[0]: cells[1:]
        for row in re.findall(r"<tr><td class=\"name\">(.*?)</tr>", html.replace("<wbr>", ""), re.S)
        if (cells := [" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in row.split("</td>")[:-1]])
    }
    assert set(rows) == {name for r in results for name in r["metrics"]}
    name = "region_colour_shape_accuracy"
    first, last = [r for r in results if r["task"] == "region-captioning"]
    assert rows[name][0] == f"{first['metrics'][name]:.3f} ± {first['stderr'][name]:.3f}" == "0.000 ± 0.000"
    assert rows[name][1] == "1.000 ± 0.000"
    assert rows[name][2] == number(last["chance"][name])
    assert rows[name][3] == "–"  # nothing can be divided by zero
    assert rows["BLEU@1"][3].startswith("× ")
    assert rows["crop_region_image_retrieval_recall@1"][1] == "–"


def test_right_and_wrong_are_marked_on_scenes(html):
    page = Page(html)
    # Two boxes on each image, all of which are drawn, right only by the second model; and by both models 20 maps whose
    # peak lies in the box.
    assert page.count("span", "wrong") == 22 and page.count("span", "right") == 22 + 2 * 20
    assert "✓ a red ball" in page.text and "✗ a red cube" in page.text


def test_the_page_needs_nothing_from_outside(html):
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in attrs:
                allowed = ("#p",) if tag == "use" else ("data:image/jpeg;base64,",)
                assert attrs[name].startswith(allowed), (tag, attrs[name][:60])
        assert not any(name.startswith("on") for name in attrs)
    assert "@import" not in html and "url(" not in html
    assert not re.search(r"https?://", html)


def test_a_picture_that_stands_twice_is_embedded_once(html):
    uris = re.findall(r'base64,([^"]+)"', html)
    assert len(uris) == len(set(uris))
    page = Page(html)
    names = [attrs["id"] for tag, attrs in page.tags if tag == "symbol"]
    used = [attrs["href"].removeprefix("#") for tag, attrs in page.tags if tag == "use"]
    assert len(names) == len(set(names)) > 5 and set(used) == set(names)
    assert min(map(used.count, names)) >= 2


def test_hostile_texts_are_shown_and_never_run(html):
    assert "<script" not in html.lower() and "onerror=alert(1)>" not in html
    page = Page(html)
    assert HOSTILE.split(" & ")[0] in page.text
    assert "regions & <b>" in page.text


def blank(row: int) -> Image.Image:
    return Image.new("RGB", (8, 8))


def test_a_hostile_caption_of_the_model_is_escaped():
    results = [
        TaskResult("captioning", {"split": HOSTILE}, {"CIDEr": 0.5}, {}, {}, [example], model=HOSTILE, picture=blank)
        for example in [CaptionExample("drawn", 0, HOSTILE, (HOSTILE,), 0.5)]
    ]
    text = render_report(results, About(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)]))
    page = Page(text)
    assert page.count("script") == page.count("img") == 0
    assert page.text.count('alert("x")') >= 8


def test_embedded_pictures_are_small_jpegs_of_the_data(html):
    uris = re.findall(r'data:image/jpeg;base64,([^"]+)"', html)
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris]
    assert all(max(size) <= 360 for size in sizes)
    assert (40, 20) in sizes


def test_one_model_without_a_name_and_without_examples_gives_a_page():
    result = TaskResult("retrieval", {}, {"x_recall@1": 0.5}, {}, {"x_recall@1": 0.1})
    page = Page(render_report([result], About()))
    assert "÷ chance" in page.text and "× 5.00" in page.text
    assert page.count("svg") == 0 and "Training" not in page.text
    with pytest.raises(ValueError, match="at least one"):
        render_report([], About())


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


# --- pictures --------------------------------------------------------------------------------


def test_boxes_are_drawn_in_pixels_of_the_original():
    image = Image.new("RGB", (1000, 500))
    svg = picture(image, 100, "alt", [Mark((10.0, 20.0, 110.0, 220.0), "#e69f00", "1")])
    assert 'viewBox="0 0 1000 500"' in svg
    assert svg.count('x="10.0" y="20.0" width="100.0" height="200.0"') == 2
    stored = Image.open(io.BytesIO(base64.b64decode(re.findall(r'base64,([^"]+)"', svg)[0])))
    assert stored.size == (100, 50)


@pytest.mark.parametrize("box", [(0.0, 0.0, 4.0, 4.0), (196.0, 90.0, 200.0, 100.0), (0.0, 0.0, 200.0, 100.0)])
def test_a_cutout_stays_inside_the_picture_and_shows_the_whole_box(box):
    svg = cutout(Image.new("RGB", (200, 100)), box, 64, "alt", "#fff")
    x, y, width, height = (float(v) for v in re.findall(r'viewBox="([^"]+)"', svg)[0].split())
    assert x >= 0 and y >= 0 and x + width <= 200 and y + height <= 100
    assert x <= box[0] and y <= box[1] and x + width >= box[2] and y + height >= box[3]


def test_pictures_with_transparency_or_a_palette_are_embedded():
    for mode in ("RGBA", "P", "L"):
        assert jpeg_uri(Image.new(mode, (4, 4))).startswith("data:image/jpeg;base64,/9j/")


# --- charts ----------------------------------------------------------------------------------


def test_a_log_with_a_torn_line_repeats_and_odd_values_is_read(tmp_path):
    lines = [{"step": s, "stage": "a", "loss": float(s)} for s in (1, 2, 3)]
    lines += [{"step": 2, "stage": "a", "loss": 20.0}, {"captions": ["x"]}, {"step": 4, "stage": "a", "loss": None}]
    write_log(tmp_path, lines)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "sta')
    log = read_log(tmp_path / "log.jsonl")
    assert log.x.tolist() == [1, 2, 3, 4]
    assert [line["loss"] for line in log.lines] == [1.0, 20.0, 3.0, None]
    assert len(charts(log)) == 1
    assert charts(read_log(None)) == charts(read_log(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("restarts", [True, False])
def test_stages_follow_one_another_whether_or_not_their_steps_start_again(tmp_path, restarts):
    lines = [{"step": s, "stage": "a", "loss": 2.0} for s in range(1, 11)]
    lines += [{"step": s + (0 if restarts else 10), "stage": "b", "loss": 1.0} for s in range(1, 6)]
    write_log(tmp_path, lines)
    log = read_log(tmp_path / "log.jsonl")
    assert log.x.tolist() == list(range(1, 16))
    assert [(s.name, s.start, s.stop) for s in log.spans] == [("a", 1, 10), ("b", 10, 15)]


def test_a_chart_smooths_within_stages_and_stays_in_its_frame(tmp_path):
    rng = np.random.default_rng(0)
    lines = [{"step": s, "stage": "a", "loss": float(rng.normal())} for s in range(1, 2001)]
    lines += [{"step": s, "stage": "b", "loss": 100.0} for s in range(2001, 2101)]
    write_log(tmp_path, lines)
    (svg,) = charts(read_log(tmp_path / "log.jsonl"))
    Page(svg)
    curves = re.findall(r'<polyline class="(raw|smooth)" points="([^"]+)"', svg)
    assert [kind for kind, _ in curves] == ["raw", "smooth", "raw", "smooth"]
    points = [[tuple(map(float, p.split(","))) for p in text.split()] for _, text in curves]
    assert all(0 <= x <= 520 and 0 <= y <= 290 for curve in points for x, y in curve)
    assert max(len(curve) for curve in points) <= 400
    assert len({y for _, y in points[3]}) == 1  # the second stage does not see the first
    spread = [np.ptp([y for _, y in curve]) for curve in points]
    assert spread[1] < 0.5 * spread[0]
    assert ">last 100<" in svg and ">a</text>" in svg and ">b</text>" in svg


def test_a_flat_curve_and_values_that_are_not_finite_make_a_chart(tmp_path):
    lines = [{"step": s, "stage": "", "loss": 3.0, "lr": math.inf} for s in range(1, 5)]
    write_log(tmp_path, lines)
    (svg,) = charts(read_log(tmp_path / "log.jsonl"))
    assert "nan" not in svg and "inf" not in svg


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 3000, 5) == [0, 1000, 2000, 3000]
    assert ticks(0.2, 6.3, 5, outwards=True) == [0, 2, 4, 6, 8]
    assert ticks(0, 1e-3, 5) == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert ticks(-1.5, 1.5, 3) == [-1, 0, 1]
    assert ticks(2, 2, 5) == [2]


def test_labels_are_short():
    assert [label(v) for v in (0, 0.5, 1500, 25000, 2.5e6, 2e-4, -3)] == [
        "0", "0.5", "1500", "25k", "2.5M", "2e-4", "-3",
    ]  # fmt: skip


# --- what is said of the run -----------------------------------------------------------------


def test_the_run_is_found_beside_the_model(tmp_path):
    run = tmp_path / "runs" / "x"
    write_log(run, log_lines(2))
    (run / "stages" / "global").mkdir(parents=True)
    assert find_run({"a": ColourModel(), "b": run / "stages" / "global"}) == run
    assert find_run({"a": run}) == run
    assert find_run({"a": ColourModel()}) is None
    assert find_run({"a": tmp_path / "elsewhere"}) is None


def test_a_config_that_says_little_is_described_as_far_as_it_goes():
    assert describe_config("") == [] and describe_config("- a\n") == []
    lines = dict(describe_config("model: {}\nstages: [{name: s, epochs: 2, lr: 0.0005}]\n"))
    assert lines["Stage s"] == "2 epochs, learning rate 0.0005"
