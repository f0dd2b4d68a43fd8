"""`--layer` of the commands that read an output: one of several layers that it holds."""

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
