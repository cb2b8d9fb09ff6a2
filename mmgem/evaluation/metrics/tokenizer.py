r"""English caption text → tokens, as coco-caption's PTBTokenizer gives them, without Java.

Receives one string; gives lower-case tokens without coco-caption's punctuation list. Follows the
Penn Treebank conventions of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`): of all rules that
match at a place the one that reaches furthest wins, and of those that reach as far the first; what a
rule looks ahead at counts as reached. Refuses nothing. Texts in other scripts come out as words
between spaces.
"""

import re
import unicodedata

# coco-caption's own list. Its bracket names are upper case while its tokens are lower case, so
# brackets stay in ("-lrb-"): kept, because published figures have it so.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"] + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_ABBREVIATIONS = (
    "mr|mrs|ms|drs?|st|ste|sr|jr|profs?|rev|gen|col|lt|sgt|capt|govs?|sens?|reps?|hon|vs|etc|inc|ltd|cos?|corp"
    "|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mt|ft|ave|blvd|rd"
    "|bros|esq|univ|dept|assn|maj|cpl|pvt|adm|pres|det|est|tel|ext|sq|al|cf|seq|bldg|ph\\.d|ed\\.d"
    "|ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo"
)
_STATES = "Az|Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # only so
_ACRONYM = r"u\.s\.-u\.(?:k|s\.s\.r)|[a-z](?:\.[a-z])+|(?:canada|sino|korean|eu|japan|non)-u\.s"
_WHOLE = (
    "nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o'o|cap'n|c'est|d'ye|d'you|'n'?|'em|'till?|'cause|'[2-9]0s"
    "|(?:dunkin|somethin|ol|[ldj])'"
)
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_LETTER, _SIGN = r"[^\W\d_]", r"[^\W_]"
_ADDRESS_END = r"[^\s\"<>|.!?(){},\-]"

_APOSTROPHE = "['’\x92]"

# Each with what it consumes in a group, where it also looks ahead.
_RULES = [
    re.compile(rule.replace("'", _APOSTROPHE), re.IGNORECASE)
    for rule in (
        r"c\+\+|[cf]\#",
        r"('t)(?:is|was)",
        r"</?[a-z!?][^>]*>",
        r"&(?:lt|gt);|&\#\d+;",
        rf"({_LETTER}*(?=[a-z])[^\W\d_n])n(?:[`‘‛\x91]|')t",
        rf"({_LETTER}+)'(?:[msd]|re|ve|ll)(?!{_LETTER})",
        rf"{_LETTER}+",
        rf"('(?:[msd]|re|ve|ll))(?:$|(?!{_LETTER}).)",
        r"n(?:[`‘‛\x91]|')t",
        _WHOLE,
        r"(')[a-z]\S",
        rf"{_LETTER}+[aeiouy]'[aeiou]{_LETTER}*",
        r"(y')[a-z]",
        rf"https?://[^\s\"<>|()]+{_ADDRESS_END}",
        rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}|(?:[^\s\"`\x27<>|.!?(){{}},\-_$]+\.)+(?:com|net|org|edu))"
        rf"(?:/[^\s\"<>|()]+{_ADDRESS_END})?",
        r"<?[a-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+>?",
        rf"@[a-z_]\w*|\#{_LETTER}+",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        rf"[-+]?{_NUMBER}",
        r"(?:\d{1,4}[-\s])?\d{1,4}\\?/\d{1,4}",
        r"\(\d{2,3}\)\s?\d{3,4}[-\s]?\d{3,5}|(?:\+\+?)?(?:\d{2,4}[-\s])?\d{2,4}[-\s]\d{3,4}[-\s]?\d{3,5}",
        rf"{_SIGN}[^\W_.,]*(?:[.,]+{_SIGN}+)*[.,]*(?:-(?:(?:{_ACRONYM})\.|{_SIGN}+))+",
        rf"(?:[dol]'{_SIGN})?{_SIGN}+(?:[-_‐‑](?:[dol]'{_SIGN})?{_SIGN}+)*",
        r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}",
        rf"(?:{_ABBREVIATIONS}|{_ACRONYM}|[a-z])\.",
        r"((?:ca|figs?|prop|nos?|art|bldg|pp|op)\.)\s*\d",
        rf"((?:{_SIGN}+(?:-{_SIGN}+)+|{_LETTER}+|{_NUMBER})\.)[,;:]",
        rf"{_LETTER}+(?:\.{_LETTER}+)+|{_LETTER}{_SIGN}*(?:[.?!]{_LETTER}{_SIGN}*)+",
        r"pro-|anti-",
        r"'\d\d(?=\s|$)",
        r"\.+|[?!]+|-+|\*+|\#+|@+|_+|<<|>>|''|``",
        r"\S",
    )
] + [
    re.compile(rule.replace("'", _APOSTROPHE))  # in these capitals are asked for
    for rule in (
        rf"[A-HJ-XZn]'{_LETTER}{{2,}}",
        r"[A-Z]+(?:[+&][A-Z]+)+",
        r"[A-Z]+\$",
        rf"(?:{_STATES})\.",
        r"([<>]?[:;=][-o*\x27]?[()DPdpO\\{@|\[\]])(?![A-Za-z0-9])",
    )
]
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)")
_SPACE = re.compile(r"\s*")

_SPLIT_WORDS = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "wanna": ["wan", "na"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_RENAMED = {"£": "#", "€": "$", "¤": "$", "\x80": "$", "¢": "cents", "&lt;": "<", "&gt;": ">"}
_QUOTES = frozenset("\"'`’‘‛\x91\x92")
_CONTRACTED = frozenset(t.replace("'", c) for c in "’\x92" for t in ("'s", "'m", "'d", "'ll", "'re", "'ve", "n't"))
_CHARACTERS = str.maketrans(
    {q: '"' for q in "“”«»‹›"}
    | {"…": "...", "–": "--", "—": "--", "―": "--"}
    | {c: f" {c} " for c in "²³"}
    | {c: f" {f} " for c, f in _FRACTIONS.items()}
)
_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "&mdash;": "--"}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)


def tokenize(text: str) -> list[str]:
    """Tokens of one caption: "It's a man's dog ." → it 's a man 's dog."""
    if not text.isascii():
        kept = (c if unicodedata.category(c) != "Cf" else "" if c == "\xad" else " " for c in text)
        text = "".join(c if c < "\U00010000" else " " for c in kept).translate(_CHARACTERS)
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES[match.group().lower()], text)
    tokens: list[str] = []
    at = 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return tokens
        plain = _PLAIN.match(text, at)
        end = plain.end() if plain else _furthest(text, at)
        tokens.extend(_named(text[at:end].lower()))
        at = end


def _furthest(text: str, at: int) -> int:
    """Where the token that starts at `at` ends."""
    best, end = -1, at + 1
    for rule in _RULES:
        match = rule.match(text, at)
        if match is not None and match.end() > best:
            best, end = match.end(), match.end(match.lastindex or 0)
    return end


def _named(token: str) -> list[str]:
    """As the tokenizer writes it; nothing for punctuation."""
    if token in PUNCTUATION or set(token) <= _QUOTES or set(token) <= {"."} or set(token) <= {"-"}:
        return []
    if token in _CONTRACTED:  # other words keep their curly apostrophe
        return [token.replace("’", "'").replace("\x92", "'")]
    if token in _SPLIT_WORDS:
        return _SPLIT_WORDS[token]
    if not token.isalnum():
        token = _BRACKET.sub(lambda match: _BRACKETS[match.group()], token)
    return _RENAMED.get(token, token).split()
