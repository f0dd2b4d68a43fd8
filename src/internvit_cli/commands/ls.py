"""List the images of an output with their statuses, shard by shard, for `internvit ls`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Status
from internvit_cli.options import named_path
from internvit_cli.storage.read.places import find_all_places
from internvit_cli.storage.read.wanted_keys import is_pattern, key_pattern, no_match, unknown_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from internvit_cli.storage.output import FinishedShard
    from internvit_cli.storage.read.places import ShardPlace


class ListedImage(NamedTuple):
    """An image of an output."""

    key: bytes
    status: Status
    columns: int
    """The columns of its grid; 0 if the header could not be read."""
    rows: int
    tiles: int
    """The number of tiles, including the thumbnail."""

    def to_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        return self._asdict() | {"key": os.fsdecode(self.key), "status": self.status.word}


@dataclass(frozen=True, slots=True)
class ListOptions:
    """Which images of an output to list."""

    path: str
    words: Sequence[str] = ()
    """Keys and patterns; empty for all images."""
    statuses: frozenset[Status] = frozenset(Status)


class ImageListing:
    """The matching images of an output in the order in which they are stored, with one shard in memory at a time."""

    def __init__(self, options: ListOptions) -> None:
        """Find the shards.

        Raises:
            OutputError: There are none.
        """
        self._path = named_path(options.path)
        self._statuses = np.array(sorted(options.statuses), np.uint8)
        self._words = list(dict.fromkeys(options.words))
        self._places = find_all_places(self._path)
        self._loaded: tuple[ShardPlace, FinishedShard] | None = None
        self._unmatched = set(self._words)

    def __iter__(self) -> Iterator[ListedImage]:
        """List the images.

        Raises:
            OutputError: A shard is damaged.
            UnknownKeyError: A word matches no image; all other images were listed before.
        """
        wanted = self._wanted()
        finished = [place for place in self._places if not place.is_unfinished]
        unfinished = [place.load() for place in self._places if place.is_unfinished]
        if finished and unfinished:  # a run with --overwrite may be filling one with another recipe
            recipe = _recipe_of(self._load(finished[-1]))
            unfinished = [shard for shard in unfinished if _recipe_of(shard) == recipe]
        filling = {key for shard in unfinished for key in shard.stored.table.keys} if finished else set()
        for place in finished:
            shard = self._load(place)
            superseded = shard.superseded_keys
            yield from self._fitting(shard, superseded, wanted)
            filling -= set(shard.stored.table.keys) - superseded
        for shard in unfinished:  # readers use the finished row of a key
            keys = shard.stored.table.keys
            yield from self._fitting(shard, set(keys) - filling if finished else set(), wanted)
        if self._unmatched:
            word = next(word for word in self._words if word in self._unmatched)
            all_keys = [key for place in self._places for key in self._load(place).stored.table.keys]
            raise (no_match if is_pattern(word) else unknown_key)(word, all_keys, self._path)

    def _load(self, place: ShardPlace) -> FinishedShard:
        if self._loaded is None or self._loaded[0] is not place:
            self._loaded = (place, place.load())
        return self._loaded[1]

    def _wanted(self) -> _Wanted:
        """Return the words, separated into keys and patterns."""
        keys = {os.fsencode(word): word for word in self._words}
        patterns = {key for key, word in keys.items() if is_pattern(word)}
        for place in self._places if patterns else ():
            patterns = patterns.difference(self._load(place).stored.table.keys)
        return _Wanted(
            {key: word for key, word in keys.items() if key not in patterns},
            [(keys[key], key_pattern(keys[key]).fullmatch) for key in sorted(patterns)],
        )

    def _fitting(self, shard: FinishedShard, hidden: Collection[bytes], wanted: _Wanted) -> Iterator[ListedImage]:
        table = shard.stored.table
        has_status = np.isin(table.status, self._statuses)
        tiles = table.tile_counts
        # A word counts as known if it matches any image, whatever its status.
        for row in range(len(table)) if self._words else np.flatnonzero(has_status).tolist():
            key = table.keys[row]
            if key in hidden or not (self._is_wanted(key, wanted) and has_status[row]):
                continue
            status, columns, rows = (int(part[row]) for part in (table.status, table.columns, table.rows))
            yield ListedImage(key, Status(status), columns, rows, int(tiles[row]))

    def _is_wanted(self, key: bytes, wanted: _Wanted) -> bool:
        """Return whether a word matches a key, and mark the word as known."""
        if not self._words:
            return True
        text = os.fsdecode(key)
        words = [word for word, fits in wanted.patterns if fits(text)]
        words += [wanted.keys[key]] if key in wanted.keys else []
        self._unmatched.difference_update(words)
        return bool(words)


def _recipe_of(shard: FinishedShard) -> object:
    return shard.stored.attributes.get("recipe_digest")


class _Wanted(NamedTuple):
    """The keys and patterns that are wanted."""

    keys: dict[bytes, str]
    patterns: list[tuple[str, Callable[[str], object]]]
