"""Declare the options of the commands that write a new output from others."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from internvit_cli.cli.values import size
from internvit_cli.config import Format

ShardFormat = Annotated[
    Optional[Format],  # noqa: UP045 - Typer on Python 3.10 reads it
    typer.Option("--format", metavar="FORMAT", help="Write the shards of a folder in this format.", show_default="npy"),
]
ShardSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        metavar="SIZE", help="Limit the shards of a folder to this size.", parser=size(least=1), show_default="4GiB"
    ),
]
NoLock = Annotated[bool, typer.Option("--no-lock", help="Do not lock NEW, on filesystems that have no locks.")]
