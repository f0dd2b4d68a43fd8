"""Name a file after a key so that the name gives the key back, for folders with one file per image.

Bytes other than ASCII letters, digits, spaces and `_.-~,=+@()` are written as `%XX`, as in URLs, and so is a dot at the
beginning, which would hide the file: `urllib.parse.unquote_to_bytes` gives the key. A key whose name would be too long
for a filesystem is named by its SHA-256 after `%%`, which no other name begins with; the index has that key.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote_from_bytes, unquote_to_bytes

KEPT = " ~,=+@()"
"""Characters that are kept in addition to letters, digits and `_.-`."""
MOST_BYTES = 255
"""The longest name that filesystems allow, in bytes."""
HASHED = "%%"
"""The beginning of a name that holds the hash of a key."""


def file_name(key: bytes, suffix: str) -> str:
    """Return the name of the file for a key.

    Args:
        key: The key, not empty.
        suffix: The end of the name with its dot, such as `.npy`.

    >>> file_name(b"holiday/beach 1.jpg", ".npy")
    'holiday%2Fbeach 1.jpg.npy'
    """
    name = quote_from_bytes(key, safe=KEPT)
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) + len(suffix) > MOST_BYTES:
        name = HASHED + hashlib.sha256(key).hexdigest()
    return name + suffix


def key_of(name: str, suffix: str) -> bytes | None:
    """Return the key that a file is named after; None for the name of a long key, which only the index has.

    >>> key_of("holiday%2Fbeach 1.jpg.npy", ".npy")
    b'holiday/beach 1.jpg'
    """
    stem = name.removesuffix(suffix)
    return None if stem.startswith(HASHED) else unquote_to_bytes(stem)
