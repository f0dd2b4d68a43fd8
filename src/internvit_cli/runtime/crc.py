"""Provide zlib's CRC-32 from the fastest library that is installed; the value is the same, as stored files need it."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # a platform without its wheels; benchmarks/host_path.py shows the difference
    from zlib import crc32

__all__ = ["crc32"]
