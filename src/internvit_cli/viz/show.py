"""Draw figures of the tokens of images, for `internvit show`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Preprocess, TokenMapKind, Tokens
from internvit_cli.errors import UsageError, one_line
from internvit_cli.model.caveats import caveats
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.storage.durable import folder_for, write_file
from internvit_cli.storage.read.reader import Features, SkippedImageError, bounded, open_features
from internvit_cli.viz.draw.figure import Panel, figure
from internvit_cli.viz.draw.png import encode_png
from internvit_cli.viz.maps import (
    MapFit,
    TokenMap,
    evenly_spread,
    fit_maps,
    similarity_map,
    similarity_scale,
    tile_pattern,
)
from internvit_cli.viz.panels import Canvas, mark_outliers, mark_point, outlier_caption
from internvit_cli.viz.photograph import Photograph, PictureFile, read_photographs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.viz.draw.palette import Scale

MOST_IMAGES = 100
"""Largest number of images that patterns of keys may match."""
PATTERN_TILES = 256
"""Number of tiles of the whole file from which the position-dependent part of tokens is computed."""
LONGEST_CAPTION = 60
"""Longest key in a caption, in characters."""
LONGEST_NAME = 200
"""Longest file name in bytes; filesystems allow 255."""


@dataclass(frozen=True, slots=True)
class ShowOptions:
    """The options of a drawing."""

    path: str
    keys: Sequence[str]
    """Keys of images and patterns of keys."""
    maps: Sequence[TokenMapKind] = ()
    """The maps to draw; empty for all that the output allows."""
    point: tuple[float, float] | None = None
    """x and y in pixels of the first image after orientation."""
    foreground: bool = False
    position: bool = True
    """Whether to keep the part of tokens that depends on their position in the tile."""
    raw: bool = False
    """Whether to use plain cosines without subtracting the mean."""
    opacity: float = 0.75
    size: int = 640
    """The longer side of a map in pixels."""
    pictures: str | None = None
    """The folder that holds the pictures; None means where they were when they were encoded."""
    layer: int | None = None
    """The stored layer to draw; None means the deepest."""

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise UsageError(f"--opacity {self.opacity} is not from 0 to 1", "give a value such as 0.75")
        if TokenMapKind.SIMILARITY in self.maps and self.point is None:
            raise UsageError("--map similarity needs --point", "name a pixel of the picture, such as --point 320,240")


@dataclass(frozen=True, slots=True)
class FigureResult:
    """The figure of an image."""

    key: str
    panels: tuple[Panel, ...]
    figure: Image.Image
    facts: dict[str, Any]
    """For --json."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class _ReferenceToken:
    """The token with which all others are compared."""

    one: NDArray[Any]
    center: NDArray[Any] | None
    token: tuple[int, int]
    """The row and column in the map of the first image."""
    scale: Scale = field(init=False)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of the named images, which are drawn during iteration."""

    shown: Iterator[FigureResult]
    skipped: tuple[str, ...]
    """Keys of images without features, which have no figure."""
    notes: tuple[str, ...]
    """Warnings for the reader."""

    def __iter__(self) -> Iterator[FigureResult]:
        return self.shown


def show(options: ShowOptions, observer: Observer = SILENT) -> Figures:
    """Draw the named images, one after the other.

    Args:
        options: What to draw, and how.
        observer: Receives progress.

    Raises:
        UsageError: A key, a layer or a point does not exist, or the output does not allow a map.
        SkippedImageError: None of the images has features.
    """
    with observer.phase("reading the output"):
        features = open_features(options.path, options.layer)
    if not options.keys:
        first = f", such as {one_line(next(iter(features)))}" if len(features) else ""
        raise UsageError("no keys given", f"name one or more images of {options.path}{first}")
    images = list(bounded(features, options.keys, MOST_IMAGES).values())
    done = [image for image in images if image.is_done]
    if not done:
        raise SkippedImageError(
            f"{images[0].key!r} has no features: {images[0].status.word}",
            f"internvit ls -l {options.path} lists the images by status",
        )
    with observer.phase("fitting colors"):
        drawing = _Drawing(options, features, done)
    skipped = tuple(image.key for image in images if not image.is_done)
    return Figures(_drawn(drawing, done, options, observer), skipped, caveats(features))


def _drawn(
    drawing: _Drawing, images: list[ImageFeatures], options: ShowOptions, observer: Observer
) -> Iterator[FigureResult]:
    files = [PictureFile.of(image, options.pictures) for image in images]
    photographs = read_photographs(files, 2 * options.size)
    with observer.phase("drawing", "image", len(images)) as phase:
        for number, (image, photograph) in enumerate(zip(images, photographs, strict=True), 1):
            yield drawing.draw(image, photograph)
            phase.at(number)


class _Drawing:
    """What all figures of a command share."""

    def __init__(self, options: ShowOptions, features: Features, images: list[ImageFeatures]) -> None:
        self._options = options
        self._model = "; ".join(caveats(features)) or str(features.attributes.get("model", ""))
        self._images = images
        self._maps = _choose_maps(options, images)
        self._fitted: MapFit | None = None
        self._compared: _ReferenceToken | None = None
        self._pattern: NDArray[Any] | None = None
        if set(self._maps) - {TokenMapKind.TILES}:
            if not options.position:
                self._pattern = tile_pattern(_sampled_tiles(features.done))
            count = len(images)
            self._fitted = fit_maps((self._token_map(image) for image in images), count, foreground=options.foreground)
        if TokenMapKind.SIMILARITY in self._maps:
            self._compared = self._chosen_token()

    def draw(self, image: ImageFeatures, photograph: Photograph) -> FigureResult:
        """Draw the figure of an image."""
        options = self._options
        canvas = Canvas.of(image, photograph.picture, options.size, options.opacity)
        facts: dict[str, Any] = {"photograph": photograph.note if photograph.problem else "as it was encoded"}
        panels = []
        if TokenMapKind.TILES in self._maps:
            panels.append(_tiles_panel(image, canvas, photograph))
        if self._fitted is not None:
            panels += self._token_panels(image, canvas, self._fitted, facts)
        notes = [f"the picture of {one_line(image.key)} is not shown: {photograph.note}"] if photograph.problem else []
        if image.recipe.tokens is Tokens.NONE:
            notes.append(f"{options.path} holds no tokens, so only the tiles are drawn (extract with --tokens visual)")
        sheet = figure(image.key, _facts_line(image, self._model), panels)
        return FigureResult(image.key, tuple(panels), sheet, facts, tuple(notes))

    def _token_panels(
        self, image: ImageFeatures, canvas: Canvas, fitted: MapFit, facts: dict[str, Any]
    ) -> Iterator[Panel]:
        tokens = self._token_map(image)
        mask = fitted.mask(tokens)
        if mask is not None:
            facts["foreground"] = float(mask.mean())
        if TokenMapKind.PCA in self._maps:
            title = "principal components" + (" of the foreground" if mask is not None else "")
            yield Panel(
                TokenMapKind.PCA.value,
                title,
                canvas.overlay(fitted.colors(tokens), mask),
                self._component_captions(fitted),
                meaning="Similar tokens have similar colors in all images of this command.",
            )
        if TokenMapKind.LENGTH in self._maps:
            yield _length_panel(canvas, fitted, tokens, facts)
        if self._compared is not None:
            yield self._similarity_panel(image, canvas, tokens, facts)
        if TokenMapKind.THUMBNAIL in self._maps and image.has_thumbnail:
            colors = "in the same colors as the principal components"
            whole = TokenMap.of(image.thumbnail_map(), self._pattern)
            yield Panel(
                TokenMapKind.THUMBNAIL.value,
                "thumbnail: the whole picture at once",
                canvas.overlay(fitted.colors(whole), fitted.mask(whole)),
                (f"the last tile, {colors}",),
                meaning=f"The tokens of the last tile, which shows the whole picture, {colors}.",
            )

    def _component_captions(self, fitted: MapFit) -> tuple[str, ...]:
        red, green, blue = (f"{100 * share:.0f} %" for share in fitted.explained)
        together = "" if len(self._images) == 1 else f", fitted to {counted(len(self._images), 'image')}"
        without = "" if self._options.position else ", position in the tile subtracted"
        return (f"red {red}, green {green}, blue {blue} of the variance{together}{without}",)

    def _similarity_panel(self, image: ImageFeatures, canvas: Canvas, tokens: TokenMap, facts: dict[str, Any]) -> Panel:
        chosen = self._compared
        assert chosen is not None
        cosines = similarity_map(tokens, chosen.one, chosen.center)
        picture = canvas.overlay(chosen.scale.colors(cosines))
        is_first = image.key == self._images[0].key
        best = chosen.token if is_first else divmod(int(cosines.argmax()), cosines.shape[1])
        mark_point(picture, *canvas.center(cosines.shape, *best))
        x, y = self._options.point or (0, 0)
        cross = "the cross: that token" if is_first else f"the cross: the best match, {cosines.max():.2f}"
        whose = () if is_first else (f"a token of {_shortened(self._images[0].key)}",)
        facts["similarity"] = {"row": int(best[0]), "column": int(best[1]), "highest": float(cosines.max())}
        how = "plain cosine" if chosen.center is None else "cosine, mean token subtracted"
        title = f"similarity to the token at {x:g}, {y:g}"
        meaning = "The more similar a token is to the chosen one, the nearer its color is to the right end."
        return Panel(TokenMapKind.SIMILARITY.value, title, picture, (*whose, f"{how}; {cross}"), chosen.scale, meaning)

    def _chosen_token(self) -> _ReferenceToken:
        """Return the token at the point, and the color scale of similarity to it over all images."""
        assert self._options.point is not None and self._fitted is not None
        tokens = self._token_map(self._images[0])
        row, column = token_at(self._images[0], self._options.point, tokens.lengths.shape)
        center = None if self._options.raw else self._fitted.mean
        chosen = _ReferenceToken(tokens.directions[row, column], center, (row, column))
        cosines = [similarity_map(self._token_map(image), chosen.one, center) for image in self._images]
        chosen.scale = similarity_scale(cosines, centered=center is not None)
        return chosen

    def _token_map(self, image: ImageFeatures) -> TokenMap:
        return TokenMap.of(image.token_map(), self._pattern)


def token_at(image: ImageFeatures, point: tuple[float, float], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the row and column of the token at a point of the upright picture, in pixels.

    Raises:
        UsageError: The point is outside of what was encoded.
    """
    left, top, right, bottom = image.covered
    x, y = point
    if not (left <= x < right and top <= y < bottom):
        raise UsageError(
            f"--point {x:g},{y:g} is outside the encoded part of {one_line(image.key)}",
            f"give x from {left:g} to {right:g} and y from {top:g} to {bottom:g}",
        )
    height, width = shape
    return int((y - top) / (bottom - top) * height), int((x - left) / (right - left) * width)


