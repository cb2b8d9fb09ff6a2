"""Rule-made hard negatives: what each rule makes of a text, and what is made of samples and pictures in training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_tasks import make_sample

from mmgem.cli import main
from mmgem.config import DataConfig, NegativesConfig, StageConfig
from mmgem.data.batch import Item
from mmgem.data.datamodule import Reader
from mmgem.data.others import Others, shuffled_patches, stored_negatives
from mmgem.data.prepare.scenes import prepare_scenes
from mmgem.data.scene_edit import edited_scene
from mmgem.data.scenes import iter_scenes
from mmgem.data.shards import ShardedDataset
from mmgem.data.sources import Sources
from mmgem.errors import UserError
from mmgem.evaluation.layouts.composition import read_composition
from mmgem.images import Preprocess
from mmgem.negatives import COLOURS, KINDS, negatives_of, words_of
from mmgem.refine.negatives import LanguageModel, add_negatives, make_maker
from mmgem.text import train_tokenizer


def made(text: str, kind: str, tries: int = 40, **options: object) -> set[str]:
    """All that the rule makes in so many tries."""
    rng = Random(0)
    found = [negatives_of(text, [kind], rng, **options) for _ in range(tries)]  # type: ignore[arg-type]
    assert all(one.kind == kind for some in found for one in some)
    return {one.text for some in found for one in some}


@pytest.mark.parametrize(
    ("kind", "text", "among"),
    [
        ("colour", "A red ball.", {"A blue ball.", "An orange ball."}),
        ("size", "a small dog", {"a large dog"}),
        ("count", "Two dogs run", {"Three dogs run", "Four dogs run"}),
        ("relation", "a cat to the left of a dog", {"a cat to the right of a dog"}),
        ("relation", "Above a cube there is a ball", {"Below a cube there is a ball"}),
        ("verb", "a man sitting down", {"a man running down"}),
        ("swap", "a red cube and a blue ball", {"a blue cube and a red ball"}),
        ("swap", "an orange cube with a red ball", {"a red cube with an orange ball"}),
        (
            "leak",
            "an orange cube with a red ball",
            {"a red cube with a red ball", "an orange cube with an orange ball"},
        ),
        ("exchange", "A man is behind a big dog .", {"A big dog is behind a man ."}),
        ("exchange", "a cube above the ball, on sand", {"the ball above a cube, on sand"}),
        ("negation", "a dog with a ball", {"a dog without a ball"}),
        ("negation", "a cube but no ball", {"a cube and a ball"}),
        ("negation", "a dog is running", {"a dog is not running"}),
        ("object", "A red cube.", {"A red ball.", "A red cone."}),
        ("object", "two men with a hat", {"two women with a hat", "two men with a helmet"}),
        ("object", "Dogs chase the puppy", {"Dogs chase the horse", "Dogs chase the bird"}),
        ("shuffle", "one two three four five", {"four five one two three"}),
    ],
)
def test_each_rule(kind: str, text: str, among: set[str]) -> None:
    found = made(text, kind)
    assert among <= found
    assert text not in found


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("colour", "a dog"), ("size", "a dog"), ("count", "a dog"), ("count", "one dog"), ("relation", "a dog"),
        ("verb", "a building"), ("swap", "a black and white dog"), ("swap", "a red cube and a red ball"),
        ("leak", "a red ball and a cube"), ("swap", "a matte cube on dark sand"),
        ("leak", "a young man in a striped shirt"),
        ("swap", "two dogs, one black and one white"), ("exchange", "a cube and a ball"),
        ("exchange", "a cube with a ball"), ("exchange", "a cube at the top"), ("negation", "a dog"),
        ("object", "people cross the street light"), ("object", "a guitar player"), ("object", ""),
        ("shuffle", "a small dog"), ("shuffle", ""),
    ],
)  # fmt: skip
def test_nothing_where_nothing_can_be_changed(kind: str, text: str) -> None:
    assert made(text, kind) == set()


def test_words_of_the_picture_and_words_that_are_never_used_are_not_put_in() -> None:
    every = made("a red ball", "colour", 300)
    assert len(every) == len(COLOURS) - 1
    assert "a blue ball" not in made("a red ball", "colour", 300, captions=["a blue box"])
    frequency = words_of(["green grass", "green and blue", "green"])
    assert made("a red ball", "colour", 300, frequency=frequency) == {"a green ball", "a blue ball"}
    rng = Random(0)
    drawn = [negatives_of("a red ball", ["colour"], rng, frequency=frequency)[0].text for _ in range(400)]
    assert drawn.count("a green ball") == pytest.approx(300, abs=40)


def test_no_noun_is_put_in_for_which_the_picture_has_another_name() -> None:
    assert made("a man", "object", captions=["a man", "two ladies"]) == set()
    assert made("a man", "object", captions=["a man", "two people"]) == {"a woman"}
    frequency = words_of(["some dogs, a cat and two ponies"])
    assert made("a bird", "object", frequency=frequency) == {"a cat"}
    assert made("the birds", "object", frequency=words_of(["dogs run"])) == {"the dogs"}


@pytest.mark.parametrize(
    ("text", "other", "among"),
    [
        ("a red cube", "a blue ball above the red cube", {"a blue cube"}),
        ("A red cube.", "an orange ball", {"An orange cube."}),
        (
            "a red cube and a tall cone",
            "a small dog and a green ball",
            {"a green cube and a tall cone", "a red cube and a small cone"},
        ),
        ("a cat", "a black and white dog and a brown cat", set()),
        ("a brown cat", "a black and white dog", {"a black cat", "a white cat"}),
        # What another caption says of the same thing, in the plural, too; what has no noun; what the text itself says.
        ("a red cube", "three blue cubes", set()),
        ("a red cube", "a ball that is blue", set()),
        ("a red cube and a blue ball", "the blue ball", set()),
    ],
)
def test_what_is_borrowed_is_of_another_thing_of_the_picture(text: str, other: str, among: set[str]) -> None:
    assert made(text, "borrow", captions=[text, other]) == among
    assert made(text, "borrow") == set()


def test_several_are_of_different_kinds_and_seeded() -> None:
    text = "Two small red cubes to the left of a blue ball with a dog"
    found = negatives_of(text, list(KINDS), Random(1), count=5)
    assert len({one.kind for one in found}) == 5 and len({one.text for one in found}) == 5
    assert found == negatives_of(text, list(KINDS), Random(1), count=5)
    assert len(negatives_of("a red ball", ["colour"], Random(0), count=3)) == 3
    with pytest.raises(UserError, match="unknown kind of negative 'color'; the kinds are colour, size"):
        negatives_of("a red ball", ["color"], Random(0))


def test_on_captions_of_scenes_nothing_is_left_broken() -> None:
    rng = Random(5)
    for scene in iter_scenes(0, "train", 40):
        for caption in scene.captions:
            for one in negatives_of(caption, list(KINDS), rng, count=9):
                assert one.text.strip() == one.text and "  " not in one.text and one.text != caption
                assert one.kind == "shuffle" or not [
                    w for w in (" a orange", " an red", " a an ", " an a ") if w in f" {one.text} "
                ], one
                if one.kind in ("swap", "exchange"):
                    both = (re.findall(r"\w+", text) for text in (caption, one.text))
                    kept = [sorted(word for word in words if word not in ("a", "an")) for words in both]
                    assert kept[0] == kept[1], one


class Captions:
    """The part of Sources that counting words needs."""

    def __len__(self) -> int:
        return 3

    def captions(self, index: int) -> tuple[str, ...]:
        return ("a red ball", "a blue ball", "a green cube")[index : index + 1]


def test_texts_of_a_sample() -> None:
    wanted = NegativesConfig(texts=2, kinds=["colour"])
    sample = make_sample("a", "red", "blue", ["a red ball", "a blue thing", "here"])
    others, drawn = Others(Captions(), wanted).texts(sample, [0, 2], np.random.default_rng(0))  # type: ignore[arg-type]
    # Of the data's colours red is the caption's and blue the picture's; "here" has no colour.
    assert [(one.caption, one.text, one.picture) for one in others] == [(0, "a green ball", -1)] and not drawn
    short = Others(Captions(), NegativesConfig(texts=2, kinds=["colour"], max_words=2))  # type: ignore[arg-type]
    longer = make_sample("a", "red", "blue", ["a red ball", "red ball"])
    assert [one.caption for one in short.texts(longer, [0, 1], np.random.default_rng(0))[0]] == [1]
    assert Others(Captions(), NegativesConfig()).texts(sample, [0], np.random.default_rng(0)) == ((), [])  # type: ignore[arg-type]


def test_negatives_that_lie_with_a_sample() -> None:
    stored = [
        {"text": "a blue ball", "kind": "colour", "caption": 0},
        {"text": "no ball", "kind": "llm"},
        {"text": "x", "kind": "colour", "caption": 1},
        {"text": 3, "kind": "colour"},
        "nonsense",
    ]
    sample = make_sample("a", "red", "blue", ["a red ball", "two"])
    sample = replace(sample, meta={"negatives": stored})
    assert {n: [one.text for one in some] for n, some in stored_negatives(sample, []).items()} == {
        0: ["a blue ball", "no ball"],
        1: ["x"],
    }
    assert [one.text for one in stored_negatives(sample, ["llm"])[0]] == ["no ball"]


def test_patches_change_places_and_nothing_else() -> None:
    image = torch.arange(2 * 7 * 7, dtype=torch.float32).view(2, 7, 7)
    rng = np.random.default_rng(0)
    for _ in range(10):
        other = shuffled_patches(image, 3, rng)
        assert not torch.equal(other, image)
        assert torch.equal(other[:, :6, :6].flatten(1).sort().values, image[:, :6, :6].flatten(1).sort().values)
        assert torch.equal(other[:, 6:], image[:, 6:]) and torch.equal(other[..., 6:], image[..., 6:])
        assert {
            tuple(p.flatten().tolist()) for p in other[0, :6, :6].unfold(0, 2, 2).unfold(1, 2, 2).reshape(9, 4)
        } == {tuple(p.flatten().tolist()) for p in image[0, :6, :6].unfold(0, 2, 2).unfold(1, 2, 2).reshape(9, 4)}


# --- made once, and kept with the samples ---------------------------------------------------------


def test_negatives_are_kept_with_the_samples_and_work_is_gone_on_with(tmp_path: Path) -> None:
    prepare_scenes(tmp_path / "data", train=12, val=0, test=0, processes=1)
    before = ShardedDataset(tmp_path / "data/train")
    found = add_negatives(tmp_path / "data", tmp_path / "out", "train", kinds=["colour", "swap"], count=2)
    split = ShardedDataset(tmp_path / "out/train", verify=True)
    assert found["samples"] == len(split) == 12 and set(found["kinds"]) == {"colour", "swap"}
    made = 0
    for n in range(12):
        sample, old = split.sample(n), before.sample(n)
        assert (sample.captions, sample.regions, sample.image) == (old.captions, old.regions, old.image)
        assert sample.meta["objects"] == old.meta["objects"]
        stored = stored_negatives(sample, [])
        made += sum(map(len, stored.values()))
        assert all(0 <= caption < 5 for caption in stored)
        assert not {one.text for some in stored.values() for one in some} & set(sample.captions)
    assert made == found["negatives"] > 60
    bytes_of = {f.name: f.read_bytes() for f in (tmp_path / "out/train").rglob("*") if f.is_file()}
    shutil.rmtree(tmp_path / "out/train")
    add_negatives(tmp_path / "data", tmp_path / "out", "train", kinds=["colour", "swap"], count=2)
    assert bytes_of == {f.name: f.read_bytes() for f in (tmp_path / "out/train").rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=r"work of other settings \(count\)"):
        add_negatives(tmp_path / "data", tmp_path / "out", "train", kinds=["colour", "swap"], count=1)


def test_a_second_call_adds_to_what_lies_with_the_samples(tmp_path: Path) -> None:
    prepare_scenes(tmp_path / "data", train=12, val=0, test=0, processes=1)
    add_negatives(tmp_path / "data", tmp_path / "one", "train", kinds=["swap"], count=1, painter="scenes")
    add_negatives(tmp_path / "one", tmp_path / "two", "train", kinds=["swap", "colour"], count=2)
    add_negatives(tmp_path / "data", tmp_path / "new", "train", kinds=["swap", "colour"], count=2)
    one, two, new = (ShardedDataset(tmp_path / name / "train") for name in ("one", "two", "new"))
    for n in range(12):
        first, both, second = (split.sample(n).meta["negatives"] for split in (one, two, new))
        texts = {(made["caption"], made["text"]) for made in first}
        assert both[: len(first)] == first
        assert both[len(first) :] == [made for made in second if (made["caption"], made["text"]) not in texts]
    assert two.key(11) == two.keys[11] == new.key(11)


def test_captions_with_negatives_of_the_first_kinds_are_chosen_before_others(tmp_path: Path) -> None:
    prepare_scenes(tmp_path / "data", train=24, val=0, test=0, processes=1)
    add_negatives(tmp_path / "data", tmp_path / "out", "train", kinds=["exchange", "colour"], count=2)
    split = ShardedDataset(tmp_path / "out/train")

    def chosen(**wanted: Any) -> list[list[int]]:
        """The numbers of the captions, of each sample."""
        negatives = NegativesConfig(texts=1, source="data", **wanted)
        stage = StageConfig(samples=24, captions_per_image=2, max_regions=0, negatives=negatives)
        reader = Reader(Sources([split]), DataConfig(), stage, Preprocess(32, (0.5,) * 3, (0.5,) * 3), 0)
        found = {one.key: one.captions for one in reader.__getitems__(range(24)) if isinstance(one, Item)}
        return [[split.sample(n).captions.index(text) for text in found[split.key(n)]] for n in range(24)]

    plain, first, short = chosen(), chosen(first=["exchange"]), chosen(first=["exchange"], max_words=12)
    most = 0
    for n in range(24):
        sample = split.sample(n)
        asked = set(stored_negatives(sample, ["exchange"]))
        brief = {caption for caption in asked if len(sample.captions[caption].split()) <= 12}
        for numbers, ahead in ((first[n], asked), (short[n], brief)):
            assert sum(caption in ahead for caption in numbers) == min(len(ahead), 2)
            if not ahead or len(ahead) == 5:
                assert numbers == plain[n]
        most += len(brief) < len(asked)
    assert plain != first != short and most > 5


def test_pictures_of_negatives_and_a_benchmark_of_them(tmp_path: Path) -> None:
    prepare_scenes(tmp_path / "data", train=8, val=0, test=0, processes=1)
    kinds = ["colour", "relation"]
    found = add_negatives(
        tmp_path / "data", tmp_path / "out", "train", kinds=kinds, count=2, painter="scenes", benchmark=True
    )
    split = ShardedDataset(tmp_path / "out/train", verify=True)
    drawn = 0
    wanted = NegativesConfig(texts=2, source="data", kinds=kinds, pictures=1, drawn=True)
    others = Others(split, wanted)  # type: ignore[arg-type]
    for n in range(8):
        sample = split.sample(n)
        texts, pictures = others.texts(sample, range(5), np.random.default_rng(0))
        assert [one.picture for one in texts if one.picture >= 0] == [1 + k for k in range(len(pictures))]
        drawn += len(pictures)
        for one, picture in zip((one for one in texts if one.picture >= 0), pictures, strict=True):
            file, painted = BytesIO(), edited_scene(0, "train", n, sample.captions[one.caption], one.text)
            assert painted is not None
            painted.save(file, "JPEG", quality=95, subsampling=0)  # as the samples' own pictures are
            assert np.array_equal(np.asarray(picture), np.asarray(Image.open(file)))
        without = Others(split, replace(wanted, drawn=False)).texts(sample, range(5), np.random.default_rng(0))  # type: ignore[arg-type]
        assert not without[1] and [one.text for one in without[0]] == [one.text for one in texts]
    assert drawn == found["drawn"] > 30
    benchmark = read_composition(tmp_path / "out")["sugarcrepe"]
    assert len(benchmark.items) + benchmark.equal == found["negatives"]
    assert {item.subset for item in benchmark.items} == set(kinds)
    first = benchmark.items[0]
    assert first.pictures[0].path.read_bytes() in {split.sample(n).image for n in range(8)}
    assert first.texts[0] in split.sample(int(first.pictures[0].path.stem)).captions and first.pairs == ((0, 0),)


def test_pictures_of_negatives_that_cannot_be_read() -> None:
    for picture in ("", "no base64!", "aGVsbG8=", 5):
        stored = [{"text": "a blue ball", "kind": "colour", "picture": picture}]
        sample = replace(make_sample("a", "red", "blue", ["a red ball"]), meta={"negatives": stored})
        wanted = NegativesConfig(texts=1, source="data", drawn=True)
        texts, pictures = Others(Captions(), wanted).texts(sample, [0], np.random.default_rng(0))  # type: ignore[arg-type]
        assert [(one.text, one.picture) for one in texts] == [("a blue ball", -1)] and not pictures


def test_a_language_model_is_asked_and_its_odd_answers_are_left_out(tmp_path: Path) -> None:
    """GPT-2's own classes, tiny and random; then what it says is put in its mouth."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = train_tokenizer(["a red ball and a blue cube", "Change the caption"], 300, lowercase=True)
    tokenizer.save_pretrained(tmp_path / "gpt")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    maker = make_maker(f"hf:{tmp_path}/gpt", ["colour"], 1, "{caption}: another {kind}", 0.5, {})
    assert isinstance(maker, LanguageModel)
    written = maker._written(["a red ball", "a much longer text about a blue cube"])
    assert len(written) == 2 and all(isinstance(text, str) for text in written)
    likely = maker.log_likelihoods(["a red ball", "a"])
    assert -8 < likely[0] < 0 and likely[1] < 0

    class Says(LanguageModel):
        def _written(self, prompts: Sequence[str]) -> list[str]:
            assert prompts == ["a red ball: another colour", "a cube: another colour", "a dog: another colour"]
            return ["a blue ball", "", "zxq"]

        def log_likelihoods(self, texts: Sequence[str]) -> list[float]:
            return [-9.0 if text in ("", "zxq") else -2.0 for text in texts]

    says = Says("hf:x", None, None, ["colour"], 1, "{caption}: another {kind}")
    made = says.make(["a red ball", "a cube", "a dog"], Random(0))
    assert {n: [one.text for one in some] for n, some in made.items()} == {0: ["a blue ball"]}


def test_makers_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_scenes(tmp_path / "data", train=2, val=0, test=0, processes=1)
    capsys.readouterr()
    command = ["refine", "negatives", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--maker", "gpt"], "--maker gpt: give rules or hf:NAME"),
        (["--maker", "hf:x", "--prompt", "no place"], "--prompt: it needs {caption}"),
        (["--kinds", "color"], "--kinds: no rule makes color; the kinds are colour"),
        (["--count", "0"], "--count 0: at least 1"),
        (["--kinds", "verb"], "nothing was made of the captions"),
        (["--painter", "gan"], "--painter gan: give scenes or diffusers:NAME"),
        (["--split", "val"], "val"),
    ):
        assert main([*command, *more, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert message in said, said
