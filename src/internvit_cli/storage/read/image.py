"""Read the features of an image on demand, in the order and the types that a reader needs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from internvit_cli.config import Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import InternvitError, OutputError, UsageError
from internvit_cli.model.placeholders import placeholder, style_named, tokens_per_tile
from internvit_cli.plan.tiling import ONE_TILE, Grid, covered_box
from internvit_cli.runtime.words import listed
from internvit_cli.sources.members import shown
from internvit_cli.storage.format.layout import (
    POOLED,
    SCALE_DATASETS,
    TILE_POOLED,
    TOKEN_DATASETS,
    dataset_of,
    decode_values,
    feature_name,
    is_tokens,
    stored_layer,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import torch
    from numpy.typing import NDArray

    from internvit_cli.config import Recipe

FEATURE_NAMES = (POOLED, *TOKEN_DATASETS, TILE_POOLED)


class SkippedImageError(InternvitError):
    """An image has no features; the message gives the reason."""


class RowStore(Protocol):
    """The source of an image's rows: a shard on disk, or features in memory."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the rows."""
        ...

    @property
    def model_layers(self) -> int | None:
        """The number of blocks of the model; None if it is not known."""
        ...

    @property
    def stored(self) -> Collection[str]:
        """The names of the datasets that have rows."""
        ...

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a dataset as stored, [stop - start, ...]; the array belongs to the caller."""
        ...

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a row of a dataset."""
        ...

    def picture(self, row: int) -> bytes | None:
        """Return the path of an image's file; None for an image without a file."""
        ...

    def digest(self, row: int) -> bytes:
        """Return the SHA-256 of the file, 32 bytes; zeros if there is none."""
        ...

    def file_size(self, row: int) -> int:
        """Return the size of the file in bytes; 0 if there is none."""
        ...


