"""Files of URLs kept on this machine, within a set number of bytes, for all its processes.

Receives the sha256 and size of a file, and what fetches it. Gives the file, open: one process fetches, others that want
the same wait for it. A file gets its name when it is whole, so a kill leaves nothing that is taken for one. What was
longest not asked for gives way; who has it open can still read it. Refuses, with a UserError, a file larger than all
the room, and a folder that cannot be written to.

The folder holds SHA256 (a file), SHA256.SIZE.partial (being fetched: its room is taken), and locks while they are held.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from mmgem.errors import UserError

_POLL = 0.1
_FRESH = 30.0
_LOCK = ".lock"
_FILE = re.compile(r"[0-9a-f]{64}")  # nothing else in the folder is ours
_PARTIAL = re.compile(r"([0-9a-f]{64})\.(\d+)\.partial")


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mmgem" / "shards"


class FileCache:
    """`most_bytes`: the room of the folder. Cheap to pickle. Its folder is made when it is first needed."""

    def __init__(self, folder: str | Path | None = None, most_bytes: int = 20_000_000_000):
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.most_bytes = most_bytes

    def open(self, sha256: str, size: int, name: str, fetch: Callable[[Path], FileIO]) -> FileIO:
        """The file, from the folder or fetched: `fetch` writes it to a path and gives it open, checked. `name` is for
        errors. Raises UserError, and what `fetch` raises."""
        if size > self.most_bytes:
            room = f"{self.most_bytes / 1e9:g} GB"
            raise UserError(f"{name} has {size / 1e9:.3g} GB, the shard cache room for {room}: raise shard_cache_gb")
        with self._writing():
            if file := self._found(sha256, size):
                return file
            with locked(self._lock(sha256)):
                if file := self._found(sha256, size):
                    return file
                while (partial := self._reserve(sha256, size)) is None:
                    time.sleep(_POLL)  # what others are fetching fills the room; it can give way when it is there
                return self._fetch(sha256, partial, fetch)

    def keep(self, sha256: str, size: int, fetch: Callable[[Path], FileIO]) -> None:
        """Fetches the file as `open` does, unless another is doing so, or what was used in the last half minute would
        have to give way."""
        with self._writing(), locked(self._lock(sha256), wait=False) as held:
            if held and not self.touch(sha256) and (partial := self._reserve(sha256, size, _FRESH)):
                self._fetch(sha256, partial, fetch).close()

    def read(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """The content of a small file, which is kept if it is what its sha256 says."""
        path = self.folder / sha256
        with suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                os.utime(path)
                return content
            path.unlink()
        content = fetch()
        if hashlib.sha256(content).hexdigest() == sha256:

            def write(partial: Path) -> FileIO:
                partial.write_bytes(content)
                return FileIO(partial)

            self.keep(sha256, len(content), write)
        return content

    def touch(self, sha256: str) -> bool:
        """Says that a file will soon be read. Whether it is there."""
        try:
            os.utime(self.folder / sha256)
        except OSError:
            return False
        return True

    def _found(self, sha256: str, size: int) -> FileIO | None:
        try:
            file = FileIO(self.folder / sha256)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == size:
            os.utime(file.fileno())
            return file
        file.close()
        (self.folder / sha256).unlink(missing_ok=True)  # somebody cut it
        return None

    def _fetch(self, sha256: str, partial: Path, fetch: Callable[[Path], FileIO]) -> FileIO:
        try:
            file = fetch(partial)
            os.replace(partial, self.folder / sha256)  # it is open: from now on it may be taken away
        finally:
            partial.unlink(missing_ok=True)
        return file

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            what = f"cannot keep shards in {self.folder}: {error.strerror or error}"
            raise UserError(f"{what}; free some space, or set shard_cache to another folder") from error

    def _lock(self, name: str) -> Path:
        return self.folder / f"{name}{_LOCK}"

    def _reserve(self, sha256: str, size: int, spared: float = 0.0) -> Path | None:
        """Makes room for the file, and takes it; None where there is none without what was used in the last `spared`
        seconds. The caller holds the file's lock."""
        partial = self.folder / f"{sha256}.{size}.partial"
        partial.unlink(missing_ok=True)
        with locked(self._lock("room")):
            files, taken = self._listed()
            for used, found, path in sorted(files):
                if taken + size <= self.most_bytes or used > time.time() - spared:
                    break
                path.unlink(missing_ok=True)
                taken -= found
            if taken + size > self.most_bytes:
                return None
            partial.touch()
            return partial

    def _listed(self) -> tuple[list[tuple[float, int, Path]], int]:
        """(time of use, size, path) of each file, and the room that they and those being fetched take."""
        files, taken = [], 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if partial := _PARTIAL.fullmatch(entry.name):
                with locked(self._lock(partial[1]), wait=False) as free:
                    if free:  # of a process that was killed
                        path.unlink(missing_ok=True)
                    else:
                        taken += int(partial[2])
            elif _FILE.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    files.append((stat.st_mtime, stat.st_size, path))
                    taken += stat.st_size
        return files, taken


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of that name, against other threads and processes; gives False where it is held and `wait` is not
    set. The file is there only while somebody wants it."""
    while True:
        held = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            yield False
            return
        except BaseException:
            os.close(held)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                break
        os.close(held)  # its last holder has taken the file away: it no longer locks anything
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(held, fcntl.LOCK_UN)  # a worker forked meanwhile has it open, too
        os.close(held)
