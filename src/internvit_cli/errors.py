"""Define the errors that end a run: each has a message, a hint that says what to do, and an exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command; they never change, and the README lists them."""

    DONE = 0
    CANNOT_RUN = 1
    USAGE = 2
    SKIPPED = 3
    NO_IMAGES = 4
    OTHER_RECIPE = 5
    NO_SPACE = 6
    LOCKED = 75
    SIGHUP = 129
    SIGINT = 130
    SIGUSR1 = 138
    SIGTERM = 143


RESTORE = "restore it from a copy"
"""The hint on what was damaged after it was written."""
RESTORE_OR_OVERWRITE = f"{RESTORE}, or start over with --overwrite"


class InternvitError(Exception):
    """Base of all errors: `message` says what is wrong, and `hint` what to do about it."""

    exit_code = ExitCode.CANNOT_RUN

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(InternvitError):
    """An option is invalid, contradicts another one, or names something that does not exist."""

    exit_code = ExitCode.USAGE


class ModelError(InternvitError):
    """A checkpoint cannot be found, read or trusted."""


class DeviceError(InternvitError):
    """A requested device does not exist or ran out of memory."""


class OutputError(InternvitError):
    """An output cannot be written, or a file is not a valid feature file."""


class ClosedError(InternvitError, ValueError):
    """A closed object is used; also a ValueError, as for files."""


class StoppedError(InternvitError):
    """A signal ended the run before there was anything to commit."""


class NoImagesError(InternvitError):
    """The sources hold no pictures."""

    exit_code = ExitCode.NO_IMAGES


class OtherRecipeError(InternvitError):
    """The output exists and was made with another recipe, or from another root."""

    exit_code = ExitCode.OTHER_RECIPE


class NoSpaceError(InternvitError):
    """The plan does not fit on the output's filesystem."""

    exit_code = ExitCode.NO_SPACE


class LockedError(InternvitError):
    """Another run holds the output."""

    exit_code = ExitCode.LOCKED


ENOTSUPP = 524
"""An error number that some network filesystems return from the kernel; `errno` has no name for it."""
KERNEL_WORDS = {
    ENOTSUPP: "Operation not supported (ENOTSUPP)",
    526: "The file server failed (ESERVERFAULT)",
    528: "The file server is busy (EJUKEBOX)",
}
"""Texts for error numbers of network filesystems, for which the C library has only "Unknown error"."""


def system_words(error: OSError) -> str:
    """Return the system's text for an error, without the path."""
    return KERNEL_WORDS.get(error.errno or 0) or error.strerror or one_line(str(error)) or "no message"


def one_line(text: str | bytes, limit: int | None = 300) -> str:
    """Return a text from outside as one line of limited length without control characters.

    Args:
        text: A path, or a message of another library; bytes that are not UTF-8 are shown as escapes.
        limit: Number of characters kept before escaping; None for all.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    kept = text if limit is None or len(text) <= limit else text[:limit] + "..."
    if kept.isprintable():
        return kept
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in kept)
