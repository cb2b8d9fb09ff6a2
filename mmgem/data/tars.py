"""Indexes webdataset / img2dataset tars where they lie; no tar is written, moved or changed.

Receives tars: local files or URLs. Gives the index of a split that names them, and `broken.jsonl`, which names what
was left out: a sample without picture, text or a readable head of its picture, with broken JSON, with a key seen
before; and a tar that is cut or damaged, of which the samples before the fault are taken. Refuses a tar that is missing
or compressed. What other files lie beside the tars, or beside a sample's in them, does not matter.

Tars are read in parallel. Each leaves its members file and beside it, until the index is there, `000000.state`: an
indexing that was stopped goes on where it was, with the tars that have not changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from mmgem.data.index import (
    BROKEN_NAME,
    IMAGE_EXTENSIONS,
    INDEX_NAME,
    MEMBERS_FOLDER,
    Index,
    ShardEntry,
    broken_line,
    write_index,
    write_members,
    write_whole,
)
from mmgem.data.processes import cpus, map_in_order, stop_if_asked
from mmgem.data.remote import Remote
from mmgem.data.samples import (
    BROKEN_META,
    DUPLICATE_KEY,
    IMAGE_TOO_LARGE,
    MOST_IMAGE,
    MOST_TEXT,
    NO_IMAGE,
    Sample,
    SampleError,
    Tally,
    decode_image,
    image_size,
    is_unicode,
    merge_texts,
    parse_sample,
)
from mmgem.data.store import is_url
from mmgem.data.tar_members import compression, read_tar_members
from mmgem.data.writer import Totals, locked, shard_entry
from mmgem.errors import UserError
from mmgem.progress import Progress

_FEW = 4  # of fewer tars it does not pay to start processes, unasked

Broken = tuple[str, str, str]
"""Key, reason and detail."""


def find_tars(source: str, remote: Remote | None = None) -> list[str]:
    """The tars of a folder by name, one tar, or those of a pattern with braces; a path or a URL. Raises UserError."""
    if "{" in source and not os.path.exists(source):
        try:
            return list(braceexpand(source))
        except ValueError as error:
            raise UserError(f"{source}: {error}; write {{00000..00099}} or {{train,val}}") from error
    if source.endswith(".tar") if is_url(source) else os.path.isfile(source):
        return [source]
    if is_url(source):
        found = (remote or Remote()).listing(source, ".tar")
    elif os.path.isdir(source):
        found = sorted(str(path) for path in Path(source).glob("*.tar"))
    else:
        raise UserError(f"no such folder: {source}; it should have the tars of img2dataset")
    if not found:
        hint = "name the folder that has them" if is_url(source) else _what_else(Path(source))
        raise UserError(f"no .tar in {source}: {hint}")
    return found


def _what_else(folder: Path) -> str:
    """What to do with a folder without tars."""
    if packed := sorted(path.name for path in folder.glob("*.t*gz")):
        return f"{', '.join(packed[:3])} must be unpacked first (gunzip)"
    if below := next(folder.glob("*/*.tar"), None):
        return f"there are some in {below.parent}, name that folder"
    if next(folder.glob("*.parquet"), None):
        return "of parquet files with pictures, `mmgem data prepare img2dataset` makes a dataset"
    return "name the folder that img2dataset wrote to"


def index_tars(
    split_dir: str | Path,
    tars: Iterable[str | Path],
    *,
    decode: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    tally: Tally | None = None,
    check: Callable[[Tally, int], None] | None = None,
    remote: Remote | None = None,
) -> Index:
    """Indexes tars, local or of URLs, and returns the index, which it writes to the folder `split_dir`.

    `decode` decodes every picture, where else its head is read. `processes` read tars (default: one a CPU). What is
    left out is counted in `tally` and named in `broken.jsonl`; `check` is told the tally and how many samples were
    found before the index is written, and may refuse by a UserError. Raises UserError as the module says, where there
    is an index (unless `overwrite` is set), and where no sample is left.
    """
    split_dir, tally, names = Path(split_dir), tally or Tally(), [str(tar) for tar in tars]
    if not names:
        raise UserError(f"no tars to index for {split_dir}: name at least one")
    if processes is not None and processes < 1:
        raise UserError(f"processes is {processes}; give 1 or more")
    _prepare_folder(split_dir, overwrite)
    jobs = [_Job(n, name, _stored_path(name, split_dir), split_dir, decode, remote) for n, name in enumerate(names)]
    totals, read, entries, hashes = Totals(), 0, list[ShardEntry | None](), list[np.ndarray]()
    partial = split_dir / f".{BROKEN_NAME}.partial"
    results = map_in_order(_index_tar, jobs, min(processes or (cpus() if len(jobs) >= _FEW else 1), len(jobs)))
    with (
        locked(split_dir),
        closing(results),
        _writing(split_dir),
        partial.open("wb") as named,
        Progress("indexing", len(jobs), "tars") as progress,
    ):

        def leave_out(job: _Job, broken: Iterable[Broken]) -> None:
            for key, reason, detail in broken:
                named.write(broken_line(key, job.stored, reason, detail))
                tally.skip(SampleError(key or job.stored, reason, detail))

        for job, result in zip(jobs, results, strict=True):
            leave_out(job, result.broken)
            tally.dropped.update(result.dropped)
            _add(totals, result.totals)
            read += result.read
            entries.append(result.entry)
            hashes.append(result.hashes)
            progress.note = f"{read} samples, {read / (time.monotonic() - progress.start):.0f}/s"
            progress.advance()
        for number, keys in _second_ones(split_dir, entries, hashes):
            entries[number] = _without(split_dir, jobs[number], entries[number], keys, totals)
            leave_out(jobs[number], ((key, DUPLICATE_KEY, "in an earlier tar") for key in keys))
    os.replace(partial, split_dir / BROKEN_NAME)
    if not tally.skipped:
        (split_dir / BROKEN_NAME).unlink()
    if check is not None:
        check(tally, read)
    shards = [entry for entry in entries if entry is not None and entry.samples]
    if not shards:
        raise UserError(f"no sample that can be used in the tars: {split_dir / BROKEN_NAME} says why")
    index = Index(shards, dict(vars(totals)), dict(tally.skipped), dict(tally.dropped))
    write_index(split_dir, index)
    _clean(split_dir, index)
    return index


def _clean(split_dir: Path, index: Index) -> None:
    """Takes away what only unfinished work needs, and members files of tars without samples."""
    kept = {shard.members for shard in index.shards}
    for path in (split_dir / MEMBERS_FOLDER).iterdir():
        if f"{MEMBERS_FOLDER}/{path.name}" not in kept:
            path.unlink()


@dataclass(frozen=True)
class _Job:
    number: int
    tar: str
    stored: str
    split_dir: Path
    decode: bool
    remote: Remote | None

    @property
    def state(self) -> Path:
        return self.split_dir / MEMBERS_FOLDER / f"{self.number:06d}.state"


@dataclass
class _Result:
    """What a tar holds. `hashes`: of its keys, in order. `counts`: captions and regions of each."""

    entry: ShardEntry | None
    read: int
    totals: dict[str, int]
    dropped: dict[str, int]
    broken: list[Broken]
    counts: list[tuple[int, int]]
    hashes: np.ndarray


def _index_tar(job: _Job) -> _Result:
    """Raises UserError."""
    remote = job.remote or Remote()
    try:
        if is_url(job.tar):
            mark = remote.mark(job.tar)
        else:
            found = os.stat(job.tar)
            if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for its other end
                raise UserError(f"{job.tar} is no file: name a tar, or a folder of tars")
            mark = f"{found.st_size} {found.st_mtime_ns}"
        asked = {"tar": job.stored, "mark": mark, "decode": job.decode}
        if (result := _finished(job, asked)) is not None:
            return result
        if not is_url(job.tar):
            return _save(job, asked, _scan(job, Path(job.tar)))
        fetched = job.split_dir / MEMBERS_FOLDER / f"{job.number:06d}.tar"
        try:
            remote.download(job.tar, fetched)
            return _save(job, asked, _scan(job, fetched))
        finally:
            fetched.unlink(missing_ok=True)
    except FileNotFoundError as error:
        raise UserError(f"no such tar: {job.tar}") from error
    except OSError as error:
        raise UserError(f"cannot index {job.tar}: {error.strerror or error}") from error


def _finished(job: _Job, asked: dict[str, Any]) -> _Result | None:
    """What an earlier run has found, if the tar, what was asked, and the members file are still the same."""
    try:
        state = json.loads(job.state.read_bytes())
        if state.pop("asked") != asked:
            return None
        entry = None if state["entry"] is None else ShardEntry(**state.pop("entry"))
        members = {} if entry is None else _members_of(job.split_dir, entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Result(**{**state, "entry": entry, "counts": [], "hashes": _hashes(members)})


def _save(job: _Job, asked: dict[str, Any], result: _Result) -> _Result:
    state = {name: value for name, value in vars(result).items() if name != "hashes"}
    state["entry"] = None if result.entry is None else asdict(result.entry)
    write_whole(job.state, json.dumps({"asked": asked, **state}).encode())
    return replace(result, counts=[])  # needed later by few tars


def _scan(job: _Job, path: Path) -> _Result:
    with FileIO(path) as file:
        if packed := compression(os.pread(file.fileno(), 8, 0)):
            raise UserError(f"{job.tar} is compressed ({packed}), its samples cannot be found: unpack it first")
        found = read_tar_members(file.fileno())
        broken: list[Broken] = []
        for key, times in found.repeated.items():
            broken += [(key, DUPLICATE_KEY, "again in its tar")] * times
        dropped: Counter[str] = Counter()
        members, totals, counts = {}, Totals(), []
        for key, files in found.files.items():
            stop_if_asked()
            try:
                sample = _sample(file.fileno(), key, files, dropped)
                if job.decode:
                    decode_image(sample)
            except SampleError as error:
                broken.append((key, error.reason, error.detail))
                continue
            members[key] = _needed(files)
            totals.add(sample)
            counts.append((len(sample.captions), len(sample.regions)))
    if found.fault is not None:
        broken.append(("", *found.fault))
    entry = shard_entry(job.split_dir, job.number, job.stored, path, members) if members else None
    read = len(found.files) + sum(found.repeated.values())
    return _Result(entry, read, dict(vars(totals)), dict(dropped), broken, counts, _hashes(members))


def _sample(handle: int, key: str, files: dict[str, list[int]], dropped: Counter[str]) -> Sample:
    """Raises SampleError."""
    needed = _needed(files)
    if not needed.keys() & set(IMAGE_EXTENSIONS):
        raise SampleError(key, NO_IMAGE, f"only {', '.join(files)}")
    contents = {}
    for extension, (offset, size) in needed.items():
        most, reason = (MOST_TEXT, BROKEN_META) if extension in ("json", "txt") else (MOST_IMAGE, IMAGE_TOO_LARGE)
        if size > most:
            raise SampleError(key, reason, f"{extension}: {size} bytes")
        contents[extension] = os.pread(handle, size, offset)
    image = next(contents[e] for e in IMAGE_EXTENSIONS if e in contents)
    image_size(key, image)
    return parse_sample(key, image, merge_texts(key, contents.get("json", b""), contents.get("txt", b"")), dropped)


def _needed(files: dict[str, list[int]]) -> dict[str, list[int]]:
    """The one picture and the texts of a sample."""
    images = [extension for extension in IMAGE_EXTENSIONS if extension in files]
    return {e: files[e] for e in (*images[:1], "json", "txt") if e in files}


def _hashes(keys: Iterable[str]) -> np.ndarray:
    """64 bits a key: what is kept of all keys of a split, to find those that come again."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


