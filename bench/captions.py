"""Caption figures of this package beside pycocoevalcap's, and the time that both take, in one run.

    pip install pycocoevalcap
    python bench/captions.py --data DIR [--split val] [--rounds 3]

DIR: made by `mmgem data prepare`, with several captions an image. The first caption of each image is taken for the
written one, the others for its references. pycocoevalcap: its tokenizer, which is a Java program, and its Bleu, Rouge
and Cider, as `COCOEvalCap.evaluate` calls them; where there is no Java, its figures are of this package's tokens, and
its time is without the tokenizer's. This package: `caption_scores`, all in Python; in a row of its own with standard
errors, which pycocoevalcap does not give. They take turns; the least of the rounds counts.

Ends with 1 where a figure differs by 0.00005 or more, the fourth decimal; `--no-marks` leaves that out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmgem.data.shards import ShardedDataset
from mmgem.evaluation.metrics import caption_scores, tokenize
from mmgem.progress import Progress

MARK = 0.00005
NAMES = ("BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4", "ROUGE_L", "CIDEr")

Texts = list[list[str]]


def main() -> None:
    args = parse_arguments()
    written, references = captions(args.data, args.split)
    java = shutil.which("java") is not None
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "pycocoevalcap" + ("" if java else ", without its tokenizer"): lambda: theirs(written, references, java),
        "mmgem": lambda: caption_scores(written, references, samples=0).scores.metrics,
        "  with standard errors": lambda: caption_scores(written, references).scores.metrics,
    }
    times: dict[str, list[float]] = {case: [] for case in cases}
    figures: dict[str, dict[str, float]] = {}
    with Progress("measuring", args.rounds * len(cases), "runs") as progress:
        for _ in range(args.rounds):
            for case, work in cases.items():
                start = time.perf_counter()
                figures[case] = work()
                times[case].append(time.perf_counter() - start)
                progress.advance()
    print(f"{len(written):,} images, {sum(map(len, references)):,} references; least of {args.rounds} rounds")
    peer, own, _ = cases
    for case, seconds in times.items():
        print(f"{case:36}{min(seconds):8.2f} s   ratio {min(seconds) / min(times[peer]):.2f}")
    print(f"{'':12}{'pycocoevalcap':>16}{'mmgem':>12}{'difference':>14}")
    for name in NAMES:
        there, here = figures[peer][name], figures[own][name]
        print(f"{name:12}{there:16.6f}{here:12.6f}{here - there:+14.1e}")
    missed = [name for name in NAMES if not abs(figures[own][name] - figures[peer][name]) < MARK]
    if missed and not args.no_marks:
        sys.exit("missed: " + ", ".join(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="val")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-marks", action="store_true", help="end with 0 whatever is found")
    return parser.parse_args()


def captions(data: Path, split: str) -> tuple[list[str], Texts]:
    dataset = ShardedDataset(data / split)
    every = [dataset.sample(n).captions for n in range(len(dataset))]
    several = [own for own in every if len(own) > 1]
    if not several:
        sys.exit(f"{data}/{split}: no image with several captions")
    return [own[0] for own in several], [list(own[1:]) for own in several]


def theirs(written: Sequence[str], references: Sequence[Sequence[str]], java: bool) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    if java:
        with contextlib.redirect_stderr(io.StringIO()):
            gts = PTBTokenizer().tokenize({n: [{"caption": t} for t in own] for n, own in enumerate(references)})
            res = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(written)})
    else:
        gts = {n: [" ".join(tokenize(t)) for t in own] for n, own in enumerate(references)}
        res = {n: [" ".join(tokenize(text))] for n, text in enumerate(written)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, _ = Rouge().compute_score(gts, res)
    cider, _ = Cider().compute_score(gts, res)
    return dict(zip(NAMES, map(float, [*bleu, rouge, cider]), strict=True))


if __name__ == "__main__":
    main()
