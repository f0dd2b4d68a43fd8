"""Predict what an extraction would do, for `internvit plan`, from headers and the model's description alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from internvit_cli.config import ComputeDtype, Status, Tokens
from internvit_cli.encode.options import AUTO_DEVICE, parse_device
from internvit_cli.errors import InternvitError, ModelError
from internvit_cli.extract.multi_device.engine import ALL_DEVICES, find_devices
from internvit_cli.extract.requests import check_words, find_output
from internvit_cli.extract.results import PlanSummary
from internvit_cli.extract.shard_plan import EMPTY_TABLE, ShardPlan, ShardSize, new_shard
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.hub import HubUnavailableError
from internvit_cli.model.known import download_bytes
from internvit_cli.model.own_tiling import tiling_note
from internvit_cli.plan.scan import PlanOptions, plan_images
from internvit_cli.plan.table import count_statuses
from internvit_cli.recipes import (
    LONGEST_DTYPE,
    UNKNOWN_DIGEST,
    RecipeFacts,
    check_layers,
    check_same,
    feature_shape,
    kept_layers,
    make_recipe,
    pixel_rule,
    planned_dtype,
)
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.workers import usable_cpus
from internvit_cli.sources.find_images import EMPTY_LISTING, find_images, listing_notes, require_images
from internvit_cli.storage.durable import disk_errors, free_bytes
from internvit_cli.storage.format.layout import stored_recipe
from internvit_cli.storage.output import MANIFEST
from internvit_cli.storage.read.places import find_all_places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from internvit_cli.config import PixelRule, Recipe
    from internvit_cli.model.card import ModelCard
    from internvit_cli.options import ExtractOptions, RunOptions
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.sources import Listing
    from internvit_cli.storage.format.layout import FeatureShape
    from internvit_cli.storage.output import Output


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known about an extraction before anything is decoded."""

    options: ExtractOptions
    listing: Listing
    table: ImageTable
    card: ModelCard
    recipe: Recipe
    """The recipe, with unknown weights and an unknown compute type."""
    shape: FeatureShape
    output: Output
    drawn_and_named: int = 0
    """Number of pictures drawn by internvit that the user named."""

    @property
    def rule(self) -> PixelRule:
        """How pictures become tiles."""
        return pixel_rule(self.recipe, self.options.pictures.max_pixels)

    @property
    def decoded_tiles(self) -> int:
        """Tiles that are decoded and encoded."""
        counts = self.table.tile_counts[self.table.status == Status.PENDING]
        return len(counts) if self.rule.global_view_only else int(counts.sum())

    @property
    def feature_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(spec.nbytes for spec in self.shape.row_datasets(len(self.table), self.table.tiles))

    @property
    def shard_size(self) -> ShardSize:
        """The maximum size of a folder's shards.

        Raises:
            UsageError: `--shard-size` is too small for a shard.
        """
        nothing = new_shard(ShardPlan(EMPTY_TABLE, self.listing.sources), self.shape, self.recipe, self.card)
        return ShardSize.of(self.options.store.shard_bytes, self.output.backend, self.shape, nothing.attributes)


def survey(options: ExtractOptions, observer: Observer = SILENT, stdin: BinaryIO | None = None) -> Survey:
    """Find the images, read their headers, and describe the model.

    Args:
        options: The options of the extraction.
        observer: Receives progress.
        stdin: The list for a source `-`, in binary.

    Raises:
        InternvitError: The sources or the options are wrong, or the model's description is not available.
    """
    check_words(options.run)
    output = find_output(options)
    listing = find_images(options, stdin, observer) if options.has_sources else EMPTY_LISTING
    card = describe_model(options.model.name, revision=options.model.revision, allow_catalog=True)
    kept = _recipe_to_keep(output, card)
    layers = (kept_layers(options, kept, card) if kept else None) or card.resolve_layers(options.model.layers)
    check_layers(options.store.tokens, layers)
    facts = RecipeFacts.of_card(card, layers, UNKNOWN_DIGEST).with_kept(kept)
    recipe = make_recipe(options, facts, LONGEST_DTYPE, kept)
    shape = feature_shape(options, card, recipe)
    rule = pixel_rule(recipe, options.pictures.max_pixels)
    how = PlanOptions(rule, usable_cpus(), options.run.decode_timeout, options.run.worker_memory)
    with observer.phase("reading headers", "image", len(listing)) as phase:
        plan = plan_images(listing, range(len(listing)), how, phase.at)
    listing = require_images(listing.without_drawn(plan.drawn)) if plan.drawn else listing
    return Survey(options, listing, plan.table, card, recipe, shape, output, plan.drawn_and_named)


