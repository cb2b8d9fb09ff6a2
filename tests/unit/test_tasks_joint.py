"""Tasks in which the model's parts work together: rerank (worked out by hand) and similarity maps."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_standin import ColourModel
from test_tasks import LEFT, OPTIONS, RIGHT, halves, make_sample, write_split

from mmgem.data.samples import Region
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.evaluation.result import MapExample, SearchExample
from mmgem.evaluation.run import evaluate
from mmgem.evaluation.tasks import region_retrieval, rerank, similarity_map
from mmgem.inference.encode import encode_dataset
from mmgem.phrases import head_noun

# --- rerank: two images, three captions ------------------------------------------------------------------------------

CAPTIONS = [["x"], ["y", "z"]]
TEXTS = ["x", "y", "z"]
IMAGES_2E = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
# By vector "x" is nearer to image 1 than to its own, and "z" to image 0.
TEXTS_3E = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
LOG_P = {"x": (-1.0, -5.0, -3.0), "y": (-9.0, -2.0, -3.0), "z": (-3.0, -2.0, -1.0)}
"""log p of a text given image 0, image 1, and the mean of both."""


class Judge:
    """Knows the likelihoods of the table, and writes "y" first."""

    logit_scale = torch.tensor(0.0)
    codec = SimpleNamespace(
        eos_id=99, encode=lambda texts: ([[ord(t)] for t in texts], [False] * len(texts)), max_tokens=8
    )

    def log_likelihoods(self, vectors_NE, texts, vector_P, text_P, batch_size=256):
        known = [*IMAGES_2E, IMAGES_2E.mean(dim=0)]
        column = [next(n for n, v in enumerate(known) if torch.equal(v, vectors_NE[i])) for i in vector_P.tolist()]
        found = [LOG_P[texts[t]][n] for t, n in zip(text_P.tolist(), column, strict=True)]
        return torch.tensor(found), torch.full((len(found),), 2)

    def prefix_tree(self, texts):
        return texts

    def choose(self, vectors_NE, texts, num_beams=5):
        first = torch.tensor([[1, 0, 2], [1, 2, 0]])
        rows = [first[int(v[1] == 1)] for v in vectors_NE]
        return torch.stack(rows), torch.zeros(len(rows), 3)


def encoded():
    return SimpleNamespace(
        image_vectors_NE=IMAGES_2E,
        keys=["i0", "i1"],
        captions=CAPTIONS,
        text_vectors_ME=TEXTS_3E,
        text_image=torch.tensor([0, 1, 1]),
        caption_texts=TEXTS,
        text_cut_M=torch.zeros(3, dtype=torch.bool),
        skipped=[],
        picture=None,
    )


def test_recalls_by_vector_by_likelihood_and_by_both() -> None:
    result = rerank.run(Judge(), encoded(), OPTIONS)  # pyright: ignore[reportArgumentType]
    found = {name: value for name, value in result.metrics.items() if name.endswith("@1")}
    assert found == pytest.approx(
        {
            "rerank_vector_text_retrieval_recall@1": 1 / 2,
            "rerank_likelihood_text_retrieval_recall@1": 1.0,
            "rerank_both_text_retrieval_recall@1": 1.0,
            "rerank_vector_image_retrieval_recall@1": 1 / 3,
            "rerank_likelihood_image_retrieval_recall@1": 1.0,
            "rerank_both_image_retrieval_recall@1": 1.0,
            "closed_set_text_retrieval_recall@1": 0.0,  # of image 0, for which "y" is written first
        }
    )
    assert result.metrics["closed_set_text_retrieval_recall@5"] == 1.0
    assert result.chance["rerank_vector_image_retrieval_recall@1"] == pytest.approx(1 / 2)
    assert result.chance["closed_set_text_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert result.protocol["alpha"] == 1.0 and result.protocol["candidates"] == 3
    # Without the prior image 1's "z" is as likely as its "y": both are right. Image 0 has "x".
    assert result.protocol["alpha_sweep"]["0.0"]["likelihood"] == 1.0
    assert result.items.keys() == result.metrics.keys()
    drawn = [e for e in result.examples if isinstance(e, SearchExample)]
    assert [(e.query, e.place) for e in drawn] == [("x", 1), ("y", 1), ("z", 1)]
    assert drawn[0].hits[0].image == 0 and drawn[0].hits[0].right


def test_a_right_one_that_is_no_candidate_is_a_miss_and_a_tie_is_one() -> None:
    result = rerank.run(Judge(), encoded(), replace(OPTIONS, candidates=1))  # pyright: ignore[reportArgumentType]
    assert result.metrics["rerank_likelihood_text_retrieval_recall@5"] == 1 / 2  # image 0 has only "z" to judge
    tied = rerank._Candidates(
        torch.tensor([0]),
        torch.tensor([[0, 1]]),
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([[True, False]]),
        rerank.Positives.from_lists([[0]], 7),
        torch.zeros(1, 2),
    )
    assert tied.places(tied.cosine_QK).tolist() == [1]


def test_captions_are_needed() -> None:
    nothing = encoded()
    nothing.text_vectors_ME = torch.zeros(0, 2)
    with pytest.raises(UserError, match="has no captions"):
        rerank.run(Judge(), nothing, OPTIONS)  # pyright: ignore[reportArgumentType]


# --- similarity maps -------------------------------------------------------------------------------------------------


def pointed(tmp_path, *samples):
    data = write_split(tmp_path / "data", samples)
    model = ColourModel()
    return similarity_map.run(model, encode_dataset(model, ShardedDataset(data / "test"), progress=False), OPTIONS)


def test_the_place_of_the_highest_cosine_hits_or_misses(tmp_path) -> None:
    result = pointed(
        tmp_path,
        # Right, wrong (the green half is the other one), and a tie of all places of which half are outside.
        make_sample("a", "red", "blue", ["-"], [Region(LEFT, "a red ball", None)]),
        make_sample("b", "green", "blue", ["-"], [Region(RIGHT, "a green ball", None)]),
        make_sample("c", "white", "white", ["-"], [Region(LEFT, "a white ball", None)]),
        # The phrase is that of two boxes, which together hold all places.
        make_sample(
            "d", "cyan", "cyan", ["-"], [Region(LEFT, "a cyan ball", None), Region(RIGHT, "the cyan ball", None)]
        ),
    )
    assert result.items["pointing_accuracy"].values_NS[:, 0].tolist() == [1, 0, 0, 1]
    assert result.metrics["pointing_accuracy"] == 0.5
    assert result.chance["pointing_accuracy"] == pytest.approx((0.5 + 0.5 + 0.5 + 1) / 4)
    assert result.metrics["pointing_centre"] == 1.0  # the middle lies on the edge of both halves
    assert result.protocol["places"] == [2, 4] and result.protocol["phrases"] == 4
    first = result.examples[0]
    assert isinstance(first, MapExample) and first.hit and first.boxes == (LEFT,)
    assert np.shape(first.scores) == (2, 4) and LEFT[0] < first.peak[0] < LEFT[2]
    assert [e.image for e in result.examples if e.kind == "worst"] == []  # all four were drawn


def test_regions_are_needed(tmp_path) -> None:
    with pytest.raises(UserError, match="has no regions"):
        pointed(tmp_path, make_sample("a", "red", "blue", ["-"]))


# --- regions among those of their own image --------------------------------------------------------------------------


def test_phrases_among_the_boxes_of_their_own_image_and_by_type(tmp_path) -> None:
    typed = {"regions": [{"types": ["people"]}, {"types": "clothing"}]}
    samples = [
        # Both right; both tie, since the halves are alike; one box alone is nothing to choose from.
        replace(make_sample("a", "red", "blue", ["-"], halves("red", "blue")), meta=typed),
        make_sample("b", "red", "red", ["-"], [Region(LEFT, "a red ball", None), Region(RIGHT, "the ball", None)]),
        make_sample("c", "red", "red", ["-"], [Region(LEFT, "a green ball", None)]),
    ]
    model, data = ColourModel(), ShardedDataset(write_split(tmp_path / "data", samples) / "test")
    encoded = encode_dataset(model, data, progress=False)
    assert encoded.region_types == [("people",), ("clothing",), (), (), ()]
    result = region_retrieval.run(model, encoded, OPTIONS)
    found = {name: value for name, value in result.metrics.items() if "in_image" in name}
    assert found == {
        "region_in_image_recall@1": 0.5,
        "region_in_image_recall@1_clothing": 1.0,
        "region_in_image_recall@1_people": 1.0,
    }
    assert result.chance["region_in_image_recall@1"] == 0.5 and result.protocol["in_image_pairs"] == 4


def test_types_stay_with_their_regions_where_some_are_not_seen(tmp_path) -> None:
    typed = {"regions": [{"types": ["people"]}, {"types": ["clothing"]}]}
    sample = replace(make_sample("a", "red", "blue", ["-"], halves("red", "blue")), meta=typed)

    class Right(ColourModel):
        def sees(self, image, box):
            return box == RIGHT

    data = ShardedDataset(write_split(tmp_path / "data", [sample]) / "test")
    encoded = encode_dataset(Right(), data, progress=False)
    assert encoded.region_boxes == [RIGHT] and encoded.region_types == [("clothing",)]


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_also_written_as_results_for_other_tools_and_by_domain(tmp_path) -> None:
    known = ({"cocoid": 7, "domain": "near"}, {"domain": "out"}, {"image_id": "x9", "domain": "out"})
    samples = [
        replace(make_sample(key, key, key, [f"a {key} ball", "ball"]), meta=meta)
        for key, meta in zip(("red", "blue", "green"), known, strict=True)
    ]
    out = tmp_path / "out"
    data = write_split(tmp_path / "data", samples)
    result = evaluate({"m": ColourModel()}, data, "test", ["captioning"], out, options=OPTIONS)["m"]["captioning"]
    assert json.loads((out / "captions.json").read_text()) == [
        {"image_id": 7, "caption": "a red ball"},
        {"image_id": "blue", "caption": "a blue ball"},
        {"image_id": "x9", "caption": "a green ball"},
    ]
    means = [result.metrics["CIDEr_near"], result.metrics["CIDEr_out"]]
    assert (means[0] + 2 * means[1]) / 3 == pytest.approx(result.metrics["CIDEr"])


def test_captions_joined_are_one_long_text(tmp_path) -> None:
    data = write_split(tmp_path / "data", [make_sample("a", "red", "blue", ["red", "blue ball"])])
    options = replace(OPTIONS, join_captions=True)
    model = ColourModel(max_tokens=2)
    result = evaluate({"m": model}, data, "test", ["retrieval"], tmp_path / "o", options=options)["m"]["retrieval"]
    assert "red blue ball" in model.texts_seen
    assert result.protocol["captions"] == 1 and result.protocol["texts_cut_share"] == 1.0
    with pytest.raises(UserError, match="--join-captions is for retrieval"):
        evaluate({"m": model}, data, "test", ["captioning"], tmp_path / "o", options=options)


def test_the_first_captions_of_each_image(tmp_path) -> None:
    samples = [make_sample("a", "red", "blue", ["red", "red ball", "blue"]), make_sample("b", "blue", "red", ["blue"])]
    data = write_split(tmp_path / "data", samples)
    for captions, joined, counted, said in ((2, False, [1, 2], "red ball"), (2, True, [1, 1], "red red ball")):
        options = replace(OPTIONS, captions=captions, join_captions=joined)
        model = ColourModel()
        result = evaluate({"m": model}, data, "test", ["retrieval"], tmp_path / "o", options=options)["m"]["retrieval"]
        assert result.protocol["captions_an_image"] == counted and said in model.texts_seen
    with pytest.raises(UserError, match="--captions is for retrieval"):
        evaluate({"m": model}, data, "test", ["captioning"], tmp_path / "o", options=replace(OPTIONS, captions=1))


@pytest.mark.parametrize(
    ("phrase", "noun"),
    [
        ("a man in a red hat", "man"), ("The old, brown dog.", "dog"), ("two dogs", "dogs"), ("up", "up"), ("!", "!"),
        ("people walking down the street", "walking"), ("a boy and a girl", "boy"), ("a group of people", "group"),
    ],
)  # fmt: skip
def test_the_head_of_a_phrase(phrase: str, noun: str) -> None:
    assert head_noun(phrase) == noun
