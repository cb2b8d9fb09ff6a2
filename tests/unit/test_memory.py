"""Freed memory in a process of its own, since the settings hold for a whole process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from mmgem.memory import hand_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024

keep_freed_memory()
blocks = [bytearray(b"x") * 2**24 for _ in range(32)]
last = bytearray(b"x") * 2**20  # above the others, so that they are no loose end of the heap
full = resident()
del blocks
kept = resident()
hand_back_freed_memory()
print(full, kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libcs are left as they are")
def test_freed_memory_is_kept_until_it_is_handed_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    full, kept, left = map(int, done.stdout.split())
    assert full > 512
    assert kept > full - 64  # MiB
    assert left < full - 448
