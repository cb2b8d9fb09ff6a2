"""Published figures stand beside ours only where the protocol is theirs, and say whence they are."""

import pytest
from test_report import Page

from mmgem.evaluation.published import ALL, published
from mmgem.evaluation.report import About, render_report
from mmgem.evaluation.result import TaskResult

COCO = {"data": "coco-karpathy", "split": "test", "images": 5000, "skipped": 0, "captions_an_image": [5, 5]}
FLICKR = {**COCO, "data": "Flickr30k", "images": 1000}


def page(task, protocol, metrics):
    return Page(render_report([TaskResult(task, protocol, metrics, {}, {})], About())).text


def test_they_are_shown_with_their_source():
    text = page("retrieval", COCO, {"text_retrieval_recall@1": 0.7, "image_retrieval_recall@1": 0.5})
    assert "published: MM-GEM 0.610" in text and "published: MM-GEM 0.456" in text
    assert "2405.19333" in text and "openclip_retrieval_results.csv" in text
    assert "0.890" in page("retrieval", FLICKR, {"text_retrieval_recall@1": 0.7})
    several = {**COCO, "captions_an_image": [5, 7]}
    assert "published: MM-GEM 1.109" in page("captioning", several, {"CIDEr": 0.7, "BLEU@1": 0.5})
    assert "published" not in page("captioning", several, {"BLEU@1": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        {"data": "flickr8k"},
        {"data": "scenes"},
        {"data": None},
        {"split": "val"},
        {"images": 1000},
        {"images": 4999, "skipped": 1},
        {"captions_an_image": [1, 5]},
        {"captions_an_image": [5, 7]},
        {"captions_an_image": None},
        {"same_text_counts": True},
    ],
)
def test_they_are_not_shown_for_another_protocol(change):
    protocol = {**COCO, **change}
    assert published("retrieval", COCO) and not published("retrieval", protocol)
    text = page("retrieval", protocol, {"text_retrieval_recall@1": 0.7})
    assert "ublished" not in text


def test_they_are_fractions_of_known_metrics_with_a_source():
    for one in ALL:
        assert one.source and one.model
        for name, value in one.figures.items():
            assert 0 < value < (2 if name == "CIDEr" else 1)
    assert not published("region-retrieval", COCO) and not published("retrieval", {})
