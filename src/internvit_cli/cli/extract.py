"""`internvit extract`: encode pictures into features."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from internvit_cli.cli.arguments import RUN, require_sources, takes_extract_options
from internvit_cli.cli.console import fail, human_bytes, human_seconds, print_json, print_line, say
from internvit_cli.cli.plan import show_plan
from internvit_cli.cli.progress import progress
from internvit_cli.cli.signals import exit_code_of, stop_on_signals
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.errors import ExitCode, InternvitError, StoppedError, UsageError
from internvit_cli.options import ExtractOptions
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from internvit_cli.extract.results import Summary


class AllowedSkips(NamedTuple):
    """How many images may be skipped before the exit code says so."""

    value: float
    is_percentage: bool

    def of(self, images: int) -> int:
        """Return the number of allowed skips for a number of images found."""
        return int(images * self.value / 100) if self.is_percentage else int(self.value)


NONE_ALLOWED = AllowedSkips(0, is_percentage=False)


def allowed_skips(word: str) -> AllowedSkips:
    """Parse a number of images such as `10`, or a percentage such as `1%`."""
    digits = word.removesuffix("%")
    try:
        value = float(digits) if word.endswith("%") else int(digits)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if word.endswith("%") else sys.maxsize):  # nan fails both comparisons
        raise UnusableWordError("a number or a percentage", "give a value such as 10 or 1%")
    return AllowedSkips(value, word.endswith("%"))


@takes_extract_options
def extract_command(
    options: ExtractOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    allow_skipped: Annotated[
        AllowedSkips,
        typer.Option(
            metavar="N|N%",
            help="Exit with 0, not 3, if at most this many images are skipped.",
            parser=allowed_skips,
            show_default="0",
            rich_help_panel=RUN,
        ),
    ] = NONE_ALLOWED,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Encode pictures into features.

    Run the same command again to continue an interrupted run, or to encode pictures that are new or changed. It does
    nothing when there is nothing to do.

    Example: internvit extract ./imgs -o feats.h5
    """
    require_sources(options)
    if not options.store.output:
        raise UsageError("no output given", "add -o feats.h5 for one file, or -o feats/ for shards")
    if dry_run:
        return show_plan(options, as_json=json, quiet=quiet)
    from internvit_cli.extract.pipeline import extract

    with stop_on_signals() as stop:
        try:
            with progress(quiet=quiet) as observer:
                summary = extract(options, stop, observer, sys.stdin.buffer)
        except StoppedError as stopped:
            message = f"{stopped.message} by {signal.Signals(stop.signal).name}; run the same command again"
            say(message)
            if json:
                print_json({"exit_code": exit_code_of(stop.signal), "error": message})
            return exit_code_of(stop.signal)
        return _report(summary, allow_skipped, as_json=json, quiet=quiet)


def _report(summary: Summary, allowed: AllowedSkips, *, as_json: bool, quiet: bool) -> int:
    """Print the outcome and return the exit code."""
    code = summary.exit_code(allowed.of(summary.counts.found))
    useless = InternvitError("no image could be used", f"see {summary.skipped_path} for the reasons")
    error = useless if code == ExitCode.CANNOT_RUN else None
    if as_json:
        print_json(summary.to_json() | {"exit_code": int(code), "error": error.message if error else None})
    elif not quiet:
        print_summary(summary)
    return fail(error) if error else int(code)


def print_summary(summary: Summary) -> None:
    """Print a run in a few lines: the status of every image, and where the time went."""
    counts, stages = summary.counts, summary.stages
    print_line(
        f"{summary.output}: {counted(counts.found, 'image')} found = "
        f"{counts.done:,} done + {counts.skipped:,} skipped + {counts.pending:,} pending"
    )
    if counts.reasons:
        print_line("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.reasons.items())))
        print_line(f"reasons: {summary.skipped_path}")
    for line in summary.left_out.lines:
        print_line(f"left out: {line}")
    if counts.kept:
        print_line(f"kept: {counted(counts.kept, 'row')} of pictures that are not in these sources")
    if summary.encoded:
        rate = summary.tiles / stages.wall if stages.wall else 0.0
        print_line(
            f"encoded {counted(summary.encoded, 'image')}, {counted(summary.tiles, 'tile')} "
            f"in {human_seconds(summary.seconds)} "
            f"({rate:.1f} tiles/s while encoding, {summary.dtype} on {summary.device})"
        )
        shares = {"decode": stages.decode, "device": stages.device, "write": stages.write, "idle": stages.idle}
        print_line(
            f"stages over {human_seconds(stages.wall)}: "
            + ", ".join(f"{name} {100 * value / stages.wall:.0f} %" for name, value in shares.items() if stages.wall)
        )
        print_line(stages.bottleneck)
    elif summary.is_up_to_date and not summary.is_useless:
        print_line("nothing new to do")
    print_line(f"{human_bytes(summary.bytes)} on disk")
    for note in summary.notes:
        say(f"note: {note}")
    if summary.stopped_by:
        say(f"stopped by {signal.Signals(summary.stopped_by).name}; run the same command to continue")