def _second_ones(
    split_dir: Path, entries: Sequence[ShardEntry | None], hashes: Sequence[np.ndarray]
) -> Iterator[tuple[int, list[str]]]:
    """Of each shard with such: the keys that an earlier one has."""
    repeated = []
    for part in range(16):  # so that the sorted copy of the hashes is small
        some = np.sort(np.concatenate([shard[shard >> np.uint64(60) == part] for shard in hashes]))
        repeated.append(some[1:][some[1:] == some[:-1]])
    repeated = np.concatenate(repeated)
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        candidates = np.flatnonzero(np.isin(hashes[number], repeated))
        if entry is None or not len(candidates):
            continue
        keys = list(_members_of(split_dir, entry))
        candidates = [keys[i] for i in candidates.tolist()]
        again = [key for key in candidates if key in seen]
        seen.update(candidates)
        if again:
            yield number, again


def _without(split_dir: Path, job: _Job, entry: ShardEntry | None, keys: list[str], totals: Totals) -> ShardEntry:
    """The shard's entry and members file without these samples, which are also taken from the totals."""
    assert entry is not None
    members = _members_of(split_dir, entry)
    counts = dict(zip(members, json.loads(job.state.read_bytes())["counts"], strict=True))
    for key in keys:
        captions, regions = counts[key]
        _add(totals, {"samples": -1, "captions": -captions, "regions": -regions})
        _add(totals, {"images_without_captions": -(not captions)})
        del members[key]
    place, checksum = write_members(split_dir, job.number, members)
    return replace(entry, samples=len(members), members=place, members_sha256=checksum)


