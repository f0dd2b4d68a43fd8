"""Turn folders of pictures into InternViT features on disk, and read them.

Reading what `internvit extract` wrote does not need torch:

>>> from internvit_cli import open_features
>>> features = open_features("feats.h5")
>>> features["street.jpg"].visual_tokens.shape  # [tiles, 256, 4 * hidden_size]
(13, 256, 256)

`FeatureDataset`, `FeatureStream`, `collate_padded` and `collate_nested` serve training, and `Extractor` encodes
pictures in memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvit_cli.api.dataset import FeatureDataset, collate_nested, collate_padded
    from internvit_cli.api.extractor import Extractor
    from internvit_cli.api.stream import FeatureStream
    from internvit_cli.config import Recipe, Status
    from internvit_cli.errors import ClosedError, InternvitError, OutputError, UsageError
    from internvit_cli.plan.tiling import Grid
    from internvit_cli.storage.read.image import ImageFeatures, SkippedImageError, Tile
    from internvit_cli.storage.read.reader import Features, UnknownKeyError, open_features

    __version__: str

__all__ = [
    "ClosedError",
    "Extractor",
    "FeatureDataset",
    "FeatureStream",
    "Features",
    "Grid",
    "ImageFeatures",
    "InternvitError",
    "OutputError",
    "Recipe",
    "SkippedImageError",
    "Status",
    "Tile",
    "UnknownKeyError",
    "UsageError",
    "__version__",
    "collate_nested",
    "collate_padded",
    "open_features",
]

_MODULES = {
    "internvit_cli.config": ("Recipe", "Status"),
    "internvit_cli.errors": ("ClosedError", "InternvitError", "OutputError", "UsageError"),
    "internvit_cli.storage.read.image": ("ImageFeatures", "SkippedImageError", "Tile"),
    "internvit_cli.storage.read.reader": ("Features", "UnknownKeyError", "open_features"),
    "internvit_cli.plan.tiling": ("Grid",),
    "internvit_cli.api.dataset": ("FeatureDataset", "collate_nested", "collate_padded"),
    "internvit_cli.api.extractor": ("Extractor",),
    "internvit_cli.api.stream": ("FeatureStream",),
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `internvit --help` does not load numpy."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("internvit-cli")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0.0.0"
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
