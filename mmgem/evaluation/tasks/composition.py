"""Which of some texts is true of a picture, where they differ in a word or in word order: by vector, by likelihood.

Receives the model and a folder with files of `layouts.composition`. Gives text, image and group scores of each
benchmark and of its subsets, and what a model gets that never sees the picture. Refuses what that reader does, and more
broken pictures than `inference.encode.MAX_BROKEN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmgem.errors import UserError
from mmgem.evaluation.layouts.composition import ChoiceItem, has_composition, read_composition
from mmgem.evaluation.layouts.pictures import PictureFile
from mmgem.evaluation.metrics.retrieval import TIE, unit_vectors
from mmgem.evaluation.metrics.scores import Scores
from mmgem.evaluation.result import ChoiceExample, Example, Kind, TaskResult
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

NAME = "composition"
VERSION = 1

_SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
_SCORES = ("text", "image", "group")

found = has_composition


def check(data: Path, options: TaskOptions) -> None:
    read_composition(data, options.images)


def run(model: Encoder, data: Path, options: TaskOptions) -> TaskResult:
    """Protocol: every item of every benchmark in the folder, in four orders of its pairs of picture and text.

    `text`: for each picture of the item that has a right text, it beats the other texts. `image`: for each text that
    has a right picture, it beats the other pictures. `group`: both. So with Winoground's two and two (Thrush et al.
    2022); with one picture `text` is the accuracy of SugarCrepe, ARO, VALSE and SPEC (image -> text) and recall@1 of
    CREPE, and with one text `image` is the accuracy of SPEC (text -> image). A tie with a wrong one is a loss.

    `vector`: by cosine. `generative`: by log p(text | picture) - alpha * log p(text | no picture), sums over the text's
    tokens and its end; "no picture" is the mean image vector of the benchmark's pictures. `both`: by exp(logit_scale) *
    cosine plus that. `blind_vector`, `blind_generative`: by the cosine with the mean image vector, and by log p(text |
    no picture): what can be known from the texts alone; where an item has several right pairs, as in Winoground, that
    is nothing, for the blind take one text for all pictures. All but the vectors' not for a model that writes nothing.
    `subset_mean`: of the subsets' figures, each weighing the same. `macro`: the mean over ARO's relations, without
    those that its authors leave out, and over its pairs of attributes with at least 25 items.
    """
    benchmarks = read_composition(data, options.images)
    every = [item for benchmark in benchmarks.values() for item in benchmark.items]
    pictures = list(dict.fromkeys(picture for item in every for picture in item.pictures))
    vectors_NE, kept, skipped = embed_pictures(model, pictures, **options.work)
    row = {pictures[number]: n for n, number in enumerate(kept)}
    texts = list(dict.fromkeys(text for item in every for text in item.texts))
    unit_TE = unit_vectors(embed_texts(model, texts, **options.work, title="texts"))

    scores, of_subsets = Scores(), Scores()
    counts: dict[str, Any] = {}
    sweep: dict[str, dict[str, float]] = {}
    examples: list[Example] = []
    for name, benchmark in benchmarks.items():
        items = [item for item in benchmark.items if all(picture in row for picture in item.pictures)]
        if not items:
            raise UserError(f"{data}: {name}: no item whose pictures are all readable, the first: {skipped[0]}")
        group = _Group.of(items, row, texts)
        seen = group.picture_P.unique()
        unreadable = len(benchmark.items) - len(items)
        counts[name] = {"items": len(items), "unreadable": unreadable, "equal": benchmark.equal, "images": len(seen)}
        if len(seen) < 2:
            raise UserError(f"{data}: {name} has one picture, and none to compare it with; give more of it")
        scored = _Scored.of(model, vectors_NE, unit_TE, texts, group, options, name)
        ways = scored.ways(options.alpha)
        judged = {way: group.judge(score_P) for way, score_P in ways.items()}
        whole, parts = _scores(name, group, judged, options)
        scores.update(whole)
        of_subsets.update(parts)
        for alpha in _SWEPT if scored.log_p_P is not None else ():
            for way in ("generative", "both"):
                right = group.judge(scored.ways(alpha)[way])
                sweep.setdefault(str(alpha), {}).update(
                    {f"{name}_{way}_{score}": float(values.mean()) for score, values in right.items()}
                )
        shown_P = ways["both"] if "both" in ways else np.exp(scored.scale) * ways["vector"]
        examples += _examples(name, group, shown_P, options)
    scores.update(of_subsets)
    stated = protocol(
        model,
        replace(options, split=""),
        VERSION,
        images=len(kept),
        skipped=len(skipped),
        units="the first pictures",
        benchmarks=counts,
        texts=len(texts),
        texts_cut=int(sum(model.codec.encode(texts)[1])),
        **(
            {"alpha": options.alpha, "alpha_sweep": sweep, "no_image": "the benchmark's mean image vector"}
            if sweep
            else {}
        ),
        logit_scale=logit_scale_of(model),
        chance="scores by lot",
    )
    return TaskResult.of(
        NAME,
        stated,
        scores,
        examples,
        keys=[_key(pictures[number]) for number in kept],
        picture=lru_cache(maxsize=64)(lambda number: pictures[kept[number]].read()),
    )


def _key(picture: PictureFile) -> str:
    return picture.key if picture.part is None else f"{picture.key} {picture.part}"


@dataclass(slots=True)
class _Group:
    """Items with all their pairs in one row: P pairs, of the items' [I, T] tables one after the other.

    picture_P, text_P: rows of the vectors. starts: where each item begins. right: its right pairs.
    """

    items: list[ChoiceItem]
    picture_P: Tensor
    text_P: Tensor
    starts: list[int]

    @classmethod
    def of(cls, items: list[ChoiceItem], picture_row: dict[PictureFile, int], every_text: list[str]) -> _Group:
        text_row = {text: n for n, text in enumerate(every_text)}
        pictures: list[int] = []
        texts: list[int] = []
        starts: list[int] = []
        for item in items:
            starts.append(len(pictures))
            rows = [text_row[text] for text in item.texts]
            for picture in item.pictures:
                pictures += [picture_row[picture]] * len(rows)
                texts += rows
        return cls(items, torch.tensor(pictures), torch.tensor(texts), starts)

    def tables(self, score_P: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Items of one shape together: which, their scores [N, I, T], and their right pairs [N, R, 2]."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for number, item in enumerate(self.items):
            shapes.setdefault((len(item.pictures), len(item.texts), len(item.pairs)), []).append(number)
        for (rows, columns, _), numbers in shapes.items():
            at_NP = torch.tensor([self.starts[n] for n in numbers])[:, None] + torch.arange(rows * columns)
            pairs_NR2 = torch.tensor([self.items[n].pairs for n in numbers])
            yield torch.tensor(numbers), score_P[at_NP].view(-1, rows, columns), pairs_NR2

    def judge(self, score_P: Tensor) -> dict[str, np.ndarray]:
        """Of _SCORES those that are asked of these items: 1 or 0 an item, NaN where an item has only one choice."""
        judged = {score: np.full(len(self.items), np.nan) for score in _SCORES}
        for which, score_NIT, pairs_NR2 in self.tables(score_P):
            picture_NR, text_NR = pairs_NR2.unbind(dim=2)
            several = (score_NIT.shape[2] > 1, score_NIT.shape[1] > 1)
            right = {
                "text": _beats(score_NIT, picture_NR, text_NR),
                "image": _beats(score_NIT.transpose(1, 2), text_NR, picture_NR),
            }
            right["group"] = right["text"] & right["image"]
            for score, asked in zip(_SCORES, (*several, all(several)), strict=True):
                if asked:
                    judged[score][which.numpy()] = right[score].numpy()
        return {score: values for score, values in judged.items() if not np.isnan(values).all()}

    def chance(self, score: str, blind: bool = False) -> np.ndarray:
        """Of each item, with scores by lot. Of two pictures and two texts, a group is right in 4 of 24 orders. The
        blind score one text for all pictures, and are never right of two."""
        out = []
        for item in self.items:
            rows, columns, right = len(item.pictures), len(item.texts), len(item.pairs)
            text, image = (1 / columns) ** right, (1 / rows) ** right
            text = 0.0 if blind and right > 1 else text
            out.append({"text": text, "image": image, "group": 1 / 6 if right == 2 else text * image}[score])
        return np.array(out)


def _beats(score_NAB: Tensor, row_NR: Tensor, right_NR: Tensor) -> Tensor:
    """[N] whether in every asked row of each item's table the right column is above all others."""
    asked_NRB = score_NAB.gather(1, row_NR[:, :, None].expand(-1, -1, score_NAB.shape[2]))
    own_NR1 = asked_NRB.gather(2, right_NR[:, :, None])
    ahead_NR = (asked_NRB >= own_NR1 - TIE).sum(dim=2) - 1
    return (ahead_NR == 0).all(dim=1)


