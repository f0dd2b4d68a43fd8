"""Define the choices, small frozen records, and the recipe that decides every stored value."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

AnyEnum = TypeVar("AnyEnum", bound=Enum)

PATCH_SIZE = 14
"""Side of the ViT's square patches, in pixels."""

NUMERICS_VERSION = 2
"""Part of the recipe, and increased whenever a change of the code may change a stored value.

The rules for reading a picture's orientation are an exception: the orientation of each image is stored beside its row,
so the row stays correct.
"""

DEFAULT_RESCALE_FACTOR = 1 / 255
"""Factor for pixel values before they are normalized, unless the checkpoint has another one."""

DEFAULT_MODEL = "OpenGVLab/InternViT-300M-448px-V2_5"
DEFAULT_MAX_PIXELS = 178_956_970
"""Pillow's own error limit: twice its warning limit of 1 GiB of RGBA."""

DEFAULT_DECODE_TIMEOUT = 30.0
"""Seconds per picture."""

DEFAULT_LOWEST_COSINE = 0.999
"""Lowest accepted cosine of a token in fp8 arithmetic to the same token in bfloat16."""
DEFAULT_WORKER_MEMORY = 4 << 30
"""Bytes per decode process."""

MOST_GREY = 65_535
"""The largest value of 16 bits."""

DRAWN_BY = ("Software", "internvit")
"""The text chunk that marks PNGs drawn by this program, which are not taken as sources."""


class Choice(str, Enum):
    """Base of string enums whose members print as their values."""

    def __str__(self) -> str:
        return str(self.value)


DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "single": "float32",
    "float": "float32",
}
"""Short names of types; stored names are always those of numpy and PyTorch."""

EARLIER_NAMES = {"likeness": "similarity"}
"""Values that earlier versions accepted, and that scripts may still use."""


def member_named(kind: type[AnyEnum], word: object) -> AnyEnum | None:
    """Return the member of a choice for a word in any case, or for a PyTorch dtype; None if there is none."""
    return names_of(kind).get(str(word.value if isinstance(word, Enum) else word).lower().removeprefix("torch."))


def names_of(kind: type[AnyEnum]) -> dict[str, AnyEnum]:
    """Return the members of a choice by value, short name of a type, and value of earlier versions."""
    members = {str(member.value).lower(): member for member in kind}
    others = DTYPE_ALIASES | EARLIER_NAMES
    return members | {alias: members[name] for alias, name in others.items() if name in members}


class Tokens(Choice):
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
        """The dataset that holds the scales of these tokens for a scaled type, such as `visual_scales`."""
        return f"{self.value}_scales"


class Pool(Choice):
    """How a tile's hidden states become one vector."""

    MEAN = "mean"
    CLS = "cls"
    CLS_MEAN = "cls+mean"


class TokenOrder(Choice):
    """The order of a tile's visual tokens."""

    V1 = "v1"
    """Column by column, in which older checkpoints were trained."""
    V2 = "v2"
    """Row by row."""


class Preprocess(Choice):
    """How a picture becomes tiles."""

    TILES = "tiles"
    SQUASH = "squash"
    CLIP = "clip"


class Resize(Choice):
    """Where pictures are resized; the pixels are the same."""

    AUTO = "auto"
    """On an NVIDIA card, for pictures that fit into the memory between decoding and encoding; else on the CPU."""
    CPU = "cpu"
    DEVICE = "device"


class StoreDtype(Choice):
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
        """Whether tokens have scales, by which their stored numbers are multiplied."""
        return self in (StoreDtype.INT8, StoreDtype.FP8)

    def values_per_scale(self, tokens: Tokens) -> int:
        """Return how many values of a token share a scale in new outputs; 0 for one scale per token, or none.

        A visual token joins four patches, and so has every outlier channel four times. These share a scale, so visual
        tokens need fewer scales than patches.
        """
        if self is not StoreDtype.INT8 or tokens is Tokens.NONE:
            return 0
        return 64 if tokens is Tokens.PATCH else 128


