"""Write what segmentation heads found as a folder of tables and pictures."""

from __future__ import annotations

import colorsys
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.probe.results_folder import (
    PER_CLASS,
    PER_IMAGE,
    RESULTS,
    WORST,
    csv_file,
    json_file,
    origin,
    write_folder,
)
from internvit_cli.probe.segment import OF_NO_CLASS, labels_of, predicted, reader_for
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.viz.draw.png import encode_png
from internvit_cli.viz.draw.sheet import CELL, Cell, SheetRow, contact_sheet
from internvit_cli.viz.photograph import PictureFile, read_photographs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.probe.data import MapReader
    from internvit_cli.probe.segment import SegmentResult

MOST_WORST = 20
"""Pictures on the sheet of the worst."""
_NO_CLASS_COLOR = (225, 225, 225)
_NEXT_HUE = (math.sqrt(5) - 1) / 2
"""The step between hues, by which no two classes of a few have similar colors."""


def to_json(result: SegmentResult) -> dict[str, Any]:
    """Return the results and everything that they follow from, for results.json and `--json`."""
    options = result.options
    return {
        "path": options.path,
        "test_path": options.test_path,
        "masks": options.masks,
        "classes": len(result.classes),
        "images": asdict(result.counts),
        "probes": {
            score.name: {
                "mean_iou": score.mean_iou.value,
                "interval": [score.mean_iou.low, score.mean_iou.high],
                "pixel_accuracy": score.counts.pixel_accuracy(),
                "iou_by_class": {
                    name: None if math.isnan(iou) else iou
                    for name, iou in zip(result.classes, score.counts.ious().tolist(), strict=True)
                },
            }
            for score in result.scores
        },
        "gap": result.gap,
        **origin(options, result.test.features, result.notes),
    }


def write_results(result: SegmentResult, path: str, observer: Observer = SILENT, *, overwrite: bool = False) -> None:
    """Write all files, completely or not at all; see `write_folder`."""
    write_folder(path, dict(_files(result, observer)), overwrite=overwrite)


def _files(result: SegmentResult, observer: Observer) -> Iterable[tuple[str, bytes]]:
    yield RESULTS, json_file(to_json(result))
    yield PER_CLASS, csv_file(_per_class(result))
    yield PER_IMAGE, csv_file(_per_image(result))
    yield WORST, encode_png(_worst(result, observer))


def _per_class(result: SegmentResult) -> Iterable[Sequence[object]]:
    yield "class", "value", "test_images", "test_pixels", *(f"{score.name}_iou" for score in result.scores)
    labelled = result.scores[0].counts.labelled
    ious = [score.counts.ious() for score in result.scores]
    for place, (name, number) in enumerate(zip(result.classes, result.numbers, strict=True)):
        shares = ["" if math.isnan(own[place]) else f"{own[place]:.4f}" for own in ious]
        yield name, number, int((labelled[:, place] > 0).sum()), int(labelled[:, place].sum()), *shares


def _per_image(result: SegmentResult) -> Iterable[Sequence[object]]:
    yield "key", *(f"{score.name}_mean_iou" for score in result.scores)
    shares = [score.counts.of_images() for score in result.scores]
    for number, key in enumerate(result.test.features):
        yield key, *(f"{own[number]:.4f}" for own in shares)


def _worst(result: SegmentResult, observer: Observer) -> Image.Image:
    """Draw the pictures of which the best head found least, with their masks and what it found."""
    shares = result.best.counts.of_images()
    chosen = np.argsort(shares, kind="stable")[:MOST_WORST].tolist()
    images = [result.test.features[number] for number in chosen]
    reader = reader_for(result.test, result.heads)
    with observer.phase("drawing the sheet", "picture", len(chosen)) as phase:
        photographs = read_photographs([PictureFile.of(one, result.options.pictures) for one in images], CELL, phase.at)
        rows = [
            SheetRow(
                image.key,
                [
                    Cell(photograph.picture, (f"mean IoU {shares[number]:.1%}",), problem=photograph.problem),
                    *_mask_cells(result, reader, number),
                ],
            )
            for number, image, photograph in zip(chosen, images, photographs, strict=True)
        ]
    return contact_sheet(rows, (f"least found, {result.best.name}: picture, mask, prediction", *result.notes))


def _mask_cells(result: SegmentResult, reader: MapReader, number: int) -> list[Cell]:
    best = result.best.name
    labels = labels_of(result.test, number, result.numbers)
    scale = min(1.0, CELL / max(labels.shape))
    height, width = (max(1, round(side * scale)) for side in labels.shape)
    small = labels[_centers(labels.shape[0], height)][:, _centers(labels.shape[1], width)]
    found = np.concatenate([rows for _, rows in predicted(result.heads[best], reader, number, height, width)])
    return [
        Cell(_colored(small), ("mask", _named(result, small))),
        Cell(_colored(found), (best, _named(result, found))),
    ]


def _centers(size: int, count: int) -> NDArray[np.int64]:
    centers: NDArray[np.int64] = ((np.arange(count) + 0.5) * size / count).astype(np.int64)
    return centers


def _named(result: SegmentResult, labels: NDArray[Any]) -> str:
    """Return the names of classes, those of most pixels first."""
    places, counts = np.unique(labels[labels != OF_NO_CLASS], return_counts=True)
    return ", ".join(result.classes[place] for place in places[np.argsort(-counts, kind="stable")])


def _colored(labels: NDArray[Any]) -> Image.Image:
    table = np.full((int(labels.max()) + 2, 3), _NO_CLASS_COLOR, np.uint8)  # OF_NO_CLASS is the last
    for place in range(len(table) - 1):
        value = (0.95, 0.6, 0.75)[place % 3]
        table[place] = np.multiply(colorsys.hsv_to_rgb(place * _NEXT_HUE % 1, 0.65, value), 255)
    return Image.fromarray(table[labels])
