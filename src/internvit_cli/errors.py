"""Errors that end a run: each has one line that says what, one that says what to do, and an exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell sees; fixed for ever, and listed in the README."""

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
RESTORE_OR_OVERWRITE = f"{RESTORE}, or start anew with --overwrite"


class InternvitError(Exception):
    """A run cannot start or go on. `message` names the thing, `hint` the way out."""

    exit_code = ExitCode.CANNOT_RUN

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(InternvitError):
    """Options that contradict each other or name nothing that exists."""

    exit_code = ExitCode.USAGE


class ModelError(InternvitError):
    """A checkpoint that cannot be had, read or trusted."""


class DeviceError(InternvitError):
    """A device that was asked for and is not there, or that ran out of memory."""


class OutputError(InternvitError):
    """An output that cannot be written, or a file that is not a sound feature file."""


class ClosedError(InternvitError, ValueError):
    """Something that was closed is used; a ValueError too, as for files."""


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
"""The kernel's own "not supported", which some network filesystems let out; `errno` has no name for it."""
KERNEL_WORDS = {
    ENOTSUPP: "Operation not supported (ENOTSUPP)",
    526: "The file server failed (ESERVERFAULT)",
    528: "The file server is busy (EJUKEBOX)",
}
"""For what gets out of the kernel with network filesystems, the C library has only "Unknown error"."""


def system_words(error: OSError) -> str:
    """What the system says of a failure, without a path."""
    return KERNEL_WORDS.get(error.errno or 0) or error.strerror or one_line(str(error)) or "no message"


def one_line(text: str | bytes, limit: int | None = 300) -> str:
    """Text from outside (a path, another library's message) as one bounded line without control characters.

    Args:
        text: bytes are read as UTF-8; what is not UTF-8 is shown as escapes.
        limit: characters kept before escaping; None for all.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    kept = text if limit is None or len(text) <= limit else text[:limit] + "..."
    if kept.isprintable():
        return kept
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in kept)
