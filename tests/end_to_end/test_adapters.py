"""`eval/`: other people's harnesses run our models, and ours theirs, with the same figures wherever both have one.

The models are a trained one of the tiny run, and an open_clip model of random weights; the data are rendered scenes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Tiny, break_samples

from adapters.clip_benchmark import as_clip_benchmark_dataset, load_mmgem, register, write_webdataset
from adapters.open_clip import OpenClipEncoder, load_open_clip
from adapters.split import picture_file, refuse_without_captions
from mmgem import MMGem
from mmgem.data.samples import Sample, decode_image, parse_sample
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.evaluation.run import evaluate
from mmgem.evaluation.tasks import TaskOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evaluation.md").read_text()
KS = (1, 5, 10)
RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in KS]
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SQUARE = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}

cli = pytest.importorskip("clip_benchmark.cli", reason="CLIP_benchmark comes with the extra `dev`")


def ours(model: Any, data: Path, out: Path, split: str = "test") -> dict[str, float]:
    """The recalls of `mmgem eval retrieval`, on data on which no tie stands between two harnesses."""
    result = evaluate({"one": model}, data, split, ["retrieval"], out, options=TaskOptions(samples=10, progress=False))
    retrieval = result["one"]["retrieval"]
    assert retrieval.protocol["captions_of_several_images"] == 0
    return {name: retrieval.metrics[name] for name in RECALLS}


def theirs(model: Any, transform: Any, tokenizer: Any, data: Path, amp: bool = False) -> dict[str, float]:
    """What CLIP_benchmark's zero-shot retrieval says."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn
    from clip_benchmark.metrics import zeroshot_retrieval

    dataset = as_clip_benchmark_dataset(data, "test", transform)
    loader = torch.utils.data.DataLoader(dataset, batch_size=7, collate_fn=get_dataset_collate_fn("flickr8k"))
    return zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=amp, recall_k_list=list(KS))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of open_clip as its users keep one: a folder with its config and weights."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip") / "OPEN_CLIP"
    folder.mkdir()
    torch.manual_seed(0)
    made = open_clip.CLIP(**CLIP)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": CLIP, "preprocess_cfg": SQUARE}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


# --- CLIP_benchmark ---------------------------------------------------------------------------------------------------


