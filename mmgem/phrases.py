"""When two phrases count as the same phrase.

Receives a phrase as the data hold it, gives the form that is compared. Refuses nothing. Training (what is never a
negative) and evaluation (what is a hit) share it.
"""

import re
import unicodedata

_ARTICLE = re.compile(r"^(?:a|an|the) (?=\S)")


def normalise_phrase(phrase: str) -> str:
    """The form under which phrases are compared: "A red  Ball." and "the red ball" are one.

    Lower case; every character that is not a letter, a digit or a combining mark becomes a space
    (so "boy's" and the "boy 's" of tokenised data agree); spaces are folded; one leading article
    (a, an, the) goes, because annotators of one object differ in nothing but the article. Number
    words and plurals stay: "two dogs" and "dogs" are different phrases. A phrase of punctuation
    alone is kept as it is, lower-cased, so that it never becomes empty.
    """
    lowered = unicodedata.normalize("NFKC", phrase).lower()
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in lowered)
    folded = " ".join("".join(kept).split())
    return _ARTICLE.sub("", folded) or lowered.strip()
