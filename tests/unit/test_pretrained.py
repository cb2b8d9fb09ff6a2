"""A model as a folder: the same model again, without the training libraries, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import LLAMA, TEXTS, build, clip_vit, cnn, model_config, picture, shared_model, timm_vit, tokenizer

from mmgem import MMGem
from mmgem.config import ModelConfig, VisionConfig
from mmgem.errors import UserError
from mmgem.model.pretrained import config_json, inherit, parse_config, replace_folder

PICTURES = [picture(n, 60 + 12 * n, 90 - 7 * n) for n in range(3)]
BOXES = [[(0.0, 0.0, 30.0, 40.0), (20.0, 5.0, 60.0, 70.0)], [], [(5.0, 5.0, 50.0, 60.0)]]
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}


def answers(model: MMGem) -> dict[str, Any]:
    v_NE, r = model.image_and_region_vectors(PICTURES, BOXES)
    return {
        "images": v_NE,
        "regions": torch.cat(r),
        "texts": model.text_vectors(TEXTS),
        "greedy": model.caption(PICTURES, max_new_tokens=10),
        "beams": model.caption_regions(PICTURES, BOXES, num_beams=3, max_new_tokens=10),
        "sampled": model.caption(PICTURES, do_sample=True, seed=1, max_new_tokens=10),
    }


def assert_same_answers(found: MMGem, wanted: MMGem) -> None:
    for name, value in answers(wanted).items():
        other = answers(found)[name]
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "config",
    [
        model_config(roi_size=2),
        model_config({**LLAMA, "tie_word_embeddings": False}, "eager", vision=timm_vit(resize="crop")),
        model_config(GPT2, vision=clip_vit(mean=(0.1, 0.2, 0.3)), max_tokens=20),
        model_config(vision=VisionConfig(name="mobilenetv2_050", image_size=64, train_from="blocks.4", layer=None)),
    ],
    ids=["cnn + llama", "timm vit + untied llama", "open_clip vit + gpt2", "cut tower"],
)
def test_a_round_trip_gives_the_same_answers(config: ModelConfig, tmp_path: Path):
    model = build(config)
    model.set_standard(torch.randn(50, model.vision.width))
    model.save_pretrained(tmp_path / "model")
    loaded = MMGem.from_pretrained(tmp_path / "model")
    assert not any(module.training for module in loaded.modules())
    assert_same_answers(loaded, model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    first, second = contents(tmp_path / "model"), contents(tmp_path / "again")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first.keys() == second.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_run_folder_is_a_model_too(tmp_path: Path):
    shared_model().save_pretrained(tmp_path / "run" / "model")
    assert_same_answers(MMGem.from_pretrained(tmp_path / "run"), shared_model())
    assert_same_answers(MMGem.from_pretrained(str(tmp_path / "run" / "model")), shared_model())


def test_the_model_of_training_is_saved_as_it_is_in_use(tmp_path: Path):
    model = build().train()
    model.save_pretrained(tmp_path / "model")
    assert model.training
    assert_same_answers(MMGem.from_pretrained(tmp_path / "model"), model.eval())


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path):
    model = shared_model()
    model.save_pretrained(tmp_path / "tied")
    stored = safetensors.torch.load_file(tmp_path / "tied" / "model.safetensors")
    tables = [n for n, v in stored.items() if v.shape == (model.codec.vocab_size, 64)]
    assert len(tables) == 1
    loaded = MMGem.from_pretrained(tmp_path / "tied").language.hf
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_what_config_json_says(tmp_path: Path):
    build(model_config(vision=cnn(std=(0.3, 0.3, 0.3)))).save_pretrained(tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tree["schema"] == 1
    vision, llm = tree["model"]["vision"], tree["model"]["llm"]
    # The tower's own mean is written down, since another version of its library might give another.
    assert vision["mean"] == [0.485, 0.456, 0.406] and vision["std"] == [0.3, 0.3, 0.3]
    assert vision["name"] == "resnet10t" and vision["pretrained"] is None and vision["origin"] is None
    assert llm["name"] is None
    assert llm["config"]["model_type"] == "llama" and llm["config"]["hidden_size"] == 64
    assert llm["config"]["rms_norm_eps"] > 0  # also what was left to the library
    assert tree["model"]["embed_dim"] == 32 and tree["model"]["max_tokens"] == 16


def test_what_a_config_leaves_to_its_source_is_inherited(tmp_path: Path):
    """A tag's mean, deviation and frozen statistics, an LLM's epsilon: none of them is a weight."""
    model = build(model_config(vision=cnn(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), frozen_statistics=True)))
    origin = parse_config(config_json(model), "test")
    origin.llm.config["rms_norm_eps"] = 0.5
    asked = model_config(vision=cnn(mean=None, std=None))
    asked.visual_dropout = 0.3
    settings = inherit(asked, origin)
    assert settings.vision.mean == (0.1, 0.2, 0.3) and settings.vision.std == (0.4, 0.5, 0.6)
    assert settings.vision.frozen_statistics is True
    assert settings.llm.config["rms_norm_eps"] == 0.5 and settings.visual_dropout == 0.3
    assert "rms_norm_eps" not in asked.llm.config, "the asked settings are left as they are"
    asked.llm.config["rms_norm_eps"], asked.vision.mean = 0.25, (0.0, 0.0, 0.0)
    settings = inherit(asked, origin)
    assert settings.llm.config["rms_norm_eps"] == 0.25 and settings.vision.mean == (0.0, 0.0, 0.0)


def test_nothing_else_is_needed_to_load(tmp_path: Path):
    """Not the checkpoint, not the config file, not the LLM's folder that the model was made of."""
    parts = tmp_path / "parts"
    parts.mkdir()
    clip = {"embed_dim": 24, "quick_gelu": True, "text_cfg": {}}
    clip["vision_cfg"] = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    (parts / "clip.json").write_text(json.dumps(clip))
    build().language.hf.save_pretrained(parts / "llm")
    tokenizer().save_pretrained(parts / "llm")
    vision = clip_vit(config={}, config_file=str(parts / "clip.json"))
    config = model_config({"hidden_size": 64}, vision=vision)
    config.llm.name = str(parts / "llm")
    model = build(config)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(parts)
    assert_same_answers(MMGem.from_pretrained(tmp_path / "model"), model)
    tree = json.loads((tmp_path / "model" / "config.json").read_text())["model"]
    assert tree["llm"]["origin"] == str(parts / "llm")
    assert tree["vision"]["config"]["quick_gelu"] is True


