"""internvit: folders of pictures in, InternViT features on disk.

from internvit_cli import open_features
features = open_features("feats.h5")
features["cat.jpg"].visual_tokens
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvit_cli.storage.reader import Features, ImageFeatures, open_features

__all__ = ["Features", "ImageFeatures", "__version__", "open_features"]

try:
    __version__ = version("internvit-cli")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    """Import the reader, and numpy with it, only when it is used: `internvit --help` needs neither."""
    if name in __all__:
        from internvit_cli.storage import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
