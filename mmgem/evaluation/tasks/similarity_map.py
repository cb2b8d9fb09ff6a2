"""Where in the picture the model sees what a phrase says.

Receives an encoded split with regions and the model. Gives the pointing game's accuracy, its chance and that of the
picture's middle. Refuses a split without regions, with a UserError.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgem.data.samples import Box
from mmgem.evaluation.metrics.retrieval import TIE, unit_vectors
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import Example, Kind, MapExample, TaskResult
from mmgem.evaluation.tasks.boxes import BoxTable, box_table
from mmgem.evaluation.tasks.common import TaskOptions, draw, protocol, worst
from mmgem.inference.encode import Encoded, Encoder, in_pieces

NAME = "similarity-map"
VERSION = 1

_PICTURES = 32  # at a time


@dataclass(slots=True)
class _Pointed:
    """One phrase of one image. share: of all places that lie in a box of the phrase."""

    image: int
    phrase: int
    hit: bool
    middle: bool
    share: float
    peak: tuple[float, float]


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: the pointing game (Zhang et al. 2016). For each image and each distinct phrase of its boxes
    (`normalise_phrase`), the place of the feature map whose vector has the highest cosine with the phrase's: a hit if
    the place's middle lies in one of the boxes that carry the phrase in this image. If several places tie, all of them
    must.

    `pointing_accuracy`: over all pairs of image and phrase; chance: a place by lot. `pointing_centre`: of the middle of
    what the model sees instead, a baseline that knows photographers. Standard errors resample images. At most `queries`
    images, drawn by lot.
    """
    table = box_table(encoded, options)
    boxes_of = _boxes_of(table)
    images = sorted({image for image, _ in boxes_of})
    images = [images[i] for i in draw(len(images), options.queries, options.seed)]
    phrases_of: defaultdict[int, list[int]] = defaultdict(list)
    for image, phrase in boxes_of:
        phrases_of[image].append(phrase)
    phrases_QE = unit_vectors(encoded.phrase_vectors_PE[table.spoken])

    def point(chosen: list[int]) -> list[_Pointed]:
        pictures = [encoded.picture(i) for i in chosen]
        out = []
        for i, picture, places_HWE in zip(chosen, pictures, model.place_vectors(pictures), strict=True):
            maps_QHW = _maps(places_HWE, phrases_QE[phrases_of[i]])
            for phrase, map_HW in zip(phrases_of[i], maps_QHW, strict=True):
                out.append(_pointed(i, phrase, map_HW, model.window(picture), boxes_of[i, phrase]))
        return out

    pieces = in_pieces(images, point, "similarity maps", **options.work, size=_PICTURES, unit="images")
    found = [pointed for piece in pieces for pointed in piece]
    values = {
        "pointing_accuracy": np.array([p.hit for p in found], dtype=np.float64),
        "pointing_centre": np.array([p.middle for p in found], dtype=np.float64),
    }
    chance = {"pointing_accuracy": float(np.mean([p.share for p in found]))}
    scores = Scores.of_means(values, chance=chance, groups=np.array([p.image for p in found]), **options.bootstrap)
    grid = model.place_vectors([encoded.picture(images[0])]).shape[1:3]
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        images_asked=len(images),
        phrases=len(found),
        places=list(grid),
        chance="a place of the map by lot",
    )
    examples = _examples(model, encoded, table, found, phrases_QE, boxes_of, options)
    return TaskResult.of(NAME, stated, scores, examples, keys=encoded.keys, picture=encoded.picture)


def _boxes_of(table: BoxTable) -> dict[tuple[int, int], list[Box]]:
    """By image and phrase the boxes that carry it."""
    out: defaultdict[tuple[int, int], list[Box]] = defaultdict(list)
    for image, box, phrases in zip(table.image.tolist(), table.boxes, table.phrase_ids, strict=True):
        for phrase in phrases:
            out[image, phrase].append(box)
    return dict(out)


def _maps(places_HWE: Tensor, phrases_QE: Tensor) -> Tensor:
    """[Q, H, W] cosines."""
    unit = unit_vectors(places_HWE.flatten(0, 1)).view_as(places_HWE)
    return torch.einsum("hwe,qe->qhw", unit, phrases_QE)


def _pointed(image: int, phrase: int, map_HW: Tensor, window: Box, boxes: list[Box]) -> _Pointed:
    x1, y1, x2, y2 = window
    height, width = map_HW.shape
    x_W = x1 + (torch.arange(width) + 0.5) * (x2 - x1) / width
    y_H = y1 + (torch.arange(height) + 0.5) * (y2 - y1) / height
    inside_HW = torch.zeros(height, width, dtype=torch.bool)
    for bx1, by1, bx2, by2 in boxes:
        inside_HW |= ((y_H >= by1) & (y_H <= by2))[:, None] & ((x_W >= bx1) & (x_W <= bx2))
    top_HW = map_HW >= map_HW.max() - TIE
    row, column = divmod(int(map_HW.argmax()), width)
    mx, my = (x1 + x2) / 2, (y1 + y2) / 2
    middle = any(b[0] <= mx <= b[2] and b[1] <= my <= b[3] for b in boxes)
    return _Pointed(
        image,
        phrase,
        bool(inside_HW[top_HW].all()),
        middle,
        float(inside_HW.double().mean()),
        (float(x_W[column]), float(y_H[row])),
    )


def _examples(
    model: Encoder,
    encoded: Encoded,
    table: BoxTable,
    found: list[_Pointed],
    phrases_QE: Tensor,
    boxes_of: dict[tuple[int, int], list[Box]],
    options: TaskOptions,
) -> list[Example]:
    """Pairs drawn by lot, and misses where chance is highest."""
    drawn = draw(len(found), options.drawn, options.seed)
    missed = worst([-1.0 if p.hit else p.share for p in found], options.worst, drawn)
    chosen = drawn + [n for n in missed if not found[n].hit]
    out: list[Example] = []
    for at, n in enumerate(chosen):
        one = found[n]
        picture = encoded.picture(one.image)
        map_HW = _maps(model.place_vectors([picture])[0], phrases_QE[[one.phrase]])[0]
        kind: Kind = "drawn" if at < len(drawn) else "worst"
        out.append(
            MapExample(
                kind,
                one.image,
                encoded.phrases[table.spoken[one.phrase]],
                model.window(picture),
                tuple(tuple(row) for row in map_HW.tolist()),
                tuple(boxes_of[one.image, one.phrase]),
                one.peak,
                one.hit,
            )
        )
    return out
