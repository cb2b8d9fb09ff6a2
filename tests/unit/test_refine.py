"""Refining raw pairs: reading them, the gate, what becomes of each kind of sample, duplicates, and bad input."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from eval_standin import COLOURS, colour_vector
from PIL import Image

from mmgem.cli import main
from mmgem.data.scene_from_text import scene_from_text
from mmgem.data.scene_truth import is_true
from mmgem.data.scenes import iter_scenes
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.negatives import negatives_of, words_of
from mmgem.refine import run as refine_run
from mmgem.refine.encoders import Tower, _timm, half_of, make_encoders
from mmgem.refine.gate import Gate
from mmgem.refine.makers import Written, make_captioner, make_painter
from mmgem.refine.page import judged, threshold_table, thresholds
from mmgem.refine.raw import units
from mmgem.refine.run import FOLDER, Settings, refine, table
from mmgem.refine.work import Outcome, Rules, read_outcomes, unit_file


class Colours:
    """An encoder that knows colours: of a picture the mean, of a text the one it names first."""

    def __init__(self, name: str = "mmgem:colours", blur: float = 0.0):
        self.name, self.blur = name, blur

    def pictures(self, images: Sequence[Image.Image], keys: Sequence[str]) -> torch.Tensor:
        pixels = [np.asarray(image.resize((1, 1), Image.Resampling.BOX), np.float32)[0, 0] for image in images]
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(pixels)) / 127.5 - 1 + self.blur, dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        named = [next((w for w in text.split() if w in COLOURS), "black") for text in texts]
        return torch.nn.functional.normalize(torch.stack([colour_vector(name) for name in named]), dim=1)


class Names:
    """A captioner that says the colour, of a red picture nothing, and of a blue one always the same wrong text."""

    name = "mmgem:names"

    def captions(self, images: Sequence[Image.Image]) -> list[Written]:
        def nearest(image: Image.Image) -> str:
            mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX), np.float32)[0, 0]
            return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))

        said = [nearest(image) for image in images]
        texts = ["" if name == "red" else "a green thing" if name == "blue" else f"a {name} thing" for name in said]
        return [Written(text, -3.0 if "yellow" in text else -1.0) for text in texts]


class Paints:
    name = "paints"

    def pictures(self, texts: Sequence[str]) -> list[Image.Image | None]:
        named = [next((w for w in text.split() if w in COLOURS), None) for text in texts]
        return [Image.new("RGB", (20, 20), COLOURS[name]) if name else None for name in named]


def drawn(name: str, size: tuple[int, int] = (20, 20), mark: int = 0) -> bytes:
    """mark: draws a pattern that makes it a picture of its own."""
    image = Image.new("RGB", size, COLOURS[name])
    for n in range(12):
        if mark >> n & 1:
            image.paste(
                tuple(max(c - 60, 0) for c in COLOURS[name]), (n % 4 * 5, n // 4 * 5, n % 4 * 5 + 5, n // 4 * 5 + 5)
            )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty good pairs, and one of each kind of trouble."""
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "a.tar", "w") as tar:
        for n in range(40):
            name = ("red", "green", "blue", "yellow", "cyan")[n % 5]
            add(tar, f"p{n:02d}.png", drawn(name, mark=n + 1))
            add(
                tar,
                f"p{n:02d}.json",
                json.dumps({"caption": f"a {name} thing", "url": "x", "truth": {f"a {name} thing": True}}),
            )
    with tarfile.open(raw / "b.tar", "w") as tar:
        add(tar, "wrong.png", drawn("yellow", mark=2**11 - 1))
        add(
            tar,
            "wrong.json",
            json.dumps({"captions": ["a blue thing", "a cyan  thing"], "truth": {"a blue thing": False}}),
        )
        add(tar, "half.png", drawn("cyan", mark=1365))
        add(tar, "half.json", json.dumps({"captions": ["a cyan thing", "a red thing"]}))
        add(tar, "silent.png", drawn("red", mark=99))
        add(tar, "silent.txt", "a green thing")
        add(tar, "same.png", drawn("blue", mark=77))
        add(tar, "same.txt", "a green thing")
        add(tar, "image.png", drawn("green", mark=512))
        add(tar, "text.txt", "a yellow thing")
        add(tar, "nothing.txt", "what a thing")
        add(tar, "short.png", drawn("red", mark=3))
        add(tar, "short.txt", "red")
        add(tar, "broken.png", b"no picture")
        add(tar, "broken.txt", "a red thing")
        add(tar, "narrow.png", drawn("red", (200, 20)))
        add(tar, "narrow.txt", "a red thing")
        add(tar, "again.png", drawn("green", mark=2))
        add(tar, "again.txt", "a green thing")
        add(tar, "empty.txt", "  ")
    return raw


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_run, "make_encoders", lambda names, device: [Colours(name) for name in names])
    monkeypatch.setattr(refine_run, "make_captioner", lambda *_: Names())
    monkeypatch.setattr(refine_run, "make_painter", lambda *_: Paints())


