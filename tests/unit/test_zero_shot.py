"""Zero-shot classes: both layouts, names and templates from files, and figures worked out by hand."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_standin import COLOURS, ColourModel
from PIL import Image
from test_tasks import OPTIONS

from mmgem.cli import main
from mmgem.errors import UserError
from mmgem.evaluation.layouts.classes import has_classes, read_classes
from mmgem.evaluation.result import ChoiceExample
from mmgem.evaluation.run import evaluate, tasks_for
from mmgem.evaluation.tasks import zero_shot


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def folders(root: Path, **pictures: list[str]) -> Path:
    """By class the colours of its pictures."""
    for name, colours in pictures.items():
        (root / name).mkdir(parents=True)
        for n, colour in enumerate(colours):
            (root / name / f"{n}.png").write_bytes(png(colour))
    return root


def webdataset(root: Path, labels: list[tuple[str, int]], names: list[str]) -> Path:
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c} ball\nthe {c}\n")
    (root / "test" / "nshards.txt").write_text("1")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for n, (colour, label) in enumerate(labels):
            for name, content in ((f"s{n}.png", png(colour)), (f"s{n}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root


class Judge(ColourModel):
    """Writes the first class's texts for red pictures, the second's for all others, and likes short texts."""

    def log_likelihoods(self, vectors_NE, texts, vector_P, text_P, batch_size=256):
        first = [torch.equal(vectors_NE[v], torch.tensor([1.0, -1.0, -1.0])) for v in vector_P.tolist()]
        said = [texts[t] for t in text_P.tolist()]
        log_p = [-1.0 if ("red" in text) == is_red else -4.0 for text, is_red in zip(said, first, strict=True)]
        return torch.tensor(log_p), torch.tensor([len(text.split()) + 1 for text in said])


def test_accuracies_by_hand(tmp_path: Path) -> None:
    # By vector the second "blue" picture is taken for green; the judge knows red from not red.
    data = folders(tmp_path / "c", red=["red"], blue=["blue", "green"], green=["green"])
    result = zero_shot.run(Judge(), data, replace(OPTIONS, templates=_json(tmp_path, ["a {c} ball"])))
    assert result.metrics["zero_shot_vector_acc1"] == 3 / 4
    assert result.metrics["zero_shot_vector_mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert result.metrics["zero_shot_vector_acc5"] == 1.0
    # Blue and green are alike to the judge: a tie is a loss, so that red alone is right.
    assert result.metrics["zero_shot_generative_acc1"] == 1 / 4
    assert result.metrics["zero_shot_both_acc1"] == 3 / 4
    assert result.chance["zero_shot_vector_acc1"] == pytest.approx(1 / 3)
    assert result.protocol["alpha_sweep"].keys() == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert result.protocol["most_frequent_class"] == 0.5 and result.protocol["classes"] == 3
    assert result.confusion is not None and result.confusion.classes == ["blue", "green", "red"]
    assert sum(map(sum, result.confusion.counts)) == 4
    drawn = [e for e in result.examples if isinstance(e, ChoiceExample)]
    assert [e.taken for e in drawn] == [True, False, True, True]
    assert drawn[1].choices[0][0] == "green" and not drawn[1].choices[0][2]


def _json(folder: Path, content: object) -> Path:
    file = folder / f"file{len(list(folder.glob('file*')))}.json"
    file.write_text(json.dumps(content))
    return file


def test_the_webdataset_of_clip_benchmark(tmp_path: Path) -> None:
    root = webdataset(tmp_path / "data" / "zero-shot", [("red", 1), ("blue", 0)], ["blue", "red"])
    found = read_classes(tmp_path / "data", "test")
    assert found.names == ["blue", "red"] and found.labels == [1, 0] and found.layout == "webdataset"
    assert found.texts() == [["a blue ball", "the blue"], ["a red ball", "the red"]]
    assert found.pictures[0].read().getpixel((0, 0)) == (255, 0, 0)
    assert has_classes(tmp_path / "data", "test") and has_classes(root, "test") and not has_classes(root, "val")
    assert "zero-shot" in tasks_for(tmp_path / "data", "test")
    out = tmp_path / "out"
    results = evaluate({"m": Judge()}, tmp_path / "data", "test", ["zero-shot"], out, options=OPTIONS)
    assert results["m"]["zero-shot"].metrics["zero_shot_vector_acc1"] == 1.0
    assert "zero_shot_vector_acc1" in (out / "metrics.json").read_text()


def test_names_and_templates_from_files_of_several_datasets(tmp_path: Path) -> None:
    data = folders(tmp_path / "c", a=["red"], b_c=["blue"])
    assert read_classes(data, "test").texts() == [["a photo of a a."], ["a photo of a b c."]]
    names = _json(tmp_path, {"one": ["x", "y"], "two": ["z"]})
    own = _json(tmp_path, {"one": {"x": ["an x"], "y": ["why", "yes"]}})
    assert read_classes(data, "test", f"{names}:one", str(own)).texts() == [["an x"], ["why", "yes"]]
    for classes, templates, message in (
        (f"{names}:three", None, r"no dataset 'three'; it has one, two"),
        (str(names), None, r"several datasets, name one with FILE:DATASET; it has one, two"),
        (f"{names}:two", None, r"1 names, but .* has 2 classes"),
        (None, str(_json(tmp_path, ["no place"])), r"a template needs \{c\}, .*'no place'"),
        (None, str(_json(tmp_path, {"d": {"a": ["x"]}})), r"no texts for the class 'b c'"),
        (str(tmp_path / "nosuch.json"), None, r"nosuch.json: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_classes(data, "test", classes, templates)


def test_folders_and_shards_that_are_not_as_they_must_be(tmp_path: Path) -> None:
    data = folders(tmp_path / "c", a=["red"], b=["blue"], empty=[])
    with pytest.raises(UserError, match=r"c/empty: no pictures in this class folder"):
        read_classes(data, "test")
    with pytest.raises(UserError, match="1 class folders"):
        read_classes(folders(tmp_path / "one", a=["red"]), "test")
    with pytest.raises(UserError, match="no such folder"):
        read_classes(tmp_path / "nosuch", "test")
    root = webdataset(tmp_path / "w", [("red", 2)], ["blue", "red"])
    with pytest.raises(UserError, match=r"s0.cls says 2, but there are 2 classes"):
        read_classes(root, "test")
    with pytest.raises(UserError, match=r"no split 'val'; it has test"):
        read_classes(root, "val")
    (root / "test" / "nshards.txt").write_text("2")
    with pytest.raises(UserError, match=r"1.tar: no such shard"):
        read_classes(root, "test")


def test_broken_pictures_are_skipped_and_named_up_to_a_share(tmp_path: Path) -> None:
    data = folders(tmp_path / "c", red=["red", "red"], blue=["blue"])
    (data / "red" / "1.png").write_bytes(b"no picture")
    result = zero_shot.run(Judge(), data, OPTIONS)
    assert result.protocol["skipped"] == 1 and result.protocol["images"] == 2
    (data / "blue" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2 of 3 samples are broken"):
        zero_shot.run(Judge(), data, OPTIONS)


def test_scenes_come_with_classes(tmp_path: Path) -> None:
    counts = ["--train", "2", "--val", "0", "--test", "110", "--size", "48", "--processes", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(tmp_path / "d"), *counts]) == 0
    found = read_classes(tmp_path / "d", "test")
    assert len(found.names) == 100 and len(found.pictures) == 110 and set(found.labels) == set(range(100))
    assert found.texts()[0] == ["a black ball", "there is a black ball"] or found.names[0].startswith("a")
    assert found.pictures[3].read().size == (48, 48)
