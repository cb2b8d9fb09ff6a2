"""Debian's Chromium without a window, for tests that look at pages: DevTools over a pipe, so no port and no driver."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Tab:
    """A page. requests: the URLs it asked for; said: what came to its console and log."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.said: list[str] = []
        self._loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        sent = json.dumps(message).encode() + b"\0"
        while sent:
            sent = sent[os.write(self._to, sent) :]
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
        raise AssertionError

    def _messages(self, timeout: float = 60) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + timeout
        while True:
            while b"\0" in self._rest:
                text, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(text)
                self._note(message)
                yield message
            if not select.select([self._back], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._back, 1 << 20)
            if not part:
                raise ConnectionError("Chromium has ended")
            self._rest += part

    def _note(self, message: dict[str, Any]) -> None:
        method, given = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"][:200])
        elif method == "Runtime.consoleAPICalled":
            self.said.append(f"{given['type']}: {[a.get('value') for a in given['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(given["exceptionDetails"])[:500])
        elif method == "Log.entryAdded":
            self.said.append(f"{given['entry']['level']}: {given['entry']['text']}")
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, page: Path, width: int, height: int, *, mobile: bool = False, dark: bool = False) -> None:
        """Shows a file at a width in CSS pixels, as a phone if `mobile`."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear(), self.said.clear()
        self._loaded = False
        self.ask("Page.navigate", url=page.resolve().as_uri())
        if not self._loaded:
            next(m for m in self._messages() if m.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression, promises awaited."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def screenshot(self, path: Path, clip: tuple[float, float, float, float] | None = None) -> None:
        """The whole page as PNG, or x, y, width, height of it."""
        if clip is None:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = (0, 0, size["width"], size["height"])
        place = dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1}
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=place)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A browser with a profile of its own, and one tab in it; both end with the block."""
    assert CHROMIUM is not None
    from_us, to = os.pipe()
    back, from_it = os.pipe()

    def place() -> None:  # where --remote-debugging-pipe expects them; first out of each other's way
        a, b = os.dup(from_us), os.dup(from_it)
        os.dup2(a, 3), os.dup2(b, 4)

    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=place,
        start_new_session=True,
    )
    os.close(from_us), os.close(from_it)
    try:
        yield Tab(to, back)
    finally:
        os.close(to), os.close(back)  # it ends when the pipe does
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
