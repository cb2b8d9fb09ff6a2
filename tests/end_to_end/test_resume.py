"""Stop a run anywhere, go on, and get what an unbroken run gives, to the last digit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from tiny import CONFIG, STEPS, Process, Tiny, figures, read_lines, same_bits, weights

from mmgem.cli import main

# All that draws random numbers, or keeps a state of its own, is on.
RANDOM = (
    "stages.0.ema=0.9",
    "stages.1.ema=0.7",
    "model.visual_dropout=0.1",
    "model.head_dropout=0.1",
    "model.vision.standardise=true",
    "model.token_dropout=0.2",
    "data.flip=0.5",
    "data.crop_scale=[0.5,1.0]",
    "data.color_jitter=0.2",
    "model.max_tokens=12",
)
KEEP = "training.keep_checkpoints=100"
MODELS = ("stages/global", "stages/fine-grained", "model")


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert tiny.train(folder, *RANDOM, KEEP) == 0
    return folder


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    """The unbroken run's folder, to be spoiled."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def interrupt(run: Path, after_step: int) -> None:
    """Makes a copy of the unbroken run look as if it had been killed some steps after its checkpoint of this step."""
    for checkpoint in (run / "checkpoints").glob("step-*.ckpt"):
        if int(checkpoint.stem.removeprefix("step-")) > after_step:
            checkpoint.unlink()
    shutil.rmtree(run / "model")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "finished"}))


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*.ckpt"))


def assert_same_run(run: Path, unbroken: Path) -> None:
    assert figures(run) == figures(unbroken)
    assert read_lines(run / "samples.jsonl") == read_lines(unbroken / "samples.jsonl")
    for model in MODELS:
        assert same_bits(weights(run / model), weights(unbroken / model)), model


def test_the_unbroken_run_is_what_it_says(unbroken: Path) -> None:
    assert len(figures(unbroken)) == 2 * STEPS
    assert steps_of(unbroken) == [10, 20, 25, 35, 45, 50]


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, 8), (signal.SIGINT, 33)], ids=["SIGTERM in stage 1", "Ctrl-C in stage 2"]
)
def test_asked_to_stop(tiny: Tiny, unbroken: Path, tmp_path: Path, number: signal.Signals, after: int) -> None:
    run = tmp_path / "run"
    process = Process(*tiny.arguments(run, *RANDOM))
    process.wait_for_lines(run / "log.jsonl", after)
    process.signal(number)
    done = process.wait()
    assert done.code == 128 + number, done.err
    steps = len(read_lines(run / "log.jsonl"))
    assert after <= steps < 2 * STEPS, "it stopped after the step, not at the end"
    assert steps_of(run)[-1] == steps, "and saved there"
    assert "Traceback" not in done.err and number.name in done.err
    last = done.err.strip().splitlines()[-1]
    assert last == f"stopped; to go on: mmgem train --config {run}/config.yaml --resume auto"
    assert main(last.split("mmgem ")[1].split()) == 0
    assert_same_run(run, unbroken)


@pytest.mark.parametrize(("after", "saved"), [(12, 10), (38, 35)], ids=["stage 1", "stage 2"])
def test_killed(tiny: Tiny, unbroken: Path, tmp_path: Path, after: int, saved: int) -> None:
    """The steps after the last checkpoint are done again, and their lines of the log replaced."""
    run = tmp_path / "run"
    process = Process(*tiny.arguments(run, *RANDOM))
    process.wait_for_lines(run / "log.jsonl", after)
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert steps_of(run)[-1] >= saved and not (run / "model").exists()
    assert tiny.train(run, *RANDOM, resume="auto") == 0
    assert_same_run(run, unbroken)


