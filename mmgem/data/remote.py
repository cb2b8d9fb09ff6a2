"""Files of URLs: fetched whole, tried again where the net fails, given up where it makes no sense.

Receives URLs of any kind that fsspec knows (`s3://`, `gs://`, `hf://`, `https://` …). Gives their content. Refuses,
with a UserError that names the URL: at once what is not there, is not allowed, or needs a package that is missing;
after some tries what a broken connection, a time-out or a failing server (5xx, 429) has kept from coming.

Settings of a service come as its own tools take them: credentials from the environment or its files, another S3 server
by AWS_ENDPOINT_URL, a public bucket by FSSPEC_S3_ANON=true, a proxy by HTTPS_PROXY, a token for hf:// by HF_TOKEN.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem, filesystem
from fsspec.asyn import reset_lock
from fsspec.callbacks import NoOpCallback

from mmgem.data.samples import SampleError
from mmgem.errors import UserError, one_line

T = TypeVar("T")

_LONGEST_WAIT = 60.0
_SILENT = 3.0  # seconds of trying that nobody is told of
_PACKAGES = {"s3": "mmgem[s3]", "s3a": "mmgem[s3]", "gs": "mmgem[gs]", "gcs": "mmgem[gs]"}
_TRANSIENT = (408, 425, 429)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
# Block and concurrency of S3: its file system holds their product in memory, 500 MB if nothing is said.
_S3_BLOCK, _S3_BLOCKS = 8 << 20, 4

# Of parents, kept for ever: a session that a forked child let go would close the parent's connections.
_left_by_fork: list[dict[str, AbstractFileSystem]] = []
_jitter = random.SystemRandom()  # the seeded generator is the user's


class NotThere(UserError):
    """The server answered: there is no such file."""


class Remote:
    """`timeout`: seconds without data after which a connection is given up. `backoff`: seconds before the second try;
    they double with each. Cheap to pickle; connections are made in the process that reads."""

    def __init__(self, retries: int = 8, timeout: float = 60.0, backoff: float = 0.5):
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self._process = 0
        self._filesystems: dict[str, AbstractFileSystem] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": 0, "_filesystems": {}}

    def read(self, url: str) -> bytes:
        """The whole of a small file. Raises UserError; NotThere where there is none."""
        return self._try(url, lambda files, path: files.cat_file(path))  # pyright: ignore[reportReturnType]

    def download(self, url: str, target: Path, size: int | None = None) -> None:
        """Writes the file to `target`. Raises UserError; SampleError where it does not have `size` bytes: nothing is
        gained by going on, or by trying more than once again."""

        def get(files: AbstractFileSystem, path: str) -> None:
            files.get_file(path, str(target), callback=_Watch(url, size))
            found = target.stat().st_size
            if size is not None and found != size:
                raise _other_size(url, found, size)

        self._try(url, get)

    def mark(self, url: str) -> str:
        """Changes when the file does, as far as the server says. Raises UserError."""
        return self._try(url, lambda files, path: files.ukey(path))

    def listing(self, url: str, ending: str) -> list[str]:
        """The URLs of the files of a folder with this ending, by name. Raises UserError."""
        protocol = url.partition("://")[0]

        def found(files: AbstractFileSystem, path: str) -> list[str]:
            files.invalidate_cache()
            names = (str(name) for name in files.ls(path, detail=False))
            return sorted(name for name in names if name.endswith(ending))

        return [name if "://" in name else f"{protocol}://{name}" for name in self._try(url, found)]

    def _try(self, url: str, action: Callable[[AbstractFileSystem, str], T]) -> T:
        tries, begun = self.retries + 1, time.monotonic()
        for number in range(tries):
            try:
                files = self._filesystem(url)
                return action(files, str(files._strip_protocol(url)))
            except (UserError, SampleError):
                raise
            except Exception as error:  # each file system raises types of its own
                if refusal := _refusal(url, error):
                    raise refusal from error
                if number == tries - 1 or not threading.main_thread().is_alive():  # nobody waits for it at the end
                    last = _said(error)
                    raise UserError(
                        f"cannot read {url}, tried {number + 1} times: {last}; look at the connection and the server, "
                        "then run again"
                    ) from error
                if time.monotonic() - begun > _SILENT:
                    print(f"{url}: {_said(error)}; trying again ({number + 2} of {tries})", file=sys.stderr)
            time.sleep(min(_LONGEST_WAIT, self.backoff * 2**number) * _jitter.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _filesystem(self, url: str) -> AbstractFileSystem:
        if self._process != os.getpid():
            if self._filesystems:
                _left_by_fork.append(self._filesystems)
                reset_lock()  # fsspec's own may have been held when the process forked
            self._filesystems, self._process = {}, os.getpid()
        protocol = url.partition("://")[0]
        if protocol not in self._filesystems:
            made = filesystem(protocol, skip_instance_cache=True, **_options(protocol, self.timeout))
            if protocol in ("s3", "s3a"):
                made.retries = 1  # pyright: ignore[reportAttributeAccessIssue]  # tries are counted here
            self._filesystems.setdefault(protocol, made)
        return self._filesystems[protocol]


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    """Of fsspec's file system: time-outs, and what else would not be as it must."""
    if protocol in ("http", "https", "gs", "gcs"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
        session = {"timeout": limits, "trust_env": True}
        if protocol in ("gs", "gcs"):
            # Its other kind of file system asks by gRPC what kind a bucket is, which no forked process may do. Each of
            # the tries made here is several of its own, and it logs them.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            return {"session_kwargs": session, "requests_timeout": limits}
        # A tar that comes compressed has another length than it says.
        return {"client_kwargs": session, "headers": {"Accept-Encoding": "identity"}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": limits, "default_block_size": _S3_BLOCK, "max_concurrency": _S3_BLOCKS}
    if protocol == "hf":
        from huggingface_hub.utils.tqdm import disable_progress_bars

        for name in ("http_get", "xet_get"):
            disable_progress_bars(f"huggingface_hub.{name}")
    return {}


class _Watch(NoOpCallback):
    """Stops a download that brings another size than it should. NoOp: with other callbacks hf:// takes a slower way."""

    def __init__(self, url: str, size: int | None):
        super().__init__()
        self.url, self.wanted, self.told, self.got = url, size, None, 0

    def set_size(self, size: int | None) -> None:
        self.told = size  # not judged here: it may be that of a server's error page

    def relative_update(self, inc: int = 1) -> None:
        self.got += inc
        if self.wanted is None:
            return
        if self.told not in (None, self.wanted):
            raise _other_size(self.url, self.told, self.wanted)
        if self.got > self.wanted:
            raise _other_size(self.url, self.got, self.wanted)


def _other_size(url: str, found: int, wanted: int) -> SampleError:
    reason = "shard cut short" if found < wanted else "shard changed"
    return SampleError("", reason, f"{found} bytes, its index says {wanted}", shard=url)


def _refusal(url: str, error: BaseException) -> UserError | None:
    """What to tell the user where another try would not help."""
    status, text = _status(error), _said(error)
    if isinstance(error, ImportError):
        protocol = url.partition("://")[0]
        how = f"pip install '{_PACKAGES[protocol]}'" if protocol in _PACKAGES else text
        return UserError(f"cannot read {url}: a package for {protocol}:// is missing: {how}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        what = f"cannot keep {url} on this machine: {error.strerror}"
        return UserError(f"{what}; free some space, or lower shard_cache_gb")
    if status in _TRANSIENT or (status is not None and status >= 500) or isinstance(error, TimeoutError):
        return None
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or status in (404, 410):
        return NotThere(f"no such file: {url}; look for a mistake in the path, or copy it there")
    refused = isinstance(error, PermissionError) or status in (401, 403) or text.startswith("Forbidden")
    if refused or type(error).__name__ in _NO_CREDENTIALS:
        return UserError(f"not allowed to read {url}: {text}; look at the path and at your credentials")
    if isinstance(error, ValueError) or status is not None:
        return UserError(f"cannot read {url}: {text}; look for a mistake in the URL")
    return None


def _said(error: BaseException) -> str:
    """In one line; servers say it in pages."""
    return one_line(error)[:300] or type(error).__name__


def _status(error: BaseException) -> int | None:
    """The HTTP status, which each library keeps elsewhere."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(response := getattr(cause, "response", None), dict):  # botocore, which s3fs wraps
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        cause = cause.__cause__
    # aiohttp; gcsfs; huggingface_hub
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        if str(found := getattr(holder, name, "")).isdecimal():
            return int(found)
    return None
