"""Declare `--layer` of the commands that read an output, which selects one of its layers."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

StoredLayer = Annotated[
    Optional[int],  # noqa: UP045 - Typer on Python 3.10 reads it
    typer.Option(
        "--layer",
        metavar="INDEX",
        help="Use this layer of an output that holds several, such as -4.",
        show_default="the deepest one",
    ),
]
