"""Reading features back: one view over a single file or a folder of shards, lazily, without torch.

>>> features = open_features("feats.h5")
>>> features["street.jpg"].visual_tokens.shape    # [tiles, 256, 4 * hidden_size]
(13, 256, 256)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import UsageError
from internvit_cli.options import named_path
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.runtime.words import counted
from internvit_cli.storage.format.layout import MODEL_LAYERS, stored_layer, stored_recipe
from internvit_cli.storage.format.soundness import check_alike
from internvit_cli.storage.read.image import (
    ImageFeatures,
    SkippedImageError,
    Tile,
    described_arrays,
    described_layer,
    kinds_of_layer,
)
from internvit_cli.storage.read.places import find_places
from internvit_cli.storage.read.row_index import PooledVectors, RowIndex
from internvit_cli.storage.read.shard import OpenShard
from internvit_cli.storage.read.wanted_keys import UnknownKeyError, find_wanted, unknown_key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from internvit_cli.config import Recipe
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.output import FinishedShard

__all__ = [
    "Features",
    "ImageFeatures",
    "OpenShard",
    "SkippedImageError",
    "Tile",
    "UnknownKeyError",
    "find_shards",
    "open_features",
]


class Features(Mapping[str, ImageFeatures]):
    """The images of a feature file or folder, by key, in the order in which they are stored.

    Slices, masks and arrays of positions give views of the same kind, which share the index and read nothing.

    >>> features = open_features("feats.h5")
    >>> list(features)
    ['cobbles.webp', 'lund.jpg', 'portrait.jpg', 'street.jpg']
    >>> list(features[1:3]), list(features[features.column("width") > 1000])
    (['lund.jpg', 'portrait.jpg'], ['lund.jpg', 'portrait.jpg'])
    >>> features["stre.jpg"]
    Traceback (most recent call last):
    internvit_cli.storage.read.wanted_keys.UnknownKeyError: feats.h5 has no image 'stre.jpg'; did you mean 'street.jpg'?
    """

    def __init__(
        self, path: str, index: RowIndex, positions: NDArray[Any] | None = None, layer: int | None = None
    ) -> None:
        self.path = path
        self._index = index
        self._positions = positions
        """Of the view's images in the index, [n] int64; None for all of them."""
        self._layer = layer
        """Which earlier layer arrays are of; None is the main one."""
        self._places: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self._index) if self._positions is None else len(self._positions)

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self._index.key(position)) for position in self._all_positions().tolist())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    def __repr__(self) -> str:
        done = self.column("status") == Status.DONE
        tiles = self.column("columns").astype(np.int64) * self.column("rows") + self.column("thumbnail")
        images, encoded = len(self), int(done.sum())
        facts = [counted(images, "image")]
        if encoded < images:
            facts.append(f"{encoded:,} done")
        facts.append(counted(int(tiles[done].sum()), "tile"))
        if self.shards:
            facts.append(described_arrays(self.shards[-1], int(tiles[done].sum()), encoded, layer=self._layer))
        layer = described_layer(self.recipe, self._layer) if self.shards else ""
        return f"<{type(self).__name__} of {self.path!r}: {', '.join(facts)}{layer}>"

    def close(self) -> None:
        """Refuse to read features from now on, of this view and of all others of the same file.

        Nothing has to be closed: between reads no file is open. Keys and facts stay.
        """
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __getitem__(self, wanted: str | int) -> ImageFeatures: ...
    @overload
    def __getitem__(self, wanted: slice | Sequence[Any] | NDArray[Any]) -> Features: ...
    def __getitem__(self, wanted: str | int | slice | Sequence[Any] | NDArray[Any]) -> ImageFeatures | Features:
        """One image by its key or its position, or a view of some of them.

        Args:
            wanted: a key; a position, negative ones from the end; a slice; a boolean mask, [n]; positions; or keys.

        Raises:
            UnknownKeyError: a KeyError whose hint names keys that are like it.
            IndexError: no such position, or a mask of another length.
        """
        if isinstance(wanted, str):
            position = self._find(wanted)
            if position is None:
                raise self._unknown(wanted)
            return self._index.image(position, self._layer)
        if isinstance(wanted, (int, np.integer)):
            # A range stands for all positions: an array of them would cost each access as much as a slice.
            positions = range(len(self)) if self._positions is None else self._positions
            return self._index.image(int(positions[wanted]), self._layer)
        return self.at(self._all_positions()[self._selector(wanted)])

    def get(self, key: str, default: Any = None) -> Any:
        """The image of a key, or the default when there is none."""
        position = self._find(key) if isinstance(key, str) else None
        return default if position is None else self._index.image(position, self._layer)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the newest shard: model, recipe, versions."""
        return dict(self._index.shards[-1].attributes) if self._index.shards else {}

    @property
    def recipe(self) -> Recipe:
        """What the features were made with.

        Raises:
            OutputError: a recipe that this version does not understand.
        """
        return stored_recipe(self.attributes, self.path)

    @property
    def stored(self) -> tuple[str, ...]:
        """What is stored of this view's layer, such as `pooled` and `visual_tokens`."""
        names = dict.fromkeys(name for shard in self._index.shards for name in shard.stored)
        return kinds_of_layer(names, self._layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layers, ascending: each is a number of blocks, as an index into hidden_states."""
        return self.recipe.layers

    @property
    def layer(self) -> int:
        """The layer that arrays are of; the deepest one, unless `at_layer` chose another."""
        return self.recipe.layer if self._layer is None else self._layer

    def at_layer(self, layer: int) -> Features:
        """A view of the same images with the arrays of another stored layer.

        Images, vectors and datasets that are made from the view are of that layer.

        Args:
            layer: one of `layers`, or a negative number that counts from the end of the model, as for `--layer`.

        Raises:
            UsageError: that layer is not stored.

        >>> features = open_features("layers.h5")    # of internvit extract --layer -2,-1, with a model of two blocks
        >>> features.layers, features.layer, features.at_layer(-2).layer
        ((1, 2), 2, 1)
        >>> features.at_layer(1)["street.jpg"].pooled.shape
        (64,)
        """
        model_layers = self.attributes.get(MODEL_LAYERS)
        found = stored_layer(layer, self.recipe, model_layers, self.path)
        return Features(self.path, self._index, self._positions, found)

    @property
    def tables(self) -> list[ImageTable]:
        """The index of every shard."""
        return [shard.table for shard in self._index.shards]

    @property
    def shards(self) -> list[OpenShard]:
        """Every shard, oldest first."""
        return self._index.shards

    def column(self, name: str) -> NDArray[Any]:
        """One fact of every image, [n]: `status`, `width`, `height`, `columns`, `rows`, `thumbnail`, `file_size`, ...

        >>> features = open_features("feats.h5")
        >>> [int(width) for width in features.column("width")]
        [400, 1024, 1200, 640]
        """
        if name not in {*COLUMN_DTYPES, "status"}:
            raise ValueError(f"images have no column {name!r}, but {', '.join([*COLUMN_DTYPES, 'status'])}")
        values: NDArray[Any] = self._index.column(name)[self._all_positions()]
        return values

    @property
    def positions(self) -> NDArray[Any]:
        """Where this view's images stand among all of the file's, [n] int64."""
        positions: NDArray[Any] = self._all_positions()
        return positions

    @property
    def places(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """For each image the number of its shard and of its row there, [n] each."""
        positions = self._all_positions()
        return self._index.shard_of[positions], self._index.row_of[positions]

    def at(self, positions: NDArray[Any]) -> Features:
        """A view of the images at some positions among all of the file's."""
        return Features(self.path, self._index, positions, self._layer)

    def matching(self, *words: str) -> Features:
        """A view of the images that keys or patterns mean, in the order of the words, and of the keys for a pattern.

        Args:
            words: keys, or patterns as `internvit ls` takes them: `*` stands for any characters but a slash, `?` for
                one, `[abc]` for one of some, and `**` for any number of folders.

        Raises:
            UnknownKeyError: a word that means no image.

        >>> list(open_features("feats.h5").matching("*.jpg", "cobbles.*"))
        ['lund.jpg', 'portrait.jpg', 'street.jpg', 'cobbles.webp']
        """
        found = find_wanted(words, self._keys(), self._place_of, self.path)
        return self.at(self._all_positions()[np.array(found, np.int64)])

    @property
    def done(self) -> Features:
        """A view of the images that have features."""
        done: NDArray[Any] = self.column("status") == Status.DONE
        return self.at(self._all_positions()[done])

    def iter_tiles(self) -> Iterator[Tile]:
        """The tiles of all images, one image at a time; `features.done.iter_tiles()` leaves out skipped images.

        Raises:
            SkippedImageError: an image that has no features.

        >>> tile = next(open_features("feats.h5").iter_tiles())
        >>> tile.image.key, tile.place, tile.tokens.shape
        ('cobbles.webp', (0, 0), (256, 256))
        """
        for image in self.values():
            yield from image.iter_tiles()

    def pooled_matrix(self) -> tuple[list[str], NDArray[Any]]:
        """Keys and pooled vectors, [n, d] float32, of all images that have one.

        Where the rows lie one after another in one shard the matrix is the file itself, mapped into memory and
        read-only; otherwise it is a copy. `vectors()` never copies more than it is asked for.

        >>> keys, matrix = open_features("feats.h5").pooled_matrix()
        >>> matrix.shape
        (4, 64)
        """
        vectors = self.vectors()
        return vectors.keys, vectors[:]

    def vectors(self) -> PooledVectors:
        """The pooled vectors of all images that have one, read when they are asked for."""
        positions = self._all_positions()
        done = positions[self._index.column("status")[positions] == Status.DONE]
        return PooledVectors(self._index, done, self._layer)

    def position(self, key: str) -> int:
        """Where an image stands in this view.

        Raises:
            UnknownKeyError: nowhere.
        """
        found = self._place_of(os.fsencode(key))
        if found is None:
            raise self._unknown(key)
        return found

    # ------------------------------------------------------------------------------------------------------- the view

    def _all_positions(self) -> NDArray[Any]:
        return np.arange(len(self._index)) if self._positions is None else self._positions

    def _place_of(self, key: bytes) -> int | None:
        """Where an image stands in this view; None where it is not in it."""
        found = self._find(os.fsdecode(key))
        return found if found is None or self._positions is None else int(self._view_places()[found])

    def _find(self, key: str) -> int | None:
        position = self._index.find(os.fsencode(key))
        if position is None or self._positions is None:
            return position
        return position if self._view_places()[position] >= 0 else None

    def _view_places(self) -> NDArray[Any]:
        """For each image of the index, its place in this view; -1 where it is not in it."""
        if self._places is None:
            self._places = np.full(len(self._index), -1)
            self._places[self._all_positions()] = np.arange(len(self))
        return self._places

    def _selector(self, wanted: slice | Sequence[Any] | NDArray[Any]) -> slice | NDArray[Any]:
        if isinstance(wanted, slice):
            return wanted
        if isinstance(wanted, Sequence) and wanted and all(isinstance(key, str) for key in wanted):
            return np.array([self.position(key) for key in wanted], np.int64)
        array = np.asarray(wanted)
        if array.shape == (0,):  # of an empty list, whose type says nothing
            array = array.astype(np.int64)
        if array.ndim != 1 or array.dtype.kind not in "biu":
            raise TypeError("images are chosen by a key, a position, a slice, a mask, or a list of keys or positions")
        return array

    def _unknown(self, key: str) -> UnknownKeyError:
        return unknown_key(key, self._keys(), self.path)

    def _keys(self) -> list[bytes]:
        return [self._index.key(position) for position in self._all_positions().tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_places": None}


def open_features(path: str | os.PathLike[str], layer: int | None = None) -> Features:
    """Open a feature file (`feats.h5`, also a `.partial` one) or a folder of shards (`feats/`).

    Args:
        path: where it is.
        layer: which of several stored layers arrays are of, as `Features.at_layer` takes it; None is the deepest.

    Raises:
        OutputError: there is nothing there, or it is damaged, or of a newer format.
        UsageError: that layer is not stored.

    >>> open_features("feats.h5")
    <Features of 'feats.h5': 4 images, 34 tiles, pooled [4, 64] float32, visual_tokens [34, 256, 256] float16>
    """
    name = named_path(path)
    features = Features(name, RowIndex([OpenShard(shard) for shard in find_shards(name)]))
    return features if layer is None else features.at_layer(layer)


def bounded(features: Features, words: Sequence[str], most: int) -> Features:
    """The images that keys and patterns mean, unless patterns mean more than is sensible.

    Raises:
        UsageError: they mean more than `most`, or one of them none.
    """
    found = features.matching(*words)
    if len(found) > max(most, len(words)):
        raise UsageError(
            f"{len(found):,} images of {features.path} match, and {most:,} are the most",
            f"narrow the pattern: internvit ls {features.path} PATTERN lists what it matches",
        )
    return found


def find_shards(path: str) -> list[FinishedShard]:
    """Return the shards at a path that a user names: finished ones, or the partial file itself.

    Raises:
        OutputError: there is nothing there, or it is damaged, or of a newer format.
    """
    shards = [place.load() for place in find_places(path)]
    check_alike([(shard.path, shard.stored.specs) for shard in shards])
    return shards