WHOLE = Settings(("mmgem:colours",), threshold=1.0, captioner="mmgem:names", painter="paints")


def outcomes(out: Path, source: Path) -> dict[str, Outcome]:
    return {o.key: o for unit in units(source) for o in read_outcomes(unit_file(out / FOLDER, unit))}


def test_what_becomes_of_each(source: Path, shop: None, tmp_path: Path) -> None:
    result = refine(source, tmp_path / "out", WHOLE)
    found = outcomes(tmp_path / "out", source)
    assert {key: (o.fate, o.why) for key, o in found.items() if not key.startswith("p")} == {
        "wrong": ("repaired", ""),
        "half": ("kept", ""),
        "silent": ("dropped", "captioner wrote nothing"),
        "same": ("dropped", "captioner wrote the same text"),
        "image": ("captioned", ""),
        "text": ("painted", ""),
        "nothing": ("dropped", "painter drew nothing"),
        "short": ("dropped", "captioner wrote nothing"),
        "broken": ("dropped", "picture unreadable"),
        "narrow": ("dropped", "picture too narrow"),
        "again": ("kept", ""),
    }
    assert all(o.fate == "kept" for key, o in found.items() if key.startswith("p"))
    assert (result["in"], result["kept"], result["repaired"], result["captioned"], result["painted"]) == (
        51,
        41,
        1,
        1,
        1,
    )
    assert result["why"]["duplicate"] == 1 and result["dropped"] == 7 and result["out"] == 44
    assert result["in"] == result["out"] + result["dropped"]
    assert "repaired            1" in table(result)

    split = ShardedDataset(tmp_path / "out/train", verify=True)
    samples = {split.sample(n).key: split.sample(n) for n in range(len(split))}
    assert len(samples) == 44
    wrong, half, text = samples["b_wrong"], samples["b_half"], samples["b_text"]
    assert wrong.captions == ("a yellow thing",) and wrong.meta["refine"]["made_by"] == "mmgem:names"
    assert [left for left, _ in wrong.meta["refine"]["left_out"]] == ["a blue thing", "a cyan thing"]
    assert half.captions == ("a cyan thing",) and [t for t, _ in half.meta["refine"]["left_out"]] == ["a red thing"]
    assert text.meta["refine"]["made_by"] == "paints" and text.meta["refine"]["fate"] == "painted"
    assert samples["a_p00"].meta["url"] == "x" and samples["a_p00"].image == drawn("red", mark=1)
    page = (tmp_path / "out/refine.html").read_text()
    assert "Text written anew" in page and "Picture drawn" in page and "<script" not in page


def test_what_the_captioner_is_not_sure_of(source: Path, shop: None, tmp_path: Path) -> None:
    result = refine(source, tmp_path / "out", replace(WHOLE, sure=0.1))  # exp(-3) is less, exp(-1) more
    found = outcomes(tmp_path / "out", source)
    assert (found["wrong"].fate, found["wrong"].why, found["wrong"].log_p) == ("dropped", "captioner was not sure", -3)
    assert (found["image"].fate, found["image"].log_p) == ("captioned", -1) and result["repaired"] == 0
    assert result["why"]["captioner was not sure"] == 1 and result["why"]["captioner wrote nothing"] == 2


