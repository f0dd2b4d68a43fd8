"""Decode and encode a random sample of stored images again with the stored recipe, and compare it with their rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from internvit_cli.config import DEFAULT_MAX_PIXELS, OnOverflow, StoreDtype
from internvit_cli.decode.decoder import DecodedImage, DecodeJob, DecodeOptions, Decoder, decode_job
from internvit_cli.encode.tile_features import LayerFeatures
from internvit_cli.errors import InternvitError
from internvit_cli.model.recorded import open_recorded
from internvit_cli.plan.table import modified_ns
from internvit_cli.recipes import encoder_options, pixel_rule
from internvit_cli.runtime.words import counted_of
from internvit_cli.sources.members import status_of
from internvit_cli.storage.format.layout import (
    SCALE_DATASETS,
    dataset_of,
    decode_values,
    feature_datasets,
    feature_name,
    is_tokens,
)
from internvit_cli.storage.image_rows import image_arrays
from internvit_cli.storage.read.reader import OpenShard
from internvit_cli.verify.result import ReencodeComparison
from internvit_cli.verify.tolerance import Differences, compare_values, tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.runtime.observer import Observer
    from internvit_cli.verify.result import StoredRow, VerifyOptions

DECODE_SECONDS = 60.0
DECODE_MEMORY = 4 << 30


class TileEncoder(Protocol):
    """Encodes the sample."""

    check: str
    """The name of the check."""
    activity: str
    """The name of the work, for progress."""
    name: str
    """The name of the encoder in results."""

    def encode(self, tiles: NDArray[Any]) -> list[Sequence[LayerFeatures]]:
        """Return features of uint8 tiles [n,S,S,3] in parts, by layer, with tokens in the stored type or float32."""
        ...

    def close(self) -> None:
        """Release the device."""
        ...


class ReExtraction:
    """Encodes the sample of a verification again."""

    def __init__(
        self,
        options: VerifyOptions,
        rows: list[StoredRow],
        observer: Observer,
        note: Callable[[str], None],
        report: Callable[[str, str, str | None, str], None],
    ) -> None:
        """Prepare the sample without reading anything.

        Args:
            options: The options of the verification.
            rows: Done rows to choose from.
            observer: Receives progress.
            note: Receives notes.
            report: Receives findings: check, path, key and problem.
        """
        self._options = options
        self._rows = rows
        self._observer = observer
        self._note = note
        self._report = report
        self._is_sample_settled = False

    def comparisons(self) -> Iterator[ReencodeComparison]:
        """Encode the sample with internvit's encoder and, if requested, with transformers' class, and compare each.

        If that is not possible (no pictures, no weights, other weights), it is reported as a finding.
        """
        rows = list(self._rows)
        random.Random(self._options.seed).shuffle(rows)  # noqa: S311 - a sample, not a secret
        if not rows:
            self._report("re-extract", self._options.path, None, "no image is done, so none can be encoded again")
            return
        # Shards with other recipes are reported elsewhere; the sample has the recipe of the newest shard.
        recipe, attributes = rows[0].shard.recipe, rows[0].shard.found.stored.attributes
        rows = [row for row in rows if row.shard.recipe == recipe]
        loaders: list[Callable[[_RecipeModel], TileEncoder]] = [_InternvitEncoder]
        if self._options.reference:
            loaders.append(_TransformersEncoder)
        try:
            model = self._open_model(recipe, attributes)
            wanted = min(self._options.re_extract, len(rows))
            for load in loaders:
                with self._observer.phase("loading the model"):
                    encoder = load(model)
                try:
                    rows, comparison = self._compare(encoder, rows, wanted, recipe)
                finally:
                    encoder.close()
                if not rows:
                    return
                yield comparison
        except InternvitError as error:
            self._report("re-extract", self._options.path, None, f"{error.message} ({error.hint})")

    def _compare(
        self, encoder: TileEncoder, candidates: list[StoredRow], wanted: int, recipe: Recipe
    ) -> tuple[list[StoredRow], ReencodeComparison]:
        """Compare at most `wanted` candidates; return their rows and the comparison."""
        limit = tolerance(recipe)
        taken: list[StoredRow] = []
        unavailable: list[tuple[StoredRow, str]] = []
        total = Differences()
        with self._observer.phase(encoder.activity, "image", min(wanted, len(candidates))) as phase:
            for row, tiles in _decoded(candidates, wanted, recipe, unavailable):
                difference = _differences(row, recipe, encoder.encode(tiles))
                if not difference.is_within(limit):
                    problem = f"{encoder.name} gives other values: {difference.words(limit)}"
                    self._report(encoder.check, row.shard.path, row.key, problem)
                total = total.worst(difference)
                taken.append(row)
                phase.at(len(taken))
        if not self._is_sample_settled:
            self._tell_of_missing(taken, unavailable)
            self._is_sample_settled = True
        return taken, ReencodeComparison(
            encoder.check,
            encoder.name,
            len(taken),
            total.bit_equal,
            total.largest,
            total.relative,
            total.cosine,
            *limit,
        )

    def _open_model(self, recipe: Recipe, attributes: dict[str, Any]) -> _RecipeModel:
        """Find the weights, and check that they are those of the recipe.

        Raises:
            ModelError: The weights are not available, or are different ones.
        """
        options = self._options
        checkpoint = open_recorded(recipe, attributes, options.model, self._observer)
        return _RecipeModel(checkpoint, recipe, int(attributes.get("batch_tiles", 0)) or None, options.device)

    def _tell_of_missing(self, taken: list[StoredRow], unavailable: list[tuple[StoredRow, str]]) -> None:
        asked = self._options.re_extract
        if not taken:
            row, why = unavailable[0]
            problem = f"no picture is unchanged, so none can be encoded again; {row.key!r}: {why}"
            self._report("re-extract", self._options.path, None, problem)
        elif len(taken) < asked:
            self._note(f"{counted_of(len(taken), asked, 'image')} encoded again: no other pictures are unchanged")


# --------------------------------------------------------------------------------------------------------- the pictures


def _decoded(
    candidates: list[StoredRow], wanted: int, recipe: Recipe, unavailable: list[tuple[StoredRow, str]]
) -> Iterator[tuple[StoredRow, NDArray[Any]]]:
    """Yield tiles, uint8 [n,S,S,3], of the first `wanted` candidates whose pictures are unchanged."""
    upcoming = iter(candidates)
    found = 0
    while found < wanted:
        jobs: list[tuple[StoredRow, DecodeJob]] = []
        for row in upcoming:
            job = _job(row, len(jobs))
            if isinstance(job, str):
                unavailable.append((row, job))
            else:
                jobs.append((row, job))
            if len(jobs) == wanted - found:
                break
        if not jobs:
            return
        for row, tiles in _decode(jobs, recipe, unavailable):
            found += 1
            yield row, tiles


def _job(row: StoredRow, number: int) -> DecodeJob | str:
    """Return the job that decodes a row's picture, or why the picture cannot be the same."""
    table, at = row.shard.table, row.number
    try:
        now = status_of(row.picture)
    except OSError as error:
        return error.strerror or str(error)
    if now.st_size != int(table.file_size[at]):
        return "it changed"
    job = decode_job(table, at, row.picture)
    return job._replace(row=number, header=job.header._replace(file_mtime_ns=modified_ns(now)))


