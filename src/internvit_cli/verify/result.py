"""Define the options and the result of a verification."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.sources import Source
    from internvit_cli.storage.output import FinishedShard


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The options of a verification."""

    path: str
    pictures: bool = True
    """Whether to compare digests with the pictures that still exist."""
    re_extract: int = 0
    """The number of random images to encode again."""
    reference: bool = False
    """Whether to encode them with transformers' own class in float32 too."""
    model: str | None = None
    """Where the weights are; None means where the output says."""
    seed: int = 0
    """The seed for the choice of images."""
    device: str = "auto"
    threads: int | None = None
    """The number of threads that read rows and pictures; None means one per core."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong."""

    check: str
    """The check: file, manifest, index, recipe, datasets, rows, pictures, re-extract or reference."""
    path: str
    """The file or shard."""
    key: str | None
    """The key of the image; None if the finding concerns the whole file."""
    problem: str


@dataclass(frozen=True, slots=True)
class PictureCheck:
    """The comparison of pictures with their digests."""

    unchanged: int = 0
    changed: tuple[str, ...] = ()
    """Keys of images whose file has changed."""
    missing: tuple[str, ...] = ()
    """Keys of images whose file is gone, or cannot be read."""
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReencodeComparison:
    """The comparison of stored rows with a new encoding."""

    check: str
    """`re-extract`, or `reference` for transformers' class."""
    encoder: str
    """The encoder, its type and its device."""
    images: int
    """Compared."""
    bit_equal: int
    """The number of images whose values are all equal bit for bit."""
    difference: float
    """The largest absolute difference of two values."""
    relative: float
    """The largest difference, relative to the largest stored magnitude of the same image and dataset."""
    cosine: float
    """The lowest cosine of two tokens, or two vectors."""
    relative_limit: float
    cosine_limit: float

    @property
    def agrees(self) -> bool:
        """Whether every image is within the tolerance."""
        return self.relative <= self.relative_limit and self.cosine >= self.cosine_limit


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of `verify`."""

    path: str
    model: str
    shards: int
    images: dict[str, int]
    """The number of images by status, without superseded rows."""
    rows: int
    """The number of committed rows that were checked, including superseded ones."""
    bytes: int
    """The size of those rows in bytes."""
    seconds: float
    """The time of checking them, in seconds."""
    pictures: PictureCheck | None
    comparisons: tuple[ReencodeComparison, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 if everything is right, 1 if anything is wrong."""
        return ExitCode.CANNOT_RUN if self.findings else ExitCode.DONE

    @property
    def rate(self) -> float:
        """The speed of checking rows, in bytes per second."""
        return self.bytes / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        values = asdict(self) | {"bytes_per_second": round(self.rate)}
        for comparison in values["comparisons"]:
            # JSON has no infinity, which is the difference to a NaN.
            comparison.update({name: None for name, value in comparison.items() if value == float("inf")})
        return values


class StoredRow(NamedTuple):
    """A row that counts, with its picture."""

    shard: LoadedShard
    number: int

    @property
    def key(self) -> str:
        """The key of the image."""
        return os.fsdecode(self.shard.table.keys[self.number])

    @property
    def picture(self) -> bytes:
        """The path of the picture when it was encoded."""
        table = self.shard.table
        return self.shard.sources[int(table.source[self.number])].path(table.keys[self.number])

    @property
    def digest(self) -> bytes:
        """The stored SHA-256 of the picture."""
        return bytes(self.shard.digests[self.number].tobytes())


@dataclass(frozen=True, eq=False)
class LoadedShard:
    """A shard with a valid index."""

    found: FinishedShard
    recipe: Recipe
    sources: list[Source]
    digests: NDArray[Any]
    """SHA-256 of the pictures, [n, 32] uint8."""
    checksums: NDArray[Any]
    """[n] uint32."""
    is_partial: bool

    @property
    def path(self) -> str:
        """The path of the file, or the common prefix of the shard's files."""
        return self.found.path

    @property
    def table(self) -> ImageTable:
        """The index of the shard."""
        return self.found.stored.table

    @cached_property
    def live_rows(self) -> NDArray[Any]:
        """The indices of the rows that count, [k] int64."""
        return self.found.live_rows

    def rows_with(self, statuses: Collection[int]) -> NDArray[Any]:
        """Return the rows with some statuses that count."""
        return self.live_rows[np.isin(self.table.status[self.live_rows], list(statuses))]
