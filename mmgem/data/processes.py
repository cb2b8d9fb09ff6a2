"""Work over processes, in order, that stops soon and leaves no process behind.

Receives a function, its tasks, and how many processes. Gives the results in the order of the tasks, which are drawn as
they are needed. Refuses, with a UserError, to go on when a process was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import TypeVar

from mmgem.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_stop: Event | None = None


class Stopped(Exception):
    """This work is no longer wanted: the one who asked for it has stopped."""


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], processes: int) -> Generator[R, None, None]:
    """`map` over spawned processes, with at most three tasks a process under way; over this one where it is 1.

    Function and tasks must pickle. When the iterator is closed, or fails, `stop_if_asked` ends the tasks under way.
    """
    if processes <= 1:
        yield from map(function, tasks)
        return
    # spawn: forking a process that has threads (torch starts them) can hang.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _start, (stop,))
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            with _ctrl_c_later():  # it may start a process, which has it blocked then until it knows to ignore it
                waiting.append(pool.submit(function, task))
            if len(waiting) == 3 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for want of memory: run the same command again with fewer --processes"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_if_asked() -> None:
    """To be called often in the work. Raises Stopped."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(stop: Event) -> None:
    """In a new process: Ctrl-C is its parent's to handle, and it ends when its parent is gone."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