def scales_per_token(token_size: int, values_per_scale: int) -> int:
    """Return the number of scales of a token that has several; value i has scale `i % scales_per_token`.

    >>> scales_per_token(4096, 128), scales_per_token(64, 128)
    (32, 1)
    """
    return -(-token_size // values_per_scale)


class Format(Choice):
    """The file format of shards."""

    H5 = "h5"
    NPY = "npy"


class ComputeDtype(Choice):
    """The type the encoder computes in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FP8 = "fp8"
    """Linear layers in e4m3 with a scale per row, everything else in bfloat16."""


class OnOverflow(Choice):
    """What to do with a value that the stored type cannot hold."""

    SKIP = "skip"
    CLAMP = "clamp"


class Truncated(Choice):
    """What to do with a picture that lacks its end."""

    SKIP = "skip"
    ACCEPT = "accept"
    """Use what exists, as Pillow's LOAD_TRUNCATED_IMAGES does; the missing part is gray or black."""


class GreyRange(Choice):
    """How the value that becomes white in gray pictures of more than 8 bits is found."""

    FULL = "full"
    """65535: all 16 bits."""
    AUTO = "auto"
    """The largest value of the smallest number of bits (8, 10, 12, 14 or 16) that holds the picture."""


class TokenMapKind(Choice):
    """What `show` draws of an image."""

    TILES = "tiles"
    PCA = "pca"
    LENGTH = "length"
    SIMILARITY = "similarity"
    THUMBNAIL = "thumbnail"


class Graphics(Choice):
    """The protocol by which a terminal draws pictures."""

    KITTY = "kitty"
    ITERM2 = "iterm2"
    SIXEL = "sixel"
    BLOCKS = "blocks"


class Projection(Choice):
    """How `report` lays images out in a plane."""

    PCA = "pca"
    UMAP = "umap"


LONGEST_KEY = 16384
"""Maximum bytes of a key: four times the longest path."""


class Status(IntEnum):
    """What became of an image; the numbers are part of the file format and never change.

    >>> Status.DONE, str(Status.TOO_LARGE), int(Status.TOO_LARGE)
    (Status.DONE, 'too_large', 4)
    """

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
        """The name that reports use, such as `not_an_image`."""
        return self.name.lower()

    def __repr__(self) -> str:
        return f"Status.{self.name}"

    def __str__(self) -> str:
        return self.word

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)  # IntEnum formats differently between versions


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that could not be used; returned as a value instead of raised, so that a run goes on."""

    status: Status
    exception: str
    """Class of the exception behind it, such as `PIL.UnidentifiedImageError`; empty if there was none."""
    message: str
    pixels: int | None = None
    """The `--max-pixels` that a picture with too many pixels needs; None for other reasons."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a run, which skips pictures that a run with higher limits would take."""

    max_pixels: int = DEFAULT_MAX_PIXELS
    decode_timeout: float = DEFAULT_DECODE_TIMEOUT
    """Seconds per picture."""
    worker_memory: int = DEFAULT_WORKER_MEMORY
    """Bytes per decode process."""

    def exceeded(self, skipped: Skipped) -> tuple[str, float] | None:
        """Return the limit for which a picture was skipped; None if it was skipped for another reason.

        Returns:
            The name of the limit, and the value that it has to exceed for another try to make sense.
        """
        if skipped.pixels is not None:
            return "max_pixels", skipped.pixels - 1
        if skipped.status is Status.TIMEOUT:
            return "decode_timeout", self.decode_timeout
        if skipped.status in (Status.TOO_LARGE, Status.WORKER_DIED):  # decoders in C may crash without memory
            return "worker_memory", self.worker_memory
        return None


@dataclass(frozen=True, slots=True)
class TilingRule:
    """The parameters that turn a picture's size into a grid of tiles."""

    tile_size: int = 448
    """Side of a tile, in pixels."""
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    """Append the whole picture as one more tile if the grid has more than one."""
    preprocess: Preprocess = Preprocess.TILES