def _decode(
    jobs: list[tuple[StoredRow, DecodeJob]], recipe: Recipe, unavailable: list[tuple[StoredRow, str]]
) -> Iterator[tuple[StoredRow, NDArray[Any]]]:
    pixels = max(job.header.width * job.header.height for _, job in jobs)
    rule = pixel_rule(recipe, max(DEFAULT_MAX_PIXELS, pixels))  # all pictures were within the limit of their run
    most = max(int(row.shard.table.tile_counts[row.number]) for row, _ in jobs)
    tiles = 1 if rule.global_view_only else most
    decoder = Decoder(DecodeOptions(rule, tiles, 1, DECODE_SECONDS, DECODE_MEMORY))
    try:
        for image in decoder.run(job for _, job in jobs):
            row = jobs[image.row][0]
            if not isinstance(image, DecodedImage):
                unavailable.append((row, image.skipped.message))
            elif image.digest != row.digest:
                unavailable.append((row, "it changed"))
            else:
                yield row, image.tiles
            if isinstance(image, DecodedImage):
                image.release()
    finally:
        decoder.close()


# --------------------------------------------------------------------------------------------------------- the encoders


@dataclass(frozen=True)
class _RecipeModel:
    """The weights of a recipe, and the features to compute."""

    checkpoint: Checkpoint
    recipe: Recipe
    batch_tiles: int | None
    device: str


