"""The model's two faces together: found by vector, judged by what it would write.

Receives an encoded split with captions and the model. Gives recalls of the nearest candidates in three orders (by
vector, by likelihood, by both), and of texts chosen by writing nothing but texts of the split. Refuses a split without
captions, with a UserError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgem.errors import UserError
from mmgem.evaluation.metrics.retrieval import Positives, chance_recall, top_k
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import Example, Hit, Kind, SearchExample, TaskResult
from mmgem.evaluation.tasks.common import TaskOptions, draw, logit_scale_of, mean_vector, protocol, worst
from mmgem.evaluation.tasks.retrieval import text_to_image
from mmgem.inference.encode import Encoded, Encoder, choose_texts, pair_likelihoods

NAME = "rerank"
VERSION = 1

_KS = (1, 5)
_BEAMS = 5
_SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
_MISSED = 1 << 30
_ORDERS = ("vector", "likelihood", "both")


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: of each query the `candidates` nearest by cosine, in three orders.

    `rerank_vector_*`: by cosine, as retrieval has them. `rerank_likelihood_*`: by log p(text | image) - alpha *
    log p(text | no image), sums over the text's tokens and its end; "no image" is the mean image vector of the split.
    Of the images for one text the second term is the same for all. `rerank_both_*`: by the sum of two logarithms of
    probabilities over the candidates, log softmax(exp(logit_scale) * cosine) + log softmax(the above), that is their
    product. `text_retrieval` (image → text) and `image_retrieval` (text → image) as in retrieval; of each at most
    `queries` queries, drawn by lot. A right one that is no candidate is a miss, and a tie with a wrong one, too.
    `alpha_sweep`: recall@1 of both orders for other values of alpha, image → text.

    `closed_set_text_retrieval_recall@k`: the model writes for every second of these images with 5 beams, over the tree
    of all captions of the split and nothing else (as Self-Retrieval does with documents); the texts that the search
    ends in, by log p.
    """
    if not len(encoded.text_vectors_ME):
        raise UserError(
            f"{options.data or 'the data'}: split {options.split} has no captions; rerank needs them, choose other data"
        )
    to_image = text_to_image(encoded, options.same_text)
    to_text = to_image.reversed()
    images, texts = encoded.image_vectors_NE, encoded.text_vectors_ME
    scale = logit_scale_of(model)
    blank_1E = mean_vector(images)

    asked = [i for i, count in enumerate(to_text.counts.tolist()) if count]
    asked_Q = torch.tensor([asked[i] for i in draw(len(asked), options.queries, options.seed)])
    found = _candidates(images[asked_Q], texts, asked_Q, to_text, options)
    found.log_p_QK = _likelihoods(model, encoded, images, found.query_Q, found.rows_QK, options, "captions of images")
    used, at = torch.unique(found.rows_QK, return_inverse=True)
    prior_U, _ = pair_likelihoods(
        model,
        blank_1E,
        [encoded.caption_texts[t] for t in used.tolist()],
        torch.zeros(len(used), dtype=torch.int64),
        torch.arange(len(used)),
        **options.work,
        title="captions of none",
    )
    prior_QK = prior_U[at]
    scores = _scores("text_retrieval", found, prior_QK * options.alpha, scale, asked_Q.numpy(), options)
    sweep = {
        str(alpha): {
            order: float((found.places(score_QK) < 1).double().mean())
            for order, score_QK in found.orders(prior_QK * alpha, scale).items()
            if order != "vector"
        }
        for alpha in _SWEPT
    }

    written_Q = torch.tensor(draw(len(texts), options.queries, options.seed))
    back = _candidates(texts[written_Q], images, written_Q, to_image, options)
    back.log_p_QK = _likelihoods(
        model, encoded, images, back.query_Q, back.rows_QK, options, "images of captions", True
    )
    unit_Q = encoded.text_image[written_Q].numpy()
    nothing = torch.zeros_like(back.log_p_QK)
    scores.update(_scores("image_retrieval", back, nothing, scale, unit_Q, options))

    scores.update(_closed_set(model, encoded, asked_Q[::2], options))
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        captions=len(texts),
        candidates=found.rows_QK.shape[1],
        queries=[len(asked_Q), len(written_Q)],
        alpha=options.alpha,
        alpha_sweep=sweep,
        no_image="the mean image vector of the split",
        logit_scale=scale,
        closed_set={"beams": _BEAMS, "texts": len(set(encoded.caption_texts))},
        same_text_counts=options.same_text,
        captions_joined=options.join_captions,
        chance="exact, of a random order of all",
    )
    examples = _examples(encoded, back, nothing, scale, options)
    return TaskResult.of(NAME, stated, scores, examples, keys=encoded.keys, picture=encoded.picture)