@dataclass(frozen=True)
class ImageFeatures:
    """An image with its features. Arrays are read from the disk on access, and belong to the caller.

    >>> image = open_features("feats.h5")["street.jpg"]
    >>> image.grid, image.tiles, image.visual_tokens.shape
    (Grid(columns=4, rows=3), 13, (13, 256, 256))
    """

    key: str
    status: Status
    width: int
    """The width in pixels, after orientation."""
    height: int
    orientation: int
    """The EXIF orientation that was applied, 1 to 8; 0 if the header could not be read."""
    grid: Grid
    """The grid of tiles, (columns, rows)."""
    has_thumbnail: bool
    """Whether the last tile is the thumbnail."""
    _store: RowStore
    _row: int
    _first_tile: int
    reason: str = ""
    """Why an image in memory has no features; files have the reasons in their list of skipped images."""
    _layer: int | None = None
    """The earlier layer of its arrays; None means the main layer."""

    def __repr__(self) -> str:
        what = f"<{type(self).__name__} {self.key!r}: {self.status}"
        if not self.is_done:
            return f"{what} ({self.reason})>" if self.reason else f"{what}>"
        tiles = f"{self.grid.columns} x {self.grid.rows} tiles" + self.has_thumbnail * " and a thumbnail"
        size = f"{self.width} x {self.height} pixels"
        arrays = described_arrays(self._store, self.tiles, layer=self._layer)
        return f"{what}, {size}, {tiles}, {arrays}{described_layer(self.recipe, self._layer)}>"

    @property
    def tiles(self) -> int:
        """The number of tiles, including the thumbnail."""
        return self.grid.columns * self.grid.rows + self.has_thumbnail

    @property
    def is_done(self) -> bool:
        """Whether the image has features."""
        return self.status is Status.DONE

    @property
    def recipe(self) -> Recipe:
        """The recipe of its features."""
        return self._store.recipe

    @property
    def path(self) -> str | None:
        """The path of its picture when it was encoded; None for an image without a file.

        For a member of an archive, that is the path of the archive, a slash, and the member's name.
        """
        place = self.place
        return None if place is None else os.fsdecode(shown(place))

    @property
    def place(self) -> bytes | None:
        """The path of its picture, or the address of an archive's member, for `sources.members.open_place`."""
        return self._store.picture(self._row)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of its picture's file, 32 bytes; zeros if there is none."""
        return self._store.digest(self._row)

    @property
    def file_size(self) -> int:
        """The size of its picture's file in bytes when it was encoded; 0 if there is none."""
        return self._store.file_size(self._row)

    # ---------------------------------------------------------------------------------------------------------- layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layers, ascending; each is a number of blocks and an index into hidden_states."""
        return self.recipe.layers

    @property
    def layer(self) -> int:
        """The layer of the arrays; the deepest one unless `at_layer` selected another."""
        return self.recipe.layer if self._layer is None else self._layer

    def at_layer(self, layer: int) -> ImageFeatures:
        """Return the same image with the arrays of another stored layer.

        Args:
            layer: One of `layers`, or a negative number that counts from the end of the model, as for `--layer`.

        Raises:
            UsageError: The layer is not stored.
        """
        found = stored_layer(layer, self.recipe, self._store.model_layers, repr(self.key))
        return replace(self, _layer=found)

    # ------------------------------------------------------------------------------------------------------- as stored

    @property
    def pooled(self) -> NDArray[Any]:
        """The vector of the whole image, [d] float32."""
        vector: NDArray[Any] = self._store.rows(self._dataset(POOLED), self._row, self._row + 1)[0]
        return vector

    @property
    def visual_tokens(self) -> NDArray[Any]:
        """Visual tokens, [tiles, 256, 4 * hidden_size], row by row; bfloat16, int8 and fp8 are read as float32."""
        return self._tokens(Tokens.VISUAL)

    @property
    def patch_tokens(self) -> NDArray[Any]:
        """Patch tokens, [tiles, 1024, hidden_size], row by row."""
        return self._tokens(Tokens.PATCH)

    @property
    def projected_tokens(self) -> NDArray[Any]:
        """Projected tokens, [tiles, 256, llm_hidden_size], row by row."""
        return self._tokens(Tokens.PROJECTED)

    @property
    def tokens(self) -> NDArray[Any]:
        """The tokens of the kind that the file holds."""
        return self._tokens(self._kind)

    @property
    def tile_pooled(self) -> NDArray[Any]:
        """One vector per tile, [tiles, d] float32."""
        return self._tile_rows(TILE_POOLED, 0, self.tiles)

    # ------------------------------------------------------------------------------------------------ over the picture

    @property
    def covered(self) -> tuple[float, float, float, float]:
        """The part of the picture that its tokens cover: left, top, right, bottom, in pixels after orientation.

        That is the whole picture, except with `--preprocess clip`, which crops the center.
        """
        recipe = self.recipe
        return covered_box(self.width, self.height, recipe.preprocess, recipe.tile_size)

    def token_map(self) -> NDArray[Any]:
        """Return the tokens at their places on the picture, with the tiles joined and without the thumbnail.

        Returns:
            [rows * s, columns * s, C], where a tile has s * s tokens: s is 16 for visual and projected tokens of
            448-px tiles, 32 for patch tokens. The map covers the part of the picture that `covered` gives, which is the
            whole picture except with `--preprocess clip`.

        >>> open_features("feats.h5")["street.jpg"].token_map().shape
        (48, 64, 256)
        """
        return stitch(self._tokens(self._kind, 0, self.grid.columns * self.grid.rows), self.grid)

    def thumbnail_map(self) -> NDArray[Any]:
        """Return the tokens of the view of the whole picture, [s, s, C]: the thumbnail, or the only tile.

        Raises:
            OutputError: There are several tiles, but no thumbnail (`--no-thumbnail`).

        >>> open_features("feats.h5")["street.jpg"].thumbnail_map().shape
        (16, 16, 256)
        """
        if self.is_done and self.tiles > 1 and not self.has_thumbnail:
            raise OutputError(f"{self.key!r} has no thumbnail", "extract without --no-thumbnail, or use token_map()")
        return stitch(self._tokens(self._kind, self.tiles - 1, self.tiles), ONE_TILE)

    def tile_tokens(self, tile: int) -> NDArray[Any]:
        """Return the tokens of a tile, [T, C], row by row."""
        tokens: NDArray[Any] = self._tokens(self._kind, tile, tile + 1)[0]
        return tokens

    def iter_tiles(self) -> Iterator[Tile]:
        """Yield the tiles row by row, with the thumbnail last; all tokens are read at once."""
        tokens = self.tokens if self._kind is not Tokens.NONE else [None] * self.tiles
        vectors = self.tile_pooled if self.recipe.tile_pooled else [None] * self.tiles
        for number, (tile_tokens, vector) in enumerate(zip(tokens, vectors, strict=True)):
            yield Tile(self, number, tile_tokens, vector)

    # ------------------------------------------------------------------------------------------------ in a chat model

    @property
    def token_count(self) -> int:
        """The number of tokens that the image has in a chat model: 256 per tile of 448 pixels, thumbnail included.

        Raises:
            SkippedImageError: The image has no features.
            UsageError: Its tiles do not divide into visual tokens.
        """
        self._refuse_skipped()
        return self.tiles * tokens_per_tile(self.recipe.tile_size)

    def placeholder(self, style: str = "plain", number: int = 1) -> str:
        """Return the text that stands for the image in a prompt: `<img>`, one `<IMG_CONTEXT>` per token, `</img>`.

        Args:
            style: The label before it: `plain` for none, `image` for `Image-1: `, `frame` for `Frame-1: `, or
                `old-frame` for `Frame1: `.
            number: The number of the image or frame in the prompt, from 1.

        Raises:
            SkippedImageError: The image has no features.
            UsageError: There is no such style, or tiles do not divide into visual tokens.

        >>> image = open_features("feats.h5")["street.jpg"]
        >>> image.tiles, image.token_count
        (13, 3328)
        >>> text = image.placeholder("image", number=2)
        >>> text[:27], text.count("<IMG_CONTEXT>"), text[-6:]
        ('Image-2: <img><IMG_CONTEXT>', 3328, '</img>')
        """
        return placeholder(self.token_count, style_named(style), number)

    def chat_tokens(self) -> torch.Tensor:
        """Return projected tokens as a CPU tensor [tiles, T, llm_hidden_size], in the order of the chat model.

        That order is row by row, except in old chat models (`ps_version` v1), which read tiles column by column.
        The type is that of `to_torch`.

        Raises:
            OutputError: The file holds no projected tokens.
            SkippedImageError: The image has no features.
        """
        self._refuse_skipped()
        kind = self.recipe.tokens
        if kind is not Tokens.PROJECTED:
            raise OutputError(
                f"a chat model takes projected tokens, but the tokens of {self.key!r} are: {kind.value}",
                "internvit project OUT NEW --model CHAT projects visual tokens; or extract with --tokens projected",
            )
        return self.to_torch(kind.dataset, model_order=True)

    # --------------------------------------------------------------------------------------------------------- tensors

    def to_torch(self, name: str = "tokens", tile: int | None = None, *, model_order: bool = False) -> torch.Tensor:
        """Return an array as a CPU tensor of the stored type; bfloat16 is kept, int8 and fp8 become float32.

        Args:
            name: `tokens`, `visual_tokens`, `patch_tokens`, `projected_tokens`, `pooled` or `tile_pooled`.
            tile: The tile to return, without the axis of tiles; None means all tiles.
            model_order: Whether tokens keep the order in which their chat model reads them, which is column by column
                in old ones (`ps_version` v1); otherwise they are row by row.

        >>> open_features("feats.h5")["street.jpg"].to_torch().dtype
        torch.float16
        """
        from internvit_cli.model.tensors import as_tensor

        if name == POOLED:
            return as_tensor(self.pooled, StoreDtype.FLOAT32)
        start, stop = (0, self.tiles) if tile is None else (tile, tile + 1)
        if name == TILE_POOLED:
            tensor = as_tensor(self._tile_rows(name, start, stop), StoreDtype.FLOAT32)
        else:
            if name != "tokens" and name not in TOKEN_DATASETS:
                raise UsageError(f"an image has no {name!r}", f"it may have {', '.join(('tokens', *FEATURE_NAMES))}")
            kind = self._kind if name == "tokens" else Tokens(name.removesuffix("_tokens"))
            tensor = self._token_tensor(kind, start, stop, as_stored=model_order)
        return tensor if tile is None else tensor[0]

    def _token_tensor(self, kind: Tokens, start: int, stop: int, *, as_stored: bool = False) -> torch.Tensor:
        """Return tokens as a tensor, [tiles, T, C], row by row unless they are wanted in the stored order."""
        from internvit_cli.model.tensors import as_tensor

        dtype = self.recipe.store_dtype
        if dtype.is_scaled:
            return as_tensor(self._tokens(kind, start, stop, as_stored=as_stored), StoreDtype.FLOAT32)
        return as_tensor(self._of_tokens(kind, kind.dataset, start, stop, as_stored=as_stored), dtype)

    # ------------------------------------------------------------------------------------------------------- the rows

    @property
    def _kind(self) -> Tokens:
        return self._store.recipe.tokens

    def _tokens(
        self, kind: Tokens, start: int = 0, stop: int | None = None, *, as_stored: bool = False
    ) -> NDArray[Any]:
        stop = self.tiles if stop is None else stop
        dtype = self.recipe.store_dtype
        stored = self._of_tokens(kind, kind.dataset, start, stop, as_stored=as_stored)
        scales = (
            self._of_tokens(kind, kind.scales_dataset, start, stop, as_stored=as_stored) if dtype.is_scaled else None
        )
        return decode_values(stored, dtype, scales)

    def _of_tokens(self, kind: Tokens, name: str, start: int, stop: int, *, as_stored: bool = False) -> NDArray[Any]:
        """Return a dataset of tokens, [tiles, T, ...], row by row or in the stored order, which is the model's."""
        values = self._tile_rows(name, start, stop)
        if not as_stored and kind is not Tokens.PATCH and self.recipe.token_order is TokenOrder.V1:
            side = math.isqrt(values.shape[1])
            by_column = values.reshape(-1, side, side, *values.shape[2:])
            values = by_column.swapaxes(1, 2).reshape(values.shape)
        return values

    def _tile_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._store.rows(self._dataset(name), self._first_tile + start, self._first_tile + stop)

    def _dataset(self, kind: str) -> str:
        """Return the dataset with the image's rows of a kind.

        Raises:
            SkippedImageError: The image has no features.
            OutputError: No such rows are stored.
        """
        self._refuse_skipped()
        name = dataset_of(kind, self._layer)
        if name not in self._store.stored:
            holdings = ", ".join(sorted(self._store.stored))
            what = "tokens" if kind == Tokens.NONE.dataset else name
            raise OutputError(f"the file holds no {what}", f"it holds {holdings}")
        return name

    def _refuse_skipped(self) -> None:
        if not self.is_done:
            why = f" ({self.reason})" if self.reason else ""
            what = f"{self.key!r} has no features: {self.status.word}{why}"
            raise SkippedImageError(what, "features[key].status tells")


