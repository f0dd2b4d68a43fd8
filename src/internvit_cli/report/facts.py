"""Gather the facts on the page: the summary, the recipe, the runs, the tiles, and the skipped images."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.commands.info import describe_output
from internvit_cli.config import Status
from internvit_cli.errors import one_line
from internvit_cli.model.caveats import caveats
from internvit_cli.runtime.words import counted, listed
from internvit_cli.storage.output import Output
from internvit_cli.storage.output_names import PARTIAL
from internvit_cli.storage.skipped import read_skip_log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.storage.read.reader import Features

MOST_SKIPPED = 2000
"""Largest number of skipped images on the page; the list beside the output has all of them."""
MOST_RUNS = 50
RUN_TEXTS = ("ended", "host", "device", "dtype", "model", "torch", "bottleneck")
RUN_NUMBERS = ("images", "tiles", "seconds")


@dataclass(frozen=True, slots=True)
class Facts:
    """Plain values for JSON; every text is on one line and printable."""

    path: str
    summary: dict[str, Any]
    recipe: list[tuple[str, str]]
    datasets: list[tuple[str, str, str]]
    """The name, shape and type of each dataset."""
    runs: list[dict[str, Any]]
    """The runs, the newest last; an entry lacks what its run did not record."""
    histogram: list[tuple[int, int]]
    """Numbers of tiles, each with the number of done images that have it."""
    skipped: dict[str, Any]
    notes: tuple[str, ...]
    """Warnings for the reader."""


def gather_facts(features: Features) -> Facts:
    """Return all facts about an output for the page.

    Raises:
        OutputError: The output is damaged, or its list of skipped images cannot be read.
    """
    described = describe_output(features.path)
    runs = [_run(entry) for entry in described["runs"]][-MOST_RUNS:]
    sources = {os.fsdecode(source.root) for shard in features.shards for source in shard.sources}
    kept = ("model", "model_revision", "total_images", "images", "tiles", "bytes", "shards", "created_by")
    summary = {name: _plain(described[name]) for name in kept} | {"sources": sorted(map(printable, sources))}
    datasets = [
        (name, " x ".join(f"{side:,}" for side in dataset["shape"]), str(dataset["dtype"]))
        for name, dataset in described["datasets"].items()
    ]
    return Facts(
        path=printable(features.path),
        summary=summary,
        recipe=[(name, printable(_words(value))) for name, value in described["recipe"].items()],
        datasets=datasets,
        runs=runs,
        histogram=_histogram(features.done),
        skipped=_skipped(features),
        notes=_notes(features),
    )


def printable(text: str) -> str:
    """Return text from outside for the page: one line, with control characters and invalid Unicode escaped."""
    return one_line(text, limit=None)


def _plain(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def _run(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run recorded about itself, without invalid values, because nothing checks the log."""
    texts = {name: printable(entry[name]) for name in RUN_TEXTS if isinstance(entry.get(name), str)}
    return texts | {name: entry[name] for name in RUN_NUMBERS if _is_count(entry.get(name))}


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 <= value < 2**53


def tile_counts(features: Features) -> Any:
    """Return the number of tiles of every image, including thumbnails, [n] int64."""
    grid = features.column("columns").astype(np.int64) * features.column("rows")
    return grid + features.column("thumbnail")


def _histogram(done: Features) -> list[tuple[int, int]]:
    numbers, counts = np.unique(tile_counts(done), return_counts=True)
    return list(zip(numbers.tolist(), counts.tolist(), strict=True))


def _skipped(features: Features) -> dict[str, Any]:
    """Return the skipped images with their reasons, the first ones in full."""
    status = features.column("status")
    positions = np.flatnonzero((status != Status.DONE) & (status != Status.PENDING))
    output = Output(features.path.removesuffix(PARTIAL))
    listed = {entry["key"]: entry for entry in read_skip_log(output.skipped_path)}
    words, counts = np.unique(status[positions], return_counts=True)
    reasons = {Status(word).word: count for word, count in zip(words.tolist(), counts.tolist(), strict=True)}
    rows = []
    for position in positions[:MOST_SKIPPED].tolist():
        image = features[position]
        entry = listed.get(image.key, {})
        told = [str(entry[name]) for name in ("exception", "message") if entry.get(name)]
        rows.append({"key": printable(image.key), "reason": image.status.word, "message": printable(": ".join(told))})
    return {
        "total": len(positions),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "rows": rows,
        "list": printable(os.path.basename(output.skipped_path)),
    }


def _notes(features: Features) -> tuple[str, ...]:
    """Return warnings about the features, and which of several layers is shown."""
    notes = [f"{sentence}." for sentence in caveats(features)]
    pending = int((features.column("status") == Status.PENDING).sum())
    if features.path.endswith(PARTIAL):
        notes.append(f"This output is unfinished: {counted(pending, 'image')} still to be encoded.")
    elif Output(features.path).partial_exists:
        notes.append("A run has begun to add images to this output; only what is finished is shown.")
    if len(features.layers) > 1:
        notes.append(
            f"Features of layer {features.layer} are shown; the output holds layers {listed(features.layers)}."
        )
    return tuple(notes)
