"""Read how a checkpoint prepares pixels: the arithmetic on their values, and the tiling of its own code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from internvit_cli.config import DEFAULT_RESCALE_FACTOR
from internvit_cli.errors import ModelError
from internvit_cli.model.json_files import read_json, short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.model.files import CheckpointFiles

Triple: TypeAlias = "tuple[float, float, float]"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_CLASSES = ("CLIP", "GotOcr2")
"""Image processors of transformers whose defaults are the values of CLIP."""

PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of the filter with which InternVL's code resizes."""

MOST = 1e6
"""Limit for means, standard deviations and factors; values above it, or below its inverse, are mistakes."""


class Normalization(NamedTuple):
    """The arithmetic on pixel values before the network: (byte * rescale_factor - mean) / std, per channel."""

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    rescale_factor: float = DEFAULT_RESCALE_FACTOR


@dataclass(frozen=True, slots=True)
class OwnTiling:
    """How the checkpoint's own code cuts pictures, according to its files; None for what they do not specify."""

    dynamic: bool | None = None
    """Whether pictures are cut into tiles; otherwise each is resized to one."""
    min_tiles: int | None = None
    max_tiles: int | None = None
    thumbnail: bool | None = None
    pad_to_square: bool = False
    """Whether pictures are padded to a square before they are resized, which internvit never does."""
    bicubic: bool = True
    """Whether pictures are resized with the filter that internvit uses."""


def read_processor(files: CheckpointFiles) -> tuple[Mapping[str, Any], str]:
    """Read the settings of a checkpoint's image processor, and return them with the name of their file.

    As in transformers, the section `image_processor` of processor_config.json, which transformers 5 writes, takes
    precedence over preprocessor_config.json; a processor_config.json of older versions has no such section.

    Raises:
        ModelError: A file is broken.
    """
    if path := files.find(PROCESSOR_FILE):
        section = read_json(path).get("image_processor")
        if section is not None:
            if not isinstance(section, dict):
                raise ModelError(f"{path}: image_processor is {short_repr(section)}, not an object")
            return section, PROCESSOR_FILE
    if path := files.find(PREPROCESSOR_FILE):
        return read_json(path), PREPROCESSOR_FILE
    return {}, ""


def normalization(section: Mapping[str, Any], source: str) -> Normalization:
    """Return the arithmetic for the settings of an image processor.

    Args:
        section: The settings; missing ones have the values of all published InternViT models.
        source: Their file, for messages.

    Raises:
        ModelError: A value is invalid; the message names its key.
    """
    rescale, offset = 1.0, 0.0
    if _flag(section, "do_rescale", source):
        offset = 1.0 if section.get("rescale_offset") is True else 0.0  # transformers then subtracts 1
        rescale = _number("rescale_factor", section.get("rescale_factor"), DEFAULT_RESCALE_FACTOR, source)
        if math.isclose(rescale, DEFAULT_RESCALE_FACTOR, rel_tol=1e-6):  # 1/255 as float32 or with fewer digits
            rescale = DEFAULT_RESCALE_FACTOR
    if not _flag(section, "do_normalize", source):
        return Normalization((offset, offset, offset), (1.0, 1.0, 1.0), rescale)
    kind = section.get("image_processor_type") or section.get("feature_extractor_type")
    is_clip = isinstance(kind, str) and kind.startswith(_CLIP_CLASSES)
    mean = _triple(section, "image_mean", _CLIP_MEAN if is_clip else IMAGENET_MEAN, source)
    std = _triple(section, "image_std", _CLIP_STD if is_clip else IMAGENET_STD, source)
    if not all(1 / MOST <= value <= MOST for value in std):
        raise ModelError(f"{source}: image_std is {list(std)}; all must be above 0, and from {1 / MOST:g} to {MOST:g}")
    return Normalization((mean[0] + offset, mean[1] + offset, mean[2] + offset), std, rescale)


def own_tiling(config: Mapping[str, Any], section: Mapping[str, Any]) -> OwnTiling:
    """Return how the checkpoint's own code cuts pictures; invalid values are ignored.

    Args:
        config: The config.json of the whole model.
        section: The settings of its image processor.
    """
    resample = section.get("resample")
    return OwnTiling(
        dynamic=_bool_or_none(config.get("dynamic_image_size")),
        min_tiles=_count_or_none(config.get("min_dynamic_patch", section.get("min_patches"))),
        max_tiles=_count_or_none(config.get("max_dynamic_patch", section.get("max_patches"))),
        thumbnail=_bool_or_none(config.get("use_thumbnail")),
        pad_to_square=config.get("pad2square") is True or config.get("image_aspect_ratio") == "pad",
        bicubic=not isinstance(resample, int) or isinstance(resample, bool) or resample == BICUBIC,
    )


def is_number(value: object) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer with hundreds of digits
        return False


def _flag(section: Mapping[str, Any], key: str, source: str) -> bool:
    value = section.get(key)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise ModelError(f"{source}: {key} is {short_repr(value)}, not true or false")
    return value


def _number(key: str, value: Any, default: float, source: str) -> float:
    if value is None:
        return default
    if not is_number(value) or not 1 / MOST <= value <= MOST:
        raise ModelError(f"{source}: {key} is {short_repr(value)}, not a number from {1 / MOST:g} to {MOST:g}")
    return float(value)


def _triple(section: Mapping[str, Any], key: str, default: Triple, source: str) -> Triple:
    value = section.get(key)
    if value is None:
        return default
    values = value if isinstance(value, list) else [value] * 3  # transformers accepts one number for all channels
    if len(values) != 3 or not all(is_number(item) and abs(item) <= MOST for item in values):
        raise ModelError(f"{source}: {key} is {short_repr(value)}, not three numbers from {-MOST:g} to {MOST:g}")
    red, green, blue = values
    return float(red), float(green), float(blue)


def _bool_or_none(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _count_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000 else None
