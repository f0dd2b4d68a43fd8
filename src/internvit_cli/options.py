"""Define the options of an extraction, grouped by the stage that needs them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from internvit_cli.config import (
    DEFAULT_DECODE_TIMEOUT,
    DEFAULT_LOWEST_COSINE,
    DEFAULT_MAX_PIXELS,
    DEFAULT_MODEL,
    DEFAULT_WORKER_MEMORY,
    ComputeDtype,
    Format,
    GreyRange,
    Limits,
    OnOverflow,
    Pool,
    Preprocess,
    Resize,
    StoreDtype,
    Tokens,
    Truncated,
)
from internvit_cli.errors import UsageError
from internvit_cli.runtime.words import described
from internvit_cli.sources.interface import DiscoverOptions

DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which encoder, and how far it runs."""

    name: str = DEFAULT_MODEL
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    """Indices into hidden_states; None means the checkpoint's own choice."""


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """How pictures become tiles."""

    tile_size: int | None = None
    """Side of a tile in pixels; None means the checkpoint's own."""
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    preprocess: Preprocess = Preprocess.TILES
    exif: bool = True
    background: tuple[int, int, int] | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    truncated: Truncated = Truncated.SKIP
    grey_range: GreyRange | int = GreyRange.FULL

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise UsageError(
                f"--min-tiles {self.min_tiles} is above --max-tiles {self.max_tiles}", "give a range, such as 1 and 12"
            )


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What is stored, and where."""

    output: str
    format: Format | None = None
    """Format of a folder's shards; None means .npy."""
    shard_bytes: int | None = None
    """Largest size of a folder's shards; None means `DEFAULT_SHARD_BYTES`."""
    tokens: Tokens = Tokens.VISUAL
    pool: Pool = Pool.MEAN
    tile_pooled: bool = False
    store_dtype: StoreDtype = StoreDtype.FLOAT16
    on_overflow: OnOverflow = OnOverflow.SKIP
    overwrite: bool = False
    prune: bool = False
    """Drop the rows of pictures that were deleted."""
    yes: bool = False
    """Drop rows even if they are more than half of all rows."""
    retry_skipped: bool = False
    relocations: tuple[tuple[bytes, bytes], ...] = ()
    """Folders that moved, as old and new absolute paths."""
    lock: bool = True


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the work is done; only the compute type changes stored values."""

    devices: tuple[str, ...] = ("auto",)
    """Devices that share the work; `all` means every GPU."""
    dtype: ComputeDtype = ComputeDtype.AUTO
    batch_tiles: int | None = None
    """Tiles per batch; None leaves it to the encoder."""
    measure_batch: bool = False
    """Where `batch_tiles` is None, take what is fastest; it may differ from run to run."""
    workers: int | None = None
    """Number of decode processes; None derives it from the number of cores."""
    threads: int | None = None
    """Encoder threads on a CPU; None means one per core."""
    resize: Resize = Resize.AUTO
    """Where pictures are resized; the pixels are the same everywhere."""
    compile: bool = False
    """Use torch.compile instead of internvit's own kernels, on CUDA only."""
    decode_timeout: float = DEFAULT_DECODE_TIMEOUT
    """Seconds per image."""
    worker_memory: int = DEFAULT_WORKER_MEMORY
    """Bytes of memory per decode process."""
    lowest_cosine: float = DEFAULT_LOWEST_COSINE
    """Lowest accepted cosine of a token in fp8 arithmetic to the same token in bfloat16."""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """All options of an extraction."""

    sources: tuple[str, ...]
    store: StoreOptions
    discover: DiscoverOptions = field(default_factory=DiscoverOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def limits(self) -> Limits:
        """The limits that pictures of this run have to respect."""
        return Limits(self.pictures.max_pixels, self.run.decode_timeout, self.run.worker_memory)

    @property
    def has_sources(self) -> bool:
        """Whether any sources are named."""
        return bool(self.sources) or self.discover.files_from is not None


def color_named(text: str) -> tuple[int, int, int] | None:
    """Return red, green and blue of a color's name or hexadecimal value; None if it is not a color."""
    from PIL import ImageColor

    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError:
        return None
    # Pillow accepts rgb(999, 0, 0) as a color.
    return (red, green, blue) if all(0 <= part <= 255 for part in (red, green, blue)) else None


def named_path(path: str | os.PathLike[str]) -> str:
    """Return a path given by a user without trailing slashes.

    Raises:
        UsageError: The path is empty, such as from a script's variable that was never set, or not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"the path of features is {described(path)}", "give a str or os.PathLike")
    path = os.fsdecode(path)
    if not path:
        raise UsageError("the name of the output is empty", "check that the variable that should hold it is set")
    return path.rstrip("/") or "/"
