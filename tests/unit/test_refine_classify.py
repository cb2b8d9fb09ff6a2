"""Classifiers by which texts and pictures are left out of a refinement: of Hugging Face, of one's own, and none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eval_standin import COLOURS
from PIL import Image

from mmgem.errors import UserError
from mmgem.refine.classify import make_classifier


def test_classifiers_of_hugging_face(tmp_path: Path) -> None:
    """Bert's and ViT's own classes, tiny and random."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertTokenizerFast,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    names = {"id2label": {0: "en", 1: "fr"}, "label2id": {"en": 0, "fr": 1}}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **shape, **names)).save_pretrained(
        tmp_path / "bert"
    )
    BertTokenizerFast(vocab={w: n for n, w in enumerate(words)}).save_pretrained(tmp_path / "bert")
    looks = {"id2label": {0: "nsfw", 1: "normal"}, "label2id": {"nsfw": 0, "normal": 1}}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape, **looks)).save_pretrained(
        tmp_path / "vit"
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    for of, folder, items, labels in (
        ("text", "bert", ["a red ball", "ball ball " * 400], ("en", "fr")),
        ("picture", "vit", [Image.new("RGB", (40, 30), COLOURS[name]) for name in ("red", "blue")], ("nsfw", "normal")),
    ):
        name = f"hf:{tmp_path}/{folder}"
        both = [make_classifier(f"{name}={label}", of).refusals(items) for label in labels]  # type: ignore[arg-type]
        for first, second in zip(*both, strict=True):  # what the one keeps, the other does not
            assert {first, second} in ({"", f"{name}: {labels[0]}"}, {"", f"{name}: {labels[1]}"})
        assert make_classifier(f"{name}={','.join(labels)}", of).refusals(items) == ["", ""]  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"the model knows no x; its labels are {', '.join(labels)}"):
            make_classifier(f"{name}=x", of)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hf:x", "--keep-text hf:x: give hf:NAME=LABEL,… or python:MODULE:FUNCTION=LABEL,…"),
        ("spacy:x=en", "give hf:NAME=LABEL"),
        ("hf:/no/such=en", "cannot be loaded"),
        ("python:nosuchmodule:f=en", "cannot be loaded"),
        ("python:json:nosuch=en", "cannot be loaded"),
        ("python:json:__name__=en", "is no function"),
    ],
)
def test_classifiers_that_are_none(asked: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_classifier(asked, "text")
    assert message in str(refused.value)


def test_a_classifier_that_gives_something_else() -> None:
    with pytest.raises(UserError, match=r"builtins:sorted: it must give a label for each of 2, and gave \[1, 2\]"):
        make_classifier("python:builtins:sorted=en", "text").refusals([2, 1])
