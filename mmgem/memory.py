"""Freed memory under glibc on Linux: kept for the next step, or handed back where a step is far off.

Receives nothing. Gives nothing. Another system or libc is left as it is.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# As in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """glibc hands large freed blocks back to the kernel, and every step pays the page faults for them anew.

    Kept, they cost a higher peak of memory.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def hand_back_freed_memory() -> None:
    """Before a process forks: what it keeps is the fork's too, and is there twice as soon as one of them writes."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
