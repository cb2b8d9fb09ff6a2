"""The report and the comparison in a real browser, at the width of a desk and of a phone: everything is there, nothing
sticks out, marks lie on the objects, nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Tab, chromium
from eval_standin import ColourModel
from PIL import Image

from mmgem.data.scenes import attributes_of
from mmgem.data.shards import ShardedDataset
from mmgem.evaluation.compare import compare, write_comparison
from mmgem.evaluation.report import About, write_report
from mmgem.evaluation.result import (
    ChoiceExample,
    Confusion,
    Example,
    Kind,
    MapExample,
    SearchExample,
    TaskResult,
)
from mmgem.evaluation.run import evaluate
from mmgem.evaluation.tasks import TaskOptions

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")

WIDTHS = {"desk": 1280, "phone": 390}
LONG = "a-name-without-a-break-that-is-longer-than-a-phone-is-wide-and-then-some"
MODELS = ("after-the-global-stage", "fine-grained")


class Other(ColourModel):
    """Blind to red."""

    def image_vectors(self, images, batch_size=64):
        vectors_NE = super().image_vectors(images).clone()
        vectors_NE[:, 0] = 0
        return vectors_NE


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmgem.data.prepare.scenes import prepare_scenes

    out = tmp_path_factory.mktemp("browser") / "scenes"
    prepare_scenes(out, train=0, val=0, test=48, size=112, processes=1)
    return out


@pytest.fixture(scope="module")
def report(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: two models, four tasks measured, and tasks made up of pictures and boxes of the same scenes."""
    out = tmp_path_factory.mktemp("report")
    tasks = ["retrieval", "captioning", "region-retrieval", "region-captioning"]
    models = dict(zip(MODELS, (Other(), ColourModel()), strict=True))
    found = evaluate(
        models, scenes, "test", tasks, out, options=TaskOptions(samples=50, progress=False, drawn=8, worst=7)
    )
    results = [result for name in MODELS for result in found[name].values()]
    picture = results[0].picture
    assert picture is not None
    for name in MODELS:
        made = {
            "zero-shot": choices(scenes, "Which is it?"),
            "composition": choices(scenes, ""),
            "similarity-map": maps(scenes),
            "rerank": [e for e in found[name]["retrieval"].examples if isinstance(e, SearchExample)][:8],
        }
        for task, examples in made.items():
            figures = {"accuracy@1": 0.5, LONG.replace("-", "_"): 0.25}
            results.append(TaskResult(task, {"images": 48}, figures, {}, {}, list(examples), name, picture=picture))
    few, many = np.random.default_rng(0).integers(0, 50, (2, 40, 40))
    results[-4].confusion = Confusion([f"class {i}" for i in range(8)], few[:8, :8].tolist())
    results[-3].confusion = Confusion([*(f"class {i}" for i in range(39)), LONG], many.tolist())
    log = [{"step": n, "stage": "global" if n < 60 else LONG, "loss": 5 / n, "lr": 1e-4 * n} for n in range(1, 100)]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    facts = [("Evaluated on", "48 rendered scenes"), ("A long one", LONG * 3)]
    write_report(out / "report.html", results, About("mmgem · scenes", "All kinds.", facts, f"a: {LONG * 4}\n",
                                                     out / "log.jsonl", "Made by a test."))  # fmt: skip
    return out


def choices(scenes: Path, question: str) -> list[Example]:
    found: list[Example] = []
    for n, sample in enumerate(ShardedDataset(scenes / "test").sample(i) for i in range(16)):
        right = n % 3 > 0
        kind: Kind = "drawn" if n < 8 else "worst"
        options = ((sample.captions[0], 0.4, right), (LONG, 0.3, not right), ("nothing at all", 0.1, False))
        found.append(ChoiceExample(kind, n, question, options, right))
    return found


def maps(scenes: Path) -> list[Example]:
    """The nearest place is the middle of the text's box."""
    found: list[Example] = []
    for n in range(8):
        sample = ShardedDataset(scenes / "test").sample(n)
        left, top, right, bottom = sample.regions[0].box
        x, y = (left + right) / 2, (top + bottom) / 2
        grid = (np.arange(7) + 0.5) * 16
        scores = np.exp(-((grid[:, None] - y) ** 2 + (grid[None, :] - x) ** 2) / 800)
        rows = tuple(map(tuple, scores.tolist()))
        box, text = sample.regions[0].box, sample.regions[0].phrase
        kind: Kind = "drawn" if n < 7 else "worst"
        found.append(MapExample(kind, n, text, (0.0, 0.0, 112.0, 112.0), rows, (box,), (x, y), n % 4 > 0))
    return found


