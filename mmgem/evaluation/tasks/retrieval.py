"""Image–text retrieval over a whole split, both ways.

Receives an encoded split. Gives recall@1, 5, 10 in both conventions, mAP and the median rank, text → image and
image → text.
Refuses a split without captions, with a UserError.
"""

from collections import defaultdict

import torch

from mmgem.errors import UserError
from mmgem.evaluation.metrics.retrieval import (
    Positives,
    first_ranks,
    ranks_both_ways,
    recall_curve,
    retrieval_scores,
    top_k,
)
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import Curve, Example, Hit, Kind, SearchExample, TaskResult
from mmgem.evaluation.tasks.common import TaskOptions, draw, protocol, worst
from mmgem.inference.encode import Encoded, Encoder

NAME = "retrieval"
VERSION = 1


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: all readable images of the split and all of their captions, cosine in float32.

    `text_retrieval_*`: image → text; the queries are the images, the gallery all captions, and any
    caption of the image counts for `recall@k`, each for `strict_recall@k` and mAP.
    `image_retrieval_*`: text → image; the queries are the captions, and the caption's image counts.
    A tie with a wrong item is a loss. A caption that two images carry word for word counts for its
    own image only, unless `same_text` is set; how many there are stands in the protocol. An image
    without captions is in the gallery, and no query.
    """
    if not len(encoded.text_vectors_ME):
        raise UserError(
            f"{options.data or 'the data'}: split {options.split} has no captions; "
            "retrieval needs them, choose other data or another task"
        )
    to_image = text_to_image(encoded, options.same_text)
    to_text = to_image.reversed()
    asking = to_text.counts > 0
    to_text = Positives(torch.cat([to_text.starts[:1], to_text.starts[1:][asking]]), to_text.items, to_text.gallery)
    images, texts = encoded.image_vectors_NE, encoded.text_vectors_ME
    scores = Scores()
    to_images_P, ahead_P = ranks_both_ways(texts, images, to_image)
    unit_N = asking.nonzero().flatten().numpy()
    scores.update(retrieval_scores("text_retrieval", ahead_P, to_text, groups=unit_N, **options.bootstrap))
    curves = [Curve("image → text", recall_curve(ahead_P, to_text))]
    ahead_P = to_images_P
    unit_M = encoded.text_image.numpy()
    scores.update(retrieval_scores("image_retrieval", ahead_P, to_image, groups=unit_M, **options.bootstrap))
    curves.append(Curve("text → image", recall_curve(ahead_P, to_image)))
    ranks_M = first_ranks(ahead_P, to_image)
    per_image = torch.bincount(encoded.text_image, minlength=len(images))
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        captions=len(texts),
        captions_an_image=[int(per_image.min()), int(per_image.max())],
        captions_of_several_images=_shared(encoded),
        texts_cut=int(encoded.text_cut_M.sum()),
        texts_cut_share=round(float(encoded.text_cut_M.double().mean()), 4),
        same_text_counts=options.same_text,
        captions_joined=options.join_captions,
        chance="exact, of a random order",
    )
    examples = _examples(encoded, to_image, ranks_M, options)
    return TaskResult.of(NAME, stated, scores, examples, curves=curves, keys=encoded.keys, picture=encoded.picture)


def text_to_image(encoded: Encoded, same_text: bool) -> Positives:
    """Captions as queries, images as gallery."""
    if not same_text:
        return Positives.from_ids(encoded.text_image, torch.arange(len(encoded.keys)))
    carriers = _carriers(encoded)
    return Positives.from_lists([carriers[t] for t in encoded.caption_texts], len(encoded.keys))


def _carriers(encoded: Encoded) -> dict[str, list[int]]:
    """The images of each distinct caption."""
    carriers: defaultdict[str, dict[int, None]] = defaultdict(dict)
    for text, image in zip(encoded.caption_texts, encoded.text_image.tolist(), strict=True):
        carriers[text][image] = None
    return {text: list(images) for text, images in carriers.items()}


def _shared(encoded: Encoded) -> int:
    """How many captions stand word for word under another image as well."""
    carriers = _carriers(encoded)
    return sum(len(carriers[text]) > 1 for text in encoded.caption_texts)


def _examples(encoded: Encoded, to_image: Positives, ranks_M: torch.Tensor, options: TaskOptions) -> list[Example]:
    """Some captions with their five best images: drawn by lot, and the worst."""
    ranks = ranks_M.numpy()
    drawn = draw(len(ranks), options.drawn, options.seed)
    bad = worst(ranks, options.worst, drawn)
    chosen = drawn + bad
    if not chosen:
        return []
    values, rows = top_k(encoded.text_vectors_ME[chosen], encoded.image_vectors_NE, 5)
    unit = torch.nn.functional.normalize
    texts = encoded.caption_texts
    out: list[Example] = []
    for n, m in enumerate(chosen):
        right = to_image.items[to_image.starts[m] : to_image.starts[m + 1]]
        near = unit(encoded.image_vectors_NE[right], dim=1) @ unit(encoded.text_vectors_ME[m], dim=0)
        wanted = int(right[near.argmax()])
        hits = tuple(
            Hit(int(i), None, float(s), bool((right == i).any())) for s, i in zip(values[n], rows[n], strict=True)
        )
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        out.append(SearchExample(kind, texts[m], int(ranks[m]) + 1, hits, Hit(wanted, None, float(near.max()), True)))
    return out
