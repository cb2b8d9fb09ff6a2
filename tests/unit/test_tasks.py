"""Encoding, the four tasks and `evaluate`, on real shards and a small model of colours."""

import base64
import io
import json
import re

import pytest
import torch
from eval_standin import COLOURS, ColourModel
from PIL import Image
from spoil import break_pictures

from mmgem.data.samples import Region, Sample
from mmgem.data.shards import ShardedDataset
from mmgem.data.writer import ShardWriter
from mmgem.errors import UserError
from mmgem.evaluation.result import CaptionExample, RegionExample, SearchExample, TaskResult
from mmgem.evaluation.run import evaluate
from mmgem.evaluation.tasks import TASKS, SplitTask, TaskOptions
from mmgem.evaluation.tasks.boxes import box_table
from mmgem.inference.encode import crop, encode_dataset, write_texts

SPLIT_TASKS = [name for name, task in TASKS.items() if isinstance(task, SplitTask)]
OPTIONS = TaskOptions(samples=50, progress=False, java=False)
LEFT, RIGHT = (0.0, 0.0, 20.0, 20.0), (20.0, 0.0, 40.0, 20.0)


def make_sample(key, left, right, captions, regions=()):
    """A picture of two halves, each of one colour."""
    image = Image.new("RGB", (40, 20), COLOURS[left])
    image.paste(COLOURS[right], (20, 0, 40, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Sample(key, buffer.getvalue(), tuple(captions), tuple(regions), 40, 20, {})


def halves(left, right, entity=True):
    return (
        Region(LEFT, f"a {left} ball", "1" if entity else None),
        Region(RIGHT, f"the {right} ball", "2" if entity else None),
    )


SAMPLES = [
    make_sample("a", "red", "red", ["a red ball", "red red"], halves("red", "red", entity=False)),
    make_sample("b", "green", "blue", ["green and blue ball"], halves("green", "blue")),
    make_sample("c", "yellow", "yellow", ["a yellow ball", "yellow"], halves("yellow", "yellow")),
    make_sample("d", "red", "white", ["red and white ball", "a black ball"], halves("red", "white")),
]


def write_split(folder, samples, split="test"):
    with ShardWriter(folder / split) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_split(tmp_path / "data", SAMPLES)


@pytest.fixture
def dataset(data):
    return ShardedDataset(data / "test")


def encoded_of(dataset, model=None, **options):
    return encode_dataset(model or ColourModel(), dataset, progress=False, **options)


# --- encoding --------------------------------------------------------------------------------


def test_encode_gives_vectors_in_the_order_of_the_data(dataset):
    encoded = encoded_of(dataset, batch_size=3)
    assert encoded.keys == ["a", "b", "c", "d"] and encoded.positions == [0, 1, 2, 3]
    assert encoded.captions[0] == ["a red ball", "red red"]
    assert encoded.text_image.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert encoded.caption_texts[2] == "green and blue ball"
    red, yellow = torch.tensor([1.0, -1, -1]), torch.tensor([1.0, 1, -1])
    assert torch.equal(encoded.image_vectors_NE[0], red)
    assert torch.equal(encoded.text_vectors_ME[4], yellow)
    assert encoded.region_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert encoded.region_boxes[:2] == [LEFT, RIGHT]
    assert torch.equal(encoded.region_vectors_RE[3], torch.tensor([-1.0, -1, 1]))
    blue = encoded.phrases.index("the blue ball")
    assert torch.equal(encoded.phrase_vectors_PE[blue], torch.tensor([-1.0, -1, 1]))
    assert encoded.image_vectors_NE.dtype == encoded.text_vectors_ME.dtype == torch.float32
    assert encoded.crop_vectors_RE is None and encoded.skipped == []


def test_each_image_passes_once_and_each_text_once(dataset):
    model = ColourModel()
    encoded_of(dataset, model)
    assert model.images_seen == 4
    assert len(model.texts_seen) == len(set(model.texts_seen))
    assert set(model.texts_seen) >= {"a red ball", "the white ball"}


def test_the_batch_size_changes_nothing(dataset):
    one, four = encoded_of(dataset, batch_size=1), encoded_of(dataset, batch_size=4)
    for name in ("image_vectors_NE", "text_vectors_ME", "region_vectors_RE", "region_image"):
        assert torch.equal(getattr(one, name), getattr(four, name)), name


def test_crops_are_the_vectors_of_boxes_cut_out(dataset):
    model = ColourModel()
    encoded = encoded_of(dataset, model, crops=True)
    assert encoded.crop_vectors_RE is not None
    assert torch.equal(encoded.crop_vectors_RE, encoded.region_vectors_RE)
    assert model.images_seen == 4 + 8
    assert crop(Image.new("RGB", (40, 20)), (1.2, 3.0, 5.1, 4.5)).size == (5, 2)
    assert crop(Image.new("RGB", (40, 20)), (7.0, 3.0, 7.0, 3.0)).size == (1, 1)


def test_texts_and_regions_are_left_out_on_wish(dataset):
    model = ColourModel()
    encoded = encoded_of(dataset, model, texts=False, regions=False)
    assert model.texts_seen == []
    assert encoded.text_vectors_ME.shape == encoded.region_vectors_RE.shape == (0, 3)
    assert encoded.captions[0] == ["a red ball", "red red"]


def test_a_broken_picture_is_skipped_counted_and_named(data):
    break_pictures(data / "test", ["b"])
    dataset = ShardedDataset(data / "test")
    encoded = encoded_of(dataset)
    assert encoded.keys == ["a", "c", "d"] and encoded.positions == [0, 2, 3]
    assert len(encoded.skipped) == 1 and "sample b" in encoded.skipped[0]
    assert encoded.text_image.tolist() == [0, 0, 1, 1, 2, 2]
    result = TASKS["retrieval"].run(ColourModel(), encoded, OPTIONS)
    assert result.protocol["skipped"] == 1 and result.protocol["images"] == 3


def test_too_many_broken_pictures_stop_the_work(data):
    break_pictures(data / "test", ["b", "c"])
    dataset = ShardedDataset(data / "test")
    with pytest.raises(UserError, match=r"2 of 4 samples are broken.*sample b.*; prepare .* `mmgem data prepare`$"):
        encoded_of(dataset)
    assert encoded_of(dataset, max_broken=0.5).keys == ["a", "d"]


def test_a_split_without_a_readable_picture_is_an_error(tmp_path):
    data = write_split(tmp_path / "data", SAMPLES[:1])
    break_pictures(data / "test", ["a"])
    with pytest.raises(UserError, match=r"no readable image among 1 samples.*sample a.*; prepare .*data prepare`$"):
        encoded_of(ShardedDataset(data / "test"))


def test_cut_texts_are_counted_where_they_are_read(dataset):
    model = ColourModel(max_tokens=2)
    encoded = encoded_of(dataset, model)
    assert encoded.text_cut_M.tolist() == [True, False, True, True, False, True, True]
    assert encoded.phrase_cut_P.tolist() == [True] * 7
    cut = {
        name: task.run(model, encoded, OPTIONS).protocol.get("texts_cut")
        for name, task in TASKS.items()
        if isinstance(task, SplitTask)
    }
    # Of the 7 phrases that the data write, 5 are distinct and read.
    assert {name: count for name, count in cut.items() if count is not None} == {"retrieval": 5, "region-retrieval": 5}
    whole = encoded_of(dataset)
    assert TASKS["retrieval"].run(ColourModel(), whole, OPTIONS).protocol["texts_cut"] == 0
    assert TASKS["region-retrieval"].run(ColourModel(), whole, OPTIONS).protocol["texts_cut"] == 0
    assert encoded_of(dataset, model, texts=False, regions=False).text_cut_M.shape == (0,)


def test_vectors_that_are_not_finite_are_an_error_that_names_an_image(dataset):
    class Diverged(ColourModel):
        def image_vectors(self, images, batch_size=64):
            return super().image_vectors(images) * torch.nan

    with pytest.raises(UserError, match="not finite for 4 of 4 images, the first is a"):
        encoded_of(dataset, Diverged())


# --- tasks -----------------------------------------------------------------------------------


def test_retrieval_figures_by_hand(dataset):
    result = TASKS["retrieval"].run(ColourModel(), encoded_of(dataset), OPTIONS)
    # Of 7 captions only "a black ball", of the red and white image d, does not find its own first.
    assert result.metrics["image_retrieval_recall@1"] == pytest.approx(6 / 7)
    assert result.metrics["text_retrieval_recall@1"] == 1.0
    assert result.metrics["text_retrieval_recall@5"] == 1.0
    assert result.chance["image_retrieval_recall@1"] == 0.25
    assert result.chance["text_retrieval_recall@1"] == pytest.approx((2 / 7 * 3 + 1 / 7) / 4)
    assert result.protocol["captions"] == 7 and result.protocol["captions_an_image"] == [1, 2]
    assert set(result.stderr) == set(result.metrics)


def test_a_caption_of_two_images_counts_for_both_only_on_wish(tmp_path):
    samples = [
        make_sample("a", "red", "red", ["a red ball"]),
        make_sample("b", "red", "blue", ["a red ball"]),
        make_sample("c", "green", "green", ["green"]),
    ]
    dataset = ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    encoded = encoded_of(dataset)
    strict = TASKS["retrieval"].run(ColourModel(), encoded, OPTIONS)
    assert strict.protocol["captions_of_several_images"] == 2
    assert strict.metrics["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    # Two equal vectors tie, so neither image finds "its" caption first.
    assert strict.metrics["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    kind = TASKS["retrieval"].run(ColourModel(), encoded, TaskOptions(samples=10, same_text=True, progress=False))
    assert kind.metrics["image_retrieval_recall@1"] == 1.0
    assert kind.metrics["text_retrieval_recall@1"] == 1.0


def test_an_image_without_captions_is_in_the_gallery_and_no_query(tmp_path):
    samples = [*SAMPLES[:2], make_sample("x", "cyan", "cyan", [], halves("cyan", "cyan"))]
    dataset = ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    encoded = encoded_of(dataset)
    result = TASKS["retrieval"].run(ColourModel(), encoded, OPTIONS)
    assert result.chance["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert result.chance["text_retrieval_recall@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    written = TASKS["captioning"].run(ColourModel(), encoded, OPTIONS)
    assert written.protocol["captions"] == 3


def test_captioning_compares_with_all_captions_of_the_image(dataset):
    result = TASKS["captioning"].run(ColourModel(), encoded_of(dataset), OPTIONS)
    shown = {e.image: e for e in result.examples if isinstance(e, CaptionExample)}
    assert shown[0].written == "a red ball" and shown[0].references == ("a red ball", "red red")
    assert 0 < result.metrics["BLEU@1"] < 1 and result.metrics["CIDEr"] > 1
    assert set(result.metrics) == {"BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4", "ROUGE_L", "CIDEr", "CIDEr_plain"}
    assert result.chance["CIDEr"] < result.metrics["CIDEr"]
    assert result.protocol["num_beams"] == 1 and result.protocol["max_new_tokens"] == 30


def test_boxes_of_several_phrases_are_one_box(tmp_path):
    regions = (
        Region(LEFT, "a lake", "7"),
        Region(LEFT, "The water", "7"),
        Region(RIGHT, "the water", "7"),
        Region(RIGHT, "a duck", None),
    )
    samples = [make_sample("a", "blue", "red", ["x"], regions)]
    dataset = ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    encoded = encoded_of(dataset)
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    assert torch.equal(encoded.region_vectors_RE, torch.stack([blue, blue, red, red]))
    table = box_table(encoded, OPTIONS)
    assert table.boxes == [LEFT, RIGHT]
    assert table.names == ["lake", "water", "duck"]
    # The right box is a member of entity 7 as well, so it may be called a lake.
    assert [[table.names[i] for i in ids] for ids in table.phrase_ids] == [
        ["lake", "water"],
        ["water", "duck", "lake"],
    ]


def test_region_retrieval_counts_every_box_of_the_phrase(dataset):
    encoded = encoded_of(dataset, crops=True)
    options = TaskOptions(samples=50, baseline="crop", progress=False)
    result = TASKS["region-retrieval"].run(ColourModel(), encoded, options)
    # 8 boxes, 5 phrases ("a red ball" and "the red ball" are one); colours tell them apart.
    assert result.protocol["boxes"] == 8 and result.protocol["phrases"] == 5
    assert result.metrics["region_image_retrieval_recall@1"] == 1.0
    assert result.metrics["region_text_retrieval_recall@1"] == 1.0
    # red has 3 boxes, yellow 2, green, blue and white 1 each.
    chance = result.chance["region_image_retrieval_recall@1"]
    assert chance == pytest.approx((3 + 2 + 1 + 1 + 1) / 5 / 8)
    assert result.chance["region_text_retrieval_recall@1"] == pytest.approx(1 / 5)
    assert result.metrics["crop_region_image_retrieval_recall@1"] == 1.0
    assert result.chance["crop_region_image_retrieval_recall@1"] == chance


def test_region_retrieval_without_crops_does_not_invent_them(dataset):
    options = TaskOptions(samples=10, baseline="crop", progress=False)
    with pytest.raises(UserError, match="cut-outs"):
        TASKS["region-retrieval"].run(ColourModel(), encoded_of(dataset), options)


def test_region_captions_of_scenes_are_judged_by_colour_and_shape(dataset):
    result = TASKS["region-captioning"].run(ColourModel(), encoded_of(dataset), OPTIONS)
    assert result.metrics["region_exact_phrase"] == 1.0
    assert result.metrics["region_colour_shape_accuracy"] == 1.0
    assert result.metrics["region_BLEU@1"] > 0.7
    # Another box's phrase is right: red 3 * 2/7, yellow 2 * 1/7, of 8 boxes.
    assert result.chance["region_exact_phrase"] == pytest.approx((3 * 2 / 7 + 2 / 7) / 8)
    notes = [n for e in result.examples if isinstance(e, RegionExample) for n in e.notes]
    assert len(notes) == 8 and all(note.right for note in notes)


def test_region_captions_with_the_wrong_shape_are_wrong(dataset):
    result = TASKS["region-captioning"].run(ColourModel("cube"), encoded_of(dataset), OPTIONS)
    assert result.metrics["region_colour_shape_accuracy"] == 0.0
    assert result.metrics["region_exact_phrase"] == 0.0
    kinds = {e.kind for e in result.examples}
    assert kinds == {"drawn"}  # all four images were drawn, none is left for the worst


def test_colour_and_shape_are_not_judged_where_phrases_do_not_name_them(tmp_path):
    regions = (Region(LEFT, "a man"), Region(RIGHT, "a red ball"))
    samples = [make_sample(k, "red", "red", ["x"], regions) for k in "ab"]
    dataset = ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    result = TASKS["region-captioning"].run(ColourModel(), encoded_of(dataset), OPTIONS)
    assert "region_colour_shape_accuracy" not in result.metrics
    assert result.metrics["region_exact_phrase"] == 0.5
    assert all(n.right is None for e in result.examples if isinstance(e, RegionExample) for n in e.notes)


def test_held_out_pairs_are_scored_apart(tmp_path):
    from mmgem.data.scenes import HELD_OUT

    colour, shape = sorted(p for p in HELD_OUT if p[0] == "red")[0]
    regions = (Region(LEFT, f"{colour} {shape}"), Region(RIGHT, "blue ball"))
    assert ("blue", "ball") not in HELD_OUT
    samples = [make_sample("a", "red", "blue", ["x"], regions)]
    dataset = ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    result = TASKS["region-captioning"].run(ColourModel("ball"), encoded_of(dataset), OPTIONS)
    assert result.metrics["region_colour_shape_accuracy"] == 0.5
    assert result.metrics["region_colour_shape_accuracy_held_out"] == 0.0


def test_search_examples_show_hits_and_the_right_answer(dataset):
    result = TASKS["retrieval"].run(ColourModel(), encoded_of(dataset), OPTIONS)
    examples = [e for e in result.examples if isinstance(e, SearchExample)]
    black = next(e for e in examples if e.query == "a black ball")
    assert black.place > 1 and not black.hits[0].right and black.wanted.image == 3
    first = [e for e in examples if e.query == "a yellow ball"]
    assert first[0].hits[0].image == 2 and first[0].hits[0].right and first[0].place == 1


def test_tasks_refuse_data_without_what_they_need(tmp_path):
    plain = [make_sample("a", "red", "red", ["a red ball"])]
    encoded = encoded_of(ShardedDataset(write_split(tmp_path / "plain", plain) / "test"))
    for name in ("region-retrieval", "region-captioning"):
        with pytest.raises(UserError, match="no regions"):
            TASKS[name].run(ColourModel(), encoded, OPTIONS)
    boxes = [make_sample("a", "red", "red", [], halves("red", "red"))]
    encoded = encoded_of(ShardedDataset(write_split(tmp_path / "boxes", boxes) / "test"))
    for name in ("retrieval", "captioning"):
        with pytest.raises(UserError, match="no captions"):
            TASKS[name].run(ColourModel(), encoded, OPTIONS)


def test_figures_that_are_not_finite_do_not_become_a_result():
    from mmgem.evaluation.metrics.scores import Scores

    with pytest.raises(ValueError, match="CIDEr is nan"):
        TaskResult.of("captioning", {}, Scores({"CIDEr": float("nan")}), [])


# --- evaluate --------------------------------------------------------------------------------


def test_one_model_and_one_task_give_exactly_the_schema(data, tmp_path):
    out = tmp_path / "out"
    results = evaluate({"m": ColourModel()}, data, "test", ["retrieval"], out, options=OPTIONS)
    written = json.loads((out / "metrics.json").read_text())
    assert list(written) == ["model", "schema", "task", "protocol", "metrics", "stderr", "chance"]
    assert written["schema"] == 1 and written["task"] == "retrieval"
    assert written["metrics"] == results["m"]["retrieval"].metrics
    protocol = written["protocol"]
    assert protocol["split"] == "test" and protocol["data"] == "data"
    assert protocol["dtype"] == "float32" and protocol["prompt"] is None
    assert "torch" in protocol["versions"] and "mmgem" in protocol["versions"]
    assert (out / "report.html").stat().st_size > 5000
    assert sorted(p.name for p in out.iterdir()) == ["items", "metrics.json", "report.html", "report.md"]


def test_several_models_and_tasks_give_a_list_with_names(data, tmp_path):
    results = evaluate(
        {"one": ColourModel(), "two": ColourModel("cube")},
        data,
        "test",
        SPLIT_TASKS,
        tmp_path / "out",
        options=OPTIONS,
        crop_baseline={"one"},
    )
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [(w["model"], w["task"]) for w in written] == [(m, t) for m in ("one", "two") for t in SPLIT_TASKS]
    assert "crop_region_image_retrieval_recall@1" in results["one"]["region-retrieval"].metrics
    assert "crop_region_image_retrieval_recall@1" not in results["two"]["region-retrieval"].metrics
    assert results["one"]["region-captioning"].metrics["region_colour_shape_accuracy"] == 1.0
    assert results["two"]["region-captioning"].metrics["region_colour_shape_accuracy"] == 0.0


def test_the_report_shows_the_right_pictures_past_a_broken_one(data, tmp_path):
    break_pictures(data / "test", ["a"])
    evaluate({"m": ColourModel()}, data, "test", ["captioning"], tmp_path / "out", options=OPTIONS)
    text = (tmp_path / "out" / "report.html").read_text()
    uris = re.findall(r'base64,([^"]+)"', text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]
    right_halves = [tuple(c > 128 for c in p.convert("RGB").getpixel((35, 10))) for p in pictures]
    assert right_halves == [(False, False, True), (True, True, False), (True, True, True)]  # b, c, d
    assert "1 broken: sample a" in text


def test_evaluation_gives_the_same_files_twice(data, tmp_path):
    for name in ("x", "y"):
        evaluate({"m": ColourModel()}, data, "test", SPLIT_TASKS, tmp_path / name, options=OPTIONS)
    for file in ("metrics.json", "report.html", "report.md"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_evaluate_refuses_before_work_is_done(data, tmp_path):
    class Untouchable(ColourModel):
        def image_and_region_vectors(self, images, boxes, batch_size=64):
            raise AssertionError("the model was asked")

    model, out = {"m": Untouchable()}, tmp_path / "out"
    with pytest.raises(UserError, match="unknown task 'retrival'; the tasks are retrieval"):
        evaluate(model, data, "test", ["retrival"], out)
    with pytest.raises(UserError, match="no split 'val'; it has test"):
        evaluate(model, data, "val", ["retrieval"], out)
    with pytest.raises(UserError, match="no task"):
        evaluate(model, data, "test", [], out)
    with pytest.raises(UserError, match="no model"):
        evaluate({}, data, "test", ["retrieval"], out)
    with pytest.raises(UserError, match="crop_baseline names"):
        evaluate(model, data, "test", ["retrieval"], out, crop_baseline={"n"})
    with pytest.raises(UserError, match="missing"):
        evaluate(model, tmp_path / "missing", "test", ["retrieval"], out)
    plain = [make_sample("a", "red", "red", ["a red ball"])]
    bare = write_split(tmp_path / "plain", plain)
    with pytest.raises(UserError, match="no regions; region-captioning needs boxes"):
        evaluate(model, bare, "test", ["region-captioning"], out)
    boxes = write_split(tmp_path / "boxes", [make_sample("a", "red", "red", [], halves("red", "red"))])
    for task in ("retrieval", "captioning"):
        with pytest.raises(UserError, match=f"split test has no captions; {task} needs captions"):
            evaluate(model, boxes, "test", ["region-retrieval", task], out)
    assert not out.exists()


def test_evaluate_refuses_a_gpu_that_is_not_there(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU; use auto or cpu"):
        evaluate({"m": tmp_path}, data, "test", ["retrieval"], tmp_path / "out", device="cuda")


# --- progress --------------------------------------------------------------------------------


def test_progress_goes_to_stderr_and_is_silent_when_told(dataset, capsys):
    encode_dataset(ColourModel(), dataset, title="stage1")
    assert "stage1: 4/4 images" in capsys.readouterr().err
    encoded_of(dataset)
    texts = write_texts(ColourModel(), torch.ones(300, 3), progress=False, num_beams=1)
    assert texts == ["a white ball"] * 300
    assert capsys.readouterr() == ("", "")
