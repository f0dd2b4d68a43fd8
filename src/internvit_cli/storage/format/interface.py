"""What a shard format has to offer. Rows are not its business: they go to the byte offsets that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from internvit_cli.config import Format

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.format.layout import Extent, NewShard, Outline, StoredShard


class ShardFormat(Protocol):
    """One way to keep a shard on disk, at a `partial` path before and a `final` one after it is complete."""

    KIND: Format
    SUFFIX: str
    """What a shard's name ends in, such as `.h5`."""
    LOG_BYTES: int
    """What the log of a shard's first starts adds to `planned_bytes`."""

    def build(self, path: str, shard: NewShard) -> None:
        """Write the index and lay out every dataset at full size, rows unwritten and without room on the disk."""
        ...

    def planned_bytes(self, shard: NewShard) -> int:
        """Bytes of the published shard, from its plan alone."""
        ...

    def index_bytes(self, table: ImageTable) -> NDArray[Any]:
        """Bytes that each image of a shard takes at most beside its rows, [n] int64, from the second one on."""
        ...

    def extents(self, path: str) -> dict[str, Extent]:
        """Where the rows of each dataset with elements lie, by dataset name."""
        ...

    def read(self, path: str) -> StoredShard:
        """The index, the statuses and the attributes of a partial or final shard."""
        ...

    def outline(self, path: str) -> Outline:
        """The attributes and statuses of a final shard, or of a partial file, without keys."""
        ...

    def commit_records(self, path: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Digests, uint8 [n, 32], and CRCs, uint32 [n], of a published shard."""
        ...

    def run_log(self, path: str) -> list[dict[str, Any]]:
        """One entry a start that wrote to the shard, oldest first."""
        ...

    def publish(self, partial: str, final: str) -> None:
        """Give a finished shard its final name, durably; repeating it after a crash finishes it."""
        ...

    def final_paths(self, final: str) -> list[str]:
        """The files that make up a published shard."""
        ...


def backend_of(shard_format: Format) -> ShardFormat:
    """The module that implements a format."""
    if shard_format is Format.H5:
        from internvit_cli.storage.format import hdf5

        return hdf5
    from internvit_cli.storage.format import npy

    return npy
