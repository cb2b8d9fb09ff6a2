"""BLEU@1..4, ROUGE_L, CIDEr and plain CIDEr of written captions, as coco-caption computes them, without Java.

Receives one written text and at least one reference an item, as strings. Gives corpus figures with
standard errors, and the figures of each item. Refuses empty sets and items without a reference.
METEOR and SPICE need Java and are in `java_scores`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from mmgem.evaluation.metrics.scores import Combine, Floats, Ints, Items, Scores, bootstrap_stderr
from mmgem.evaluation.metrics.tokenizer import tokenize

Tokens = Sequence[str]
Ngram = tuple[str, ...]

_N = 4
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
# The two small numbers of coco-caption's BLEU: they keep a zero count from dividing by zero.
_SMALL, _TINY = 1e-9, 1e-15


@dataclass(slots=True)
class CaptionScores:
    """Corpus figures, and per item ROUGE_L, CIDEr and CIDEr_plain ([N] each)."""

    scores: Scores
    rouge_N: Floats
    cider_N: Floats
    cider_plain_N: Floats


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    groups: Ints | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> CaptionScores:
    """`BLEU@1..4`, `ROUGE_L`, `CIDEr` and `CIDEr_plain` of N candidates against their references.

    BLEU and ROUGE_L lie between 0 and 1; both CIDErs between 0 and 10, with document frequencies
    from the references given here, so that they are 0 for a single item. `CIDEr` is what
    coco-caption and pycocoevalcap print under this name, which is CIDEr-D (`CIDErD` of
    vrama91/cider); `CIDEr_plain` is the CIDEr of the paper and of vrama91/cider, without clipping
    and without the penalty on length.
    groups: [N] items of one image, drawn together in the bootstrap of `samples` resamples (0: no
    standard errors). The document frequencies are held fixed there.
    """
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} items")
    cands = [tokenize(c) for c in candidates]
    refs = [[tokenize(r) for r in rs] for rs in references]
    for i, rs in enumerate(refs):
        if not rs:
            raise ValueError(f"item {i} has no reference")
    counts_NS = np.array([bleu_counts(c, rs) for c, rs in zip(cands, refs, strict=True)])
    rouge_N = np.array([rouge_l(c, rs) for c, rs in zip(cands, refs, strict=True)])
    cider_N, cider_plain_N = ciders(cands, refs)
    means_NS = np.stack([rouge_N, cider_N, cider_plain_N, np.ones(len(cands))], axis=1)
    sums_NS = np.concatenate([counts_NS, means_NS], axis=1)
    names = [f"BLEU@{n}" for n in range(1, _N + 1)] + ["ROUGE_L", "CIDEr", "CIDEr_plain"]
    values = _figures(sums_NS.sum(axis=0, keepdims=True))[0]
    scores = Scores({n: float(v) for n, v in zip(names, values, strict=True)})
    if samples:
        errors = bootstrap_stderr(sums_NS, _figures, groups=groups, samples=samples, seed=seed)
        scores.stderr = {n: float(e) for n, e in zip(names, errors, strict=True)}
    counts_N10 = counts_NS.astype(np.float64)
    scores.items = {name: Items(counts_N10, cast(Combine, name), groups) for name in names[:_N]}
    scores.items |= {
        "ROUGE_L": Items(rouge_N[:, None], "mean", groups),
        "CIDEr": Items(cider_N[:, None], "mean", groups),
        "CIDEr_plain": Items(cider_plain_N[:, None], "mean", groups),
    }
    return CaptionScores(scores, rouge_N, cider_N, cider_plain_N)


def _figures(sums_CS: Floats) -> Floats:
    """Summed rows [C, 10 + 4] → BLEU@1..4, ROUGE_L, CIDEr, CIDEr_plain [C, 7]."""
    means = sums_CS[:, 2 * _N + 2 : -1] / sums_CS[:, -1:]
    return np.concatenate([bleu(sums_CS[:, : 2 * _N + 2]), means], axis=1)


def ngrams(tokens: Tokens) -> Counter[Ngram]:
    """Counts of all n-grams of 1 to 4 tokens."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _N + 1) for i in range(len(tokens) - n + 1))


