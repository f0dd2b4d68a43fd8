"""Every stored image has a CRC-32, so whichever library computes it must give zlib's number."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internvit_cli.runtime.crc import crc32


@given(st.binary(max_size=4096), st.integers(0, 2**32 - 1))
def test_it_is_zlibs_from_any_start_and_over_any_split(data: bytes, start: int) -> None:
    assert crc32(data, start) == zlib.crc32(data, start)
    middle = len(data) // 2
    assert crc32(data[middle:], crc32(data[:middle])) == zlib.crc32(data)


def test_arrays_are_read_in_place() -> None:
    rows = np.random.default_rng(0).standard_normal((256, 4096)).astype("<f2")
    assert crc32(rows.data) == zlib.crc32(rows.tobytes())
