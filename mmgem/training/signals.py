"""Ctrl-C, SIGTERM and SIGUSR1 where there is nothing to save: data are opened, a model built, features cached.

Receives signals. Gives `Stopped`, raised at once. During the steps of a stage `callbacks.Checkpoints` takes over.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_asked: list[int] = []


class Stopped(BaseException):
    """A signal that asks to stop at once. Like KeyboardInterrupt it is no Exception: nobody shall take it for one."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """In the block these signals raise `Stopped`; afterwards they do what they did before."""
    _asked.clear()
    before = {number: signal.signal(number, stop_at_once) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """A signal handler. Python loses what is raised in a `__del__`: then the next `stop_if_asked` stops."""
    _asked.append(number)
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    if frame is None:
        raise Stopped(number)


def stop_if_asked() -> None:
    """Raises for a signal whose own `Stopped` was held back or lost."""
    if _asked:
        raise Stopped(_asked[-1])