def _shortened(key: str) -> str:
    """Return a key for a caption, shortened to its beginning and its end, which usually identifies it."""
    key = one_line(key, limit=None)
    return key if len(key) <= LONGEST_CAPTION else f"{key[: LONGEST_CAPTION // 3]}...{key[-2 * LONGEST_CAPTION // 3 :]}"


def file_name(key: str, kind: str = "show") -> str:
    """Return a file name for a key's figure; different keys have different names.

    Args:
        key: The key of the image.
        kind: One word for what the file shows.
    """
    flat = key.replace("/", "__")
    safe = "".join(char if char.isprintable() else "_" for char in flat)
    kept = os.fsencode(safe)[:LONGEST_NAME].decode("utf-8", "ignore")
    is_exact = kept == flat and "__" not in key and not key.startswith(".")
    # A digest keeps names different if characters were replaced.
    mark = "" if is_exact else "-" + hashlib.sha256(os.fsencode(key)).hexdigest()[:8]
    return f"{kept.lstrip('.')}{mark}.{kind}.png"


def save_png(image: Image.Image, path: str) -> None:
    """Write a picture completely or not at all, and create its folder if needed.

    Raises:
        InternvitError: The picture cannot be written.
    """
    with folder_for(path):
        write_file(path, encode_png(image))


