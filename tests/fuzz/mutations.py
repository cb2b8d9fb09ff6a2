"""What is done to bytes and to JSON: strategies of hypothesis that start from something good."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

BYTES = [b"\0", b"\xff", b"\0" * 512, b"\xff" * 16, b"\xff\xd8", b"\xff\xda", b"ustar", b"{", b"]", b'"']
BYTES += [b"\xed\xa0\x80"]
"""The last is a half of a pair of UTF-16, which is no UTF-8."""


class Raw(str):
    """JSON text that goes in as it is."""


class Fields(list[list[Any]]):
    """An object as [name, value] pairs: names may come again."""


_NESTED = [Raw("[" * n + "]" * n) for n in (2, 60, 70, 300, 900, 960, 975, 985, 100_000)]
_NESTED += [Raw('{"a":' * n + "1" + "}" * n) for n in (60, 70, 400, 970, 100_000)]
_NUMBERS = ["0", "-0", "-1", "1", "2", "3", "1.5", "true", "false", "null", "NaN", "Infinity", "-Infinity", "1e999"]
_NUMBERS += ["1e308", "5e-324", "1e-200", "1" + "0" * 400, "-1" + "0" * 400, "9" * 4300, "9" * 4301, "9" * 100_000]
_NUMBERS += [str(n) for k in (31, 32, 53, 62, 63, 64) for n in (2**k - 1, 2**k, -(2**k))]
_TEXTS = ["", " ", "\n", "\0", "a\0b", "a\nb", "\x1b[2J", "a" * 300, "a" * 70_000, "ﬁ", "e\u0301", "\u202e", "😀"]
_TEXTS += ["-1", "1"]
_TEXTS += ["..", "../..", "/", "b" * 300 + "/a.tar", "/dev/zero", "/dev/full", "/proc/self/mem", "/nowhere/a"]
_TEXTS += ["nowhere://a/b", "file://", "://", "images", "a.jpg", "train", "val", "0" * 64, "f" * 64]
_TEXTS += ["{}", "{0..9}", "%s", "<a&b>", "--help"]
_HALVES = [Raw('"\\ud800"'), Raw('"\\udc80"'), Raw('"a\\udfff b"'), Raw('"\\ud83d\\ude00"')]
_OTHERS = [
    Raw(x) for x in ("[]", "{}", "[[]]", "[null]", "[{}]", '{"a":1,"a":2}', '""x', "[1,]", "'a'", "01", "+1", "")
]
_OTHERS += [Raw("[" + "0," * 5000 + "0]"), Raw("[" + "[]," * 5000 + "[]]"), Raw('{"a":0,' * 3 + '"b":0' + "}" * 3)]

VALUES = st.one_of(
    st.sampled_from([Raw(x) for x in _NUMBERS]),
    st.sampled_from([Raw(json.dumps(x)) for x in _TEXTS] + _HALVES),
    st.sampled_from(_NESTED + _OTHERS),
    st.integers().map(str).map(Raw),
    st.floats().map(json.dumps).map(Raw),
    st.text(max_size=6).map(json.dumps).map(Raw),
)


_FAR = st.integers(0, 1 << 31)
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["bit", "byte", "in", "out", "again", "move", "cut"]),
        _FAR,
        _FAR,
        st.sampled_from([1, 2, 4, 16, 512, 5000]),
        st.sampled_from(BYTES) | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["value", "value", "value", "out", "again", "name", "swap"]),
        _FAR,
        _FAR,
        VALUES,
        st.sampled_from(_TEXTS) | st.text(max_size=4),
    ),
    max_size=3,
)
SOMETIMES = st.sampled_from([False] * 7 + [True])


def damaged(content: bytes, damages: Sequence[tuple[str, int, int, int, bytes]]) -> bytes:
    """Bits turned, bytes set, parts taken out, doubled, put in or moved, and the end cut off."""
    data = bytearray(content)
    for kind, at, to, length, new in damages:
        at %= len(data) or 1
        if kind == "bit":
            data[at : at + 1] = bytes(b ^ 1 << to % 8 for b in data[at : at + 1])
        elif kind in ("byte", "in"):
            data[at : at + (len(new) if kind == "byte" else 0)] = new
        elif kind == "out":
            del data[at : at + length]
        elif kind == "again":
            data[at:at] = data[at : at + length] * (1 + to % 3)
        elif kind == "move":
            part = data[at : at + length]
            del data[at : at + length]
            to %= len(data) + 1
            data[to:to] = part
        else:
            del data[at:]
    return bytes(data)


class Place(NamedTuple):
    """A value stands in `holder[at]`; the item, or the pair of name and value, that it makes is `among[number]`."""

    holder: list[Any]
    at: int
    among: list[Any]
    number: int


def changed(tree: Any, changes: Sequence[tuple[str, int, int, Raw, str]]) -> bytes:
    """The tree as JSON with some values, names and items changed."""
    root = [_unpacked(tree)]
    for kind, at, to, value, name in changes:
        places = list(_places(root, 0, root, 0))
        place, other = places[at % len(places)], places[to % len(places)]
        if kind == "value" or place.among is root:
            place.holder[place.at] = value
        elif kind == "swap":
            one, two = dumped(place.holder[place.at]), dumped(other.holder[other.at])
            place.holder[place.at], other.holder[other.at] = two, one
        elif kind == "out":
            del place.among[place.number]
        elif kind == "again":
            text = dumped(place.holder[place.at])
            item: Any = [place.holder[0], text] if isinstance(place.among, Fields) else text
            place.among[place.number : place.number] = [item] * ((1, 2, 40)[to % 3] if len(text) < 2000 else 1)
        elif isinstance(place.among, Fields):
            place.holder[0] = name
    return dumped(root[0]).encode()


def changed_json(tree: Any) -> SearchStrategy[bytes]:
    """Now and then the bytes are damaged, too."""

    def made(changes: Any, tear: bool, damages: Any) -> bytes:
        return damaged(changed(tree, changes), damages) if tear else changed(tree, changes)

    return st.builds(made, CHANGES, SOMETIMES, DAMAGES)


def dumped(node: Any) -> Raw:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Fields):
        return Raw("{" + ",".join(f"{json.dumps(name)}:{dumped(value)}" for name, value in node) + "}")
    if isinstance(node, list):
        return Raw("[" + ",".join(map(dumped, node)) + "]")
    return Raw(json.dumps(node))


def _unpacked(tree: Any) -> Any:
    if isinstance(tree, dict):
        return Fields([name, _unpacked(value)] for name, value in tree.items())
    return [_unpacked(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _places(holder: list[Any], at: int, among: list[Any], number: int) -> Iterator[Place]:
    yield Place(holder, at, among, number)
    node = holder[at]
    if isinstance(node, Fields):
        for n, pair in enumerate(node):
            yield from _places(pair, 1, node, n)
    elif isinstance(node, list):
        for n in range(len(node)):
            yield from _places(node, n, node, n)
