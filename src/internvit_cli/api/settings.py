"""Define the options of an `Extractor`, which have the names that they have in `internvit extract`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypedDict, Union, get_args, get_origin, get_type_hints

from internvit_cli.config import (
    MOST_GREY,
    AnyEnum,
    ComputeDtype,
    GreyRange,
    OnOverflow,
    Pool,
    Preprocess,
    StoreDtype,
    Tokens,
    Truncated,
    member_named,
    names_of,
)
from internvit_cli.errors import UsageError, one_line
from internvit_cli.options import ExtractOptions, ModelOptions, PictureOptions, RunOptions, StoreOptions, color_named
from internvit_cli.runtime.words import described, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import Enum


class ExtractorOptions(TypedDict, total=False):
    """Keyword arguments of `Extractor`, with the defaults of `internvit extract`."""

    revision: str | None
    """A branch, tag or commit on the hub."""
    layer: int | Sequence[int] | None
    """An index into hidden_states, or several; None means the checkpoint's own choice."""
    tile_size: int | None
    """The side of a tile in pixels; None means that of the model."""
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    """Whether to add the whole picture as a last tile."""
    preprocess: Preprocess | str
    """tiles, squash or clip."""
    exif: bool
    """Whether to turn pictures upright by their EXIF orientation."""
    background: tuple[int, int, int] | str | None
    """A color (RGB or a name) over which transparent pictures are composed; None drops alpha."""
    max_pixels: int
    """Pictures with more pixels are skipped."""
    truncated: Truncated | str
    """What to do with pictures that lack their end: skip or accept."""
    grey_range: GreyRange | int | str
    """The value that becomes white in gray pictures of 16 bits: full (65535), auto, or a value from 1 to 65535."""
    tokens: Tokens | str
    """visual, patch, projected or none."""
    pool: Pool | str
    """mean, cls or cls+mean."""
    tile_pooled: bool
    """Whether to compute a vector per tile too."""
    store_dtype: StoreDtype | str
    """The type of tokens: float16, float32 or bfloat16."""
    on_overflow: OnOverflow | str
    """skip or clamp."""
    device: str
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: ComputeDtype | str
    """The compute type: auto, bfloat16, float16 or float32."""
    batch_tiles: int | None
    """Tiles per batch; None chooses the number."""
    threads: int | None
    """Encoder threads on a CPU; None means one per core."""


AT_LEAST_1 = {"tile_size", "min_tiles", "max_tiles", "max_pixels", "batch_tiles", "threads"}
CHOICES: Mapping[str, type[Enum]] = {
    "preprocess": Preprocess,
    "truncated": Truncated,
    "tokens": Tokens,
    "pool": Pool,
    "store_dtype": StoreDtype,
    "on_overflow": OnOverflow,
    "dtype": ComputeDtype,
}


def extract_options(model: str | os.PathLike[str], options: Mapping[str, Any]) -> ExtractOptions:
    """Return the options of an extraction for keyword arguments of an `Extractor`.

    Raises:
        TypeError: There is no such option.
        UsageError: A value is invalid, has another type or is out of range, or options contradict each other.
    """
    if unknown := [name for name in options if name not in ExtractorOptions.__annotations__]:
        raise TypeError(
            f"an Extractor has no option {unknown[0]!r}; it has {', '.join(ExtractorOptions.__annotations__)}"
        )
    hints = get_type_hints(ExtractorOptions)
    values = {name: _value(name, value, hints[name]) for name, value in options.items()}
    if "layer" in values:
        layer = values.pop("layer")
        values["layers"] = (layer,) if isinstance(layer, int) else layer
    if "device" in values:
        values["devices"] = (values.pop("device"),)

    def of(group: type[Any]) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(group) if field.name in values}

    return ExtractOptions(
        sources=(),
        model=ModelOptions(name=model_name(model), **of(ModelOptions)),
        pictures=PictureOptions(**of(PictureOptions)),
        store=StoreOptions(output="", **of(StoreOptions)),
        run=RunOptions(**of(RunOptions)),
    )


def model_name(model: str | os.PathLike[str]) -> str:
    """Return the name or path of a model as text.

    Raises:
        UsageError: The model is neither a name nor a path.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(f"model is {described(model)}", "give a hub id, an alias, or the path of a directory")
    return os.fsdecode(model)


def _value(name: str, value: Any, hint: Any) -> Any:
    if name in CHOICES:
        return choice(name, CHOICES[name], value)
    if not _fits(value, hint):
        raise UsageError(f"{name}={one_line(repr(value), 60)} has the wrong type", f"{name} takes {_named(hint)}")
    if name == "grey_range":
        return _grey_range(value)
    if name == "background" and value is not None:
        return _color(value)
    if name in AT_LEAST_1 and value is not None and value < 1:
        raise UsageError(f"{name}={value!r} is below 1", "give a positive number, or leave it out")
    if name == "layer" and isinstance(value, Sequence):
        return tuple(map(int, value))
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has an option's type; numpy's integers count as int, bools do not."""
    kind = get_origin(hint) or hint
    if kind in {Union, UnionType}:
        return any(_fits(value, one) for one in get_args(hint))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind in {tuple, list, Sequence}:
        items = [one for one in get_args(hint) if one is not ...]
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if kind is tuple and ... not in get_args(hint):
            return len(value) == len(items) and all(map(_fits, value, items))
        return all(_fits(item, items[0]) for item in value)
    return isinstance(value, kind)


def _named(hint: Any) -> str:
    """Return a type in words, such as `int or None`."""
    if get_origin(hint) in {Union, UnionType}:
        return " or ".join(_named(one) for one in get_args(hint))
    if hint is NoneType:
        return "None"
    return str(hint) if get_origin(hint) else hint.__name__


def _color(value: str | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(value, str):
        color = color_named(value)
        if color is None:
            raise UsageError(
                f"background={value!r} is not a color", "give a name or a value, such as 'white' or '#ffffff'"
            )
        return color
    red, green, blue = (int(part) for part in value)
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise UsageError(f"background={value!r} is not a color", "red, green and blue are numbers from 0 to 255")
    return red, green, blue


def _grey_range(value: GreyRange | int | str) -> GreyRange | int:
    if isinstance(value, str):
        return choice("grey_range", GreyRange, value)
    if not 1 <= value <= MOST_GREY:
        raise UsageError(f"grey_range={value!r} is not a 16-bit value", f"give 1 to {MOST_GREY}, full or auto")
    return int(value)


def choice(name: str, kind: type[AnyEnum], value: AnyEnum | str) -> AnyEnum:
    """Return a member of a choice by its value.

    Raises:
        UsageError: There is no such value; the hint names the most similar one.
    """
    found = member_named(kind, value)
    if found is None:
        words = [str(member.value) for member in kind]
        hint = did_you_mean(str(value), names_of(kind)) or f"choose one of {', '.join(words)}"
        raise UsageError(f"{name} is {value!r}, not one of {', '.join(words)}", hint)
    return found
