"""Memory that is freed and wanted again a moment later."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28
LARGEST_KEPT_BLOCK = 1 << 25
"""The most that glibc takes."""


def keep_freed_memory() -> None:
    """Have freed memory stay with this process, where the C library is glibc.

    By itself it gives large blocks back, and gets them anew, cleared page by page, for every operation of every tile
    and for every picture. `benchmarks/allocator.py` measures what that costs.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such function
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
