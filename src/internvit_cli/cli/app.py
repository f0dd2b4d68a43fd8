"""The `internvit` command: its subcommands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from internvit_cli.cli import (
    bench,
    diff,
    doctor,
    duplicates,
    export,
    extract,
    info,
    merge,
    models,
    plan,
    report,
    search,
    show,
    verify,
)
from internvit_cli.cli.console import fail, one_line, open_missing_streams, print_json
from internvit_cli.cli.settings import configurable
from internvit_cli.errors import ExitCode, InternvitError, NoSpaceError, UsageError

EXIT_CODES = """Exit codes: 0 done, 1 cannot run, 2 usage, 3 finished with skipped images, 4 no images found,
5 the output has another recipe, 6 not enough disk space, 75 the output is in use,
130/143/138 stopped by a signal (run the same command to continue)."""

app = typer.Typer(
    name="internvit",
    help="Folders of pictures in, InternViT features on disk.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., int]] = {
    "extract": extract.extract_command,
    "plan": plan.plan_command,
    "bench": bench.bench_command,
    "info": info.info_command,
    "verify": verify.verify_command,
    "show": show.show_command,
    "search": search.search_command,
    "duplicates": duplicates.duplicates_command,
    "report": report.report_command,
    "export": export.export_command,
    "merge": merge.merge_command,
    "diff": diff.diff_command,
    "models": models.models_command,
    "doctor": doctor.doctor_command,
}
"""In the order of `internvit --help`."""
for _name, _command in COMMANDS.items():
    app.command(_name)(configurable(_name, _command))

YES = {"1", "true", "t", "yes", "y", "on"}
"""What turns a flag on from the environment."""
USAGE_ERROR: Any = typer.BadParameter.__base__
"""Typer's base of all complaints about the command line; where it lives differs between versions."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from internvit_cli import __version__

        typer.echo(f"internvit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Folders of pictures in, InternViT features on disk."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    open_missing_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C is no traceback; `extract` has handlers of its own
    if sys.platform == "win32":
        sys.exit(fail(InternvitError("Windows is not supported", "use Linux, or WSL")))
    code = run(sys.argv[1:] if arguments is None else arguments) if _has_working_directory() else ExitCode.CANNOT_RUN
    for number in extract.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is done and said; the interpreter takes a moment to end
    sys.exit(code)


def _has_working_directory() -> bool:
    """Whether there is one; torch ends a process without, and no relative path means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        error = InternvitError("the working directory has been removed", "change to a folder that is there")
        fail(error, as_json="--json" in sys.argv)
        return False
    return True


def run(arguments: list[str]) -> int:
    """Run a command line; returns the exit code."""
    as_json = "--json" in arguments or os.environ.get("INTERNVIT_JSON", "").lower() in YES
    try:
        return app(arguments, prog_name="internvit", standalone_mode=False) or ExitCode.DONE
    except InternvitError as error:
        if "--debug" in arguments:
            raise
        return fail(error, as_json=as_json)
    except USAGE_ERROR as error:
        return _fail_usage(error, as_json=as_json)
    except typer.Abort:
        return ExitCode.SIGINT
    except SystemExit:  # of rich: whoever read the help has seen enough of it
        return ExitCode.DONE
    except Exception as error:
        known = None if "--debug" in arguments else _of_the_system(error)
        if known is not None:
            return fail(known, as_json=as_json)
        if as_json:
            print_json({"exit_code": 1, "error": f"{type(error).__name__}: {error}", "hint": "this is a bug"})
        raise


def _of_the_system(error: Exception) -> InternvitError | None:
    """What the operating system would not give, as an error of ours; None for a bug."""
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{one_line(os.fsdecode(error.filename))}: "
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InternvitError
        return kind(f"{where}{error.strerror or error}", "a command's --debug shows where")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "CPUAllocator" in str(error)):
        text = str(error).splitlines() or ["no more is to be had"]
        return InternvitError(
            f"not enough memory: {text[0]}", "lower --batch-size, --workers, --tile-size or --max-tiles"
        )
    return None


def _fail_usage(error: Any, *, as_json: bool) -> int:
    """Say what is wrong with a command line in our own two lines."""
    if not error.format_message():
        return ExitCode.USAGE  # no command was given, and Typer has shown the help
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "internvit"
    return fail(UsageError(error.format_message(), f"{command} --help"), as_json=as_json)
