"""A web server on this machine that can be told to fail."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """Serves the files of `root` at `url`. `requests` counts what was asked for, by file name.

    `faults[name]` says what happens to the next requests for a file, one after the other: a status; ("drop", n): the
    connection ends after n bytes; ("hang", n): nothing comes after n bytes; bytes: they come instead of the file.
    `latency`: seconds before each answer, `pause`: seconds between two parts of 4 KiB.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.requests: Counter[str] = Counter()
        self.faults: defaultdict[str, list[int | tuple[str, int] | bytes]] = defaultdict(list)
        self.latency = self.pause = 0.0
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that were killed, or gave up


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        self.server.requests[path.name] += 1
        time.sleep(self.server.latency)
        fault = self.server.faults[path.name].pop(0) if self.server.faults[path.name] else None
        if path.is_dir():
            return self._answer("".join(f'<a href="{p.name}">' for p in path.iterdir()).encode(), "text/html")
        if isinstance(fault, int) or not path.is_file():
            return self.send_error(fault if isinstance(fault, int) else 404)
        self._answer(fault if isinstance(fault, bytes) else path.read_bytes(), "application/x-tar", fault)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str((self.server.root / self.path.lstrip("/")).stat().st_size))
        self.end_headers()

    def _answer(self, content: bytes, kind: str, fault: object = None) -> None:
        what, most = fault if isinstance(fault, tuple) else ("", len(content))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, most, 4096):
            self.wfile.write(content[start : min(start + 4096, most)])
            time.sleep(self.server.pause)
        if what == "hang":
            self.server.closing.wait(60)
        if what:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[WebServer]:
    with WebServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