class _InternvitEncoder:
    """internvit's encoder, as `extract` uses it."""

    check = "re-extract"
    activity = "encoding again"

    def __init__(self, model: _RecipeModel) -> None:
        from internvit_cli.encode.encoder import Encoder

        options = encoder_options(model.recipe, model.device, model.batch_tiles)
        self._encoder = Encoder.load(model.checkpoint, options)
        info = self._encoder.info
        self.name = f"internvit in {info.dtype.value} on {info.device_name}"

    def encode(self, tiles: NDArray[Any]) -> list[Sequence[LayerFeatures]]:
        """Return the features as they would be stored."""
        size = self._encoder.info.batch_tiles
        return [
            self._encoder.submit(list(tiles[start : start + size])).result().layers
            for start in range(0, len(tiles), size)
        ]

    def close(self) -> None:
        """End the threads of the encoder."""
        self._encoder.close()


class _TransformersEncoder:
    """transformers' own class in float32, one tile at a time."""

    check = "reference"
    activity = "encoding with transformers"

    def __init__(self, model: _RecipeModel) -> None:
        from internvit_cli.encode.devices import find_device
        from internvit_cli.encode.encoder import feature_spec
        from internvit_cli.model.native import NativeModel

        spec = feature_spec(encoder_options(model.recipe, model.device, None))
        self._model = NativeModel(model.checkpoint, spec, find_device(model.device))
        self._limit = _largest(model.recipe)
        self.name = f"transformers' InternVLVisionModel in float32 on {self._model.device}"

    def encode(self, tiles: NDArray[Any]) -> list[Sequence[LayerFeatures]]:
        """Return the features in float32, with tokens clamped if the recipe clamps them."""
        parts = [self._model.features(tiles[start : start + 1]) for start in range(len(tiles))]
        return [[LayerFeatures(self._clamped(layer.tokens), layer.pooled) for layer in part] for part in parts]

    def _clamped(self, tokens: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if tokens is None else np.clip(tokens, -self._limit, self._limit)

    def close(self) -> None:
        """Do nothing."""


def _largest(recipe: Recipe) -> float:
    """Return the largest value that a token can have."""
    if recipe.on_overflow is not OnOverflow.CLAMP:
        return float("inf")
    largest = float(np.finfo(np.float16).max)
    if recipe.store_dtype is StoreDtype.FLOAT16:
        return largest
    has_small_scales = recipe.store_dtype is StoreDtype.INT8 and recipe.values_per_scale
    return largest * np.iinfo(np.int8).max if has_small_scales else float("inf")


def _differences(row: StoredRow, recipe: Recipe, parts: list[Sequence[LayerFeatures]]) -> Differences:
    """Compare the stored rows of an image with its new features, over all layers."""
    anew = {name: np.concatenate(blocks) for name, blocks in image_arrays(parts, recipe).items()}
    stored = _stored_arrays(row, recipe)
    figures = []
    for name in anew:
        if feature_name(name).kind in SCALE_DATASETS:
            continue  # compared as part of the tokens that they scale
        dtype = recipe.store_dtype if is_tokens(name) and not recipe.store_dtype.is_scaled else StoreDtype.FLOAT32
        figures.append(compare_values(_numbers(stored, name, recipe), _numbers(anew, name, recipe), dtype))
    total = reduce(Differences.worst, figures)
    return replace(total, bit_equal=int(total.bit_equal == len(figures)))


def _stored_arrays(row: StoredRow, recipe: Recipe) -> dict[str, NDArray[Any]]:
    """Return the rows of an image by dataset."""
    shard = OpenShard(row.shard.found)
    tiles = [int(offset) for offset in row.shard.table.tile_offset[row.number : row.number + 2]]
    places = {
        name: tiles if feature_name(name).is_per_tile else [row.number, row.number + 1]
        for name in feature_datasets(recipe)
    }
    return {name: shard.rows(name, start, stop) for name, (start, stop) in places.items()}


def _numbers(arrays: dict[str, NDArray[Any]], name: str, recipe: Recipe) -> NDArray[Any]:
    """Return the values of a dataset, with scaled tokens dequantized."""
    scales = dataset_of(recipe.tokens.scales_dataset, feature_name(name).layer)
    if not is_tokens(name) or scales not in arrays:
        return arrays[name]
    return decode_values(arrays[name], recipe.store_dtype, arrays[scales])
