"""Settings: read whole or refused with the place, the reason and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmgem.config import Config, ModelConfig, StageConfig, config_from_tree, config_text, load_config, to_tree
from mmgem.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))

GOOD: dict[str, Any] = {
    "run": "runs/mine",
    "data": {"path": "data/x", "row_tokens": 80},
    "model": {
        "max_tokens": 40,
        "vision": {"library": "timm", "name": "resnet10t"},
        "llm": {"config": {"model_type": "llama", "anything": "goes"}},
    },
    "stages": [
        {"name": "one", "samples": 1000, "lr": 1e-3},
        {"name": "two", "epochs": 0.5, "max_regions": 4, "lr_scale": {"vision": 0.1}},
    ],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


def read(file: Path, *overrides: str) -> Config:
    return load_config(file, overrides)


def refuse(file: Path, match: str, *overrides: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(file, *overrides)
    assert "\n" not in str(caught.value)


# --- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=[p.name for p in CONFIGS])
def test_every_shipped_config_loads(path: Path, tmp_path: Path):
    config = load_config(path)
    assert config.stages and config.run.startswith("runs/")
    # And what a run saves of it is the same again.
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_there_are_shipped_configs():
    names = {p.name for p in CONFIGS}
    assert {"quickstart.yaml", "stage1_vit_l14_tinyllama.yaml", "stage2_vit_l14_tinyllama.yaml"} <= names


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_config_is_read_with_its_defaults(file: Path):
    config = read(file)
    assert config.run == "runs/mine" and config.data.row_tokens == 80
    assert config.model.llm.config == {"model_type": "llama", "anything": "goes"}
    assert [s.name for s in config.stages] == ["one", "two"]
    assert config.stages[1].epochs == 0.5 and config.stages[1].samples is None
    assert config.stages[0].betas == StageConfig().betas and config.seed == 0


def test_the_resolved_file_is_the_same_config(file: Path, tmp_path: Path):
    config = read(file, "stages.0.betas=[0.8, 0.9]", "model.vision.mean=[0.1, 0.2, 0.3]")
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "saved.yaml") == config
    tree = to_tree(config)
    assert config_from_tree(tree, "tree") == config
    assert tree["stages"][0]["betas"] == [0.8, 0.9] and tree["data"]["workers"] == 0
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text()) == tree


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5e-3", 1.5e-3), ("2E+1", 20.0), ("3", 3.0)])
def test_numbers_as_people_write_them(file: Path, text: str, value: float):
    """YAML itself takes 1e-4 for text."""
    assert read(file, f"stages.0.lr={text}").stages[0].lr == value
    file.write_text(file.read_text().replace("lr: 0.001", f"lr: {text}"))
    assert read(file).stages[0].lr == value


def test_text_that_only_looks_like_a_number_stays_text(file: Path):
    config = read(file, "model.vision.name=efficientnet_b0", "run=2024-e-run", "model.llm.config.note=.eh")
    assert config.model.vision.name == "efficientnet_b0" and config.run == "2024-e-run"
    assert config.model.llm.config["note"] == ".eh"


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides(file: Path):
    config = read(
        file,
        "run=runs/other",
        "data.workers=3",
        "data.val_split=null",
        "stages.1.lr=2e-5",
        "stages.1.lr_scale.llm=0.5",
        "stages.0.freeze=[vision, llm]",
        "model.vision.config.img_size=64",
        "training.tensorboard=true",
        "data.path=a=b",
    )
    assert config.run == "runs/other" and config.data.workers == 3 and config.data.val_split is None
    assert config.stages[1].lr == 2e-5 and config.stages[0].lr == 1e-3
    assert config.stages[1].lr_scale == {"vision": 0.1, "llm": 0.5}
    assert config.stages[0].freeze == ["vision", "llm"]
    assert config.model.vision.config == {"img_size": 64}
    assert config.training.tensorboard is True
    assert config.data.path == "a=b"


def test_a_later_override_wins_and_a_whole_stage_can_be_given(file: Path):
    config = read(file, "seed=1", "seed=2", "stages.1={name: other, samples: 7}")
    assert config.seed == 2
    assert config.stages[1] == StageConfig(name="other", samples=7)


def test_null_leaves_a_stage_out(file: Path):
    assert [s.name for s in read(file, "stages.1=null", "stages.0.lr=1").stages] == ["one"]
    left = read(file, "stages.0=null", "stages.1.lr=2e-5").stages  # the file's own numbers
    assert [(s.name, s.lr) for s in left] == [("two", 2e-5)]
    refuse(file, "at least one stage is needed", "stages.0=null", "stages.1=null")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("seed", "'seed': an override is written key.path=value, e.g. stages.0.lr=1e-4"),
        ("=3", "an override is written"),
        ("seed=[1", "the value is not valid YAML"),
        ("stages.2.lr=1", "'2' is not one of the list's numbers 0 … 1"),
        ("stages.one.lr=1", "'one' is not one of the list's numbers"),
        ("stages.9={}", "'9' is not one of the list's numbers"),
        ("run.name=x", "run has no keys below it"),
        ("run.name.first=x", "nothing below the part before 'name'"),
        ("stages.0.learning_rate=1", "unknown key stages.0.learning_rate"),
        ("data.worker=1", r"unknown key data.worker; did you mean data.workers\?"),
    ],
)
def test_overrides_that_cannot_be_are_refused(file: Path, override: str, match: str):
    refuse(file, match, override)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"sed": 1}, r"config.yaml: unknown key sed; did you mean seed\?"),
        ({"model": {"visoin": {}}}, r"unknown key model.visoin; did you mean model.vision\?"),
        ({"model": {"vision": {"nam": "x"}}}, r"unknown key model.vision.nam; did you mean model.vision.name\?"),
        ({"stages": [{}, {"loss": {"embb": 1}}]}, r"unknown key stages.1.loss.embb; did you mean stages.1.loss.emb\?"),
        ({"zzz": 1}, "unknown key zzz; known here: run, init_from, seed, data, model, stages, training"),
        ({7: 1}, "unknown key 7; known here: run"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_right_one(file: Path, tree: dict[str, Any], match: str):
    file.write_text(yaml.safe_dump({**GOOD, **tree}))
    refuse(file, match)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("seed=many", "seed: .*given: 'many'"),
        ("seed=1.5", "seed: .*given: 1.5"),
        ("data=7", "data: .*given: 7"),
        ("stages=3", "stages: .*given: 3"),
        ("stages.0.global_batch=[4]", r"stages.0.global_batch: "),
        ("stages.0.freeze=[vison]", r"stages.0.freeze.0: .*'vision'.*given: 'vison'"),
        ("model.vision.library=torchvision", "model.vision.library: .*'timm' or 'open_clip'"),
        ("training.precision=16", "training.precision: "),
        ("data.crop_scale=[0.5]", "data.crop_scale"),
        ("model.vision.mean=0.5", "model.vision.mean: "),
        ("stages.0.lr_scale.vision=much", "stages.0.lr_scale.vision: "),
        ("model.llm.name=[a]", "model.llm.name: "),
    ],
)
def test_wrong_types_are_refused_with_their_place(file: Path, override: str, place: str):
    refuse(file, f"config.yaml: {place}", override)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["stages=[]"], "at least one stage is needed"),
        (["training.strategy=deepspeed_2", "training.precision=64"], "DeepSpeed keeps no fp64"),
        (["training.strategy=deepspeed_1", "stages.0.ema=0.9"], "ema wants whole weights; set training.strategy"),
        (["stages.1.name=one"], r"names must differ, given \['one', 'one'\]"),
        (["seed=-1"], "seed must be 0 or more"),
        (["model.max_tokens=0"], "max_tokens must be at least 1"),
        (["data.row_tokens=42"], "row_tokens=42 cannot hold .*max_tokens=40 .*set it to at least 43"),
        (["model.embed_dim=0"], "model.embed_dim must be at least 1"),
        (["model.visual_dropout=1"], "model.visual_dropout must be at least 0 and below 1"),
        (["seed=4294967296"], r"seed must be 0 or more, and below 2\^32"),
        (["stages.0.lr=.nan"], "stages.0.lr must be a finite number"),
        (["stages.0.samples=null", "stages.0.epochs=.inf"], "stages.0.epochs must be a finite number"),
        (["data.lanes=100000000"], "data.lanes must be at most 10000"),
        (["data.crop_scale=[0.5, 1.5]"], "0 < low <= high <= 1"),
        (["data.crop_scale=[0.9, 0.5]"], "0 < low <= high <= 1"),
        (["data.flip=2"], "data.flip must be a share"),
        (["data.workers=-1"], "data.workers must be 0 or more"),
        (["model.vision.config_file=x.json"], "config_file is for open_clip"),
        (["model.vision.name=null"], "model.vision.name is missing"),
        (["model.vision.library=open_clip", "model.vision.name=null"], "needs a name, a config or a config_file"),
        (["model.vision.image_size=0"], "image_size must be at least 1"),
        (["model.llm.config={}"], "model.llm needs a name .* or a config with model_type"),
        (["stages.0.epochs=2"], r"stages.0 \(one\): give samples, steps or epochs, one of the three"),
        (["stages.0.samples=null"], r"stages.0 \(one\): give samples, steps or epochs, one of the three"),
        (["stages.0.samples=0"], r"stages.0 \(one\): a stage's length must be above 0"),
        (["stages.1.epochs=0"], r"stages.1 \(two\): a stage's length must be above 0"),
        (["stages.0.global_batch=1"], "global_batch must be at least 2"),
        (["stages.0.captions_per_image=0"], "captions_per_image must be at least 1"),
        (["stages.0.max_regions=-1"], "max_regions must be 0 or more"),
        (["stages.0.written_regions=1"], "written_regions must be from 1 to max_regions, or null"),
        (["stages.1.written_regions=5"], "written_regions must be from 1 to max_regions, or null"),
        (["stages.1.written_regions=0"], "written_regions must be from 1 to max_regions, or null"),
        (["stages.0.lr=0"], "lr must be above 0"),
        (["stages.0.image_size=0"], "image_size must be at least 1, or null"),
        (
            ["model.vision.library=open_clip", "model.vision.join=[blocks.1]"],
            "train_from and join are for timm's towers",
        ),
        (["model.h1_init=0"], "model.h1_init must be above 0 and at most 1"),
        (["model.llm.average_init=-1"], "model.llm.average_init must be 0 \\(off\\) or more"),
        (["model.llm.embedding_init=0"], "model.llm.embedding_init must be above 0"),
        (["model.llm.name=gpt2", "model.llm.average_init=1"], "are for random LLMs; leave them out"),
        (["stages.0.ema=1"], "ema is a decay, at least 0"),
        (["stages.0.warmup=2"], "warmup is a share, from 0 to 1"),
        (["stages.0.lr_scale={tower: 0.1}"], "lr_scale: unknown part tower; the parts are vision, llm, projections"),
        (["stages.0.loss={emb: 0, gen: 0}"], r"stages.0 \(one\): loss: all weights that count here are 0"),
        (["stages.0.loss.emb=-1"], "loss: a weight is below 0"),
        (["stages.0.loss.label_smoothing=1"], "label_smoothing must be at least 0 and below 1"),
        (["stages.0.patch_dropout=1"], "patch_dropout must be at least 0 and below 1"),
        (["stages.1.patch_dropout=0.5"], r"stages.1 \(two\): patch_dropout leaves no full map for regions"),
        (["stages.0.cached_views=4"], "cached_views needs a frozen tower: add vision to freeze"),
        (
            ["stages.0.cached_views=4", "stages.0.patch_dropout=0.5", "stages.0.freeze=[vision]"],
            "patch_dropout does nothing to cached_views",
        ),
        (["stages.0.freeze=[vision, llm, projections]"], "everything is frozen"),
        (["stages.0.loss.hard.rank=0.2"], "loss.hard.rank needs negative texts: set negatives.texts to 1 or more"),
        (["stages.0.loss.hard.columns=1"], "loss.hard.columns needs negatives: set negatives.texts or negatives.pict"),
        (["stages.0.loss.hard.rank=-1", "stages.0.negatives.texts=1"], "loss: a weight is below 0"),
        (["stages.0.negatives.texts=1"], "negatives are made, and no loss uses them: give one of loss.hard a weight"),
        (
            ["stages.0.negatives={texts: 1, kinds: [color]}", "stages.0.loss.hard.rank=1"],
            "negatives.kinds: no rule makes color; the kinds are colour, size",
        ),
        (["stages.0.negatives={texts: 1, kinds: []}", "stages.0.loss.hard.rank=1"], "negatives.kinds names no kind"),
        (
            ["stages.0.negatives={pictures: 1, patches: 1}", "stages.0.loss.hard.columns=1"],
            "patches must be at least 2",
        ),
        (
            [
                "stages.0.negatives.pictures=1",
                "stages.0.loss.hard.columns=1",
                "stages.0.cached_views=4",
                "stages.0.freeze=[vision]",
            ],
            "negatives.pictures does nothing to cached_views",
        ),
        (
            ["stages.0.negatives={texts: 1, kinds: [shuffle], order_robust: true}", "stages.0.loss.hard.columns=1"],
            "order_robust makes positives, and loss.hard is for negatives",
        ),
        (
            ["stages.0.negatives={texts: 1, max_words: 0}", "stages.0.loss.hard.rank=1"],
            "negatives.max_words must be at least 1, or null",
        ),
        (
            ["stages.0.negatives={texts: 1, drawn: true}", "stages.0.loss.hard.triplet=1"],
            "negatives.drawn takes pictures that lie with the data: set negatives.source to data",
        ),
        (
            ["stages.0.negatives={texts: 1, source: data}", "stages.0.loss.hard.triplet=1"],
            "loss.hard.triplet needs pictures of the negatives: set negatives.drawn",
        ),
        (
            ["stages.0.negatives={texts: 1, source: data, drawn: true}", "stages.0.loss.hard.rank=1"],
            "negatives.drawn: no loss uses the pictures",
        ),
        (
            ["stages.0.negatives={texts: 1, first: [swap]}", "stages.0.loss.hard.rank=1"],
            "negatives.first asks for negatives that lie with the data: set negatives.source to data",
        ),
        (
            [
                "stages.0.negatives={texts: 1, source: data, kinds: [swap], first: [size]}",
                "stages.0.loss.hard.rank=1",
            ],
            "negatives.first names kinds that negatives.kinds has not",
        ),
        (["stages.0.negatives={texts: 1, order_robust: true}"], "order_robust is for words in another order: set"),
    ],
)
def test_contradictions_are_refused(file: Path, overrides: list[str], match: str):
    refuse(file, match, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.0.cached_views=4", "stages.0.freeze=[vision]"],
        ["stages.0.cached_views=4", "model.vision.train_from=blocks.5"],
        ["stages.0.patch_dropout=0.5"],
        ["data.row_tokens=43"],
        ["stages.0.loss={emb: 0}"],
        ["stages.1.loss={emb: 0, gen: 0, region_gen: 0}"],
        ["model.llm.config={}", "model.llm.name=org/llm"],
        ["model.vision={library: open_clip, config_file: x.json}"],
        ["stages.0.negatives={texts: 1, source: data, kinds: [llm]}", "stages.0.loss.hard.written=1"],
        ["stages.0.negatives={texts: 1, pictures: 1, kinds: [shuffle], order_robust: true}"],
        ["stages.0.negatives.pictures=1", "stages.0.loss={emb: 0, hard: {columns: 1}}"],
        ["stages.0.negatives={texts: 1, source: data, drawn: true}", "stages.0.loss.hard.triplet=1"],
    ],
)
def test_what_only_looks_like_a_contradiction_is_taken(file: Path, overrides: list[str]):
    assert read(file, *overrides).run == "runs/mine"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [1", "config.yaml: not valid YAML: .*line 1"),
        ("- 1\n- 2", "config.yaml: a config is a mapping of keys to values, not a list"),
        ("just text", "a config is a mapping of keys to values, not a str"),
        ("", "model.vision.name is missing"),
    ],
)
def test_files_that_are_no_config_are_refused(file: Path, text: str, match: str):
    file.write_text(text)
    refuse(file, match)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    refuse(tmp_path / "nowhere.yaml", r"nowhere.yaml: no such config file; the shipped ones are in configs/")
    refuse(tmp_path, "cannot be read as a config file")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    refuse(tmp_path / "bytes.yaml", "cannot be read as a config file")


def test_settings_cannot_be_misspelt_in_python_either():
    with pytest.raises(Exception, match="embed_dimm"):
        ModelConfig(embed_dimm=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["a/b", "", "..", "two words"])
def test_a_stage_is_named_as_its_folder(name: str):
    tree = {
        "model": {"vision": {"name": "resnet10t"}, "llm": {"config": {"model_type": "llama"}}},
        "stages": [{"name": name, "epochs": 1}],
    }
    with pytest.raises(UserError, match="folder's name"):
        config_from_tree(tree, "here")


def test_numbers_that_are_words(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "run: 2024\ntraining: {precision: 32}\nmodel: {vision: {name: resnet10t}, llm: {config: {model_type: llama}}}\n"
        "stages: [{name: 1, epochs: 1}]\n"
    )
    config = load_config(file, ["training.precision=32"])
    assert (config.run, config.training.precision, config.stages[0].name) == ("2024", "32", "1")
