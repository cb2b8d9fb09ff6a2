"""Composition: the six layouts as their authors write them, and scores worked out by hand."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_standin import COLOURS, ColourModel, colour_vector
from PIL import Image
from test_tasks import OPTIONS

from mmgem.cli import main
from mmgem.data.prepare.scenes import prepare_scenes
from mmgem.data.scene_pairs import KINDS, SAME_WORDS, render_pair
from mmgem.errors import UserError
from mmgem.evaluation.layouts.composition import has_composition, read_composition
from mmgem.evaluation.result import ChoiceExample
from mmgem.evaluation.run import evaluate, tasks_for
from mmgem.evaluation.tasks import composition
from mmgem.evaluation.tasks.common import TaskOptions


class Reader(ColourModel):
    """Knows word order: it likes a text whose first colour is the picture's. "pale" texts it likes anyway."""

    def log_likelihoods(self, vectors_NE, texts, vector_P, text_P, batch_size=256):
        firsts = [next((w for w in text.split() if w in COLOURS), "") for text in texts]
        liked = []
        for v, t in zip(vector_P.tolist(), text_P.tolist(), strict=True):
            seen = bool(firsts[t]) and bool((vectors_NE[v] - colour_vector(firsts[t])).norm() < 0.2)  # of a JPEG
            liked.append(2.0 * seen + 3.0 * ("pale" in texts[t]) - 10)
        return torch.tensor(liked), torch.tensor([len(texts[t].split()) + 1 for t in text_P.tolist()])


class Mute(ColourModel):
    """Writes nothing, as open_clip's models."""

    writes = False


