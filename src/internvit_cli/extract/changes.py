"""Compare what an output already holds with what the sources hold now."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Status
from internvit_cli.errors import InternvitError, OtherRecipeError, UsageError, one_line
from internvit_cli.plan.table import modified_ns
from internvit_cli.runtime.words import counted_of
from internvit_cli.sources.members import exists, open_place, status_of
from internvit_cli.storage.format.layout import SOURCES_BYTES, recorded_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from internvit_cli.sources.interface import Listing, Source
    from internvit_cli.storage.output import FinishedShard
    from internvit_cli.storage.skipped import SkipLog

HASH_BLOCK = 1 << 20
TOLD_EVERY = 256
"""Images between two reports of progress, because most images take less time than a report."""
WORTH_RETRYING = frozenset({Status.UNREADABLE, Status.UNSUPPORTED})
"""Reasons that depend on a disk or on a version of Pillow rather than on a picture."""
LIMITED = frozenset({Status.TOO_LARGE, Status.TIMEOUT, Status.WORKER_DIED})
"""Reasons that depend on a limit of the run; lists of earlier versions do not say on which."""
ROW_BITS = 40
"""Bits of a row's index in a shard."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The entries of a listing that are new or changed, as indices into the listing."""

    new: list[int]
    changed: list[int]
    """Changed entries, including skipped ones that are tried again."""
    unlisted: list[bytes]
    """The keys of rows whose picture is not in the listing."""
    damaged: int = 0
    """The number of changed entries whose status cannot be what was committed."""
    skipped_before: int = 0
    """The number of unchanged entries that an earlier run skipped."""
    worth_retrying: int = 0
    """The number of those that another try may well be able to read."""

    @property
    def entries(self) -> list[int]:
        """All entries that have to be planned, in the order of the listing."""
        return sorted(self.new + self.changed)


@dataclass(frozen=True, slots=True)
class Relocation:
    """A folder that moved (`--relocate OLD=NEW`), as absolute paths."""

    old: bytes
    new: bytes

    def apply(self, source: Source) -> Source:
        """Return a source at its current place."""
        if source.root == self.old:
            return replace(source, root=self.new)
        below = self.old.rstrip(b"/") + b"/"
        if not source.root.startswith(below):
            return source
        return replace(source, root=self.new.rstrip(b"/") + b"/" + source.root.removeprefix(below))


