"""Bad input: exit code 2, one line that says what, where and what to do; no traceback without --debug.

Bad samples in the data are no errors: they are skipped, counted and named, up to a set share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import CONFIG, Tiny, break_samples, figures, read_lines, run

from mmgem.cli import main
from mmgem.data.samples import Sample
from mmgem.data.shards import ShardedDataset
from mmgem.data.writer import ShardWriter

SHORT = "stages=[{name: only, samples: 96, global_batch: 16}]"
Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The one line that the command prints before it ends with 2."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("mmgem: error: ") and "Traceback" not in captured.err
    assert sum(line.startswith("mmgem: error") for line in lines) == 1
    return lines[-1].removeprefix("mmgem: error: ")


def misused(capsys: Capture, *arguments: str | Path) -> str:
    """What argparse says of a wrong command line, also with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- in a process, as a user sees it ---------------------------------------------------------------------


def test_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = run("train", "--config", tmp_path / "none.yaml")
    assert done.code == 2 and done.out == ""
    assert done.err == (f"mmgem: error: {tmp_path}/none.yaml: no such config file; the shipped ones are in configs/\n")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("train", "--debug", "--config", tmp_path / "none.yaml")
    assert done.code == 2 and done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith(f"mmgem: error: {tmp_path}/none.yaml")


def test_half_an_environment_of_ranks(tiny: Tiny, tmp_path: Path) -> None:
    done = run(*tiny.arguments(tmp_path / "run", SHORT), WORLD_SIZE="2")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in done.err and "torchrun" in done.err
    assert not (tmp_path / "run").exists()


