"""Progress of long work: a bar on a terminal, plain lines in a log; both with the rate and the time left.

Receives counts of work done. Gives nothing but what is seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

LOG_SECONDS = 20.0
"""Time between two plain lines."""


class Progress:
    """`with Progress("decoding", total) as p: p.advance(n)`. `note` may hold figures to show beside it."""

    def __init__(self, title: str, total: int | None, unit: str = "samples", done: int = 0):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.first = done
        self.note = ""
        self.start = self.last_line = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            left = [] if self.total is None else [TextColumn("left"), TimeRemainingColumn()]
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), *left, TextColumn("{task.fields[note]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rate="", note="")
        return self

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.terminal:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:.1f} {self.unit}/s", note=self.note)
        elif time.monotonic() - self.last_line >= LOG_SECONDS:
            self.line()

    @property
    def rate(self) -> float:
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> None:
        """One plain line."""
        self.last_line = time.monotonic()
        total = "" if self.total is None else f"/{self.total}"
        left = "" if self.total is None else f", {clock((self.total - self.done) / max(self.rate, 1e-9))} left"
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.title}: {self.done}{total} {self.unit}, {self.rate:.1f}/s{left}{note}", file=sys.stderr, flush=True
        )

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            self._bar.stop()
        elif self.done > self.first:
            self.line()


def track(items: Iterable[T], title: str, total: int | None = None, unit: str = "samples") -> Iterator[T]:
    """Yields the items and shows how far it is."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """94 -> 1:34; 3661 -> 1:01:01."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
