"""Find the shards at a path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.config import Format
from internvit_cli.errors import OutputError
from internvit_cli.storage.format.interface import ShardFormat, backend_of
from internvit_cli.storage.format.layout import SHARD_FILE
from internvit_cli.storage.output import MANIFEST, ManifestEntry, Output, load_shard, names_in, read_manifest
from internvit_cli.storage.output_names import PARTIAL, missing

if TYPE_CHECKING:
    from internvit_cli.storage.output import FinishedShard


class ShardPlace(NamedTuple):
    """The place of a shard, its format, and its entry in the manifest."""

    path: str
    backend: ShardFormat
    entry: ManifestEntry | None = None
    """None for a single file, which has no manifest, and for an unfinished shard."""

    @property
    def is_unfinished(self) -> bool:
        """Whether the shard is still being filled."""
        return self.path.endswith(PARTIAL)

    def load(self) -> FinishedShard:
        """Load the shard with its index, checked against its digest.

        Raises:
            OutputError: There is no shard, or it is damaged.
        """
        entry = self.entry
        return load_shard(
            entry.name if entry else "", self.path, self.backend, superseded=entry.superseded if entry else ()
        )


def find_places(path: str) -> list[ShardPlace]:
    """Return the finished shards at a path, or the unfinished one if none is finished, without reading them.

    Raises:
        OutputError: There are none.
    """
    if not os.path.exists(path):
        raise missing(path)
    if path.endswith(PARTIAL) and SHARD_FILE.fullmatch(os.path.basename(path)):
        return [_place_of_unfinished(path)]
    output = Output(path.removesuffix(PARTIAL))
    if output.is_file:
        return [ShardPlace(path, output.backend)]
    if not os.path.isdir(path):
        raise OutputError(
            f"{path} is not a feature file",
            "feature files end in .h5 or .hdf5; feature folders are opened by their folder",
        )
    places = places_in(Output(path).path) or _unfinished_in(path)
    if not places:
        raise OutputError(
            f"{path} has no finished shard ({MANIFEST} names none)",
            "is it a feature folder, and has its run finished?",
        )
    return places


def find_all_places(path: str) -> list[ShardPlace]:
    """Return the shards at a path, finished ones first, then the unfinished one.

    Raises:
        OutputError: There are none.
    """
    output, partial = Output(path.removesuffix(PARTIAL)), path + PARTIAL
    unfinished = []
    if os.path.isdir(path):
        unfinished = _unfinished_in(path)
    elif output.is_file and os.path.exists(partial):
        unfinished = [ShardPlace(partial, output.backend)]
        if not os.path.exists(path):
            return unfinished
    places = find_places(path)
    return places + [place for place in unfinished if place not in places]


def _unfinished_in(folder: str) -> list[ShardPlace]:
    """Return the unfinished first shard of a folder; empty if there is none."""
    paths = [os.path.join(folder, name) for name in sorted(names_in(folder)) if SHARD_FILE.fullmatch(name)]
    return [_place_of_unfinished(path) for path in paths if path.endswith(PARTIAL)][:1]


def _place_of_unfinished(path: str) -> ShardPlace:
    return ShardPlace(path, backend_of(Format.H5 if path.endswith(f".h5{PARTIAL}") else Format.NPY))


def places_in(folder: str) -> list[ShardPlace]:
    """Return the shards in a folder's manifest, oldest first.

    Raises:
        OutputError: The manifest is damaged.
    """
    entries = read_manifest(os.path.join(folder, MANIFEST))
    backends = [backend_of(entry.format) for entry in entries]
    return [
        ShardPlace(os.path.join(folder, entry.name) + backend.SUFFIX, backend, entry)
        for entry, backend in zip(entries, backends, strict=True)
    ]