def colour(path: Path, name: str, size: tuple[int, int] = (8, 8)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[name]).save(path)
    return path.name


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def winoground(root: Path) -> Path:
    """Two items: one that its vectors tell apart, and one with the same words in another order."""
    names = [
        colour(root / "images" / f"ex_{n}_img_{k}.png", c)[:-4] for n in (0, 1) for k, c in ((0, "red"), (1, "blue"))
    ]
    said = (("a red one", "a blue one"), ("red then blue", "blue then red"))
    lines = [
        {
            "id": n,
            "image_0": names[2 * n],
            "image_1": names[2 * n + 1],
            "caption_0": said[n][0],
            "caption_1": said[n][1],
            "tag": "x",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": ("Object", "Relation")[n],
        }
        for n in (0, 1)
    ]
    (root / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def sugarcrepe(root: Path) -> Path:
    """In COCO's folder for the pictures, beside the files'. The last negative is the caption itself."""
    names = [colour(root / "val2017" / f"00000000000{n}.jpg", c) for n, c in ((1, "red"), (2, "blue"))]
    items = [
        {"filename": names[1], "caption": "a blue ball", "negative_caption": "a red ball"},
        {"filename": names[0], "caption": "red and blue", "negative_caption": "blue and red"},
        {"filename": names[0], "caption": "a red ball", "negative_caption": "a red  ball "},
    ]
    write(root / "data" / "replace_att.json", {"0": items[0]})
    write(root / "data" / "swap_att.json", {"0": items[1], "1": items[2]})
    return root


def aro(root: Path) -> Path:
    """The part cut out is blue on the right half of the picture. A relation with one item, one with two, and one that
    ARO's authors leave out. Of the shuffled captions the last is the caption itself."""
    path = root / "images" / "1.jpg"
    colour(path, "red", (16, 8))
    whole = Image.open(path)
    whole.paste(COLOURS["blue"], (8, 0, 16, 8))
    whole.save(root / "images" / "1.png")
    part = {"image_path": "1.png", "bbox_x": 8, "bbox_y": 0, "bbox_w": 8, "bbox_h": 8}
    right = part | {"true_caption": "the blue is on", "false_caption": "the red is on", "relation_name": "on"}
    wrong = part | {"true_caption": "the red is in", "false_caption": "the blue is in", "relation_name": "in"}
    symmetric = wrong | {"relation_name": "next to"}
    write(root / "visual_genome_relation.json", [right, wrong, wrong, symmetric])
    pairs = [part | {"true_caption": "blue", "false_caption": "red", "attributes": [n, "z"]} for n in "a" * 25 + "b"]
    write(root / "visual_genome_attribution.json", pairs)
    options = ["a red cat", "cat a red", "red cat a", "a cat red", "a red cat"]
    write(root / "flickr30k_order.json", [{"image": "1.jpg", "caption_options": options}])
    return root


def crepe(root: Path) -> Path:
    colour(root / "VG_100K" / "7.jpg", "green", (20, 20))
    columns = {"image_id": 7, "x": 2, "y": 2, "width": 10, "height": 99, "caption": "a green tree"}
    red = columns | {"image_id": colour(root / "VG_100K" / "8.jpg", "red", (20, 20))[0], "caption": "a red tree"}
    for file, own, more in (
        ("prod_vg_hard_negs_swap_complexity_4.csv", columns, {"hard_negs": repr(["a red tree", "a blue tree's top"])}),
        (
            "syst_vg_hard_negs_seen_compounds_in_cc12m.csv",
            red,
            {"valid_hard_negs_atom": repr(["a green tree"]), "valid_hard_negs_comp": repr([])},
        ),
    ):
        (root / "crepe").mkdir(exist_ok=True)
        with (root / "crepe" / file).open("w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, [*own, *more])
            writer.writeheader()
            writer.writerow(own | more)
    return root


def spec(root: Path) -> Path:
    for name in ("red", "blue", "white"):
        colour(root / "count" / "images" / f"{name}.jpg", name)
    keys = ["a blue ball", "a red ball", "a white ball"]
    write(root / "count" / "image2text.json", [{"query": "images/red.jpg", "keys": keys, "label": 1}])
    images = [f"images/{name}.jpg" for name in ("red", "blue", "white")]
    write(root / "count" / "text2image.json", [{"query": "a white ball", "keys": images, "label": 2}])
    return root


def valse(root: Path) -> Path:
    """One that the annotators doubted."""
    red, blue = (colour(root / "images" / f"s_{n}.jpg", c) for n, c in ((1, "red"), (2, "blue")))
    said = {"caption": "a red one", "foil": "a blue one", "dataset": "SWiG"}
    valid, doubted = ({"mturk": {"foil": 3 - n, "caption": n, "other": 0}} for n in (3, 1))
    other = {"caption": "a blue one", "foil": "a red one", "image_file": blue}
    content = {"a_0": said | valid | {"image_file": red}, "a_1": said | valid | other}
    write(root / "actant-swap.json", content | {"a_2": said | doubted | {"image_file": red}})
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "winoground": winoground,
    "sugarcrepe": sugarcrepe,
    "aro": aro,
    "crepe": crepe,
    "spec": spec,
    "valse": valse,
}


def made(root: Path, *names: str) -> Path:
    for name in names or LAYOUTS:
        (root / name).mkdir(parents=True)
        LAYOUTS[name](root / name)
    return root


def figures(data: Path, model: ColourModel | None = None, options: TaskOptions = OPTIONS) -> dict[str, float]:
    return composition.run(model or Reader(), data, options).metrics


def test_winoground_by_hand(tmp_path: Path) -> None:
    data = made(tmp_path, "winoground")
    result = composition.run(Reader(), data, OPTIONS)
    got = result.metrics
    # By vector the second item's texts are equal, a tie; the reader knows what comes first.
    for score in ("text", "image", "group"):
        assert (got[f"winoground_vector_{score}"], got[f"winoground_generative_{score}"]) == (0.5, 1.0), score
        assert got[f"winoground_both_{score}"] == 1.0
        assert (got[f"winoground_vector_{score}_object"], got[f"winoground_vector_{score}_relation"]) == (1.0, 0.0)
    # The blind take one text for both pictures, and so never have both right; of pictures they know nothing.
    assert got["winoground_blind_vector_text"] == got["winoground_blind_generative_text"] == 0.0
    assert "winoground_blind_vector_image" not in got
    chance = {score: result.chance[f"winoground_vector_{score}"] for score in ("text", "image", "group")}
    assert chance == {"text": 0.25, "image": 0.25, "group": pytest.approx(1 / 6)}
    assert result.protocol["benchmarks"] == {"winoground": {"items": 2, "unreadable": 0, "equal": 0, "images": 4}}
    assert result.chance["winoground_blind_vector_text"] == 0 and "winoground_vector_text_subset_mean" not in got
    assert result.protocol["images"] == 4 and result.protocol["split"] == ""


def test_the_scores_are_those_of_winogrounds_authors() -> None:
    """Against their definitions, written out, on 200 items with ties among them; and chance by trial."""
    score_NIT = torch.randint(0, 4, (200, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    pairs = torch.tensor([[[0, 0], [1, 1]]]).expand(200, -1, -1)
    text = composition._beats(score_NIT, pairs[..., 0], pairs[..., 1])
    image = composition._beats(score_NIT.transpose(1, 2), pairs[..., 1], pairs[..., 0])
    for n, ((i0t0, i0t1), (i1t0, i1t1)) in enumerate(score_NIT.tolist()):
        assert bool(text[n]) == (i0t0 > i0t1 and i1t1 > i1t0)
        assert bool(image[n]) == (i0t0 > i1t0 and i1t1 > i0t1)
    lots = torch.rand(100_000, 2, 2, generator=torch.Generator().manual_seed(1))
    pairs = pairs[:1].expand(100_000, -1, -1)
    both = composition._beats(lots, pairs[..., 0], pairs[..., 1]).logical_and(
        composition._beats(lots.transpose(1, 2), pairs[..., 1], pairs[..., 0])
    )
    assert float(both.double().mean()) == pytest.approx(1 / 6, abs=0.005)


def test_every_layout_in_one_folder(tmp_path: Path) -> None:
    data = made(tmp_path)
    result = composition.run(Reader(), data, OPTIONS)
    got = result.metrics
    assert list(result.protocol["benchmarks"]) == sorted(LAYOUTS)
    assert {name: counts["items"] for name, counts in result.protocol["benchmarks"].items()} == {
        "aro": 31,
        "crepe": 2,
        "spec": 2,
        "sugarcrepe": 2,
        "valse": 2,
        "winoground": 2,
    }
    assert (got["sugarcrepe_vector_text_replace_att"], got["sugarcrepe_vector_text_swap_att"]) == (1.0, 0.0)
    assert got["sugarcrepe_generative_text_swap_att"] == 1.0 and got["sugarcrepe_vector_text"] == 0.5
    # Of 31 items 25 are of one subset, and each of the three subsets weighs the same.
    assert got["aro_vector_text_subset_mean"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert got["aro_vector_text"] == pytest.approx((1 + 26 + 0) / 31)
    # The right half alone is blue; the whole picture is neither.
    assert result.protocol["benchmarks"]["sugarcrepe"]["equal"] == 1
    assert got["aro_vector_text_vg_relation"] == pytest.approx(1 / 4)
    assert got["aro_vector_text_macro_vg_relation"] == pytest.approx(1 / 2)
    assert got["aro_vector_text_macro_vg_attribution"] == pytest.approx(1)
    assert got["aro_vector_text_flickr30k_order"] == 0.0
    assert result.chance["aro_vector_text_flickr30k_order"] == pytest.approx(1 / 4)
    assert (
        got["crepe_vector_text_prod_swap_complexity_4"]
        == got["crepe_vector_text_syst_seen_compounds_in_cc12m_atom"]
        == 1
    )
    assert result.chance["crepe_vector_text_prod_swap_complexity_4"] == pytest.approx(1 / 3)
    assert (got["spec_vector_text"], got["spec_vector_image"]) == (1.0, 1.0) and "spec_vector_group" not in got
    assert got["valse_vector_text"] == 1.0
    assert "1.png (8, 0, 16, 8)" in result.keys
    shown = [e for e in result.examples if isinstance(e, ChoiceExample)]
    assert {e.question.split(":")[0] for e in shown} == set(LAYOUTS)


def test_the_prior_is_taken_off_and_the_blind_show_it(tmp_path: Path) -> None:
    """A negative that is likelier anyway fools who does not take that off, and the blind."""
    items = {}
    for one, other in (("red", "blue"), ("blue", "red")):
        colour(tmp_path / "images" / f"{one}.png", one)
        negative = f"a pale {other} ball"
        items[one] = {"filename": f"{one}.png", "caption": f"a {one} ball", "negative_caption": negative}
    write(tmp_path / "add_att.json", items)
    got = figures(tmp_path)
    assert got["sugarcrepe_generative_text"] == 1.0 and got["sugarcrepe_blind_generative_text"] == 0.0
    assert figures(tmp_path, options=replace(OPTIONS, alpha=0.0))["sugarcrepe_generative_text"] == 0.0
    sweep = composition.run(Reader(), tmp_path, OPTIONS).protocol["alpha_sweep"]
    assert {alpha: ways["sugarcrepe_generative_text"] for alpha, ways in sweep.items()} == {
        "0.0": 0.0, "0.25": 0.0, "0.5": 1.0, "0.75": 1.0, "1.0": 1.0
    }  # fmt: skip


def test_a_model_that_writes_nothing_is_judged_by_vector(tmp_path: Path) -> None:
    result = composition.run(Mute(), made(tmp_path, "winoground", "spec"), OPTIONS)
    assert {name.split("_")[1] for name in result.metrics} == {"vector", "blind"}
    assert "alpha" not in result.protocol


def test_pictures_that_lie_elsewhere_and_those_that_are_missing(tmp_path: Path) -> None:
    data = made(tmp_path / "data", "sugarcrepe")
    (data / "sugarcrepe/val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"picture 000000000002.jpg: in none of .*data/sugarcrepe.*--images DIR"):
        read_composition(data)
    assert len(read_composition(data, [tmp_path / "elsewhere"])["sugarcrepe"].items) == 2
    with pytest.raises(UserError, match=r"nosuch: no such folder \(--images\)"):
        read_composition(data, [tmp_path / "nosuch"])


def test_broken_pictures_are_counted_with_their_items(tmp_path: Path) -> None:
    data = made(tmp_path, "winoground")
    (data / "winoground/images/ex_1_img_1.png").write_bytes(b"no picture")
    result = composition.run(Reader(), data, OPTIONS)
    assert result.protocol["benchmarks"] == {"winoground": {"items": 1, "unreadable": 1, "equal": 0, "images": 2}}
    assert result.protocol["skipped"] == 1
    (data / "winoground/images/ex_0_img_1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2 of 4 samples are broken"):
        composition.run(Reader(), data, OPTIONS)


PAIR = {"filename": "1.png", "caption": "x", "negative_caption": "y"}
UNSOUND = [
    ("swap_att.json", {"0": PAIR | {"negative_caption": 3}}, "swap_att.json: not as sugarcrepe writes"),
    ("swap_att.json", {"0": PAIR | {"caption": " "}}, "item 0 has an empty text"),
    ("image2text.json", [{"query": "1.png", "keys": ["a", "b"], "label": 2}], "item 0 has no choice number 2"),
    ("image2text.json", [{"query": "1.png", "keys": ["a"], "label": 0}], "item 0 leaves nothing to choose"),
    ("x.json", {"0": {"image_file": "1.png", "caption": "a", "foil": "b", "mturk": {}}}, "not as valse.*'caption'"),
    ("image2text.json", [{"query": "1.png", "keys": "ab", "label": 0}], "'ab' is no list"),
    ("image2text.json", [{"query": "1.png", "keys": ["a", "b"], "label": 0.9}], "label 0.9 is no number of a key"),
    ("swap_att.json", {"0": PAIR | {"caption": "\ud800 x"}}, "not as sugarcrepe writes .*surrogates not allowed"),
    ("swap_att.json", {"0": PAIR | {"negative_caption": " x "}}, "all wrong texts are the right ones"),
    ("other.json", {"some": "thing"}, "nothing to choose from; composition reads the files of winoground, sug"),
]


@pytest.mark.parametrize(("file", "content", "message"), UNSOUND)
def test_files_that_are_not_as_they_must_be(tmp_path: Path, file: str, content: object, message: str) -> None:
    colour(tmp_path / "1.png", "red")
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        read_composition(tmp_path)


@pytest.mark.parametrize("end", ["1e999", '0, "x": ' + "[" * 100_000])
def test_numbers_and_nesting_without_end(tmp_path: Path, end: str) -> None:
    colour(tmp_path / "1.png", "red")
    (tmp_path / "image2text.json").write_text('[{"query": "1.png", "keys": ["a", "b"], "label": ' + end + "}]")
    with pytest.raises(UserError, match="not as spec writes such a file"):
        read_composition(tmp_path)


def test_the_same_subset_twice_links_and_hidden_files(tmp_path: Path) -> None:
    data = made(tmp_path / "data", "sugarcrepe")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/sc").symlink_to(data / "sugarcrepe")
    (data / "sugarcrepe/data/.ipynb_checkpoints").mkdir()
    shutil.copy(data / "sugarcrepe/data/swap_att.json", data / "sugarcrepe/data/.ipynb_checkpoints/copy.json")
    assert len(read_composition(tmp_path / "links")["sugarcrepe"].items) == 2
    (data / "sugarcrepe/again").mkdir()
    shutil.copy(data / "sugarcrepe/data/swap_att.json", data / "sugarcrepe/again/swap_att.json")
    with pytest.raises(UserError, match="has the subset swap_att already; take one of them away"):
        read_composition(data)


def test_figures_do_not_depend_on_what_else_lies_there(tmp_path: Path) -> None:
    alone = figures(made(tmp_path / "alone", "sugarcrepe"))
    beside = figures(made(tmp_path / "beside", "sugarcrepe", "spec", "winoground"))
    assert {name: beside[name] for name in alone} == alone


def test_the_command_refuses_bad_data_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for options, message in (
        (["--data", str(tmp_path / "nosuch")], f"{tmp_path}/nosuch: no such folder"),
        (["--data", str(model)], "nothing to choose from"),
        (["--data", str(model), "--alpha", "nan"], "--alpha nan: a number of 0 or more"),
    ):
        assert main(["eval", "composition", "--model", str(model), *options]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


# --- the scenes' own pairs ------------------------------------------------------------------------


def test_scenes_bring_pairs_in_both_layouts(tmp_path: Path) -> None:
    prepare_scenes(tmp_path, train=0, val=0, test=5, processes=1)
    assert has_composition(tmp_path, "test") and "composition" in tasks_for(tmp_path, "test")
    found = read_composition(tmp_path)
    assert {name: len(own.items) for name, own in found.items()} == {"sugarcrepe": 10, "winoground": 8}
    subsets = [sorted({item.subset for item in own.items}) for own in found.values()]
    assert subsets == [["negation", "replace_att", "replace_count", "replace_rel", "swap_att"], sorted(SAME_WORDS)]
    before = {file.name: file.read_bytes() for file in (tmp_path / "composition").rglob("*") if file.is_file()}
    prepare_scenes(tmp_path, train=0, val=0, test=5, processes=1, overwrite=True)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "composition").rglob("*") if file.is_file()}
    results = evaluate({"m": Reader()}, tmp_path, "test", ["composition"], tmp_path / "out", options=OPTIONS)
    assert results["m"]["composition"].metrics["winoground_vector_text"] >= 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Which text is true" in page and "winoground: relation" in page


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_differ_in_what_they_say(kind: str) -> None:
    for index in range(20):
        pair = render_pair(kind, 3, index)
        first, second = (np.asarray(image) for image in pair.images)
        changed = (first != second).any(axis=2).mean()
        assert 0 < changed < 0.4, index
        assert pair.captions[0] != pair.captions[1] and pair.contrast[0] != pair.contrast[1]
        words = [sorted({*caption.replace(",", "").split()} - {"a", "an"}) for caption in pair.captions]
        # Plurals go with the counts.
        assert (words[0] == words[1]) == (kind in SAME_WORDS) or kind == "count"
        again = render_pair(kind, 3, index)
        assert again.captions == pair.captions and again.images[1].tobytes() == pair.images[1].tobytes()