@pytest.fixture(scope="module")
def compared(report: Path, scenes: Path) -> Path:
    found = compare(f"{report}:{MODELS[0]}", f"{report}:{MODELS[1]}", samples=200)
    write_comparison(report / "compared", found)
    return report / "compared/compare.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def show(tab: Tab, page: Path, width: str, *, dark: bool = False, unfolded: bool = True) -> None:
    tab.open(page, WIDTHS[width], 900, mobile=width == "phone", dark=dark)
    if unfolded:
        tab.run("document.querySelectorAll('details.more').forEach(d => d.open = true)")


LOADED = """(async () => {
    const uris = [...document.querySelectorAll('image, img')].map(i => i.getAttribute('href') || i.src);
    const sizes = await Promise.all(uris.map(uri => new Promise(done => {
        const image = new Image();
        image.onload = () => done(image.naturalWidth); image.onerror = () => done(0); image.src = uri;
    })));
    const missing = [...document.querySelectorAll('use')].filter(u => !document.querySelector(u.getAttribute('href')));
    const flat = [...document.querySelectorAll('svg.picture image, svg.picture use')].filter(
        i => { const box = i.getBoundingClientRect(); return box.width < 20 || box.height < 20; });
    return {pictures: sizes.length, empty: sizes.filter(s => !s).length, missing: missing.length, flat: flat.length};
})()"""

# What a scroll box holds may be wider than the page.
STICKING_OUT = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll *, pre, svg *'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 120)).slice(0, 5)"""


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_loads_and_nothing_sticks_out(tab: Tab, report: Path, tmp_path: Path, width: str) -> None:
    show(tab, report / "report.html", width)
    loaded = tab.run(LOADED)
    assert loaded["pictures"] > 60 and loaded["empty"] == loaded["missing"] == loaded["flat"] == 0, loaded
    assert tab.run("innerWidth") == WIDTHS[width]
    assert tab.run("document.scrollingElement.scrollWidth") <= WIDTHS[width], tab.run(STICKING_OUT)
    assert tab.run(STICKING_OUT) == []
    assert [url for url in tab.requests if not url.startswith(("data:", "file:"))] == []
    assert len([url for url in tab.requests if url.startswith("file:")]) == 1
    assert tab.said == []


def test_the_rest_is_folded(tab: Tab, report: Path, tmp_path: Path) -> None:
    show(tab, report / "report.html", "phone", unfolded=False)
    folded = tab.run("document.body.scrollHeight")
    tab.screenshot(tmp_path / "top.png", (0, 0, WIDTHS["phone"], 9000))
    seen = "[...document.querySelectorAll('article, .search')].filter(e => e.checkVisibility()).length"
    few = tab.run(seen)
    show(tab, report / "report.html", "phone")
    assert tab.run("document.body.scrollHeight") > folded + 2000 and tab.run(seen) > few + 10


MARKS = """[...document.querySelectorAll('article.card svg.picture')].filter(s => s.checkVisibility()
    && !s.closest('details:not([open])') && s.getAttribute('aria-label') === 'image with numbered boxes').map(s => {
    const image = s.querySelector('image, use').getBoundingClientRect();
    return {image: [image.x + scrollX, image.y + scrollY, image.width, image.height],
        said: s.parentElement.querySelector('.body').innerText,
        boxes: [...s.querySelectorAll('rect.box')].map(r => r.getBoundingClientRect()).map(
            b => [b.left - image.x, b.top - image.y, b.right - image.x, b.bottom - image.y])}})"""


