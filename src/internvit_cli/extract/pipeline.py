"""Run an extraction from end to end: discover, plan, decode, encode, store and summarize."""

from __future__ import annotations

import os
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, BinaryIO

from internvit_cli.errors import InternvitError, StoppedError
from internvit_cli.extract.changes import StoredImages
from internvit_cli.extract.encode_loop import strict_error
from internvit_cli.extract.requests import check_words, find_output
from internvit_cli.extract.resume import Existing, load_existing
from internvit_cli.extract.run_engine import RunEngine, measure_accuracy
from internvit_cli.extract.run_plan import Run, RunPlan, decoded_tiles, prepare, read_output
from internvit_cli.extract.shard_filler import CreatedShard, ShardFiller, is_skipped_by
from internvit_cli.extract.shard_plan import RunMeasurements, ShardPlan, ShardPlanRules, new_shard, plan_shards
from internvit_cli.extract.summary import Account, Totals, look_ahead, summarize
from internvit_cli.recipes import ModelInUse
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.signals import Interruption
from internvit_cli.runtime.words import counted
from internvit_cli.sources.find_images import find_images
from internvit_cli.storage.durable import allocated_bytes, check_space, disk_errors, unsynced_folder
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.write.commit import create_shard

if TYPE_CHECKING:
    from internvit_cli.config import Recipe
    from internvit_cli.extract.results import Summary
    from internvit_cli.options import ExtractOptions
    from internvit_cli.runtime.signals import StopRequest
    from internvit_cli.sources import Listing
    from internvit_cli.storage.format.layout import NewShard


def extract(
    options: ExtractOptions, stop: StopRequest, observer: Observer = SILENT, stdin: BinaryIO | None = None
) -> Summary:
    """Bring an output up to date with its sources: create it, continue it, or find that there is nothing to do.

    Args:
        options: What to extract, how, and where to.
        stop: Checked between batches; what is finished by then is committed.
        observer: Receives progress.
        stdin: The binary stream behind a source `-`.

    Returns:
        What was done. Images that could not be used are counted, and raise no error.

    Raises:
        StoppedError: A signal came before there was anything to finish.
        InternvitError: The run cannot start or continue; what was committed is kept.
    """
    started = time.monotonic()
    check_words(options.run)
    run = Run(options, find_output(options), stop, observer)
    try:
        with exclusive(run.output.path, enabled=options.store.lock):
            listing = find_images(options, stdin, observer)
            try:
                return _extract(run, listing, started)
            except BaseException:
                # A failed start leaves nothing unless an image is stored. The first error is the one to report.
                with suppress(OSError, InternvitError):
                    run.output.withdraw()
                raise
    except Interruption:
        raise StoppedError("stopped before anything was encoded") from None


def _extract(run: Run, listing: Listing, started: float) -> Summary:
    existing = read_output(run)
    with ModelInUse(run.options, existing.attributes, run.observer) as model:
        plan = prepare(run, listing, existing, model)
        del existing, listing  # the plan has what is still needed, and they are large
        return _carry_out(run, plan, started)


def _carry_out(run: Run, plan: RunPlan, started: float) -> Summary:
    totals = Totals.of(plan)
    with closing(RunEngine(run, plan)) as engine:
        if not plan.is_up_to_date:
            _make_shards(run, plan, engine, totals)
        if not run.is_stopped:
            _complete(run, plan)
        listing, skip_log = plan.listing, plan.skip_log
        existing = plan.existing if plan.is_up_to_date else None
        del plan  # an index of a million images takes some hundred MB
        with run.observer.phase("counting"):
            if existing is None:  # count what is on the disk
                existing = load_existing(run.output, overwrite=run.options.store.overwrite)
            return summarize(
                Account(run.options, run.output, listing, existing, totals, skip_log),
                engine.started,
                seconds=time.monotonic() - started,
                stopped_by=run.stop.signal,
            )


