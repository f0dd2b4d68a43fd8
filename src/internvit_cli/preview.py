"""`internvit plan`: what an extraction would do, from headers and the model's description alone. Nothing is written."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import NoImagesError, UsageError
from internvit_cli.model.catalog import describe_model
from internvit_cli.observer import SILENT, Observer
from internvit_cli.output_names import check_features_name
from internvit_cli.plan import PlanOptions, plan_images
from internvit_cli.recipes import LONGEST_DTYPE, ModelFacts, feature_shape, make_recipe, pixel_rule
from internvit_cli.report import PlanSummary
from internvit_cli.sharding import EMPTY_TABLE, Draft, ShardSize, new_shard
from internvit_cli.sources import Listing, discover
from internvit_cli.storage.durable import disk_errors, free_bytes
from internvit_cli.storage.output import Output
from internvit_cli.table import count_statuses
from internvit_cli.workers import usable_cpus

if TYPE_CHECKING:
    from internvit_cli.config import PixelRule, Recipe
    from internvit_cli.model.card import ModelCard
    from internvit_cli.options import ExtractOptions
    from internvit_cli.storage.layout import FeatureShape
    from internvit_cli.table import ImageTable

EMPTY_LISTING = Listing((), [], array("I"), {}, (), 0)
UNKNOWN_DIGEST = "0" * 64
"""Stands for the weights' digest: the weights are not looked at, and only its length matters."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of an extraction before anything is decoded."""

    options: ExtractOptions
    listing: Listing
    table: ImageTable
    card: ModelCard
    recipe: Recipe
    """Of unknown weights, and of an unknown compute type."""
    shape: FeatureShape
    output: Output

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
        """How large the shards of a folder may be.

        Raises:
            UsageError: `--shard-size` is too small for one.
        """
        nothing = new_shard(Draft(EMPTY_TABLE, self.listing.sources), self.shape, self.recipe, self.card)
        return ShardSize.of(self.options.store.shard_bytes, self.output.backend, self.shape, nothing.attributes)


def survey(options: ExtractOptions, observer: Observer = SILENT, stdin: BinaryIO | None = None) -> Survey:
    """Find the images, read their headers, and describe the model.

    Args:
        options: of the extraction.
        observer: told how it goes.
        stdin: the list behind a source `-`, in binary.

    Raises:
        InternvitError: the sources or the options are wrong, or the model's description cannot be had.
    """
    output = find_output(options)
    listing = find_images(options, stdin) if options.has_sources else EMPTY_LISTING
    card = describe_model(options.model.name, revision=options.model.revision, allow_catalog=True)
    facts = ModelFacts.of_card(card, card.resolve_layer(options.model.layer), UNKNOWN_DIGEST)
    recipe = make_recipe(options, facts, LONGEST_DTYPE)
    shape = feature_shape(options, card, recipe)
    rule = pixel_rule(recipe, options.pictures.max_pixels)
    how = PlanOptions(rule, usable_cpus(), options.run.decode_timeout, options.run.worker_memory)
    total = len(listing)
    table = plan_images(listing, range(total), how, lambda done: observer.headers(done, total)).table
    return Survey(options, listing, table, card, recipe, shape, output)


def summarize_plan(found: Survey) -> PlanSummary:
    """Count the images, tiles and bytes of an extraction."""
    listing, table, output, card = found.listing, found.table, found.output, found.card
    size = None if output.is_file else found.shard_size
    drafts = [Draft(part, listing.sources) for part in (size.split(table) if size else [table])]
    shards = [new_shard(draft, found.shape, found.recipe, card) for draft in drafts]
    with disk_errors(output.path):  # such as a limit on the size of files
        planned_bytes = sum(output.backend.planned_bytes(shard) for shard in shards)
    reasons = {
        status.word: count for status, count in count_statuses(table.status).items() if status is not Status.PENDING
    }
    if listing.unreadable_folders:
        reasons["unreadable_folder"] = len(listing.unreadable_folders)
    tiles_of_images = table.tile_counts[table.status == Status.PENDING]
    sizes, images = np.unique(tiles_of_images, return_counts=True)
    notes = ["the model's description was taken from the catalogue of known models"] if card.origin == "catalog" else []
    return PlanSummary(
        output=output.path,
        model=card.name,
        images=len(listing) + len(listing.unreadable_folders),
        skipped=sum(reasons.values()),
        reasons=reasons,
        tiles=table.tiles,
        histogram={int(size): int(count) for size, count in zip(sizes, images, strict=True)},
        bytes=planned_bytes,
        free_bytes=free_bytes(output.path),
        notes=tuple(notes),
    )


def find_output(options: ExtractOptions) -> Output:
    """The output of a command; nothing is read or written.

    Raises:
        UsageError: nothing can be written by its name, or the name and the options contradict each other.
    """
    store = options.store
    check_features_name(store.output)
    output = Output(store.output, store.format)
    if output.is_file and store.shard_bytes is not None:
        raise UsageError(
            f"--shard-size: {store.output} is one file, and has no shards",
            "leave it out, or name a folder, such as -o feats/",
        )
    return output


def find_images(options: ExtractOptions, stdin: BinaryIO | None) -> Listing:
    """The listing of a command's sources.

    Raises:
        NoImagesError: there is nothing in them.
    """
    listing = discover(options.sources, options.discover, stdin)
    if len(listing) or listing.unreadable_folders:
        return listing
    hint = "pictures are found by their extension, such as .jpg or .png; name other files outright or with --files-from"
    if listing.unfollowed_links:
        hint = f"{listing.unfollowed_links} links to folders were not followed: --follow-links"
    raise NoImagesError("no pictures found in the given sources", hint)
