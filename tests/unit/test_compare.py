"""`mmgem eval compare`: two evaluations of real files, what it prints and writes, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from eval_standin import COLOURS, ColourModel
from test_report import Page
from test_tasks import OPTIONS, SPLIT_TASKS, halves, make_sample, write_split

from mmgem.cli import main
from mmgem.errors import UserError
from mmgem.evaluation.compare import compare, read_side, table, verdict
from mmgem.evaluation.compare_page import render_comparison
from mmgem.evaluation.metrics.paired import Paired
from mmgem.evaluation.run import evaluate


class Weaker(ColourModel):
    """Sees less of blue, and writes of cubes."""

    def __init__(self):
        super().__init__("cube")

    def image_vectors(self, images, batch_size=64):
        vectors_NE = super().image_vectors(images).clone()
        vectors_NE[:, 2] = 0
        return vectors_NE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    names = list(COLOURS)
    pairs = [(names[n % 7], names[(3 * n + n // 7) % 7]) for n in range(24)]
    samples = [
        make_sample(f"k{n:02}", x, y, [f"{x} and {y}", f"a {y} ball"], halves(x, y)) for n, (x, y) in enumerate(pairs)
    ]
    return write_split(tmp_path_factory.mktemp("compare") / "data", samples)


@pytest.fixture(scope="module")
def reports(data, tmp_path_factory):
    """A report of one model, one of two, and one of retrieval alone."""
    root = tmp_path_factory.mktemp("reports")
    of_both = {"weak": Weaker(), "strong": ColourModel()}
    evaluate({"strong": ColourModel()}, data, "test", SPLIT_TASKS, root / "one", options=OPTIONS)
    evaluate(of_both, data, "test", SPLIT_TASKS, root / "run" / "report", options=OPTIONS)
    evaluate({"weak": Weaker()}, data, "test", ["retrieval"], root / "retrieval", options=OPTIONS)
    return root


@pytest.fixture
def copy(reports, tmp_path):
    return shutil.copytree(reports / "retrieval", tmp_path / "copy")


def changed(folder, change):
    file = folder / "metrics.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return str(folder)


def test_every_figure_is_compared_and_the_difference_is_that_of_metrics_json(reports):
    found = compare(f"{reports}/run:weak", f"{reports}/run", samples=200)
    assert found.names == ("weak", "strong") and found.told == []
    weak, strong = ({r["task"]: r for r in json.loads((reports / "run/report/metrics.json").read_text())
                     if r["model"] == name} for name in found.names)  # fmt: skip
    assert [one.task for one in found.tasks] == SPLIT_TASKS
    for one in found.tasks:
        assert one.told == [] and set(one.figures) == set(weak[one.task]["metrics"])
        for name, paired in one.figures.items():
            assert paired.a == pytest.approx(weak[one.task]["metrics"][name])
            assert paired.difference == pytest.approx(strong[one.task]["metrics"][name] - paired.a)
            assert paired.low <= paired.high and 0 < paired.p <= 1 and paired.samples == 200
    figures = {name: p for one in found.tasks for name, p in one.figures.items()}
    assert verdict("x", figures["region_colour_shape_accuracy"]) == "better"
    assert figures["region_colour_shape_accuracy"].difference == 1.0
    assert figures["text_retrieval_recall@1"].difference > 0


def test_a_model_against_itself_does_not_differ(reports):
    found = compare(f"{reports}/one", f"{reports}/run", samples=200)
    assert found.names == ("one:strong", "run:strong")
    assert {(p.difference, p.low, p.high, p.p) for t in found.tasks for p in t.figures.values()} == {(0, 0, 0, 1)}


def test_the_last_model_is_taken_and_others_by_name(reports):
    assert read_side(f"{reports}/run").model == "strong"
    assert read_side(f"{reports}/run/report:weak").model == "weak"
    with pytest.raises(UserError, match="no model 'week'; it has weak, strong"):
        read_side(f"{reports}/run:week")


def test_a_file_from_before_models_were_named_is_read(copy):
    old = changed(copy, lambda one: one.pop("model"))
    assert compare(old, old, samples=100).tasks[0].task == "retrieval"
    with pytest.raises(UserError, match="names no models"):
        compare(f"{old}:weak", old)


def test_versions_and_dtypes_are_told_and_other_protocols_refused(reports, copy):
    def versions(one):
        one["protocol"]["versions"]["torch"] = "9"
        one["protocol"]["dtype"] = "bfloat16"

    found = compare(f"{reports}/retrieval", changed(copy, versions), samples=100)
    assert len(found.tasks[0].told) == 2
    assert "dtype: float32 and bfloat16" in found.tasks[0].told[0] and found.tasks[0].told[1].endswith(" and 9")
    for name, value in (("split", "val"), ("images", 23), ("captions_an_image", [1, 2]), ("num_beams", 8)):
        other = changed(copy, lambda one, n=name, v=value: one["protocol"].update({n: v}))
        with pytest.raises(UserError, match=f"retrieval: the protocols differ in {name}: .*--allow {name}"):
            compare(f"{reports}/retrieval", other)
        told = compare(f"{reports}/retrieval", other, samples=100, allowed=[name]).tasks[0].told
        assert any(said.startswith(f"{name}: ") for said in told)
        shutil.copy(reports / "retrieval/metrics.json", copy)


def test_other_items_are_refused(reports, copy):
    file = copy / "items/weak.retrieval.npz"
    arrays = dict(np.load(file))

    def with_(**changes):
        np.savez(file, **{**arrays, **changes})
        return str(copy)

    here = f"{reports}/retrieval"
    with pytest.raises(UserError, match="1 images are only in A, e.g. k00, 1 images are only in B, e.g. x"):
        compare(here, with_(keys=np.array(["x", *arrays["keys"][1:]])))
    with pytest.raises(UserError, match="another order"):
        compare(here, with_(keys=arrays["keys"][::-1]))
    with pytest.raises(UserError, match="grouped in another way"):
        units = {n: np.arange(len(v)) // 3 for n, v in arrays.items() if n.startswith("unit")}
        compare(here, with_(**units))
    with pytest.raises(UserError, match="24 and 12 items"):
        halved = {n: np.tile(v.mean(axis=0), (len(v) // 2, 1)) for n, v in arrays.items() if n.startswith("values")}
        halved |= {n: v[: len(v) // 2] for n, v in arrays.items() if n.startswith("unit")}
        about = json.loads(str(arrays["about"]))
        medians = [n for n in about if n.endswith("median_rank")]
        changed(copy, lambda one: [one["metrics"].pop(n) for n in medians])
        compare(here, with_(**halved))
    shutil.copy(reports / "retrieval/metrics.json", copy)
    with pytest.raises(UserError, match="of two evaluations"):
        compare(here, with_(values0=1 - arrays["values0"]) if "values0" in arrays else with_(**{
            n: v + 1 for n, v in arrays.items() if n.startswith("values")}))  # fmt: skip
    file.unlink()
    with pytest.raises(UserError, match="weak.retrieval.npz: no such file"):
        compare(here, str(copy))


def test_what_is_no_evaluation_is_refused(reports, copy, tmp_path):
    here = f"{reports}/retrieval"
    with pytest.raises(UserError, match="no metrics.json here, nor in report/"):
        compare(here, str(tmp_path))
    for text in ("[]", "{", "3", '{"schema": 1}', '[{"schema": 1, "task": "retrieval", "protocol": 3, "metrics": {}}]'):
        (copy / "metrics.json").write_text(text)
        with pytest.raises(UserError, match="metrics.json: (not what|has no)"):
            compare(here, str(copy))
    (copy / "metrics.json").write_text('{"schema": 2}')
    with pytest.raises(UserError, match="schema 2 is not known"):
        compare(here, str(copy))
    shutil.copy(reports / "retrieval/metrics.json", copy)
    other = changed(copy, lambda one: one.update(task="captioning"))
    with pytest.raises(UserError, match="no task in both: .* has retrieval, .* has captioning"):
        compare(here, other)


def test_a_task_of_one_side_is_told(reports):
    found = compare(f"{reports}/retrieval", f"{reports}/run", samples=100)
    assert [one.task for one in found.tasks] == ["retrieval"] and len(found.told) == len(SPLIT_TASKS) - 1
    assert "captioning is in " in found.told[0]


def test_the_command_prints_a_table_and_writes_both_files(reports, tmp_path, capsys):
    out = tmp_path / "new" / "compared"
    code = main(["eval", "compare", f"{reports}/run:weak", f"{reports}/run", "--out", str(out), "--samples", "200"])
    printed = capsys.readouterr().out.splitlines()
    assert code == 0 and printed[-2:] == [f"{out}/compare.json", f"{out}/compare.html"]
    assert re.split(" {2,}", printed[0].strip()) == ["weak", "strong", "B - A", "±", "95 % interval", "p"]
    (line,) = [line for line in printed if line.startswith("  region_colour_shape_accuracy ")]
    assert line.split()[1:5] == ["0.000", "1.000", "+1.000", "0.000"] and line.endswith("better")
    content = json.loads((out / "compare.json").read_text())
    assert content["schema"] == 1 and (content["a"]["name"], content["b"]["model"]) == ("weak", "strong")
    figure = content["tasks"][3]["figures"]["region_colour_shape_accuracy"]
    assert figure["difference"] == 1.0 and figure["items"] == 48 and set(figure) >= {"stderr", "low", "high", "p"}
    assert main(["eval", "compare", str(tmp_path), str(tmp_path)]) == 2
    assert "no metrics.json here" in capsys.readouterr().err
    assert main(["eval", "compare", str(tmp_path), str(tmp_path), "--samples", "3"]) == 2


def test_the_page_is_self_contained_and_draws_a_forest(reports):
    found = compare(f"{reports}/run:weak", f"{reports}/run", samples=200)
    html = render_comparison(found)
    page = Page(html)
    shares = [one for one in found.tasks[0].figures if "rank" not in one]
    assert page.count("circle") == sum(len(one.figures) for one in found.tasks)
    first = re.findall(r'<svg class="chart forest".*?</svg>', html, re.S)[0]
    assert first.count("<circle") == len(shares) and all(f">{name}<" in first for name in shares)
    assert page.count("circle", "better") > 5
    assert not re.search(r"https?://|<script|url\(|src=", html)
    for x in re.findall(r'cx="([^"]+)"', html):
        assert 0 <= float(x) <= 520


def test_better_and_worse_know_which_way_is_up():
    up, down = (Paired(0.5, 0.5 + d, d, 0.01, d - 0.02, d + 0.02, 0.01, 100) for d in (0.1, -0.1))
    assert [verdict("x_recall@1", p) for p in (up, down)] == ["better", "worse"]
    assert [verdict("x_median_rank", p) for p in (up, down)] == ["worse", "better"]
    assert verdict("x", Paired(0.5, 0.51, 0.01, 0.01, -0.01, 0.03, 0.3, 100)) == ""


def test_the_table_has_as_many_decimals_as_the_figures(reports):
    lines = table(compare(f"{reports}/run:weak", f"{reports}/run", samples=200)).splitlines()
    assert any(re.search(r"recall@1 +0\.\d{3} +\d\.\d{3} +[+-]\d\.\d{3}", line) for line in lines)
