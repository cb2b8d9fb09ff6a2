"""Makes caption_scores.json: what coco-caption itself says of the sentences below.

    python tests/golden/make_caption_scores.py

Needs Java and the package pycocoevalcap (1.2). The tokens come from its PTBTokenizer, the scores
from its Bleu, Rouge and Cider on these tokens.
"""

import json
import tempfile
from pathlib import Path

OUT = Path(__file__).with_name("caption_scores.json")

# Candidate first, then its references. Written for this file.
ITEMS = [
    (
        "A small dog runs across the wet grass.",
        ["A little dog is running over wet grass .", "The dog's running through a field!"],
    ),
    (
        "two men are standing next to a red truck",
        ["Two men stand beside an old, red truck.", "Two men are standing there with a red truck"],
    ),
    (
        "a cat",
        ["A cat sleeps on the chair's arm.", "It's a grey cat (asleep) on a chair."],
    ),
    (
        "a woman is riding a bike down the street down the street down the street",
        ["A woman in a t-shirt rides a bike.", "Someone can't stop: she rides down the street..."],
    ),
    (
        "nothing of this fits",
        ["Four surfers wait for a wave", 'A sign says "no swimming" at 5:30pm'],
    ),
    (
        "The U.S. flag flies over St. Mary's school",
        ["The flag of the U.S. above a school", "a flag at Dr. No's house; it's windy"],
    ),
    ("", ["An empty beach at dusk", "the sea"]),
    (
        "a man with a hat and a man without a hat",
        ["A man wearing a hat talks to a man without one.", "two men, one with a hat"],
    ),
]

# Only tokenised.
SENTENCES = [
    "They'd've said: \"don't!\" -- but he wouldn't.",
    "rock 'n' roll in the '90s, at 3 o'clock",
    "$5.00 & 10% off 1,000 black-and-white t-shirts",
    "She's gonna win; I cannot, y'all can't",
    "Mr. Smith's U.S. team (No. 7) won 3-2 ...",
    "a 4-wheeler, a 4x4 and a 1950's car?!",
    "kids' toys [broken] {lost} \u201cquoted\u201d caf\u00e9\u2019s",
    "the dogs ' owner and the dog 's tail .",
    "Jr. and Sr. vs. Acme Co. at http://example.org/a?b=c",
    "a/b or w/o e.g. an and/or",
]


def main() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = ptb([c for c, _ in ITEMS])
    references = [ptb(r) for _, r in ITEMS]
    res = {i: [c] for i, c in enumerate(candidates)}
    gts = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouges = Rouge().compute_score(gts, res)
    cider, ciders = Cider().compute_score(gts, res)
    golden = {
        "made_by": "python tests/golden/make_caption_scores.py (pycocoevalcap 1.2, OpenJDK 17)",
        "items": [{"candidate": c, "references": r} for c, r in ITEMS],
        "scores": {f"BLEU@{n + 1}": b for n, b in enumerate(bleu)} | {"ROUGE_L": float(rouge), "CIDEr": float(cider)},
        "rouge": [float(x) for x in rouges],
        "cider": [float(x) for x in ciders],
        "tokens": dict(zip(SENTENCES, [s.split() for s in ptb(SENTENCES)], strict=True)),
    }
    OUT.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


def ptb(sentences: list[str]) -> list[str]:
    """Through Java; an empty sentence stays empty."""
    import subprocess

    import pycocoevalcap.tokenizer.ptbtokenizer as module

    folder = Path(module.__file__).parent
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(sentences) + "\n")
        file.flush()
        # fmt: off
        command = ["java", "-cp", module.STANFORD_CORENLP_3_4_1_JAR,
                   "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase",
                   file.name]
        # fmt: on
        out = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
    lines = out.decode().split("\n")[: len(sentences)]
    kept = [[w for w in line.split() if w not in module.PUNCTUATIONS] for line in lines]
    return [" ".join(words) for words in kept]


if __name__ == "__main__":
    main()