# --- config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.embed_dims=3", ["unknown key model.embed_dims", "did you mean model.embed_dim?"]),
        ("stages.1.max_region=3", ["unknown key stages.1.max_region", "did you mean stages.1.max_regions?"]),
        ("traning.device=cpu", ["unknown key traning", "did you mean training?"]),
        ("model.embed_dim=many", ["model.embed_dim", "many"]),
        ("stages.7.lr=1", ["stages.7.lr=1", "0 … 1"]),
        ("stages.0.lr_scale.eyes=1", ["stages.0 (global)", "eyes", "vision, llm, projections"]),
        ("stages.0.epochs=1", ["stages.0 (global)", "samples, steps or epochs"]),
        ("stages.0.global_batch=1", ["global_batch must be at least 2"]),
        ("data.row_tokens=32", ["data.row_tokens=32", "at least 99"]),
        ("stages.1.patch_dropout=0.5", ["stages.1 (fine-grained)", "patch_dropout", "max_regions"]),
        ("stages.0.cached_views=2", ["stages.0 (global)", "cached_views", "freeze"]),
        ("stages.0.freeze=[vision, llm, projections]", ["everything is frozen"]),
        ("stages.1.name=global", ["stages", "names must differ"]),
        ("training.checkpoint_every=0", ["training.checkpoint_every", "at least 1"]),
        ("training.keep_checkpoints=0", ["training.keep_checkpoints", "at least 1"]),
        ("training.sample_every=-1", ["training.sample_every", "0 (none) or more"]),
        ("training.threads=0", ["training.threads", "at least 1, or null"]),
        ("training.late_after=0", ["training.late_after", "up to stop_after"]),
        ("training.offload=parameters", ["training.offload=parameters", "strategy=deepspeed_3"]),
        ("training.offload=optimizer", ["training.offload=optimizer", "deepspeed_2"]),
        ("training.deepspeed.steps_per_print=1", ["training.deepspeed", "deepspeed_1"]),
        ("stages.0.micro_batch=0", ["stages.0 (global)", "micro_batch must be at least 1"]),
        ("stages.1.loss.kind=sigmoid", ["stages.1 (fine-grained)", "model.init_logit_bias", "-10"]),
        ("model.init_logit_scale=5", ["model.init_logit_scale", "ln 100"]),
        ("stages.0.betas=[0.9, 1.0]", ["stages.0 (global)", "betas"]),
        ("stages.0.clip_grad=-1", ["stages.0 (global)", "clip_grad must be 0 or more"]),
        ("stages.0.lr_scale.llm=-1", ["stages.0 (global)", "lr_scale", "below 0"]),
    ],
)
def test_settings_that_cannot_be(tiny: Tiny, tmp_path: Path, capsys: Capture, override: str, parts: list[str]) -> None:
    message = refused(capsys, *tiny.arguments(tmp_path / "run", override))
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_config(tmp_path: Path, capsys: Capture) -> None:
    for text, part in (("a: [1", "not valid YAML"), ("- 1\n- 2\n", "not a list"), ("\0", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        message = refused(capsys, "train", "--config", tmp_path / "bad.yaml")
        assert f"{tmp_path}/bad.yaml" in message and part in message
    assert str(tmp_path) in refused(capsys, "train", "--config", tmp_path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.vision.name=resnet10x", ["model.vision.name=resnet10x", "no such model", "near: resnet10t"]),
        ("model.vision={library: open_clip, name: ViT-B-33}", ["ViT-B-33", "no such model", "near: ViT-B-"]),
        ("model.vision.pretrained=./none.safetensors", ["model.vision.pretrained=none.safetensors", "no such file"]),
        ("model.llm.config.model_type=lama", ["model.llm.config", "lama"]),
        ("model.llm.config.model_type=bert", ["model.llm", "bert", "choose"]),
        ("model.llm.name=./no_llm", ["./no_llm"]),
        ("model.tokenizer.path=./no_tokenizer", ["./no_tokenizer"]),
        ("init_from=./no_run", ["no_run", "no such folder"]),
        ("stages.0.patch_dropout=0.5", ["resnet10t", "patch_dropout"]),
        ("training.device=cuda", ["training.device=cuda", "auto or cpu"]),
    ],
)
def test_models_that_cannot_be(tiny: Tiny, tmp_path: Path, capsys: Capture, override: str, parts: list[str]) -> None:
    import torch

    if override == "training.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    message = refused(capsys, *tiny.arguments(tmp_path / "run", override))
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run/log.jsonl").exists()
    assert tiny.train(tmp_path / "run", SHORT) == 0, "and the folder can still be used"


def test_weights_that_do_not_fit(tiny: Tiny, model: Path, tmp_path: Path, capsys: Capture) -> None:
    wrong = model / "model/model.safetensors"
    message = refused(capsys, *tiny.arguments(tmp_path / "run", f"model.vision.pretrained={wrong}"))
    assert str(wrong) in message and "does not fit the model" in message
    message = refused(capsys, *tiny.arguments(tmp_path / "run", f"init_from={model}", "model.embed_dim=48"))
    assert str(model) in message


def test_a_run_folder_that_is_a_file(tiny: Tiny, picture: Path, capsys: Capture) -> None:
    assert str(picture) in refused(capsys, *tiny.arguments(picture, SHORT))


# --- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after", "around", "between"])
def test_overrides_stand_where_they_like(tiny: Tiny, tmp_path: Path, order: str) -> None:
    run = tmp_path / "run"
    settings, config, resume = [f"run={run}", f"data.path={tiny.data}"], ["--config", str(CONFIG)], ["--resume", "auto"]
    stage = [SHORT.replace("96", "32")]
    arguments = {
        "before": [*settings, *stage, *config, *resume],
        "after": [*config, *resume, *settings, *stage],
        "around": [*settings, *config, *stage, *resume],
        "between": [*config, *settings, *resume, *stage],
    }[order]
    assert main(["train", *arguments]) == 0
    assert len(figures(run)) == 2


def test_wrong_command_lines(tiny: Tiny, capsys: Capture) -> None:
    assert "unrecognized arguments: --resum3" in misused(capsys, "train", "--config", CONFIG, "--resum3", "auto")
    assert "invalid choice: 'trian'" in misused(capsys, "trian")
    assert "--model" in misused(capsys, "caption", "a.jpg")
    assert "an override is written key.path=value" in refused(capsys, "train", "--config", CONFIG, "embed_dim")
    assert "unrecognized arguments: b" in misused(capsys, "embed", "--model", "m", "--texts", "a", "--out", "o", "b")


# --- models and pictures ------------------------------------------------------------------------------------------


def test_models_that_are_none(tmp_path: Path, picture: Path, model: Path, capsys: Capture) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    assert f"{missing}: no such model" in refused(capsys, "caption", "--model", missing, picture)
    message = refused(capsys, "caption", "--model", empty, picture)
    assert f"{empty}: no model here" in message and "config.json" in message
    cut, unread, future = (Path(shutil.copytree(model / "model", tmp_path / n)) for n in ("cut", "unread", "future"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    assert f"{cut}/model.safetensors" in refused(capsys, "caption", "--model", cut, picture)
    (unread / "config.json").write_text("{")
    assert f"{unread}/config.json" in refused(capsys, "caption", "--model", unread, picture)
    tree = json.loads((future / "config.json").read_text())
    (future / "config.json").write_text(json.dumps({**tree, "schema": 99}))
    assert "schema 99" in refused(capsys, "caption", "--model", future, picture)


def test_pictures_that_are_none(tmp_path: Path, picture: Path, model: Path, capsys: Capture) -> None:
    broken, text, empty, missing = (tmp_path / n for n in ("broken.jpg", "text.jpg", "empty.png", "missing.jpg"))
    broken.write_bytes(picture.read_bytes()[:600])
    text.write_text("no picture")
    empty.write_bytes(b"")
    for file, reason in (
        (broken, "broken image"), (text, "broken image"), (empty, "empty image"), (missing, "no such file"),
        (tmp_path, "cannot be read as a picture"),
    ):  # fmt: skip
        message = refused(capsys, "caption", "--model", model, picture, file)
        assert message.startswith(f"{file}: ") and reason in message, message
    for command in (
        ["embed", "--images", tmp_path, "--out", tmp_path / "o.npz"],
        ["regions", broken, "--box", "1,2,3,4"],
    ):
        message = refused(capsys, command[0], "--model", model, *command[1:])
        assert str(broken) in message and "give a JPEG, PNG or WebP" in message
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(
    ("box", "parts"),
    [
        ("0,0,65,10", ["0,0,65,10", "outside", "64 x 64"]),
        ("-3,0,5,5", ["-3,0,5,5", "outside"]),
        ("0,-0.5,5,5", ["0,-0.5,5,5", "outside"]),
        ("10,0,10,5", ["10,0,10,5", "no area", "x2 must be above x1"]),
        ("10,8,20,5", ["10,8,20,5", "no area", "y2 above y1"]),
        ("nan,0,5,5", ["no area"]),
        ("0,0,inf,5", ["outside"]),
        ("1,2,3", ["--box 1,2,3", "four numbers", "--box 10,20,110,90"]),
        ("1,2,3,4,5", ["four numbers"]),
        ("1,2,3,x", ["--box 1,2,3,x", "four numbers"]),
        ("", ["four numbers"]),
    ],
)
def test_boxes_that_are_none(model: Path, picture: Path, capsys: Capture, box: str, parts: list[str]) -> None:
    good = ["--box", "1,1,9,9"]
    message = refused(capsys, "regions", "--model", model, picture, *good, "--box", box, "--json")
    assert all(part in message for part in parts), message


def test_texts_that_are_none(model: Path, picture: Path, tmp_path: Path, capsys: Capture) -> None:
    for query in ("", "   "):
        message = refused(capsys, "regions", "--model", model, picture, "--box", "1,1,9,9", "--query", query)
        assert message == "--query: the text is empty"
    file, out = tmp_path / "texts.txt", tmp_path / "o.npz"
    embed = ("embed", "--model", model, "--texts", file, "--out")
    assert f"{file}" in refused(capsys, *embed, out)
    file.write_text("one\n\nthree\n")
    assert "line 2 is empty" in refused(capsys, *embed, out)
    file.write_text("")
    assert "no lines" in refused(capsys, *embed, out)
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refused(capsys, *embed, out)
    file.write_text("one\n")
    assert "ends in .npz" in refused(capsys, *embed, tmp_path / "o.txt")
    assert not out.exists()


def test_indexes_of_another_model(model: Path, picture: Path, tmp_path: Path, capsys: Capture) -> None:
    index = tmp_path / "index.npz"
    search = ("search", "--model", model, "--index", index)
    assert f"{index}: no such file" in refused(capsys, *search, "--text", "a")
    index.write_bytes(b"no index")
    assert "not what `mmgem embed` writes" in refused(capsys, *search, "--text", "a")
    np.save(tmp_path / "plain.npy", np.ones((2, 32), dtype=np.float32))
    plain = ("search", "--model", model, "--index", tmp_path / "plain.npy", "--text", "a")
    assert "not what `mmgem embed` writes" in refused(capsys, *plain)
    unit = np.eye(2, 32, dtype=np.float32)
    for vectors, names, why in (
        (unit, np.array("ab"), "not what `mmgem embed` writes"),
        (np.array(["a", "b"]), np.array(["a", "b"]), "not what `mmgem embed` writes"),
        (unit * np.nan, np.array(["a", "b"]), "vector 0 is not of length 1"),
        (unit * [[1], [100]], np.array(["a", "b"]), "vector 1 is not of length 1"),
    ):
        np.savez(index, vectors=vectors, names=names)
        assert why in refused(capsys, *search, "--text", "a")
    np.savez(index, vectors=np.ones((2, 48), dtype=np.float32), names=np.array(["a", "b"]))
    message = refused(capsys, *search, "--text", "a")
    assert message.startswith(f"{index}: its vectors have 48 numbers, those of this model 32: another model made it")
    assert main(["embed", "--model", str(model), "--images", str(picture), "--out", str(index)]) == 0
    with np.load(index) as file:
        content = dict(file)
    for probe in (-content["probe"], content["probe"] * np.nan, content["probe"][:3]):
        np.savez(index, **{**content, "probe": probe})
        assert f"{index}: another model made these vectors" in refused(capsys, *search, "--text", "a")
    np.savez(index, **content)
    assert "nothing to search for" in refused(capsys, *search)
    assert "--text: the text is empty" in refused(capsys, *search, "--text", " ")
    assert "no text in UTF-8" in refused(capsys, *search, "--text", "\udcff")
    assert "-k 0: at least 1" in refused(capsys, *search, "--text", "a", "-k", "0")


def test_splits_that_are_none(model: Path, tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "o.npz"
    for data, part in ((tiny.data / "nope", "nope"), (tiny.data, "train"), (tmp_path, "data prepare")):
        message = refused(capsys, "embed", "--model", model, "--data", data, "--out", out)
        assert str(data.parent) in message and part in message


# --- data ------------------------------------------------------------------------------------------------------------


def test_data_that_are_missing(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "none"
    message = refused(capsys, *Tiny(missing).arguments(tmp_path / "run"))
    assert f"data.path={missing}" in message and "mmgem data prepare" in message
    assert "data.path is missing" in refused(capsys, *tiny.arguments(tmp_path / "run", "data.path=''"))
    message = refused(capsys, *tiny.arguments(tmp_path / "run", "data.train_split=training"))
    assert "training" in message and "test, train, val" in message
    assert not (tmp_path / "run").exists()


def test_the_only_shard_is_cut(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    data = Path(shutil.copytree(tiny.data, tmp_path / "data"))
    shard = data / "train/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    message = refused(capsys, *Tiny(data).arguments(tmp_path / "run"))
    assert "samples in a row are broken" in message and f"shard {shard}: shard cut short" in message
    assert "mmgem data check" in message


def rewritten(tiny: Tiny, out: Path, change: Callable[[Sample], Sample]) -> Tiny:
    """The dataset with `change(sample)` in the place of each training sample."""
    shutil.copytree(tiny.data, out, ignore=shutil.ignore_patterns("train"))
    source = ShardedDataset(tiny.data / "train")
    with ShardWriter(out / "train") as writer:
        for index in range(len(source)):
            writer.write(change(source.sample(index)))
    return Tiny(out)


def without_regions(s: Sample) -> Sample:
    return Sample(s.key, s.image, s.captions, (), s.width, s.height, {})


def without_captions(s: Sample) -> Sample:
    return Sample(s.key, s.image, (), s.regions, s.width, s.height, {})


def test_regions_from_data_without_any(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    """Found before the first stage is trained, not after it."""
    data = rewritten(tiny, tmp_path / "data", without_regions)
    message = refused(capsys, *data.arguments(tmp_path / "run"))
    assert "stage fine-grained" in message and "max_regions=3" in message and f"{data.data}/train" in message
    assert "set max_regions: 0" in message
    assert not (tmp_path / "run").exists()
    assert data.train(tmp_path / "run", SHORT) == 0


def test_pictures_without_captions(tiny: Tiny, tmp_path: Path) -> None:
    """Regions alone are enough for a stage that has regions."""
    data = rewritten(tiny, tmp_path / "data", without_captions)
    assert data.train(tmp_path / "run", SHORT.replace("16}", "16, max_regions: 3}")) == 0
    for line in figures(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["loss_region_emb"] + line["loss_region_gen"])
        assert line["loss_emb"] is None and line["loss_gen"] is None


def test_eval_of_a_split_without_captions(tiny: Tiny, model: Path, tmp_path: Path, capsys: Capture) -> None:
    """`all` leaves out the tasks that need captions; one that is asked for by name is refused."""
    data = rewritten(tiny, tmp_path / "data", without_captions).data
    out = tmp_path / "out"
    options = ("--model", model, "--data", data, "--split", "train", "--max-new-tokens", "4", "--out", out)
    message = refused(capsys, "eval", "captioning", *options)
    assert message.startswith(f"{data}: split train has no captions; captioning needs captions")
    assert main([str(a) for a in ("eval", "all", *options)]) == 0
    written = json.loads((out / "metrics.json").read_text())
    assert [result["task"] for result in written] == [
        "region-retrieval",
        "region-captioning",
        "similarity-map",
        "composition",
    ]


def test_broken_pictures_are_skipped_counted_and_named(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    data = break_samples(tiny, tmp_path / "data", [5, 70])
    keys = ShardedDataset(tiny.data / "train").keys
    for workers in ("0", "2"):
        run = tmp_path / workers
        capsys.readouterr()
        assert data.train(run, SHORT, f"data.workers={workers}", "training.log_keys=true") == 0
        err = capsys.readouterr().err
        for number in (5, 70):
            assert err.count(f"skipped sample {keys[number]}: broken image") == 1
        assert f"2 broken samples were replaced; named in {run}/broken.jsonl" in err
        assert sorted(line["key"] for line in read_lines(run / "broken.jsonl")) == [keys[5], keys[70]]
        assert sum(line["broken"] for line in figures(run)) == 2
        seen = [key for line in read_lines(run / "keys.jsonl") for key in line["keys"]]
        assert len(seen) == 96 and set(seen) == set(keys) - {keys[5], keys[70]}
    assert figures(tmp_path / "0") == figures(tmp_path / "2")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_broken_pictures_stop_the_run(tiny: Tiny, tmp_path: Path, capsys: Capture, workers: str) -> None:
    data = break_samples(tiny, tmp_path / "data", list(range(0, 96, 3)))
    message = refused(capsys, *data.arguments(tmp_path / "run", SHORT, f"data.workers={workers}"))
    assert "samples are broken, more than data.max_broken=0.001" in message
    assert f"named in {tmp_path}/run/broken.jsonl" in message and "raise the share" in message
    assert len(figures(tmp_path / "run")) < 6
    named = [int(line["key"].removeprefix("train-")) for line in read_lines(tmp_path / "run/broken.jsonl")]
    assert 5 <= len(named) == len(set(named)) and not any(number % 3 for number in named)
    assert data.train(tmp_path / "run", SHORT, "data.max_broken=0.5") == 0, "with a higher share it goes"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_but_broken_pictures(tiny: Tiny, tmp_path: Path, capsys: Capture, workers: str) -> None:
    data = break_samples(tiny, tmp_path / "data", list(range(96)))
    message = refused(capsys, *data.arguments(tmp_path / "run", SHORT, f"data.workers={workers}"))
    assert message.startswith(f"{data.data}/train: 1000 samples in a row are broken, the last: sample train-0000")
    assert message.endswith("broken image (not a picture); look at the data with `mmgem data check`")
    message = refused(capsys, *data.arguments(tmp_path / "run", SHORT, "model.vision.standardise=true"))
    assert message.startswith(f"{data.data}/train: no readable picture among 96 samples")


def test_a_loss_that_is_not_finite_names_the_samples(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    message = refused(capsys, *tiny.arguments(tmp_path / "run", SHORT.replace("16}", "16, lr: 1e12, clip_grad: 0}")))
    assert "the loss is not finite" in message and "train-0000" in message and "stage only, step" in message
    assert all(line["loss"] < 1e30 for line in figures(tmp_path / "run")), "the bad step is not logged as done"


def test_texts_over_the_limit_are_cut_and_counted(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    """[EMB] is never cut off: the run trains, and each cut text counts once."""
    assert tiny.train(tmp_path / "run", SHORT, "model.max_tokens=2") == 0
    lines = figures(tmp_path / "run")
    assert [line["texts_cut"] for line in lines] == [16] * 6, "every caption is longer than two tokens"
    assert "96 texts were longer than model.max_tokens and cut" in capsys.readouterr().err
    assert all(line["loss_emb"] > 0 and line["loss_gen"] > 0 for line in lines)
    assert tiny.train(tmp_path / "whole", SHORT) == 0
    assert all(line["texts_cut"] == 0 for line in figures(tmp_path / "whole"))
    assert "cut" not in capsys.readouterr().err


def test_saved_config_of_a_refused_run_does_not_bind_the_next(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, *tiny.arguments(tmp_path / "run", SHORT, "model.vision.name=resnet10x", resume="auto"))
    assert tiny.train(tmp_path / "run", SHORT, resume="auto") == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["vision"]["name"] == "resnet10t"


def test_grey_and_transparent_pictures_are_taken(model: Path, tmp_path: Path, capsys: Capture) -> None:
    files = []
    for mode, name in (("L", "grey.png"), ("RGBA", "clear.png"), ("P", "palette.png"), ("CMYK", "print.jpg")):
        Image.new(mode, (30, 40)).save(tmp_path / name)
        files.append(tmp_path / name)
    capsys.readouterr()
    assert main(["caption", "--model", str(model), *map(str, files)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
