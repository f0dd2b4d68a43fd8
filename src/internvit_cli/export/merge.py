"""Combine several outputs of one recipe into one, for `internvit merge`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from internvit_cli.config import Choice, Status
from internvit_cli.errors import OtherRecipeError, OutputError, StoppedError, UsageError, one_line
from internvit_cli.export.destination import Destination
from internvit_cli.export.export import ExportJob, ExportResult, WriteOptions, check_options, write_selection
from internvit_cli.export.selection import RowSelection, StoredOutput, select_rows
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
    """Which of two rows with one key counts if their pictures differ."""

    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of a merge."""

    sources: tuple[str, ...]
    write: WriteOptions
    prefer: Prefer | None = None
    """Which row counts if the pictures of a key differ; None means an error."""


class _Row(NamedTuple):
    """A row of an output."""

    output: int
    place: int
    """The index of the shard among those of all outputs, and the row."""
    status: int
    digest: bytes


def merge(options: MergeOptions, stop: StopRequest, observer: Observer = SILENT) -> ExportResult:
    """Write the rows of several outputs as one feature file or folder.

    A key that several outputs have counts once: a done row wins over a skipped one, and the later one wins if both are
    of the same picture.

    Raises:
        OtherRecipeError: The outputs were made with different recipes; the message names the fields.
        OutputError: Two outputs have different pictures with one key, or an output is damaged.
        StoppedError: A signal stopped the merge, and no result exists.
    """
    check_features_name(options.write.path)
    place = choose_target(options.write.path, options.write.target, option="-o")
    if not place.target.is_feature_file:
        raise UsageError(f"-o {place.path}: outputs are merged into a feature file or folder", "choose another name")
    if len(options.sources) < 2:
        raise UsageError("a single output cannot be merged", "name two or more, or use internvit export")
    check_options(place, options.write)
    destination = Destination(place, options.sources, overwrite=options.write.overwrite, lock=options.write.lock)
    try:
        with observer.phase("reading the outputs"):
            selection, repeated = select_merged([StoredOutput.open(path) for path in options.sources], options.prefer)
        written = write_selection(
            selection, ExportJob(place, destination, options.write, options.sources), stop, observer
        )
    except Interruption:
        raise StoppedError("stopped before all was written; nothing is left") from None
    if repeated:
        written = replace(
            written, notes=(*written.notes, f"{counted(repeated, 'image')} in more than one output, each counted once")
        )
    return written


def select_merged(outputs: Sequence[StoredOutput], prefer: Prefer | None) -> tuple[RowSelection, int]:
    """Return the rows of several outputs that count, and the number of images in more than one output.

    Raises:
        OtherRecipeError: The outputs have different recipes.
        OutputError: Two outputs have different pictures with one key, and `prefer` is None.
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
    return select_rows(outputs, [row.place for row in chosen.values()]), len(repeated)


def check_recipes(one: StoredOutput, other: StoredOutput) -> None:
    """Refuse to mix two recipes.

    Raises:
        OtherRecipeError: The recipes differ; the message names each field with both values.
    """
    different = recipe_differences(one.recipe, other.recipe)
    if different:
        listed = "; ".join(f"{name} is {mine} in {one.path}, {its} in {other.path}" for name, (mine, its) in different)
        raise OtherRecipeError(
            f"the outputs were made with different recipes: {listed}",
            f"run internvit extract with one recipe, or compare them: internvit diff {one.path} {other.path}",
        )


def recipe_differences(one: Recipe, other: Recipe) -> list[tuple[str, tuple[str, str]]]:
    """Return the fields in which two recipes differ, with both values, shortened if they are long."""
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
    """Return which of two rows with one key counts."""
    is_done = (first.status == Status.DONE, last.status == Status.DONE)
    if is_done != (True, True):
        # A skipped picture has no digest to compare.
        if is_done == (False, False):
            return first if prefer is Prefer.FIRST else last
        return first if is_done[0] else last
    if first.digest != last.digest and prefer is None:
        raise OutputError(
            f"{one_line(key)!r} is one picture in {outputs[first.output].path} and another in "
            f"{outputs[last.output].path}",
            "say which one counts: --prefer first or --prefer last",
        )
    return first if prefer is Prefer.FIRST else last
