"""What the runs of the command within one process of the tests share."""

from __future__ import annotations

import functools

import typer.main


def build_command_once() -> None:
    """Keep the command's parser: building it anew takes most of the time of a command that has little to do."""
    if not hasattr(typer.main.get_command, "cache_info"):
        typer.main.get_command = functools.cache(typer.main.get_command)
