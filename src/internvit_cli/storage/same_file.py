"""Open a file of a shard only while it is still the file that an index was read from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from internvit_cli.errors import OutputError
from internvit_cli.runtime.untrusted import NotRegularError, open_regular
from internvit_cli.storage.output_names import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Mapping


class ReplacedError(OutputError):
    """Another file has taken the name, and the index does not describe its rows."""

    def __init__(self, path: str) -> None:
        """Name the file."""
        super().__init__(f"{path} was replaced after its index was read", "open the features again")


def file_identity(path: str, status: os.stat_result) -> tuple[int, ...]:
    """Return what distinguishes a file from one that takes its name later: inode, size, and the time of its last write.

    The time is needed because a filesystem may reuse the inode for a file of the same size. The time of a file that is
    still being filled is left out, because it changes with every write.
    """
    is_filled = PARTIAL in (os.path.splitext(path)[1], os.path.splitext(os.path.dirname(path))[1])
    return (status.st_ino, status.st_size) if is_filled else (status.st_ino, status.st_size, status.st_mtime_ns)


def open_same(path: str, identities: Mapping[str, tuple[int, ...]]) -> int:
    """Open a file for reading and return its descriptor.

    Args:
        path: The file.
        identities: The `file_identity` of each path when the index was read; a path without one may be any file.

    Raises:
        ReplacedError: It is another file now.
        OSError: It cannot be opened.
    """
    try:
        descriptor, status = open_regular(path)
    except (FileNotFoundError, NotRegularError):
        raise ReplacedError(path) from None
    if identities.get(path) not in (None, file_identity(path, status)):
        os.close(descriptor)
        raise ReplacedError(path)
    return descriptor
