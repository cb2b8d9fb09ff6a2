"""Which class a picture is of, without training on the classes: by vector, by what the model would write, by both.

Receives the model and a folder in a layout of `layouts.classes`. Gives accuracies and a table of what was taken for
what. Refuses what that reader does, and more broken pictures than `inference.encode.MAX_BROKEN`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.evaluation.layouts.classes import ClassSet, has_classes, read_classes
from mmgem.evaluation.metrics.retrieval import TIE, unit_vectors
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import ChoiceExample, Confusion, Example, Kind, TaskResult
from mmgem.evaluation.tasks.common import (
    TaskOptions,
    draw,
    logit_scale_of,
    mean_vector,
    protocol,
    worst,
    writes,
)
from mmgem.inference.encode import Encoder, embed_pictures, embed_texts, pair_likelihoods

NAME = "zero-shot"
VERSION = 1

_SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_PAIRS = 2_000_000
"""Of picture and text, whose likelihoods are asked for: with more, fewer templates are used there, at least one."""

found = has_classes


def check(data: Path, options: TaskOptions) -> None:
    read_classes(data, options.split, _given(options.classes), _given(options.templates))


def run(model: Encoder, data: Path, options: TaskOptions) -> TaskResult:
    """Protocol: all readable pictures of the split, all classes as choices, each said in all templates.

    `zero_shot_vector_*`: by cosine with the mean of the class's normalised text vectors, as CLIP does (Radford et al.
    2021). `zero_shot_generative_*`: by (log p(text | picture) - alpha * log p(text | no picture)) / tokens, mean over
    the templates, where "no picture" is the mean image vector of the set and a text's tokens count its end.
    `zero_shot_both_*`: by the sum of two logarithms of probabilities over the classes, log softmax(exp(logit_scale) *
    cosine) + log softmax(log p(text | picture) - alpha * log p(text | no picture)), the latter a mean over the
    templates of sums over tokens. The last two on at most `queries` pictures, drawn by lot,
    and not for a model that writes nothing (open_clip's). `acc1`, `acc5` and
    `mean_per_class_recall` as in CLIP_benchmark; a tie with a wrong class is a loss. `alpha_sweep`: acc1 for other
    alpha.
    """
    classes = read_classes(data, options.split, _given(options.classes), _given(options.templates))
    vectors_NE, kept, skipped = embed_pictures(model, classes.pictures, **options.work)
    label_N = torch.tensor([classes.labels[n] for n in kept])
    said = classes.texts()
    cosine_NC = unit_vectors(vectors_NE) @ _class_vectors(model, said, options).T
    scale = logit_scale_of(model)

    scores = _scores("vector", cosine_NC, label_N, torch.arange(len(kept)), options)
    asked_Q = torch.tensor(draw(len(kept), options.queries, options.seed))
    asked: dict[str, Any] = {}
    ways = {"vector": cosine_NC[asked_Q]}
    if writes(model):
        used = max(1, min(max(map(len, said)), _MOST_PAIRS // (len(asked_Q) * len(said))))
        judged = _likelihoods(model, vectors_NE, asked_Q, [texts[:used] for texts in said], options)
        ways |= judged.scores(cosine_NC[asked_Q], options.alpha, scale)
        for way in ("generative", "both"):
            scores.update(_scores(way, ways[way], label_N[asked_Q], asked_Q, options))
        asked = {
            "images_asked_for_likelihoods": len(asked_Q),
            "templates_for_likelihoods": used,
            "alpha": options.alpha,
            "alpha_sweep": {
                str(alpha): {
                    way: float(_right(score_QC, label_N[asked_Q], 1).double().mean())
                    for way, score_QC in judged.scores(cosine_NC[asked_Q], alpha, scale).items()
                }
                for alpha in _SWEPT
            },
            "no_image": "the mean image vector of the set",
        }
    counts = Counter(label_N.tolist())
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(kept),
        skipped=len(skipped),
        layout=classes.layout,
        classes=len(classes.names),
        most_frequent_class=max(counts.values()) / len(kept),
        templates=max(map(len, said)),
        **asked,
        logit_scale=scale,
        chance="a class by lot",
    )
    better = max(ways, key=lambda way: scores.metrics[f"zero_shot_{way}_acc1"])
    shown = ways["both"] if "both" in ways else np.exp(scale) * ways["vector"]
    return TaskResult.of(
        NAME,
        stated,
        scores,
        _examples(classes, shown, label_N, asked_Q, options),
        keys=[classes.pictures[n].key for n in kept],
        picture=lru_cache(maxsize=64)(lambda row: classes.pictures[kept[row]].read()),
        confusion=_confusion(classes.names, ways[better], label_N[asked_Q]),
    )


def _given(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _class_vectors(model: Encoder, said: list[list[str]], options: TaskOptions) -> Tensor:
    """[C, E] of length 1."""
    distinct = list(dict.fromkeys(text for texts in said for text in texts))
    row = {text: n for n, text in enumerate(distinct)}
    vectors_TE = unit_vectors(embed_texts(model, distinct, **options.work, title="class texts"))
    return unit_vectors(torch.stack([vectors_TE[[row[text] for text in texts]].mean(dim=0) for texts in said]))


@dataclass(slots=True)
class _Judged:
    """Of Q pictures and C classes in T texts each, log p of each text, without a picture, and their tokens."""

    log_p_QCT: Tensor
    prior_CT: Tensor
    tokens_CT: Tensor

    def scores(self, cosine_QC: Tensor, alpha: float, scale: float) -> dict[str, Tensor]:
        """Generative and both, as in the protocol: [Q, C] each."""
        gain_QCT = self.log_p_QCT - alpha * self.prior_CT
        both_QC = (np.exp(scale) * cosine_QC).log_softmax(dim=1) + gain_QCT.mean(dim=2).log_softmax(dim=1)
        return {"generative": (gain_QCT / self.tokens_CT).mean(dim=2), "both": both_QC}


def _likelihoods(
    model: Encoder, vectors_NE: Tensor, asked_Q: Tensor, said: list[list[str]], options: TaskOptions
) -> _Judged:
    """Classes of fewer texts than others repeat theirs."""
    most = max(map(len, said))
    distinct = list(dict.fromkeys(text for texts in said for text in texts))
    row = {text: n for n, text in enumerate(distinct)}
    at_CT = torch.tensor([[row[texts[t % len(texts)]] for t in range(most)] for texts in said])
    texts = torch.arange(len(distinct))
    log_p_P, _ = pair_likelihoods(
        model,
        vectors_NE,
        distinct,
        asked_Q.repeat_interleave(len(distinct)),
        texts.repeat(len(asked_Q)),
        **options.work,
        title="class likelihoods",
    )
    prior_D, tokens_D = pair_likelihoods(
        model, mean_vector(vectors_NE), distinct, torch.zeros_like(texts), texts, **options.work, title="of none"
    )
    return _Judged(log_p_P.view(len(asked_Q), -1)[:, at_CT], prior_D[at_CT], tokens_D[at_CT])


def _right(score_QC: Tensor, label_Q: Tensor, k: int) -> Tensor:
    """[Q] whether fewer than k wrong classes score as much as the right one, or nearly so."""
    own_Q1 = score_QC.gather(1, label_Q[:, None])
    ahead_Q = (score_QC >= own_Q1 - TIE).sum(dim=1) - 1
    return ahead_Q < k


def _scores(way: str, score_QC: Tensor, label_Q: Tensor, unit_Q: Tensor, options: TaskOptions) -> Scores:
    count = score_QC.shape[1]
    right_Q = _right(score_QC, label_Q, 1).double()
    there_C = torch.bincount(label_Q, minlength=count)
    # Each class weighs the same: the mean over the pictures is then the mean over the classes that have some.
    weight_Q = len(label_Q) / (int((there_C > 0).sum()) * there_C[label_Q].double())
    values = {
        f"zero_shot_{way}_acc1": right_Q.numpy(),
        f"zero_shot_{way}_acc5": _right(score_QC, label_Q, 5).double().numpy(),
        f"zero_shot_{way}_mean_per_class_recall": (right_Q * weight_Q).numpy(),
    }
    chance = dict(zip(values, (1 / count, min(5, count) / count, 1 / count), strict=True))
    return Scores.of_means(values, chance=chance, groups=unit_Q.numpy(), **options.bootstrap)


def _confusion(names: list[str], score_QC: Tensor, label_Q: Tensor) -> Confusion:
    count = len(names)
    flat = torch.bincount(label_Q * count + score_QC.argmax(dim=1), minlength=count * count)
    return Confusion(names, flat.view(count, count).tolist())


def _examples(
    classes: ClassSet, score_QC: Tensor, label_N: Tensor, asked_Q: Tensor, options: TaskOptions
) -> list[Example]:
    chance_QC = F.softmax(score_QC, dim=1)
    own_Q = chance_QC.gather(1, label_N[asked_Q][:, None])[:, 0]
    drawn = draw(len(asked_Q), options.drawn, options.seed)
    out: list[Example] = []
    for n, q in enumerate(drawn + worst(-own_Q.numpy(), options.worst, drawn)):
        label = int(label_N[asked_Q[q]])
        order = chance_QC[q].argsort(descending=True)[:6].tolist()
        choices = tuple((classes.names[c], float(chance_QC[q, c]), c == label) for c in order)
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        question = f"which of {len(classes.names)} classes? it is: {classes.names[label]}"
        out.append(ChoiceExample(kind, int(asked_Q[q]), question, choices, choices[0][2]))
    return out
