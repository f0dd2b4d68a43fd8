"""The options of an `Extractor`: those of `internvit extract` that decide values or speed, by the same names."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from internvit_cli.config import ComputeDtype, OnOverflow, Pool, Preprocess, StoreDtype, Tokens
from internvit_cli.errors import UsageError
from internvit_cli.options import ExtractOptions, ModelOptions, PictureOptions, RunOptions, StoreOptions, parse_color

if TYPE_CHECKING:
    from collections.abc import Mapping

Choice = TypeVar("Choice", bound=Enum)


class ExtractorOptions(TypedDict, total=False):
    """Keyword arguments of `Extractor`; what is left out is as in `internvit extract`."""

    revision: str | None
    """Branch, tag or commit on the hub."""
    layer: int | None
    """Index into hidden_states; None is the checkpoint's own choice."""
    tile_size: int | None
    """Side of a tile, pixels; None is the model's own."""
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    """Add the whole picture as a last tile."""
    preprocess: Preprocess | str
    """tiles, squash or clip."""
    exif: bool
    """Turn pictures upright by their EXIF."""
    background: tuple[int, int, int] | str | None
    """RGB, or a colour's name: compose transparency over it first."""
    max_pixels: int
    """Pictures with more are skipped."""
    tokens: Tokens | str
    """visual, patch, projected or none."""
    pool: Pool | str
    """mean, cls or cls+mean."""
    tile_pooled: bool
    """A vector of every tile too."""
    store_dtype: StoreDtype | str
    """Type of tokens: float16, float32 or bfloat16."""
    on_overflow: OnOverflow | str
    """skip or clamp."""
    device: str
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: ComputeDtype | str
    """Type the encoder computes in: auto, bfloat16, float16 or float32."""
    batch_tiles: int | None
    """Tiles in a batch; None chooses."""
    threads: int | None
    """Encoder threads on a CPU; None is one a core."""


CHOICES: Mapping[str, type[Enum]] = {
    "preprocess": Preprocess,
    "tokens": Tokens,
    "pool": Pool,
    "store_dtype": StoreDtype,
    "on_overflow": OnOverflow,
    "dtype": ComputeDtype,
}


def extract_options(model: str, options: Mapping[str, Any]) -> ExtractOptions:
    """What an extraction with these keyword arguments would be asked for.

    Raises:
        TypeError: an option that there is not.
        UsageError: a value that there is not, or options that contradict each other.
    """
    if unknown := [name for name in options if name not in ExtractorOptions.__annotations__]:
        raise TypeError(f"an Extractor has no option {unknown[0]!r}; {', '.join(ExtractorOptions.__annotations__)}")
    values = {name: _value(name, value) for name, value in options.items()}
    if "device" in values:
        values["devices"] = (values.pop("device"),)

    def of(group: type[Any]) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(group) if field.name in values}

    return ExtractOptions(
        sources=(),
        model=ModelOptions(name=model, **of(ModelOptions)),
        pictures=PictureOptions(**of(PictureOptions)),
        store=StoreOptions(output="", **of(StoreOptions)),
        run=RunOptions(**of(RunOptions)),
    )


def _value(name: str, value: Any) -> Any:
    if name == "background" and isinstance(value, str):
        return parse_color(value)
    return choice(name, CHOICES[name], value) if name in CHOICES else value


def choice(name: str, kind: type[Choice], value: Choice | str) -> Choice:
    """One of a few named values.

    Raises:
        UsageError: another.
    """
    try:
        return kind(value)
    except ValueError:
        words = ", ".join(str(member.value) for member in kind)
        raise UsageError(f"{name} {value!r} is none of {words}", f"choose one of {words}") from None
