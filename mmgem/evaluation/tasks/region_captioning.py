"""Phrases written for boxes, compared with the phrases people gave them.

Receives an encoded split with regions and the model that writes. Gives BLEU@1..4, ROUGE_L, CIDEr,
the share of exact phrases and, on rendered scenes, the share with the right colour and shape.
Refuses a split without regions, with a UserError.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmgem.data.scenes import HELD_OUT, attributes_of
from mmgem.evaluation.metrics.captions import caption_scores
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import BoxNote, Example, Kind, RegionExample, TaskResult
from mmgem.evaluation.tasks.boxes import BoxTable, box_table
from mmgem.evaluation.tasks.captioning import add_java_scores, chance_scores
from mmgem.evaluation.tasks.common import BOX_CONVENTION, TaskOptions, draw, protocol, worst
from mmgem.inference.encode import Encoded, Encoder, write_texts
from mmgem.phrases import head_noun, normalise_phrase

NAME = "region-captioning"
VERSION = 1

# Photos have "a red ball" here and there; scenes name colour and shape in every phrase.
_SCENES_SHARE = 0.9
_BOXES_A_PICTURE = 6


@dataclass(slots=True)
class _Share:
    """A yes or no for each box, and its chance: a yes for the first phrase of another box."""

    name: str
    boxes: list[int]
    right: list[bool]
    chances: list[float]
    wanted: list[set]


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: one phrase for each distinct box of the readable images, all phrases of that box
    (see `BoxTable`) as references; beam search with `num_beams` (1: greedy), at most
    `max_new_tokens` tokens, no prompt.

    `region_BLEU@1..4`, `region_ROUGE_L`, `region_CIDEr` as in captioning, one item a box.
    `region_exact_phrase`: the written phrase is one of the references, after `normalise_phrase`.
    `region_head_noun`: its head noun is that of a reference (`head_noun`, a rule for English).
    `region_colour_shape_accuracy`: colour and shape of the written phrase are those of a reference;
    only if at least 90 % of the boxes have a reference that names both, and over those; and the
    same under `region_colour_shape_accuracy_held_out` over the pairs that no training scene shows.
    Chance: the first phrase of another box. Standard errors resample images.
    """
    table = box_table(encoded, options)
    written = write_texts(
        model,
        encoded.region_vectors_RE[table.rows],
        **options.work,
        title="region captions",
        **options.writing,
    )
    groups = table.image.numpy()
    found = caption_scores(written, table.phrases, groups=groups, samples=options.samples, seed=options.seed)
    scores = found.scores
    scores.chance = chance_scores(table.phrases, options.seed)
    absent = add_java_scores(scores, written, table.phrases, options, groups)
    scores = scores.prefixed("region_")
    exact = _compared("region_exact_phrase", normalise_phrase, written, table)
    head = _compared("region_head_noun", head_noun, written, table)
    coloured = _coloured(written, table)
    unseen = _held_out(coloured) if coloured else None
    for share in (exact, head, coloured, unseen):
        if share is not None:
            scores.update(_figures(share, groups, options))
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        regions=len(encoded.region_boxes),
        box_convention=BOX_CONVENTION,
        regions_unseen=encoded.regions_unseen,
        boxes=len(table.boxes),
        boxes_with_colour_and_shape=len(coloured.boxes) if coloured else 0,
        **options.writing,
        absent=absent,
        chance="the first phrase of another box",
    )
    examples = _examples(written, table, coloured, found.cider_N, options)
    return TaskResult.of(NAME, stated, scores, examples, keys=encoded.keys, picture=encoded.picture)


def _figures(share: _Share, groups: np.ndarray, options: TaskOptions) -> Scores:
    values = np.array(share.right, dtype=np.float64)
    chance = {share.name: float(np.mean(share.chances))}
    return Scores.of_means({share.name: values}, chance=chance, groups=groups[share.boxes], **options.bootstrap)


def _compared(name: str, form: Callable[[str], str], written: Sequence[str], table: BoxTable) -> _Share:
    """Whether the written phrase is one of the references, in this form of both."""
    return _share(
        name,
        list(range(len(written))),
        [form(w) for w in written],
        [{form(p) for p in phrases} for phrases in table.phrases],
        [form(phrases[0]) for phrases in table.phrases],
    )


def _coloured(written: Sequence[str], table: BoxTable) -> _Share | None:
    """None where the data are no scenes."""
    allowed = [{attributes_of(p) for p in phrases} - {None} for phrases in table.phrases]
    boxes = [b for b, attributes in enumerate(allowed) if attributes]
    if len(boxes) < _SCENES_SHARE * len(allowed):
        return None
    return _share(
        "region_colour_shape_accuracy",
        boxes,
        [attributes_of(written[b]) for b in boxes],
        [allowed[b] for b in boxes],
        [attributes_of(table.phrases[b][0]) for b in boxes],
    )


def _share(name: str, boxes: list[int], given: list, allowed: list[set], first: list) -> _Share:
    """Chance: of all other boxes' first phrases, how many would be right here."""
    pool = Counter(first)
    others = max(len(boxes) - 1, 1)
    chances = [(sum(pool[a] for a in here) - (own in here)) / others for here, own in zip(allowed, first, strict=True)]
    right = [g in here for g, here in zip(given, allowed, strict=True)]
    return _Share(name, boxes, right, chances, allowed)


def _held_out(all_boxes: _Share) -> _Share | None:
    """Of the boxes whose colour and shape never occur together in training; None without any."""
    kept = [n for n, wanted in enumerate(all_boxes.wanted) if wanted <= HELD_OUT]
    if not kept:
        return None
    return _Share(
        f"{all_boxes.name}_held_out",
        [all_boxes.boxes[n] for n in kept],
        [all_boxes.right[n] for n in kept],
        [all_boxes.chances[n] for n in kept],
        [all_boxes.wanted[n] for n in kept],
    )


def _examples(
    written: Sequence[str],
    table: BoxTable,
    coloured: _Share | None,
    cider_B: np.ndarray,
    options: TaskOptions,
) -> list[Example]:
    """Some images with their boxes: drawn by lot, and those that went worst."""
    verdicts: dict[int, bool] = dict(zip(coloured.boxes, coloured.right, strict=True)) if coloured else {}
    of_image: dict[int, list[int]] = {}
    for b, image in enumerate(table.image.tolist()):
        of_image.setdefault(image, []).append(b)
    images = list(of_image)
    badness = [np.mean([not verdicts[b] if b in verdicts else -cider_B[b] for b in of_image[i]]) for i in images]
    drawn = draw(len(images), options.drawn, options.seed)
    out: list[Example] = []
    for n, k in enumerate(drawn + worst(np.array(badness), options.worst, drawn)):
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        notes = tuple(
            BoxNote(table.boxes[b], tuple(table.phrases[b]), written[b], verdicts.get(b))
            for b in of_image[images[k]][:_BOXES_A_PICTURE]
        )
        out.append(RegionExample(kind, images[k], notes))
    return out