def _recipe_to_keep(output: Output, card: ModelCard) -> Recipe | None:
    """Return the recipe of an output that the same model made: what is left to `auto` stays as it has it.

    None if there is no such output; if it cannot be read, `_output_notes` says so.
    """
    try:
        newest = find_all_places(output.path)[-1]
        attributes = newest.backend.outline(newest.path).attributes
        return stored_recipe(attributes, newest.path) if attributes.get("model") == card.recorded_name else None
    except InternvitError:
        return None


def summarize_plan(found: Survey) -> PlanSummary:
    """Count the images, tiles and bytes of an extraction."""
    listing, table, output, card = found.listing, found.table, found.output, found.card
    size = None if output.is_file else found.shard_size
    shard_plans = [ShardPlan(part, listing.sources) for part in (size.split(table) if size else [table])]
    shards = [new_shard(shard_plan, found.shape, found.recipe, card) for shard_plan in shard_plans]
    with disk_errors(output.path):  # such as a limit on file sizes
        planned_bytes = sum(output.backend.planned_bytes(shard) for shard in shards)
    reasons = {
        status.word: count for status, count in count_statuses(table.status).items() if status is not Status.PENDING
    }
    if listing.unreadable_folders:
        reasons["unreadable_folder"] = len(listing.unreadable_folders)
    tiles_of_images = table.tile_counts[table.status == Status.PENDING]
    sizes, images = np.unique(tiles_of_images, return_counts=True)
    notes = (*card.notes, *_model_notes(found), *_device_notes(found.options.run), *_output_notes(found))
    return PlanSummary(
        output=output.path,
        model=card.name,
        layers=found.recipe.layers,
        images=len(listing) + len(listing.unreadable_folders),
        skipped=sum(reasons.values()),
        reasons=reasons,
        tiles=table.tiles,
        histogram={int(size): int(count) for size, count in zip(sizes, images, strict=True)},
        bytes=planned_bytes,
        free_bytes=free_bytes(output.path),
        left_out=listing.left_out,
        notes=(*filter(None, notes), *listing_notes(listing, found.drawn_and_named)),
    )


def _output_notes(found: Survey) -> Iterator[str]:
    """Yield why a run would refuse to write or continue this output."""
    output, store = found.output, found.options.store
    try:
        output.check_place()
        finished = output.path if output.is_file else os.path.join(output.path, MANIFEST)
        if not store.overwrite and (os.path.exists(finished) or output.partial_exists):
            # All shards have the same recipe; read it from the newest finished one and the unfinished one.
            for place in find_all_places(output.path)[-2:]:
                _check_recipe(found, place.backend.outline(place.path).attributes, place.path)
    except InternvitError as error:
        yield f"a run would refuse this output: {error.message}"


def _check_recipe(found: Survey, attributes: dict[str, Any], path: str) -> None:
    """Refuse an output of another recipe, as far as this is known without the weights and the device.

    Raises:
        InternvitError: It has another recipe, or is damaged.
    """
    stored = stored_recipe(attributes, path)
    dtype = planned_dtype(found.options, stored) or stored.compute_dtype
    check_same(replace(found.recipe, weights_digest=stored.weights_digest, compute_dtype=dtype), stored, path)


def _device_notes(run: RunOptions) -> Iterator[str]:
    """Yield what this machine does not support; a plan may be made on another machine than the run.

    PyTorch is loaded only if something is requested that not every machine has.
    """
    kinds = {ALL_DEVICES if name == ALL_DEVICES else parse_device(name).kind for name in run.devices}
    if kinds <= {AUTO_DEVICE, "cpu"} and run.dtype is not ComputeDtype.FP8 and not run.compile:
        return
    from internvit_cli.encode.devices import find_fit_device

    try:
        for name in find_devices(run.devices):
            find_fit_device(name, run.dtype, compile=run.compile)
    except InternvitError as error:
        yield f"a run on this machine would refuse this: {error.message}"


def _model_notes(found: Survey) -> Iterator[str]:
    """Yield what a run would say about the weights, which are located and checked, but neither fetched nor read."""
    card = found.card
    yield tiling_note(card.own_tiling, found.options.pictures)
    if card.origin == "catalog":
        yield f"a run would refuse this model until it is downloaded: hf download {card.name} ({_gigabytes(card)})"
        return
    try:
        projector = found.recipe.tokens is Tokens.PROJECTED
        checkpoint = Checkpoint.open(card.without_fetching(), layer=found.recipe.layer, projector=projector)
    except HubUnavailableError as error:
        yield f"a run would refuse this model: {error.message}" if card.offline else f"a run fetches {_gigabytes(card)}"
    except ModelError as error:
        yield f"a run would refuse this model: {error.message}"
    else:
        yield from checkpoint.notes


def _gigabytes(card: ModelCard) -> str:
    return f"about {download_bytes(card) / 1e9:.1f} GB of weights"
