"""The main job from end to end: discover, plan, decode, encode, store, report; it alone knows every stage."""

from __future__ import annotations

import os
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from internvit_cli.config import Status
from internvit_cli.decode.decoder import decode_jobs
from internvit_cli.errors import InternvitError, OutputError, StoppedError
from internvit_cli.extract.changes import Relocation, StoredImages, prunable, stored_sources
from internvit_cli.extract.encode_loop import FillRules, unusable
from internvit_cli.extract.engine import Engine, EngineOptions, ShardJob, Workload
from internvit_cli.extract.multi_device.engine import find_devices, start_engine
from internvit_cli.extract.requests import check_words, find_output
from internvit_cli.extract.results import Summary, Tally, run_log_entry
from internvit_cli.extract.resume import Existing, load_existing, settle
from internvit_cli.extract.sampling import SAMPLE_IMAGES
from internvit_cli.extract.shard_plan import (
    EMPTY_TABLE,
    Draft,
    DraftRules,
    Measured,
    ShardSize,
    draft_shards,
    is_moved,
    new_shard,
)
from internvit_cli.extract.summary import Account, Totals, look_ahead, summarize
from internvit_cli.model.accuracy import Accuracy, measured_attributes, to_attributes
from internvit_cli.plan.scan import Plan, PlanOptions, plan_images
from internvit_cli.recipes import ModelInUse, encoder_options_of_run, feature_shape, pixel_rule
from internvit_cli.runtime.observer import SILENT, Observer, Phase, Work
from internvit_cli.runtime.signals import Interruption
from internvit_cli.runtime.words import counted
from internvit_cli.runtime.workers import usable_cpus
from internvit_cli.sources.find_images import find_images, require_images
from internvit_cli.storage.check.recheck import Recheck, contradictory_rows
from internvit_cli.storage.durable import allocated_bytes, check_space, disk_errors, unsynced_folder
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.write.commit import ShardWriter, create_shard
from internvit_cli.storage.write.takeover import take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.config import PixelRule
    from internvit_cli.extract.changes import Changes
    from internvit_cli.options import ExtractOptions
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.runtime.signals import StopRequest
    from internvit_cli.sources import Listing, Source
    from internvit_cli.storage.format.layout import FeatureShape, NewShard
    from internvit_cli.storage.output import FinishedShard, Output


def extract(
    options: ExtractOptions, stop: StopRequest, observer: Observer = SILENT, stdin: BinaryIO | None = None
) -> Summary:
    """Bring an output up to date with its sources: make it, go on with it, or find that there is nothing to do.

    Args:
        options: what to extract, how, and where to.
        stop: looked at between batches; what is finished by then is committed.
        observer: told how it goes.
        stdin: the list behind a source `-`, in binary.

    Returns:
        What was done. Images that could not be used are counted there, not raised.

    Raises:
        StoppedError: a signal came before there was anything to finish.
        InternvitError: the run cannot start or go on; what was committed stays.
    """
    started = time.monotonic()
    check_words(options.run)
    output = find_output(options)
    try:
        with exclusive(output.path, enabled=options.store.lock):
            listing = find_images(options, stdin, observer)
            run = _Extraction(options, stop, observer, listing, output)
            try:
                with closing(run):
                    return run.run(started)
            except BaseException:
                run.withdraw()
                raise
    except Interruption:
        raise StoppedError("stopped before anything was encoded") from None


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is being filled."""

    table: ImageTable
    sources: Sequence[Source]
    """What the table's `source` column counts."""
    writer: ShardWriter
    later: Sequence[Draft]
    """Those that follow."""


