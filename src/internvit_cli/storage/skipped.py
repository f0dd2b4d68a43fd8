"""The list of images that could not be used, one JSON line each, beside the features."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import OutputError
from internvit_cli.storage.durable import append, disk_errors, remove, sync_path, write_file
from internvit_cli.untrusted import lines_of, opened, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from internvit_cli.config import Skipped


class SkipLog:
    """`feats.h5.skipped.jsonl`: key, reason, exception, message and attempt of every skipped image."""

    def __init__(self, path: str) -> None:
        self.path = path
        entries = read_skip_log(path)
        self._attempts = {entry["key"]: _attempt(entry) for entry in entries}

    def __contains__(self, key: bytes) -> bool:
        """Whether an image is listed."""
        return os.fsdecode(key) in self._attempts

    def __bool__(self) -> bool:
        """Whether any is."""
        return bool(self._attempts)

    def append(self, skips: Iterable[tuple[bytes, Skipped]]) -> None:
        """Add lines and sync them: a status that says skipped always has its reason."""
        lines = [self._line(key, skipped) for key, skipped in skips]
        if not lines:
            return
        existed = os.path.exists(self.path)
        with disk_errors(self.path), append(self.path) as file:
            # A line that a crash cut short must not swallow the next one.
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.write(b"\n")
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if not existed:
            sync_path(os.path.dirname(os.path.abspath(self.path)))

    def rewrite(self, is_skipped: Callable[[str], bool]) -> None:
        """Keep the last line of each image that still is skipped; without any the file goes."""
        entries = {entry["key"]: entry for entry in read_skip_log(self.path) if is_skipped(entry["key"])}
        if entries:
            write_file(self.path, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries.values()))
        else:
            remove(self.path)

    def drop_others(self, is_skipped: Callable[[str], bool]) -> None:
        """Rewrite the list where it names an image that is not skipped any more; otherwise it is not touched."""
        if not all(map(is_skipped, self._attempts)):
            self.rewrite(is_skipped)

    def _line(self, key: bytes, skipped: Skipped) -> bytes:
        name = os.fsdecode(key)
        self._attempts[name] = self._attempts.get(name, 0) + 1
        entry = {
            "key": name,
            "reason": skipped.status.word,
            "exception": skipped.exception,
            "message": skipped.message,
            "attempt": self._attempts[name],
        }
        return json.dumps(entry).encode() + b"\n"


def read_skip_log(path: str) -> list[dict[str, Any]]:
    """The entries in the order in which they were written; a line that a crash cut short is left out.

    Raises:
        OutputError: the list cannot be read.
    """
    entries: list[dict[str, Any]] = []
    try:
        # What follows on a line that is longer than any of ours was not written by a run.
        with opened(path, follow_links=False) as file, contextlib.suppress(ValueError):
            entries.extend(entry for line in lines_of(file) if (entry := _entry(line)) is not None)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}", "check what it is, or move it away") from error
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """One line's entry; None for what is none, such as a key that no file can have."""
    try:
        entry = parse_json(line)
        os.fsencode(entry["key"])
    except (ValueError, TypeError, KeyError):
        return None
    return entry if isinstance(entry, dict) else None


def _attempt(entry: dict[str, Any]) -> int:
    """A number that people may have edited; it decides nothing."""
    attempt = entry.get("attempt")
    return attempt if isinstance(attempt, int) else 1