def test_ctrl_c_reaches_the_workers_too(tiny: Tiny, unbroken: Path, tmp_path: Path) -> None:
    """A terminal sends it to all processes of the run; the workers must not die before the last step is done."""
    run = tmp_path / "run"
    process = Process(*tiny.arguments(run, *RANDOM, "data.workers=2"))
    process.wait_for_lines(run / "log.jsonl", 5)
    process.signal(signal.SIGINT, group=True)
    done = process.wait()
    assert done.code == 130 and "Traceback" not in done.err, done.err
    assert tiny.train(run, *RANDOM, "data.workers=0", resume="auto") == 0
    assert_same_run(run, unbroken)


def test_another_share_of_broken_samples_is_no_other_run(tiny: Tiny, copy: Path, unbroken: Path) -> None:
    """The share decides only when a run gives up, so a run that gave up can go on."""
    interrupt(copy, 20)
    assert tiny.train(copy, *RANDOM, KEEP, "data.max_broken=0.5", resume="auto") == 0
    assert_same_run(copy, unbroken)


def test_second_ctrl_c_stops_at_once(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = Process(*tiny.arguments(run, "stages.0.global_batch=96", "stages.0.samples=96000"))
    process.wait_for_lines(run / "log.jsonl", 2)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGINT)
    done = process.wait()
    # Both may arrive before Python looks: then it is one.
    assert done.code == 130 and "Traceback" not in done.err and "--resume auto" in done.err


def test_nothing_is_lost_by_a_kill_before_the_first_checkpoint(tiny: Tiny, copy: Path, unbroken: Path) -> None:
    """Leftovers of it (lines of the log, a tokenizer of other settings) do not leak into the next run."""
    interrupt(copy, 0)
    shutil.rmtree(copy / "stages")
    vocabulary = (copy / "tokenizer/tokenizer.json").read_text()
    other = ("stages.0.samples=96", "stages.1.samples=32", "model.tokenizer.vocab_size=300")
    for resume in ("auto", "never"):
        assert tiny.train(copy, *other, resume=resume) == 0
        assert [line["step"] for line in figures(copy)] == list(range(1, 9))
        assert (copy / "tokenizer/tokenizer.json").read_text() != vocabulary
        interrupt(copy, 0)
    assert tiny.train(copy, *RANDOM, KEEP, resume="auto") == 0
    assert (copy / "tokenizer/tokenizer.json").read_text() == vocabulary
    assert_same_run(copy, unbroken)


def test_killed_while_saving(tiny: Tiny, copy: Path, unbroken: Path) -> None:
    """The older checkpoint stands; the half one is not taken for whole, and goes away."""
    interrupt(copy, 35)
    half = copy / "checkpoints/step-00000045.unfinished"
    half.write_bytes((copy / "checkpoints/step-00000035.ckpt").read_bytes()[:1000])
    (copy / "log.jsonl").write_text((copy / "log.jsonl").read_text()[:-30])  # and the last line was cut short
    assert tiny.train(copy, *RANDOM, KEEP, resume="auto") == 0
    assert not half.exists()
    assert_same_run(copy, unbroken)


@pytest.mark.parametrize("step", [10, 25, 35])
def test_go_on_from_a_named_checkpoint(tiny: Tiny, copy: Path, unbroken: Path, step: int) -> None:
    """What came after it is done again, although later checkpoints lie there, and only the newest is kept."""
    checkpoint = copy / f"checkpoints/step-{step:08d}.ckpt"
    assert tiny.train(copy, *RANDOM, resume=str(checkpoint)) == 0
    assert steps_of(copy) == [50]
    assert_same_run(copy, unbroken)


def test_from_a_named_checkpoint_into_another_folder(tiny: Tiny, unbroken: Path, tmp_path: Path) -> None:
    checkpoint = unbroken / "checkpoints/step-00000035.ckpt"
    assert tiny.train(tmp_path / "branch", *RANDOM, resume=str(checkpoint)) == 0
    assert figures(tmp_path / "branch") == figures(unbroken)[35:]
    assert same_bits(weights(tmp_path / "branch/model"), weights(unbroken / "model"))
    assert not (tmp_path / "branch/stages/global").exists(), "its weights are not known here"