@dataclass(slots=True)
class _Scored:
    """What the model knows of the P pairs of a benchmark."""

    cosine_P: Tensor
    blind_P: Tensor
    """Cosine of the text with the mean image vector."""
    log_p_P: Tensor | None
    prior_P: Tensor | None
    """log p(text | no picture)."""
    scale: float

    @classmethod
    def of(
        cls,
        model: Encoder,
        vectors_NE: Tensor,
        unit_TE: Tensor,
        texts: list[str],
        group: _Group,
        options: TaskOptions,
        name: str,
    ) -> _Scored:
        blank_1E = mean_vector(vectors_NE[group.picture_P.unique()])
        cosine_P = (unit_vectors(vectors_NE)[group.picture_P] * unit_TE[group.text_P]).sum(dim=1)
        blind_P = (unit_TE @ unit_vectors(blank_1E).T)[group.text_P, 0]
        if not writes(model):
            return cls(cosine_P, blind_P, None, None, logit_scale_of(model))
        # A pair that several items have is asked for once.
        pairs_2U, at_P = torch.unique(torch.stack([group.picture_P, group.text_P]), dim=1, return_inverse=True)
        log_p_U, _ = pair_likelihoods(
            model, vectors_NE, texts, pairs_2U[0], pairs_2U[1], **options.work, title=f"texts of {name}"
        )
        used, text_at_P = torch.unique(group.text_P, return_inverse=True)
        said = [texts[t] for t in used.tolist()]
        prior, _ = pair_likelihoods(
            model,
            blank_1E,
            said,
            torch.zeros_like(used),
            torch.arange(len(used)),
            **options.work,
            title="texts of none",
        )
        return cls(cosine_P, blind_P, log_p_U[at_P], prior[text_at_P], logit_scale_of(model))

    def ways(self, alpha: float) -> dict[str, Tensor]:
        """[P] each, as in the protocol."""
        ways = {"vector": self.cosine_P}
        blind = {"blind_vector": self.blind_P}
        if self.log_p_P is not None and self.prior_P is not None:
            gain_P = self.log_p_P - alpha * self.prior_P
            ways |= {"generative": gain_P, "both": np.exp(self.scale) * self.cosine_P + gain_P}
            blind["blind_generative"] = self.prior_P
        return ways | blind


