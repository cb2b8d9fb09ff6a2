"""docs/data.md does what it says: its commands run on tiny data laid where it expects them, and its settings exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from layouts import coco, entities, genome, jsonl_folder, karpathy, laion, refcoco, save

from mmgem.cli import main
from mmgem.config import load_config
from mmgem.data.prepare import FORMATS
from mmgem.data.shards import ShardedDataset

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text()


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data that the page speaks of."""
    jsonl_folder(tmp_path / "FLICKR8K")
    entities(tmp_path / "flickr30k_entities", {"train": ["101"], "val": ["102"], "test": ["103"]})
    (tmp_path / "flickr30k_entities/flickr30k-images").rename(tmp_path / "flickr30k-images")
    karpathy(tmp_path / "dataset_flickr30k.json", {"101": "train", "102": "val", "103": "test"})
    for split, numbers in (("train2017", [1, 2]), ("val2017", [3])):
        coco(tmp_path, split, numbers)
    (tmp_path / "images").rename(tmp_path / "coco")
    refcoco(tmp_path)
    _, images = genome(tmp_path / "vg", flat=False)
    for folder in images.iterdir():
        folder.rename(tmp_path / "vg" / folder.name)
    save(tmp_path / "photos/a.jpg", size=(400, 300))
    (tmp_path / "photos/a.txt").write_text("a photo")
    for name in ("train/n1/1.jpg", "val/n1/2.jpg"):
        save(tmp_path / "imagenet" / name)
    laion(tmp_path / "laion")
    shutil.copytree(tmp_path / "laion", tmp_path / "cc3m")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(here: Path) -> None:
    commands = [line for line in blocks("sh").splitlines() if line.startswith("mmgem ")]
    shown = {words[3] for words in map(shlex.split, commands) if words[2] == "prepare"}
    assert shown == FORMATS.keys() and len(commands) >= 13
    for command in commands:
        if "://" in command:  # there is no net here
            continue
        arguments = shlex.split(command)[1:]
        if arguments[2] == "scenes":
            arguments += ["--train", "2", "--val", "2", "--test", "2"]
        assert main([*arguments, "--processes", "1"]) == 0, command
    counts = {str(path.parent.relative_to(here)): len(ShardedDataset(path.parent)) for path in here.rglob("index.json")}
    assert counts["data/flickr8k/train"] == 4 and counts["data/coco/val"] == 1 and counts["data/entities/test"] == 1
    assert counts["data/imagenet/val"] == 1 and counts["laion"] == counts["data/laion/train"] == 6
    assert ShardedDataset(here / "data/photos/train").sample(0).width == round(400 * 224 / 300)
    assert (here / "data/flickr8k/check/check.html").is_file()


def test_the_settings_are_some(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    tree["data"] = yaml.safe_load(blocks("yaml"))["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    data = load_config(tmp_path / "config.yaml").data
    assert [source.weight for source in data.sources] == [3, 1]
    for name, default in re.findall(r"`data\.(\w+)` \(([\d.]+)[,)]", PAGE):
        assert getattr(data, name) == float(default), name
    for name in re.findall(r"`data\.(\w+)", PAGE):
        assert hasattr(data, name), name


def test_options_and_links(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in (*(["prepare", name] for name in FORMATS), ["index"], ["check"]):
        with pytest.raises(SystemExit):
            main(["data", *command, "--help"])
        known += capsys.readouterr().out
    for option in set(re.findall(r"(--[a-z][a-z-]+)", PAGE)):
        assert option in known or option == "--help", option
    for link in re.findall(r"\]\(([^)#]*)#?[^)]*\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
