"""Declare `--pictures`, which says where the pictures of an output are now."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from internvit_cli.cli.values import UnusableWordError


def folder(word: str) -> str:
    """Parse the name of a folder that exists."""
    if not os.path.isdir(word):
        raise UnusableWordError("a folder", "name the folder that holds each picture under its key")
    return word


PicturesFolder = Annotated[
    str | None,
    typer.Option(
        "--pictures",
        metavar="DIR",
        help="Look for the picture of each key in DIR. A picture is shown only if its SHA-256 is the stored one.",
        show_default="where each picture was when it was encoded",
        parser=folder,
    ),
]
