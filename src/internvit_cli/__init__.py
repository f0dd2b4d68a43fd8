"""internvit: folders of pictures in, InternViT features on disk.

```python
from internvit_cli import open_features

features = open_features("feats.h5")
features["cat.jpg"].visual_tokens
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvit_cli.storage.reader import Features, ImageFeatures, open_features

    __version__: str

__all__ = ["Features", "ImageFeatures", "__version__", "open_features"]


def __getattr__(name: str) -> Any:
    """Look up public names when they are first used: `internvit --help` needs neither numpy nor package metadata."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("internvit-cli")
        except PackageNotFoundError:  # run from a checkout that is not installed
            return "0.0.0"
    if name in __all__:
        from internvit_cli.storage import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
