"""The words of the project as types: choices, small frozen records, and the recipe that decides every stored value."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from enum import Enum, IntEnum
from typing import Any

PATCH_SIZE = 14
"""Side of the ViT's square patch, pixels."""

NUMERICS_VERSION = 2
"""Raised whenever a change of ours may change a stored value; part of the recipe."""

DEFAULT_MODEL = "OpenGVLab/InternViT-300M-448px-V2_5"
DEFAULT_MAX_PIXELS = 178_956_970
"""Pillow's own error limit: twice its warning limit of 1 GiB of RGBA."""


class Tokens(str, Enum):
    """Which tokens of every tile are stored."""

    VISUAL = "visual"
    PATCH = "patch"
    PROJECTED = "projected"
    NONE = "none"

    @property
    def dataset(self) -> str:
        """The dataset that holds these tokens, such as `visual_tokens`."""
        return f"{self.value}_tokens"

    @property
    def scales_dataset(self) -> str:
        """The dataset that holds their scales where the stored type has them, such as `visual_scales`."""
        return f"{self.value}_scales"


class Pool(str, Enum):
    """How a tile's hidden states become one vector."""

    MEAN = "mean"
    CLS = "cls"
    CLS_MEAN = "cls+mean"


class Preprocess(str, Enum):
    """How a picture becomes tiles."""

    TILES = "tiles"
    SQUASH = "squash"
    CLIP = "clip"


class StoreDtype(str, Enum):
    """The type of stored tokens; bfloat16 is stored as its uint16 bits, fp8 (e4m3) as its uint8 bits."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def numpy_name(self) -> str:
        """The little-endian numpy type that holds one value."""
        return {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1", "fp8": "|u1"}[self.value]

    @property
    def is_scaled(self) -> bool:
        """Whether every token has a float32 scale beside it: its values are what is stored times that."""
        return self in (StoreDtype.INT8, StoreDtype.FP8)


class Format(str, Enum):
    """How a shard lies on disk."""

    H5 = "h5"
    NPY = "npy"


class ComputeDtype(str, Enum):
    """The type the encoder computes in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FP8 = "fp8"
    """Linear layers in e4m3 with a scale for every row, all else in bfloat16."""


class OnOverflow(str, Enum):
    """What to do with a value that the stored type cannot hold."""

    SKIP = "skip"
    CLAMP = "clamp"


class TokenMapKind(str, Enum):
    """What `show` draws of an image."""

    TILES = "tiles"
    PCA = "pca"
    LENGTH = "length"
    LIKENESS = "likeness"
    THUMBNAIL = "thumbnail"


class Graphics(str, Enum):
    """How a terminal takes pictures."""

    KITTY = "kitty"
    ITERM2 = "iterm2"
    SIXEL = "sixel"
    BLOCKS = "blocks"


class Projection(str, Enum):
    """How `report` lays images out in a plane."""

    PCA = "pca"
    UMAP = "umap"


class Status(IntEnum):
    """What became of an image; the numbers are part of the file format and never change."""

    PENDING = 0
    DONE = 1
    NOT_AN_IMAGE = 2
    TRUNCATED = 3
    TOO_LARGE = 4
    TIMEOUT = 5
    WORKER_DIED = 6
    UNREADABLE = 7
    VANISHED = 8
    CHANGED = 9
    SIZE_MISMATCH = 10
    UNSUPPORTED = 11
    OVERFLOW = 12
    LINK_OUTSIDE = 13
    NOT_REGULAR = 14

    @property
    def word(self) -> str:
        """The reason in the words of the reports, such as `not_an_image`."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that could not be used: a value, never an exception that crosses a module."""

    status: Status
    exception: str
    """Class of the cause, such as `PIL.UnidentifiedImageError`; empty when there was none."""
    message: str


@dataclass(frozen=True, slots=True)
class TilingRule:
    """The arithmetic from a picture's size to its tiles."""

    tile_size: int = 448
    """Side of a tile, pixels."""
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    """Append the whole picture as one more tile when the grid has more than one."""
    preprocess: Preprocess = Preprocess.TILES


@dataclass(frozen=True, slots=True)
class PixelRule:
    """All that decides the uint8 pixels of a picture's tiles."""

    tiling: TilingRule = TilingRule()
    exif: bool = True
    """Turn the picture upright as its EXIF orientation says."""
    background: tuple[int, int, int] | None = None
    """Compose transparency over this RGB colour first; None drops alpha as the official code does."""
    global_view_only: bool = False
    """Produce just the global view: all that pooled features of the whole picture need."""
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a stored value, and nothing else: the key of resume."""

    weights_digest: str
    layer: int
    """Number of transformer blocks that run before features are taken."""
    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    preprocess: str
    exif: bool
    background: tuple[int, int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: str
    token_order: str
    """Order of visual tokens: v2 row by row, v1 column by column (older checkpoints)."""
    pool: str
    tile_pooled: bool
    compute_dtype: str
    store_dtype: str
    on_overflow: str
    numerics_version: int = NUMERICS_VERSION

    def to_json(self) -> str:
        """The canonical text that is stored and hashed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe of a stored file.

        Raises:
            ValueError: the text is not a recipe of this version.
        """
        stored: Any = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or set(stored) != known:
            raise ValueError("not a recipe of this version")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**values)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """Names of the fields in which two recipes differ, in declaration order."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
