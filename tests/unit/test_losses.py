"""Losses against loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import positives, with_mask
from torch import Tensor

from mmgem.losses import caption, contrastive
from mmgem.losses.caption import sum_of_caption_losses
from mmgem.losses.contrastive import contrastive_loss
from mmgem.losses.pairs import find_pairs

SCALE = torch.tensor(math.log(1 / 0.07))


def vectors(x: int = 6, y: int = 9, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x, width, generator=generator), torch.randn(y, width, generator=generator) * 3


@pytest.fixture(autouse=True, params=[1 << 22, 12], ids=["one tile", "tiles of a row or two"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "TILE", request.param)


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
    assert with_mask(x_NE, y_ME, torch.eye(7).bool(), SCALE).item() == pytest.approx(clip.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, math.log(1 / 0.07), math.log(100)])
@pytest.mark.parametrize("seed", [0, 1])
def test_several_positives_are_averaged_as_by_hand(scale: float, seed: int):
    x_NE, y_ME = vectors(seed=seed)
    logit_scale = torch.tensor(scale)
    wanted = by_hand(x_NE, y_ME, MULTI, logit_scale)
    assert with_mask(x_NE, y_ME, MULTI, logit_scale).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_gradients_are_those_by_hand():
    inputs = [*vectors(), SCALE.clone()]
    ours = [t.clone().requires_grad_() for t in inputs]
    with_mask(ours[0], ours[1], MULTI, ours[2]).backward()
    reference = [t.double().requires_grad_() for t in inputs]
    by_hand(reference[0], reference[1], MULTI, reference[2]).backward()
    for found, wanted in zip(ours, reference, strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert wanted.grad.abs().max() > 1e-3
        assert torch.allclose(found.grad, wanted.grad.float(), atol=1e-5)
    assert not reference[1].grad[8].eq(0).all()  # pyright: ignore - nobody's text is still everyone's negative


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_gradcheck(kind: str):
    x_NE, y_ME = (v.double().requires_grad_() for v in vectors(width=4))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, -2.0))
    inputs = (x_NE, y_ME, scale, bias) if kind == "sigmoid" else (x_NE, y_ME, scale)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return with_mask(x, y, MULTI, scale, logit_bias=bias, kind=kind)

    assert torch.autograd.gradcheck(loss, inputs)


def test_one_positive_is_no_negative_of_another():
    """Raising the score of a pair that belongs together never raises the loss, whoever else belongs to the two."""
    x_NE = torch.eye(16, dtype=torch.float64)[:6]  # so that score ij is y's i-th coordinate
    y_ME = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    unit_ME = F.normalize(y_ME, dim=1).requires_grad_()
    with_mask(x_NE, unit_ME, MULTI, SCALE).backward()
    assert unit_ME.grad is not None
    # d loss / d y = P (Σ_i g_i x_i), P the projection off y; the coordinates past the sixth tell Σ_i g_i (x_i · y).
    along_M = -unit_ME.grad[:, 6:].mul(unit_ME[:, 6:]).sum(1) / unit_ME[:, 6:].square().sum(1)
    gradient_NM = (unit_ME.grad[:, :6] + along_M[:, None] * unit_ME[:, :6]).T
    assert (gradient_NM[MULTI] < 0).all()
    with_positive = ~MULTI & (MULTI.any(dim=1, keepdim=True) | MULTI.any(dim=0))
    assert (gradient_NM[with_positive] > 0).all()
    assert gradient_NM[3, 8].abs() < 1e-12  # two that nobody asked about


def test_without_positives_the_loss_is_nought_and_still_has_a_gradient():
    x_NE, y_ME = (v.requires_grad_() for v in vectors())
    loss = with_mask(x_NE, y_ME, torch.zeros(6, 9).bool(), SCALE)
    assert loss.item() == 0.0
    loss.backward()
    assert x_NE.grad is not None and x_NE.grad.eq(0).all() and y_ME.grad is not None


def test_without_negatives_the_loss_is_nought():
    x_NE, y_ME = (v.requires_grad_() for v in vectors())
    loss = with_mask(x_NE, y_ME, torch.ones(6, 9).bool(), SCALE)
    assert loss.item() == 0.0
    loss.backward()
    assert x_NE.grad is not None and torch.isfinite(x_NE.grad).all()


def test_it_is_computed_in_fp32_and_does_not_overflow():
    x_NE, y_ME = vectors()
    exact = with_mask(x_NE.bfloat16().float(), y_ME.bfloat16().float(), MULTI, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        half = with_mask(x_NE.bfloat16(), y_ME.bfloat16(), MULTI, SCALE)
    assert half.dtype == torch.float32 and torch.equal(half, exact)
    scale = torch.tensor(math.log(100.0))
    opposite = with_mask(x_NE, -x_NE, torch.eye(6).bool(), scale)
    assert torch.isfinite(opposite) and opposite > 100
    assert with_mask(x_NE, x_NE, torch.eye(6).bool(), scale) < 0.1
    assert torch.isfinite(with_mask(torch.zeros(6, 16), y_ME, MULTI, scale))


def test_the_length_of_a_vector_does_not_matter():
    x_NE, y_ME = vectors()
    assert torch.allclose(with_mask(x_NE * 100, y_ME / 7, MULTI, SCALE), with_mask(x_NE, y_ME, MULTI, SCALE), rtol=1e-4)


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


# --- the sigmoid loss ------------------------------------------------------------------------------------------------


def test_the_sigmoid_loss_by_hand():
    x_NE, y_ME = vectors()
    score_NM = SCALE.exp() * F.normalize(x_NE, dim=1) @ F.normalize(y_ME, dim=1).T - 3
    sign_NM = torch.where(MULTI, 1.0, -1.0)
    wanted = -F.logsigmoid(sign_NM * score_NM).sum() / 5  # one row has no positive
    found = with_mask(x_NE, y_ME, MULTI, SCALE, logit_bias=torch.tensor(-3.0), kind="sigmoid")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_sigmoid_loss_is_siglips():
    from open_clip.loss import SigLipLoss

    x_NE, y_ME = vectors(7, 7)
    theirs = SigLipLoss()(F.normalize(x_NE, dim=1), F.normalize(y_ME, dim=1), SCALE.exp(), torch.tensor(-10.0))
    bias = torch.tensor(-10.0)
    found = with_mask(x_NE, y_ME, torch.eye(7).bool(), SCALE, logit_bias=bias, kind="sigmoid")
    assert found.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_hard_negatives_are_rows_and_texts_of_nobody():
    """They stand against all queries and ask nothing themselves; a hard negative that someone did say is none."""
    x_NE, y_ME = vectors(5, 5)
    hard_x, hard_y = vectors(2, 3, seed=9)
    ids, nobody = torch.arange(5), torch.tensor([-1, -1, -1])
    texts = torch.tensor([0, 1, 2, 3, 4, 50, 51, 3])  # the last one is the fourth's own caption
    owners = torch.cat([ids, nobody])
    found = contrastive_loss(
        torch.cat([x_NE, hard_x]), torch.cat([ids, torch.tensor([-2, -3])]), torch.cat([y_ME, hard_y]), owners, texts,
        SCALE,
    )  # fmt: skip
    mask = torch.zeros(7, 7).bool()
    mask[ids, ids] = True
    wanted = by_hand(torch.cat([x_NE, hard_x]), torch.cat([y_ME, hard_y[:2]]), mask, SCALE)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


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


def test_the_first_of_each_text_stands_for_it():
    def kept(texts: Tensor) -> list[int]:
        return find_pairs(torch.tensor([1]), texts, texts).kept_m.tolist()

    assert kept(torch.tensor([7, 2**61, 7, 2**61 + 1, 2**61, 7])) == [0, 1, 3]
    assert kept(torch.tensor([], dtype=torch.long)) == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        texts = torch.randint(6, (12,), generator=generator)
        assert kept(texts) == [i for i, t in enumerate(texts) if t not in texts[:i]]


def test_stable_ids_are_large_and_stay_exact():
    """Ids are 62-bit numbers: comparing them as floats would make neighbours equal."""
    images = torch.tensor([2**61, 2**61 + 1])
    assert positives(images, images, torch.tensor([1, 2])).int().tolist() == [[1, 0], [0, 1]]
    assert positives(images, images, images + 5).int().tolist() == [[1, 0], [0, 1]]


# --- captions --------------------------------------------------------------------------------------------------------


def hidden_and_head(tokens: int = 11, words: int = 50, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, width, generator=generator)
    weight_VD, bias_V = torch.randn(words, width, generator=generator), torch.randn(words, generator=generator)
    return hidden_TD, weight_VD, bias_V, torch.randint(words, (tokens,), generator=generator)


@pytest.fixture(params=[1, 7, 1000], ids=["word by word", "parts of 7", "at once"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption, "TILE", 1)
    monkeypatch.setattr(caption, "NARROWEST", request.param)


def test_the_caption_loss_is_minus_log_p_of_the_labels(narrow: None):
    hidden_TD, weight_VD, bias_V, labels_T = hidden_and_head()
    logits_TV = hidden_TD @ weight_VD.T + bias_V
    wanted = sum(-math.log(row.softmax(0)[label]) for row, label in zip(logits_TV, labels_T, strict=True))
    assert sum_of_caption_losses(hidden_TD, weight_VD, bias_V, labels_T).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_the_caption_losses_gradients(narrow: None, smoothing: float, softcap: float | None, biased: bool):
    hidden_TD, weight_VD, bias_V, labels_T = hidden_and_head()
    inputs = [hidden_TD, weight_VD, *([bias_V] if biased else [])]
    found, wanted = ([t.double().requires_grad_() for t in inputs] for _ in range(2))
    ours = sum_of_caption_losses(found[0], found[1], found[2] if biased else None, labels_T, smoothing, softcap)
    logits_TV = F.linear(wanted[0], wanted[1], wanted[2] if biased else None)
    logits_TV = logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)
    theirs = F.cross_entropy(logits_TV, labels_T, label_smoothing=smoothing, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (ours * 0.3).backward()
    (theirs * 0.3).backward()
    for one, other in zip(found, wanted, strict=True):
        assert one.grad is not None and other.grad is not None and other.grad.abs().max() > 1e-3
        assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient(narrow: None):
    hidden_TD, weight_VD, bias_V, labels_T = hidden_and_head()
    hidden_TD.requires_grad_()
    sum_of_caption_losses(hidden_TD, weight_VD, bias_V, labels_T).backward()
    assert hidden_TD.grad is not None and weight_VD.grad is None and bias_V.grad is None


def test_captions_in_half_precision_are_summed_in_fp32():
    hidden_TD, weight_VD, bias_V, labels_T = hidden_and_head(400)
    half = sum_of_caption_losses(hidden_TD.bfloat16(), weight_VD.bfloat16(), None, labels_T)
    exact = F.cross_entropy((hidden_TD.bfloat16() @ weight_VD.bfloat16().T).float(), labels_T, reduction="sum")
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sum_of_caption_losses(hidden_TD, weight_VD, None, labels_T)
    assert cast.item() == pytest.approx(exact.item(), rel=1e-6)


def test_no_tokens_no_loss(narrow: None):
    hidden_TD, weight_VD, bias_V, labels_T = hidden_and_head(0)
    for tensor in (hidden_TD, weight_VD, bias_V):
        tensor.requires_grad_()
    loss = sum_of_caption_losses(hidden_TD, weight_VD, bias_V, labels_T)
    loss.backward()
    assert loss.item() == 0.0
    assert weight_VD.grad is not None and weight_VD.grad.eq(0).all() and bias_V.grad is not None
    assert bias_V.grad.eq(0).all()


def test_the_vocabulary_is_covered_once():
    for tokens, words in ((1, 5), (10**6, 32_000), (16_384, 151_936), (5000, 1025)):
        parts = caption.parts_of_vocabulary(tokens, words)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(words))
        assert max(part.stop - part.start for part in parts) * tokens <= max(caption.TILE, caption.NARROWEST * tokens)
