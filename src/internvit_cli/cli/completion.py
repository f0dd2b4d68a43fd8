"""Complete keys in the shell; Typer completes options and choices."""

from __future__ import annotations

import os
import shlex

import typer

MOST_IMAGES = 100_000
"""Outputs with more keys are not completed, because reading them takes too long."""


def complete_keys(context: typer.Context, incomplete: str) -> list[str]:
    """Return matching keys of the output on the command line that need no quotes; none if it cannot be read."""
    from internvit_cli.errors import InternvitError
    from internvit_cli.storage.read.places import find_places

    try:
        places = find_places(str(context.params.get("path") or ""))
        if sum(place.backend.outline(place.path).images for place in places) > MOST_IMAGES:
            return []
        shards = [place.load() for place in places]
    except (InternvitError, OSError):
        return []
    counted = {shard.stored.table.keys[row] for shard in shards for row in shard.live_rows.tolist()}
    keys = sorted(map(os.fsdecode, counted))
    return [key for key in keys if key.startswith(incomplete) and shlex.quote(key) == key]
