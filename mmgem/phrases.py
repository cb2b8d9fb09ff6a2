"""When two phrases count as the same phrase.

Receives a phrase as the data hold it, gives the form that is compared. Refuses nothing. Training (what is never a
negative) and evaluation (what is a hit) share it.
"""

import re
import unicodedata

# What begins the part of a noun phrase that stands after its head.
_AFTER_HEAD = frozenset(
    "about above across against along among around at behind below beneath beside between beyond by down for from in "
    "inside into near of off on onto out outside over past through to toward towards under up upon with within without "
    "as that which who whom whose where while wearing holding and or".split()
)
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


def head_noun(phrase: str) -> str:
    """The word that an English noun phrase is about, by a rule of thumb: the last word before the first preposition,
    relative word or conjunction of the normalised phrase; "a man in a red hat" → "man"."""
    words = normalise_phrase(phrase).split()
    for n, word in enumerate(words):
        if n and word in _AFTER_HEAD:
            return words[n - 1]
    return words[-1] if words else ""
