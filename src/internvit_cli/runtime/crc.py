"""zlib's CRC-32 from the fastest library at hand. All give the same number: every stored image has one."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # a platform without its wheels; ten times slower (benchmarks/host_path.py)
    from zlib import crc32

__all__ = ["crc32"]
