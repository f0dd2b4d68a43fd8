"""Summarize a run: the status of every image, the time per stage, and notes for the user."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status
from internvit_cli.extract.changes import StoredImages
from internvit_cli.extract.results import Counts, Outlook, Stages, Summary, Tally
from internvit_cli.model.catalog import RANDOM_WEIGHTS, TINY_RANDOM
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.words import counted
from internvit_cli.sources.find_images import listing_notes
from internvit_cli.storage.durable import allocated_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from internvit_cli.extract.changes import Changes
    from internvit_cli.extract.encode_loop import EncodeResult
    from internvit_cli.extract.engine import Engine
    from internvit_cli.extract.resume import Existing
    from internvit_cli.extract.run_plan import RunPlan
    from internvit_cli.options import ExtractOptions
    from internvit_cli.plan.scan import Plan
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.sources import Listing
    from internvit_cli.storage.output import FinishedShard, Output
    from internvit_cli.storage.skipped import SkipLog


@dataclass(slots=True)
class Totals:
    """Totals that a run accumulates."""

    stages: Stages = field(default_factory=Stages)
    tally: Tally = field(default_factory=Tally)
    encoded_unlisted: int = 0
    """Encoded images that are not in the listing, because an unfinished run had planned them."""
    clamped: int = 0
    """Values that were clamped to the stored type's range."""
    dropped: int = 0
    """Rows of pictures that were deleted or are excluded now."""
    unsynced: str = ""
    """What cannot be guaranteed at the output, because its folder cannot be synced."""
    is_up_to_date: bool = True
    """Whether there was nothing to do."""
    redone: int = 0
    """Images that are encoded again because their records are damaged."""
    worth_retrying: int = 0
    """Images that an earlier run skipped and that may well be readable now, but were not tried again."""
    drawn_and_named: int = 0
    """Planned pictures that internvit drew, and that the user named."""

    @classmethod
    def of(cls, plan: RunPlan) -> Totals:
        """Return the totals before anything is encoded."""
        return cls(
            dropped=len(plan.dropped),
            is_up_to_date=plan.is_up_to_date,
            redone=plan.changes.damaged,
            worth_retrying=plan.changes.worth_retrying,
            drawn_and_named=plan.planned.drawn_and_named,
        )

    def add(self, filled: EncodeResult) -> None:
        """Add the result of a shard."""
        self.stages = self.stages.plus(filled.stages)
        self.tally = self.tally.plus(filled.tally)
        self.clamped += filled.clamped


@dataclass(frozen=True, slots=True)
class Account:
    """Everything that a summary needs, except the engine."""

    options: ExtractOptions
    output: Output
    listing: Listing
    existing: Existing
    """The output at the end of the run."""
    totals: Totals
    skip_log: SkipLog


def summarize(account: Account, engine: Engine | None, *, seconds: float, stopped_by: int) -> Summary:
    """Return the result of a run; without an engine, nothing had to be encoded."""
    existing, totals = account.existing, account.totals
    info = engine.info if engine else None
    return Summary(
        output=account.output.path,
        skipped_path=account.output.skipped_path,
        model=(existing.attributes or {}).get("model", account.options.model.name),
        counts=_counts(StoredImages(existing.shards), account.listing, totals),
        left_out=account.listing.left_out,
        tiles=totals.tally.tiles,
        encoded=totals.tally.images,
        is_up_to_date=totals.is_up_to_date,
        bytes=sum(map(_bytes_on_disk, existing.shards)),
        seconds=seconds,
        stages=totals.stages,
        device=info.device_name if info else "",
        dtype=info.dtype.value if info else "",
        batch_tiles=info.batch_tiles if info else 0,
        kernels=info.kernels if info else "",
        notes=_notes(account, engine),
        stopped_by=stopped_by,
    )