@dataclass(frozen=True)
class Tile:
    """A tile of an image with its features."""

    image: ImageFeatures
    number: int
    """The index of the tile from 0, row by row."""
    tokens: NDArray[Any] | None
    """Tokens [T, C], row by row; bfloat16, int8 and fp8 are read as float32. None if no tokens are stored."""
    pooled: NDArray[Any] | None
    """The vector of the tile, [d] float32; None without `--tile-pooled`."""

    def __repr__(self) -> str:
        place = self.place
        where = "the thumbnail" if place is None else f"column {place[0]}, row {place[1]}"
        arrays = {"tokens": self.tokens, "pooled": self.pooled}
        shapes = [f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items() if array is not None]
        return f"<{type(self).__name__} {self.number} of {self.image.key!r}: {', '.join([where, *shapes])}>"

    @property
    def is_thumbnail(self) -> bool:
        """Whether the tile is the thumbnail."""
        return self.image.has_thumbnail and self.number == self.image.tiles - 1

    @property
    def place(self) -> tuple[int, int] | None:
        """The (column, row) in the grid; None for the thumbnail."""
        row, column = divmod(self.number, self.image.grid.columns)
        return None if self.is_thumbnail else (column, row)


def described_arrays(store: RowStore, tiles: int, images: int | None = None, *, layer: int | None = None) -> str:
    """Describe the arrays of one or more images, with their shapes and stored types.

    A description must not fail, so it says if a file cannot be read any more.

    Args:
        store: The source of the rows.
        tiles: The number of tiles of all images together.
        images: The number of images; None means a single image, whose vector has one axis.
        layer: The earlier layer to describe; None means the main layer.
    """
    try:
        shapes = {kind: store.row_shape(dataset_of(kind, layer)) for kind in kinds_of_layer(store.stored, layer)}
        dtype = store.recipe.store_dtype.value
    except (InternvitError, ValueError) as error:
        return f"arrays that cannot be read: {error}"
    words = []
    for kind, row in shapes.items():
        if kind in SCALE_DATASETS:
            continue
        first = [tiles] if kind != POOLED else [] if images is None else [images]
        words.append(f"{kind} {[*first, *row]} {dtype if is_tokens(kind) else 'float32'}")
    return ", ".join(words)


def described_layer(recipe: Recipe, layer: int | None) -> str:
    """Return the end of a description that names the layer; empty if there is only one layer."""
    if not recipe.earlier_layers:
        return ""
    return f", of layer {recipe.layer if layer is None else layer} (stored: {listed(recipe.layers)})"


def kinds_of_layer(names: Iterable[str], layer: int | None) -> tuple[str, ...]:
    """Return the kinds of rows in datasets of a layer, such as `pooled`; None means the main layer."""
    found = map(feature_name, names)
    return tuple(name.kind for name in found if name.layer == layer)


def stitch(tokens: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """Join the tokens of a grid's tiles, as they are on the picture.

    Args:
        tokens: [columns * rows, s * s, C], tiles and their tokens row by row.
        grid: The grid of the tiles.

    Returns:
        [rows * s, columns * s, C].
    """
    side = math.isqrt(tokens.shape[1])
    tiles = tokens.reshape(grid.rows, grid.columns, side, side, tokens.shape[2])
    stitched: NDArray[Any] = tiles.swapaxes(1, 2).reshape(grid.rows * side, grid.columns * side, tokens.shape[2])
    return stitched
