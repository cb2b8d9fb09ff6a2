"""Retrieval between boxes and phrases over a whole split, both ways.

Receives an encoded split with regions. Gives recall@1, 5, 10 in both conventions, mAP and the median rank, text →
region and region → text, among all boxes of the split and among those of the image, and on wish the same from the boxes
cut out as images. Refuses a split without regions, with a UserError.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from mmgem.errors import UserError
from mmgem.evaluation.metrics.retrieval import (
    TIE,
    Positives,
    first_ranks,
    positive_ranks,
    retrieval_scores,
    top_k,
    unit_vectors,
)
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import Example, Hit, Kind, SearchExample, TaskResult
from mmgem.evaluation.tasks.boxes import BoxTable, box_table
from mmgem.evaluation.tasks.common import BOX_CONVENTION, TaskOptions, draw, protocol, worst
from mmgem.inference.encode import Encoded, Encoder
from mmgem.phrases import normalise_phrase

NAME = "region-retrieval"
VERSION = 1


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: all distinct boxes of the readable images against all distinct phrases of the
    split (`normalise_phrase`: case, punctuation and a leading article do not count; each phrase is
    embedded once, in its most frequent wording), cosine in float32.

    `region_image_retrieval_*`: text → region; each distinct phrase is a query, the gallery is all
    boxes, and any box that carries the phrase counts. `region_text_retrieval_*`: region → text;
    each box is a query, the gallery is the distinct phrases, and any phrase of the box counts.
    `region_in_image_recall@1`: each distinct phrase of each image with two boxes or more is a query,
    the gallery is that image's boxes; and `…@1_TYPE` over the phrases of each type that the data
    give (Flickr30k Entities' people, clothing …).
    A box carries the phrases of its own regions and those of the entities they name. A tie with a
    wrong item is a loss. With `baseline="crop"` the same under `crop_`, from the image vector of
    each box cut out. Standard errors resample phrases and images.
    """
    table = box_table(encoded, options)
    to_text = table.box_to_phrase
    to_box = to_text.reversed()
    phrases_QE = encoded.phrase_vectors_PE[table.spoken]
    scores, ranks_Q = _both_ways(encoded.region_vectors_RE[table.rows], phrases_QE, to_text, to_box, table, options)
    if options.baseline == "crop":
        if encoded.crop_vectors_RE is None:
            raise UserError("the crop baseline needs the boxes' cut-outs; encode the data with crops=True")
        crops_BE = encoded.crop_vectors_RE[table.rows]
        of_crops, _ = _both_ways(crops_BE, phrases_QE, to_text, to_box, table, options)
        scores.update(of_crops.prefixed("crop_"))
    inside, pairs = _inside(encoded, table, options)
    scores.update(inside)
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        in_image_pairs=pairs,
        regions=len(encoded.region_boxes),
        box_convention=BOX_CONVENTION,
        regions_unseen=encoded.regions_unseen,
        boxes=len(table.boxes),
        phrases=len(table.names),
        texts_cut=int(encoded.phrase_cut_P[table.spoken].sum()),
        baseline=options.baseline,
        units="the images, and of the phrases for text to region",
        chance="exact, of a random order",
    )
    examples = _examples(encoded, table, to_box, phrases_QE, ranks_Q, options)
    return TaskResult.of(NAME, stated, scores, examples, keys=encoded.keys, picture=encoded.picture)


