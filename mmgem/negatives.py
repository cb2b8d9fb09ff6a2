"""Hard negatives of a text, by rules: nearly the same words, and no longer true.

Receives a caption, the kinds that are wanted, and a `random.Random`. Gives texts with their kinds; none where a rule
finds nothing to change. Refuses unknown kinds, with a UserError. English; the vocabulary stands in the tables below.

The kinds are those of SPEC (Peng et al. 2024), ARO (Yuksekgonul et al. 2023) and SugarCrepe (Hsieh et al. 2023) that
need no model. A rule cannot know what else is in the picture, so the words that any of its captions uses are not put
in, but for those that the kind is about; and words come in as often as the data use them (`frequency`), so that none
gives it away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from random import Random

from mmgem.errors import UserError

COLOURS = (
    "black", "blue", "brown", "cyan", "gray", "green", "grey", "orange", "pink", "purple", "red", "silver", "tan",
    "white", "yellow",
)  # fmt: skip
_SIZES = (("small", "little", "tiny", "short"), ("medium",), ("big", "large", "huge", "tall"))
_LOOKS = (("matte", "shiny", "striped", "dotted"), ("wet", "dry"), ("young", "old"), ("dark", "light"))
# Of each a thing has but one.
_FAMILIES = (COLOURS, tuple(word for words in _SIZES for word in words), *_LOOKS)
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATIONS = {
    "to the left of": "to the right of", "left": "right", "above": "below", "over": "under", "higher": "lower",
    "in front of": "behind", "inside": "outside", "on top of": "underneath", "up": "down", "into": "out of",
    "top": "bottom", "upper": "lower", "near": "far from", "before": "after",
}  # fmt: skip
_ACTIONS = (
    "carrying", "climbing", "crawling", "dancing", "driving", "eating", "falling", "flying", "jumping", "kicking",
    "laying", "lying", "pulling", "pushing", "reading", "riding", "running", "singing", "sitting", "sleeping",
    "standing", "swimming", "throwing", "walking",
)  # fmt: skip
_SAME_ACTION = ({"laying", "lying", "sleeping"},)
# Families of things of which one picture's is seldom two; names of the same thing stand together. A plural is in -s
# where none is said.
_THINGS = tuple(
    tuple(tuple((name.split(":") + [f"{name}s"])[:2] for name in thing.split("|")) for thing in family.split())
    for family in (
        "ball cone cross:crosses cube cylinder heart moon ring star triangle",
        "ball|football|basketball frisbee|disc stick|branch:branches rope kite bat racket balloon",
        "man:men|guy|gentleman:gentlemen woman:women|lady:ladies",
        "boy girl",
        "father|dad mother|mom|mum",
        "dog|puppy:puppies cat|kitten horse|pony:ponies cow|bull bird|duck|seagull elephant bear zebra giraffe goat pig"
        " monkey rabbit|bunny:bunnies",
        "car|taxi bus:buses truck|van train|tram boat|ship|kayak bike|bicycle motorcycle|motorbike plane|airplane",
        "skateboard surfboard snowboard scooter sled",
        "hat|cap helmet",
        "shirt|t-shirt dress:dresses",
        "bed table|desk bench:benches couch:couches|sofa",
        "pizza cake sandwich:sandwiches salad banana apple",
        "cup|mug bowl plate|dish:dishes bottle",
        "guitar piano violin drum trumpet",
        "beach:beaches street|road forest|woods:woods desert kitchen office",
    )
)
_DETERMINERS = ("a", "an", "the", "one", "another", "his", "her", "their", "its", *_NUMBERS)
# Where a noun phrase ends. Words in -ing end it too.
_ENDS = frozenset((
    "and", "or", "with", "without", "in", "on", "at", "of", "to", "by", "from", "for", "over", "under", "above",
    "below", "near", "behind", "beside", "between", "through", "into", "onto", "across", "around", "along",
    "against", "while", "as", "is", "are", "was", "were", "has", "have", "that", "who", "which", "there", "left",
    "right", "higher", "lower", "next", "inside", "outside", "up", "down", "but", "no", "not", "than",
    *_DETERMINERS,
))  # fmt: skip
_NOUNS_IN_ING = frozenset((
    "building", "ceiling", "clothing", "crossing", "evening", "king", "morning", "nothing", "opening", "painting",
    "railing", "ring", "something", "spring", "string", "swing", "thing", "wing",
))  # fmt: skip
_PLACES = frozenset((
    "air", "back", "background", "bottom", "center", "centre", "corner", "foreground", "front", "middle", "side", "top",
))  # fmt: skip

_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|\s+|[^\w\s]")  # noqa: RUF001 - the apostrophe of typeset texts
_VOWELS = tuple("aeiou")


@dataclass(frozen=True, slots=True)
class Negative:
    """A text that is not true of the picture, and how it was made."""

    text: str
    kind: str
    picture: str = ""
    """Drawn of the text, for which it is true: a file's bytes in base64. Rules draw nothing."""


