"""What `mmgem embed` does on files: texts that are cut, samples that are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEXTS, build, cnn, model_config, sample, shared_model, write_split
from spoil import break_pictures

from mmgem.data.samples import Region, decode_image
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.inference.encode import encode_dataset
from mmgem.inference.use import embed_to_file

Capture = pytest.CaptureFixture[str]


def broken_split(folder: Path, keys: list[str]) -> Path:
    """Four samples in one tar; the pictures of these keys are no pictures any more."""
    split = write_split(folder, [sample(i) for i in range(4)])
    break_pictures(split, keys)
    return split


def test_embed_says_how_many_texts_were_cut(tmp_path: Path, capsys: Capture) -> None:
    model, file, out = shared_model(), tmp_path / "texts.txt", tmp_path / "o.npz"
    file.write_text(f"{TEXTS[2]}\n{TEXTS[0] * 9}\n")
    assert embed_to_file(model, out, images=None, texts=file, data=None) == (2, 32)
    assert capsys.readouterr().err == "1 of 2 texts were longer than the model's 16 tokens and cut\n"
    file.write_text(f"{TEXTS[2]}\n")
    embed_to_file(model, out, images=None, texts=file, data=None)
    assert capsys.readouterr().err == ""


def test_embed_counts_the_broken_samples_of_a_split(tmp_path: Path, capsys: Capture) -> None:
    split, out = broken_split(tmp_path / "split", ["key002"]), tmp_path / "o.npz"
    assert embed_to_file(shared_model(), out, images=None, texts=None, data=split) == (3, 32)
    assert np.load(out)["names"].tolist() == ["key000", "key001", "key003"]
    err = capsys.readouterr().err
    assert err.count("skipped sample key002: broken image") == 1
    assert "1 of 4 samples were broken and left out" in err


def test_embed_refuses_a_split_with_too_many_broken_samples(tmp_path: Path) -> None:
    split, out = broken_split(tmp_path / "split", ["key001", "key002"]), tmp_path / "o.npz"
    with pytest.raises(UserError, match=r"2 of 4 samples are broken.* the first: sample key001.*data prepare`"):
        embed_to_file(shared_model(), out, images=None, texts=None, data=split)
    assert not out.exists()


def test_regions_of_which_a_cropping_tower_sees_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of 80 x 60 pixels, the central square begins at 10."""
    inside, outside = Region((40.0, 10.0, 60.0, 30.0), "in view"), Region((0.0, 0.0, 9.0, 40.0), "at the side")
    samples = [sample(i, regions=(outside, inside)) for i in range(2)]
    split = ShardedDataset(write_split(tmp_path / "wide", samples))
    cropping = build(model_config(vision=cnn(resize="crop")))
    encoded = encode_dataset(cropping, split, progress=False)
    assert encoded.region_phrases == ["in view"] * 2 and encoded.regions_unseen == 2
    vectors = torch.cat(cropping.region_vectors([decode_image(split.sample(i)) for i in range(2)], [[inside.box]] * 2))
    assert torch.allclose(encoded.region_vectors_RE, vectors, atol=1e-5)
    whole = encode_dataset(shared_model(), split, progress=False)
    assert len(whole.region_phrases) == 4 and whole.regions_unseen == 0