def _inside(encoded: Encoded, table: BoxTable, options: TaskOptions) -> tuple[Scores, int]:
    """Phrases among the boxes of their own image; nothing where no image has two boxes."""
    types: defaultdict[tuple[int, str], set[str]] = defaultdict(set)
    regions = (encoded.region_image.tolist(), encoded.region_phrases, encoded.region_types)
    for image, phrase, own in zip(*regions, strict=True):
        types[image, normalise_phrase(phrase)].update(own)
    of_image: defaultdict[int, list[int]] = defaultdict(list)
    for b, image in enumerate(table.image.tolist()):
        of_image[image].append(b)
    boxes_BE = unit_vectors(encoded.region_vectors_RE[table.rows])
    phrases_QE = unit_vectors(encoded.phrase_vectors_PE[table.spoken])
    hits, chances, images, kinds = [], [], [], []
    for image, boxes in of_image.items():
        if len(boxes) < 2:
            continue
        names = list(dict.fromkeys(q for b in boxes for q in table.phrase_ids[b]))
        right_QB = torch.tensor([[q in table.phrase_ids[b] for b in boxes] for q in names])
        cosine_QB = phrases_QE[names] @ boxes_BE[boxes].T
        best_Q = cosine_QB.masked_fill(~right_QB, -torch.inf).amax(dim=1)
        wrong_Q = cosine_QB.masked_fill(right_QB, -torch.inf).amax(dim=1)
        hits += (best_Q - TIE > wrong_Q).tolist()
        chances += right_QB.double().mean(dim=1).tolist()
        images += [image] * len(names)
        kinds += [types[image, table.names[q]] for q in names]
    scores = Scores()
    for kind in ("", *sorted(set().union(*kinds))):
        asked = [n for n, own in enumerate(kinds) if not kind or kind in own]
        if asked:
            name = f"region_in_image_recall@1{f'_{kind}' if kind else ''}"
            values = {name: np.array(hits, dtype=np.float64)[asked]}
            chance = {name: float(np.mean([chances[n] for n in asked]))}
            groups = np.array(images)[asked]
            scores.update(Scores.of_means(values, chance=chance, groups=groups, **options.bootstrap))
    return scores, len(hits)


def _both_ways(
    boxes_BE: Tensor,
    phrases_QE: Tensor,
    to_text: Positives,
    to_box: Positives,
    table: BoxTable,
    options: TaskOptions,
) -> tuple[Scores, Tensor]:
    """The figures of both directions, and the ranks [Q] of text → region."""
    ahead_P = positive_ranks(phrases_QE, boxes_BE, to_box)
    scores = retrieval_scores("region_image_retrieval", ahead_P, to_box, **options.bootstrap)
    back_P = positive_ranks(boxes_BE, phrases_QE, to_text)
    image_B = table.image.numpy()
    scores.update(retrieval_scores("region_text_retrieval", back_P, to_text, groups=image_B, **options.bootstrap))
    return scores, first_ranks(ahead_P, to_box)


def _examples(
    encoded: Encoded,
    table: BoxTable,
    to_box: Positives,
    phrases_QE: Tensor,
    ranks_Q: Tensor,
    options: TaskOptions,
) -> list[Example]:
    """Some phrases with their five best boxes: drawn by lot, and the worst."""
    ranks = ranks_Q.numpy()
    drawn = draw(len(ranks), options.drawn, options.seed)
    chosen = drawn + worst(ranks, options.worst, drawn)
    if not chosen:
        return []
    boxes_BE = encoded.region_vectors_RE[table.rows]
    values, rows = top_k(phrases_QE[chosen], boxes_BE, 5)
    out: list[Example] = []
    for n, q in enumerate(chosen):
        right = to_box.items[to_box.starts[q] : to_box.starts[q + 1]]
        near = unit_vectors(boxes_BE[right]) @ unit_vectors(phrases_QE[q : q + 1])[0]
        best = int(near.argmax())
        hits = tuple(
            _hit(table, int(b), float(s), bool((right == b).any())) for s, b in zip(values[n], rows[n], strict=True)
        )
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        wanted = _hit(table, int(right[best]), float(near[best]), True)
        query = encoded.phrases[table.spoken[q]]
        out.append(SearchExample(kind, query, int(ranks[q]) + 1, hits, wanted))
    return out


def _hit(table: BoxTable, box: int, score: float, right: bool) -> Hit:
    return Hit(int(table.image[box]), table.boxes[box], score, right)
