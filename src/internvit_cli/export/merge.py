"""`internvit merge`: several outputs of one recipe as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from internvit_cli.config import Choice, Status
from internvit_cli.errors import OtherRecipeError, OutputError, StoppedError, UsageError, one_line
from internvit_cli.export.destination import Destination
from internvit_cli.export.export import ExportResult, Job, WriteOptions, check_options, write
from internvit_cli.export.selection import RowSelection, StoredOutput, select
from internvit_cli.export.targets import choose_target
from internvit_cli.extract.changes import ROW_BITS
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.signals import Interruption
from internvit_cli.runtime.words import counted, listed
from internvit_cli.storage.output_names import check_features_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.config import Recipe
    from internvit_cli.runtime.signals import StopRequest


class Prefer(Choice):
    """Which of two rows of one key counts, where the pictures differ."""

    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What to merge, and where to."""

    sources: tuple[str, ...]
    write: WriteOptions
    prefer: Prefer | None = None
    """None refuses two rows of one key whose pictures differ."""


class _Row(NamedTuple):
    """One row of one output."""

    output: int
    place: int
    """Shard's number among those of all outputs, and row."""
    status: int
    digest: bytes


def merge(options: MergeOptions, stop: StopRequest, observer: Observer = SILENT) -> ExportResult:
    """Write the rows of several outputs as one feature file or folder.

    A key that several outputs have counts once: done before skipped, and the later one where both are of the same
    picture.

    Raises:
        OtherRecipeError: the outputs were made with different recipes; the message names the fields.
        OutputError: two outputs have different pictures by one key; or one is damaged.
        StoppedError: a signal came; nothing has the result's name.
    """
    check_features_name(options.write.path)
    place = choose_target(options.write.path, options.write.target, option="-o")
    if not place.target.is_feature_file:
        raise UsageError(f"-o {place.path}: outputs are merged into a feature file or folder", "choose another name")
    if len(options.sources) < 2:
        raise UsageError("one output is nothing to merge", "name two or more, or use internvit export")
    check_options(place, options.write)
    destination = Destination(place, options.sources, overwrite=options.write.overwrite, lock=options.write.lock)
    try:
        with observer.phase("reading the outputs"):
            selection, repeated = select_merged([StoredOutput.open(path) for path in options.sources], options.prefer)
        written = write(selection, Job(place, destination, options.write, options.sources), stop, observer)
    except Interruption:
        raise StoppedError("stopped before all was written; nothing is left") from None
    if repeated:
        written = replace(
            written, notes=(*written.notes, f"{counted(repeated, 'image')} in more than one output, counted once")
        )
    return written


def select_merged(outputs: Sequence[StoredOutput], prefer: Prefer | None) -> tuple[RowSelection, int]:
    """The rows of several outputs that count, and how many images were in more than one.

    Raises:
        OtherRecipeError: they have different recipes.
        OutputError: two have different pictures by one key, and `prefer` does not say which counts.
    """
    for output in outputs[1:]:
        check_recipes(outputs[0], output)
    chosen: dict[bytes, _Row] = {}
    repeated, first_shard = set(), 0
    for number, output in enumerate(outputs):
        for key, place in output.live_places().items():
            row = _row(output, number, place, first_shard)
            if key in chosen:
                repeated.add(key)
                chosen[key] = _prefer(key, chosen[key], row, outputs, prefer)
            else:
                chosen[key] = row
        first_shard += len(output.shards)
    return select(outputs, [row.place for row in chosen.values()]), len(repeated)


def check_recipes(one: StoredOutput, other: StoredOutput) -> None:
    """Refuse to mix two recipes.

    Raises:
        OtherRecipeError: the message names each differing field with both values.
    """
    different = recipe_differences(one.recipe, other.recipe)
    if different:
        listed = "; ".join(f"{name} is {mine} in {one.path}, {its} in {other.path}" for name, (mine, its) in different)
        raise OtherRecipeError(
            f"the outputs were made with different recipes: {listed}",
            f"internvit extract with one recipe, or internvit diff {one.path} {other.path}",
        )


def recipe_differences(one: Recipe, other: Recipe) -> list[tuple[str, tuple[str, str]]]:
    """The fields in which two recipes differ, with both values, long ones cut short."""
    mine, its = asdict(one), asdict(other)
    return [(name, (_short(mine[name]), _short(its[name]))) for name in one.differences(other)]


def _short(value: Any) -> str:
    text = (listed(value) if value else "none") if isinstance(value, tuple) else str(value)
    return text[:12] + "..." if len(text) > 40 else text


def _row(output: StoredOutput, number: int, place: int, first_shard: int) -> _Row:
    shard, row = divmod(place, 1 << ROW_BITS)
    opened = output.shards[shard]
    status, digest = int(opened.table.status[row]), opened.digests[row].tobytes()
    return _Row(number, place + (first_shard << ROW_BITS), status, digest)


def _prefer(key: bytes, first: _Row, last: _Row, outputs: Sequence[StoredOutput], prefer: Prefer | None) -> _Row:
    """Which of two rows of a key counts."""
    is_done = (first.status == Status.DONE, last.status == Status.DONE)
    if is_done != (True, True):
        # Nothing is known of a skipped picture but that it was no good.
        if is_done == (False, False):
            return first if prefer is Prefer.FIRST else last
        return first if is_done[0] else last
    if first.digest != last.digest and prefer is None:
        raise OutputError(
            f"{one_line(key)!r} is one picture in {outputs[first.output].path} and another in "
            f"{outputs[last.output].path}",
            "say which counts: --prefer first or --prefer last",
        )
    return first if prefer is Prefer.FIRST else last
