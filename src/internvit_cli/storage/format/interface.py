"""Define the interface of a shard format. Rows are written elsewhere, at the byte offsets that the format returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from internvit_cli.config import Format

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.format.layout import Extent, NewShard, Outline, StoredShard


class ShardFormat(Protocol):
    """A way to store a shard on disk, at a `partial` path until it is complete and then at a `final` path."""

    KIND: Format
    SUFFIX: str
    """Suffix of a shard's name, such as `.h5`."""
    LOG_BYTES: int
    """Bytes that the log of a shard's first starts adds to `planned_bytes`."""

    def build(self, path: str, shard: NewShard) -> None:
        """Write the index and lay out every dataset at full size; rows are unwritten and take no disk space."""
        ...

    def planned_bytes(self, shard: NewShard) -> int:
        """Return the bytes of the published shard, computed from its plan."""
        ...

    def index_bytes(self, table: ImageTable) -> NDArray[Any]:
        """Return upper bounds of the bytes of each image, without its rows, from the second image on, [n] int64."""
        ...

    def extents(self, path: str) -> dict[str, Extent]:
        """Return the places of the rows of each dataset that has elements, by name."""
        ...

    def read(self, path: str) -> StoredShard:
        """Read the index, the statuses and the attributes of a partial or final shard."""
        ...

    def outline(self, path: str) -> Outline:
        """Read the attributes and statuses of a final shard, or of a partial file, without keys."""
        ...

    def commit_records(self, path: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read the digests, uint8 [n, 32], and CRCs, uint32 [n], of a published shard."""
        ...

    def run_log(self, path: str) -> list[dict[str, Any]]:
        """Return one entry per start that wrote to the shard, oldest first."""
        ...

    def publish(self, partial: str, final: str) -> None:
        """Give a finished shard its final name durably; repeat this after a crash to finish it."""
        ...

    def final_paths(self, final: str) -> list[str]:
        """Return the files of a published shard."""
        ...


def backend_of(shard_format: Format) -> ShardFormat:
    """Return the module that implements a format."""
    if shard_format is Format.H5:
        from internvit_cli.storage.format import hdf5

        return hdf5
    from internvit_cli.storage.format import npy

    return npy
