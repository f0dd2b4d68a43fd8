"""Read JSON files of a checkpoint with limits on their size, and report every failure in one line."""

from __future__ import annotations

import json
import os
from typing import Any

from internvit_cli.errors import ModelError
from internvit_cli.runtime.untrusted import TooLargeError, read_bounded

MAX_CONFIG_BYTES = 4 << 20
"""Largest config.json, above that of any real model."""

MAX_INDEX_BYTES = 32 << 20
"""Largest index, above that of a mixture of experts with 200,000 tensors."""

MAX_CONTAINERS = 100_000
"""Largest number of objects and lists in a file, which limits the memory for parsing a text of brackets."""

LONGEST_NAME = 256
"""Longest name of a tensor, several times above real ones; it limits the length of messages."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_BEGINNINGS = (
    (b"PK\x03\x04", "a PyTorch or ZIP archive"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "an HTML or XML page, which a failed download may leave"),
    (b"\x1f\x8b", "a gzip archive"),
)
"""What a file may be instead of a checkpoint's, by its first bytes."""


def read_json(path: str, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file of at most `most` bytes.

    Raises:
        ModelError: The file cannot be read, or is not a JSON object.
    """
    try:
        text = read_bounded(path, most)
    except TooLargeError as error:
        raise ModelError(f"{path}: the file is larger than {most >> 20} MB, which no valid file is") from error
    except OSError as error:
        raise unreadable_error(path, error) from error
    refuse_foreign(path, text[:100])
    if text.count(b"{") + text.count(b"[") > MAX_CONTAINERS:
        raise ModelError(f"{path}: more than {MAX_CONTAINERS:,} objects and lists, which no valid file has")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})", "download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def refuse_foreign(path: str, beginning: bytes) -> None:
    """Refuse a file whose first bytes contradict its name.

    Raises:
        ModelError: The file is a Git LFS pointer, a pickle, a web page or similar.
    """
    if beginning.startswith(_LFS_POINTER):
        folder = os.path.dirname(path) or "."
        raise ModelError(
            f"{path}: a Git LFS pointer, not the file itself", f"run `git lfs pull` in {folder}, or download the file"
        )
    for start, kind in _BEGINNINGS:
        if beginning.startswith(start):
            raise ModelError(f"{path}: this is {kind}", "download the file again, or name another")


def check_tensor_name(name: str, path: str) -> None:
    """Refuse the name of a tensor that is too long for messages and searches.

    Raises:
        ModelError: The name is too long.
    """
    if len(name) > LONGEST_NAME:
        raise ModelError(f"{path}: the name of a tensor has {len(name):,} characters: {short_repr(name)}")


def unreadable_error(path: str, error: OSError) -> ModelError:
    """Return the error for a file of a checkpoint that cannot be opened or read."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return ModelError(f"{path}: a link to a file that does not exist", "download the model again")
    return ModelError(f"{path}: {error.strerror or error}", "name the directory of a checkpoint")


def short_repr(value: object) -> str:
    """Return a value of a file for a message, with limited length."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python converts
        return "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
