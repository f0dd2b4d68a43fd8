"""`internvit doctor`: print whether this machine is ready for a run."""

from __future__ import annotations

from typing import Annotated

import typer

from internvit_cli.cli.console import print_json, print_line
from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import ExitCode


def doctor_command(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="Try the disk that OUT would be written to.")
    ] = "feats.h5",
    model: Annotated[str, typer.Option("-m", "--model", metavar="MODEL", help="Look for this model.")] = DEFAULT_MODEL,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Check whether this machine is ready for a run.

    The command checks versions, memory, worker processes, the model, the devices, and the disk and locks of the output.
    If something will not work, it says what to do and exits with 1.
    """
    from internvit_cli.commands.doctor import CheckState, examine

    checks = []
    for check in examine(output, model):
        checks.append(check)
        if not json:
            print_line(f"{check.state.value:<5} {check.name:<14} {check.found}")
            if check.hint:
                print_line(f"{'':20} hint: {check.hint}")
    bad = [check.name for check in checks if check.state is CheckState.BAD]
    code = ExitCode.CANNOT_RUN if bad else ExitCode.DONE
    if json:
        error = f"will not work: {', '.join(bad)}" if bad else None
        print_json({"checks": [check.to_json() for check in checks], "exit_code": int(code), "error": error})
    return int(code)
