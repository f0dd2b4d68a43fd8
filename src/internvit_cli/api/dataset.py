"""Provide stored features to PyTorch's DataLoader by image or by tile, and collate samples into batches.

>>> from torch.utils.data import DataLoader
>>> from internvit_cli import FeatureDataset, collate_padded
>>> dataset = FeatureDataset("feats.h5", skip=True)
>>> batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate_padded)))
>>> batch["tokens"].shape, batch["mask"].shape, batch["pooled"].shape
(torch.Size([4, 13, 256, 256]), torch.Size([4, 13]), torch.Size([4, 64]))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from internvit_cli.config import Status
from internvit_cli.errors import UsageError
from internvit_cli.runtime.words import counted
from internvit_cli.storage.format.layout import POOLED, TILE_POOLED, TOKEN_DATASETS
from internvit_cli.storage.read.reader import Features, open_features
from internvit_cli.storage.same_file import ReplacedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.storage.read.image import ImageFeatures

Sample = dict[str, Any]
TOKENS, MASK = "tokens", "mask"


class FeatureDataset(Dataset[Sample]):
    """Features of a file or folder as a map-style dataset.

    A sample by image is a dict of

    - `key`: str; `grid`: (columns, rows); `has_thumbnail`: bool
    - `tokens`: [tiles, T, C] in the stored type (bfloat16 too), if tokens are stored
    - `pooled`: [d] float32
    - `tile_pooled`: [tiles, d] float32, if stored

    A sample by tile has `key`, `tile` (its index in the image), `is_thumbnail`, `tokens` [T, C] and `tile_pooled` [d].

    Only paths and positions are pickled: each spawned worker opens the file when it reads its first sample, and refuses
    a file that was replaced in the meantime. Nothing stays open between reads, so forked workers share nothing.

    >>> tiles = FeatureDataset("feats.h5", by="tile")
    >>> len(tiles), tiles[0]["key"], tiles[0]["tokens"].shape
    (34, 'cobbles.webp', torch.Size([256, 256]))
    """

    def __init__(
        self,
        features: Features | str | os.PathLike[str],
        by: Literal["image", "tile"] = "image",
        *,
        skip: bool = False,
        arrays: Sequence[str] | None = None,
        layer: int | None = None,
    ) -> None:
        """Open features.

        Args:
            features: A feature file or folder, its path, or a view such as `features[:1000]`.
            by: Whether a sample is an image or a tile.
            skip: Whether to leave out images without features; otherwise reading one raises SkippedImageError.
            arrays: Which of `tokens`, `pooled` and `tile_pooled` a sample has; None means all that are stored.
            layer: The stored layer of the arrays, as for `Features.at_layer`; None means that of `features`, by default
                the deepest.

        Raises:
            OutputError: There is no output, or it is damaged.
            UsageError: An array or a layer is not stored, or samples are tiles but nothing is stored per tile.
        """
        if by not in {"image", "tile"}:
            raise UsageError(f"by={by!r}", "a sample is an 'image' or a 'tile'")
        opened = features if isinstance(features, Features) else open_features(features)
        opened = opened if layer is None else opened.at_layer(layer)
        self._layer = opened.layer
        self._path = os.path.abspath(opened.path)
        self._features: Features | None = opened.done if skip else opened
        self._positions = self._features.positions
        self._identity = _identity(opened)
        self._by_tile = by == "tile"
        self._arrays = choose_arrays(opened.stored, arrays, opened.path, by_tile=self._by_tile)
        counts = self._features.column("columns").astype(np.int64) * self._features.column("rows")
        counts += self._features.column("thumbnail")
        # An image without tiles has one sample too, which raises an error, so that the missing image is noticed.
        counts[self._features.column("status") != Status.DONE] = 1
        self._first_tile: NDArray[Any] = np.concatenate([[0], np.cumsum(counts)])

    @property
    def features(self) -> Features:
        """The images, which are opened in this process on first use."""
        if self._features is None:
            opened = open_features(self._path, self._layer)
            if _identity(opened) != self._identity:
                raise ReplacedError(self._path)
            self._features = opened.at(self._positions)
        return self._features

    def __repr__(self) -> str:
        what = counted(len(self), "tile" if self._by_tile else "image")
        return f"<{type(self).__name__} of {self._path!r}: {what}, each with {', '.join(self._arrays)}>"

    def __len__(self) -> int:
        return int(self._first_tile[-1]) if self._by_tile else len(self._first_tile) - 1

    def __getitem__(self, number: int) -> Sample:
        """Return one sample.

        Raises:
            IndexError: There is no such sample.
            SkippedImageError: The image has no features.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no sample {number} among {len(self)}")
        number %= len(self)
        if not self._by_tile:
            return self._image_sample(self.features[number])
        position = int(np.searchsorted(self._first_tile, number, side="right")) - 1
        return self._tile_sample(self.features[position], number - int(self._first_tile[position]))

    def _image_sample(self, image: ImageFeatures) -> Sample:
        facts = {"key": image.key, "grid": tuple(image.grid), "has_thumbnail": image.has_thumbnail}
        return facts | {name: image.to_torch(name) for name in self._arrays}

    def _tile_sample(self, image: ImageFeatures, tile: int) -> Sample:
        is_thumbnail = image.has_thumbnail and tile == image.tiles - 1
        facts = {"key": image.key, "tile": tile, "is_thumbnail": is_thumbnail}
        return facts | {name: image.to_torch(name, tile) for name in self._arrays}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_features": None}


