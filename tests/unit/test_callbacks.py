"""Counting broken samples, stopping, and what the run's folder keeps and forgets."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import build

from mmgem.config import Config, LlmConfig, ModelConfig, StageConfig, VisionConfig, load_config
from mmgem.data.batch import Broken
from mmgem.errors import UserError
from mmgem.ranks import Ranks
from mmgem.training.callbacks import BrokenSamples
from mmgem.training.checkpoint import RunFolder, append_line
from mmgem.training.module import StageModule
from mmgem.training.saved import RunState, read_checkpoint, run_state_tree
from mmgem.training.signals import SIGNALS, Stopped, stop_if_asked, stopping_at_once

# --- broken samples --------------------------------------------------------------------------------


def counter_of(folder: RunFolder, max_broken: float) -> BrokenSamples:
    folder.path.mkdir(exist_ok=True)
    return BrokenSamples(folder, max_broken, "one", 100, Ranks())


def module(global_batch: int) -> Any:
    model = build()
    return StageModule(model, StageConfig(samples=global_batch, global_batch=global_batch), 0, 1, 0)


def feed(counter: BrokenSamples, global_batch: int, step: int, *broken: Broken) -> None:
    batch: Any = SimpleNamespace(broken=list(broken))
    nothing: Any = None
    counter.on_train_batch_end(nothing, module(global_batch), None, batch, step)


def test_each_broken_sample_is_named_once_and_counted_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    counter = counter_of(folder, 0.5)
    a, b = Broken("a", "broken image", "why"), Broken("b", "broken image")
    feed(counter, 16, 0, a, b)
    assert counter.in_step == 2
    feed(counter, 16, 1, a)
    assert counter.in_step == 1
    feed(counter, 16, 2)
    assert counter.in_step == 0 and counter.broken == 3
    nothing: Any = None
    counter.teardown(nothing, nothing, "fit")
    assert capsys.readouterr().err.splitlines() == [
        "skipped sample a: broken image",
        "skipped sample b: broken image",
        f"3 broken samples were replaced; named in {folder.broken}",
    ]
    named = {"step": 101, "stage": "one", "reason": "broken image", "shard": None, "dropped": False}
    assert folder.lines(folder.broken) == [{**named, "key": "a", "detail": "why"}, {**named, "key": "b", "detail": ""}]


def test_a_shard_is_named_once_for_all_its_samples_and_a_dropped_part_is_no_broken_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    counter = counter_of(folder, 0.5)
    of_shard = [Broken(key, "shard cut short", shard="x.tar") for key in "abc"]
    feed(counter, 16, 0, *of_shard, Broken("d", "box without area", dropped=True))
    assert counter.broken == 3
    assert capsys.readouterr().err.splitlines() == [
        "skipped shard x.tar: shard cut short",
        "left out of sample d: box without area",
    ]
    assert [(line["key"], line["shard"]) for line in folder.lines(folder.broken)] == [("", "x.tar"), ("d", None)]


def test_a_resumed_run_goes_on_counting_and_names_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    a = Broken("a", "broken image")
    feed(counter_of(folder, 0.5), 16, 0, a)
    folder.log.write_text('{"stage": "one", "broken": 1}\n{"stage": "two", "broken": 7}\n')
    again = counter_of(folder, 0.5)
    assert again.broken == 1, "what the log says of this stage"
    feed(again, 16, 1, a)
    assert again.broken == 2 and len(folder.lines(folder.broken)) == 1
    assert capsys.readouterr().err.count("skipped") == 1


def test_a_few_are_bad_luck(tmp_path: Path) -> None:
    counter = counter_of(RunFolder(tmp_path / "run"), 0.01)
    feed(counter, 8, 0, *(Broken(f"k{i}", "broken image") for i in range(9)))
    assert counter.broken == 9, "far more than one in a hundred, but fewer than ten"
    with pytest.raises(UserError, match=r"10 of 26 samples are broken, more than data.max_broken=0.01; .*broken.jsonl"):
        feed(counter, 8, 1, Broken("k9", "broken image"))


def test_the_share_is_what_counts(tmp_path: Path) -> None:
    """Of all that were read: those of the steps and those that they replaced."""
    counter = counter_of(RunFolder(tmp_path / "run"), 0.25)
    feed(counter, 30, 0, *(Broken(f"k{i}", "broken image") for i in range(10)))
    with pytest.raises(UserError, match="11 of 41"):
        feed(counter, 30, 0, Broken("one more", "broken image"))


# --- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stopping_at_once():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert stopped.value.number == number
    assert signal.getsignal(number) == before


def test_a_signal_that_python_would_lose_stops_later(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_value))

    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with stopping_at_once():
        Deaf()
        gc.collect()
        with pytest.raises(Stopped) as stopped:
            stop_if_asked()
    assert stopped.value.number == signal.SIGTERM and not any(isinstance(e, Stopped) for e in lost)
    with stopping_at_once():
        stop_if_asked()  # and is forgotten by the next run


# --- the run's folder ----------------------------------------------------------------------------------


def write(path: Path) -> dict[str, Any]:
    path.write_text("weights")
    return {}


def save(folder: RunFolder, step: int, keep: int = 9, best: bool = False, loss: float | None = None) -> Path:
    place = folder.save_checkpoint(write, step, Ranks())
    folder.keep_checkpoints(keep, best, loss)
    return place


def config(**settings: Any) -> Config:
    model = ModelConfig(vision=VisionConfig(name="resnet10t"), llm=LlmConfig(config={"model_type": "llama"}))
    return Config(model=model, stages=[StageConfig(samples=10)], **settings)


def names(folder: RunFolder) -> list[str]:
    """Of what lies beside the checkpoints, too, but for the links and the losses."""
    return sorted(p.name for p in folder.checkpoints.iterdir() if not p.is_symlink() and p.name != "losses.json")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.begin(config(), "never", "sum") is None
    for step in (5, 10, 100):
        place = save(folder, step, keep=2)
        assert (folder.checkpoints / "last.ckpt").resolve() == place
        assert folder.newest() == place and place.read_text() == "weights"
    assert names(folder) == ["step-00000010.ckpt", "step-00000100.ckpt"]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(), "never", "sum")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save(folder, step, keep=1, best=True, loss=loss)
    assert names(folder) == ["step-00000002.ckpt", "step-00000004.ckpt"]
    best, last = folder.checkpoints / "best.ckpt", folder.checkpoints / "last.ckpt"
    assert (best.resolve().name, last.resolve().name) == ("step-00000002.ckpt", "step-00000004.ckpt")
    save(RunFolder(folder.path), 5, keep=1, best=True, loss=0.5)  # a resumed run knows the losses of before
    assert names(folder) == ["step-00000005.ckpt"] and best.resolve() == last.resolve()


def test_a_checkpoint_in_parts_is_completed_and_replaced(tmp_path: Path) -> None:
    def write_parts(path: Path) -> dict[str, Any]:
        (path / "checkpoint").mkdir(parents=True)
        (path / "checkpoint" / "part").write_text("of a rank")
        return {"run_state": {}}

    folder = RunFolder(tmp_path / "run")
    folder.begin(config(), "never", "sum")
    for _ in range(2):  # of the same step again, as after a kill before its line in the log
        place = folder.save_checkpoint(write_parts, 5, Ranks())
    assert (place / "state.pt").is_file() and (place / "checkpoint" / "part").read_text() == "of a rank"
    save(folder, 6, keep=1)
    assert names(folder) == ["step-00000006.ckpt"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("PytorchStreamWriter failed")])
def test_a_save_that_fails_leaves_the_older_one(tmp_path: Path, error: Exception) -> None:
    def fail(path: Path) -> dict[str, Any]:
        path.write_text("wei")
        raise error

    folder = RunFolder(tmp_path / "run")
    folder.begin(config(), "never", "sum")
    first = save(folder, 5)
    with pytest.raises(UserError, match=f"00010.ckpt: cannot be saved .{error}.*00005.ckpt stands; make room"):
        folder.save_checkpoint(fail, 10, Ranks())
    assert folder.newest() == first and first.read_text() == "weights"
    assert names(folder) == [first.name], "what was half written takes no room"


def test_forgetting_what_will_be_done_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(), "never", "sum")
    for step in (2, 4):
        save(folder, step)
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    folder.log.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    folder.samples.write_text("\n".join([lines[1], lines[1], lines[3]]))
    (folder.checkpoints / "notes.txt").write_text("mine")
    (folder.checkpoints / "step-00000003.unfinished").mkdir()
    folder.forget_after(2)
    assert folder.log.read_text() == f"{lines[0]}\n{lines[1]}\n"
    assert folder.samples.read_text() == f"{lines[1]}\n{lines[1]}\n"
    assert names(folder) == ["notes.txt", "step-00000002.ckpt"]
    folder.forget_after(0)
    assert folder.log.read_text() == "" and names(folder) == ["notes.txt"]


def test_lines_are_cut_at_their_ends_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(), "never", "sum")
    lines = [{"step": step, "key": "one\u2028key\u0085with\x0bodd\x1cseparators"} for step in (1, 2)]
    for line in lines:
        append_line(folder.broken, line)
    assert folder.lines(folder.broken) == lines
    with folder.broken.open("ab") as file:
        file.write(b'{"step": 1, "key": "a character that a kill has cut: \xc3')
    folder.forget_after(1)
    assert folder.lines(folder.broken) == lines[:1]


def test_what_a_going_on_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(config(run="a"), "never", "sum")
    folder.write_facts(data={"train": "sum"})
    checkpoint = save(folder, 5)
    free = config(run="b")
    free.data.workers, free.data.path = 3, "elsewhere"
    free.training.threads, free.training.sample_every, free.training.device = 2, 7, "cpu"
    assert folder.begin(free, "auto", "sum") == checkpoint
    assert load_config(folder.config).training.threads == 2
    for name, value in (("seed", 1), ("init_from", "x")):
        other = config()
        setattr(other, name, value)
        with pytest.raises(UserError, match=f"the run began with {name}="):
            folder.begin(other, "auto", "sum")
    other = config()
    other.training.precision = "bf16"
    with pytest.raises(UserError, match="training.precision=32, now it is bf16"):
        folder.begin(other, "auto", "sum")
    with pytest.raises(UserError, match="other data than the run .* began with .*checksum mus"):
        folder.begin(config(), "auto", "mus")
    longer = config()
    longer.stages.append(StageConfig(name="more", samples=10))
    with pytest.raises(UserError, match="stages.1."):
        folder.begin(longer, "auto", "sum")


def test_what_a_checkpoint_says(tmp_path: Path) -> None:
    import torch

    content: dict[str, Any] = {
        "run_state": run_state_tree(RunState(1, 320)),
        "state_dict": {"model.h1.bias": torch.ones(2)},
        "settings": {"seed": 3},
        "data": {},
        "architecture": "{}",
        "temperature": {"values": {"logit_scale": torch.tensor(2.0)}},
        "frozen": [],
        "strategy": "none",
        "ranks": 1,
    }
    torch.save(content, tmp_path / "c.ckpt")
    saved = read_checkpoint(tmp_path / "c.ckpt")
    assert saved.run_state == RunState(stage=1, samples=320) and not saved.in_parts
    assert {name: tensor.tolist() for name, tensor in saved.weights().items()} == {
        "h1.bias": [1.0, 1.0],
        "logit_scale": 2.0,
    }
    for bad in ({**content, "run_state": {"stage": 1, "moon": "full"}}, {"run_state": {}}):
        torch.save(bad, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match="other.ckpt: not a checkpoint of mmgem"):
            read_checkpoint(tmp_path / "other.ckpt")
