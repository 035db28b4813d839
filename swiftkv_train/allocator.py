"""Keep memory that was freed, so that work on CPU does not fault the same pages in again and again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its heap and not to give the heap back; does nothing elsewhere.

    Worth a third of a CPU training step. Left alone where the user has set an allocator or malloc's own variables.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
    except (OSError, AttributeError):
        pass
