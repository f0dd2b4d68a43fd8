"""Note that the output that a command reads is unfinished."""

from __future__ import annotations

import os

from internvit_cli.cli.console import say
from internvit_cli.storage.output_names import unfinished_path, unfinished_shards

CONTINUE = "the same internvit extract command finishes it"


def found_output(path: str) -> str:
    """Return the output to read for a given path, or its unfinished form, and print a note if it is unfinished."""
    if partial := unfinished_path(path):
        say(f"note: {path} is unfinished, and {partial} is read instead; {CONTINUE}")
        return partial
    if shards := unfinished_shards(path):
        say(f"note: {path} is unfinished: {os.path.join(path, shards[0])} is still to be filled; {CONTINUE}")
    return path
