"""Define the `internvit` command and its subcommands, and turn errors into messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import typer

from internvit_cli.cli import (
    bench,
    diff,
    doctor,
    duplicates,
    export,
    extract,
    info,
    ls,
    merge,
    models,
    plan,
    probe,
    project,
    report,
    search,
    show,
    verify,
)
from internvit_cli.cli.command import ROOT_OPTIONS, TYPERS_OWN, USAGE_ERROR, CommandCall, Group, add_command
from internvit_cli.cli.console import fail, open_missing_streams, print_json, printable_line, take_lost_output
from internvit_cli.cli.declarations import as_typer_function
from internvit_cli.cli.settings import is_on
from internvit_cli.cli.signals import end_on_interrupt, ignore_signals_at_end
from internvit_cli.errors import ExitCode, InternvitError, NoSpaceError, UsageError

app = typer.Typer(
    name="internvit",
    help="Turn folders of pictures into InternViT features on disk.",
    cls=Group,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.callback(cls=Group, add_help_option=False)(
    as_typer_function("root", [option for option in ROOT_OPTIONS if option.name not in TYPERS_OWN], "")
)
COMMANDS: dict[str, Callable[..., int]] = {
    "extract": extract.extract_command,
    "plan": plan.plan_command,
    "bench": bench.bench_command,
    "info": info.info_command,
    "ls": ls.ls_command,
    "verify": verify.verify_command,
    "show": show.show_command,
    "search": search.search_command,
    "duplicates": duplicates.duplicates_command,
    "probe": probe.probe_command,
    "report": report.report_command,
    "export": export.export_command,
    "project": project.project_command,
    "merge": merge.merge_command,
    "diff": diff.diff_command,
    "models": models.models_command,
    "doctor": doctor.doctor_command,
}
"""All commands, in the order of `internvit --help`."""
_ANY_EXTRACTION = ("output", "files_from", "model", "max_tiles", "tokens", "store_dtype")
ESSENTIAL = {
    "extract": (
        *_ANY_EXTRACTION,
        "pool",
        "device",
        "dtype",
        "workers",
        "overwrite",
        "prune",
        "retry_skipped",
        "dry_run",
        "json",
    ),
    "plan": (*_ANY_EXTRACTION, "thumbnail", "preprocess", "tile_pooled", "shard_format", "bench", "json", "quiet"),
    "bench": (
        *_ANY_EXTRACTION,
        "device",
        "dtype",
        "batch_size",
        "workers",
        "seconds",
        "batch_sizes",
        "dtypes",
        "json",
        "quiet",
    ),
    "show": (
        "output",
        "maps",
        "point",
        "foreground",
        "raw",
        "separate",
        "size",
        "terminal",
        "pictures_in",
        "layer",
        "json",
        "quiet",
    ),
    "probe": (
        "test",
        "labels",
        "masks",
        "depth",
        "probe",
        "test_fraction",
        "shots",
        "output",
        "apply",
        "json",
        "quiet",
    ),
}
"""Options that the short help of a command lists, for commands with more options than fit there."""
REQUIRED = {"extract": ("sources", "output"), "plan": ("sources",), "merge": ("output",), "show": ("keys",)}
"""Parameters that are required although they have a default; the command's own error says what to give."""
for _name, _command in COMMANDS.items():
    add_command(app, _name, _command, essential=ESSENTIAL.get(_name, ()), required=REQUIRED.get(_name, ()))


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit the process with its exit code."""
    open_missing_streams()
    end_on_interrupt()
    if sys.platform == "win32":
        sys.exit(fail(InternvitError("Windows is not supported", "use Linux, or WSL")))
    code = run(sys.argv[1:] if arguments is None else arguments) if _has_working_directory() else ExitCode.CANNOT_RUN
    ignore_signals_at_end()
    sys.exit(code)


def _has_working_directory() -> bool:
    """Return whether the working directory exists; without it torch aborts and relative paths mean nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        error = InternvitError("the working directory has been removed", "change to a folder that exists")
        fail(error, as_json="--json" in sys.argv)
        return False
    return True


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; a result that could not be written counts as an error."""
    code = _run(arguments)
    lost = take_lost_output()
    if lost is None:
        return code
    failed = fail(lost)
    return failed if code in (ExitCode.DONE, ExitCode.SKIPPED) else code


def _run(arguments: list[str]) -> int:
    call = CommandCall(as_json="--json" in arguments or is_on("json", {}), debug="--debug" in arguments)
    try:
        return app(arguments, prog_name="internvit", standalone_mode=False, obj=call) or ExitCode.DONE
    except InternvitError as error:
        if call.debug:
            raise
        return fail(error, as_json=call.as_json)
    except USAGE_ERROR as error:
        return fail(UsageError(error.format_message(), "internvit --help"), as_json=call.as_json)
    except typer.Abort:
        return ExitCode.SIGINT
    except Exception as error:
        known = None if call.debug else _of_the_system(error)
        if known is not None:
            return fail(known, as_json=call.as_json)
        if call.as_json:
            print_json({"exit_code": 1, "error": f"{type(error).__name__}: {error}", "hint": "this is a bug"})
        raise


def _of_the_system(error: Exception) -> InternvitError | None:
    """Return a failure of the operating system as an `InternvitError`; None if the error is a bug."""
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{printable_line(os.fsdecode(error.filename))}: "
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InternvitError
        return kind(f"{where}{error.strerror or error}", "run the command with --debug to see where")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "CPUAllocator" in str(error)):
        text = str(error).splitlines() or ["the system has no more"]
        return InternvitError(
            f"not enough memory: {text[0]}", "lower --batch-size, --workers, --tile-size or --max-tiles"
        )
    return None