class StoredImages:
    """The rows of an output by key; the row of the latest shard counts."""

    def __init__(self, shards: Sequence[FinishedShard], relocations: Sequence[Relocation] = ()) -> None:
        self.shards = shards
        self._sources = [stored_sources(shard.stored.attributes, shard.path, relocations) for shard in shards]
        self._known_digests: dict[int, Any] = {}
        self._places: dict[bytes, int] = {}
        """Shard index and row by key, as one integer, because a million small tuples would take much memory."""
        for number, shard in enumerate(shards):
            keys = shard.stored.table.keys
            for row in shard.live_rows.tolist():
                self._places[keys[row]] = number << ROW_BITS | row

    def __len__(self) -> int:
        return len(self._places)

    def status(self, key: bytes) -> Status | None:
        """Return the status of an image; None if the output has no row for it."""
        place = self._place(key)
        return None if place is None else Status(int(self._table(place).status[place[1]]))

    def by_shard(self, keys: Iterable[bytes]) -> dict[str, list[str]]:
        """Return the given keys that have rows, by the name of their shard."""
        found: dict[str, list[str]] = {}
        for key in keys:
            place = self._places.get(key)
            if place is not None:
                found.setdefault(self.shards[place >> ROW_BITS].name, []).append(os.fsdecode(key))
        return found

    def source(self, key: bytes) -> Source:
        """Return the source of a key's row."""
        number, row = divmod(self._places[key], 1 << ROW_BITS)
        return self._sources[number][int(self._table((number, row)).source[row])]

    def path(self, key: bytes) -> bytes:
        """Return the path of the file of a key's row."""
        return self.source(key).path(key)

    def compare(
        self,
        listing: Listing,
        skip_log: SkipLog,
        *,
        retry_skipped: bool = False,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> Changes:
        """Find what is new or changed in a listing, reading only files whose size or time differs.

        Args:
            listing: What the sources hold.
            skip_log: The list of skipped images; those that a raised limit admits count as changed.
            retry_skipped: Whether all skipped images count as changed.
            on_progress: Called with the number of images compared.

        Raises:
            OtherRecipeError: A key comes from another root than its row.
        """
        new, changed, listed, damaged, skipped_before, worth_retrying = [], [], set(), 0, 0, 0
        for entry, key in enumerate(listing.keys):
            if entry % TOLD_EVERY == 0:
                on_progress(entry)
            place = self._place(key)
            if place is None:
                new.append(entry)
                continue
            listed.add(key)
            self._check_root(listing, entry, place)
            status = Status(int(self._table(place).status[place[1]]))
            is_skipped = status not in (Status.DONE, Status.PENDING)
            is_retried = is_skipped and (retry_skipped or skip_log.is_admitted(key))
            if self._is_contradictory(place, key in skip_log, bool(skip_log)):
                damaged += 1
                changed.append(entry)
            elif is_retried or not self._is_unchanged(listing, entry, place):
                changed.append(entry)
            else:
                skipped_before += is_skipped
                worth_retrying += status in WORTH_RETRYING or (status in LIMITED and not skip_log.is_limited(key))
        unlisted = [key for key in self._places if key not in listed]
        return Changes(new, changed, unlisted, damaged, skipped_before, worth_retrying)

    def _place(self, key: bytes) -> tuple[int, int] | None:
        """Return the index of the shard that holds a key's row, and the row; None if there is none."""
        place = self._places.get(key)
        return None if place is None else divmod(place, 1 << ROW_BITS)

    def _is_contradictory(self, place: tuple[int, int], is_listed: bool, is_any_listed: bool) -> bool:
        """Return whether a status cannot be what was committed, given the list of skipped images, if there is one."""
        number, row = place
        if self.shards[number].is_partial:
            return False
        status = int(self._table(place).status[row])
        if status == Status.DONE:
            return is_listed and not self._digests(number)[row].any()
        return status == Status.PENDING or (is_any_listed and not is_listed)

    def _table(self, place: tuple[int, int]) -> Any:
        return self.shards[place[0]].stored.table

    def _check_root(self, listing: Listing, entry: int, place: tuple[int, int]) -> None:
        number, row = place
        then = self._sources[number][int(self._table(place).source[row])]
        now = listing.sources[listing.source_index[entry]]
        if then == now or then.path(listing.keys[entry]) == listing.path(entry):
            return
        raise OtherRecipeError(
            f"{os.fsdecode(listing.keys[entry])!r} came from {os.fsdecode(then.root)!r} before "
            f"and comes from {os.fsdecode(now.root)!r} now",
            f"if the tree moved, add --relocate {one_line(os.fsdecode(then.root))}={one_line(os.fsdecode(now.root))}; "
            "else choose another output, or give the sources names of their own: NAME=DIR",
        )

    def _is_unchanged(self, listing: Listing, entry: int, place: tuple[int, int]) -> bool:
        row, table = place[1], self._table(place)
        if entry in listing.skipped:
            return int(table.status[row]) == listing.skipped[entry].status
        path = listing.path(entry)
        try:
            now = status_of(path)
        except OSError:
            return True  # the row is kept; opening the file reports the problem
        # Pictures on a disk that was temporarily missing must not stay skipped for ever.
        if table.status[row] == Status.VANISHED or now.st_size != int(table.file_size[row]):
            return False
        if modified_ns(now) == int(table.file_mtime_ns[row]):
            return True
        return bool(table.status[row] == Status.DONE) and self._has_same_bytes(path, place)

    def _has_same_bytes(self, path: bytes, place: tuple[int, int]) -> bool:
        """Return whether a file has the bytes of its row, so that a copied folder costs reads, but no encoding."""
        number, row = place
        try:
            digest = _file_digest(path)
        except OSError:
            return False  # planning it again gives the reason
        return bool(digest == self._digests(number)[row].tobytes())

    def _digests(self, number: int) -> Any:
        if number not in self._known_digests:
            shard = self.shards[number]
            self._known_digests[number] = shard.backend.commit_records(shard.path)[0]
        return self._known_digests[number]


def prunable(stored: StoredImages, changes: Changes, listing: Listing, *, confirmed: bool) -> list[bytes]:
    """Return the keys of rows whose pictures were deleted from the sources of a listing, or are excluded now.

    Raises:
        InternvitError: A disk seems not to be mounted, rather than pictures deleted.
    """
    if listing.unreadable_folders:
        folder = os.fsdecode(listing.unreadable_folders[0].path)
        raise InternvitError(
            f"--prune: {one_line(folder)} cannot be read, so its pictures may still be there",
            "make it readable, or run without --prune",
        )
    empty = set(range(len(listing.sources))) - set(listing.source_index)
    if empty:
        root = os.fsdecode(listing.sources[min(empty)].root)
        raise InternvitError(f"--prune: {one_line(root)} holds no pictures at all", "is its disk mounted?")
    dropped = [
        key for key in changes.unlisted if stored.source(key) in listing.sources and _is_out(stored.path(key), listing)
    ]
    if 2 * len(dropped) > len(stored) and not confirmed:
        raise InternvitError(
            f"--prune would drop {counted_of(len(dropped), len(stored), 'row')}",
            "add --yes if that many pictures were deleted or excluded",
        )
    return dropped


def _is_out(path: bytes, listing: Listing) -> bool:
    """Return whether a picture that is not in a listing was deleted, or is excluded by its patterns."""
    return not exists(path) or listing.excludes(path)


def stored_sources(attributes: dict[str, Any], path: str, relocations: Sequence[Relocation] = ()) -> list[Source]:
    """Return the sources of a shard from its attributes, at their current places.

    Raises:
        OutputError: The attributes are damaged.
    """
    sources = recorded_sources(attributes, path)
    for relocation in relocations:
        sources = [relocation.apply(source) for source in sources]
    return sources


def sources_to_json(sources: Sequence[Source]) -> str:
    """Return sources as the JSON text that a shard stores.

    Raises:
        UsageError: There are more sources than a shard can name.
    """
    text = json.dumps([_source_facts(source) for source in sources])
    if len(text) > SOURCES_BYTES:
        raise UsageError(
            f"the pictures come from {len(sources):,} folders, each a source of its own: more than an output can name",
            "give them a common --root, or name a folder above them",
        )
    return text


def _source_facts(source: Source) -> dict[str, Any]:
    facts: dict[str, Any] = {"root": os.fsdecode(source.root), "name": os.fsdecode(source.name)}
    return facts | {"archive": True} if source.is_archive else facts


def _file_digest(path: bytes) -> bytes:
    hasher = hashlib.sha256()
    opened = open_place(path)
    with os.fdopen(opened.descriptor, "rb", buffering=0):
        stream = opened.stream()
        while block := stream.read(HASH_BLOCK):
            hasher.update(block)
    return hasher.digest()