def _make_shards(run: Run, plan: RunPlan, engine: RunEngine, totals: Totals) -> None:
    """Encode what is missing, first what an earlier run planned, then what is new."""
    existing, planned, output = plan.existing, plan.planned, run.output
    rules = ShardPlanRules(plan.shard_size, plan.listing.sources, run.relocations)
    shard_plans = plan_shards(existing.finished, plan.gone, planned.table, rules)
    plan.model.hash_weights()
    _check(run, plan, shard_plans)
    totals.unsynced = unsynced_folder(output.folder)
    run.observer.note(
        look_ahead(
            plan.listing, plan.changes, existing, planned, lambda table: decoded_tiles(table, plan.rule)
        ).sentence
    )
    if plan.workload is not None:
        engine.start(plan.workload)
    else:
        engine.start_for_types()
    plan.model.confirm_weights()  # hashed beside all of the above, and needed from here on
    accuracy = measure_accuracy(run, plan, engine) if shard_plans else None
    plan.skip_log.append((planned.table.keys[row], skip) for row, skip in planned.skipped.items())
    filler = ShardFiller(run, plan, engine, totals)
    if existing.partial is not None:
        stored = existing.partial.stored
        filler.fill(CreatedShard(stored.table, stored.attributes, shard_plans), StoredImages(existing.finished))
        existing = load_existing(output, overwrite=run.options.store.overwrite)
        shard_plans = plan_shards(existing.finished, plan.gone, planned.table, rules)
    finished = StoredImages(existing.finished)
    for number, shard_plan in enumerate(shard_plans, 1):
        if run.is_stopped:
            return
        shard = _new_shard(plan, shard_plan, engine.recipe, RunMeasurements(engine.batch_tiles_to_record, accuracy))
        with run.observer.phase("setting space aside"):
            create_shard(output.backend, output.partial_path(output.next_number()), shard)
        filler.fill(CreatedShard(shard.table, shard.complete_attributes, shard_plans[number:]), finished)
    if plan.dropped and not run.is_stopped and not output.is_file:
        output.drop_rows(finished.by_shard(plan.dropped))


def _check(run: Run, plan: RunPlan, shard_plans: list[ShardPlan]) -> None:
    """Refuse a run that cannot succeed, and report notes for the user, before any work.

    Raises:
        InternvitError: An image cannot be used and the run is strict, or there is not enough space.
    """
    for note in plan.model.notes:
        run.observer.note(note)
    if plan.planned.skipped and run.options.run.strict:
        row, skipped = min(plan.planned.skipped.items())
        raise strict_error(plan.planned.table.keys[row], skipped)
    draft = plan.model.draft
    _check_space(run, plan.existing, [_new_shard(plan, planned, draft, RunMeasurements()) for planned in shard_plans])
    if shard_plans and run.output.is_file and plan.existing.finished:
        copied = counted(os.path.getsize(run.output.path), "byte")
        run.observer.note(f"{run.output.path} is made anew: up to {copied} of its rows copied")


def _check_space(run: Run, existing: Existing, shards: list[NewShard]) -> None:
    """Refuse shards that do not fit on the disk; the space of an unfinished shard is already reserved."""
    output = run.output
    with disk_errors(output.path):  # such as a limit on the size of files
        needed = sum(output.backend.planned_bytes(shard) for shard in shards)
    if existing.partial is not None:
        datasets = output.backend.extents(existing.partial.path).values()
        allocated = sum(allocated_bytes(path) for path in {extent.path for extent in datasets})
        needed += max(0, sum(extent.spec.nbytes for extent in datasets) - allocated)
    check_space(output.path, needed)


def _new_shard(plan: RunPlan, shard_plan: ShardPlan, recipe: Recipe, measured: RunMeasurements) -> NewShard:
    assert plan.shape is not None, "there is something to do"
    return new_shard(shard_plan, plan.shape, recipe, plan.model.card, measured)


def _complete(run: Run, plan: RunPlan) -> None:
    """Replace an older output if this one does, and remove pruned images from the list of skipped images."""
    run.output.complete()
    if run.options.store.prune:
        plan.skip_log.drop_others(is_skipped_by(run.output.finished(), plan.listing))
