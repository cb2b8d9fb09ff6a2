"""Losses against hard negatives: each against a loop written from its formula, in float64, with its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.caption import caption_losses, sum_of_caption_losses
from mmgem.losses.negatives import (
    MOST_MARGIN,
    focal_loss,
    hard_scores,
    intra_modal_loss,
    rank_loss,
    triplet_loss,
    written_loss,
)

SCALE = torch.tensor(math.log(5.0), dtype=torch.float64)
OF = torch.tensor([0, 0, 2, 4, 4, 4, 2])
"""Whose negative each is: captions 1 and 3 have none."""
KIND = torch.tensor([0, 2, 0, 2, 0, 5, 5])


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 5, len(OF))
    return tuple(torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes)  # type: ignore[return-value]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return SCALE.exp() * F.cosine_similarity(x, y, dim=0)


def equal_with_gradients(loss: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    for found, by_hand in zip(
        torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad(wanted, inputs, allow_unused=True),
        strict=True,
    ):
        nothing = torch.zeros(())
        assert torch.allclose(nothing if found is None else found, nothing if by_hand is None else by_hand, atol=1e-12)


def test_rank_loss_with_its_margin_by_kind() -> None:
    v, t, n = given()
    gaps = [cosine(v[c], t[c]) - cosine(v[c], n[k]) for k, c in enumerate(OF.tolist())]
    margins = {}
    for kind in set(KIND.tolist()):
        own = [float(gap.detach()) for gap, k in zip(gaps, KIND.tolist(), strict=True) if k == kind]
        margins[kind] = min(max(sum(own) / len(own), 0.0), MOST_MARGIN)
    assert any(margins.values())
    terms = [F.relu(margins[kind] - gap) for gap, kind in zip(gaps, KIND.tolist(), strict=True)]
    loss = rank_loss(hard_scores(v, t, n, OF, KIND, SCALE), len(OF), kinds=6)
    equal_with_gradients(loss, torch.stack(terms).mean(), (v, t, n))


def test_the_margin_has_bounds() -> None:
    v = torch.eye(2, dtype=torch.float64)
    scores = hard_scores(v, v, -v, torch.arange(2), torch.zeros(2, dtype=torch.long), torch.tensor(math.log(100.0)))
    assert float(rank_loss(scores, 2, 1)) == 0  # 200 apart, and the margin is 10
    scores = hard_scores(v, -v, v, torch.arange(2), torch.zeros(2, dtype=torch.long), torch.tensor(0.0))
    assert float(rank_loss(scores, 2, 1)) == 2  # the margin is 0, not below


def test_intra_modal_loss_has_the_positive() -> None:
    v, t, n = given(1)
    terms = []
    for caption in (0, 2, 4):
        own = cosine(v[caption], t[caption]).exp()
        others = sum(cosine(t[caption], n[k]).exp() for k, c in enumerate(OF.tolist()) if c == caption)
        terms.append(-(own / (own + others)).log())
    loss = intra_modal_loss(hard_scores(v, t, n, OF, KIND, SCALE), 3)
    equal_with_gradients(loss, torch.stack(terms).mean(), (v, t, n))


@pytest.mark.parametrize(("gamma", "smoothing"), [(2.0, 0.02), (0.0, 0.0), (1.5, 0.3)])
def test_focal_loss(gamma: float, smoothing: float) -> None:
    v, t, n = given(2)
    terms = []
    for caption in (0, 2, 4):
        own = [k for k, c in enumerate(OF.tolist()) if c == caption]
        p = torch.stack([cosine(v[caption], t[caption]), *(cosine(v[caption], n[k]) for k in own)]).softmax(dim=0)
        y = torch.full_like(p, smoothing / len(p))
        y[0] += 1 - smoothing
        terms.append(-(y * (1 - p) ** gamma * p.log()).sum())
    loss = focal_loss(hard_scores(v, t, n, OF, KIND, SCALE), 3, gamma, smoothing)
    equal_with_gradients(loss, torch.stack(terms).mean(), (v, t, n))


def test_focal_loss_without_focus_is_cross_entropy_of_one_choice() -> None:
    v, t, n = given(3)
    scores = hard_scores(v, t, n[:1], OF[:1], KIND[:1], SCALE)
    wanted = F.softplus(cosine(v[0], n[0]) - cosine(v[0], t[0]))
    assert float(focal_loss(scores, 1, 0.0, 0.0)) == pytest.approx(float(wanted))


def test_triplet_loss() -> None:
    v, t, n = given(4)
    w = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    terms = []
    for k in range(5):
        table = torch.stack([torch.stack([cosine(p, text) for text in (t[k], n[k])]) for p in (v[k], w[k])])
        both = [F.cross_entropy(rows, torch.arange(2), reduction="sum") for rows in (table, table.T)]
        terms.append(sum(both) / 2)
    loss = triplet_loss(v, t, w, n[:5], SCALE, 5)
    equal_with_gradients(loss, torch.stack(terms).mean(), (v, t, w))


def test_written_loss() -> None:
    negative = torch.tensor([-2.0, -1.0, -3.0], requires_grad=True)
    own = torch.tensor([-1.0, -1.2, -1.0], requires_grad=True)
    loss = written_loss(negative, own, margin=0.5)
    assert float(loss) == pytest.approx(0.0 + 0.7 + 0.0)
    loss.backward()
    assert negative.grad is not None and negative.grad.tolist() == [0.0, 1.0, 0.0]


def test_without_negatives_each_is_nothing() -> None:
    v, t, _ = given()
    none = torch.zeros(0, dtype=torch.long)
    scores = hard_scores(v, t, v[:0], none, none, SCALE)
    for loss in (rank_loss(scores, 0, 3), intra_modal_loss(scores, 0), focal_loss(scores, 0)):
        assert float(loss) == 0
        loss.backward(retain_graph=True)
    assert float(v.grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_caption_losses_are_those_of_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator, requires_grad=True)
    weight = torch.randn(2000, 6, generator=generator, requires_grad=True)
    labels = torch.randint(0, 2000, (7,), generator=generator)
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    found = caption_losses(hidden, weight, None, labels)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(found.sum()) == pytest.approx(float(sum_of_caption_losses(hidden, weight, None, labels)))
    factor = torch.arange(7.0)
    gradients = zip(
        torch.autograd.grad((found * factor).sum(), (hidden, weight)),
        torch.autograd.grad((wanted * factor).sum(), (hidden, weight)),
        strict=True,
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in gradients)