def collate_padded(samples: Sequence[Sample]) -> Sample:
    """Collate samples of B images into a batch, with tiles padded with zeros to the largest number of tiles.

    Args:
        samples: Samples of `FeatureDataset(by="image")`; samples of tiles are stacked.

    Returns:
        `tokens` [B, tiles, T, C], `tile_pooled` [B, tiles, d], `pooled` [B, d]; `mask` [B, tiles] bool, True for tiles
        that exist; other entries as lists. As one sequence, the tokens are `tokens.flatten(1, 2)`, [B, tiles * T, C],
        with the mask `mask.repeat_interleave(T, 1)`.

    >>> dataset = FeatureDataset("feats.h5")
    >>> batch = collate_padded([dataset[2], dataset[3]])
    >>> batch["key"], batch["mask"].sum(1).tolist(), batch["tokens"].shape
    (['portrait.jpg', 'street.jpg'], [7, 13], torch.Size([2, 13, 256, 256]))
    """
    batch = _columns(samples)
    counts = _tile_counts(samples)
    for name, values in batch.items():
        if not isinstance(values[0], torch.Tensor):
            continue
        ragged = name in (TOKENS, TILE_POOLED) and counts is not None
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if ragged else torch.stack(values)
    if counts is not None:
        batch[MASK] = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return batch


def collate_nested(samples: Sequence[Sample], *, as_list: bool = False) -> Sample:
    """Collate samples of B images into a batch without padding.

    Args:
        samples: Samples of `FeatureDataset(by="image")`; samples of tiles are stacked.
        as_list: Whether to return lists of tensors instead of nested tensors, which some operations do not support.

    Returns:
        `tokens` nested [B, tiles*, T, C] (layout `torch.jagged`), `tile_pooled` nested [B, tiles*, d], `pooled`
        [B, d]; other entries as lists.

    >>> dataset = FeatureDataset("feats.h5")
    >>> batch = collate_nested([dataset[2], dataset[3]])
    >>> [tokens.shape[0] for tokens in batch["tokens"].unbind()]
    [7, 13]
    """
    batch = _columns(samples)
    is_ragged = _tile_counts(samples) is not None
    for name, values in batch.items():
        if not isinstance(values[0], torch.Tensor):
            continue
        if name not in (TOKENS, TILE_POOLED) or not is_ragged:
            batch[name] = torch.stack(values)
        elif not as_list:
            batch[name] = torch.nested.nested_tensor(values, layout=torch.jagged)
    return batch


def _columns(samples: Sequence[Sample]) -> dict[str, Any]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _tile_counts(samples: Sequence[Sample]) -> list[int] | None:
    """Return the number of tiles of each image; None if the samples are tiles, or have nothing per tile."""
    names = [name for name in (TOKENS, TILE_POOLED) if name in samples[0]]
    if "tile" in samples[0] or not names:
        return None
    return [len(sample[names[0]]) for sample in samples]


def choose_arrays(
    kinds: Iterable[str], wanted: Sequence[str] | None, path: str, *, by_tile: bool = False
) -> tuple[str, ...]:
    """Return the names of the arrays of a sample.

    Args:
        kinds: The kinds of stored arrays, such as `visual_tokens`.
        wanted: The names that the user wants; None means all.
        path: The output, for messages.
        by_tile: Whether a sample is a tile instead of an image.

    Raises:
        UsageError: A wanted array is not stored, or nothing is stored per tile.
    """
    stored = {TOKENS if name in TOKEN_DATASETS else name for name in kinds}
    possible = [name for name in (TOKENS, POOLED, TILE_POOLED) if name in stored and not (by_tile and name == POOLED)]
    for name in wanted or ():
        if name not in possible:
            raise UsageError(f"{path} has no {name} of {'tiles' if by_tile else 'images'}", _choices(possible))
    if by_tile and not possible:
        raise UsageError(f"{path} holds nothing per tile", "extract with --tokens or --tile-pooled")
    return tuple(possible if wanted is None else wanted)


def _choices(possible: Sequence[str]) -> str:
    return f"it has {', '.join(possible)}" if possible else "extract with --tokens or --tile-pooled"


def _identity(features: Features) -> list[tuple[int, ...]]:
    """Return the identity of the files, which differs from that of later files with the same names."""
    return [identity for shard in features.shards for identity in shard.identity]
