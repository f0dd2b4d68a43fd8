"""Check whether an output still holds what was committed, for `internvit verify`.

Index, recipe, manifest and datasets are compared with each other, every committed row with its CRC, and the digests
with the pictures that still exist. On request, a sample is compared with a new encoding.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import OutputError
from internvit_cli.extract.changes import stored_sources
from internvit_cli.options import named_path
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.observer import BYTES, SILENT, Observer
from internvit_cli.runtime.untrusted import file_kind
from internvit_cli.runtime.words import counted, counted_of
from internvit_cli.runtime.workers import usable_cpus
from internvit_cli.storage.check.checksums import CommittedRows
from internvit_cli.storage.format.layout import SHARD_FILE, ForeignFileError, stored_recipe
from internvit_cli.storage.format.soundness import check_alike
from internvit_cli.storage.output import MANIFEST, NEXT_MANIFEST, Output, names_in
from internvit_cli.storage.output_names import PARTIAL, missing
from internvit_cli.storage.read.places import ShardPlace, places_in
from internvit_cli.storage.same_file import ReplacedError
from internvit_cli.storage.skipped import read_skip_log
from internvit_cli.verify.result import Finding, LoadedShard, PictureCheck, StoredRow, VerifyResult
from internvit_cli.verify.source_files import PictureState, check_pictures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from internvit_cli.runtime.observer import Phase
    from internvit_cli.storage.output import ManifestEntry
    from internvit_cli.verify.result import ReencodeComparison, VerifyOptions

NO_DIGEST = bytes(32)


def verify(options: VerifyOptions, observer: Observer = SILENT) -> VerifyResult:
    """Check an output without writing anything, and without disturbing a run that is filling it.

    Args:
        options: The output, and what to check.
        observer: Receives progress; findings and notes are in the result.

    Returns:
        What was checked and what is wrong; damage is a finding, not an error.

    Raises:
        OutputError: There is no output at the path.
    """
    return _Verification(options, observer).run()


@dataclass(slots=True)
class _RowTotals:
    rows: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class _Verification:
    """The state of a verification, which finds the shards and runs all checks."""

    def __init__(self, options: VerifyOptions, observer: Observer) -> None:
        self._options = options
        self._observer = observer
        self._path = named_path(options.path)
        self._threads = options.threads or usable_cpus()
        self._findings: list[Finding] = []
        self._notes: list[str] = []

    def run(self) -> VerifyResult:
        """Run all checks, the cheap ones first."""
        with self._observer.phase("reading the index"):
            shards = list(self._shards())
            self._check_together(shards)
            for shard in shards:
                self._check_records(shard)
        totals = self._check_rows(shards)
        self._check_skip_log(shards)
        pictures = self._check_pictures(shards) if self._options.pictures else None
        comparisons = self._re_extract(shards)
        statuses = [shard.table.status[shard.live_rows] for shard in shards]
        counts = count_statuses(np.concatenate(statuses)) if statuses else {}
        attributes = shards[-1].found.stored.attributes if shards else {}
        return VerifyResult(
            path=self._path,
            model=str(attributes.get("model", "")),
            shards=len(shards),
            images={status.word: count for status, count in counts.items()},
            rows=totals.rows,
            bytes=totals.nbytes,
            seconds=totals.seconds,
            pictures=pictures,
            comparisons=comparisons,
            findings=tuple(self._findings),
            notes=tuple(self._notes),
        )

    def _report(self, check: str, path: str, key: str | None, problem: str) -> None:
        self._findings.append(Finding(check, path, key, problem))

    def _note(self, text: str) -> None:
        self._notes.append(text)

    # ------------------------------------------------------------------------------------------------ index and recipe

    def _shards(self) -> Iterator[LoadedShard]:
        if not os.path.exists(self._path):
            raise missing(self._path)
        output = Output(self._path.removesuffix(PARTIAL))
        mode = os.stat(self._path).st_mode
        if stat.S_ISDIR(mode):
            yield from self._folder_shards(output)
            return
        if not stat.S_ISREG(mode):
            raise OutputError(f"{self._path} is {file_kind(mode)}, not a feature file", "name the output of a run")
        if not output.is_file:
            raise OutputError(f"{self._path} is not a feature file", "feature files end in .h5 or .hdf5")
        if self._path == output.path and os.path.exists(output.partial_path(0)):
            self._note(f"an unfinished run has rows in {output.partial_path(0)}; verify that file too")
        yield from self._load(ShardPlace(self._path, output.backend))

    def _folder_shards(self, output: Output) -> Iterator[LoadedShard]:
        manifest = os.path.join(self._path, MANIFEST)
        try:
            places, number = places_in(self._path), output.next_number()
        except OutputError as error:
            self._report("manifest", manifest, None, error.message)
            return
        for place in places:
            for shard in self._load(place):
                if place.entry is not None:
                    self._check_entry(place.entry, shard, manifest)
                yield shard
        partial = output.partial_path(number)
        if os.path.exists(partial):
            yield from self._load(ShardPlace(partial, output.backend))
        elif not places and any(SHARD_FILE.fullmatch(name) for name in names_in(self._path)):
            self._report("manifest", manifest, None, "it names no shard, but there are shards beside it")
        elif not places:
            raise OutputError(f"{self._path} holds no features", f"a feature folder has a {MANIFEST} and its shards")

    def _load(self, place: ShardPlace) -> Iterator[LoadedShard]:
        """Yield the shard, or report a finding."""
        path = place.path
        try:
            found = place.load()
            digests, checksums = place.backend.commit_records(path)
            recipe = stored_recipe(found.stored.attributes, path)
            sources = stored_sources(found.stored.attributes, path)
        except OutputError as error:
            if isinstance(error, ForeignFileError) and path == self._path:
                raise  # this is not a feature file
            self._report("index", path, None, error.message)
            return
        yield LoadedShard(found, recipe, sources, digests, checksums, is_partial=found.is_partial)

    def _check_entry(self, entry: ManifestEntry, shard: LoadedShard, manifest: str) -> None:
        table = shard.table
        for what, named, there in (("images", entry.images, len(table)), ("tiles", entry.tiles, table.tiles)):
            if named != there:
                self._report("manifest", manifest, None, f"{entry.name} has {there:,} {what}; it says {named:,}")
        if strange := shard.found.superseded_keys.difference(table.keys):
            key = os.fsdecode(min(strange))
            self._report("manifest", manifest, key, f"superseded in {entry.name}, which has no such row")

    def _check_together(self, shards: list[LoadedShard]) -> None:
        """Check that all shards have one recipe and rows of one size, and that each image counts once."""
        try:
            check_alike([(shard.path, shard.found.stored.specs) for shard in shards])
        except OutputError as error:
            self._report("datasets", shards[0].path, None, error.message)
        counted: set[bytes] = set()
        is_being_replaced = os.path.exists(os.path.join(self._path, NEXT_MANIFEST))
        for shard in shards:
            different = shard.recipe.differences(shards[0].recipe)
            if different and not (shard.is_partial and is_being_replaced):
                problem = f"its recipe differs from that of {shards[0].path} in {', '.join(different)}"
                self._report("recipe", shard.path, None, problem)
            if shard.is_partial:
                continue  # its rows replace older ones once it is finished
            if len(shards) == 1:
                return
            keys = [shard.table.keys[row] for row in shard.live_rows.tolist()]
            for key in counted.intersection(keys):
                self._report("manifest", shard.path, os.fsdecode(key), "an earlier shard has a row that counts too")
            counted.update(keys)

    # ------------------------------------------------------------------------------------------------------------ rows

    def _check_rows(self, shards: list[LoadedShard]) -> _RowTotals:
        committed = [_committed(shard) for shard in shards]
        totals = _RowTotals()
        started = time.perf_counter()
        with self._observer.phase("checking rows", BYTES, sum(rows.nbytes for rows in committed)) as phase:
            for shard, rows in zip(shards, committed, strict=True):
                self._check_shard_rows(shard, rows, totals, phase)
        totals.seconds = time.perf_counter() - started
        return totals

    def _check_shard_rows(self, shard: LoadedShard, rows: CommittedRows, totals: _RowTotals, phase: Phase) -> None:
        try:
            for checked in rows.check(self._threads):
                totals.rows += checked.images
                totals.nbytes += checked.nbytes
                for row, problem in checked.problems:
                    self._report("rows", shard.path, os.fsdecode(shard.table.keys[row]), problem)
                phase.at(totals.nbytes)
        except ReplacedError as error:
            self._report("rows", shard.path, None, f"{error.message}; verify it again")

    def _check_records(self, shard: LoadedShard) -> None:
        """Check statuses against digests, and report pending rows."""
        has_digest = shard.digests.any(axis=1)
        status, keys = shard.table.status, shard.table.keys
        for row in np.flatnonzero((status == Status.DONE) & ~has_digest).tolist():
            self._report("rows", shard.path, os.fsdecode(keys[row]), "it is done, but has no digest of its picture")
        for row in np.flatnonzero((status > Status.DONE) & has_digest).tolist():
            self._report("rows", shard.path, os.fsdecode(keys[row]), "it was skipped, but has a digest of its picture")
        pending = np.flatnonzero(status == Status.PENDING).tolist()
        if pending and shard.is_partial:
            self._note(f"{shard.path} is unfinished: {counted_of(len(pending), len(status), 'image')} pending")
            return
        for row in pending:
            self._report("rows", shard.path, os.fsdecode(keys[row]), "it is pending in a finished file")

    def _check_skip_log(self, shards: list[LoadedShard]) -> None:
        """Check that each skipped image has its reason in the list of skipped images."""
        path = Output(self._path.removesuffix(PARTIAL)).skipped_path
        reasons: dict[str, set[str]] = {}
        try:
            entries = read_skip_log(path)
        except OutputError as error:
            self._note(error.message)
            return
        for entry in entries:
            reasons.setdefault(entry["key"], set()).add(str(entry.get("reason")))
        unlisted = 0
        for row in _rows(shards, set(Status) - {Status.PENDING, Status.DONE}):
            word = Status(int(row.shard.table.status[row.number])).word
            listed = reasons.get(row.key)
            unlisted += listed is None
            if listed is not None and word not in listed:
                problem = f"it was skipped as {word}; {path} says {', '.join(sorted(listed))}"
                self._report("rows", row.shard.path, row.key, problem)
        if unlisted:
            self._note(f"{counted(unlisted, 'skipped image')} without a reason in {path}")

    # -------------------------------------------------------------------------------------------- pictures and encoding

    def _check_pictures(self, shards: list[LoadedShard]) -> PictureCheck:
        rows = [row for row in _rows(shards, {Status.DONE}) if row.digest != NO_DIGEST]
        started, nbytes = time.perf_counter(), 0
        keys: dict[PictureState, list[str]] = {state: [] for state in PictureState}
        with self._observer.phase("checking pictures", "picture", len(rows)) as phase:
            for number, (row, picture) in enumerate(check_pictures(rows, self._threads), 1):
                keys[picture.state].append(row.key)
                nbytes += picture.nbytes
                if picture.state is PictureState.CONTRADICTS:
                    problem = "its picture has another digest, although its size and time are unchanged"
                    self._report("pictures", row.shard.path, row.key, problem)
                phase.at(number)
        return PictureCheck(
            unchanged=len(keys[PictureState.UNCHANGED]),
            changed=tuple(keys[PictureState.CHANGED]),
            missing=tuple(keys[PictureState.MISSING]),
            bytes=nbytes,
            seconds=time.perf_counter() - started,
        )

    def _re_extract(self, shards: list[LoadedShard]) -> tuple[ReencodeComparison, ...]:
        if not self._options.re_extract:
            return ()
        from internvit_cli.verify.reencode import ReExtraction

        extraction = ReExtraction(
            self._options, list(_rows(shards, {Status.DONE})), self._observer, self._note, self._report
        )
        return tuple(extraction.comparisons())


def _committed(shard: LoadedShard) -> CommittedRows:
    extents = shard.found.backend.extents(shard.path)
    return CommittedRows(extents, shard.table, shard.checksums, shard.found.files)


def _rows(shards: list[LoadedShard], statuses: set[Status]) -> Iterator[StoredRow]:
    """Yield the rows with some statuses that count."""
    return (StoredRow(shard, row) for shard in shards for row in shard.rows_with(statuses).tolist())
