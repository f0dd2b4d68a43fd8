"""What a verification takes, tells and returns."""

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
    """What to verify, and how closely."""

    path: str
    pictures: bool = True
    """Hold digests against the pictures that are still there."""
    re_extract: int = 0
    """How many random images to encode again."""
    reference: bool = False
    """Those also with transformers' own class in float32."""
    model: str | None = None
    """Where the weights are; None is what the output names."""
    seed: int = 0
    """Of the choice of images."""
    device: str = "auto"
    threads: int | None = None
    """That read rows and pictures; None is one a core."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong."""

    check: str
    """What found it: file, manifest, index, recipe, datasets, rows, pictures, re-extract or reference."""
    path: str
    """The file or shard."""
    key: str | None
    """The image; None for what is wrong with the whole file."""
    problem: str


@dataclass(frozen=True, slots=True)
class PictureCheck:
    """How the pictures stand to the digests."""

    unchanged: int = 0
    changed: tuple[str, ...] = ()
    """Keys whose file is another one now."""
    missing: tuple[str, ...] = ()
    """Keys whose file is gone, or cannot be read."""
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReencodeComparison:
    """Stored rows against those of an encoding anew."""

    check: str
    """`re-extract`, or `reference` for transformers' class."""
    encoder: str
    """What encoded, in which type, on which device."""
    images: int
    """Compared."""
    bit_equal: int
    """Images all of whose stored values came out the same to the last bit."""
    difference: float
    """Largest absolute difference of two values."""
    relative: float
    """Largest difference as a share of the largest stored magnitude of the same image and dataset."""
    cosine: float
    """Lowest cosine of two tokens, or two vectors."""
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
    """By status, superseded rows left out."""
    rows: int
    """Committed rows whose bytes were checked, superseded ones too."""
    bytes: int
    """Of those rows."""
    seconds: float
    """That checking them took."""
    pictures: PictureCheck | None
    comparisons: tuple[ReencodeComparison, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 when all is right, 1 when anything is not."""
        return ExitCode.CANNOT_RUN if self.findings else ExitCode.DONE

    @property
    def rate(self) -> float:
        """Bytes a second of the check of rows."""
        return self.bytes / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The flat object of `--json`."""
        values = asdict(self) | {"bytes_per_second": round(self.rate)}
        for comparison in values["comparisons"]:
            # JSON has no infinity, which is what a value that is not a number differs by.
            comparison.update({name: None for name, value in comparison.items() if value == float("inf")})
        return values


class Row(NamedTuple):
    """A row that counts, and the picture it came from."""

    shard: LoadedShard
    number: int

    @property
    def key(self) -> str:
        """The image's name."""
        return os.fsdecode(self.shard.table.keys[self.number])

    @property
    def picture(self) -> bytes:
        """Where the picture was."""
        table = self.shard.table
        return self.shard.sources[int(table.source[self.number])].path(table.keys[self.number])

    @property
    def digest(self) -> bytes:
        """SHA-256 of the picture, as stored."""
        return bytes(self.shard.digests[self.number].tobytes())


@dataclass(frozen=True, eq=False)
class LoadedShard:
    """A shard whose index is sound."""

    found: FinishedShard
    recipe: Recipe
    sources: list[Source]
    digests: NDArray[Any]
    """[n, 32] uint8."""
    checksums: NDArray[Any]
    """[n] uint32."""
    is_partial: bool

    @property
    def path(self) -> str:
        """Its file, or what its files' names begin with."""
        return self.found.path

    @property
    def table(self) -> ImageTable:
        """Its index."""
        return self.found.stored.table

    @cached_property
    def live_rows(self) -> NDArray[Any]:
        """Numbers of the rows that count, [k] int64."""
        return self.found.live_rows

    def rows_with(self, statuses: Collection[int]) -> NDArray[Any]:
        """Live rows of some statuses."""
        return self.live_rows[np.isin(self.table.status[self.live_rows], list(statuses))]
