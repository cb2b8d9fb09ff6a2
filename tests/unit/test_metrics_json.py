"""metrics.json keeps to the schema that is shipped, and report.md says the same figures."""

import json
import re
from importlib.resources import files

import pytest
from eval_standin import ColourModel
from test_tasks import OPTIONS, SAMPLES, write_split

from mmgem.evaluation.figures import number
from mmgem.evaluation.markdown import markdown
from mmgem.evaluation.result import TaskResult
from mmgem.evaluation.run import evaluate
from mmgem.evaluation.tasks import TASKS, SplitTask

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads((files("mmgem.evaluation") / "metrics.schema.json").read_text(encoding="utf-8"))
SPLIT_TASKS = [name for name, task in TASKS.items() if isinstance(task, SplitTask)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("json")
    data = write_split(root / "data", SAMPLES)
    models = {"a|b": ColourModel("cube"), "two": ColourModel()}
    evaluate(models, data, "test", SPLIT_TASKS, root / "all", options=OPTIONS, crop_baseline={"two"})
    evaluate({"m": ColourModel()}, data, "test", ["captioning"], root / "one", options=OPTIONS)
    return root


def errors(content):
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(content)]


def test_what_all_tasks_write_is_valid(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    content = json.loads((report / "all/metrics.json").read_text())
    assert [(r["model"], r["task"]) for r in content] == [(m, t) for m in ("a|b", "two") for t in SPLIT_TASKS]
    one = json.loads((report / "one/metrics.json").read_text())
    assert errors(content) == errors(one) == []
    one.pop("model")  # as it was written before
    assert errors(one) == []
    known = set(SCHEMA["$defs"]["protocol"]["properties"])
    assert {"captions_an_image", "num_beams", "texts_cut", "regions_unseen"} < known


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("stderr"),
        lambda r: r.update(schema=2),
        lambda r: r.update(more=1),
        lambda r: r["metrics"].update(x="0.5"),
        lambda r: r["metrics"].update({"a b": 0.5}),
        lambda r: r.update(metrics={}),
        lambda r: r["stderr"].update(CIDEr=-0.1),
        lambda r: r["protocol"].pop("split"),
        lambda r: r["protocol"].update(num_beams=0),
        lambda r: r["protocol"].update(captions_an_image=[5]),
    ],
)
def test_what_is_no_result_is_not_valid(report, change):
    content = json.loads((report / "one/metrics.json").read_text())
    change(content)
    assert errors(content)


def test_the_markdown_has_every_figure_of_metrics_json(report):
    text = (report / "all/report.md").read_text()
    results = json.loads((report / "all/metrics.json").read_text())
    lines = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            lines[cells[0].strip("`")] = cells[1:]
    assert set(lines) == {name for r in results for name in r["metrics"]}
    for n, model in enumerate(("a|b", "two")):
        for r in results:
            if r["model"] == model:
                for name, value in r["metrics"].items():
                    shown, error = lines[name][n].split(" ± ")
                    assert shown == number(value) and abs(float(error) - r["stderr"][name]) <= 0.06
                    if name in r["chance"]:
                        assert lines[name][2] == number(r["chance"][name])
    assert text.count("## ") == len(SPLIT_TASKS) and text.count("Measured: ") == len(SPLIT_TASKS)
    assert "num_beams 1" in text and "captions_an_image 1 to 2" in text and "a\\|b" in text
    header, rule = [line for line in text.splitlines() if line.startswith("|")][:2]
    assert len(re.split(r"(?<!\\)\|", header)) == len(rule.split("|"))


def test_hostile_names_stay_in_their_cell():
    hostile = "a|b <script>\n# x `y` [z](w)"
    text = markdown([TaskResult("retrieval", {"split": hostile}, {"m": 0.5}, {}, {}, model=hostile)], hostile)
    assert "<script" not in text.replace("\\<script", "") and "\n# x" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows}) == 1
