"""METEOR and SPICE of written captions, by the Java programs that pycocoevalcap carries.

Receives one written text and at least one reference an item, as strings. Gives the figures that
could be computed, with standard errors, and of each other one why it is absent: an absent figure is
never 0. Refuses empty sets and items without a reference. Downloads nothing.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmgem.evaluation.metrics.scores import Floats, Ints, Scores, mean_stderr
from mmgem.evaluation.metrics.tokenizer import tokenize

NAMES = ("METEOR", "SPICE")

Texts = dict[int, list[str]]


@dataclass(slots=True)
class JavaScores:
    """Corpus figures, those of each item [N], and one line of each absent figure that says why."""

    scores: Scores = field(default_factory=Scores)
    per_item: dict[str, Floats] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def java_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    names: Sequence[str] = NAMES,
    groups: Ints | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> JavaScores:
    """METEOR 1.5 (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016), as coco-caption has them.

    Both get the tokens of `tokenize`, as they get PTBTokenizer's there, and lie between 0 and 1.
    SPICE is the mean of the items' F; METEOR is computed from the matches of the whole set, and
    its standard error is that of the mean of the items' METEORs, by the bootstrap (`samples`
    resamples, 0: none; `groups` as in `caption_scores`).
    """
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} items")
    for i, texts in enumerate(references):
        if not texts:
            raise ValueError(f"item {i} has no reference")
    res = {i: [" ".join(tokenize(text))] for i, text in enumerate(candidates)}
    gts = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}
    out = JavaScores()
    for name in names:
        missing = why_absent(name)
        if missing is None:
            try:
                value, items_N = _SCORERS[name](gts, res)
            except (OSError, ValueError, KeyError, AssertionError, subprocess.SubprocessError) as error:
                missing = f"{name} failed: {' '.join(str(error).split()) or type(error).__name__}"
            else:
                out.scores.metrics[name], out.per_item[name] = value, items_N
        if missing is not None:
            out.absent[name] = missing
        elif samples:
            errors = mean_stderr(out.per_item[name][:, None], groups=groups, samples=samples, seed=seed)
            out.scores.stderr[name] = float(errors[0])
    return out


def why_absent(name: str) -> str | None:
    """What the figure needs and this machine lacks, in one line; None if it has all."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        return f"{name} needs pycocoevalcap: pip install 'mmgem[eval]'"
    if shutil.which("java") is None:
        return f"{name} needs Java: no `java` on the PATH"
    folder = Path(next(iter(found.submodule_search_locations)))
    if name == "METEOR" and not (folder / "meteor" / "meteor-1.5.jar").is_file():
        return f"METEOR needs meteor-1.5.jar in {folder / 'meteor'}: install pycocoevalcap again"
    # Its own start would download them.
    if name == "SPICE" and not (folder / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").is_file():
        return (
            f"SPICE needs the models of Stanford CoreNLP 3.6.0 in {folder / 'spice' / 'lib'}: "
            "run `python get_stanford_models.py` in the folder above it"
        )
    return None


def _meteor(gts: Texts, res: Texts) -> tuple[float, Floats]:
    from pycocoevalcap.meteor.meteor import Meteor

    value, items = Meteor().compute_score(gts, res)
    return float(value), np.array(items, dtype=np.float64)


def _spice(gts: Texts, res: Texts) -> tuple[float, Floats]:
    from pycocoevalcap.spice.spice import Spice

    value, items = Spice().compute_score(gts, res)
    return float(value), np.array([item["All"]["f"] for item in items], dtype=np.float64)


_SCORERS: dict[str, Callable[[Texts, Texts], tuple[float, Floats]]] = {"METEOR": _meteor, "SPICE": _spice}
