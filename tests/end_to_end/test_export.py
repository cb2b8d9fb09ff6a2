"""`mmgem export`: the weights of a run's checkpoint, whichever engine saved them, in a folder that needs neither
DeepSpeed nor Lightning to be used."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Finished, Process, Tiny, same_bits, weights

from mmgem import MMGem
from mmgem.cli import main
from mmgem.config import ModelConfig
from mmgem.data.index import Index
from mmgem.model.pretrained import save_pretrained
from mmgem.training import card, export

ROOT = Path(__file__).parents[2]
SHORT = ("stages.0.samples=64", "stages.1=null", "training.checkpoint_every=2", "training.sample_every=0")
"""4 steps."""
TRAINING_ONLY = ("deepspeed", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")

# Run by a Python that has none of these; and by this one, for what it is to be equal to.
USE = """
import importlib
import sys

import torch

from mmgem import MMGem
from mmgem.cli import main
from mmgem.data.samples import decode_image
from mmgem.data.shards import ShardedDataset


def answers(folder, split):
    model, dataset = MMGem.from_pretrained(folder), ShardedDataset(split)
    samples = [dataset.sample(i) for i in range(6)]
    pictures, boxes = [decode_image(s) for s in samples], [[r.box for r in s.regions] for s in samples]
    vectors = [model.embed_images(pictures), *model.embed_regions(pictures, boxes)]
    vectors.append(model.embed_texts([text for s in samples for text in s.captions]))
    return torch.cat(vectors), model.caption(pictures, num_beams=2) + sum(model.caption_regions(pictures, boxes), [])


if __name__ == "__main__":
    folder, split, picture, out, *absent = sys.argv[1:]
    for name in absent:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        sys.exit(f"{name} is installed")
    torch.save(answers(folder, split), out)
    assert main(["embed", "--model", folder, "--data", split, "--out", f"{out}.npz"]) == 0
    assert main(["caption", "--model", folder, picture]) == 0
    assert main(["regions", "--model", folder, picture, "--box", "5,5,40,50", "--caption", "--query", "a ball"]) == 0
    assert not set(absent) & set(sys.modules)
"""


@pytest.fixture(scope="module")
def use(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("use") / "use.py"
    script.write_text(USE)
    return script


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with all that this one has, but for what only training needs."""
    venv = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for place in dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")):
        for item in Path(place).iterdir():
            name = re.split(r"[-.]", item.name)[0]
            if name not in TRAINING_ONLY and not name.startswith("__editable__"):
                (packages / item.name).symlink_to(item)
    (packages / "project.pth").write_text(str(ROOT))
    return venv / "bin/python"