def _choose_maps(options: ShowOptions, images: list[ImageFeatures]) -> list[TokenMapKind]:
    """Return the requested maps, or all that the output allows."""
    kind = images[0].recipe.tokens
    wanted = list(options.maps) or [
        one for one in TokenMapKind if one is not TokenMapKind.SIMILARITY or options.point is not None
    ]
    if kind is not Tokens.NONE:
        return wanted
    asked = set(options.maps) - {TokenMapKind.TILES}
    if asked or options.point is not None or options.foreground:
        raise UsageError(
            f"{options.path} holds no tokens, only one vector per image", "extract with --tokens visual or patch"
        )
    return [TokenMapKind.TILES]


def _sampled_tiles(features: Features) -> Iterator[NDArray[Any]]:
    """Yield the tokens of evenly spread tiles, [T, C] each, without thumbnails."""
    counts = features.column("columns").astype(np.int64) * features.column("rows")
    first = np.concatenate([[0], np.cumsum(counts)])
    for tile in evenly_spread(int(first[-1]), PATTERN_TILES).tolist():
        position = int(np.searchsorted(first, tile, side="right")) - 1
        yield features[position].tile_tokens(tile - int(first[position]))


def _length_panel(canvas: Canvas, fitted: MapFit, tokens: TokenMap, facts: dict[str, Any]) -> Panel:
    lengths = tokens.lengths
    picture = canvas.overlay(fitted.lengths.colors(lengths))
    mark_outliers(canvas, picture, lengths > fitted.outlier)
    facts["lengths"] = {
        "median": float(np.median(lengths)),
        "highest": float(lengths.max()),
        "outliers": int((lengths > fitted.outlier).sum()),
        "outlier_above": fitted.outlier,
    }
    captions = (outlier_caption(lengths, fitted.outlier),)
    title = "length of tokens (L2 norm)"
    meaning = (
        "The length of each token as a vector; a few tokens are far longer, and rarely describe what is at their place."
    )
    return Panel(TokenMapKind.LENGTH.value, title, picture, captions, fitted.lengths, meaning)


