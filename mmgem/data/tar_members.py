"""What a tar holds, and where in it, without its data: the heads of its members are read, nothing else.

Receives an open tar. Gives its files, or those of each key, and what is wrong with the tar: what stands before the
fault is good. Whatever its heads claim, no more memory is used than that of the names that are really there.

A key is a member's path up to the first dot of its last part, as in webdataset. GNU's long names and PAX headers are
understood; links, folders and sparse files are passed over.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mmgem.data.index import TAR_CUT, TAR_DAMAGED
from mmgem.data.writer import BLOCK, MEMBER, padded

_MOST_EXTRA = 1 << 20  # bytes of a long name or PAX header
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


@dataclass
class TarMembers:
    """`files`: key -> extension in lower case -> [offset, size]. `repeated`: how often a key came again; the first is
    taken. `fault`: reason and detail where the tar is cut or damaged."""

    files: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


class TarFile(NamedTuple):
    path: str
    offset: int
    size: int


class TarFault(Exception):
    """`at`: the byte from which on nothing is known. `path`: of the member that is cut, if it is one."""

    def __init__(self, reason: str, detail: str, at: int, path: str = "") -> None:
        super().__init__(reason, detail, at, path)
        self.reason, self.detail, self.at, self.path = reason, detail, at, path


def compression(start: bytes) -> str | None:
    """The kind of compression, by a file's first bytes."""
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def read_tar_members(handle: int) -> TarMembers:
    """`handle`: of the open file. Raises OSError."""
    found = TarMembers()
    again: Counter[tuple[str, str]] = Counter()
    try:
        for path, offset, size in tar_files(handle):
            if (match := MEMBER.match(path)) is None:
                continue
            key, extension = match[1], match[2].lower()
            files = found.files.setdefault(key, {})
            if extension in files:
                again[key, extension] += 1
                found.repeated[key] = max(found.repeated.get(key, 0), again[key, extension])
            files.setdefault(extension, [offset, size])
    except TarFault as fault:
        found.fault = fault.reason, fault.detail
        if match := MEMBER.match(fault.path):  # what this sample lacks cannot be known
            found.files.pop(match[1], None)
    return found


def tar_files(handle: int) -> Iterator[TarFile]:
    """The files that lie in the tar as they are. Raises TarFault at the first head that cannot be true, and where the
    tar ends before the mark of its end; OSError."""
    end = os.fstat(handle).st_size
    offset, name, pax = 0, None, {}
    while (info := _head(handle, offset, end)) is not None:
        start = offset + BLOCK
        if info.type in _NAMES or info.type in _PAX:
            extra = _extra(handle, info, start, end)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = extra.rstrip(b"\0").decode(errors="replace")
            elif info.type in _PAX and info.type != tarfile.XGLTYPE:
                pax = _pax_fields(extra, offset)
            offset = start + padded(info.size)
            continue
        path = pax.get("path", name or info.name).removeprefix("./")
        size = _size(info, pax, offset)
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
        if info.type == tarfile.GNUTYPE_SPARSE:
            start += _sparse_heads(handle, offset)
        stored = size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
        if start + stored > end:
            raise TarFault(TAR_CUT, f"it ends at byte {end}, in the middle of {path[:200]}", offset, path)
        if info.isreg() and not sparse:
            yield TarFile(path, start, size)
        offset, name, pax = start + padded(stored), None, {}


def _head(handle: int, offset: int, end: int) -> tarfile.TarInfo | None:
    """The head at that byte; None at the end mark."""
    head = os.pread(handle, BLOCK, offset)
    if len(head) < BLOCK:
        raise TarFault(TAR_CUT, f"it ends at byte {end} without the mark of its end", offset)
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    except tarfile.HeaderError as error:
        if not head.strip(b"\0"):
            return None
        raise TarFault(TAR_DAMAGED, f"no head of a member at byte {offset}: {error}", offset) from error


def _extra(handle: int, info: tarfile.TarInfo, start: int, end: int) -> bytes:
    """The data of a long name or PAX header."""
    if not 0 <= info.size <= _MOST_EXTRA:
        at = start - BLOCK
        raise TarFault(TAR_DAMAGED, f"the head at byte {at} claims a name or header of {info.size} bytes", at)
    data = os.pread(handle, info.size, start)
    if len(data) < info.size:
        raise TarFault(TAR_CUT, f"it ends at byte {end}, in the middle of a header", start - BLOCK)
    return data


def _pax_fields(data: bytes, offset: int) -> Mapping[str, str]:
    """Records of "LENGTH KEY=VALUE\\n", LENGTH that of the whole record."""
    fields, at = {}, 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        length = int(digits) if space > 0 and digits.isdigit() else 0
        if length <= max(space - at, 0) or at + length > len(data):
            raise TarFault(TAR_DAMAGED, f"no PAX header at byte {offset}", offset)
        key, _, value = data[space + 1 : at + length - 1].partition(b"=")
        fields[key.decode(errors="replace")] = value.decode(errors="replace")
        at += length
    return fields


def _size(info: tarfile.TarInfo, pax: Mapping[str, str], offset: int) -> int:
    text = pax.get("size")
    size = info.size if text is None else int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
    if size < 0:
        raise TarFault(TAR_DAMAGED, f"the head at byte {offset} claims a size of {(text or str(size))[:40]}", offset)
    return size


def _sparse_heads(handle: int, offset: int) -> int:
    """The bytes of the further heads that an old GNU sparse file has."""
    more, taken = os.pread(handle, 1, offset + 482), 0
    while more.strip(b"\0"):
        taken += BLOCK
        more = os.pread(handle, 1, offset + taken + 504)
    return taken
