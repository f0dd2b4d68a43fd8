"""Count files of the sources that are not taken, and say how to turn them into pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import NoImagesError
from internvit_cli.runtime.words import counted
from internvit_cli.sources.extensions import NO_EXTENSION, label_of
from internvit_cli.sources.kinds import KINDS, Kind, kind_by_extension

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_COUNTED = 1000
"""Largest number of extensions that are counted separately, so that random names cannot fill the memory."""
MOST_TOLD = 5
MOST_IN_JSON = 1000
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files that were found but not taken; they have no rows, and are not part of the counts of images."""

    extensions: Mapping[str, int] = field(default_factory=dict)
    """Numbers of files without a picture's extension, by the label from `extensions.label_of`."""
    excluded: Mapping[str, int] = field(default_factory=dict)
    """Numbers of excluded files and folders, by the pattern that excludes them."""
    drawn: int = 0
    """Number of pictures that internvit drew itself."""
    sniffed: bool = False
    """Whether the first bytes of the files in `extensions` were checked."""

    @property
    def total(self) -> int:
        """The number of all files; an excluded folder counts as one."""
        return sum(self.extensions.values()) + sum(self.excluded.values()) + self.drawn

    @property
    def lines(self) -> list[str]:
        """Return the lines of a report, beginning with files that a user may want as pictures."""
        told = [
            f"{_listed(counts)} ({kind.plural} are not read: {kind.remedy})"
            for kind, counts in self._by_kind().items()
            if kind is not None and kind.remedy
        ]
        if unknown := self._by_kind().get(None):
            look = "not pictures by their first bytes either" if self.sniffed else "--sniff checks their first bytes"
            told.append(f"{_listed(unknown)} ({look})")
        if side := self._side_files():
            told.append(f"{counted(sum(side.values()), 'side file')} ({_listed(side)})")
        return told + self._refused()

    def no_images(self, message: str) -> NoImagesError:
        """Return the error that no picture was found; it says what was found instead, and what would help."""
        found = ([_listed(self.extensions)] if self.extensions else []) + self._refused()
        return NoImagesError(f"{message}: {', '.join(found)}" if found else message, self._remedy())

    def _refused(self) -> list[str]:
        """Return texts on files with a picture's extension that were left out."""
        told = [f"{counted(self.drawn, 'picture')} that internvit drew itself"] if self.drawn else []
        if self.excluded:
            told.append(f"{sum(self.excluded.values()):,} excluded ({_listed(self.excluded, 'by ')})")
        return told

    def _remedy(self) -> str:
        """Return a hint for the most frequent kind of files left out."""
        kinds = {kind: sum(counts.values()) for kind, counts in self._by_kind().items() if _is_meant(kind)}
        if self.sniffed:
            kinds.pop(None, None)
        if kinds:
            most = max(kinds, key=lambda kind: kinds[kind])
            return f"{most.plural} are not read: {most.remedy}" if most else "--sniff checks the first bytes of files"
        if self.excluded:
            return "check --exclude, --include and --no-default-excludes"
        return "pictures are found by their extension, such as .jpg or .png; --sniff and --files-from also take others"

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON, only the most frequent if there are many."""
        extensions, other_extensions = _most_frequent(self.extensions, MOST_IN_JSON)
        excluded, other_excluded = _most_frequent(self.excluded, MOST_IN_JSON)
        return {
            "total": self.total,
            "extensions": extensions,
            "other_extensions": other_extensions,
            "excluded": excluded,
            "other_excluded": other_excluded,
            "own_pictures": self.drawn,
        }

    def _by_kind(self) -> dict[Kind | None, dict[str, int]]:
        """Return the counts by kind, in the order of `KINDS`; those of unknown extensions are under None."""
        found: dict[Kind | None, dict[str, int]] = {}
        for label, count in self.extensions.items():
            found.setdefault(kind_by_extension(label.removeprefix(".").encode()), {})[label] = count
        return {kind: found[kind] for kind in (*KINDS, None) if kind in found}

    def _side_files(self) -> dict[str, int]:
        return {
            label: count
            for kind, counts in self._by_kind().items()
            if not _is_meant(kind)
            for label, count in counts.items()
        }


class LeftOutCounter:
    """Counts files that are left out while the sources are walked."""

    def __init__(self) -> None:
        self._extensions: Counter[str] = Counter()
        self._excluded: Counter[str] = Counter()

    def unread(self, name: bytes) -> None:
        """Count a file without a picture's extension."""
        label = label_of(name)
        if label not in self._extensions and len(self._extensions) >= MOST_COUNTED:
            label = OTHERS
        self._extensions[label] += 1

    def excluded(self, pattern: str) -> None:
        """Count a file or a folder that a pattern excludes."""
        self._excluded[pattern] += 1

    def result(self, *, sniffed: bool) -> LeftOut:
        """Return the counts."""
        return LeftOut(dict(self._extensions), dict(self._excluded), sniffed=sniffed)


def _is_meant(kind: Kind | None) -> bool:
    """Return whether a user may want files of a kind as pictures, which includes unknown extensions."""
    return kind is None or bool(kind.remedy)


def _listed(counts: Mapping[str, int], preposition: str = "") -> str:
    """Return the most frequent counts in words, such as `3,000 .heic, 2 .heif and 7 others`."""
    kept, others = _most_frequent(counts, MOST_TOLD)
    listed = ", ".join(f"{count:,} {preposition}{_told(label)}" for label, count in kept.items())
    return f"{listed} and {counted(others, 'other')}" if others else listed


def _told(label: str) -> str:
    return "without an extension" if label == NO_EXTENSION else label


def _most_frequent(counts: Mapping[str, int], most: int) -> tuple[dict[str, int], int]:
    """Return the `most` most frequent entries, and the number of files in the other entries."""
    ranked = sorted(counts.items(), key=lambda entry: (entry[0] == OTHERS, -entry[1], entry[0]))
    kept = dict(entry for entry in ranked[:most] if entry[0] != OTHERS)
    return kept, sum(counts.values()) - sum(kept.values())
