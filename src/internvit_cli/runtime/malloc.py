"""Make the C library keep freed memory for reuse."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28
LARGEST_KEPT_BLOCK = 1 << 25
"""The largest value that glibc accepts."""


def keep_freed_memory() -> None:
    """Keep freed memory in this process if the C library is glibc.

    By default, glibc returns large blocks to the system, and gets them again, cleared page by page, for every operation
    on a tile and for every picture. `benchmarks/allocator.py` measures what that costs.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries lack this function
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