class _Extraction:
    """One extraction, under the output's lock."""

    def __init__(
        self, options: ExtractOptions, stop: StopRequest, observer: Observer, listing: Listing, output: Output
    ) -> None:
        self._options = options
        self._stop = stop
        self._observer = observer
        self._listing = listing
        self._output = output
        self._model: ModelInUse
        self._skip_log: SkipLog
        self._existing: Existing
        self._finished_images: tuple[Existing, StoredImages] | None = None
        self._relocations = [Relocation(old, new) for old, new in options.store.relocations]
        self._engine: Engine | None = None
        self._accuracy: dict[str, str] | None = None
        self._totals = Totals()
        self._unlisted: frozenset[bytes] = frozenset()

    def run(self, started: float) -> Summary:
        self._output.prepare()
        store = self._options.store
        with self._observer.phase("reading the output"):
            existing = load_existing(self._output, overwrite=store.overwrite)
        self._model = ModelInUse(self._options, existing.attributes, self._observer)
        existing = settle(self._output, existing, self._model.recipe, overwrite=store.overwrite)
        stored = StoredImages(existing.shards, self._relocations)
        self._skip_log = SkipLog(self._output.skipped_path, self._options.limits)
        changes = self._compare(stored)
        self._totals.mistrusted = changes.damaged
        self._totals.worth_retrying = changes.worth_retrying
        self._unlisted = frozenset(changes.unlisted)
        dropped = prunable(stored, changes, self._listing, confirmed=store.yes) if store.prune else []
        self._totals.dropped = len(dropped)
        del stored
        self._log_unreadable_folders()
        if not existing.shards:
            self._shard_size(self._shape())  # refuses what cannot be before a million headers are read
        plan, replaced = self._plan(changes)
        if existing.partial is not None or plan.table.keys or dropped or is_moved(existing.shards, self._relocations):
            self._totals.is_up_to_date = False
            self._make(existing, changes, plan, {*replaced, *dropped})
            if dropped and not self._stop.signal and not self._output.is_file:
                self._output.drop_rows(self._by_shard(dropped))
        if not self._stop.signal:
            self._output.complete()
            if store.prune:
                self._skip_log.drop_others(self._is_skipped_by(self._output.finished()))
        # The index of a million images takes some hundred megabytes: one at a time.
        del existing, changes
        self._existing, self._finished_images = Existing(), None
        return self._summary(started)

    def _compare(self, stored: StoredImages) -> Changes:
        listing, retry_skipped = self._listing, self._options.store.retry_skipped
        with self._observer.phase("comparing with the output", "image", len(listing)) as phase:
            return stored.compare(listing, self._skip_log, retry_skipped=retry_skipped, on_progress=phase.at)

    def _summary(self, started: float) -> Summary:
        with self._observer.phase("counting"):
            existing = load_existing(self._output, overwrite=self._options.store.overwrite)
            return summarize(
                Account(self._options, self._output, self._listing, existing, self._totals, self._skip_log),
                self._engine,
                seconds=time.monotonic() - started,
                stopped_by=self._stop.signal,
            )

    def withdraw(self) -> None:
        """Leave nothing of a start that failed, unless an image is stored: no folder, no file, no line of a list."""
        with suppress(OSError, InternvitError):  # what went wrong before is what counts
            self._output.withdraw()

    def close(self) -> None:
        """End the workers and let the devices go, however the run ended."""
        if self._engine is not None:
            self._engine.close()

    # -------------------------------------------------------------------------------------------------- what is to do

    def _make(self, existing: Existing, changes: Changes, plan: Plan, gone: set[bytes]) -> None:
        """Encode what is missing: first what an earlier run planned, then what is new.

        Args:
            existing: what is at the output.
            changes: what of the listing is not in it as it is now.
            plan: of these.
            gone: keys whose rows do not count any more.
        """
        shape = self._shape()
        rules = DraftRules(self._shard_size(shape), self._listing.sources, self._relocations)
        self._model.confirm_weights()
        for note in self._model.notes:
            self._observer.note(note)
        if plan.skipped and self._options.run.strict:
            row, skipped = min(plan.skipped.items())
            raise unusable(plan.table.keys[row], skipped)
        drafts = draft_shards(existing.finished, gone, plan.table, rules)
        self._check_space(existing, [self._new_shard(draft, shape) for draft in drafts])
        if drafts and self._output.is_file and existing.finished:
            copied = os.path.getsize(self._output.path)
            self._observer.note(f"{self._output.path} is made anew: up to {counted(copied, 'byte')} of its rows copied")
        self._existing = existing
        self._totals.unsynced = unsynced_folder(self._output.folder)
        self._observer.note(look_ahead(self._listing, changes, existing, plan, self._decoded_tiles).sentence)
        self._start(plan)
        if drafts:
            self._measure_accuracy(plan)
        self._skip_log.append((plan.table.keys[row], skip) for row, skip in plan.skipped.items())
        if existing.partial is not None:
            stored = existing.partial.stored
            self._fill(stored.table, stored.attributes, drafts)
            self._existing = load_existing(self._output, overwrite=self._options.store.overwrite)
            drafts = draft_shards(self._existing.finished, gone, plan.table, rules)
        for number, draft in enumerate(drafts, 1):
            if self._stop.signal:
                return
            shard = self._new_shard(draft, shape)
            with self._observer.phase("setting space aside"):
                create_shard(self._output.backend, self._output.partial_path(self._output.next_number()), shard)
            self._fill(shard.table, shard.complete_attributes, drafts[number:])

    def _shape(self) -> FeatureShape:
        return feature_shape(self._options, self._model.card, self._model.recipe)

    def _new_shard(self, draft: Draft, shape: FeatureShape) -> NewShard:
        batch_tiles = self._engine.batch_tiles_to_record if self._engine else 0
        measured = Measured(batch_tiles, self._accuracy)
        return new_shard(draft, shape, self._model.recipe, self._model.card, measured)

    def _shard_size(self, shape: FeatureShape) -> ShardSize | None:
        """How large the shards of a folder are; None for one file."""
        if self._output.is_file:
            return None
        nothing = self._new_shard(Draft(EMPTY_TABLE, self._listing.sources), shape)
        return ShardSize.of(self._options.store.shard_bytes, self._output.backend, shape, nothing.attributes)

    def _plan(self, changes: Changes) -> tuple[Plan, list[bytes]]:
        """Read the headers of what is new or changed; drawings of ours among it leave the listing.

        Returns:
            The plan, and the keys whose rows it replaces.

        Raises:
            NoImagesError: there is nothing but drawings.
        """
        listing, entries, run = self._listing, changes.entries, self._options.run
        how = PlanOptions(self._rule, usable_cpus(), run.decode_timeout, run.worker_memory)
        with self._observer.phase("reading headers", "image", len(entries)) as phase:
            plan = plan_images(listing, entries, how, phase.at)
        self._listing = require_images(listing.without_drawn(plan.drawn))
        self._totals.drawn_and_named = plan.drawn_and_named
        drawn = set(plan.drawn)
        return plan, [listing.keys[entry] for entry in changes.changed if entry not in drawn]

    def _check_space(self, existing: Existing, shards: list[NewShard]) -> None:
        """Refuse before any work what cannot fit. An unfinished shard has had its space from its creation."""
        with disk_errors(self._output.path):  # such as a limit on the size of files
            needed = sum(self._output.backend.planned_bytes(shard) for shard in shards)
        if existing.partial is not None:
            datasets = self._output.backend.extents(existing.partial.path).values()
            allocated = sum(allocated_bytes(path) for path in {extent.path for extent in datasets})
            needed += max(0, sum(extent.spec.nbytes for extent in datasets) - allocated)
        check_space(self._output.path, needed)

    def _log_unreadable_folders(self) -> None:
        """They have no rows, and so nothing else to show that they are listed already."""
        folders = {problem.path: problem.skipped for problem in self._listing.unreadable_folders}
        if folders:
            known = {os.fsencode(entry["key"]) for entry in read_skip_log(self._output.skipped_path)}
            self._skip_log.append((path, skipped) for path, skipped in folders.items() if path not in known)

    # ------------------------------------------------------------------------------------------------------- doing it

    def _start(self, plan: Plan) -> None:
        """Start decode workers and encoders for all that is to be done, if anything is."""
        partial = self._existing.partial
        tables = [plan.table, *([partial.stored.table] if partial else [])]
        counts = np.concatenate([self._decoded_tiles(table)[table.status == Status.PENDING] for table in tables])
        workload = Workload(len(counts), int(counts.max())) if len(counts) else None
        if workload is not None or not self._model.dtype_is_known:
            self._start_engine(workload)

    def _decoded_tiles(self, table: ImageTable) -> NDArray[Any]:
        """How many tiles each image is decoded to, [n] int64."""
        counts = table.tile_counts.astype(np.int64)
        return np.ones_like(counts) if self._rule.global_view_only else counts

    @property
    def _rule(self) -> PixelRule:
        return pixel_rule(self._model.recipe, self._options.pictures.max_pixels)

    def _start_engine(self, workload: Workload | None) -> None:
        run, recipe = self._options.run, self._model.recipe
        devices = find_devices(run.devices)
        recorded = (self._existing.attributes or {}).get("batch_tiles", 0)
        encoder = replace(
            encoder_options_of_run(run, recipe, devices[0]),
            dtype=recipe.compute_dtype if self._model.dtype_is_known else run.dtype,
            recorded_batch_tiles=int(recorded) or None,
        )
        engine_options = EngineOptions(
            rule=self._rule,
            encoder=encoder,
            devices=devices,
            workers=run.workers,
            decode_timeout=run.decode_timeout,
            worker_memory=run.worker_memory,
        )
        with self._observer.phase("loading the model"):
            self._engine = engine = start_engine(self._model.checkpoint, engine_options, workload)
        self._model.recipe = replace(recipe, compute_dtype=engine.dtype)
        if workload is None:  # only the types were of interest
            return
        label = f"{self._model.card.name} in {engine.dtype.value} on {engine.device_name}"
        batch = counted(engine.batch_tiles, "tile")
        self._observer.note(f"encoding with {label}, {batch} per batch, {engine.kernels}")

    def _measure_accuracy(self, plan: Plan) -> None:
        """Know what coarse types cost before anything is made with them; once for an output.

        Raises:
            AccuracyError: one is too coarse.
        """
        recipe, recorded = self._model.recipe, self._existing.attributes or {}
        names = measured_attributes(recipe)
        if all(name in recorded for name in names):
            self._accuracy = {name: recorded[name] for name in names}
            return
        accuracy = Accuracy()
        rows = np.flatnonzero(plan.table.status == Status.PENDING)[:SAMPLE_IMAGES]
        if self._engine is not None and len(rows):
            most_tiles = int(self._decoded_tiles(plan.table)[plan.table.status == Status.PENDING].max())
            jobs = list(decode_jobs(plan.table, rows, self._listing.sources))
            with self._observer.phase("measuring what coarse types cost"):
                accuracy = self._engine.measure(jobs, Workload(len(plan.table), most_tiles), self._stop)
        accuracy.check()
        if accuracy.words:
            self._observer.note(f"on the first pictures: {accuracy.words}")
        self._accuracy = to_attributes(recipe, accuracy)

    def _fill(self, table: ImageTable, attributes: dict[str, Any], later: Sequence[Draft]) -> None:
        """Encode the pending images of the shard at hand and publish it when none is left; `later` ones follow."""
        self._stop.is_working = True
        number, finished = self._output.next_number(), self._existing.finished
        older = self._by_shard(table.keys)
        writer = ShardWriter(self._output.backend, self._output.partial_path(number), table)
        try:
            writer.rewrite_commit_records()
            self._do_again(contradictory_rows(table, writer, self._skip_log), writer)
            with self._recheck(table, writer) as recheck:
                for shard in finished:
                    if self._output.is_file or shard.name in older:
                        self._take_over(shard, table, writer)
                sources = stored_sources(attributes, self._output.path, self._relocations)
                is_begun = bool(finished or self._totals.tally.images)
                self._encode_pending(_Shard(table, sources, writer, later), is_begun=is_begun)
                damaged = self._wait_for(recheck)
            if damaged:
                self._do_again(damaged, writer)
                self._encode_pending(_Shard(table, sources, writer, later), is_begun=True)
            finished_all = bool((writer.status != Status.PENDING).all())
        finally:
            writer.close()
        if not finished_all or self._stop.signal:
            return
        with self._observer.phase("publishing"):
            unpublished = self._output.partial()  # read once more: what cannot be read gets no final name
            if unpublished is None or (unpublished.stored.table.status == Status.PENDING).any():
                raise OutputError(
                    f"another run writes to {self._output.path} too",
                    "see to it that only one does, then run the same command again",
                )
            if not later:
                others = () if self._output.is_file else self._output.finished()
                self._skip_log.rewrite(self._is_skipped_by([*others, unpublished]))
            self._output.publish(number, len(table), table.tiles, older)

    def _take_over(self, old: FinishedShard, table: ImageTable, writer: ShardWriter) -> None:
        with self._observer.phase("copying earlier rows", "image") as phase:
            take_over(old, table, writer, lambda: bool(self._stop.signal), phase.at)

    def _recheck(self, table: ImageTable, writer: ShardWriter) -> Recheck:
        recheck = Recheck(table, writer)
        if (writer.status == Status.DONE).any():
            self._observer.note(f"{counted(recheck.nbytes, 'byte')} of earlier runs checked again beside the encoding")
        return recheck

    def _wait_for(self, recheck: Recheck) -> list[int]:
        if not recheck.nbytes:
            return []
        with self._observer.phase("checking earlier rows"):
            return recheck.damaged_rows(lambda: bool(self._stop.signal))

    def _do_again(self, rows: list[int], writer: ShardWriter) -> None:
        """Have rows of an earlier run be encoded again, for they are not what was committed."""
        writer.forget(rows)
        self._totals.mistrusted += len(rows)
        if rows:
            self._observer.note(
                f"{counted(len(rows), 'image')} more to encode: damaged on the disk since an earlier run"
            )

    def _is_skipped_by(self, shards: Sequence[FinishedShard]) -> Callable[[str], bool]:
        """What tells whether a key belongs on the list of skipped images of an output with these shards."""
        stored = StoredImages(shards)
        folders = {os.fsdecode(problem.path) for problem in self._listing.unreadable_folders}
        settled = (None, Status.DONE, Status.PENDING)
        return lambda key: key in folders or stored.status(os.fsencode(key)) not in settled

    def _encode_pending(self, shard: _Shard, *, is_begun: bool) -> None:
        table, writer = shard.table, shard.writer
        rows = np.flatnonzero(writer.status == Status.PENDING)
        if not len(rows):
            return
        workload = Workload(len(rows), int(self._decoded_tiles(table)[rows].max()))
        if self._engine is None:
            self._start_engine(workload)
        assert self._engine is not None
        job = ShardJob(
            workload=workload,
            keys=table.keys,
            jobs=decode_jobs(table, rows, shard.sources),
            first_tile=table.tile_offset,
            writer=writer,
            skip_log=self._skip_log,
            rules=self._fill_rules(is_begun=is_begun or bool((writer.status == Status.DONE).any())),
        )
        with self._observer.phase("encoding", "image") as phase:
            filled = self._engine.fill(job, self._stop, self._teller(phase, shard, rows))
        self._totals.add(filled)
        is_done = writer.status[rows] == Status.DONE
        self._totals.encoded_unlisted += sum(table.keys[row] in self._unlisted for row in rows[is_done].tolist())
        done = filled.tally
        writer.append_run_log(self._run_facts(self._engine) | run_log_entry(filled.stages, done.images, done.tiles))

    def _teller(self, phase: Phase, shard: _Shard, rows: NDArray[Any]) -> Callable[[Tally], None]:
        """What tells how far all shards are together: what is done, what this one lacks, what later ones bring."""
        before = self._totals.tally
        parts = [self._decoded_tiles(shard.table)[rows]]
        parts += [self._decoded_tiles(draft.table)[draft.to_encode] for draft in shard.later]
        images = before.images + before.skipped + sum(map(len, parts))
        tiles = before.tiles + before.skipped_tiles + sum(int(part.sum()) for part in parts)

        def tell(tally: Tally) -> None:
            so_far = before.plus(tally)
            work = Work("tile", so_far.tiles + so_far.skipped_tiles, tiles)
            phase.at(so_far.images + so_far.skipped, images, work=work, skipped=so_far.skipped)

        tell(Tally())
        return tell

    def _fill_rules(self, *, is_begun: bool) -> FillRules:
        return FillRules(self._model.recipe, is_begun=is_begun, strict=self._options.run.strict)

    def _run_facts(self, engine: Engine) -> dict[str, Any]:
        """What a shard's log of starts says of this one."""
        return {
            "device": engine.device_name,
            "dtype": engine.dtype.value,
            "batch_tiles": engine.batch_tiles,
            "kernels": engine.kernels,
            "workers": engine.workers,
            "model": self._model.recorded_name,
            "output": os.path.abspath(self._output.path),
        }

    def _by_shard(self, keys: Iterable[bytes]) -> dict[str, list[str]]:
        """Those of some keys that have rows in finished shards of a folder, by the shard's name."""
        if self._finished_images is None or self._finished_images[0] is not self._existing:
            self._finished_images = self._existing, StoredImages(self._existing.finished)
        stored = self._finished_images[1]
        found: dict[str, list[str]] = {}
        for key in keys:
            if stored.status(key) is not None:
                found.setdefault(stored.shard_name(key), []).append(os.fsdecode(key))
        return found
