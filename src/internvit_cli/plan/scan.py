"""Build a table of images from a listing: headers give sizes, and sizes give tiles, rows and bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import PixelRule, Skipped, Status
from internvit_cli.plan.headers import Header, OwnDrawing
from internvit_cli.plan.table import ImageTable, modified_ns
from internvit_cli.plan.tiling import choose_grid, has_thumbnail
from internvit_cli.runtime.workers import FinishedTask, LostTask, WorkerPool, WorkerSpec
from internvit_cli.sources.members import status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from internvit_cli.sources.interface import Listing

HEADER_CHUNK = 256
"""Headers per task: enough to hide the round trip, few enough to read them again singly if a worker dies."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The images of a listing with their sizes and tiles."""

    table: ImageTable
    skipped: dict[int, Skipped]
    """The reasons of rows whose header could not be read."""
    drawn: tuple[int, ...] = ()
    """Entries of the listing without a row: pictures drawn by internvit that were found in a source."""
    drawn_and_named: int = 0
    """Number of pictures drawn by internvit that have rows because the user named them."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How headers are read."""

    rule: PixelRule
    workers: int
    timeout_seconds: float
    memory_bytes: int | None


def plan_images(
    listing: Listing, entries: Sequence[int], options: PlanOptions, on_progress: Callable[[int], None] = lambda _: None
) -> Plan:
    """Read the headers of some entries of a listing in parallel, in processes that may crash.

    Args:
        listing: The files.
        entries: Indices into the listing; the rows of the plan are in this order.
        options: How headers are read.
        on_progress: Called with the number of headers read so far.

    Returns:
        The plan, with one row per entry. A file that cannot be read has a row without tiles; a picture that internvit
        drew has no row.
    """
    facts = np.zeros((len(entries), 5), np.int64)
    skipped = {row: listing.skipped[entry] for row, entry in enumerate(entries) if entry in listing.skipped}
    rows = [row for row in range(len(entries)) if row not in skipped]
    drawn: list[int] = []
    for done, (row, outcome) in enumerate(_read_headers(listing, entries, rows, options), 1):
        if isinstance(outcome, OwnDrawing):
            drawn.append(row)
        found = outcome.outcome if isinstance(outcome, OwnDrawing) else outcome
        if isinstance(found, Skipped):
            skipped[row] = found
            facts[row, 3:] = _size_and_time(listing.path(entries[row]))
        else:
            facts[row] = found
        if done % HEADER_CHUNK == 0 or done == len(rows):
            on_progress(done)
    left_out = sorted(row for row in drawn if not listing.is_named(entries[row]))
    plan = Plan(_build_table(listing, entries, facts, skipped, options.rule), skipped)
    return replace(
        _without(plan, left_out),
        drawn=tuple(entries[row] for row in left_out),
        drawn_and_named=len(drawn) - len(left_out),
    )


def _without(plan: Plan, rows: Sequence[int]) -> Plan:
    """Return the plan without the given rows."""
    if not rows:
        return plan
    kept = np.setdiff1d(np.arange(len(plan.table)), rows)
    place = {row: number for number, row in enumerate(kept.tolist())}
    skipped = {place[row]: reason for row, reason in plan.skipped.items() if row in place}
    return Plan(plan.table.take(kept), skipped)


def _read_headers(
    listing: Listing, entries: Sequence[int], rows: Sequence[int], options: PlanOptions
) -> Iterable[tuple[int, Header | OwnDrawing | Skipped]]:
    """Yield rows with their headers, in the order in which they are ready."""
    if not rows:
        return
    workers = max(1, min(options.workers, len(rows) // 8))
    size = max(1, min(HEADER_CHUNK, len(rows) // (4 * workers)))
    chunks = _Chunks([rows[start : start + size] for start in range(0, len(rows), size)])
    spec = WorkerSpec("internvit_cli.plan.headers:header_reader", (options.rule,), memory_bytes=options.memory_bytes)
    with WorkerPool(spec, workers, options.timeout_seconds) as pool:
        while chunks.submit_some(pool, lambda row: listing.path(entries[row])) or pool.outstanding:
            for outcome in pool.wait():
                yield from chunks.receive(outcome)


class _Chunks:
    """Tasks of several headers each; a chunk that crashed a worker is divided until the culprit is alone."""

    def __init__(self, chunks: list[Sequence[int]]) -> None:
        self._waiting = list(reversed([(chunk, False) for chunk in chunks]))
        self._given: dict[int, tuple[Sequence[int], bool]] = {}
        self._next_id = 0

    def submit_some(self, pool: WorkerPool, path_of: Callable[[int], bytes]) -> bool:
        while self._waiting and pool.outstanding < pool.capacity:
            chunk, alone = self._waiting.pop()
            self._given[self._next_id] = chunk, alone
            pool.submit(self._next_id, [path_of(row) for row in chunk], alone=alone)
            self._next_id += 1
        return bool(self._waiting)

    def receive(self, outcome: FinishedTask | LostTask) -> Iterable[tuple[int, Header | OwnDrawing | Skipped]]:
        chunk, alone = self._given.pop(outcome.task_id)
        if isinstance(outcome, FinishedTask):
            return zip(chunk, outcome.result, strict=True)
        if not alone:
            self._waiting += [([row], True) for row in reversed(chunk)]
            return ()
        return [(chunk[0], Skipped(outcome.status, "", f"reading the header: {outcome.message}"))]


def _size_and_time(path: bytes) -> tuple[int, int]:
    """Return size and modification time, which later tell whether an unreadable file was replaced; zeros if absent."""
    try:
        status = status_of(path)
    except OSError:
        return 0, 0
    return status.st_size, modified_ns(status)


def _build_table(
    listing: Listing, entries: Sequence[int], facts: Any, skipped: dict[int, Skipped], rule: PixelRule
) -> ImageTable:
    size = len(entries)
    status = np.zeros(size, np.uint8)
    for row, reason in skipped.items():
        status[row] = reason.status
    grids = np.zeros((size, 3), np.int64)
    for row, (width, height) in enumerate(facts[:, :2].tolist()):
        if status[row] == Status.PENDING:
            grid = choose_grid(width, height, rule.tiling)
            grids[row] = grid.columns, grid.rows, has_thumbnail(grid, rule.tiling.thumbnail)
    columns: dict[str, Any] = {
        "source": np.fromiter((listing.source_index[entry] for entry in entries), np.uint32, size),
        "columns": grids[:, 0],
        "rows": grids[:, 1],
        "thumbnail": grids[:, 2],
    }
    columns |= {name: facts[:, position] for position, name in enumerate(Header._fields)}
    return ImageTable.build([listing.keys[entry] for entry in entries], status, columns)
