"""What a run tells while it goes on: the core reports here, and only the command line prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the encoding is."""

    images: int = 0
    skipped: int = 0
    tiles: int = 0

    def plus(self, other: Progress) -> Progress:
        """The sum of two."""
        return Progress(self.images + other.images, self.skipped + other.skipped, self.tiles + other.tiles)


class Observer:
    """This one keeps silent."""

    def note(self, text: str) -> None:
        """Something that a user should know, one line."""

    def headers(self, done: int, total: int) -> None:
        """So many headers of files have been read."""

    def encoding(self, images: int, tiles: int) -> None:
        """So much there is to encode, all shards together."""

    def ready(self, encoder: str) -> None:
        """The encoder is loaded, as described; the encoding begins now."""

    def progress(self, progress: Progress) -> None:
        """How far the encoding is, all shards together."""


SILENT = Observer()
