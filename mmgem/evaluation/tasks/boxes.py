"""The distinct boxes of a split and the phrases that name each of them.

Receives `Encoded`, in which a region is one box with one phrase. Gives a `BoxTable`, in which a box
stands once. Refuses a split without regions, with a UserError.

A box of several phrases has one vector; left as several gallery rows it would tie with itself, and
a phrase would have to beat the right box to find it. So boxes are told apart by image and corners.
A phrase belongs to a box if a region pairs the two, or if it names an entity of that image that
another of the box's regions names: "a lake" and "the water" said of one box are both right.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgem.data.samples import Box
from mmgem.errors import UserError
from mmgem.evaluation.metrics.retrieval import Positives
from mmgem.evaluation.tasks.common import TaskOptions
from mmgem.inference.encode import Encoded
from mmgem.phrases import normalise_phrase


@dataclass(slots=True)
class BoxTable:
    """B distinct boxes and Q distinct phrases (after `normalise_phrase`)."""

    rows: Tensor
    """[B] a region of `Encoded` that has this box, for its vector."""
    image: Tensor
    """[B] int64."""
    boxes: list[Box]
    phrases: list[list[str]]
    """[B] the phrases of each box as the data write them, each once."""
    phrase_ids: list[list[int]]
    """[B] the numbers (0 … Q-1) of the box's phrases."""
    names: list[str]
    """[Q] normalised."""
    spoken: list[int]
    """[Q] row in `Encoded.phrases` of the most frequent way to write the phrase."""

    @property
    def box_to_phrase(self) -> Positives:
        """Boxes as queries, phrases as gallery."""
        return Positives.from_lists(self.phrase_ids, len(self.names))


def box_table(encoded: Encoded, options: TaskOptions) -> BoxTable:
    """Raises UserError if the split has no regions."""
    if not encoded.region_boxes:
        raise UserError(
            f"{options.data or 'the data'}: split {options.split} has no regions; "
            "region tasks need boxes with phrases, choose other data or another task"
        )
    images = encoded.region_image.tolist()
    number: dict[tuple[int, Box], int] = {}
    rows: list[int] = []
    spoken_of: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    entities: list[list[str]] = []
    direct: list[list[str]] = []
    for row, (image, box, phrase, entity) in enumerate(
        zip(
            images,
            encoded.region_boxes,
            encoded.region_phrases,
            encoded.region_entities,
            strict=True,
        )
    ):
        b = number.setdefault((image, box), len(number))
        if b == len(rows):
            rows.append(row)
            entities.append([])
            direct.append([])
        direct[b].append(phrase)
        if entity is not None:
            entities[b].append(entity)
            spoken_of[image, entity].append(phrase)
    phrases = []
    for b, row in enumerate(rows):
        shared = [p for e in dict.fromkeys(entities[b]) for p in spoken_of[images[row], e]]
        phrases.append(list(dict.fromkeys([*direct[b], *shared])))
    return _numbered(encoded, rows, phrases)


def _numbered(encoded: Encoded, rows: list[int], phrases: list[list[str]]) -> BoxTable:
    """Numbers the distinct phrases and chooses how each is spoken."""
    normal = {phrase: normalise_phrase(phrase) for phrase in encoded.phrases}
    uses = Counter(encoded.region_phrases)
    best: dict[str, int] = {}
    for row, phrase in enumerate(encoded.phrases):
        name = normal[phrase]
        if name not in best or uses[phrase] > uses[encoded.phrases[best[name]]]:
            best[name] = row
    ids = {name: i for i, name in enumerate(best)}
    return BoxTable(
        rows=torch.tensor(rows),
        image=encoded.region_image[rows],
        boxes=[encoded.region_boxes[row] for row in rows],
        phrases=phrases,
        phrase_ids=[list(dict.fromkeys(ids[normal[p]] for p in own)) for own in phrases],
        names=list(best),
        spoken=list(best.values()),
    )