def _tiles_panel(image: ImageFeatures, canvas: Canvas, photograph: Photograph) -> Panel:
    captions = _tile_captions(image)
    if photograph.problem:
        captions = (*captions, f"The picture is not shown: {photograph.problem}")
    meaning = "The picture with the tiles that the encoder saw, numbered in the stored order."
    return Panel(TokenMapKind.TILES.value, "tiles", canvas.tiles(), captions, meaning=meaning)


def _tile_captions(image: ImageFeatures) -> tuple[str, ...]:
    if image.recipe.preprocess is Preprocess.CLIP:
        return ("one tile: the center of the picture",)
    if image.tiles == 1:
        return ("one tile: the whole picture",)
    thumbnail = ", and the whole picture as a thumbnail" if image.has_thumbnail else ""
    return (f"{image.grid.columns} x {image.grid.rows} tiles of {image.recipe.tile_size} px{thumbnail}",)


def _facts_line(image: ImageFeatures, model: str) -> str:
    turned = f", turned by EXIF {image.orientation}" if image.orientation > 1 else ""
    tokens = "" if image.recipe.tokens is Tokens.NONE else f"; {image.recipe.tokens.value} tokens"
    layer = f"; layer {image.layer}" if len(image.layers) > 1 else ""
    return f"{image.width:,} x {image.height:,} px{turned}{tokens}{layer}; {model}"
