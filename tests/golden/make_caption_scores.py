"""Makes caption_scores.json: what coco-caption itself says of the sentences below, and of real captions.

    MMGEM_TEST_DATA=FOLDER python tests/golden/make_caption_scores.py

Needs Java and the package pycocoevalcap (1.2). The tokens come from its PTBTokenizer, the scores
from its Bleu, Rouge, Cider and Meteor on these tokens; plain CIDEr from its Cider with an infinite
sigma and without its clipping, which is all that sets it apart from CIDEr-D. FOLDER holds
data/flickr8k; of its captions only figures and checksums are kept.
"""

import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Iterable
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


# Tokenised each between two words, and some together, drawn by lot.
ODD = r"""
a the two dog man's dogs' t-shirt black-and-white x-ray it's don't can't won't we'll they've I'm you'd o'clock
rock'n'roll 'n' '90s 90's 1990's ma'am y'all d'you gonna wanna gotta lemme gimme cannot ain't isnt U.S. U.K.
U.S.A. Ph.D. a.m. p.m. 5pm 5:30 10:30pm 3rd 1st 21st 1,000 1,000,000 3.5 .5 0.5% 50% 100% $5 $5.00 US$20 €10
£3.50 ¥100 #1 #2 #dog @home @user 3/4 1/2 24/7 9/11 and/or w/ w/o & AT&T R&B H&M Q&A + = < > * ~ ^ | \ / // café
naïve niño Zürich São jalapeño piñata fiancée façade 日本語 犬 собака ½ ¼ ° 30° °C © ® ™ … – — ‘single’ “double”
«guillemets» 'quoted' "quoted" `tick` ``ticks'' (paren) [bracket] {brace} <b> &amp; &lt; :) :-) ;) :( :D <3 !!!
??? ?! !? ... .. .... -- --- - _ __ snake_case e-mail a@b.com me.you@site.co.uk http://a.com/b?c=d www.site.com
site.com/x Mr. Mrs. Dr. St. Jr. Inc. Co. vs. etc. e.g. i.e. No. no. ft. in. lbs. approx. Jan. Sept. Fig. Ave.
Blvd. J. J.K. T.V. 4x4 4-wheeler 3-D 2D 16-year-old twenty-one mid-air -5 +5 5-6 1-2-3 555-1234 555-123-4567
(555) 2012-05-01 12/25/2012 '12 1980s 80's 80s mother-in-law's kids' James's Chris' dog's-eye O'Brien d'Artagnan
l'eau Shi'ite 'til 'till 'em 'cause 'tis 'twas goin' fishin' somethin' ol' li'l nor'easter c'mon ya'll would've
wouldn't've who's-who A.B.C. a.b A.B i.e e.g. Yahoo! OK! E! C++ C# F# pro- anti- -ish -- non-U.S. *star*
**bold** dog/cat man/woman red/white/blue N/A 50/50 50-50 5ft 6'2" 5'11 12" 3' 10'x10' 20mph 60km/h
""".split()


def main() -> None:
    candidates = ptb([c for c, _ in ITEMS])
    references = [ptb(r) for _, r in ITEMS]
    figures, per_item = scores(candidates, references)
    odd = odd_sentences()
    # PTBTokenizer looks ahead into the next line, where a number changes what "no." is: one line apart.
    odd_tokens = ptb([line for sentence in odd for line in (sentence, "and")])[::2]
    golden = {
        "made_by": "python tests/golden/make_caption_scores.py (pycocoevalcap 1.2, OpenJDK 17)",
        "items": [{"candidate": c, "references": r} for c, r in ITEMS],
        "scores": figures,
        **per_item,
        "meteor": meteor(candidates, references),
        "tokens": dict(zip(SENTENCES, [s.split() for s in ptb(SENTENCES)], strict=True)),
        "odd": dict(zip(odd, odd_tokens, strict=True)),
        "flickr8k": flickr8k(Path(os.environ["MMGEM_TEST_DATA"]) / "data" / "flickr8k"),
    }
    OUT.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def odd_sentences() -> list[str]:
    rng = random.Random(0)
    drawn = [" ".join(rng.choices(ODD, k=rng.randint(2, 6))) for _ in range(300)]
    return list(dict.fromkeys([f"a {word} dog" for word in ODD] + drawn))


def scores(candidates: list[str], references: list[list[str]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Of tokenised texts: the figures, and those of each item."""
    import pycocoevalcap.cider.cider_scorer as cider_scorer
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    res = {i: [c] for i, c in enumerate(candidates)}
    gts = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    figures = {f"BLEU@{n + 1}": float(b) for n, b in enumerate(bleu)}
    per_item = {}
    figures["ROUGE_L"], per_item["rouge"] = Rouge().compute_score(gts, res)
    figures["CIDEr"], per_item["cider"] = Cider().compute_score(gts, res)
    cider_scorer.min = lambda written, _: written
    figures["CIDEr_plain"], per_item["cider_plain"] = Cider(sigma=math.inf).compute_score(gts, res)
    del cider_scorer.min
    return {n: float(v) for n, v in figures.items()}, {n: [float(x) for x in v] for n, v in per_item.items()}


def meteor(candidates: list[str], references: list[list[str]]) -> dict[str, float | list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    value, items = Meteor().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})
    return {"score": value, "items": items}


def flickr8k(folder: Path) -> dict[str, object]:
    """Figures of the first caption of each val image against its others; checksums of the tokens of all texts."""
    rows = [json.loads(line) for line in (folder / "captions.jsonl").open(encoding="utf-8")]
    captions = [caption for row in rows for caption in row["captions"]]
    with (folder / "regions.jsonl").open(encoding="utf-8") as lines:
        phrases = sorted({json.loads(line)["phrase"] for line in lines})
    tokens = ptb(captions)
    left = iter(tokens)
    of_rows = [(row, [next(left) for _ in row["captions"]]) for row in rows]
    val = [(row["image"], of_row) for row, of_row in of_rows if row["split"] == "val"]
    figures, _ = scores([t[0] for _, t in val], [t[1:] for _, t in val])
    return {
        "split": "val",
        "sets": len(val),
        "images": checksum(image for image, _ in val),
        "scores": figures,
        "captions": {"count": len(captions), "tokens": checksum(tokens)},
        "phrases": {"count": len(phrases), "tokens": checksum(ptb(phrases))},
    }


def checksum(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