@dataclass(frozen=True, slots=True)
class PixelRule:
    """Everything that decides the uint8 pixels of a picture's tiles."""

    tiling: TilingRule = TilingRule()
    exif: bool = True
    """Turn the picture upright as its EXIF orientation says."""
    background: tuple[int, int, int] | None = None
    """Compose transparent pictures over this RGB color; None drops alpha as the official code does."""
    global_view_only: bool = False
    """Produce only the view of the whole picture, which is all that pooled features need."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    truncated: Truncated = Truncated.SKIP
    grey_range: GreyRange | int = GreyRange.FULL
    """The value of gray pictures of more than 8 bits that becomes white."""


class RecipeError(ValueError):
    """A text is not a recipe; the message completes the sentence "the recipe of FILE ..."."""


class UnknownRecipeError(RecipeError):
    """A recipe has a field or a value that this version does not know, because a newer version wrote it."""


def later_field(default: Any) -> Any:
    """Declare a field that recipes of earlier files do not have.

    A field with its default is left out of the text, so that earlier files keep their digest.
    """
    return field(default=default, metadata={"omit_default": True})


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a stored value, and nothing else; an output continues only with an equal recipe."""

    weights_digest: str
    layer: int
    """Number of transformer blocks before features are taken; the deepest of several layers."""
    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    preprocess: Preprocess
    exif: bool
    background: tuple[int, int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: Tokens
    token_order: TokenOrder
    pool: Pool
    tile_pooled: bool
    compute_dtype: ComputeDtype
    """Never AUTO in a stored recipe."""
    store_dtype: StoreDtype
    on_overflow: OnOverflow
    numerics_version: int = NUMERICS_VERSION
    rescale_factor: float = later_field(DEFAULT_RESCALE_FACTOR)
    """Factor for pixel values before `mean` is subtracted; 1 if the checkpoint does not rescale."""
    earlier_layers: tuple[int, ...] = later_field(())
    """Layers before `layer` that are stored too, in ascending order; each is a number of blocks."""
    truncated: Truncated = later_field(Truncated.SKIP)  # noqa: RUF009 - declares a field
    grey_range: GreyRange | int = later_field(GreyRange.FULL)  # noqa: RUF009 - declares a field
    projector_digest: str = later_field("")
    """For tokens that were projected from stored visual tokens: the SHA-256 of the projector's weights, which
    `weights_digest` does not cover. Tokens of `extract --tokens projected` have none."""
    projected_from: StoreDtype | None = later_field(None)  # noqa: RUF009 - declares a field
    """The type in which those visual tokens were stored."""
    values_per_scale: int = later_field(0)
    """The number of values of a token that share a float16 scale, in scaled types; 0 for one float32 scale per token.
    In recipes of projected tokens, it is that of the visual tokens."""

    @property
    def before_projection(self) -> Recipe:
        """The recipe of the visual tokens that were projected; the same recipe if none were."""
        if self.projected_from is None:
            return self
        return replace(
            self, tokens=Tokens.VISUAL, store_dtype=self.projected_from, projector_digest="", projected_from=None
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All stored layers, in ascending order."""
        return (*self.earlier_layers, self.layer)

    def to_json(self) -> str:
        """Return the canonical JSON text that is stored and hashed."""
        values = asdict(self)
        for known in fields(self):
            if known.metadata.get("omit_default") and values[known.name] == known.default:
                del values[known.name]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Parse the recipe of a stored file.

        Raises:
            RecipeError: The text is not a recipe, or a newer version wrote it.
        """
        try:
            stored: Any = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise RecipeError("is not valid JSON") from error
        if not isinstance(stored, dict):
            raise RecipeError("is not a JSON object")
        known = {recipe_field.name: recipe_field for recipe_field in fields(cls)}
        for name in stored:
            if name not in known:
                raise UnknownRecipeError(f"has the field {name!r}")
        for name, recipe_field in known.items():
            if name not in stored and recipe_field.default is MISSING:
                raise RecipeError(f"lacks the field {name!r}")
        return cls(**{name: _read_field(name, str(known[name].type), value) for name, value in stored.items()})

    @property
    def digest(self) -> str:
        """The SHA-256 of the canonical text, as 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """Return the names of the fields in which two recipes differ, in declaration order."""
        return [known.name for known in fields(self) if getattr(self, known.name) != getattr(other, known.name)]


def _read_field(name: str, kind: str, value: Any) -> Any:
    try:
        return _FIELD_READERS[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise UnknownRecipeError(f"has {name} {json.dumps(value)[:80]}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _count(value: Any) -> int:
    """Check a whole number that is small enough for tiles, pixels or layers."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not 0 <= value < 1 << 31:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    if not math.isfinite(value):
        raise ValueError
    return value


def _three(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read_three(value: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError
        first, second, third = map(read, value)
        return first, second, third

    return read_three


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_count, value))


def _grey_range(value: Any) -> GreyRange | int:
    if isinstance(value, str):
        return GreyRange(value)
    if not 1 <= (most := _count(value)) <= MOST_GREY:
        raise ValueError
    return most


def _computed(value: Any) -> ComputeDtype:
    if value == ComputeDtype.AUTO:
        raise ValueError
    return ComputeDtype(value)


_FIELD_READERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "bool": _truth,
    "int": _count,
    "float": _number,
    "tuple[int, ...]": _counts,
    "tuple[float, float, float]": _three(_number),
    "tuple[int, int, int] | None": lambda value: None if value is None else _three(_count)(value),
    "Preprocess": Preprocess,
    "Truncated": Truncated,
    "GreyRange | int": _grey_range,
    "Tokens": Tokens,
    "TokenOrder": TokenOrder,
    "Pool": Pool,
    "ComputeDtype": _computed,
    "StoreDtype": StoreDtype,
    "StoreDtype | None": lambda value: None if value is None else StoreDtype(value),
    "OnOverflow": OnOverflow,
}
"""Functions that check and convert the stored value of a field, by the type of the field."""
