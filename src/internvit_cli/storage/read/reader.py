"""Read features lazily and without torch, with one view over a single file or a folder of shards.

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
from internvit_cli.model.placeholders import prompt_text, style_named
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
    from internvit_cli.model.chat_inputs import ChatInputs
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

    Slices, masks and arrays of positions give views of the same type, which share the index and read nothing.

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
        """Positions of the view's images in the index, [n] int64; None means all images."""
        self._layer = layer
        """The earlier layer of arrays; None means the main layer."""
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
        """Stop reading features from this view and all others of the same file.

        Closing is optional, because no file is open between reads. Keys and facts remain available.
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
        """Return an image by its key or its position, or a view of some images.

        Args:
            wanted: A key; a position, negative ones from the end; a slice; a boolean mask, [n]; positions; or keys.

        Raises:
            UnknownKeyError: There is no such key; a KeyError whose hint names similar keys.
            IndexError: There is no such position, or the mask has another length.
        """
        if isinstance(wanted, str):
            position = self._find(wanted)
            if position is None:
                raise self._unknown(wanted)
            return self._index.image(position, self._layer)
        if isinstance(wanted, (int, np.integer)):
            # A range avoids an array of all positions, which would make each access as expensive as a slice.
            positions = range(len(self)) if self._positions is None else self._positions
            return self._index.image(int(positions[wanted]), self._layer)
        return self.at(self._all_positions()[self._selector(wanted)])

    def get(self, key: str, default: Any = None) -> Any:
        """Return the image with a key, or the default if there is none."""
        position = self._find(key) if isinstance(key, str) else None
        return default if position is None else self._index.image(position, self._layer)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the newest shard: model, recipe, versions."""
        return dict(self._index.shards[-1].attributes) if self._index.shards else {}

    @property
    def recipe(self) -> Recipe:
        """The recipe of the features.

        Raises:
            OutputError: This version does not understand the recipe.
        """
        return stored_recipe(self.attributes, self.path)

    @property
    def stored(self) -> tuple[str, ...]:
        """The kinds of arrays that are stored for this view's layer, such as `pooled` and `visual_tokens`."""
        names = dict.fromkeys(name for shard in self._index.shards for name in shard.stored)
        return kinds_of_layer(names, self._layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layers, ascending; each is a number of blocks and an index into hidden_states."""
        return self.recipe.layers

    @property
    def layer(self) -> int:
        """The layer of arrays; the deepest one unless `at_layer` selected another."""
        return self.recipe.layer if self._layer is None else self._layer

    def at_layer(self, layer: int) -> Features:
        """Return a view of the same images with the arrays of another stored layer.

        Images, vectors and datasets from the view use that layer.

        Args:
            layer: One of `layers`, or a negative number that counts from the end of the model, as for `--layer`.

        Raises:
            UsageError: The layer is not stored.

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
        """The indexes of all shards."""
        return [shard.table for shard in self._index.shards]

    @property
    def shards(self) -> list[OpenShard]:
        """The shards, oldest first."""
        return self._index.shards

    def column(self, name: str) -> NDArray[Any]:
        """Return a fact about every image, [n]: `status`, `width`, `height`, `columns`, `rows`, `file_size`, ...

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
        """The positions of this view's images among all images of the output, [n] int64."""
        positions: NDArray[Any] = self._all_positions()
        return positions

    @property
    def places(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The shard index and the row of each image, [n] each."""
        positions = self._all_positions()
        return self._index.shard_of[positions], self._index.row_of[positions]

    def at(self, positions: NDArray[Any]) -> Features:
        """Return a view of the images at some positions among all images of the output."""
        return Features(self.path, self._index, positions, self._layer)

    def matching(self, *words: str) -> Features:
        """Return a view of the images that match keys or patterns, in the order of the words.

        Args:
            words: Keys, or patterns as for `internvit ls`: `*` matches any characters except a slash, `?` one of them,
                `[abc]` one of several characters, and `**` any number of folders.

        Raises:
            UnknownKeyError: A word matches no image.

        >>> list(open_features("feats.h5").matching("*.jpg", "cobbles.*"))
        ['lund.jpg', 'portrait.jpg', 'street.jpg', 'cobbles.webp']
        """
        found = find_wanted(words, self._keys(), self._place_of, self.path)
        return self.at(self._all_positions()[np.array(found, np.int64)])

    @property
    def done(self) -> Features:
        """A view of the images with features."""
        done: NDArray[Any] = self.column("status") == Status.DONE
        return self.at(self._all_positions()[done])

    def iter_tiles(self) -> Iterator[Tile]:
        """Yield the tiles of all images, one image at a time; `features.done.iter_tiles()` leaves out skipped images.

        Raises:
            SkippedImageError: An image has no features.

        >>> tile = next(open_features("feats.h5").iter_tiles())
        >>> tile.image.key, tile.place, tile.tokens.shape
        ('cobbles.webp', (0, 0), (256, 256))
        """
        for image in self.values():
            yield from image.iter_tiles()

    def pooled_matrix(self) -> tuple[list[str], NDArray[Any]]:
        """Return the keys and pooled vectors, [n, d] float32, of all images with features.

        If the rows are contiguous in one shard, the matrix is memory-mapped and read-only; otherwise it is a copy.
        `vectors()` never copies more than it is asked for.

        >>> keys, matrix = open_features("feats.h5").pooled_matrix()
        >>> matrix.shape
        (4, 64)
        """
        vectors = self.vectors()
        return vectors.keys, vectors[:]

    def to_transformers(self, keys: str | Sequence[str] | None = None, style: str | None = None) -> ChatInputs:
        """Return images as transformers' InternVLForConditionalGeneration takes them in place of `pixel_values`.

        Pass `inputs.mm_encoder_outputs` to `forward` or `generate`, with a prompt that contains `inputs.text`. For
        versions without that argument, pass `inputs.inputs_embeds(model, input_ids)`, which gives the same values.

        Args:
            keys: One or more images, in the order of the prompt; None means all images of this view.
            style: The labels in the text, as for `ImageFeatures.placeholder`; None means none for a single image, and
                `Image-1: ` and so on for several.

        Raises:
            OutputError: The tokens are not projected tokens.
            SkippedImageError: An image has no features.
            UnknownKeyError: There is no such image.
            UsageError: There are no images, or there is no such style.

        >>> inputs = open_features("chat.h5").to_transformers(["lund.jpg", "street.jpg"])
        >>> inputs.image_tokens.shape, inputs.token_count, inputs.text.count("<IMG_CONTEXT>")
        (torch.Size([26, 256, 48]), 6656, 6656)
        >>> [line[:14] for line in inputs.text.splitlines()]
        ['Image-1: <img>', 'Image-2: <img>']
        """
        from internvit_cli.model.chat_inputs import joined_inputs

        wanted = list(self) if keys is None else [keys] if isinstance(keys, str) else list(keys)
        if not wanted:
            raise UsageError("to_transformers needs at least one image", "give keys, such as [features[0].key]")
        images = [self[key] for key in wanted]
        tokens = [image.chat_tokens() for image in images]
        chosen = None if style is None else style_named(style)
        return joined_inputs(prompt_text([image.token_count for image in images], chosen), tokens)

    def vectors(self) -> PooledVectors:
        """Return the pooled vectors of all images with features, which are read on access."""
        positions = self._all_positions()
        done = positions[self._index.column("status")[positions] == Status.DONE]
        return PooledVectors(self._index, done, self._layer)

    def position(self, key: str) -> int:
        """Return the position of an image in this view.

        Raises:
            UnknownKeyError: The view does not contain the image.
        """
        found = self._place_of(os.fsencode(key))
        if found is None:
            raise self._unknown(key)
        return found

    # ------------------------------------------------------------------------------------------------------- the view

    def _all_positions(self) -> NDArray[Any]:
        return np.arange(len(self._index)) if self._positions is None else self._positions

    def _place_of(self, key: bytes) -> int | None:
        """Return the position of an image in this view; None if it is not in it."""
        found = self._find(os.fsdecode(key))
        return found if found is None or self._positions is None else int(self._view_places()[found])

    def _find(self, key: str) -> int | None:
        position = self._index.find(os.fsencode(key))
        if position is None or self._positions is None:
            return position
        return position if self._view_places()[position] >= 0 else None

    def _view_places(self) -> NDArray[Any]:
        """Return the position in this view for each image of the index; -1 if it is not in the view."""
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
        if array.shape == (0,):  # from an empty list, whose type is arbitrary
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
        path: The path of the output.
        layer: The stored layer of arrays, as for `Features.at_layer`; None means the deepest.

    Raises:
        OutputError: There is no output, it is damaged, or it has a newer format.
        UsageError: The layer is not stored.

    >>> open_features("feats.h5")
    <Features of 'feats.h5': 4 images, 34 tiles, pooled [4, 64] float32, visual_tokens [34, 256, 256] float16>
    """
    name = named_path(path)
    features = Features(name, RowIndex([OpenShard(shard) for shard in find_shards(name)]))
    return features if layer is None else features.at_layer(layer)


def bounded(features: Features, words: Sequence[str], most: int) -> Features:
    """Return the images that match keys and patterns, if they are not too many.

    Raises:
        UsageError: More than `most` images match, or a word matches none.
    """
    found = features.matching(*words)
    if len(found) > max(most, len(words)):
        raise UsageError(
            f"{len(found):,} images of {features.path} match, and {most:,} are the most",
            f"narrow the pattern: internvit ls {features.path} PATTERN lists what it matches",
        )
    return found


def find_shards(path: str) -> list[FinishedShard]:
    """Return the shards at a path: finished ones, or the partial file itself.

    Raises:
        OutputError: There is no output, it is damaged, or it has a newer format.
    """
    shards = [place.load() for place in find_places(path)]
    check_alike([(shard.path, shard.stored.specs) for shard in shards])
    return shards