@dataclass(slots=True)
class _Candidates:
    """Of Q queries the K nearest of the gallery, best first."""

    query_Q: Tensor
    rows_QK: Tensor
    cosine_QK: Tensor
    right_QK: Tensor
    positives: Positives
    log_p_QK: Tensor

    def orders(self, prior_QK: Tensor, scale: float) -> dict[str, Tensor]:
        """By name the scores of the candidates."""
        likelihood_QK = self.log_p_QK - prior_QK
        vector_QK = np.exp(scale) * self.cosine_QK
        both_QK = vector_QK.log_softmax(dim=1) + likelihood_QK.log_softmax(dim=1)
        return dict(zip(_ORDERS, (self.cosine_QK, likelihood_QK, both_QK), strict=True))

    def places(self, score_QK: Tensor) -> Tensor:
        """[Q] wrong candidates that stand before the best right one; `_MISSED` without one."""
        best_Q1 = score_QK.masked_fill(~self.right_QK, -torch.inf).amax(dim=1, keepdim=True)
        ahead_Q = ((score_QK >= best_Q1) & ~self.right_QK).sum(dim=1)
        return torch.where(self.right_QK.any(dim=1), ahead_Q, _MISSED)


def _candidates(
    queries_QE: Tensor, gallery_GE: Tensor, query_Q: Tensor, positives: Positives, options: TaskOptions
) -> _Candidates:
    cosine_QK, rows_QK = top_k(queries_QE, gallery_GE, options.candidates)
    right = [positives.items[positives.starts[q] : positives.starts[q + 1]] for q in query_Q.tolist()]
    right_QK = torch.stack([torch.isin(rows, own) for rows, own in zip(rows_QK, right, strict=True)])
    return _Candidates(query_Q, rows_QK, cosine_QK, right_QK, positives, torch.zeros_like(cosine_QK))


def _likelihoods(
    model: Encoder,
    encoded: Encoded,
    images_NE: Tensor,
    query_Q: Tensor,
    rows_QK: Tensor,
    options: TaskOptions,
    title: str,
    queries_are_texts: bool = False,
) -> Tensor:
    """[Q, K] log p(text | image) of each query with each of its candidates."""
    query_P, row_P = query_Q.repeat_interleave(rows_QK.shape[1]), rows_QK.flatten()
    image_P, text_P = (row_P, query_P) if queries_are_texts else (query_P, row_P)
    log_p_P, _ = pair_likelihoods(model, images_NE, encoded.caption_texts, image_P, text_P, **options.work, title=title)
    return log_p_P.view_as(rows_QK)


def _scores(
    direction: str, found: _Candidates, prior_QK: Tensor, scale: float, unit_Q: np.ndarray, options: TaskOptions
) -> Scores:
    values, chance = {}, {}
    for order, score_QK in found.orders(prior_QK, scale).items():
        places = found.places(score_QK).numpy()
        for k in _KS:
            name = f"rerank_{order}_{direction}_recall@{k}"
            values[name] = (places < k).astype(np.float64)
            chance[name] = chance_recall(found.positives.counts[found.query_Q], found.positives.gallery, k)
    return Scores.of_means(values, chance=chance, groups=unit_Q, **options.bootstrap)


def _closed_set(model: Encoder, encoded: Encoded, asked_Q: Tensor, options: TaskOptions) -> Scores:
    """Texts that several images carry count for each of them: the tree knows them once."""
    distinct = list(dict.fromkeys(encoded.caption_texts))
    number = {text: n for n, text in enumerate(distinct)}
    rows_QK = choose_texts(
        model, encoded.image_vectors_NE[asked_Q], model.prefix_tree(distinct), num_beams=_BEAMS, **options.work
    )
    right = [torch.tensor([number[text] for text in encoded.captions[i]]) for i in asked_Q.tolist()]
    hits_QK = torch.stack([torch.isin(rows, own) for rows, own in zip(rows_QK, right, strict=True)])
    counts = torch.tensor([len(own.unique()) for own in right])
    values, chance = {}, {}
    for k in _KS:
        name = f"closed_set_text_retrieval_recall@{k}"
        values[name] = hits_QK[:, :k].any(dim=1).double().numpy()
        chance[name] = chance_recall(counts, len(distinct), k)
    return Scores.of_means(values, chance=chance, groups=asked_Q.numpy(), **options.bootstrap)


def _examples(
    encoded: Encoded, found: _Candidates, prior_QK: Tensor, scale: float, options: TaskOptions
) -> list[Example]:
    """Captions with the best images in the order of both: drawn by lot, and those that lost most by it."""
    orders = found.orders(prior_QK, scale)
    both_QK = orders["both"]
    place_Q, before_Q = found.places(both_QK), found.places(orders["vector"])
    drawn = draw(len(place_Q), options.drawn, options.seed)
    lost = worst((place_Q - before_Q).clamp(max=found.rows_QK.shape[1]).numpy(), options.worst, drawn)
    texts = encoded.caption_texts
    out: list[Example] = []
    for n, q in enumerate(drawn + lost):
        order = both_QK[q].argsort(descending=True)
        hits = tuple(
            Hit(int(found.rows_QK[q, k]), None, float(found.cosine_QK[q, k]), bool(found.right_QK[q, k]))
            for k in order[:5].tolist()
        )
        text = int(found.query_Q[q])
        wanted = next((hit for hit in hits if hit.right), None)
        if wanted is None:
            own = found.positives.items[found.positives.starts[text]]
            pair = (encoded.image_vectors_NE[own], encoded.text_vectors_ME[text])
            wanted = Hit(int(own), None, float(torch.cosine_similarity(*pair, dim=0)), True)
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        out.append(SearchExample(kind, texts[text], min(int(place_Q[q]) + 1, found.positives.gallery), hits, wanted))
    return out