WITHOUT_TRAINING_LIBRARIES = """
import importlib.util, sys

class Without:
    # A finder for which the training libraries are not installed.
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lightning", "lightning_fabric", "pytorch_lightning", "deepspeed", "webdataset"}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("lightning") is None and importlib.util.find_spec("deepspeed") is None
import torch
from PIL import Image
from mmgem import MMGem
model = MMGem.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2])
torch.save({"v": model.image_vectors([image]), "t": model.text_vectors(["a red dog"]),
            "caption": model.caption([image], max_new_tokens=10)}, sys.argv[3])
assert not {"lightning", "pytorch_lightning", "deepspeed"} & sys.modules.keys()
"""


def test_it_loads_where_lightning_and_deepspeed_are_not_installed(tmp_path: Path):
    model = shared_model()
    model.save_pretrained(tmp_path / "model")
    PICTURES[0].save(tmp_path / "picture.png")
    arguments = [str(tmp_path / name) for name in ("model", "picture.png", "out.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING_LIBRARIES, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out.pt")
    assert torch.allclose(out["v"], model.image_vectors(PICTURES[:1]), atol=1e-6)
    assert torch.allclose(out["t"], model.text_vectors(["a red dog"]), atol=1e-6)
    assert out["caption"] == model.caption(PICTURES[:1], max_new_tokens=10)


def test_half_precision_keeps_what_must_be_exact(tmp_path: Path):
    model = build()
    model.logit_scale.data.fill_(4.1234567)
    model.save_pretrained(tmp_path / "model")
    half = MMGem.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.h1.weight.dtype == torch.bfloat16
    assert half.logit_scale.dtype == torch.float32 and half.logit_scale.item() == model.logit_scale.item()
    exact, kept = (dict(m.language.named_buffers())["hf.model.rotary_emb.inv_freq"] for m in (model, half))
    assert kept.dtype == torch.float32 and torch.equal(kept, exact)
    for method, given in (("image_vectors", PICTURES), ("text_vectors", TEXTS)):
        similar = torch.cosine_similarity(getattr(half, method)(given), getattr(model, method)(given))
        assert similar.min() > 0.98
        assert getattr(half, method)(given).dtype == torch.float32
    assert all(half.caption(PICTURES, max_new_tokens=5))


# --- what is not a model ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shared_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        MMGem.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_model_are_refused(saved: Path, tmp_path: Path):
    refuse(tmp_path / "nowhere", "nowhere: no such folder; give a run folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty: no model here")
    (saved / "config.json").unlink()
    refuse(saved, "model: no model here")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not a model's config"),
        ("[1]", "not a model's config"),
        ('{"schema": 1}', "not a model's config"),
        ('{"schema": 1, "model": 3}', "not a model's config"),
        ('{"schema": 1, "model": {"vision": {}, "llm": {}, "colour": "red"}}', "not a model's config .*colour"),
        ('{"schema": 2}', "schema 2, this version reads 1; upgrade mmgem"),
        ('{"model_type": "bert"}', "schema None, this version reads 1"),
    ],
)
def test_configs_that_are_no_models_are_refused(saved: Path, text: str, match: str):
    (saved / "config.json").write_text(text)
    refuse(saved, rf"config\.json: {match}")