def negatives_of(
    text: str,
    kinds: Sequence[str],
    rng: Random,
    count: int = 1,
    captions: Sequence[str] = (),
    frequency: Mapping[str, int] | None = None,
) -> list[Negative]:
    """At most `count`, of different kinds as far as there are; the kinds are tried in an order drawn by lot.

    captions: all of the picture. frequency: how often the data use a word (`words_of`); words that they never use are
    not put in. None: all alike.
    """
    say = _Say(rng, captions, frozenset(words_of(captions)), frequency)
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown kind of negative {kind!r}; the kinds are {', '.join(KINDS)}")
    found: list[Negative] = []
    seen = {_plain(text)}
    order = rng.sample(list(kinds), len(kinds))
    for kind in order * count:
        if len(found) == count:
            break
        made = KINDS[kind](_TOKEN.findall(text), say)
        said = "" if made is None else _with_articles(made)
        if said and _plain(said) not in seen:
            seen.add(_plain(said))
            found.append(Negative(said, kind))
    return found


def words_of(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, in small letters."""
    return Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))


@dataclass(frozen=True, slots=True)
class _Say:
    rng: Random
    captions: Sequence[str]
    avoid: frozenset[str]
    frequency: Mapping[str, int] | None

    def weight(self, word: str) -> int:
        if word in self.avoid:
            return 0
        return 1 if self.frequency is None else self.frequency.get(word, 0)


# ---------------------------------------------------------------------------------------------- rules

Tokens = list[str]
_Rule = Callable[[Tokens, "_Say"], "Tokens | None"]


def _colour(tokens: Tokens, say: _Say) -> Tokens | None:
    return _another(tokens, say, lambda word: COLOURS if word in COLOURS else ())


def _size(tokens: Tokens, say: _Say) -> Tokens | None:
    def others(word: str) -> Sequence[str]:
        own = next((words for words in _SIZES if word in words), None)
        # Such as people use most.
        return [words[0] if words[0] != "big" else "large" for words in _SIZES if words != own] if own else ()

    return _another(tokens, say, others)


def _count(tokens: Tokens, say: _Say) -> Tokens | None:
    """Between numbers of the plural, so that the noun stays as it is; by at most two."""

    def others(word: str) -> Sequence[str]:
        if word not in _NUMBERS:
            return ()
        at = _NUMBERS.index(word)
        return [_NUMBERS[n] for n in range(max(0, at - 2), min(len(_NUMBERS), at + 3)) if n != at]

    return _another(tokens, say, others)


def _verb(tokens: Tokens, say: _Say) -> Tokens | None:
    def others(word: str) -> Sequence[str]:
        if word not in _ACTIONS:
            return ()
        same = next((words for words in _SAME_ACTION if word in words), {word})
        return [action for action in _ACTIONS if action not in same]

    return _another(tokens, say, others)


def _relation(tokens: Tokens, say: _Say) -> Tokens | None:
    """The opposite of one relation. Whole words; the longest that fits."""
    text = "".join(tokens)
    both = {**_RELATIONS, **{opposite: name for name, opposite in _RELATIONS.items()}}
    pattern = r"\b(" + "|".join(sorted(map(re.escape, both), key=len, reverse=True)) + r")\b"
    places = list(re.finditer(pattern, text, flags=re.IGNORECASE))
    if not places:
        return None
    place = say.rng.choice(places)
    said = _like(both[place[0].lower()], place[0])
    return _TOKEN.findall(text[: place.start()] + said + text[place.end() :])


def _swap(tokens: Tokens, say: _Say) -> Tokens | None:
    """Colours, sizes or looks are exchanged between two nouns that have different ones."""
    choices = _attributes_of_two(tokens)
    if not choices:
        return None
    n, m = say.rng.choice(choices)
    out = list(tokens)
    out[n], out[m] = _like(tokens[m], tokens[n]), _like(tokens[n], tokens[m])
    return out


def _leak(tokens: Tokens, say: _Say) -> Tokens | None:
    """The colour, size or look of one noun becomes that of another one, too."""
    choices = _attributes_of_two(tokens)
    if not choices:
        return None
    n, m = say.rng.sample(say.rng.choice(choices), 2)
    out = list(tokens)
    out[n] = _like(tokens[m], tokens[n])
    return out


def _borrow(tokens: Tokens, say: _Say) -> Tokens | None:
    """The colour, size or look of a noun becomes one that the picture's other captions give to another noun: what
    words are used does then not tell, only whose they are."""
    told = {(word, noun) for caption in say.captions for _, word, noun in _attributes(_TOKEN.findall(caption))}
    here = {token.lower() for token in tokens}
    choices = [
        (n, other)
        for n, word, noun in _attributes(tokens)
        for other in sorted({other for other, whose in told if whose != noun} - here)
        if _family(other) == _family(word) and (other, noun) not in told
    ]
    if not choices:
        return None
    n, word = say.rng.choice(choices)
    return [*tokens[:n], _like(word, tokens[n]), *tokens[n + 1 :]]


def _attributes(tokens: Tokens) -> list[tuple[int, str, str]]:
    """Where a colour, size or look stands, the word, and its noun in the singular: the last word of the phrase."""
    words = [(n, token.lower()) for n, token in enumerate(tokens) if not token.isspace()]
    found: list[tuple[int, str, str]] = []
    for place, (n, word) in enumerate(words):
        family, noun = _family(word), ""
        if family is None:
            continue
        rest = [other for _, other in words[place + 1 :]]
        for other, following in zip_longest(rest, rest[1:], fillvalue=""):
            if other in ("and", ",") and _family(following) == family:  # "black and white dog"
                continue
            if _ends_phrase(other):
                break
            noun = other
        if noun and _family(noun) is None:
            found.append((n, word, noun.removesuffix("es") if noun.endswith("sses") else noun.removesuffix("s")))
    return found


def _family(word: str) -> int | None:
    return next((number for number, family in enumerate(_FAMILIES) if word in family), None)


def _attributes_of_two(tokens: Tokens) -> list[tuple[int, int]]:
    """Places of two words of one family, of two nouns, neither of which has the other's."""
    words = [(n, token.lower()) for n, token in enumerate(tokens) if token[:1].isalnum()]
    choices: list[tuple[int, int]] = []
    for family in _FAMILIES:
        here = [(place, n) for place, (n, word) in enumerate(words) if word in family]
        for i, (place, n) in enumerate(here):
            for other_place, m in here[i + 1 :]:
                # Of two nouns: another word stands between ("black and white" are of one).
                between = [word for _, word in words[place + 1 : other_place]]
                apart = any(word not in family and word not in ("and", "or", "one", "the", "other") for word in between)
                one, other = tokens[n].lower(), tokens[m].lower()
                beside = [{word for _, word in words[max(p - 2, 0) : p + 3]} for p in (place, other_place)]
                if apart and other not in beside[0] and one not in beside[1]:
                    choices.append((n, m))
    return choices


def _exchange(tokens: Tokens, say: _Say) -> Tokens | None:
    """Two noun phrases round a word that tells their parts apart: "a man rides a horse", "a horse rides a man"."""
    spans = _noun_phrases(tokens)
    pairs = [
        (one, other)
        for one, other in zip(spans, spans[1:], strict=False)
        if _tells_apart(tokens[one[1] : other[0]]) and tokens[one[0] : one[1]] != tokens[other[0] : other[1]]
    ]
    if not pairs:
        return None
    (a, b), (c, d) = say.rng.choice(pairs)
    first, second = tokens[a:b], tokens[c:d]
    second[0], first[0] = _like(second[0], first[0]), _like(first[0], second[0])
    return [*tokens[:a], *second, *tokens[b:c], *first, *tokens[d:]]


def _negation(tokens: Tokens, say: _Say) -> Tokens | None:
    """What is there is denied, or what is denied is said."""
    text = "".join(tokens)
    changes = [
        (r"\bis not\b", "is"), (r"\bare not\b", "are"), (r"\bwithout\b", "with"), (r"\bbut no\b", "and a"),
        (r"\bwith\b", "without"), (r"\band (?:an?|the|one)\b", "but no"), (r"\bthere is an?\b", "there is no"),
        (r"\b(is|are)(?= \w+ing\b)", r"\1 not"),
        (r"\b(is|are)(?= (?:on|in|at|to|above|below|behind|left|right)\b)", r"\1 not"),
    ]  # fmt: skip
    fitting = [(pattern, by) for pattern, by in changes if re.search(pattern, text, flags=re.IGNORECASE)]
    if not fitting:
        return None
    # What takes a denial away goes first: a second one would say something else.
    taken = [one for one in fitting if one in changes[:4]]
    pattern, by = say.rng.choice(taken or fitting)
    places = list(re.finditer(pattern, text, flags=re.IGNORECASE))
    place = say.rng.choice(places)
    said = _like(place.expand(by), place[0])
    return _TOKEN.findall(text[: place.start()] + said + text[place.end() :])


def _object(tokens: Tokens, say: _Say) -> Tokens | None:
    """What a noun phrase ends on becomes another thing of its family."""
    ends = {end - 1 for _, end in _noun_phrases(tokens)}

    def others(word: str) -> Sequence[str]:
        return [
            other[0][form]
            for family in _THINGS
            for form in (0, 1)  # singular, plural
            if (own := next((thing for thing in family if any(names[form] == word for names in thing)), None))
            for other in family
            if other is not own and not any(name in say.avoid for names in other for name in names)
        ]

    return _another(tokens, say, others, ends)


def _shuffle(tokens: Tokens, say: _Say) -> Tokens | None:
    """Groups of three words in another order; sentence marks are left out."""
    words = [token for token in tokens if token[:1].isalnum()]
    groups = [words[n : n + 3] for n in range(0, len(words), 3)]
    if len(groups) < 2:
        return None
    for _ in range(10):
        drawn = say.rng.sample(groups, len(groups))
        if drawn != groups:
            return _TOKEN.findall(" ".join(word for group in drawn for word in group))
    return None


KINDS: dict[str, _Rule] = {
    "colour": _colour,
    "size": _size,
    "count": _count,
    "relation": _relation,
    "verb": _verb,
    "swap": _swap,
    "exchange": _exchange,
    "negation": _negation,
    "shuffle": _shuffle,
    "leak": _leak,
    "borrow": _borrow,
    "object": _object,
}
"""By name the rules."""

KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
"""A kind that other makers invent has the next number, one for all of them."""


# --------------------------------------------------------------------------------------------- pieces


def _another(
    tokens: Tokens, say: _Say, others: Callable[[str], Sequence[str]], among: Collection[int] | None = None
) -> Tokens | None:
    """One word, drawn by lot, becomes another of its family. among: where it may stand; None: anywhere."""
    here = {token.lower() for token in tokens}
    places = []
    for n, token in enumerate(tokens):
        if among is not None and n not in among:
            continue
        weights = {word: say.weight(word) for word in others(token.lower()) if word not in here}
        if any(weights.values()):
            places.append((n, weights))
    if not places:
        return None
    n, weights = say.rng.choice(places)
    (word,) = say.rng.choices(list(weights), list(weights.values()))
    return [*tokens[:n], _like(word, tokens[n]), *tokens[n + 1 :]]


def _noun_phrases(tokens: Tokens) -> list[tuple[int, int]]:
    """[begin, end) of each determiner with the words up to the next function word, at least one."""
    spans = []
    n = 0
    while n < len(tokens):
        if tokens[n].lower() in _DETERMINERS:
            end, m = 0, n + 1
            while m < len(tokens):
                word = tokens[m].lower()
                if word.isspace():
                    m += 1
                    continue
                if _ends_phrase(word):
                    break
                m += 1
                end = m
            if end:
                if tokens[end - 1].lower() not in _PLACES:
                    spans.append((n, end))
                n = end
                continue
        n += 1
    return spans


def _ends_phrase(word: str) -> bool:
    return not word[:1].isalnum() or word in _ENDS or (word.endswith("ing") and word not in _NOUNS_IN_ING)


def _tells_apart(between: Tokens) -> bool:
    """Whether an exchange of what stands before and after these words says something else."""
    words = [token.lower() for token in between if not token.isspace()]
    listed = any(word in ("and", "or", ",", ";", ":", ".") for word in words)
    return bool(words) and not listed and words not in (["with"], ["next", "to"], ["near"], ["beside"], ["of"])


def _like(word: str, model: str) -> str:
    return word[:1].upper() + word[1:] if model[:1].isupper() else word[:1].lower() + word[1:]


def _with_articles(tokens: Tokens) -> str:
    """ "a orange" → "an orange" and the other way round."""
    words = [n for n, token in enumerate(tokens) if token[:1].isalnum()]
    out = list(tokens)
    for n, m in zip(words, words[1:], strict=False):
        if out[n].lower() in ("a", "an"):
            article = (
                "an" if out[m].lower().startswith(_VOWELS) and not out[m].lower().startswith(("uni", "one")) else "a"
            )
            out[n] = _like(article, out[n])
    return "".join(out)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
