"""English caption text → tokens, as coco-caption's PTBTokenizer gives them, without Java.

Receives one string; gives lower-case tokens without coco-caption's punctuation list. Follows the
Penn Treebank conventions of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`) as far as
captions need them: contractions, possessives, quotes, brackets, numbers, money, abbreviations.
Refuses nothing. Texts in other scripts come out as words between spaces.
"""

import re

# coco-caption's own list. Its bracket names are upper case while its tokens are lower case, so
# brackets stay in ("-lrb-"): kept, because published figures have it so.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"] + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|sr|jr|prof|rev|gen|col|lt|sgt|capt|gov|sen|rep|hon|vs|etc|inc|ltd|co|corp"
    "|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mt|ft|ave|blvd|rd"
)

_TOKEN = re.compile(
    rf"""
    (?:https?|ftp)://\S*[\w/] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+    # addresses
  | [\#@][a-z]\w*                                                 # tags and handles
  | [a-z](?:\.[a-z])+\.?(?!\w) | [a-z]\.(?!\w|\.)                 # U.S., J. Smith
  | (?:{_ABBREVIATIONS})\.(?!\w|\.) | no\.(?=\s*\d)               # Mr. Smith, No. 7
  | (?<!\d)'\d\ds?(?!\w) | 'n'                                    # '90s, rock 'n' roll
  | \d+:\d\d(?=[ap]m) | \d+(?:[.,:/\-]\d+)*(?![\w\-])             # 5:30pm, 1,000, 3/4
  | d'y(?:e|ou)\b | o'\w+ | y'(?=all)                             # d'you, o'clock, y'all
  | n't\b | '(?:s|m|d|ll|re|ve|n)\b | 't(?=is|was) | '            # what contractions leave
  | [^\W_]+(?:[-_/.][^\W_]+)*                                     # words, hyphens inside
  | \.\.+ | [?!]+ | --+ | [^\w\s] | _+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NEGATION = re.compile(r"(?<=[a-z])n['’]t\b", re.IGNORECASE)
_SPLIT_WORDS = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "wanna": ["wan", "na"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "--", "—": "--"})


def tokenize(text: str) -> list[str]:
    """Tokens of one caption: "It's a man's dog ." → it 's a man 's dog."""
    text = _NEGATION.sub(" n't", text.translate(_QUOTES))
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match.group().lower()
        if token in _BRACKETS:
            tokens.append(_BRACKETS[token])
        elif token == '"' or set(token) <= {"."} or set(token) <= {"-"}:
            continue
        elif token not in PUNCTUATION:
            tokens.extend(_SPLIT_WORDS.get(token, [token]))
    return tokens
