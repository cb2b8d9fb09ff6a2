"""Training from end to end: what a run leaves behind, and that its settings do what they say."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import CONFIG, STEPS, Finished, Tiny, figures, read_lines, same_bits, weights

from mmgem import MMGem, __version__
from mmgem.config import load_config, to_tree
from mmgem.data.shards import ShardedDataset
from mmgem.training.optim import schedule
from mmgem.training.saved import read_checkpoint

KEYS = ["step", "stage", "samples", "loss", "loss_emb", "loss_gen", "lr", "logit_scale", "samples_per_s"]
ONE_STAGE = "stages=[{name: only, samples: 96, global_batch: 16, lr: 2e-3%s}]"
SIX = ONE_STAGE % ""


def stage(settings: str) -> str:
    """One stage of six steps."""
    return ONE_STAGE % f", {settings}"


# --- the run folder -----------------------------------------------------------------------------


def test_run_folder_has_what_the_design_says(finished: tuple[Path, Finished], tiny: Tiny) -> None:
    folder, done = finished
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "log.jsonl", "samples.jsonl", "broken.jsonl"),
        *("checkpoints", "stages", "model", "tokenizer"),
    }
    last = f"step-{2 * STEPS:08d}.ckpt"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {last, "last.ckpt", "losses.json"}
    assert (folder / "checkpoints/last.ckpt").resolve().name == last
    assert {p.name for p in (folder / "stages").iterdir()} == {"global", "fine-grained"}
    for model in (folder / "model", folder / "stages/global", folder / "stages/fine-grained"):
        assert {p.name for p in model.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    facts = json.loads((folder / "run.json").read_text())
    assert facts["seed"] == 0 and facts["finished"] is True
    assert facts["versions"]["mmgem"] == __version__ and facts["versions"]["torch"] == torch.__version__
    assert facts["data"] == {"train": ShardedDataset(tiny.data / "train").checksum}
    parameters = sum(p.numel() for p in MMGem.from_pretrained(folder).parameters())
    assert facts["parameters"]["all"] == parameters
    assert "Traceback" not in done.err and f"finished: {folder}/model" in done.err


def test_resolved_config_loads_again(finished: tuple[Path, Finished], tiny: Tiny) -> None:
    folder, _ = finished
    saved = load_config(folder / "config.yaml")
    asked = load_config(CONFIG, [f"run={folder}", f"data.path={tiny.data}"])
    assert to_tree(saved) == to_tree(asked)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    assert tree["stages"][1]["betas"] == [0.9, 0.98], "defaults are resolved into the file"


def test_log_has_one_line_a_step(finished: tuple[Path, Finished]) -> None:
    lines = read_lines(finished[0] / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 2 * STEPS + 1))
    assert [line["stage"] for line in lines] == ["global"] * STEPS + ["fine-grained"] * STEPS
    assert [line["samples"] for line in lines] == [16 * (n + 1) for n in range(STEPS)] * 2
    for line in lines:
        assert [k for k in line if k in KEYS] == KEYS
        assert all(math.isfinite(line[k]) for k in KEYS if k != "stage")
        assert 1 <= line["logit_scale"] <= 100.001 and line["samples_per_s"] > 0
    stages = load_config(CONFIG).stages
    for number, settings in enumerate(stages):
        factor = schedule(settings, STEPS)
        expected = [settings.lr * factor(step) for step in range(STEPS)]
        assert [line["lr"] for line in lines[number * STEPS : (number + 1) * STEPS]] == pytest.approx(expected)
    assert all("loss_region_emb" in line and line["regions"] > 0 for line in lines[STEPS:])
    assert all("loss_region_emb" not in line and line["regions"] == 0 for line in lines[:STEPS])


def test_total_is_the_sum_of_the_losses(finished: tuple[Path, Finished]) -> None:
    for line in read_lines(finished[0] / "log.jsonl"):
        parts = [v for k, v in line.items() if k.startswith("loss_")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-6)


def test_losses_fall(finished: tuple[Path, Finished]) -> None:
    lines = read_lines(finished[0] / "log.jsonl")
    for name, first, last in (("emb", 0, STEPS), ("gen", 0, STEPS), ("region_gen", STEPS, 2 * STEPS)):
        curve = [line[f"loss_{name}"] for line in lines[first:last]]
        assert mean(curve[-5:]) < 0.93 * mean(curve[:5]), (name, curve)
    assert lines[-1]["loss_gen"] < 0.8 * lines[0]["loss_gen"]


def test_samples_of_captions(finished: tuple[Path, Finished], tiny: Tiny) -> None:
    rows = read_lines(finished[0] / "samples.jsonl")
    assert sorted({row["step"] for row in rows}) == [20, 25, 45, 50]
    val = ShardedDataset(tiny.data / "val")
    for row in rows:
        assert row["caption"].strip()
        assert row["reference"] in val.sample(val.keys.index(row["key"])).captions


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_run_folder_and_its_parts_load(finished: tuple[Path, Finished]) -> None:
    folder, _ = finished
    last, first = weights(folder / "stages/fine-grained"), weights(folder / "stages/global")
    assert same_bits(weights(folder / "model"), last)
    assert not same_bits(first, last)
    loaded = MMGem.from_pretrained(folder)
    assert torch.equal(loaded.state_dict()["h1.weight"], last["h1.weight"])
    vectors = loaded.embed_texts(["a red ball", "two cubes"])
    assert vectors.shape == (2, 32) and torch.allclose(vectors.norm(dim=-1), torch.ones(2))


# --- settings that must take effect ---------------------------------------------------------------


@pytest.mark.parametrize("parts", ["[vision, llm]", "[llm, projections]"])
def test_frozen_parts_keep_every_bit(tiny: Tiny, model: Path, tmp_path: Path, parts: str) -> None:
    """Also their moving statistics, and also after captions were written in between."""
    overrides = [f"init_from={model}", stage(f"freeze: {parts}"), "training.sample_every=2"]
    assert tiny.train(tmp_path / "run", *overrides) == 0
    before, after = weights(model / "model"), weights(tmp_path / "run/model")
    prefixes = {"vision": "vision.", "llm": "language.hf.", "projections": "h"}
    for part, prefix in prefixes.items():
        assert same_bits(before, after, prefix) == (part in parts), part


def test_trunk_before_train_from_keeps_every_bit(tiny: Tiny, tmp_path: Path) -> None:
    vision = "model.vision={name: mobilenetv2_035, image_size: 64, train_from: blocks.5}"
    assert tiny.train(tmp_path / "run", vision, SIX.replace("96", "32"), "training.checkpoint_every=1") == 0
    assert tiny.train(tmp_path / "more", vision, SIX, f"init_from={tmp_path / 'run'}", "training.sample_every=2") == 0
    before, after = weights(tmp_path / "run/model"), weights(tmp_path / "more/model")
    for name in ("conv_stem", "bn1", "blocks.0", "blocks.4"):
        assert same_bits(before, after, f"vision.model.{name}."), name
    assert not same_bits(before, after, "vision.model.blocks.5.")
    assert not same_bits(before, after, "vision.model.blocks.6.")


def test_learning_rate_by_part(tiny: Tiny, model: Path, tmp_path: Path) -> None:
    """A part with factor 0 stays; the change of the others grows with their factor."""

    def change(name: str, factors: str) -> dict[str, float]:
        settings = stage(f"warmup: 0, lr_scale: {factors}").replace("96", "16")
        assert tiny.train(tmp_path / name, f"init_from={model}", settings, "training.sample_every=0") == 0
        before, after = weights(model / "model"), weights(tmp_path / name / "model")
        # Adam's first step moves each weight by about the learning rate.
        named = {
            "vision": "vision.model.layer1.0.conv1.weight",
            "llm": "language.hf.model.norm.weight",
            "h1": "h1.bias",
        }
        return {part: (after[n] - before[n]).abs().max().item() for part, n in named.items()}

    plain, scaled = change("plain", "{}"), change("scaled", "{vision: 0.0, llm: 0.5}")
    assert plain["vision"] > 0 and scaled["vision"] == 0
    assert scaled["llm"] == pytest.approx(0.5 * plain["llm"], rel=0.02)
    assert scaled["h1"] == pytest.approx(plain["h1"], rel=0.02)


def test_logit_scale_is_clamped(tiny: Tiny, model: Path, tmp_path: Path) -> None:
    hot = MMGem.from_pretrained(model)
    hot.logit_scale.data.fill_(6.0)
    hot.save_pretrained(tmp_path / "hot")
    every = ("training.checkpoint_every=1", "training.keep_checkpoints=100")
    assert tiny.train(tmp_path / "run", f"init_from={tmp_path / 'hot'}", SIX, *every) == 0
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step-*.ckpt"))
    assert len(checkpoints) == 6
    for checkpoint in checkpoints:
        assert read_checkpoint(checkpoint).weights()["logit_scale"].item() <= math.log(100) + 1e-6, checkpoint.name
    scales = [line["logit_scale"] for line in figures(tmp_path / "run")]
    assert scales[0] == pytest.approx(math.exp(6)) and max(scales[1:]) <= 100.001
    assert weights(tmp_path / "run/model")["logit_scale"].item() <= math.log(100) + 1e-6


def test_the_moving_average_is_what_a_stage_ends_with(tiny: Tiny, tmp_path: Path) -> None:
    """Against the same run without one, whose weights after each step are averaged here. Training does not notice."""
    every = ("training.checkpoint_every=1", "training.keep_checkpoints=6")
    assert tiny.train(tmp_path / "plain", SIX, *every) == 0
    assert tiny.train(tmp_path / "ema", stage("ema: 0.8"), *every) == 0
    assert figures(tmp_path / "ema") == figures(tmp_path / "plain")
    states = [read_checkpoint(c).weights() for c in sorted((tmp_path / "plain/checkpoints").glob("step-*.ckpt"))]
    assert len(states) == 6
    found = MMGem.from_pretrained(tmp_path / "ema")
    for name, parameter in found.named_parameters():
        mean = states[0][name]
        for state in states[1:]:
            mean = 0.8 * mean + 0.2 * state[name]
        if name == "logit_scale":
            mean = states[-1][name]  # no weight: it ends where it is
        torch.testing.assert_close(parameter, mean, rtol=1e-4, atol=1e-6)
    assert not same_bits(weights(tmp_path / "ema/model"), weights(tmp_path / "plain/model"))
    buffers = dict(MMGem.from_pretrained(tmp_path / "plain").named_buffers())
    assert all(torch.equal(b, buffers[name]) for name, b in found.named_buffers()), "those follow the model"


def test_a_loss_that_is_off_is_not_computed(tiny: Tiny, tmp_path: Path) -> None:
    for name, off in (("gen", "emb"), ("emb", "gen")):
        settings = stage(f"loss: {{{off}: 0}}").replace("96", "32")
        assert tiny.train(tmp_path / name, settings) == 0
        for line in figures(tmp_path / name):
            assert line["loss"] == line[f"loss_{name}"] and line.get(f"loss_{off}") is None


def test_tensorboard_by_config(tiny: Tiny, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert tiny.train(tmp_path / "run", SIX, "training.tensorboard=true") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    loss = events.Scalars("loss")
    lines = figures(tmp_path / "run")
    assert [e.step for e in loss] == [line["step"] for line in lines]
    assert [e.value for e in loss] == pytest.approx([line["loss"] for line in lines])
    assert {"loss_emb", "loss_gen", "lr", "logit_scale"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("vision", ["", "model.vision={name: mobilenetv2_035, image_size: 64, train_from: blocks.5}"])
def test_bf16(tiny: Tiny, tmp_path: Path, vision: str) -> None:
    settings = [stage("max_regions: 3"), *([vision] if vision else []), "training.sample_every=3"]
    for precision in ("32", "bf16"):
        assert tiny.train(tmp_path / precision, *settings, f'training.precision="{precision}"') == 0
    exact, rounded = figures(tmp_path / "32"), figures(tmp_path / "bf16")
    assert all(math.isfinite(line["loss"]) for line in rounded)
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert rounded[0]["loss"] != exact[0]["loss"]
    assert rounded[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.1)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "bf16/model").values() if t.is_floating_point())


def test_workers_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    settings = [stage("max_regions: 3"), "data.flip=0.5", "data.crop_scale=[0.6,1.0]"]
    for workers in (0, 2):
        assert tiny.train(tmp_path / f"{workers}", *settings, f"data.workers={workers}") == 0
    assert figures(tmp_path / "0") == figures(tmp_path / "2")


def test_patch_dropout_and_checkpointing_of_a_vit(tiny: Tiny, tmp_path: Path) -> None:
    """Recomputing the activations changes nothing; leaving patches out does, and then stage 2 still sees all."""
    vit = "name: vit_tiny_patch16_224, config: {img_size: 64, embed_dim: 32, depth: 2, num_heads: 2}, image_size: 64"
    two = "stages=[{name: a, samples: 48, global_batch: 16, patch_dropout: %s},"
    two += "{name: b, samples: 32, global_batch: 16, max_regions: 2}]"

    def losses(name: str, extra: str, share: str, *more: str) -> list[float]:
        vision = f"model.vision={{{vit}, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]{extra}}}"
        assert tiny.train(tmp_path / name, vision, two % share, *more) == 0
        return [line["loss"] for line in figures(tmp_path / name)]

    plain = losses("plain", "", "0")
    recomputed = losses("again", ", gradient_checkpointing: true", "0", "model.llm.gradient_checkpointing=true")
    assert recomputed == pytest.approx(plain, rel=1e-5)
    dropped = losses("dropped", "", "0.5")
    assert len(dropped) == 5 and all(math.isfinite(x) for x in dropped) and dropped[0] != plain[0]


def test_nothing_reaches_for_the_network(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            calls.append(address)
            raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert tiny.train(tmp_path / "run", SIX) == 0
    assert MMGem.from_pretrained(tmp_path / "run").embed_texts(["a ball"]).shape == (1, 32)
    assert calls == []