def look_ahead(
    listing: Listing, changes: Changes, existing: Existing, plan: Plan, tiles_of: Callable[[ImageTable], NDArray[Any]]
) -> Outlook:
    """Count the images of a listing before anything is encoded.

    Args:
        listing: The listing of this command.
        changes: Its entries that are new or changed.
        existing: The existing output.
        plan: The plan of the changes.
        tiles_of: Returns the number of tiles to which each image of a table is decoded, [n] int64.
    """
    is_planned = plan.table.status == Status.PENDING
    images, tiles, unlisted = int(is_planned.sum()), int(tiles_of(plan.table)[is_planned].sum()), 0
    if existing.partial is not None:
        table = existing.partial.stored.table
        planned, not_listed = set(plan.table.keys), set(changes.unlisted)
        pending = np.flatnonzero(table.status == Status.PENDING).tolist()
        left = [row for row in pending if table.keys[row] not in planned and table.keys[row] not in not_listed]
        images, tiles = images + len(left), tiles + int(tiles_of(table)[left].sum())
        unlisted = sum(table.keys[row] in not_listed for row in pending)
    folders = len(listing.unreadable_folders)
    skipped = changes.skipped_before + len(plan.skipped) + folders
    return Outlook(len(listing) + folders, images, tiles, skipped, unlisted)


def _counts(stored: StoredImages, listing: Listing, totals: Totals) -> Counts:
    found = [stored.status(key) for key in listing.keys]
    kept = len(stored) - sum(status is not None for status in found)
    statuses = np.fromiter((status or 0 for status in found), np.uint8, len(found))
    by_status = count_statuses(statuses)
    done, pending = by_status.pop(Status.DONE, 0), by_status.pop(Status.PENDING, 0)
    reasons = {status.word: count for status, count in by_status.items()}
    if folders := len(listing.unreadable_folders):
        reasons["unreadable_folder"] = folders
    unchanged = done - (totals.tally.images - totals.encoded_unlisted)
    return Counts(len(statuses) + folders, done, sum(reasons.values()), pending, kept, unchanged, reasons)


def _notes(account: Account, engine: Engine | None) -> tuple[str, ...]:
    totals, notes = account.totals, []
    if account.options.model.name == TINY_RANDOM:
        notes.append(RANDOM_WEIGHTS)
    notes += engine.notes if engine else ()
    if totals.unsynced:
        notes.append(totals.unsynced)
    if totals.dropped:
        notes.append(f"{counted(totals.dropped, 'row')} of deleted or excluded pictures dropped")
    if totals.redone:
        notes.append(f"{counted(totals.redone, 'image')} of an earlier run damaged on the disk, and done again")
    if totals.worth_retrying:
        notes.append(
            f"{counted(totals.worth_retrying, 'image')} skipped by an earlier run and not tried again: "
            "--retry-skipped tries all skipped images"
        )
    if totals.clamped:
        notes.append(f"{counted(totals.clamped, 'value')} clamped to the range of the stored type")
    return (*notes, *_limit_notes(account), *listing_notes(account.listing, totals.drawn_and_named))


def _limit_notes(account: Account) -> Iterator[str]:
    """Yield notes on limits for which pictures were skipped, with the limits that admit them."""
    stored, settled = StoredImages(account.existing.shards), (None, Status.DONE, Status.PENDING)
    exceeded = account.skip_log.exceeded_limits(lambda key: stored.status(os.fsencode(key)) not in settled)
    for name, (count, above) in sorted(exceeded.items()):
        images, them = counted(count, "image"), "it" if count == 1 else "them"
        if name == "max_pixels":
            yield f"{images} over the limit of pixels: --max-pixels {int(above) + 1} takes {them}"
            continue
        is_time = name == "decode_timeout"
        bound = f"{above:g} s" if is_time else f"{above / (1 << 30):g} GiB of memory"
        option = "--decode-timeout" if is_time else "--worker-memory"
        yield f"{images} not decoded within {bound}: a higher {option} tries {them} again, as does --retry-skipped"


def _bytes_on_disk(shard: FinishedShard) -> int:
    if shard.is_partial:
        return allocated_bytes(shard.path)
    return sum(os.path.getsize(path) for path in shard.backend.final_paths(shard.path))