def test_a_source_is_not_changed_and_work_is_not_done_again(source: Path, shop: None, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    result = refine(source, tmp_path / "out", WHOLE)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert refine(source, tmp_path / "out", WHOLE) == result
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert before == {file.name: file.read_bytes() for file in source.iterdir()}
    first = {f.name: f.read_bytes() for f in (tmp_path / "out/train").rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=r"holds work of other settings \(threshold\); name another --out"):
        refine(source, tmp_path / "out", replace(WHOLE, threshold=0.5))
    # The second unit and the split are lost; the first unit is not read again, whatever its tar now holds.
    shutil.rmtree(tmp_path / "out/train")
    unit_file(tmp_path / "out" / FOLDER, units(source)[1]).unlink()
    refine(source, tmp_path / "out", WHOLE)
    assert first == {f.name: f.read_bytes() for f in (tmp_path / "out/train").rglob("*") if f.is_file()}


def test_without_makers_nothing_is_made(source: Path, shop: None, tmp_path: Path) -> None:
    result = refine(source, tmp_path / "out", replace(WHOLE, captioner=None, painter=None, duplicates=2.0))
    assert (result["kept"], result["repaired"], result["captioned"], result["painted"]) == (42, 0, 0, 0)
    assert result["why"] == {
        "wrong pair": 3,
        "no picture": 2,
        "no text": 2,
        "picture unreadable": 1,
        "picture too narrow": 1,
    }


def test_all_dropped_is_an_error_that_shows_where_to_look(source: Path, shop: None, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of 51 samples passes the gate; look at .*refine.html, lower --threshold"
    ):
        refine(source, tmp_path / "out", Settings(("mmgem:colours",), threshold=99.0))
    assert "Just not" in (tmp_path / "out/refine.html").read_text()


def test_two_encoders_and_how_they_combine(source: Path, shop: None, tmp_path: Path) -> None:
    wrong = np.array([[0.0, 0.2, -0.2, 0.1, -0.1, 0.0, 0.3, -0.3], [0.5] * 4 + [0.7] * 4])
    gate = Gate.of_wrong_pairs(["a", "b"], wrong, "min", 2.0)
    assert gate.mean == pytest.approx((0.0, 0.6)) and gate.deviation == pytest.approx((wrong[0].std(), 0.1))
    pairs = np.array([[wrong[0].std() * 3], [0.7]])
    assert gate.scores(pairs) == pytest.approx([1.0]) and replace(gate, combine="mean").scores(pairs) == pytest.approx(
        [2.0]
    )
    assert Gate.from_json(json.loads(json.dumps(gate.to_json()))) == gate
    with pytest.raises(UserError, match="7 pairs are too few to tell right from wrong"):
        Gate.of_wrong_pairs(["a"], wrong[:1, :7], "min", 2.0)


def test_thresholds_with_labels(source: Path, shop: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    refine(source, out, WHOLE)
    pairs = judged(units(source), out / FOLDER, "truth")
    assert sum(p.right is True for p in pairs) == 40 and sum(p.right is False for p in pairs) == 1
    rows = thresholds(pairs, 1.0)
    (chosen,) = (row for row in rows if row["chosen"])
    assert (chosen["precision"], chosen["recall"], chosen["found"]) == (1.0, 1.0, 1.0)
    assert rows[0]["kept"] >= rows[-1]["kept"] and "wrong found" in threshold_table(rows)
    capsys.readouterr()
    assert main(["refine", "thresholds", str(out), "--labels", "truth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert main(["refine", "thresholds", str(out), "--labels", "nosuch"]) == 2
    assert "--labels nosuch: no record has this field" in capsys.readouterr().err
    assert main(["refine", "thresholds", str(tmp_path / "none")]) == 2
    assert "refine.json: no such file" in capsys.readouterr().err


def test_a_folder_of_files_is_read_as_tars_are(source: Path, tmp_path: Path) -> None:
    for tar in source.glob("*.tar"):
        with tarfile.open(tar) as opened:
            opened.extractall(tmp_path / "files" / tar.stem, filter="data")
    both = [[raw for unit in units(place) for raw in unit.read()] for place in (source, tmp_path / "files")]
    of_tars = {f"{unit.name}/{raw.key}": raw for unit in units(source) for raw in unit.read()}
    for raw in both[1]:
        other = of_tars[raw.key]
        assert (raw.image, raw.texts, raw.meta) == (other.image, other.texts, other.meta)
    assert len(both[1]) == len(of_tars)
    assert len(both[0]) == 51  # empty.txt is none


def test_a_tower_learns_what_texts_say_and_judges_no_pair_it_has_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [f"k{n}" for n in range(600)]
    texts = torch.nn.functional.normalize(torch.randn(600, 6, generator=generator), dim=1)
    features = torch.cat([texts @ torch.randn(6, 12, generator=generator), torch.ones(600, 1)], dim=1)
    noisy = texts[torch.randperm(600, generator=generator)]
    mixed = torch.where(torch.rand(600, 1, generator=generator) < 0.3, noisy, texts)
    tower = Tower("timm:x", None, None, Colours())
    tower.fit(features, mixed, keys)
    halves = torch.tensor([half_of(key) for key in keys])
    assert 250 < int(halves.sum()) < 350
    assert tower.heads is not None
    for half, head in enumerate(tower.heads):
        seen = features[halves == half] @ head
        cosines = torch.nn.functional.cosine_similarity(seen, texts[halves == half])
        assert float(cosines.mean()) > 0.95
    with pytest.raises(UserError, match="3 pairs are too few to fit its head on"):
        tower.fit(features[:3], texts[:3], keys[:3])


def test_a_tower_takes_settings_and_a_checkpoint_with_its_classifier(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("mobilenetv2_035", num_classes=7, pad_type="same").half()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    name = f"timm:mobilenetv2_035?pad_type=same&mean=[.5,.5,.5]&std=[.5,.5,.5]:{tmp_path}/weights.safetensors"
    reads = Colours()
    tower = _timm(name, name.removeprefix("timm:"), [reads], "cpu")
    assert isinstance(tower, Tower) and tower.reads is reads
    (features,) = tower.features([Image.new("RGB", (40, 30), COLOURS["red"])])
    with torch.inference_mode():
        pixels = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 224, 224)
        wanted = model.float().eval().forward_head(model.forward_features(pixels), pre_logits=True)[0]
    assert torch.allclose(features[:-1], wanted, atol=1e-4) and features[-1] == 1
    for query, message in (("?pad", "bad query field"), ("?nosuch=1", "unexpected keyword argument 'nosuch'")):
        with pytest.raises(UserError, match=message):
            _timm("timm", f"mobilenetv2_035{query}:{tmp_path}/weights.safetensors", [reads], "cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        _timm("timm", f"resnet10t:{tmp_path}/weights.safetensors", [reads], "cpu")


def test_scenes_are_drawn_that_say_what_their_text_says() -> None:
    drawn_scenes = 0
    for scene in iter_scenes(4, "train", 12):
        for caption in scene.captions:
            image = scene_from_text(caption)
            assert image is not None and image.size == (112, 112), caption
            assert image.tobytes() == scene_from_text(caption).tobytes()  # type: ignore[union-attr]
            drawn_scenes += 1
    assert drawn_scenes == 60
    assert scene_from_text("a dog runs") is None and scene_from_text("") is None


def test_captions_are_true_of_their_own_scene_and_of_no_other() -> None:
    before: tuple[str, ...] = ()
    rng = Random(0)
    frequency = words_of(text for scene in iter_scenes(8, "train", 60) for text in scene.captions)
    denied = []
    for scene in iter_scenes(9, "train", 40):
        boxes = [region.box for region in scene.regions]
        assert [is_true(text, scene.meta, boxes, 112) for text in scene.captions] == [True] * 5
        assert not any(is_true(text, scene.meta, boxes, 112) for text in before)
        before = scene.captions
        for caption in scene.captions:
            made = negatives_of(caption, ["colour", "size", "swap", "borrow"], rng, 4, scene.captions, frequency)
            denied += [is_true(one.text, scene.meta, boxes, 112) for one in made]
    # Attributes that change places may come to where they are true as well: "a small ball" of two alike.
    assert len(denied) > 300 and denied.count(False) / len(denied) > 0.9
    assert is_true("a dog runs", scene.meta, boxes, 112) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an encoder with --encoder"),
        (["--encoder", "clip"], "--encoder clip: give mmgem:MODEL, open_clip:NAME[:WEIGHTS] or timm:NAME[:WEIGHTS]"),
        (["--encoder", "timm:resnet10t"], "a tower reads no texts; name an mmgem or open_clip encoder beside it"),
        (["--encoder", "mmgem:nosuch"], "nosuch: no such model"),
        (["--encoder", "mmgem:x", "--sure", "1"], "--sure 1.0: a probability, at least 0 and below 1"),
        (["--encoder", "mmgem:x", "--min-words", "9", "--max-words", "3"], "--min-words 9 is above --max-words 3"),
    ],
)
def test_the_command_refuses(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["refine", str(source), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_names_of_makers_and_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--captioner blip: give mmgem:MODEL or hf:NAME"):
        make_captioner("blip")
    with pytest.raises(UserError, match="--painter x: give scenes or diffusers:NAME"):
        make_painter("x")
    with pytest.raises(UserError, match="named twice"):
        make_encoders(["mmgem:x", "mmgem:x"])
    with pytest.raises(UserError, match="no such folder"):
        units(tmp_path / "none")
    with pytest.raises(UserError, match="neither tars nor pictures"):
        units(tmp_path)
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match=r"cut.tar: .*fetch it again"):
        list(units(tmp_path)[0].read())


def test_rules() -> None:
    rules = Rules(min_words=2, max_words=3, max_aspect=2.0, min_side=10)
    assert [rules.text(t) for t in ("a", "a b", "a b c d")] == ["text too short", "", "text too long"]
    sizes = [rules.picture(Image.new("RGB", size)) for size in ((9, 30), (10, 20), (10, 21))]
    assert sizes == ["picture too small", "", "picture too narrow"]


def language(texts: Sequence[str]) -> list[str]:
    return ["fr" if "bleu" in text.split() else "en" for text in texts]


def tint(images: Sequence[Image.Image]) -> list[str]:
    means = [np.asarray(image).mean(axis=(0, 1)) for image in images]
    return ["red" if red > 2 * max(green, blue) else "other" for red, green, blue in means]


def test_classifiers_and_short_texts(source: Path, shop: None, tmp_path: Path) -> None:
    """Also of what is made: the captioner's and the painter's."""
    with tarfile.open(source / "c.tar", "w") as tar:
        add(tar, "french.png", drawn("green", mark=1000))
        add(tar, "french.txt", "un objet bleu")
        add(tar, "long.png", drawn("green", mark=2000))
        add(tar, "long.txt", "a green thing. It is green! and so green that nobody has seen the like of it")
        add(tar, "longer.png", drawn("green", mark=2100))
        add(tar, "longer.txt", "all green here. " + "so " * 30)
        add(tar, "reds.txt", "a red thing")
    rules = Rules(max_words=20, short=8)
    here = f"python:{__name__}"
    settings = replace(WHOLE, rules=rules, keep_texts=(f"{here}:language=en",), keep_pictures=(f"{here}:tint=other",))
    result = refine(source, tmp_path / "out", settings)
    found = outcomes(tmp_path / "out", source)
    assert (found["french"].fate, found["french"].texts) == ("captioned", ["a green thing"])
    assert found["french"].left == [("un objet bleu", float("-inf"))]
    assert found["long"].texts == [
        "a green thing. It is green! and so green that nobody has seen the like of it",
        "a green thing. It is green!",
    ]
    assert found["longer"].texts == ["all green here."]
    assert [found[key].fate for key in ("text", "reds")] == ["painted", "dropped"]
    reds = sum(outcome.why == f"{here}:tint: red" for outcome in found.values())
    assert reds == result["why"][f"{here}:tint: red"] > 8


def test_a_captioner_of_hugging_face(tmp_path: Path) -> None:
    """BLIP's own classes, tiny and random: what it is asked is no part of what it says."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "ball", "dog", "picture", "of"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    text = {**shape, **ids, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    tokenizer = BertTokenizerFast(vocab={w: n for n, w in enumerate(words)}, additional_special_tokens=["[DEC]"])
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path / "blip")
    images = [Image.new("RGB", (40, 30), COLOURS[name]) for name in ("red", "blue")]
    asked = make_captioner(f"hf:{tmp_path}/blip", "a picture of").captions(images)
    plain = make_captioner(f"hf:{tmp_path}/blip").captions(images)
    assert len(asked) == len(plain) == 2 and asked != plain
    texts = [said.text for said in [*asked, *plain]]
    assert all(texts[2:]) and not any("picture of" in text or "[" in text for text in texts)
    # Nearly as a model that knows nothing: of 12 words for each of "a", "of" and an unknown one, and for the end.
    assert [said.log_p for said in plain] == pytest.approx([-4 * math.log(12)] * 2, rel=0.3)
    assert [said.log_p for said in asked] == pytest.approx([-math.log(12)] * 2, rel=0.6)
    with pytest.raises(UserError, match="--captioner hf:.*nosuch: cannot be loaded"):
        make_captioner(f"hf:{tmp_path}/nosuch")
