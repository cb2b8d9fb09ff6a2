"""Where the files of a split lie: a folder, or a URL of any kind that fsspec knows (`s3://`, `gs://`, `hf://`,
`https://`, `file://` …).

Receives a folder or URL. Gives its small files' content, and its shards open: those of URLs are fetched whole, checked
against the index, and kept in a folder of this machine (`cache`); how servers and credentials are said, and what is
tried again, stands in `remote`. An index in either place may name shards by a path of this machine or by a URL, too.
Refuses, with a UserError that names the file, what is not there or cannot be had; and with a SampleError a shard that
is not what its index says.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from mmgem.data.cache import FileCache
from mmgem.data.remote import NotThere, Remote
from mmgem.data.samples import SampleError
from mmgem.errors import UserError

_AHEAD = 4  # downloads that a process has under way


class Shard(Protocol):
    """What a store needs to know of a shard: an entry of the index."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def members(self) -> str: ...
    @property
    def members_sha256(self) -> str: ...


class Store(ABC):
    """A split's files. Cheap to pickle to a worker."""

    def __init__(self, cache: FileCache | None = None, remote: Remote | None = None):
        self.cache, self.remote = cache or FileCache(), remote or Remote()
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    @abstractmethod
    def name(self, path: str) -> str:
        """How users know the file: its full path or URL."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a small file is there. Raises UserError where that cannot be told."""

    @abstractmethod
    def read(self, path: str, sha256: str | None = None) -> bytes:
        """The whole of a small file. With its sha256 it may come from the cache. Raises UserError."""

    def open(self, shard: Shard) -> FileIO:
        """The shard, of the size that the index says. Raises UserError where there is none, SampleError (with `shard`
        set) where it is not what the index says."""
        name = self.name(shard.path)
        if not is_url(name):
            return open_local(Path(name), shard)
        return self.cache.open(shard.sha256, shard.bytes, name, lambda path: self._download(shard, path))

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Says which shards will soon be read: of URLs, they are fetched meanwhile, and stay. What goes wrong then is
        met by whoever reads."""
        missing = []
        for shard in shards:
            wanted = [(shard.path, shard.sha256), (shard.members, shard.members_sha256)]
            if not all([self.cache.touch(sha256) for path, sha256 in wanted if is_url(self.name(path))]):
                missing.append(shard)
        if missing:
            if self._ahead is None or self._ahead.process != os.getpid():
                self._ahead = _Ahead(self._fetch_ahead)
            self._ahead.ask(missing)

    def _fetch_ahead(self, shard: Shard) -> None:
        if is_url(self.name(shard.members)):
            self.read(shard.members, shard.members_sha256)
        if is_url(self.name(shard.path)):
            self.cache.keep(shard.sha256, shard.bytes, lambda path: self._download(shard, path))

    def _download(self, shard: Shard, path: Path) -> FileIO:
        """What came otherwise than its index says is fetched once more: it may have been the way."""
        url = self.name(shard.path)
        with suppress(SampleError):
            return self._download_once(shard, url, path)
        return self._download_once(shard, url, path)

    def _download_once(self, shard: Shard, url: str, path: Path) -> FileIO:
        self.remote.download(url, path, shard.bytes)
        file = FileIO(path)
        check_sha256(file, shard, url)
        return file


class LocalStore(Store):
    def __init__(self, root: str | Path, cache: FileCache | None = None, remote: Remote | None = None):
        super().__init__(cache, remote)
        self.root = Path(root)

    def name(self, path: str) -> str:
        return path if is_url(path) else str(self.root / path)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read(self, path: str, sha256: str | None = None) -> bytes:
        try:
            if not stat.S_ISREG(os.stat(self.root / path).st_mode):  # a device may never end
                raise UserError(f"cannot read {self.root / path}: it is no file")
            return (self.root / path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.root / path}: {error.strerror}") from error


class RemoteStore(Store):
    def __init__(self, url: str, cache: FileCache | None = None, remote: Remote | None = None):
        super().__init__(cache, remote)
        self.url = url.rstrip("/")

    def name(self, path: str) -> str:
        if is_url(path) or path.startswith("/"):
            return path
        protocol, _, root = self.url.partition("://")
        joined = posixpath.normpath(posixpath.join(root, quote(path) if protocol in ("http", "https") else path))
        return f"{protocol}://{joined}"

    def exists(self, path: str) -> bool:
        try:
            self.remote.read(self.name(path))
        except NotThere:
            return False
        return True

    def read(self, path: str, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return self.remote.read(self.name(path))
        return self.cache.read(sha256, lambda: self.remote.read(self.name(path)))


def open_store(
    location: str | Path,
    *,
    cache_dir: str | Path | None = None,
    cache_gb: float = 20.0,
    remote: Remote | None = None,
) -> Store:
    """The store of a folder or URL. `cache_dir`: where shards of URLs are kept, by default `mmgem/shards` in the user's
    cache folder (XDG_CACHE_HOME or ~/.cache); `cache_gb`: so many bytes / 10^9 of them. Nothing is read yet."""
    cache = FileCache(cache_dir, int(cache_gb * 1e9))
    return RemoteStore(str(location), cache, remote) if is_url(location) else LocalStore(location, cache, remote)


def is_url(location: str | Path) -> bool:
    return "://" in str(location)


def open_local(path: Path, shard: Shard) -> FileIO:
    """As `Store.open`, of a file of this machine."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # to open a pipe would wait for its other end
            raise UserError(f"shard {path} is a {'folder' if stat.S_ISDIR(mode) else 'device'}, not a file")
        file = FileIO(path)
    except FileNotFoundError as error:
        what = f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "missing"
        raise UserError(f"shard {path} is {what}; its index names it: copy or prepare it again") from error
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from error
    found = os.fstat(file.fileno()).st_size
    if found != shard.bytes:
        file.close()
        reason = "shard cut short" if found < shard.bytes else "shard changed"
        raise SampleError("", reason, f"{found} bytes, its index says {shard.bytes}", shard=str(path))
    return file


def check_sha256(file: FileIO, shard: Shard, name: str) -> None:
    """Raises SampleError where the content is not what the index says."""
    found = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    file.seek(0)
    if found != shard.sha256:
        detail = f"sha256 {found[:12]}, its index says {shard.sha256[:12]}"
        raise SampleError("", "shard has another checksum", detail, shard=name)


class _Ahead:
    """A process's downloads ahead, by a few daemon threads that end when nothing is left to do."""

    def __init__(self, fetch: Callable[[Shard], None]):
        self.process = os.getpid()
        self._fetch = fetch
        self._lock = threading.Lock()
        self._waiting: deque[Shard] = deque()
        self._known: set[str] = set()
        self._threads = 0

    def ask(self, shards: Iterable[Shard]) -> None:
        with self._lock:
            for shard in shards:
                if shard.sha256 not in self._known:
                    self._known.add(shard.sha256)
                    self._waiting.append(shard)
            while self._threads < min(_AHEAD, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                shard = self._waiting.popleft()
            try:
                self._fetch(shard)
            except Exception:  # whoever reads the shard meets it; until then it is not tried again
                continue
            with self._lock:
                self._known.discard(shard.sha256)
