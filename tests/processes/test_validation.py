"""`training.val_every`: the figures are there, and training is what it is without them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import Tiny, figures, read_lines
from warm import Job

from mmgem.evaluation.tasks import TASKS, SplitTask

TASK_NAMES = [name for name, task in TASKS.items() if isinstance(task, SplitTask)]
SHORT = ("stages.0.samples=160", "stages.1.samples=160", "training.sample_every=0")  # 10 + 10 steps
EVERY = ("training.val_every=6", "training.val_samples=8", f"training.val_tasks=[{', '.join(TASK_NAMES)}]")


def test_each_task_on_a_split_can_be_chosen(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train(tmp_path / "plain", *SHORT) == 0
    assert tiny.train(tmp_path / "val", *SHORT, *EVERY) == 0
    assert figures(tmp_path / "val") == figures(tmp_path / "plain")
    lines = read_lines(tmp_path / "val" / "val.jsonl")
    assert [(line["step"], line["stage"]) for line in lines] == [
        (6, "global"), (10, "global"), (16, "fine-grained"), (20, "fine-grained"),
    ]  # fmt: skip
    wanted = {"text_retrieval_recall@1", "CIDEr", "region_image_retrieval_recall@1", "region_CIDEr"}
    wanted |= {"rerank_both_text_retrieval_recall@1", "pointing_accuracy"}
    for line in lines:
        assert wanted <= line.keys() and all(math.isfinite(v) for k, v in line.items() if k != "stage")
    assert "step 6: val: text_retrieval_recall@1 " in capsys.readouterr().err
    assert not (tmp_path / "plain" / "val.jsonl").exists()


def test_ranks_share_it_or_do_it_together_where_none_has_the_whole_model(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for strategy in ("ddp", "deepspeed_3"):
        settings = [*SHORT, *EVERY, f"training.strategy={strategy}", "stages.1=null"]
        Job(tiny.arguments(tmp_path / strategy, *settings), 2, tmp_path / f"{strategy}-out").finish()
        found[strategy] = read_lines(tmp_path / strategy / "val.jsonl")
    assert [line["step"] for line in found["ddp"]] == [line["step"] for line in found["deepspeed_3"]] == [6, 10]
    for one, other in zip(*found.values(), strict=True):
        for name in ("text_retrieval_mAP", "image_retrieval_mAP", "BLEU@1"):
            assert other[name] == pytest.approx(one[name], abs=0.1), (name, one["step"])


def test_what_cannot_be_evaluated_is_refused_before_training(tiny: Tiny, tmp_path: Path, capsys) -> None:
    assert tiny.train(tmp_path / "a", "training.val_every=4", "data.val_split=nosuch") == 2
    assert "there is no validation split 'nosuch'" in capsys.readouterr().err
    assert tiny.train(tmp_path / "b", "training.val_every=4", "training.val_tasks=[zero-shot]") == 2
    assert "training.val_tasks" in capsys.readouterr().err
    assert tiny.train(tmp_path / "c", "training.val_every=4", "training.strategy=fsdp2") == 2
    assert "fsdp2 keeps no whole model" in capsys.readouterr().err
    assert not (tmp_path / "a" / "log.jsonl").exists()
