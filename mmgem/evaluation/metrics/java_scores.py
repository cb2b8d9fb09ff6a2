"""METEOR and SPICE of written captions, by the Java programs that pycocoevalcap carries.

Receives one written text and at least one reference an item, as strings. Gives the figures that
could be computed, with standard errors, and of each other one why it is absent: an absent figure is
never 0. Refuses empty sets and items without a reference. Downloads nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgem.evaluation.metrics.scores import Floats, Ints, Scores, mean_stderr
from mmgem.evaluation.metrics.tokenizer import tokenize

NAMES = ("METEOR", "SPICE")

Texts = dict[int, list[str]]

_PATIENCE, _PATIENCE_AN_ITEM = 300.0, 0.1  # seconds


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
                value, items_N = _scored(name, gts, res)
            except (OSError, ValueError, KeyError) as error:
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


@contextmanager
def java_kept() -> Iterator[None]:
    """Within, a program that was started is kept for the next texts: METEOR's reads its tables for seconds."""
    kept: dict[str, _Program] = {}
    _programs.append(kept)
    try:
        yield
    finally:
        _programs.pop()
        for program in kept.values():
            program.end()


def _scored(name: str, gts: Texts, res: Texts) -> tuple[float, Floats]:
    kept = _programs[-1] if _programs else {}
    program = kept.pop(name, None) or _Program(name)
    try:
        found = program.ask(gts, res)
    except BaseException:
        program.end()
        raise
    if _programs:
        kept[name] = program
    else:
        program.end()
    return float(found["value"]), np.array(found["items"], dtype=np.float64)


class _Program:
    """A figure's program, in a process of its own: pycocoevalcap's scorer waits for itself for ever when its Java has
    failed. It takes texts a line, and gives figures a line."""

    def __init__(self, name: str):
        self.said = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            start_new_session=True,
        )

    def ask(self, gts: Texts, res: Texts) -> dict[str, Any]:
        """Raises OSError, ValueError."""
        seconds = _PATIENCE + _PATIENCE_AN_ITEM * len(res)
        asked = json.dumps([list(gts.values()), list(res.values())]).encode() + b"\n"
        writing, reading = self.process.stdin, self.process.stdout
        assert writing is not None and reading is not None
        try:
            writing.write(asked)
            writing.flush()
        except BrokenPipeError:
            raise ValueError(self._failure()) from None
        found, end = b"", time.monotonic() + seconds
        while not found.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                raise ValueError(f"no result after {seconds:.0f} s")
            if not (part := os.read(reading.fileno(), 1 << 16)):
                raise ValueError(self._failure())
            found += part
        return json.loads(found)

    def _failure(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"ended with {code}"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.said):
            if file is not None:
                with suppress(OSError):  # what it did not take
                    file.close()


_programs: list[dict[str, _Program]] = []
"""Of `java_kept`, the innermost last: by the figure's name."""


def _meteor(gts: Texts, res: Texts) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    if not _scorers:
        _scorers.append(Meteor())
    value, items = _scorers[0].compute_score(gts, res)
    return float(value), [float(item) for item in items]


def _spice(gts: Texts, res: Texts) -> tuple[float, list[float]]:
    from pycocoevalcap.spice.spice import Spice

    value, items = Spice().compute_score(gts, res)
    return float(value), [float(item["All"]["f"]) for item in items]


_SCORERS: dict[str, Callable[[Texts, Texts], tuple[float, list[float]]]] = {"METEOR": _meteor, "SPICE": _spice}
_scorers: list[Any] = []  # never deleted: that is what waits


def _main(name: str) -> int:
    """The process of its own: texts from its input, figures to its output, a line each. What else is printed there, by
    whatever program, goes where errors go."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            gts, res = (dict(enumerate(texts)) for texts in json.loads(line))
            value, items = _SCORERS[name](gts, res)
        except Exception as error:  # whatever it is, the other process says it
            print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr, flush=True)
            return 1
        print(json.dumps({"value": value, "items": items}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    code = _main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)