def test_weights_that_do_not_fit_are_refused(saved: Path):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"no safetensors"):
        file.write_bytes(torn)
        refuse(saved, r"model\.safetensors: does not load")
    tree = json.loads((saved / "config.json").read_text())
    tree["model"]["embed_dim"] = 48
    file.write_bytes(whole)
    (saved / "config.json").write_text(json.dumps(tree))
    refuse(saved, r"model\.safetensors: does not load .*h1")
    tree["model"]["embed_dim"] = 32
    (saved / "config.json").write_text(json.dumps(tree))
    assert_same_answers(MMGem.from_pretrained(saved), shared_model())


def test_a_folder_without_its_tokenizer_is_refused(saved: Path):
    for file in saved.glob("tokenizer*"):
        file.unlink()
    refuse(saved, "tokenizer .*: cannot be loaded")


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", ["weights", "tokenizer", "config", "first rename", "second rename"])
def test_a_failure_while_saving_leaves_the_old_model_whole(saved: Path, breaks: str, monkeypatch: pytest.MonkeyPatch):
    before, newer = contents(saved), build(seed=7)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    rename, renames = os.rename, []

    def failing(source: Any, target: Any) -> None:
        renames.append(target)
        if len(renames) == {"first rename": 1, "second rename": 2}[breaks]:
            full()
        rename(source, target)

    match breaks:
        case "weights":
            monkeypatch.setattr(safetensors.torch, "save_model", full)
        case "tokenizer":
            monkeypatch.setattr(newer.codec.tokenizer, "save_pretrained", full)
        case "config":
            monkeypatch.setattr("mmgem.model.pretrained.portable_config", full)
        case _:
            monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="No space"):
        newer.save_pretrained(saved)
    monkeypatch.undo()
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]  # nothing half-made is left beside it
    newer.save_pretrained(saved)
    assert contents(saved) != before
    assert_same_answers(MMGem.from_pretrained(saved), newer)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_failure_of_the_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr("mmgem.model.pretrained.portable_config", full)
    with pytest.raises(OSError, match="full"):
        shared_model().save_pretrained(tmp_path / "a" / "model")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path):
    """`save_pretrained("runs/mine")` must not cost the run."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("run: mine")
    shared_model().save_pretrained(run / "model")
    before = contents(run)
    with pytest.raises(UserError, match="run: holds something other than a model; save to a new or empty folder"):
        shared_model().save_pretrained(run)
    with pytest.raises(UserError, match="config.yaml: holds something other"):
        shared_model().save_pretrained(run / "config.yaml")
    assert contents(run) == before
    shared_model().save_pretrained(run / "checkpoints")  # empty
    assert (run / "checkpoints" / "config.json").is_file()


def test_a_folder_left_aside_by_a_crash_is_cleared(saved: Path):
    aside = saved.with_name(".model-old")
    aside.mkdir()
    (aside / "junk").write_text("x")
    new = saved.with_name("new")
    new.mkdir()
    (new / "file").write_text("y")
    replace_folder(new, saved)
    assert contents(saved) == {"file": b"y"}
    assert not aside.exists() and not new.exists()


def test_a_checkpoint_of_hugging_face_and_a_model_with_a_report_are_not_replaced(tmp_path: Path):
    theirs = tmp_path / "tinyllama"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    (theirs / "model.safetensors").write_bytes(b"theirs")
    ours = tmp_path / "ours"
    shared_model().save_pretrained(ours)
    (ours / "report").mkdir()
    for folder in (theirs, ours):
        before = contents(folder)
        with pytest.raises(UserError, match="something other than a model"):
            shared_model().save_pretrained(folder)
        assert contents(folder) == before


def test_a_config_that_is_no_text_is_refused(saved: Path):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="config.json: not a model's config"):
        MMGem.from_pretrained(saved)