def test_retrieval_of_our_model(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    from clip_benchmark.models import load_clip

    register()
    register()
    loaded = load_clip("mmgem", "tiny", str(model), None, device="cpu")  # pyright: ignore[reportArgumentType]
    expected = ours(model, tiny.data, tmp_path)
    assert theirs(*loaded, tiny.data) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@10"] < 1
    # In half precision, its default, a few of the 24 queries fall otherwise.
    assert theirs(*loaded, tiny.data, amp=True) == pytest.approx(expected, abs=0.2)


def test_the_loader_gives_our_vectors(model: Path) -> None:
    loaded, transform, tokenizer = load_mmgem("any name", str(model))
    pixels = torch.stack([transform(GREY), transform(GREY.convert("RGB"))])
    texts = ["a ball", "a much longer text than the other"]
    with torch.no_grad():
        assert torch.allclose(loaded.encode_image(pixels), loaded.image_vectors([GREY, GREY]), atol=1e-6)
        assert torch.allclose(loaded.encode_text(tokenizer(texts)), loaded.text_vectors(texts), atol=1e-5)


def test_its_command_on_a_split_with_a_broken_picture(
    model: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run_clip_benchmark

    broken = tmp_path / "broken"
    shutil.copytree(tiny.data, broken)
    break_test_picture(broken, 3)
    monkeypatch.chdir(tmp_path)
    assert run_clip_benchmark.main(["data", "--data", "broken", "--out", "wds"]) == 0
    assert "23 images" in capsys.readouterr().out
    command = f"eval --pretrained {model} --dataset wds/scenes --dataset_root wds --task zeroshot_retrieval"
    command += f" --model tiny --recall_k {' '.join(map(str, KS))} --no_amp --num_workers 0 --batch_size 5 --quiet"
    assert run_clip_benchmark.main(command.split()) == 0
    result = json.loads((tmp_path / "scenes_tiny_en_zeroshot_retrieval.json").read_text())
    assert result["metrics"] == pytest.approx(ours(model, broken, tmp_path / "ours"), abs=1e-6)
    with pytest.raises(UserError, match="sample test-000003: .*broken"):
        as_clip_benchmark_dataset(broken, "test")[3]
    assert run_clip_benchmark.main(["data", "--data", "broken", "--out", "wds"]) == 2
    assert "wds/test: is not empty" in capsys.readouterr().err


def break_test_picture(data: Path, number: int) -> None:
    from spoil import break_pictures, members_of

    break_pictures(data / "test", [members_of(data / "test")[number][1]])


def test_zero_shot_classification(model: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are words, and a picture's right one is by lot: what is compared is which one the model takes."""
    from webdataset.writer import ShardWriter

    import run_clip_benchmark

    names, templates = ["ball", "cross", "red box", "blue ring"], ["a {c}", "there is a {c}", "two {c} side by side"]
    samples = ShardedDataset(tiny.data / "test")
    labels = np.random.default_rng(0).integers(0, len(names), len(samples)).tolist()
    (tmp_path / "words/test").mkdir(parents=True)
    with ShardWriter(str(tmp_path / "words/test/%d.tar"), verbose=0) as sink:
        for n, label in enumerate(labels):
            ending, content = picture_file(samples.sample(n), decode_image(samples.sample(n)))
            sink.write({"__key__": str(n), ending: content, "cls": label})
    (tmp_path / "words/test/nshards.txt").write_text("1")
    (tmp_path / "words/classnames.txt").write_text("\n".join(names))
    (tmp_path / "words/zeroshot_classification_templates.txt").write_text("\n".join(templates))
    monkeypatch.chdir(tmp_path)
    command = f"eval --pretrained {model} --dataset wds/words --dataset_root words --no_amp --num_workers 0 --quiet"
    assert run_clip_benchmark.main([*command.split(), "--output", "{model}.json"]) == 0
    loaded = MMGem.from_pretrained(model)
    images = loaded.embed_images([decode_image(samples.sample(n)) for n in range(len(samples))])
    classes = torch.stack([loaded.embed_texts([t.format(c=name) for t in templates]).mean(dim=0) for name in names])
    taken = (images @ torch.nn.functional.normalize(classes, dim=1).T).argmax(dim=1)
    expected = float((taken == torch.tensor(labels)).float().mean())
    metrics = json.loads((tmp_path / f"{model.resolve().name}.json").read_text())["metrics"]
    assert metrics["acc1"] == pytest.approx(expected, abs=1e-6) and expected > 0


def test_top_5_accuracy() -> None:
    from clip_benchmark.metrics import zeroshot_classification

    register()
    scores_NC = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 3)
    hits = zeroshot_classification.accuracy(scores_NC, torch.tensor([0, 4, 5]), topk=(1, 5))
    assert hits == pytest.approx([1 / 3, 2 / 3])


def test_the_script_as_a_program() -> None:
    """From its own folder, where a file named after a harness would hide the harness."""
    script = ROOT / "eval/run_clip_benchmark.py"
    shown = subprocess.run([sys.executable, script, "eval", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"--model_type \{[^}]*mmgem", shown.stdout)
    assert not {path.stem for path in script.parent.iterdir()} & {"clip_benchmark", "mteb", "open_clip"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval --dataset wds/x", "--pretrained: no model named"),
        ("eval --pretrained a b --dataset wds/x", "one model a call"),
        ("eval --pretrained a --output {pretrained}.json", "write {model}"),
        ("eval --pretrained nowhere --dataset dummy", "nowhere: no such folder"),
        ("data --data nowhere --out wds", "nowhere"),
    ],
)
def test_what_its_command_refuses(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run_clip_benchmark

    monkeypatch.chdir(tmp_path)
    assert run_clip_benchmark.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_options_of_other_models_are_left_alone() -> None:
    import run_clip_benchmark

    given = ["eval", "--model_type", "open_clip", "--model", "RN50", "--pretrained", "openai"]
    assert run_clip_benchmark.with_defaults(given) == given


# --- the data of a split ----------------------------------------------------------------------------------------------


def turned_jpeg() -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file, "JPEG", exif=exif)
    return file.getvalue()


def saved(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


GREY = Image.linear_gradient("L").resize((20, 30))
DEEP = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))


@pytest.mark.parametrize(
    ("content", "ending", "kept"),
    [
        (saved(GREY.convert("RGB"), "JPEG"), "jpg", True),
        (saved(GREY, "PNG"), "png", True),
        (saved(GREY.convert("RGBA"), "WEBP"), "webp", True),
        (turned_jpeg(), "png", False),
        (saved(DEEP, "PNG"), "png", False),
        (saved(GREY.convert("RGB"), "BMP"), "png", False),
    ],
)
def test_any_reader_sees_our_pixels(content: bytes, ending: str, kept: bool) -> None:
    sample = parse_sample("one", content, {"captions": ["a gradient"]})
    seen = decode_image(sample)
    got, written = picture_file(sample, seen)
    assert got == ending and (written == content) == kept
    read = Image.open(io.BytesIO(written)).convert("RGB")
    assert read.size == seen.size and read.tobytes() == seen.tobytes()


def test_a_sample_without_captions_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample x has no caption"):
        refuse_without_captions(Sample("x", b"", (), (), 1, 1, {}))
    with pytest.raises(UserError, match="no split 'nope'; it has test, train, val"):
        as_clip_benchmark_dataset(tiny.data, "nope")
    with pytest.raises(UserError, match="broken"):
        write_webdataset(break_samples(tiny, tmp_path / "broken", [0, 1, 2]).data, "train", tmp_path / "wds")
    assert not list((tmp_path / "wds").rglob("*.txt"))


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_an_open_clip_model_both_ways(clip: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Through CLIP_benchmark's own loader, and as an encoder through `mmgem eval`."""
    import open_clip
    from clip_benchmark.models.open_clip import load_open_clip as load_theirs

    (tmp_path / "clip-of-a-test.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path)
    encoder = load_open_clip(f"local-dir:{clip}")
    by_name, _, tokenizer = load_theirs("clip-of-a-test", str(clip / "open_clip_model.safetensors"), device="cpu")
    by_name.eval()
    expected = ours(encoder, tiny.data, tmp_path / "out")
    # The folder says how pictures are prepared; a config of this kind does not.
    assert theirs(by_name, encoder.preprocess, tokenizer, tiny.data) == pytest.approx(expected, abs=1e-6)
    assert len(set(expected.values())) > 3
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    # For a context of 40 some captions are too long; both cut them alike.
    assert report["protocol"]["dtype"] == "float32" and 0 < report["protocol"]["texts_cut"] < 20


def test_what_an_open_clip_model_cannot(clip: Path, tiny: Tiny, tmp_path: Path) -> None:
    encoder = load_open_clip(f"local-dir:{clip}")
    for task, what in (("region-retrieval", "vectors of boxes"), ("captioning", "captions")):
        with pytest.raises(UserError, match=f"gives no {what}"):
            evaluate({"clip": encoder}, tiny.data, "test", [task], tmp_path, options=TaskOptions(progress=False))
    with pytest.raises(UserError, match="no vectors of boxes"):
        encoder.image_and_region_vectors([GREY.convert("RGB")], [[(0, 0, 5, 5)]])
    for name, weights in (("no-such-model", None), (f"local-dir:{tmp_path}", None)):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_open_clip(name, weights)


def test_texts_that_an_open_clip_model_cuts(clip: Path) -> None:
    encoder = load_open_clip(f"local-dir:{clip}")
    longest = " ".join(["ball"] * 38)  # and the tokens for start and end: 40
    ids, cut = encoder.codec.encode(["", "a ball", longest, f"{longest} ball"])
    assert cut == [False, False, False, True] and [len(row) for row in ids] == [40] * 4
    assert encoder.codec.encode([]) == ([], [])
    whole, shorter = encoder.text_vectors([f"{longest} ball", longest])
    assert torch.allclose(whole, shorter)  # cut before the end token, it is the other text
    assert isinstance(encoder, OpenClipEncoder) and not encoder.clip.training


# --- MTEB -------------------------------------------------------------------------------------------------------------


def test_mteb(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb", reason="MTEB comes with the extra `eval`")
    from mteb.models import EncoderProtocol

    from adapters.mteb import MMGemEncoder, retrieval_tasks

    encoder = MMGemEncoder(str(model), device="cpu")
    assert isinstance(encoder, EncoderProtocol)
    tasks = retrieval_tasks(tiny.data, "test")
    assert [task.metadata.name for task in tasks] == ["TinyTestT2I", "TinyTestI2T"]
    cache = mteb.ResultCache(tmp_path / "mteb")
    found = mteb.evaluate(encoder, tasks, cache=cache, show_progress_bar=False, encode_kwargs={"batch_size": 7})
    to_image, to_text = (result.scores["test"][0] for result in found.task_results)
    expected = ours(model, tiny.data, tmp_path / "ours")
    for k in KS:  # MTEB rounds to five places
        assert to_image[f"recall_at_{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-5)
        assert to_text[f"hit_rate_at_{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-5)
    # Every image has five captions, so that this one is another figure, and has to be lower.
    assert to_text["recall_at_1"] < to_text["hit_rate_at_1"]

    text, image = [{"text": ["a red ball"]}], [{"image": [GREY]}]
    both = [{"text": ["a red ball"], "image": [GREY]}]
    t_1E, i_1E, both_1E = (encoder.encode(batches) for batches in (text, image, both))
    assert torch.allclose(both_1E, torch.nn.functional.normalize(t_1E + i_1E, dim=1), atol=1e-6)
    assert torch.as_tensor(encoder.similarity(t_1E, i_1E)).item() == pytest.approx(float((t_1E @ i_1E.T).item()))
    pairs = encoder.similarity_pairwise(torch.cat([t_1E, i_1E]), torch.cat([i_1E, i_1E]))
    assert torch.as_tensor(pairs).tolist() == pytest.approx([float((t_1E @ i_1E.T).item()), 1.0], abs=1e-6)
    with pytest.raises(UserError, match="holds \\['audio'\\]"):
        encoder.encode([{"audio": [0]}])
    # Another checkpoint of the run has another revision: its results are not taken from the cache.
    stage = next(path for path in sorted((model / "stages").iterdir()) if "global" in path.name)
    assert MMGemEncoder(str(stage), device="cpu").mteb_model_meta.revision != encoder.mteb_model_meta.revision


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_command_of_the_page_runs(
    model: Path,
    clip: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny.data, tmp_path / "data/scenes")
    shutil.copytree(model, tmp_path / "runs/quickstart")
    shutil.copytree(clip, tmp_path / "OPEN_CLIP")
    monkeypatch.chdir(tmp_path)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S))
    commands = [line for line in blocks.splitlines() if line.startswith("python ")]
    assert len(commands) >= 4
    for command in commands:
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file()
        if "mteb" in script and importlib.util.find_spec("mteb") is None:
            continue
        assert importlib.import_module(Path(script).stem).main(arguments) == 0, command
    result = json.loads((tmp_path / "scenes_quickstart_en_zeroshot_retrieval.json").read_text())
    assert set(RECALLS) <= result["metrics"].keys()
    assert (tmp_path / "runs/beside/report.html").is_file()
    printed = capsys.readouterr().out
    assert "local-dir:OPEN_CLIP: text_retrieval_recall@1" in printed and "quickstart: text_retrieval" in printed
