"""The main job from end to end: discover, plan, decode, encode, store, report; it alone knows every stage."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from internvit_cli.config import ComputeDtype, Status
from internvit_cli.decode.decoder import DecodeJob, DecodeOptions, Decoder
from internvit_cli.errors import OutputError, StoppedError
from internvit_cli.existing import Existing, load_existing, settle
from internvit_cli.filling import FillJob, fill_shard, unusable
from internvit_cli.headers import Header
from internvit_cli.model.catalog import TINY_RANDOM
from internvit_cli.observer import SILENT, Observer, Progress
from internvit_cli.plan import Plan, PlanOptions, plan_images
from internvit_cli.preview import find_images
from internvit_cli.recipes import ModelInUse, feature_shape, pixel_rule, stored_name
from internvit_cli.reconcile import Relocation, StoredImages, prunable, stored_sources
from internvit_cli.report import Counts, Stages, Summary, run_log_entry
from internvit_cli.sharding import Draft, merge_rows, new_shard, split_table
from internvit_cli.stopping import Interruption
from internvit_cli.storage.commit import ShardWriter, create_shard
from internvit_cli.storage.durable import allocated_bytes, check_space, disk_errors
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import FinishedShard, Output
from internvit_cli.storage.recheck import Recheck, contradictory_rows
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.takeover import take_over
from internvit_cli.table import ImageTable, count_statuses
from internvit_cli.tiling import Grid
from internvit_cli.workers import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from internvit_cli.config import PixelRule
    from internvit_cli.encoder import Encoder
    from internvit_cli.options import ExtractOptions
    from internvit_cli.reconcile import Changes
    from internvit_cli.sources import Listing, Source
    from internvit_cli.stopping import StopRequest
    from internvit_cli.storage.layout import FeatureShape, NewShard


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
    output = Output(options.store.output, options.store.format)
    try:
        with exclusive(output.path, enabled=options.store.lock):
            listing = find_images(options, stdin)
            run = _Extraction(options, stop, observer, listing, output)
            try:
                return run.run(started)
            finally:
                run.close()
    except Interruption:
        raise StoppedError("stopped before anything was encoded") from None


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
        self._decoder: Decoder | None = None
        self._encoder: Encoder | None = None
        self._stages = Stages()
        self._total = Progress()
        self._clamped = 0
        self._dropped = 0
        self._mistrusted = 0
        """Images that are done again because what was recorded of them is damaged."""

    def run(self, started: float) -> Summary:
        self._output.prepare()
        store = self._options.store
        existing = load_existing(self._output, overwrite=store.overwrite)
        self._model = ModelInUse(self._options, existing.attributes)
        existing = settle(self._output, existing, self._model.recipe, overwrite=store.overwrite)
        stored = StoredImages(existing.shards, self._relocations)
        self._skip_log = SkipLog(self._output.skipped_path)
        changes = stored.compare(self._listing, self._skip_log, retry_skipped=store.retry_skipped)
        self._mistrusted = changes.damaged
        dropped = prunable(stored, changes, self._listing, confirmed=store.yes) if store.prune else []
        self._dropped = len(dropped)
        self._log_unreadable_folders()
        if existing.partial is not None or changes.entries or dropped or self._is_moved(existing.shards):
            self._make(existing, changes, dropped)
        if not self._stop.signal:
            self._output.complete()
        return self._summary(time.monotonic() - started)

    def close(self) -> None:
        """End the workers and let the device go, however the run ended."""
        if self._decoder is not None:
            self._decoder.close()
        if self._encoder is not None:
            self._encoder.close()

    # -------------------------------------------------------------------------------------------------- what is to do

    def _make(self, existing: Existing, changes: Changes, dropped: list[bytes]) -> None:
        """Encode what is missing: first what an earlier run planned, then what is new."""
        shape = feature_shape(self._options, self._model.card, self._model.recipe)
        self._model.confirm_weights()
        plan = self._plan(changes.entries)
        if plan.skipped and self._options.run.strict:
            row, skipped = min(plan.skipped.items())
            raise unusable(plan.table.keys[row], skipped)
        gone = {*dropped, *(self._listing.keys[entry] for entry in changes.changed)}
        drafts = self._drafts(existing.finished, gone, plan, shape)
        self._check_space(existing, [self._new_shard(draft, shape) for draft in drafts])
        if drafts and self._output.is_file and existing.finished:
            copied = os.path.getsize(self._output.path)
            self._observer.note(f"{self._output.path} is made anew: up to {copied:,} bytes of its rows are copied")
        self._skip_log.append((self._listing.keys[changes.entries[row]], skip) for row, skip in plan.skipped.items())
        self._existing = existing
        self._start(plan)
        if existing.partial is not None:
            stored = existing.partial.stored
            self._fill(stored.table, stored.attributes, is_last=not drafts)
            self._existing = load_existing(self._output, overwrite=self._options.store.overwrite)
            drafts = self._drafts(self._existing.finished, gone, plan, shape)
        for number, draft in enumerate(drafts, 1):
            if self._stop.signal:
                return
            shard = self._new_shard(draft, shape)
            create_shard(self._output.backend, self._output.partial_path(self._output.next_number()), shard)
            self._fill(shard.table, shard.complete_attributes, is_last=number == len(drafts))
        if dropped and not self._stop.signal and not self._output.is_file:
            self._output.drop_rows(self._by_shard(dropped))

    def _new_shard(self, draft: Draft, shape: FeatureShape) -> NewShard:
        batch_tiles = self._encoder.batch_tiles_to_record if self._encoder else 0
        return new_shard(draft, shape, self._model.recipe, self._model.card, batch_tiles)

    def _plan(self, entries: list[int]) -> Plan:
        def on_progress(done: int) -> None:
            self._observer.headers(done, len(entries))

        run = self._options.run
        how = PlanOptions(self._rule, usable_cpus(), run.decode_timeout, run.worker_memory)
        return plan_images(self._listing, entries, how, on_progress)

    def _drafts(
        self, finished: Sequence[FinishedShard], gone: Collection[bytes], plan: Plan, shape: FeatureShape
    ) -> list[Draft]:
        """The shards to make: more of them in a folder; a single file is made anew, with the rows it has.

        A shard whose pictures moved is made anew too, for it names their source.
        """
        sources, added = self._listing.sources, plan.table
        if self._output.is_file and finished:
            if not len(added) and not gone and not self._is_moved(finished):
                return []
            return [merge_rows(finished[0], gone, added, sources, self._relocations)]
        nothing = added.take(np.arange(0))
        moved = [shard for shard in finished if self._is_moved([shard])]
        drafts = [merge_rows(shard, gone, nothing, (), self._relocations) for shard in moved]
        if not len(added):
            return drafts
        tables = [added] if self._output.is_file else split_table(added, shape, self._options.store.shard_bytes)
        return [*drafts, *(Draft(table, sources) for table in tables)]

    def _is_moved(self, shards: Sequence[FinishedShard]) -> bool:
        """Whether shards name a source that has moved since."""
        return any(
            stored_sources(shard.stored.attributes, shard.path)
            != stored_sources(shard.stored.attributes, shard.path, self._relocations)
            for shard in shards
            if len(shard.superseded_keys) < len(shard.stored.table)
        )

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
        """Start the decode workers, and while they start, load the encoder."""
        partial = self._existing.partial
        tables = [plan.table, *([partial.stored.table] if partial else [])]
        counts = np.concatenate([table.tile_counts[_pending(table)] for table in tables]).astype(np.int64)
        if len(counts):
            if self._rule.global_view_only:
                counts = np.ones_like(counts)
            self._observer.encoding(len(counts), int(counts.sum()))
            self._start_decoder(len(counts), int(counts.max()))
        if len(counts) or not self._model.dtype_is_known:
            self._load_encoder()

    def _start_decoder(self, images: int, tiles: int) -> None:
        run = self._options.run
        workers = min(run.workers or default_workers(run.device), images)
        self._decoder = Decoder(DecodeOptions(self._rule, tiles, workers, run.decode_timeout, run.worker_memory))

    @property
    def _rule(self) -> PixelRule:
        return pixel_rule(self._model.recipe, self._options.pictures.max_pixels)

    def _load_encoder(self) -> None:
        from internvit_cli.encoder import Encoder, EncoderOptions

        options, recipe = self._options, self._model.recipe
        recorded = self._existing.attributes or {}
        dtype = ComputeDtype(recipe.compute_dtype) if self._model.dtype_is_known else options.run.dtype
        encoder_options = EncoderOptions(
            device=options.run.device,
            dtype=dtype,
            batch_tiles=options.run.batch_tiles,
            recorded_batch_tiles=int(recorded.get("batch_tiles", 0)) or None,
            tokens=options.store.tokens,
            pool=options.store.pool,
            tile_size=recipe.tile_size,
            layer=recipe.layer,
            token_order=self._model.card.token_order,
            store_dtype=options.store.store_dtype,
            on_overflow=options.store.on_overflow,
            threads=options.run.threads,
        )
        self._encoder = Encoder.load(self._model.checkpoint, encoder_options)
        self._model.recipe = replace(recipe, compute_dtype=self._encoder.dtype.value)
        label = f"{self._model.card.name} in {self._encoder.dtype.value} on {self._encoder.device_name}"
        self._observer.ready(f"{label}, {self._encoder.batch_tiles} tiles a batch")

    def _fill(self, table: ImageTable, attributes: dict[str, Any], *, is_last: bool) -> None:
        """Encode the pending images of the shard at hand and publish it when none is left."""
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
                        take_over(shard, table, writer, lambda: bool(self._stop.signal))
                sources = stored_sources(attributes, self._output.path, self._relocations)
                is_begun = bool(finished or self._total.images)
                self._encode_pending(table, sources, writer, is_begun=is_begun)
                damaged = recheck.damaged_rows(lambda: bool(self._stop.signal))
            if damaged:
                self._do_again(damaged, writer)
                self._encode_pending(table, sources, writer, is_begun=True)
            finished_all = bool((writer.status != Status.PENDING).all())
        finally:
            writer.close()
        if not finished_all or self._stop.signal:
            return
        unpublished = self._output.partial()  # read once more: what cannot be read gets no final name
        if unpublished is None or _pending(unpublished.stored.table).any():
            raise OutputError(
                f"another run writes to {self._output.path} too",
                "see to it that only one does, then run the same command again",
            )
        if is_last:
            self._tidy_skip_log(unpublished)
        self._output.publish(number, len(table), table.tiles, older)

    def _recheck(self, table: ImageTable, writer: ShardWriter) -> Recheck:
        recheck = Recheck(table, writer)
        if (writer.status == Status.DONE).any():
            self._observer.note(f"{recheck.nbytes:,} bytes of earlier runs are checked again beside the encoding")
        return recheck

    def _do_again(self, rows: list[int], writer: ShardWriter) -> None:
        """Have rows of an earlier run be encoded again, for they are not what was committed."""
        writer.forget(rows)
        self._mistrusted += len(rows)

    def _tidy_skip_log(self, partial: FinishedShard) -> None:
        """Leave one line for each image that is skipped now, whichever run skipped it."""
        others = () if self._output.is_file else self._output.finished()
        stored = StoredImages([*others, partial])
        folders = {os.fsdecode(problem.path) for problem in self._listing.unreadable_folders}
        settled = (None, Status.DONE, Status.PENDING)
        self._skip_log.rewrite(lambda key: key in folders or stored.status(os.fsencode(key)) not in settled)

    def _encode_pending(
        self, table: ImageTable, sources: Sequence[Source], writer: ShardWriter, *, is_begun: bool
    ) -> None:
        rows = np.flatnonzero(writer.status == Status.PENDING)
        if not len(rows):
            return
        tiles = 1 if self._rule.global_view_only else int(table.tile_counts[rows].max())
        if self._decoder is None or self._decoder.tiles < tiles:
            self._restart_decoder(len(rows), tiles)
        if self._encoder is None:
            self._load_encoder()
        assert self._decoder is not None and self._encoder is not None
        recipe = self._model.recipe
        job = FillJob(
            keys=table.keys,
            jobs=_decode_jobs(table, rows, sources),
            writer=writer,
            skip_log=self._skip_log,
            pool_all_tiles=not recipe.thumbnail,
            store_tile_vectors=recipe.tile_pooled,
            is_begun=is_begun,
            strict=self._options.run.strict,
        )
        before = self._total
        filled = fill_shard(
            job,
            self._decoder,
            self._encoder,
            self._stop,
            lambda progress: self._observer.progress(before.plus(progress)),
        )
        self._stages = self._stages.plus(filled.stages)
        self._total = before.plus(filled.progress)
        self._clamped += filled.clamped
        encoder = self._encoder
        how = {
            "device": encoder.device_name,
            "dtype": encoder.dtype.value,
            "batch_tiles": encoder.batch_tiles,
            "workers": len(self._decoder.pids),
            "model": stored_name(self._options.model.name),
            "output": os.path.abspath(self._output.path),
        }
        writer.append_run_log(how | run_log_entry(filled.stages, filled.progress.images))

    def _restart_decoder(self, images: int, tiles: int) -> None:
        """Decode what was not planned: rows that could not be taken over because they are damaged."""
        if self._decoder is not None:
            self._decoder.close()
        self._start_decoder(images, tiles)

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

    # ------------------------------------------------------------------------------------------------------ telling it

    def _summary(self, seconds: float) -> Summary:
        existing = load_existing(self._output, overwrite=self._options.store.overwrite)
        encoder = self._encoder
        return Summary(
            output=self._output.path,
            skipped_path=self._output.skipped_path,
            model=(existing.attributes or {}).get("model", self._options.model.name),
            counts=self._counts(StoredImages(existing.shards)),
            tiles=self._total.tiles,
            encoded=self._total.images,
            bytes=sum(_shard_bytes(shard) for shard in existing.shards),
            seconds=seconds,
            stages=self._stages,
            device=encoder.device_name if encoder else "",
            dtype=encoder.dtype.value if encoder else "",
            batch_tiles=encoder.batch_tiles if encoder else 0,
            notes=self._notes(),
            stopped_by=self._stop.signal,
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._options.model.name == TINY_RANDOM:
            notes.append("tiny-random has random weights: its features try the tool out and mean nothing")
        if self._encoder is not None and self._encoder.halved:
            notes.append(
                "a batch ran out of memory and the size was halved: "
                "rows may differ by rounding from those of full batches"
            )
        if self._dropped:
            notes.append(f"{self._dropped:,} rows of deleted pictures were dropped")
        if self._mistrusted:
            notes.append(f"{self._mistrusted:,} images of an earlier run were damaged on the disk and are done again")
        if self._clamped:
            notes.append(f"{self._clamped:,} values were clamped to the range of the stored type")
        if self._listing.unfollowed_links:
            notes.append(f"{self._listing.unfollowed_links} links to folders were not followed (--follow-links)")
        return tuple(notes)

    def _counts(self, stored: StoredImages) -> Counts:
        found = [stored.status(key) for key in self._listing.keys]
        kept = len(stored) - sum(status is not None for status in found)
        statuses = np.fromiter((status or 0 for status in found), np.uint8, len(found))
        by_status = count_statuses(statuses)
        done, pending = by_status.pop(Status.DONE, 0), by_status.pop(Status.PENDING, 0)
        reasons = {status.word: count for status, count in by_status.items()}
        if folders := len(self._listing.unreadable_folders):
            reasons["unreadable_folder"] = folders
        return Counts(len(statuses) + folders, done, sum(reasons.values()), pending, kept, reasons)


def _pending(table: ImageTable) -> NDArray[Any]:
    pending: NDArray[Any] = table.status == Status.PENDING
    return pending


def _decode_jobs(table: ImageTable, rows: NDArray[Any], sources: Sequence[Source]) -> Iterator[DecodeJob]:
    for row in rows.tolist():
        key = table.keys[row]
        header = Header(*(int(getattr(table, name)[row]) for name in Header._fields))
        grid = Grid(int(table.columns[row]), int(table.rows[row]))
        yield DecodeJob(row, sources[int(table.source[row])].path(key), header, grid)


def _shard_bytes(shard: FinishedShard) -> int:
    if shard.is_partial:
        return allocated_bytes(shard.path)
    return sum(os.path.getsize(path) for path in shard.backend.final_paths(shard.path))


def default_workers(device: str) -> int:
    """Decode processes, when the user names no number.

    With a card every core decodes. On a CPU the encoder needs the cores, and workers fill what its threads leave.
    """
    cpus = usable_cpus()
    on_card = device.startswith("cuda") or (device == "auto" and os.path.exists("/dev/nvidiactl"))
    return min(cpus, 64) if on_card else max(1, cpus // 2)
