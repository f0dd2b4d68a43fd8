"""Read and write the list of images that could not be used, one JSON line each, beside the features."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Limits
from internvit_cli.errors import OutputError
from internvit_cli.runtime.untrusted import lines_of, opened, parse_json
from internvit_cli.storage.durable import append, disk_errors, remove, sync_path, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from internvit_cli.config import Skipped

_LIMITS = tuple(asdict(Limits()))


class SkipLog:
    """`feats.h5.skipped.jsonl`: key, reason, exception, message and attempt of every skipped image.

    An image that exceeded a limit of its run also has that limit and the value above which it is tried again.
    """

    def __init__(self, path: str, limits: Limits | None = None) -> None:
        """Read the list.

        Args:
            path: The path of the list, which need not exist.
            limits: The limits of this run; None for the defaults.
        """
        self.path = path
        self._limits = limits or Limits()
        entries = read_skip_log(path)
        self._attempts = {entry["key"]: _attempt(entry) for entry in entries}
        self._exceeded = {entry["key"]: _exceeded(entry) for entry in entries}

    def __contains__(self, key: bytes) -> bool:
        """Return whether an image is listed."""
        return os.fsdecode(key) in self._attempts

    def __bool__(self) -> bool:
        """Return whether any image is listed."""
        return bool(self._attempts)

    def is_limited(self, key: bytes) -> bool:
        """Return whether the list says which limit an image exceeded."""
        return self._exceeded.get(os.fsdecode(key)) is not None

    def exceeded_limits(self, is_skipped: Callable[[str], bool]) -> dict[str, tuple[int, float]]:
        """Return, by limit, how many images exceeded it, and the value that it must be above to admit all of them."""
        found: dict[str, tuple[int, float]] = {}
        for key, exceeded in self._exceeded.items():
            if exceeded is not None and is_skipped(key):
                count, above = found.get(exceeded[0], (0, 0.0))
                found[exceeded[0]] = count + 1, max(above, exceeded[1])
        return found

    def is_admitted(self, key: bytes) -> bool:
        """Return whether an image exceeded a limit that is now high enough to try it again."""
        exceeded = self._exceeded.get(os.fsdecode(key))
        return exceeded is not None and bool(getattr(self._limits, exceeded[0]) > exceeded[1])

    def append(self, skips: Iterable[tuple[bytes, Skipped]]) -> None:
        """Add lines and sync them, so that every skipped status has its reason."""
        lines = [self._line(key, skipped) for key, skipped in skips]
        if not lines:
            return
        existed = os.path.exists(self.path)
        with disk_errors(self.path), append(self.path) as file:
            # A line that was truncated by a crash must not be joined with the next one.
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.write(b"\n")
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if not existed:
            sync_path(os.path.dirname(os.path.abspath(self.path)))

    def rewrite(self, is_skipped: Callable[[str], bool]) -> None:
        """Keep the last line of each image that is still skipped; remove the file if there are none."""
        entries = {entry["key"]: entry for entry in read_skip_log(self.path) if is_skipped(entry["key"])}
        if entries:
            write_file(self.path, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries.values()))
        else:
            remove(self.path)

    def drop_others(self, is_skipped: Callable[[str], bool]) -> None:
        """Rewrite the list if it names an image that is no longer skipped; otherwise leave it untouched."""
        if not all(map(is_skipped, self._attempts)):
            self.rewrite(is_skipped)

    def _line(self, key: bytes, skipped: Skipped) -> bytes:
        name = os.fsdecode(key)
        self._attempts[name] = self._attempts.get(name, 0) + 1
        entry: dict[str, Any] = {
            "key": name,
            "reason": skipped.status.word,
            "exception": skipped.exception,
            "message": skipped.message,
            "attempt": self._attempts[name],
        }
        self._exceeded[name] = exceeded = self._limits.exceeded(skipped)
        if exceeded is not None:
            entry |= {"limit": exceeded[0], "above": exceeded[1]}
        return json.dumps(entry).encode() + b"\n"


def read_skip_log(path: str) -> list[dict[str, Any]]:
    """Return the entries in the order in which they were written, without lines that were truncated by a crash.

    Raises:
        OutputError: The list cannot be read.
    """
    entries: list[dict[str, Any]] = []
    try:
        # A line that is longer than any of ours was not written by a run.
        with opened(path, follow_links=False) as file, contextlib.suppress(ValueError):
            entries.extend(entry for line in lines_of(file) if (entry := _entry(line)) is not None)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"cannot read {path}: {error.strerror}", "check what kind of file it is, or move it away"
        ) from error
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line; return None if it is not an entry, for example if its key cannot be a file name."""
    try:
        entry = parse_json(line)
        os.fsencode(entry["key"])
    except (ValueError, TypeError, KeyError):
        return None
    return entry if isinstance(entry, dict) else None


def _attempt(entry: dict[str, Any]) -> int:
    """Return the attempt; nothing depends on this number, which a person may have edited."""
    attempt = entry.get("attempt")
    return attempt if isinstance(attempt, int) else 1


def _exceeded(entry: dict[str, Any]) -> tuple[str, float] | None:
    """Return the limit that an entry names and the value it must be above; None if they are missing or invalid."""
    limit, above = entry.get("limit"), entry.get("above")
    if limit not in _LIMITS or not isinstance(above, (int, float)) or isinstance(above, bool):
        return None
    return (limit, above) if -math.inf < above < math.inf else None
