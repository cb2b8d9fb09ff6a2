"""Captions of whole images, compared with what people wrote.

Receives an encoded split and the model that writes. Gives BLEU@1..4, ROUGE_L, CIDEr, and METEOR and SPICE where Java is
found: where not, they are absent, and the protocol says why. Refuses a split without captions, with a UserError.
"""

from collections.abc import Sequence

import numpy as np

from mmgem.errors import UserError
from mmgem.evaluation.metrics.captions import caption_scores
from mmgem.evaluation.metrics.java_scores import NAMES as JAVA_NAMES
from mmgem.evaluation.metrics.java_scores import java_scores
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import CaptionExample, Example, Kind, TaskResult
from mmgem.evaluation.tasks.common import TaskOptions, draw, protocol, worst
from mmgem.inference.encode import Encoded, Encoder, write_texts

NAME = "captioning"
VERSION = 1


def run(model: Encoder, encoded: Encoded, options: TaskOptions) -> TaskResult:
    """Protocol: one caption for each readable image with captions, all of its captions as
    references; beam search with `num_beams` (1: greedy), at most `max_new_tokens` tokens, no
    prompt.

    Tokens as coco-caption's PTBTokenizer; CIDEr's document frequencies from the references of this
    split. Where the data give each image a "domain" (NoCaps), `CIDEr_DOMAIN` is the mean over its
    images, with the frequencies of the whole split. `captions.json` beside the figures has what was
    written as coco-caption's results. Chance: the first caption of another image of the split, drawn by lot.
    """
    asked = [i for i, captions in enumerate(encoded.captions) if captions]
    if not asked:
        raise UserError(
            f"{options.data or 'the data'}: split {options.split} has no captions; "
            "captioning compares with them, choose other data or another task"
        )
    references = [encoded.captions[i] for i in asked]
    written = write_texts(
        model,
        encoded.image_vectors_NE[asked],
        **options.work,
        title="captions",
        **options.writing,
    )
    found = caption_scores(written, references, samples=options.samples, seed=options.seed)
    scores = found.scores
    scores.chance = chance_scores(references, options.seed)
    absent = add_java_scores(scores, written, references, options)
    domains = [encoded.meta[i].get("domain") for i in asked]
    for domain in sorted({d for d in domains if isinstance(d, str)}):
        own = [n for n, d in enumerate(domains) if d == domain]
        values = {f"CIDEr_{domain}": found.cider_N[own]}
        scores.update(Scores.of_means(values, **options.bootstrap))
    stated = protocol(
        model,
        options,
        VERSION,
        images=len(encoded.keys),
        skipped=len(encoded.skipped),
        captions=sum(map(len, references)),
        captions_an_image=[min(map(len, references)), max(map(len, references))],
        **options.writing,
        absent=absent,
        chance="the first caption of another image",
    )
    drawn = draw(len(asked), options.drawn, options.seed)
    bad = worst(-found.cider_N, options.worst, drawn)
    examples: list[Example] = []
    for n, i in enumerate(drawn + bad):
        kind: Kind = "drawn" if n < len(drawn) else "worst"
        examples.append(CaptionExample(kind, asked[i], written[i], tuple(references[i]), float(found.cider_N[i])))
    results = [{"image_id": _image_id(encoded, i), "caption": w} for i, w in zip(asked, written, strict=True)]
    return TaskResult.of(
        NAME, stated, scores, examples, keys=encoded.keys, picture=encoded.picture, files={"captions.json": results}
    )


def _image_id(encoded: Encoded, image: int) -> int | str:
    """The number that COCO, NoCaps and Karpathy's files know the image by, where the data have it; else its key."""
    meta = encoded.meta[image]
    found = next((meta[name] for name in ("image_id", "cocoid", "coco_id", "id") if name in meta), encoded.keys[image])
    return int(found) if str(found).isdecimal() else str(found)


def add_java_scores(
    scores: Scores,
    written: Sequence[str],
    references: Sequence[Sequence[str]],
    options: TaskOptions,
    groups: np.ndarray | None = None,
) -> dict[str, str]:
    """METEOR and SPICE, where the first rank's machine can compute them, once for all ranks; gives why the others are
    absent."""
    if not options.java:
        return dict.fromkeys(JAVA_NAMES, "not asked for")
    found = options.ranks.by_first(lambda: java_scores(written, references, groups=groups, **options.bootstrap))
    scores.update(found.scores)
    return found.absent


def chance_scores(references: list[list[str]], seed: int) -> dict[str, float]:
    """The figures of an item's first reference given to another item; nothing for one item."""
    count = len(references)
    if count < 2:
        return {}
    shift = int(np.random.default_rng(seed).integers(1, count))
    others = [references[(i + shift) % count][0] for i in range(count)]
    return caption_scores(others, references, samples=0).scores.metrics
