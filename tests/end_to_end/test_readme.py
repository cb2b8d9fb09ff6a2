"""The README does what it says: every command in it runs, and its Python example runs as printed.

Commands that train run with fewer samples, on tiny data laid where the README expects the real ones.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import picture
from PIL import Image
from tiny import Finished, Tiny

from mmgem.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

# Settings that make a command short; nothing else of it is changed.
SHORT = ["training.threads=1", "training.checkpoint_every=1000", "training.sample_every=0"]
SHORT += [f"stages.{n}.{k}" for n in (0, 1) for k in ("epochs=null", "samples=32", "global_batch=16")]
LESS = ["stages.0.global_batch=16", "stages.1.global_batch=16"]
SHORTER = {
    "mmgem check --config configs/flickr8k.yaml": LESS,
    "mmgem train --config configs/quickstart.yaml": SHORT,
    "mmgem train --config configs/flickr8k.yaml": [
        *SHORT,
        "model.vision.image_size=64",
        "stages.0.cached_views=2",
        "stages.1.cached_views=2",
    ],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(program: str = "mmgem") -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith(f"{program} ")]


@pytest.fixture(scope="module")
def checkout(tiny: Tiny, finished: tuple[Path, Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's commands find around them."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "data").mkdir()
    shutil.copytree(tiny.data, root / "data" / "scenes")
    shutil.copytree(finished[0], root / "runs" / "quickstart")
    (root / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.png"):
        Image.radial_gradient("L").resize((120, 90)).convert("RGB").save(root / name)
    flickr8k(root / "FLICKR8K")
    mobilenet(root / "MOBILENET.safetensors")
    return root


def flickr8k(folder: Path) -> None:
    """Twenty pictures in the layout `jsonl`, each with a caption and a box."""
    (folder / "images").mkdir(parents=True)
    captions, regions = [], []
    for n in range(20):
        name, split = f"{n}.jpg", "train" if n < 16 else "val"
        picture(n).save(folder / "images" / name)
        common = {"image": name, "split": split}
        captions.append(
            {**common, "width": 80, "height": 60, "captions": [f"picture number {n}", f"a plain field {n}"]}
        )
        regions.append({**common, "box": [5, 5, 40 + n, 50], "phrase": f"field {n}", "entity_id": n})
    for file, rows in (("captions.jsonl", captions), ("regions.jsonl", regions)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def mobilenet(file: Path) -> None:
    """Random weights in the file's form: half precision, 1,001 classes."""
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("mobilenetv2_100", num_classes=1001, pad_type="same")
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, file)


def test_commands_of_the_readme(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    found = commands()
    assert len(found) >= 9
    for command in found:
        arguments = shlex.split(command)[1:]
        if command.startswith("mmgem data prepare scenes"):
            arguments = [a.replace("data/scenes", "data/new") for a in arguments]
            arguments += ["--train", "4", "--val", "2", "--test", "2", "--processes", "1"]
        for start, settings in SHORTER.items():
            if command.startswith(start):
                arguments += settings
        if command.startswith("mmgem train --config configs/quickstart.yaml"):
            arguments.append("run=runs/new")
        assert main(arguments) == 0, command
    assert (checkout / "runs/new/model/model.safetensors").is_file()
    assert (checkout / "runs/quickstart/report/report.html").is_file()
    assert (checkout / "runs/flickr8k/report/report.html").is_file()
    assert (checkout / "vectors.npz").is_file()
    (several,) = commands("torchrun")
    (checkout / "train.py").symlink_to(ROOT / "train.py")
    settings = SHORTER["mmgem train --config configs/flickr8k.yaml"]
    ranks = [sys.executable, "-m", "torch.distributed.run", *shlex.split(several)[1:], *settings]
    done = subprocess.run(ranks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (checkout / "runs/2/model/model.safetensors").is_file()


def test_python_example_runs_as_printed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "torch.Size" in out and "tensor(" in out


def test_quickstart_target_is_what_the_readme_says() -> None:
    recipe = (ROOT / "Makefile").read_text().split("quickstart: venv")[1].split("\n\n")[0]
    for command in commands()[:3]:
        assert command.removeprefix("mmgem ") in recipe.replace(" --overwrite", ""), command


def test_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