@pytest.mark.parametrize("width", WIDTHS)
def test_marks_lie_on_the_objects(tab: Tab, report: Path, scenes: Path, tmp_path: Path, width: str) -> None:
    """Boxes as they are drawn, in pixels of the scene; and the scene's pixels as the screenshot shows them there."""
    show(tab, report / "report.html", width, unfolded=False)
    drawn = tab.run(MARKS)
    top = min(one["image"][1] for one in drawn)
    tab.screenshot(tmp_path / "cards.png", (0, top, WIDTHS[width], max(one["image"][1] for one in drawn) + 400 - top))
    shown = Image.open(tmp_path / "cards.png").convert("RGB")
    dataset = ShardedDataset(scenes / "test")
    known = [dataset.sample(i) for i in range(len(dataset))]
    assert len(drawn) == 12
    found = 0
    for one in drawn:
        x, y, wide, high = one["image"]
        assert wide == pytest.approx(high, rel=0.01)
        boxes = np.array(one["boxes"]) * 112 / wide
        fits = [s for s in known if _same(boxes, s)]
        assert fits, (one["said"], boxes)
        for box, region in zip(boxes, fits[0].regions, strict=False):
            middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            there = shown.getpixel((round(x + middle[0] / 112 * wide), round(y - top + middle[1] / 112 * high)))
            scene = _opened(fits[0]).getpixel((int(middle[0]), int(middle[1])))
            found += int(np.abs(np.subtract(there, scene)).max() < 60)
            assert attributes_of(region.phrase) is not None
    assert found > 0.85 * sum(len(one["boxes"]) for one in drawn)  # the rest lie under a badge or on an edge


def _same(boxes: np.ndarray, sample) -> bool:
    distinct = list(dict.fromkeys(region.box for region in sample.regions))[: len(boxes)]
    return len(distinct) == len(boxes) and bool(np.abs(boxes - np.array(distinct)).max() < 0.6)


def _opened(sample) -> Image.Image:
    from mmgem.data.samples import decode_image

    return decode_image(sample).convert("RGB")


CONTRAST = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92
        : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (e) => { let layers = [];
        for (let at = e; at; at = at.parentElement) {
            const c = rgb(getComputedStyle(at).backgroundColor); layers.push(c); if (c[3] === 255) break; }
        const over = (under, c) => under.map((v, i) => v + (c[i] - v) * c[3] / 255);
        return layers.reverse().reduce(over, [255, 255, 255]); };
    const poor = new Set();
    for (const e of document.querySelectorAll('main *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!own || e.closest('svg.picture') || !e.checkVisibility()) continue;
        const inside = e.closest('svg');
        const style = getComputedStyle(e);
        const ink = rgb(inside ? style.fill : style.color);
        const [a, b] = [light(ink), light(ground(inside || e))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) poor.add(`${e.tagName}.${e.getAttribute('class')} ${ratio.toFixed(2)}`);
    }
    return [...poor];
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(tab: Tab, report: Path, compared: Path, tmp_path: Path, dark: bool) -> None:
    """A contrast of 4.5, as WCAG 2 asks for; and the lines of a chart are told apart."""
    for name, page in (("report", report / "report.html"), ("compare", compared)):
        show(tab, page, "desk", dark=dark, unfolded=False)
        assert tab.run(CONTRAST) == []
        tab.screenshot(tmp_path / f"{name}.png", (0, 2500, WIDTHS["desk"], 2500))
    show(tab, report / "report.html", "desk", dark=dark, unfolded=False)
    lines = "[...document.querySelectorAll('[class^=line]')].map(e => [e.tagName, getComputedStyle(e)])"
    found = tab.run(f"{lines}.map(([t, s]) => t + s.stroke + s.strokeDasharray).filter(s => s.startsWith('poly'))")
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize("width", WIDTHS)
def test_the_comparison_fits_as_well(tab: Tab, compared: Path, tmp_path: Path, width: str) -> None:
    show(tab, compared, width)
    assert tab.run("document.scrollingElement.scrollWidth") <= WIDTHS[width] and tab.run(STICKING_OUT) == []
    assert tab.run("document.querySelectorAll('svg.forest circle').length") > 30
    clipped = """[...document.querySelectorAll('svg.forest')].flatMap(s => [...s.querySelectorAll('text, circle')]
        .filter(e => { const a = e.getBoundingClientRect(), b = s.getBoundingClientRect();
            return a.left < b.left || a.right > b.right || a.bottom > b.bottom + 1; }).map(e => e.outerHTML))"""
    assert tab.run(clipped) == []
    tab.screenshot(tmp_path / f"{width}.png")
    assert tab.said == [] and all(url.startswith("file:") for url in tab.requests)
