"""Read and check the header of a safetensors file with limits, without torch and without mapping the file.

The format is a header length of 8 bytes, little-endian, that many bytes of JSON, and the bytes of the tensors. Every
value in the header is checked against the file before it is used.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import ModelError
from internvit_cli.model.json_files import check_tensor_name, refuse_foreign, short_repr, unreadable_error
from internvit_cli.runtime.untrusted import opened

if TYPE_CHECKING:
    from typing import TypeGuard

MAX_HEADER_BYTES = 32 << 20
"""Largest header in bytes, above that of any real model; the format itself allows 100 MB."""

MAX_TENSORS = 300_000
"""Largest number of tensors in a file, which limits the memory for parsing a header."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor's bytes in a file."""

    path: str
    dtype: str
    """The safetensors name of the type, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """The position of the first byte in the file."""
    end: int
    """The position after the last byte."""


def read_safetensors_header(path: str) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ModelError: The file cannot be read or is truncated, or its header is wrong; the message names file and tensor.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                refuse_foreign(path, prefix + (file.read(100) or b""))
                raise ModelError(f"{path}: truncated, or not a safetensors file", "download it again")
            text = file.read(length)
    except OSError as error:
        raise unreadable_error(path, error) from error
    return parse_header(text, path=path, file_size=size)


def parse_header(text: bytes, *, path: str, file_size: int) -> dict[str, StoredTensor]:
    """Return the tensors that the JSON of a header describes.

    Args:
        text: The JSON, without the length before it.
        path: The file, for messages and for the result.
        file_size: The size of the whole file in bytes.

    Raises:
        ModelError: The header is invalid.
    """
    if text.count(b"{") + text.count(b"[") > 3 * MAX_TENSORS:
        raise ModelError(f"{path}: more than {MAX_TENSORS:,} tensors, which no valid file has")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the safetensors header is not valid JSON", "download the file again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the safetensors header is not a JSON object", "download the file again")
    start = 8 + len(text)
    tensors = {
        name: _tensor(name, entry, path, start, file_size) for name, entry in header.items() if name != "__metadata__"
    }
    _check_overlap(tensors, path)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor(name: str, entry: Any, path: str, start: int, file_size: int) -> StoredTensor:
    check_tensor_name(name, path)
    if not isinstance(entry, dict):
        raise ModelError(f"{path}: tensor {name!r}: its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelError(f"{path}: tensor {name!r}: unknown dtype {short_repr(dtype)}")
    if not _are_sizes(shape):
        raise ModelError(f"{path}: tensor {name!r}: shape {short_repr(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{path}: tensor {name!r}: data_offsets {short_repr(offsets)} are not two ascending offsets")
    begin, end = start + offsets[0], start + offsets[1]
    if end > file_size:
        raise ModelError(
            f"{path}: truncated: tensor {name!r} ends at byte {end:,}, the file at {file_size:,}", "download it again"
        )
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ModelError(f"{path}: tensor {name!r}: {end - begin:,} bytes are not {dtype} of shape {shape}")
    return StoredTensor(path, dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a list of whole numbers from 0 to 2^63 - 1 with a plausible length."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value)
    )


def _check_overlap(tensors: dict[str, StoredTensor], path: str) -> None:
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for (_, before), (name, after) in itertools.pairwise(ordered):
        if after.begin < before.end:
            raise ModelError(f"{path}: tensor {name!r} overlaps another one", "download the file again")
