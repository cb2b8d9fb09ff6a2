"""Tars: as `mmgem data index` takes them, and every sample that it finds read."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import reading
from hypothesis import strategies as st
from mutations import DAMAGES, changed_json, damaged
from reading import encoded, picture

from mmgem.data.samples import Tally
from mmgem.data.tars import index_tars
from mmgem.data.writer import BLOCK, padded
from mmgem.errors import UserError

JPEG, PNG, WEBP = (encoded(picture(1, 32, 24), kind) for kind in ("JPEG", "PNG", "WEBP"))
REGION = {"box": [0, 1, 9, 9.5], "phrase": "c", "entity": 1}
RECORD = {"captions": ["a", "b"], "regions": [REGION], "width": 32, "height": 24}
KEYS = [
    b"a",
    b"b",
    b"c",
    b"d/a",
    b"./a",
    b"../up",
    b"/etc/x",
    b"..",
    b"",
    b"nul\0x",
    b"\xff\xfe",
    "größe".encode(),
    b"a\nb",
]
KEYS += [b"k" * 95]
ENDINGS = [b"jpg", b"json", b"txt", b"jpg", b"json", b"png", b"webp", b"JPG", b"seg.png", b"", b"\xff", b"jpg\0"]
KINDS = [bytes([letter]) for letter in b"0012345679SKLxgXDVMN\0AZ\xff"]
SIZES = [-1, -512, 1, 511, 513, 8**11 - 1, 8**11, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**87, -(2**63)]
FIELDS = [b"path", b"size", b"linkpath", b"hdrcharset", b"mtime", b"comment", b"SCHILY.xattr.a"]
FIELDS += [b"GNU.sparse." + name for name in (b"major", b"name", b"realsize", b"map")]
VALUES = [
    b"",
    b"a.jpg",
    b"0",
    b"-1",
    b"9" * 20,
    b"1e3",
    b"nan",
    b"\xff.jpg",
    b"a\0.jpg",
    b"../a.jpg",
    b"700",
    b"BINARY",
]
VALUES += [b"0,512,1024,5", "٣".encode(), b"/" * 3000 + b"a.txt"]


def number(size: int) -> bytes:
    """As tars have it: octal, or 12 bytes of which the first has its highest bit set."""
    if 0 <= size < 8**11:
        return b"%011o\0" % size
    return bytes([0x80 if size >= 0 else 0xFF]) + (size % 256**11).to_bytes(11, "big")


def head(
    name: bytes,
    size: int | bytes,
    kind: bytes = b"0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    field = number(size) if isinstance(size, int) else size
    start = struct.pack("100s8s8s8s12s12s", name, b"0000644\0", b"0000000\0", b"0000000\0", field, b"%011o\0" % 0)
    rest = struct.pack("1s100s8s32s32s8s8s155s12x", kind, link, magic, b"", b"", b"0000000\0", b"0000000\0", prefix)
    return start + b"%06o\0 " % (sum(start) + sum(rest) + 8 * 32) + rest


def member(name: bytes, data: bytes, kind: bytes = b"0", size: int | bytes | None = None, **fields: bytes) -> bytes:
    return head(name, len(data) if size is None else size, kind, **fields) + data + bytes(padded(len(data)) - len(data))


def records(fields: list[tuple[bytes, bytes]]) -> bytes:
    """Of a PAX header."""
    lines = b""
    for name, value in fields:
        length = len(name) + len(value) + 3
        while length != (true := len(b"%d %s=%s\n" % (length, name, value))):
            length = true
        lines += b"%d %s=%s\n" % (length, name, value)
    return lines


CONTENTS = st.one_of(
    st.sampled_from([JPEG, PNG, WEBP, b"", b"a caption", b"{}", b"\xff", b"x" * 2000]),
    changed_json(RECORD),
    st.builds(damaged, st.just(JPEG), DAMAGES),
)
NAMES = st.builds(lambda key, ending: key + b"." + ending, st.sampled_from(KEYS), st.sampled_from(ENDINGS))


def good(key: bytes, picture: tuple[bytes, bytes], text: tuple[bytes, bytes]) -> bytes:
    return member(key + b"." + picture[0], picture[1]) + member(key + b"." + text[0], text[1])


def long_name(kind: bytes, name: bytes, times: int) -> bytes:
    return member(b"././@LongLink", name * times + b"\0", kind)


def pax(kind: bytes, fields: list[tuple[bytes, bytes]]) -> bytes:
    return member(b"pax", records(fields), kind)


def claimed(kind: bytes, size: int) -> bytes:
    """A head of a head that claims another size."""
    return member(b"pax", b"9 a=b\n", kind, size)


def broken_pax(name: bytes, damages: Any) -> bytes:
    return member(b"pax", damaged(records([(b"path", name), (b"size", b"7")]), damages), b"x")


def sparse(size: int, numbers: bytes, more: list[bytes]) -> bytes:
    """An old GNU sparse file whose heads go on, or seem to."""
    first = bytearray(head(b"a.jpg", size, b"S", magic=b"ustar  \0"))
    first[386:483] = numbers.ljust(96, b"\0") + b"\1"
    return summed(bytes(first)) + b"".join(bytes(504) + flag + bytes(7) for flag in more)


def many(of: tuple[bytes, int], ending: bytes, same: bool) -> bytes:
    return b"".join(member(b"%d.%s" % (0 if same else n, ending), of[0]) for n in range(of[1]))


PAX = st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES) | NAMES), min_size=1, max_size=3)
GOOD = st.builds(
    good,
    st.sampled_from(KEYS[:4]),
    st.sampled_from([(b"jpg", JPEG), (b"png", PNG), (b"webp", WEBP)]),
    st.sampled_from([(b"txt", b"a caption"), (b"json", b'{"caption": "a"}')]),
)
NOTHING = st.just(b"")
BEFORE = st.one_of(
    NOTHING,
    NOTHING,
    st.builds(long_name, st.sampled_from([b"L", b"K"]), NAMES, st.sampled_from([1, 2, 5, 300])),
    st.builds(pax, st.sampled_from([b"x", b"x", b"g"]), PAX),
    st.builds(claimed, st.sampled_from([b"x", b"g", b"L", b"K"]), st.sampled_from(SIZES)),
    st.builds(broken_pax, NAMES, DAMAGES),
)
ODD = st.builds(
    member,
    NAMES,
    CONTENTS,
    st.sampled_from([b"0"] * len(KINDS) + KINDS),
    st.sampled_from([*[None] * 16, *SIZES, b" 12 \0", b"\0" * 12, b"9" * 12, b"\x80" + b"\xff" * 11]),
    link=st.sampled_from([b"", b"a.jpg", b"..", b"/dev/zero"]),
    magic=st.sampled_from([b"ustar\x0000", b"ustar  \0", b"\0" * 8, b"?" * 8]),
    prefix=st.sampled_from([b"", b"", b"d", b"..", b"/", b"\xff", b"p" * 155]),
)
SPARSE = st.builds(
    sparse,
    st.sampled_from([0, 512, *SIZES]),
    st.binary(max_size=96),
    st.lists(st.sampled_from([b"\0", b"\1"]), max_size=3),
)
MANY = st.builds(
    many,
    st.sampled_from([(b"", 3000), (b"a", 3000), (JPEG, 100)]),
    st.sampled_from([b"jpg", b"txt", b"json"]),
    st.booleans(),
)


def summed(tar: bytes) -> bytes:
    """With the right checksum in all that looks like a head, or a change would be no more than a wrong one."""
    data = bytearray(tar)
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return bytes(data)


def tar(first: bytes, parts: list[bytes], end: bytes, damages: Any, fit: bool) -> bytes:
    made = first + b"".join(parts) + end
    if damages is not None:
        made = damaged(made, damages)
    return summed(made) if fit else made


PARTS = st.lists(GOOD | GOOD | st.builds(bytes.__add__, BEFORE, ODD | ODD | SPARSE), max_size=4)
TARS = st.builds(
    tar,
    st.sampled_from([GOOD] * 50 + [NOTHING] * 20 + [MANY]).flatmap(lambda kind: kind),
    PARTS,
    st.sampled_from([*[bytes(2 * BLOCK)] * 5, bytes(BLOCK), b"", b"\0" * 700, b"rest"]),
    st.none() | st.none() | DAMAGES,
    st.booleans(),
)
INPUTS = st.tuples(st.lists(TARS, min_size=1, max_size=2), st.booleans())


def check(content: tuple[list[bytes], bool]) -> str:
    tars, decode = content
    with tempfile.TemporaryDirectory(dir=reading.memory()) as folder:
        paths = [Path(folder) / f"{n}.tar" for n in range(len(tars))]
        for path, tar in zip(paths, tars, strict=True):
            path.write_bytes(tar)
        tally = Tally()
        try:
            index = index_tars(Path(folder) / "out", paths, decode=decode, processes=1, tally=tally)
        except UserError as error:
            return reading.refused(error)
        found = reading.read_split(Path(folder) / "out", verify=True)
        # What was indexed can be read; without `decode` its picture may still be broken.
        assert found["whole"] == min(index.totals["samples"], reading.MOST) and index.skipped == tally.skipped
        assert not decode or found["SampleError"] == 0, found
        return "all whole" if not tally.skipped else "some left out"


def warm_up() -> None:
    check(([member(b"a.jpg", JPEG) + member(b"a.txt", b"a") + bytes(2 * BLOCK)] * 2, True))