def _add(totals: Totals, more: dict[str, int]) -> None:
    for name, count in more.items():
        setattr(totals, name, getattr(totals, name) + count)


def _members_of(split_dir: Path, entry: ShardEntry) -> dict[str, Any]:
    """Raises OSError, and ValueError where the file is not the entry's."""
    content = (split_dir / entry.members).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.members_sha256:
        raise ValueError(entry.members)
    return json.loads(content)


def _prepare_folder(split_dir: Path, overwrite: bool) -> None:
    """Raises UserError."""
    if is_url(str(split_dir)):
        raise UserError(f"{split_dir}: an index is written to a folder of this machine; name one with --out")
    index_path = split_dir / INDEX_NAME
    with _writing(split_dir):
        if index_path.exists():
            if not overwrite:
                raise UserError(f"{index_path} exists: choose another --out, or give --overwrite")
            index_path.unlink()  # its members files will be others
        (split_dir / MEMBERS_FOLDER).mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(split_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot write to {split_dir}: {error.strerror or error}"
        raise UserError(f"{what}; choose another folder with --out") from error


def _stored_path(tar: str, split_dir: Path) -> str:
    """Relative where the tar lies in the data set of the split, so that both can move; a link stays a link. Raises
    UserError."""
    if not is_unicode(tar):
        raise UserError(f"{tar!a}: an index cannot name what is no UTF-8: rename the tar")
    if is_url(tar):
        return tar
    folder, name = Path(tar).parent.resolve(), Path(tar).name
    home = split_dir.resolve()
    return os.path.relpath(folder / name, home) if folder.is_relative_to(home.parent) else str(folder / name)