def _scores(
    name: str, group: _Group, judged: dict[str, dict[str, np.ndarray]], options: TaskOptions
) -> tuple[Scores, Scores]:
    """Of all items, and of each subset, where there are several."""
    subsets = np.array([item.subset for item in group.items])
    names = sorted(set(subsets))
    whole = _scores_of(name, "", np.ones(len(subsets), dtype=bool), group, judged, options, macro=len(names) == 1)
    parts = Scores()
    for subset in names if len(names) > 1 else []:
        parts.update(_scores_of(name, f"_{subset}", subsets == subset, group, judged, options, macro=True))
    return whole, parts


def _scores_of(
    name: str,
    ending: str,
    inside: np.ndarray,
    group: _Group,
    judged: dict[str, dict[str, np.ndarray]],
    options: TaskOptions,
    *,
    macro: bool,
) -> Scores:
    """macro: also the means over groups, where the items have some; else over subsets, where there are several."""
    out = Scores()
    unit = group.picture_P[torch.tensor(group.starts)].numpy()
    for score in judged["vector"]:
        asked = inside & ~np.isnan(judged["vector"][score])
        if not asked.any():
            continue
        ways = {way: of_way[score][asked] for way, of_way in judged.items() if score == "text" or _sees(way)}
        items = [group.items[n] for n in asked.nonzero()[0]]
        if macro:
            more = ("_macro", _weights([item.group for item in items]))
        else:
            more = ("_subset_mean", _unless_one(_weights([item.subset for item in items])))
        for kind, weight in (("", 1.0), more):
            if weight is not None:
                means = {f"{name}_{way}_{score}{kind}{ending}": values * weight for way, values in ways.items()}
                chance = {
                    f"{name}_{way}_{score}{kind}{ending}": float(
                        (group.chance(score, not _sees(way))[asked] * weight).mean()
                    )
                    for way in ways
                }
                out.update(Scores.of_means(means, chance=chance, groups=unit[asked], **options.bootstrap))
    return out


