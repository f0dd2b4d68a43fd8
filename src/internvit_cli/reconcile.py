"""What an output holds already, held against what the sources hold now."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Status
from internvit_cli.errors import OtherRecipeError, OutputError
from internvit_cli.sources.interface import Listing, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.storage.output import FinishedShard

HASH_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Changes:
    """Entries of a listing that are not in the output as they are now, by index into the listing."""

    new: list[int]
    changed: list[int]
    kept: int
    """Rows of the output whose picture is not in the listing."""

    @property
    def entries(self) -> list[int]:
        """All that has to be planned, in the listing's order."""
        return sorted(self.new + self.changed)


class StoredImages:
    """The rows of an output by key; a later shard's row replaces an earlier one's."""

    def __init__(self, shards: Sequence[FinishedShard]) -> None:
        self._shards = shards
        self._sources = [stored_sources(shard.stored.attributes, shard.path) for shard in shards]
        self._known_digests: dict[int, Any] = {}
        self._rows: dict[bytes, tuple[int, int]] = {}
        for number, shard in enumerate(shards):
            for row, key in enumerate(shard.stored.table.keys):
                self._rows[key] = number, row

    def __len__(self) -> int:
        return len(self._rows)

    def status(self, key: bytes) -> Status | None:
        """The status of an image; None when the output has no row for it."""
        place = self._rows.get(key)
        return None if place is None else Status(int(self._table(place).status[place[1]]))

    def shard_name(self, key: bytes) -> str:
        """The shard that holds a key's row."""
        return self._shards[self._rows[key][0]].name

    def compare(self, listing: Listing) -> Changes:
        """What is new or changed in a listing. Only files whose size or time differ are read.

        Raises:
            OtherRecipeError: a key that comes from another root than its row.
        """
        new, changed, known = [], [], 0
        for entry, key in enumerate(listing.keys):
            place = self._rows.get(key)
            if place is None:
                new.append(entry)
                continue
            known += 1
            self._check_root(listing, entry, place)
            if not self._is_unchanged(listing, entry, place):
                changed.append(entry)
        return Changes(new, changed, len(self._rows) - known)

    def _table(self, place: tuple[int, int]) -> Any:
        return self._shards[place[0]].stored.table

    def _check_root(self, listing: Listing, entry: int, place: tuple[int, int]) -> None:
        number, row = place
        then = self._sources[number][int(self._table(place).source[row])]
        now = listing.sources[listing.source_index[entry]]
        if then == now or then.path(listing.keys[entry]) == listing.path(entry):
            return
        raise OtherRecipeError(
            f"{os.fsdecode(listing.keys[entry])!r} came from {os.fsdecode(then.root)!r} before "
            f"and comes from {os.fsdecode(now.root)!r} now",
            "choose another output, or give the sources names of their own: NAME=DIR",
        )

    def _is_unchanged(self, listing: Listing, entry: int, place: tuple[int, int]) -> bool:
        number, row = place
        table = self._table(place)
        if entry in listing.skipped:
            return int(table.status[row]) == listing.skipped[entry].status
        path = listing.path(entry)
        try:
            now = os.stat(path)
        except OSError:
            return True  # its row stays what it is: whoever opens the file finds out
        if (now.st_size, now.st_mtime_ns) == (int(table.file_size[row]), int(table.file_mtime_ns[row])):
            return True
        if table.status[row] != Status.DONE:
            return False
        # A new time with the same bytes is no change: a copied or touched tree costs a read, not an encoding.
        return now.st_size == int(table.file_size[row]) and _file_digest(path) == self._digests(number)[row].tobytes()

    def _digests(self, number: int) -> Any:
        if number not in self._known_digests:
            shard = self._shards[number]
            self._known_digests[number] = shard.backend.commit_records(shard.path)[0]
        return self._known_digests[number]


def stored_sources(attributes: dict[str, Any], path: str) -> list[Source]:
    """The sources of a shard, from its attributes.

    Raises:
        OutputError: they are damaged.
    """
    try:
        entries = json.loads(attributes["sources"])
        return [Source(root=os.fsencode(entry["root"]), name=os.fsencode(entry["name"])) for entry in entries]
    except (KeyError, ValueError, TypeError) as error:
        raise OutputError(f"the sources of {path} are damaged", "restore it, or start anew with --overwrite") from error


def sources_to_json(sources: Sequence[Source]) -> str:
    """Sources as a shard stores them."""
    return json.dumps([{"root": os.fsdecode(source.root), "name": os.fsdecode(source.name)} for source in sources])


def _file_digest(path: bytes) -> bytes:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            hasher.update(block)
    return hasher.digest()
