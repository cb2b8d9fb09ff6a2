"""The commands as a user types them, plain and with --json, against what the Python interface says."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, Process, Tiny, run

from mmgem import MMGem
from mmgem.cli import COMMANDS, main
from mmgem.data.shards import ShardedDataset

BOXES = [(0.0, 0.0, 64.0, 64.0), (4.0, 8.0, 40.0, 60.5), (30.0, 30.0, 33.0, 31.0)]
BOX_ARGUMENTS = [a for box in BOXES for a in ("--box", ",".join(f"{v:g}" for v in box))]


@pytest.fixture(scope="module")
def loaded(model: Path) -> MMGem:
    return MMGem.from_pretrained(model)


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """A command in this process: it must succeed; the lines it prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out.splitlines()


# --- help -----------------------------------------------------------------------------------------


def test_help_answers_in_a_second() -> None:
    script = Path(sys.executable).with_name("mmgem")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "mmgem.cli"]
    times, done = [], subprocess.CompletedProcess(command, 0, "", "")
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - start)
    assert min(times) < 1
    assert all(re.search(rf"\n    {name}\s", done.stdout) for name in COMMANDS)


PAGES = """
import contextlib, io, resource, sys
if sys.argv[1] == "mmgem":
    from mmgem.cli import main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(["--version"])
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*counts)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """The pages of a large block are faulted in once, not each time that it is asked for again."""
    faults = {}
    for who in ("python", "mmgem"):
        done = subprocess.run([sys.executable, "-c", PAGES, who], capture_output=True, text=True, check=True)
        faults[who] = [int(n) for n in done.stdout.split()]
    assert min(faults["python"][1:]) > 30 * max(1, *faults["mmgem"][1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mmgem {name}")


def test_no_command_imports_what_it_does_not_use(model: Path, picture: Path) -> None:
    """`caption` needs no training, no evaluation and no second tower library."""
    code = (
        "import sys; from mmgem.cli import main; code = main(sys.argv[1:]);"
        "print(*sorted({m.partition('.')[0] for m in sys.modules})); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "caption", "--model", str(model), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Not scipy: transformers loads it by itself where it is installed.
    heavy = {"lightning", "deepspeed", "open_clip", "webdataset", "tensorboard", "wandb", "pandas", "sklearn"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())
    assert done.stdout.splitlines()[0].startswith(f"{picture}: ")


# --- caption -----------------------------------------------------------------------------------------


def test_caption(model: Path, picture: Path, loaded: MMGem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = tmp_path / "grey and wide.png"
    Image.new("L", (90, 30), 128).save(grey)
    expected = loaded.caption([Image.open(picture), Image.open(grey).convert("RGB")])
    assert all(expected)
    plain = output(capsys, "caption", "--model", model, picture, grey)
    assert plain == [f"{picture}: {expected[0]}", f"{grey}: {expected[1]}"]
    rows = [json.loads(line) for line in output(capsys, "caption", "--model", model, "--json", picture, grey)]
    assert rows == [{"image": str(p), "caption": c} for p, c in zip((picture, grey), expected, strict=True)]


def test_caption_in_a_process(model: Path, picture: Path, loaded: MMGem) -> None:
    done = run("caption", "--model", model / "stages/fine-grained", "--json", picture)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"image": str(picture), "caption": loaded.caption([Image.open(picture)])[0]}
    assert done.err == ""


def test_ways_of_writing(model: Path, picture: Path, loaded: MMGem, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.open(picture)

    def caption(*options: str) -> str:
        return json.loads(output(capsys, "caption", "--model", model, "--json", picture, *options)[0])["caption"]

    assert caption("--beams", "3") == loaded.caption([image], num_beams=3)[0]
    reread = loaded.caption([image], num_beams=4, rerank=2.0)[0]
    assert caption("--beams", "4", "--rerank", "2") == reread
    short = caption("--max-new-tokens", "3")
    assert 0 < len(loaded.codec.encode([short])[0][0]) <= 4
    drawn = [caption("--top-p", "1.0", "--temperature", "2", "--seed", s) for s in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == loaded.caption([image], do_sample=True, temperature=2.0, seed=1)[0]


# --- regions -----------------------------------------------------------------------------------------


def test_regions_as_json(model: Path, picture: Path, loaded: MMGem, capsys: pytest.CaptureFixture[str]) -> None:
    """Many boxes at once give what `embed_regions` and `caption_regions` give, also one at a time."""
    image = Image.open(picture)
    what = ("--caption", "--embed", "--query", "a red ball")
    rows = [
        json.loads(r) for r in output(capsys, "regions", "--model", model, picture, *BOX_ARGUMENTS, *what, "--json")
    ]
    vectors_RE = loaded.embed_regions([image], [BOXES])[0]
    text_E = loaded.embed_texts(["a red ball"])[0]
    assert [row["box"] for row in rows] == [list(box) for box in BOXES]
    assert [row["caption"] for row in rows] == loaded.caption_regions([image], [BOXES])[0]
    assert torch.allclose(torch.tensor([row["vector"] for row in rows]), vectors_RE, atol=1e-6)
    assert [row["similarity"] for row in rows] == pytest.approx((vectors_RE @ text_E).tolist(), abs=1e-6)
    assert rows[0]["vector"] != rows[1]["vector"]
    for box, row in zip(BOXES, rows, strict=True):
        alone = ("--box", ",".join(map(str, box)), "--embed", "--json")
        (single,) = output(capsys, "regions", "--model", model, picture, *alone)
        assert json.loads(single)["vector"] == pytest.approx(row["vector"], abs=1e-5)
        assert "caption" not in json.loads(single)


def test_box_of_the_whole_picture_is_the_picture(model: Path, picture: Path, loaded: MMGem) -> None:
    whole = loaded.embed_regions([Image.open(picture)], [[BOXES[0]]])[0][0]
    assert torch.allclose(whole, loaded.embed_images([Image.open(picture)])[0], atol=1e-5)


def test_regions_plain(model: Path, picture: Path, loaded: MMGem, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.open(picture)
    captions = loaded.caption_regions([image], [BOXES])[0]
    shown = ["0,0,64,64", "4,8,40,60.5", "30,30,33,31"]
    lines = output(capsys, "regions", "--model", model, picture, *BOX_ARGUMENTS)
    assert lines == [f"{box}: {caption}" for box, caption in zip(shown, captions, strict=True)]
    similarity = (loaded.embed_regions([image], [BOXES])[0] @ loaded.embed_texts(["two cubes"])[0]).tolist()
    lines = output(capsys, "regions", "--model", model, picture, *BOX_ARGUMENTS, "--caption", "--query", "two cubes")
    for line, box, caption, cosine in zip(lines, shown, captions, similarity, strict=True):
        head, _, figure = line.rpartition("; similarity ")
        assert head == f"{box}: {caption}" and float(figure) == pytest.approx(cosine, abs=6e-5)
    (line,) = output(capsys, "regions", "--model", model, picture, *BOX_ARGUMENTS[:2], "--embed")
    assert line == "0,0,64,64: 32 numbers (--json prints them)"


# --- embed ---------------------------------------------------------------------------------------------


def embedded(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str | Path) -> tuple[np.ndarray, list[str]]:
    (line,) = output(capsys, "embed", *arguments, "--out", out)
    file = np.load(out)
    vectors, names = file["vectors"], file["names"].tolist()
    assert line == f"{out}: {len(vectors)} vectors of {vectors.shape[1]}"
    assert vectors.dtype == np.float32 and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert {p.name for p in out.parent.iterdir() if "unfinished" in p.name} == set()
    return vectors, names


def test_embed_texts(model: Path, loaded: MMGem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a red ball", "zwei grüne Würfel", "a small cyan star left of a big one " * 9]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    vectors, names = embedded(capsys, tmp_path / "new/out.npz", "--model", model, "--texts", file)
    assert names == [text.strip() for text in texts] or names == texts
    assert vectors == pytest.approx(loaded.embed_texts(texts).numpy(), abs=1e-6)


def test_embed_images(
    model: Path, picture: Path, loaded: MMGem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.PNG", "blue"), ("deep/c.webp", "green")):
        Image.new("RGB", (40, 20), colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    vectors, names = embedded(capsys, tmp_path / "out.npz", "--model", model, "--images", picture, folder)
    paths = [picture, folder / "a.PNG", folder / "b.png", folder / "deep/c.webp"]
    assert names == [str(p) for p in paths]
    expected = loaded.embed_images([Image.open(p).convert("RGB") for p in paths])
    assert vectors == pytest.approx(expected.numpy(), abs=1e-5)


def test_embed_a_split(
    model: Path, tiny: Tiny, loaded: MMGem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmgem.data.samples import decode_image

    vectors, names = embedded(capsys, tmp_path / "out.npz", "--model", model, "--data", tiny.data / "test")
    split = ShardedDataset(tiny.data / "test")
    assert names == split.keys
    expected = loaded.embed_images([decode_image(split.sample(i)) for i in range(len(split))])
    assert vectors == pytest.approx(expected.numpy(), abs=1e-5)


# --- search ---------------------------------------------------------------------------------------------


def test_search_finds_what_the_vectors_say(
    model: Path, loaded: MMGem, tiny: Tiny, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index.npz"
    vectors, names = embedded(capsys, index, "--model", model, "--data", tiny.data / "test")
    asked = ("search", "--model", model, "--index", index, "--text", "a red ball", "--image", picture, "-k", "3")
    rows = [json.loads(line) for line in output(capsys, *asked, "--json")]
    assert [row["query"] for row in rows] == ["a red ball", str(picture)]
    for row, query_E in zip(
        rows, [loaded.embed_texts(["a red ball"])[0], loaded.embed_images([Image.open(picture)])[0]], strict=True
    ):
        cosines = vectors @ query_E.numpy()
        best = np.argsort(-cosines)[:3]
        assert [hit["name"] for hit in row["found"]] == [names[n] for n in best]
        assert [hit["cosine"] for hit in row["found"]] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    lines = output(capsys, *asked)
    assert lines[0] == "a red ball:" and lines[1].endswith(rows[0]["found"][0]["name"]) and len(lines) == 8


# --- check, data, eval ------------------------------------------------------------------------------------


def test_check_counts_what_training_counts(model: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "check", "--config", CONFIG, f"data.path={tiny.data}")
    assert lines[0].startswith(f"data: {tiny.data}/train: 96 samples in 1 shard, ")
    assert "stage global: 25 steps of global_batch 16 = 400 samples = 4.17 epochs" in lines
    counted = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines if "parameters" in line}
    assert counted == json.loads((model / "run.json").read_text())["parameters"]
    assert "feature map: C x H x W = 32 x 4 x 4" in lines
    assert "stage fine-grained: 400 samples, global_batch 16, up to 3 regions an image, frozen: nothing" in lines


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As `mmgem check … | head -1`: the pipe is closed before all is written."""
    config = Path(__file__).parents[2] / "configs/quickstart.yaml"
    command = [sys.executable, "-m", "mmgem.cli", "check", "--config", str(config), "--no-data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait() == 141 and running.stderr.read() == ""


def test_data_prepare_in_processes(tmp_path: Path) -> None:
    counts = ["--train", "70", "--val", "0", "--test", "9", "--size", "48", "--processes", "2", "--shard-size", "40"]
    done = run("data", "prepare", "scenes", "--out", tmp_path / "made", *counts)
    assert done.code == 0, done.err
    table = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    assert table["split"] == ["read", "written", "skipped", "captions", "regions"]
    assert table["train"][:2] == ["70", "70"] and table["test"][:2] == ["9", "9"] and "val" not in table
    split = ShardedDataset(tmp_path / "made/train")
    assert len(split) == 70 and len(list((tmp_path / "made/train").glob("*.tar"))) == 2
    assert [int(n) for n in table["train"][2:]] == [0, split.totals["captions"], split.totals["regions"]]


def test_eval_compares_the_stages(model: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "run"))
    options = ("--split", "test", "--stages", "--max-new-tokens", "8")
    lines = output(capsys, "eval", "all", "--model", copy, "--data", tiny.data, *options)
    assert lines[-2:] == [f"{copy}/report/metrics.json", f"{copy}/report/report.html"]
    metrics = (copy / "report/metrics.json").read_text()
    for name in ("text_retrieval_recall@1", "CIDEr", "region_image_retrieval_recall@1", "global", "fine-grained"):
        assert name in metrics
    assert "<html" in (copy / "report/report.html").read_text()[:500]


# --- Python ------------------------------------------------------------------------------------------------


def test_the_python_interface_needs_no_training_library(model: Path, picture: Path) -> None:
    code = f"""
import sys
for missing in ("lightning", "deepspeed", "open_clip", "webdataset"):
    sys.modules[missing] = None
from PIL import Image
from mmgem import MMGem
model = MMGem.from_pretrained({str(model)!r})
image = Image.open({str(picture)!r})
box = (4, 8, 40, 60)
print(tuple(model.embed_images([image]).shape), tuple(model.embed_texts(["a", "b"]).shape))
print(tuple(model.embed_regions([image], [[box, box]])[0].shape), tuple(model.similarity_map(image, "a ball").shape))
print(len(model.caption([image])), len(model.caption_regions([image], [[box, box]])[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 32) (2, 32)", "(2, 32) (4, 4)", "1 2"]


def test_train_py_is_the_command(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "train.py"
    done = Process("--help", script=script, cwd=tmp_path).wait()
    assert done.code == 0 and done.out.startswith("usage: ") and "--resume" in done.out