def _sees(way: str) -> bool:
    """The blind know no picture from another: among pictures they tie, and lose."""
    return not way.startswith("blind")


def _unless_one(weight: np.ndarray | None) -> np.ndarray | None:
    """Where all weigh the same anyway, nothing more is to be said."""
    return None if weight is None or np.allclose(weight, 1) else weight


def _weights(names: Sequence[str]) -> np.ndarray | None:
    """[N] by which a mean over the items becomes the mean over their names; "" is left out. None without names."""
    distinct, at, counts = np.unique(names, return_inverse=True, return_counts=True)
    named = distinct != ""
    if not named.any():
        return None
    each = np.where(named, len(names) / (named.sum() * counts), 0.0)
    return each[at]


def _examples(name: str, group: _Group, score_P: Tensor, options: TaskOptions) -> list[Example]:
    """Pictures with several texts to choose from: drawn by lot, and the surest mistakes."""
    asked = [n for n, item in enumerate(group.items) if len(item.texts) > 1]
    if not asked:
        return []
    drawn = draw(len(asked), options.drawn, options.seed)
    probability_P = torch.zeros_like(score_P)
    for which, score_NIT, _ in group.tables(score_P):
        at_NP = torch.tensor([group.starts[n] for n in which.tolist()])[:, None] + torch.arange(score_NIT[0].numel())
        probability_P[at_NP] = score_NIT.softmax(dim=2).flatten(1)

    def shown(n: int, i: int, t: int) -> float:
        return float(probability_P[group.starts[n] + i * len(group.items[n].texts) + t])

    sure = [-min(shown(n, i, t) for i, t in group.items[n].pairs) for n in asked]
    out: list[Example] = []
    for place, a in enumerate(drawn + worst(sure, options.worst, drawn)):
        n = asked[a]
        item = group.items[n]
        kind: Kind = "drawn" if place < len(drawn) else "worst"
        # Of several pictures that on which the model did worst.
        picture, right = min(item.pairs, key=lambda pair: shown(n, *pair))
        order = sorted(range(len(item.texts)), key=lambda t: -shown(n, picture, t))
        choices = tuple((item.texts[t], shown(n, picture, t), t == right) for t in order[:6])
        row = int(group.picture_P[group.starts[n] + picture * len(item.texts)])
        question = f"{name}{': ' + item.subset if item.subset else ''}"
        out.append(ChoiceExample(kind, row, question, choices, choices[0][2]))
    return out