def test_a_named_checkpoint_goes_on_with_its_own_settings_and_data(
    tiny: Tiny, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(unbroken / "checkpoints/step-00000035.ckpt")
    other = ("stages.1.global_batch=8", "stages.1.global_batch=16, now it is 8"), ("seed=1", "seed=0, now it is 1")
    for setting, message in other:
        said = refused(capsys, tiny.train(tmp_path / "branch", *RANDOM, setting, resume=checkpoint))
        assert said.startswith(f"mmgem: error: {checkpoint}: ") and message in said and "init_from" in said
    less = ("--train", "48", "--val", "4", "--test", "4", "--size", "64", "--processes", "1")
    assert main(["data", "prepare", "scenes", "--out", str(tmp_path / "data"), *less]) == 0
    said = refused(capsys, Tiny(tmp_path / "data").train(tmp_path / "branch", *RANDOM, resume=checkpoint))
    assert f"{tmp_path}/data/train holds other data" in said
    assert not (tmp_path / "branch").exists()


def test_the_llms_own_settings_are_not_asked_for_again(tiny: Tiny, unbroken: Path, tmp_path: Path) -> None:
    """Named by its folder alone; the base of its positions and its norms' epsilon are in no weight."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    llm = tmp_path / "llm"
    AutoTokenizer.from_pretrained(unbroken / "tokenizer").save_pretrained(llm)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    own = AutoConfig.for_model("llama", **sizes, vocab_size=403, rope_theta=77.0, rms_norm_eps=0.5)
    AutoModelForCausalLM.from_config(own).save_pretrained(llm)
    config = tmp_path / "named.yaml"
    tree = yaml.safe_load(CONFIG.read_text())
    tree["model"]["llm"] = {"name": str(llm)}
    config.write_text(yaml.safe_dump(tree))

    def train(run: Path, *overrides: str, resume: str = "never") -> int:
        settings = [f"run={run}", f"data.path={tiny.data}", "stages.0.samples=160", "stages.1=null", *overrides]
        return main(["train", "--config", str(config), "--resume", resume, *settings])

    assert train(tmp_path / "run", KEEP, "training.checkpoint_every=5") == 0
    shutil.rmtree(tmp_path / "run/model")
    (tmp_path / "run/checkpoints/step-00000010.ckpt").unlink()
    whole = figures(tmp_path / "run"), weights(tmp_path / "run/stages/global")
    shutil.rmtree(tmp_path / "run/stages")
    assert train(tmp_path / "run", KEEP, "training.checkpoint_every=5", resume="auto") == 0
    assert figures(tmp_path / "run") == whole[0]
    assert same_bits(weights(tmp_path / "run/model"), whole[1])
    saved = json.loads((tmp_path / "run/model/config.json").read_text())["model"]["llm"]
    assert saved["origin"] == str(llm) and saved["config"]["rms_norm_eps"] == 0.5
    assert saved["config"]["rope_parameters"]["rope_theta"] == 77.0
    # A later run from this model, which says next to nothing of the LLM, has them too.
    tree["model"]["llm"] = {"config": {"model_type": "llama"}}
    config.write_text(yaml.safe_dump(tree))
    assert train(tmp_path / "more", f"init_from={tmp_path / 'run'}") == 0
    again = json.loads((tmp_path / "more/model/config.json").read_text())["model"]["llm"]["config"]
    assert again["rms_norm_eps"] == 0.5 and again["rope_parameters"] == saved["config"]["rope_parameters"]


def test_a_report_beside_a_stages_model_is_no_obstacle(tiny: Tiny, copy: Path, unbroken: Path) -> None:
    interrupt(copy, 25)  # the end of the first stage
    shutil.rmtree(copy / "stages/fine-grained")
    (copy / "stages/global/report").mkdir()
    assert tiny.train(copy, *RANDOM, KEEP, resume="auto") == 0
    assert_same_run(copy, unbroken)


def test_finished_run_stays_as_it_is(tiny: Tiny, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    assert tiny.train(copy, *RANDOM, KEEP, resume="auto") == 0
    assert f"{copy}: this run is finished; its model: {copy}/model" in capsys.readouterr().err
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    own = {copy / "config.yaml"}
    assert {p for p in before if before[p] != after.get(p)} <= own and after.keys() == before.keys()


def test_killed_between_the_last_checkpoint_and_the_model(tiny: Tiny, copy: Path, unbroken: Path) -> None:
    interrupt(copy, 50)
    shutil.rmtree(copy / "stages/fine-grained")
    assert tiny.train(copy, *RANDOM, KEEP, resume="auto") == 0
    assert_same_run(copy, unbroken)


# --- what is refused --------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The error's one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("mmgem: error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("stages.1.lr=0.5", "stages.1.lr=0.001, now it is 0.5"),
        ("model.embed_dim=48", "model.embed_dim=32, now it is 48"),
        ("seed=1", "seed=0, now it is 1"),
        ("data.flip=0.1", "data.flip=0.5, now it is 0.1"),
        ('training.precision="bf16"', "training.precision=32, now it is bf16"),
    ],
)
def test_other_settings_are_refused(
    tiny: Tiny, copy: Path, capsys: pytest.CaptureFixture[str], setting: str, key: str
) -> None:
    interrupt(copy, 35)
    config = (copy / "config.yaml").read_text()
    message = refused(capsys, tiny.train(copy, *RANDOM, KEEP, setting, resume="auto"))
    assert key in message and str(copy) in message and "run=OTHER" in message
    assert (copy / "config.yaml").read_text() == config


def test_other_data_are_refused(tiny: Tiny, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(copy, 35)
    other = tmp_path / "other"
    counts = ["--train", "96", "--val", "4", "--test", "4", "--size", "64", "--seed", "1", "--processes", "1"]
    assert main(["data", "prepare", "scenes", "--out", str(other), *counts]) == 0
    message = refused(capsys, Tiny(other).train(copy, *RANDOM, KEEP, resume="auto"))
    assert f"{other}/train" in message and "other data" in message
    moved = Path(shutil.copytree(tiny.data, tmp_path / "moved"))
    assert Tiny(moved).train(copy, *RANDOM, KEEP, resume="auto") == 0, "the same data elsewhere are fine"


def test_a_folder_with_a_run_is_refused(tiny: Tiny, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = (copy / "log.jsonl").read_text()
    for resume in (None, "never"):
        message = refused(capsys, tiny.train(copy, *RANDOM, KEEP, resume=resume))
        assert f"{copy} already holds a run" in message and "--resume auto" in message and "run=OTHER" in message
    assert (copy / "log.jsonl").read_text() == log


def test_a_checkpoint_that_is_none(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, text, weights_only = (tmp_path / name for name in ("missing.ckpt", "text.ckpt", "weights.ckpt"))
    text.write_text("no checkpoint")
    torch.save({"state_dict": {}}, weights_only)
    for file, what in ((missing, "no such checkpoint"), (text, "not a checkpoint"), (weights_only, "not a checkpoint")):
        message = refused(capsys, tiny.train(tmp_path / "run", resume=str(file)))
        assert str(file) in message and what in message
    assert not (tmp_path / "run/model").exists()


def test_a_checkpoint_of_another_model(
    tiny: Tiny, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its settings would do: an LLM or a tower that is named may have become another."""
    checkpoint = unbroken / "checkpoints/step-00000010.ckpt"
    changed = tmp_path / "changed.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["settings"]["model"]["embed_dim"] = 48
    torch.save(content, changed)
    message = refused(capsys, tiny.train(tmp_path / "run", *RANDOM, "model.embed_dim=48", resume=str(changed)))
    assert str(changed) in message and "does not fit" in message
