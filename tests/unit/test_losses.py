"""Losses against loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.caption import caption_loss
from mmgem.losses.contrastive import _one_way, contrastive_loss, first_of_each, info_nce, positives

SCALE = torch.tensor(math.log(1 / 0.07))


def vectors(x: int = 6, y: int = 9, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x, width, generator=generator), torch.randn(y, width, generator=generator) * 3


def by_hand(x_NE: Tensor, y_ME: Tensor, positive_NM: Tensor, logit_scale: Tensor) -> Tensor:
    """Each query in a loop, each of its positives against the negatives alone; in float64."""
    x_NE, y_ME = x_NE.double(), y_ME.double()
    score_NM = torch.stack([torch.stack([F.cosine_similarity(x, y, dim=0) for y in y_ME]) for x in x_NE])
    score_NM = score_NM * logit_scale.double().exp()
    total = torch.zeros((), dtype=torch.float64)
    for score, positive in ((score_NM, positive_NM), (score_NM.T, positive_NM.T)):
        queries = []
        for s, p in zip(score, positive, strict=True):
            if not p.any():
                continue
            negative = s[~p].exp().sum()
            queries.append(torch.stack([-(own.exp() / (own.exp() + negative)).log() for own in s[p]]).mean())
        if queries:
            total = total + torch.stack(queries).mean()
    return total


MULTI = torch.tensor(
    [
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],  # without a positive
        [0, 0, 1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 1, 0],  # and the last text belongs to nobody
    ]
).bool()


# --- contrastive -----------------------------------------------------------------------------------------------------


def test_with_one_positive_it_is_clips_loss():
    x_NE, y_ME = vectors(7, 7)
    logits_NM = SCALE.exp() * F.normalize(x_NE, dim=1) @ F.normalize(y_ME, dim=1).T
    labels = torch.arange(7)
    clip = F.cross_entropy(logits_NM, labels) + F.cross_entropy(logits_NM.T, labels)
    assert info_nce(x_NE, y_ME, torch.eye(7).bool(), SCALE).item() == pytest.approx(clip.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, math.log(1 / 0.07), math.log(100)])
@pytest.mark.parametrize("seed", [0, 1])
def test_several_positives_are_averaged_as_by_hand(scale: float, seed: int):
    x_NE, y_ME = vectors(seed=seed)
    logit_scale = torch.tensor(scale)
    wanted = by_hand(x_NE, y_ME, MULTI, logit_scale)
    assert info_nce(x_NE, y_ME, MULTI, logit_scale).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_gradients_are_those_by_hand():
    inputs = [*vectors(), SCALE.clone()]
    ours = [t.clone().requires_grad_() for t in inputs]
    info_nce(ours[0], ours[1], MULTI, ours[2]).backward()
    reference = [t.double().requires_grad_() for t in inputs]
    by_hand(reference[0], reference[1], MULTI, reference[2]).backward()
    for found, wanted in zip(ours, reference, strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert wanted.grad.abs().max() > 1e-3
        assert torch.allclose(found.grad, wanted.grad.float(), atol=1e-5)
    assert not reference[1].grad[8].eq(0).all()  # pyright: ignore - nobody's text is still everyone's negative


def test_gradcheck():
    score_NM = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: _one_way(s, MULTI), (score_NM,))


def test_one_positive_is_no_negative_of_another():
    """Raising the score of a pair that belongs together never raises the loss, whoever else belongs to the two."""
    score_NM = torch.randn(6, 9, generator=torch.Generator().manual_seed(4)).mul(3).requires_grad_()
    (_one_way(score_NM, MULTI) + _one_way(score_NM.T, MULTI.T)).backward()
    assert score_NM.grad is not None
    assert (score_NM.grad[MULTI] < 0).all()
    with_positive = ~MULTI & (MULTI.any(dim=1, keepdim=True) | MULTI.any(dim=0))
    assert (score_NM.grad[with_positive] > 0).all()
    assert (score_NM.grad[3, 8] == 0).all()  # two that nobody asked about


def test_without_positives_the_loss_is_nought_and_still_has_a_gradient():
    x_NE, y_ME = (v.requires_grad_() for v in vectors())
    loss = info_nce(x_NE, y_ME, torch.zeros(6, 9).bool(), SCALE)
    assert loss.item() == 0.0
    loss.backward()
    assert x_NE.grad is not None and x_NE.grad.eq(0).all() and y_ME.grad is not None


def test_without_negatives_the_loss_is_nought():
    x_NE, y_ME = (v.requires_grad_() for v in vectors())
    loss = info_nce(x_NE, y_ME, torch.ones(6, 9).bool(), SCALE)
    assert loss.item() == 0.0
    loss.backward()
    assert x_NE.grad is not None and torch.isfinite(x_NE.grad).all()


def test_it_is_computed_in_fp32_and_does_not_overflow():
    x_NE, y_ME = vectors()
    exact = info_nce(x_NE.bfloat16().float(), y_ME.bfloat16().float(), MULTI, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        half = info_nce(x_NE.bfloat16(), y_ME.bfloat16(), MULTI, SCALE)
    assert half.dtype == torch.float32 and torch.equal(half, exact)
    scale = torch.tensor(math.log(100.0))
    opposite = info_nce(x_NE, -x_NE, torch.eye(6).bool(), scale)
    assert torch.isfinite(opposite) and opposite > 100
    assert info_nce(x_NE, x_NE, torch.eye(6).bool(), scale) < 0.1
    assert torch.isfinite(info_nce(torch.zeros(6, 16), y_ME, MULTI, scale))


def test_the_length_of_a_vector_does_not_matter():
    x_NE, y_ME = vectors()
    assert torch.allclose(info_nce(x_NE * 100, y_ME / 7, MULTI, SCALE), info_nce(x_NE, y_ME, MULTI, SCALE), rtol=1e-4)


def test_a_text_said_of_many_counts_once():
    x_NE, y_ME = vectors(6, 6)
    entities, phrases = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 8, 7, 9, 7, 8])
    y_ME = y_ME[[0, 1, 0, 3, 0, 1]]
    ours = contrastive_loss(x_NE, entities, y_ME, entities, phrases, SCALE)
    wanted = by_hand(x_NE, y_ME[[0, 1, 3]], phrases[:, None] == torch.tensor([7, 8, 9]), SCALE)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    more = contrastive_loss(
        x_NE,
        entities,
        torch.cat([y_ME, y_ME[:1]]),
        torch.cat([entities, entities[:1]]),
        torch.cat([phrases, phrases[:1]]),
        SCALE,
    )
    assert more.item() == pytest.approx(ours.item(), rel=1e-6)


# --- who belongs to whom ---------------------------------------------------------------------------------------------


def test_captions_of_one_image_and_equal_captions_belong_together():
    images = torch.tensor([10, 20, 30])
    owners = torch.tensor([10, 10, 20, 30, 30])
    texts = torch.tensor([1, 2, 3, 2, 4])  # 10 and 30 share a caption
    assert positives(images, owners, texts).int().tolist() == [
        [1, 1, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 0, 1, 1],
    ]


def test_boxes_of_one_entity_and_equal_phrases_belong_together():
    entities = torch.tensor([1, 1, 2, 3])  # two boxes mean the same thing
    phrases = torch.tensor([7, 8, 8, 9])  # one phrase is said of two things
    assert positives(entities, entities, phrases).int().tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 0],  # nobody said 7 of the third box
        [0, 0, 0, 1],
    ]


def test_one_image_twice_in_a_batch():
    images = torch.tensor([5, 5, 6])
    assert positives(images, images, torch.tensor([1, 2, 3])).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_positives_by_hand():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        images, owners, texts = (torch.randint(6, (n,), generator=generator) for n in (7, 12, 12))
        wanted = [
            [any(owners[k] == image and texts[k] == texts[m] for k in range(12)) for m in range(12)] for image in images
        ]
        assert positives(images, owners, texts).tolist() == wanted


def test_first_of_each_text():
    assert first_of_each(torch.tensor([7, 2**61, 7, 2**61 + 1, 2**61, 7])).tolist() == [0, 1, 3]
    assert first_of_each(torch.tensor([], dtype=torch.long)).tolist() == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        texts = torch.randint(6, (12,), generator=generator)
        assert first_of_each(texts).tolist() == [i for i, t in enumerate(texts) if t not in texts[:i]]


def test_stable_ids_are_large_and_stay_exact():
    """Ids are 62-bit numbers: comparing them as floats would make neighbours equal."""
    images = torch.tensor([2**61, 2**61 + 1])
    assert positives(images, images, torch.tensor([1, 2])).int().tolist() == [[1, 0], [0, 1]]
    assert positives(images, images, images + 5).int().tolist() == [[1, 0], [0, 1]]


# --- captions --------------------------------------------------------------------------------------------------------


def test_the_caption_loss_is_the_mean_over_tokens():
    logits_TV = torch.randn(11, 20, generator=torch.Generator().manual_seed(0)) * 3
    labels_T = torch.arange(11) % 20
    wanted = sum(-math.log(row.softmax(0)[label]) for row, label in zip(logits_TV, labels_T, strict=True)) / 11
    assert caption_loss(logits_TV, labels_T).item() == pytest.approx(wanted, rel=1e-5)
    # Of tokens, not of captions: two pieces count by their lengths.
    pieces = 3 / 11 * caption_loss(logits_TV[:3], labels_T[:3]) + 8 / 11 * caption_loss(logits_TV[3:], labels_T[3:])
    assert pieces.item() == pytest.approx(wanted, rel=1e-5)


def test_label_smoothing():
    logits_TV, labels_T = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])
    log_p = logits_TV.log_softmax(dim=1)
    wanted = -(0.9 * log_p[range(5), labels_T] + 0.1 * log_p.mean(dim=1)).mean()
    assert caption_loss(logits_TV, labels_T, 0.1).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_captions_in_half_precision_are_summed_in_fp32():
    logits_TV, labels_T = (torch.randn(400, 50) * 5).bfloat16(), torch.arange(400) % 50
    assert torch.equal(caption_loss(logits_TV, labels_T), caption_loss(logits_TV.float(), labels_T))
    assert caption_loss(logits_TV, labels_T).dtype == torch.float32


def test_no_tokens_no_loss():
    logits_TV = torch.zeros(0, 8, requires_grad=True)
    loss = caption_loss(logits_TV, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and logits_TV.grad is not None