def bleu_counts(candidate: Tokens, references: Sequence[Tokens]) -> list[int]:
    """[guessed 1..4, correct 1..4, candidate length, length of the closest reference]."""
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= ngrams(reference)
    correct = [0] * _N
    for gram, count in ngrams(candidate).items():
        correct[len(gram) - 1] += min(count, most[gram])
    length = len(candidate)
    closest = min((abs(len(r) - length), len(r)) for r in references)[1]
    return [max(0, length - n) for n in range(_N)] + correct + [length, closest]


def bleu(counts_CS: Floats) -> Floats:
    """Summed `bleu_counts` [C, 10] → BLEU@1..4 [C, 4] (Papineni et al. 2002, one corpus a row)."""
    guessed, correct = counts_CS[:, :_N], counts_CS[:, _N : 2 * _N]
    precision = (correct + _TINY) / (guessed + _SMALL)
    geometric = np.exp(np.cumsum(np.log(precision), axis=1) / np.arange(1, _N + 1))
    ratio = (counts_CS[:, -2] + _TINY) / (counts_CS[:, -1] + _SMALL)
    return geometric * np.exp(np.minimum(0.0, 1 - 1 / ratio))[:, None]


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L of one candidate (Lin 2004): best precision and best recall of any reference,
    beta 1.2. An empty candidate has 0."""
    if not candidate:
        return 0.0
    common = [(_common_length(candidate, r), len(r)) for r in references if r]
    precision = max((c / len(candidate) for c, _ in common), default=0.0)
    recall = max((c / n for c, n in common), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    square = _ROUGE_BETA**2
    return (1 + square) * precision * recall / (recall + square * precision)


def _common_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


@dataclass(slots=True)
class _Weighted:
    """tf-idf weights of one text by n-gram length, their norms, and its number of bigrams."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Floats:
    """[N] CIDEr-D of each item, the first of `ciders`."""
    return ciders(candidates, references)[0]


def ciders(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[Floats, Floats]:
    """[N] CIDEr-D and [N] CIDEr of each item, times 10 (Vedantam et al. 2015, equations 1 to 4).

    CIDEr: tf-idf cosines of 1- to 4-grams, averaged over n and over the references. CIDEr-D clips
    a candidate's weights to the reference's and multiplies by a Gaussian of the difference in
    length, sigma 6 (coco-caption's `Cider`). As in both originals words are not stemmed, and
    CIDEr-D counts lengths in bigrams.
    """
    cooked = [[ngrams(r) for r in refs] for refs in references]
    frequency: Counter[Ngram] = Counter()
    for refs in cooked:
        frequency.update({gram for ref in refs for gram in ref})
    log_items = math.log(len(references))

    def weigh(counts: Counter[Ngram]) -> _Weighted:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_N)]
        for gram, count in counts.items():
            idf = log_items - math.log(max(1, frequency[gram]))
            weights[len(gram) - 1][gram] = count * idf
        norms = [math.sqrt(sum(w * w for w in ws.values())) for ws in weights]
        return _Weighted(weights, norms, sum(c for g, c in counts.items() if len(g) == 2))

    out_N2 = np.zeros((len(candidates), 2))
    for i, (candidate, refs) in enumerate(zip(candidates, cooked, strict=True)):
        written = weigh(ngrams(candidate))
        for ref in refs:
            out_N2[i] += _cider_similarities(written, weigh(ref))
        out_N2[i] *= 10.0 / (_N * len(refs))
    return out_N2[:, 0], out_N2[:, 1]


def _cider_similarities(written: _Weighted, reference: _Weighted) -> tuple[float, float]:
    """Sums over n: of the clipped cosine with the length penalty, and of the cosine."""
    clipped, plain = 0.0, 0.0
    for n in range(_N):
        theirs = reference.weights[n]
        norm = written.norms[n] * reference.norms[n] or 1.0
        for gram, w in written.weights[n].items():
            if gram in theirs:
                clipped += min(w, theirs[gram]) * theirs[gram] / norm
                plain += w * theirs[gram] / norm
    return clipped * math.exp(-((written.length - reference.length) ** 2) / (2 * _CIDER_SIGMA**2)), plain
