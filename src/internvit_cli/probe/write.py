"""Write what classifiers found as a folder of tables and pictures."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.probe.heads import to_bytes
from internvit_cli.probe.metrics import confusion
from internvit_cli.probe.results_folder import (
    HEAD,
    PER_CLASS,
    RESULTS,
    WORST,
    csv_file,
    json_file,
    origin,
    write_folder,
)
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.similarity.contact_sheet import SheetPicture, pictures_sheet
from internvit_cli.viz.draw.figure import Panel, figure
from internvit_cli.viz.draw.palette import Scale
from internvit_cli.viz.draw.png import encode_png
from internvit_cli.viz.draw.text import PAPER, line_height, shortened_to_width, write_line, write_outlined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.probe.evaluate import ProbeResult, ProbeScore

MOST_ERRORS = 60
SHARES = Scale(0.0, 1.0)
MOST_NAMED, NAME_WIDTH, LETTERS = 20, 120, 12
"""Classes of a matrix with names, and the width and the size of these in pixels."""
CONFUSION_SIDE = 640
"""Side of the matrix of confusions in pixels, at most."""


def to_json(result: ProbeResult) -> dict[str, Any]:
    """Return the results and everything that they follow from, for results.json and `--json`."""
    options = result.options
    return {
        "path": options.path,
        "test_path": options.test_path,
        "labels": result.label_source,
        "classes": len(result.classes),
        "images": asdict(result.counts),
        "probes": {
            score.name: {
                "accuracy": score.accuracy.value,
                "interval": [score.accuracy.low, score.accuracy.high],
                "settings": score.settings,
            }
            for score in result.scores
        },
        "gap": result.gap,
        "few_shots": [asdict(one) for one in result.few_shots],
        **origin(options, result.test.features, result.notes),
    }


def write_results(result: ProbeResult, path: str, observer: Observer = SILENT, *, overwrite: bool = False) -> None:
    """Write all files into a folder beside the final one, and rename it.

    Args:
        result: What was measured.
        path: The folder to create.
        observer: Receives progress.
        overwrite: Whether results in that folder may be replaced.

    Raises:
        UsageError: The folder holds something.
        NoSpaceError: The disk is full.
    """
    write_folder(path, dict(_files(result, observer)), overwrite=overwrite)


def _files(result: ProbeResult, observer: Observer) -> Iterable[tuple[str, bytes]]:
    yield RESULTS, json_file(to_json(result))
    yield PER_CLASS, csv_file(_per_class(result))
    yield "predictions.csv", csv_file(_predictions(result))
    yield "confusion.png", encode_png(_confusion(result))
    wrong = _surest_errors(result)
    if wrong:
        title = f"surest errors, {result.best.name}"
        yield WORST, encode_png(pictures_sheet([(title, wrong)], result.notes, observer))
    if (head := best_head(result)) is not None:
        yield HEAD, to_bytes(result.heads[head])


def best_head(result: ProbeResult) -> str | None:
    """Return the probe whose trained head is kept, the most accurate one; None if none has a head."""
    trained = [score for score in result.scores if score.name in result.heads]
    return max(trained, key=lambda score: score.accuracy.value).name if trained else None


def _per_class(result: ProbeResult) -> Iterable[Sequence[object]]:
    yield "class", "test_images", *(f"{score.name}_accuracy" for score in result.scores)
    for number, name in enumerate(result.classes):
        own = result.test.labels == number
        if own.any():
            shares = [f"{(score.predictions.classes[own] == number).mean():.4f}" for score in result.scores]
            yield name, int(own.sum()), *shares


def _predictions(result: ProbeResult) -> Iterable[Sequence[object]]:
    yield "key", "label", *(f"{score.name}{part}" for score in result.scores for part in ("", "_confidence"))
    for number, key in enumerate(result.test.features):
        found = []
        for score in result.scores:
            predictions = score.predictions
            found += [result.classes[predictions.classes[number]], f"{predictions.confidence[number]:.4f}"]
        yield key, result.classes[result.test.labels[number]], *found


def _surest_errors(result: ProbeResult) -> list[SheetPicture]:
    predictions, labels = result.best.predictions, result.test.labels
    wrong = np.flatnonzero(predictions.classes != labels)
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MOST_ERRORS]
    return [_error(result, result.best, number) for number in wrong.tolist()]


def _error(result: ProbeResult, score: ProbeScore, number: int) -> SheetPicture:
    said = result.classes[score.predictions.classes[number]]
    image = result.test.features[number]
    captions = (
        f"{said}, {score.predictions.confidence[number]:.0%}",
        f"label: {result.classes[result.test.labels[number]]}",
        image.key,
    )
    return SheetPicture(image, captions, result.options.pictures)


def _confusion(result: ProbeResult) -> Image.Image:
    """Draw the shares of each class that were taken for each class."""
    best, classes = result.best, result.classes
    counts = confusion(result.test.labels, best.predictions.classes, len(classes))
    off = counts - np.diag(np.diag(counts))
    pairs = np.argsort(-off, axis=None, kind="stable")[:5]
    worst = [(int(pair) // len(classes), int(pair) % len(classes)) for pair in pairs if off.flat[pair]]
    panel = Panel(
        "confusion",
        "Share of each class (row) taken for each class (column)",
        _matrix(counts, classes),
        [
            f"{classes[row]} was taken for {classes[column]} {counted(off[row, column], 'time')}."
            for row, column in worst
        ]
        or ["No class was taken for another."],
        SHARES,
    )
    subtitle = f"{counted(len(result.test), 'test image')}, accuracy {best.accuracy.value:.1%}"
    return figure(f"Confusions of the {best.name} probe", subtitle, [panel])


def _matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> Image.Image:
    """Draw shares as squares; with few classes, with their names and counts, and otherwise in the order of names."""
    side = max(1, CONFUSION_SIDE // len(classes))
    colors = SHARES.colors(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    squares = Image.fromarray(np.repeat(np.repeat(colors, side, axis=0), side, axis=1))
    if len(classes) > MOST_NAMED:
        return squares
    names = [shortened_to_width(name, LETTERS, NAME_WIDTH - 8) for name in classes]
    canvas = Image.new("RGB", (NAME_WIDTH + squares.width, line_height(LETTERS) + squares.height), PAPER)
    top = canvas.height - squares.height
    canvas.paste(squares, (NAME_WIDTH, top))
    for row, name in enumerate(names):
        middle = top + row * side + (side - line_height(LETTERS)) / 2
        write_line(canvas, (0, middle), name, LETTERS)
        above = shortened_to_width(classes[row], LETTERS, side - 4)
        write_line(canvas, (NAME_WIDTH + row * side, 0), above, LETTERS)
        for column in np.flatnonzero(counts[row]).tolist():
            write_outlined(canvas, (NAME_WIDTH + column * side + 4, middle), str(counts[row, column]), LETTERS)
    return canvas