def test_use_needs_no_training_library(
    tiny: Tiny, zero: Path, picture: Path, use: Path, plain_python: Path, tmp_path: Path
) -> None:
    """A ZeRO checkpoint, exported, gives the vectors of the model that the training ended with."""
    assert main(["export", str(zero), str(tmp_path / "out"), "--checkpoint", "last.ckpt"]) == 0
    split, found = tiny.data / "test", tmp_path / "found.pt"
    arguments = [use, tmp_path / "out", split, picture, found, *TRAINING_ONLY]
    done = subprocess.run([plain_python, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    vectors, captions = torch.load(found)
    wanted, written = runpy.run_path(str(use))["answers"](zero / "model", split)
    assert vectors.shape == wanted.shape and len(vectors) > 40
    assert (vectors - wanted).abs().max() <= 1e-6
    assert captions == written
    assert same_bits(weights(tmp_path / "out"), weights(zero / "model"))


@pytest.fixture(scope="module", params=["deepspeed_2", "deepspeed_3"])
def zero(request: pytest.FixtureRequest, tiny: Tiny, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks; its tower is frozen and comes from a file."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # A frozen random LLM has no origin: its checkpoints hold it.
    llm = ("stages.0.freeze=[vision, llm]",) if request.param == "deepspeed_3" else ()
    settings = (*SHORT, *frozen(tower), *llm, f"training.strategy={request.param}")
    arguments = tiny.arguments(folder, *settings)[1:]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [Process(*arguments, script=ROOT / "train.py", **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for rank in ranks:
        done = rank.wait()
        assert done.code == 0, done.err
    assert (folder / "checkpoints/last.ckpt").is_dir()
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the tower of tiny.yaml."""
    import timm

    file = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    torch.manual_seed(5)
    model = timm.create_model("resnet10t", channels=[8, 16, 24, 32], stem_width=8, output_stride=16)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file


def frozen(tower: Path) -> tuple[str, ...]:
    return f"model.vision.pretrained={tower}", "stages.0.freeze=[vision]"


# --- a run that was stopped ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = Process(*tiny.arguments(folder, "stages.0.samples=1600", "training.checkpoint_every=1000"))
    process.wait_for_lines(folder / "log.jsonl", 3)
    process.signal(signal.SIGTERM)
    done = process.wait()
    assert done.code == 143, done.err
    return folder


def test_a_stopped_run_gives_its_checkpoint(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "out"
    assert main(["export", str(stopped), str(out)]) == 0
    saved = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)
    state = {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()}
    state |= saved["temperature"]["values"]
    exported = weights(out)
    assert exported["logit_scale"] != 1 and len(exported) > 50
    assert all(torch.equal(tensor, state[name]) for name, tensor in exported.items())
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(out)
    counts = "4 pictures, 8 boxes and 12 texts of the run's data"
    assert said[-2] == f"{counts}: max |difference| of vectors 0, 12 of 12 captions equal"
    steps = saved["global_step"]
    text = (out / "README.md").read_text()
    assert f"step {steps} of stage global ({16 * steps} samples), step {steps} of the run" in text
    assert "No results were found" in text and "model-index" not in text
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_bfloat16_and_again_to_the_same_place(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(stopped), str(out)]) == 0
    exact = weights(out)
    assert main(["export", str(stopped), str(out), "--dtype", "bfloat16"]) == 0
    rounded = weights(out)
    assert rounded.keys() == exact.keys()
    for name, tensor in exact.items():
        keeps = not name.endswith(("weight", "bias", "rows_2D"))
        assert torch.equal(rounded[name], tensor if keeps else tensor.bfloat16()), name
        assert rounded[name].dtype == (tensor.dtype if keeps else torch.bfloat16), name
    first, second, _ = capsys.readouterr().out.splitlines()[-3:]
    cosine = re.fullmatch(r"rounded to bfloat16: least cosine with float32 (\d\.\d+), \d+ of 12 captions equal", first)
    assert cosine and 0.99 < float(cosine[1]) < 1
    assert "max |difference| of vectors 0, 12 of 12 captions equal" in second
    assert "stored in bfloat16" in (out / "README.md").read_text()
    half = MMGem.from_pretrained(out, dtype=torch.bfloat16)
    assert half.embed_texts(["a red ball"]).isfinite().all()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_without_its_data_rendered_pictures_are_compared(
    tiny: Tiny, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"
    tiny.data.rename(away)
    try:
        assert main(["export", str(stopped), str(tmp_path / "out")]) == 0
    finally:
        away.rename(tiny.data)
    assert "texts of rendered scenes: max |difference| of vectors 0" in capsys.readouterr().out
    text = (tmp_path / "out/README.md").read_text()
    assert "`tiny`, train: its index could not be read when this was written" in text
    assert json.loads((stopped / "run.json").read_text())["data"]["train"] in text


# --- a finished run, and its card ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tiny: Tiny, finished: tuple[Path, Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished[0], folder, symlinks=True)
    assert main(["eval", "retrieval", "--model", str(folder), "--data", str(tiny.data), "--stages"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "small-model"
    assert main(["export", str(evaluated), str(out)]) == 0
    return out


def test_a_finished_run_gives_its_model(evaluated: Path, exported: Path) -> None:
    assert same_bits(weights(exported), weights(evaluated / "model"))
    for name in ("config.json", "tokenizer.json"):
        assert (exported / name).read_bytes() == (evaluated / "model" / name).read_bytes()


def test_the_card_says_what_the_run_did(tiny: Tiny, evaluated: Path, exported: Path) -> None:
    found = ModelCard.load(exported / "README.md")
    assert found.data.library_name == "mmgem" and found.data.pipeline_tag == "image-to-text"
    assert found.data.license is None and found.data.base_model is None
    _, last = json.loads((evaluated / "report/metrics.json").read_text())
    assert last["model"] == "fine-grained"
    assert found.data.eval_results is not None and found.data.model_name == "small-model"
    assert {r.metric_type: r.metric_value for r in found.data.eval_results} == last["metrics"]
    assert {(r.dataset_name, r.dataset_split) for r in found.data.eval_results} == {("tiny", "test")}

    text = found.text
    run_facts = json.loads((evaluated / "run.json").read_text())
    index = json.loads((tiny.data / "train/index.json").read_text())
    totals = index["totals"]
    assert f"`tiny`, train: {totals['samples']} samples in 1 shard, {totals['captions']} captions" in text
    assert text.count(run_facts["data"]["train"]) == 2 and "have changed" not in text
    assert all(f"| {part} | {count:,} |" in text for part, count in run_facts["parameters"].items())
    assert "after its last step, 50; stored in float32" in text
    assert "### retrieval on tiny, test: the model after stage global" in text
    value = last["metrics"]["image_retrieval_recall@5"]
    assert f"| image_retrieval_recall@5 | {value:.4f} | {last['stderr']['image_retrieval_recall@5']:.4f} |" in text
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    assert settings["stages"] == yaml.safe_load((evaluated / "config.yaml").read_text())["stages"]
    assert f"torch {torch.__version__}" in text and "No license is stated here" in text
    assert str(tiny.data.parent) not in found.content, "no folders of this machine"


def test_what_the_card_tells_users_to_run_works(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    Image.radial_gradient("L").resize((120, 90)).convert("RGB").save("photo.jpg")
    text = Path("README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([1, 32])" in capsys.readouterr().out
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    for command in commands.splitlines():
        assert main(shlex.split(command)[1:]) == 0, command
    assert Path("vectors.npz").is_file()


def test_a_checkpoint_of_an_evaluated_run_has_no_results_of_its_own(evaluated: Path, tmp_path: Path) -> None:
    assert main(["export", str(evaluated), str(tmp_path / "out"), "--checkpoint", "last.ckpt"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "model-index" not in text and "### retrieval on tiny, test: the finished run" in text
    assert same_bits(weights(tmp_path / "out"), weights(evaluated / "model"))


def test_data_that_have_changed_are_said_to_have(exported: Path) -> None:
    index = Index([], dict.fromkeys(("samples", "captions", "regions", "images_without_captions"), 0))
    config = export.load_config(ROOT / "tests/tiny.yaml")
    splits = [card.SplitFacts("tiny", "train", None, index)]
    for checksum, changed in ((index.checksum, False), ("0" * 64, True), (None, False)):
        facts = card.Facts("m", config, "w", "float32", {}, splits, checksum, [], [], {}, {})
        assert ("have changed since" in card.card(facts)) is changed


HUB = [
    ({"vision": {"name": "mobilenetv2_100", "pretrained": "ra_in1k"}}, ["timm/mobilenetv2_100.ra_in1k"]),
    ({"vision": {"name": "mobilenetv2_100", "pretrained": "default"}}, ["timm/mobilenetv2_100.ra_in1k"]),
    ({"vision": {"name": "mobilenetv2_100", "pretrained": "/at/home/ra_in1k.safetensors"}}, []),
    (
        {
            "vision": {"library": "open_clip", "name": "ViT-L-14", "pretrained": "openai"},
            "llm": {"name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"},
        },
        ["timm/vit_large_patch14_clip_224.openai", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"],
    ),
    ({"vision": {"library": "open_clip", "name": "hf-hub:laion/CLIP-ViT-B-32"}}, ["laion/CLIP-ViT-B-32"]),
    ({"vision": {"name": "mobilenetv2_100"}, "llm": {"name": "/home/me/llama"}}, []),
]


@pytest.mark.parametrize(("settings", "names"), HUB)
def test_base_models_are_names_of_the_hub(settings: dict[str, Any], names: list[str]) -> None:
    assert card.base_models(ModelConfig(**settings)) == names


def test_no_secret_of_a_url_is_shown() -> None:
    assert card.shown_place("https://me:secret@host.org/data/web?token=1") == "https://host.org/data/web"
    assert card.shown_place("/home/me/data/scenes") == "scenes"


# --- frozen parts -------------------------------------------------------------------------------------------------


def test_frozen_parts_come_back_from_their_origin(
    tiny: Tiny, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not in the checkpoint. An origin that holds others now is refused, and nothing is written."""
    file, folder, out = tmp_path / "tower.safetensors", tmp_path / "run", tmp_path / "out"
    shutil.copy(tower, file)
    assert tiny.train(folder, *SHORT, *frozen(file)) == 0
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert "model.vision.model.conv1.0.weight" not in saved
    assert main(["export", str(folder), str(out), "--checkpoint", "last.ckpt"]) == 0
    first, exported = load_file(file), weights(out)
    names = [name for name in exported if name.startswith("vision.model.") and name.endswith("weight")]
    assert len(names) > 10
    assert all(torch.equal(exported[name], first[name.removeprefix("vision.model.")]) for name in names)
    assert same_bits(exported, weights(folder / "model"))
    origin = json.loads((out / "config.json").read_text())["model"]["vision"]["origin"]
    assert origin == "tower.safetensors", "by name, without the folders of this machine"

    first["conv1.0.weight"] += 1
    save_file(first, file)
    before = (out / "model.safetensors").read_bytes()
    assert main(["export", str(folder), str(out), "--checkpoint", "last.ckpt"]) == 2
    assert "which now holds others" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["export", str(folder), str(tmp_path / "new"), "--checkpoint", "last.ckpt"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "tower.safetensors"]


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("mmgem: error: ")
    return err


def test_what_is_refused(
    tiny: Tiny, stopped: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "no run here (config.yaml is looked for)" in refused(capsys, tmp_path / "none", out)
    assert "no run here" in refused(capsys, exported, out)
    assert "no such checkpoint; in " in refused(capsys, stopped, out, "--checkpoint", "best.ckpt")
    found = sorted(p.name for p in (stopped / "checkpoints").glob("*.ckpt"))
    assert refused(capsys, stopped, out, "--checkpoint", "x").endswith(f"there are: {', '.join(found)}")
    (tmp_path / "lightning.ckpt").write_bytes(b"PK")
    assert "not a checkpoint of mmgem" in refused(capsys, stopped, out, "--checkpoint", tmp_path / "lightning.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "not a checkpoint of mmgem" in refused(capsys, stopped, out, "--checkpoint", tmp_path / "other.ckpt")

    assert tiny.train(tmp_path / "other", *SHORT, "seed=1") == 0
    theirs = tmp_path / "other/checkpoints/last.ckpt"
    assert "is a checkpoint of another run than" in refused(capsys, stopped, out, "--checkpoint", theirs)

    for name in ("model", "stages/global", "checkpoints/x"):
        assert "is the run's own" in refused(capsys, stopped, stopped / name)
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "letter.txt").write_text("dear")
    assert "holds something other than a model" in refused(capsys, stopped, keep)
    assert [p.name for p in keep.iterdir()] == ["letter.txt"]

    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(stopped / "config.yaml", begun)
    assert "neither a finished model nor a checkpoint here" in refused(capsys, begun, out)
    shutil.copytree(stopped / "checkpoints", begun / "checkpoints", symlinks=True)
    assert f"{begun}/tokenizer: missing" in refused(capsys, begun, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_copy_that_differs_is_not_kept(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_wrong(model: MMGem, path: Path) -> None:
        save_pretrained(model, path)
        content = load_file(path / "model.safetensors")
        content["h2.weight"][0] *= 1.001
        save_file(content, path / "model.safetensors")

    monkeypatch.setattr(export, "save_pretrained", save_wrong)
    assert "does not give what" in refused(capsys, stopped, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("room_kb", [100, 592])
def test_a_full_disk_leaves_what_was_there(
    stopped: Path, small_disk: Path, room_kb: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No room for the weights; and none, after the weights, for the tokenizer."""
    (small_disk / "filler").write_bytes(bytes((1024 - room_kb) * 1024))
    err = refused(capsys, stopped, small_disk / "out")
    assert "cannot be written (" in err and "No space left on device" in err
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
