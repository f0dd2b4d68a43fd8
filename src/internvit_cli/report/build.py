"""Write an output as one self-contained page, for `internvit report`."""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import internvit_cli
from internvit_cli.config import Projection, Tokens
from internvit_cli.errors import OutputError
from internvit_cli.report.facts import Facts, gather_facts, printable, tile_counts
from internvit_cli.report.page import as_page
from internvit_cli.report.pictures import SmallPicture, ThumbnailTask, shrink
from internvit_cli.report.plane import PlaneLayout, lay_out, require_projection
from internvit_cli.report.selection import PageSelection, select_images
from internvit_cli.report.token_maps import TokenMaps, draw_token_maps
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.storage.durable import write_file
from internvit_cli.storage.output_names import check_file_name
from internvit_cli.storage.read.reader import open_features
from internvit_cli.viz.draw.palette import SEQUENTIAL
from internvit_cli.viz.photograph import PictureFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.storage.read.reader import Features

SUFFIXES = (".html", ".htm")
PHOTOGRAPH_SIDE = 384
"""Longer side of the pictures under token maps, in pixels."""
DIGITS = 4
"""Decimals of positions on the map, which are finer than a pixel at every useful zoom."""


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """The options of a report."""

    path: str
    output: str
    projection: Projection = Projection.PCA
    samples: int = 12
    """The number of images whose token maps and neighbors are shown."""
    thumbnails: int = 2000
    thumbnail_size: int = 112
    """The longer side of thumbnails in pixels."""
    points: int = 50_000
    """The largest number of images on the map."""
    seed: int = 0
    layer: int | None = None
    """The stored layer to show; None means the deepest."""
    workers: int | None = None
    """The number of processes that read pictures; None means one per processor."""
    pictures: str | None = None
    """The folder that holds the pictures; None means where they were when they were encoded."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of writing a report."""

    output: str
    bytes: int
    images: int
    done: int
    skipped: int
    points: int
    thumbnails: int
    missing: dict[str, str]
    """The reasons for missing thumbnails, by key."""
    token_maps: int
    projection: Projection
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        return {
            "report": self.output,
            "bytes": self.bytes,
            "images": self.images,
            "done": self.done,
            "skipped": self.skipped,
            "points": self.points,
            "thumbnails": self.thumbnails,
            "without_thumbnail": self.missing,
            "token_maps": self.token_maps,
            "map": self.projection.value,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


def write_report(options: ReportOptions, observer: Observer = SILENT) -> Report:
    """Write the page of an output, completely or not at all.

    Args:
        options: What to show, and where.
        observer: Receives progress.

    Raises:
        UsageError: The name or the place of the page is invalid, UMAP has too few images, or a layer is not stored.
        OutputError: The output is missing or damaged, or the page cannot be written.
        InternvitError: umap-learn is not installed.
    """
    started = time.perf_counter()
    _check_place(options.output)
    require_projection(options.projection, observer)
    with observer.phase("reading the output"):
        features = open_features(options.path, options.layer)
        facts = gather_facts(features)
    chosen = select_images(features, options.samples, options.points, options.seed, options.pictures, observer)
    done = features.done
    plane = lay_out(done.vectors(), chosen.points, options.projection, options.seed, observer)
    sample = [done[number] for number in chosen.sample]
    with observer.phase("drawing token maps", "image", len(sample)) as phase:
        maps = draw_token_maps(sample, phase.at)
    thumbnails, photographs = _pictures(done, chosen, options, observer, with_maps=bool(maps.maps))
    with observer.phase("writing the page"):
        parts = _PageParts(done, chosen, plane, maps, thumbnails, photographs, options)
        page = as_page(f"{facts.path} - internvit report", parts.to_json(facts))
        write_file(options.output, page)
    missing = {done[number].key: one.problem for number, one in thumbnails.items() if not one.jpeg}
    return Report(
        output=options.output,
        bytes=len(page),
        images=len(features),
        done=len(done),
        skipped=facts.skipped["total"],
        points=len(chosen.points),
        thumbnails=len(thumbnails) - len(missing),
        missing=missing,
        token_maps=len(maps.maps),
        projection=options.projection,
        seconds=time.perf_counter() - started,
        notes=facts.notes,
    )


def _check_place(output: str) -> None:
    """Refuse a place where no page can be written, before any work."""
    check_file_name(output, SUFFIXES, "-o", "page")
    parent = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(parent):
        raise OutputError(f"the folder {parent} does not exist", f"create it: mkdir -p {parent}")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the folder {parent} cannot be written to", "choose another one with -o")


def _pictures(
    done: Features, chosen: PageSelection, options: ReportOptions, observer: Observer, *, with_maps: bool
) -> tuple[dict[int, SmallPicture], list[SmallPicture]]:
    """Return thumbnails by index, and the photographs under token maps."""
    numbers = chosen.shuffled[: options.thumbnails].tolist()
    wanted = [ThumbnailTask(_file(done, number, options), options.thumbnail_size) for number in numbers]
    if with_maps:
        wanted += [ThumbnailTask(_file(done, number, options), PHOTOGRAPH_SIDE) for number in chosen.sample]
    with observer.phase("reading pictures", "picture", len(wanted)) as phase:
        found = shrink(wanted, options.workers, phase.at)
    return dict(zip(numbers, found, strict=False)), found[len(numbers) :]


def _file(done: Features, number: int, options: ReportOptions) -> PictureFile:
    return PictureFile.of(done[number], options.pictures)


@dataclass(frozen=True, slots=True)
class _PageParts:
    """The data of the page."""

    done: Features
    chosen: PageSelection
    plane: PlaneLayout
    maps: TokenMaps
    thumbnails: dict[int, SmallPicture]
    photographs: Sequence[SmallPicture]
    options: ReportOptions

    def to_json(self, facts: Facts) -> dict[str, Any]:
        """Return the data of the page, in which images are referred to by their position in its list."""
        return {
            "path": facts.path,
            "made": time.strftime("%Y-%m-%d %H:%M %z"),
            "version": internvit_cli.__version__,
            "notes": facts.notes,
            "summary": facts.summary,
            "recipe": facts.recipe,
            "datasets": facts.datasets,
            "runs": facts.runs,
            "histogram": facts.histogram,
            "skipped": facts.skipped,
            "images": self._images(),
            "map": self._map(),
            "thumbnails": self._thumbnails(),
            "token_maps": self._token_maps(),
            "neighbors": self._neighbors(),
            "duplicates": self._duplicates(),
        }

    def _place(self, number: int) -> int:
        """Return the position of an image in the page's list."""
        return int(np.searchsorted(self.chosen.points, number))

    def _placed(self, found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(self._place(number), round(cosine, 3)) for number, cosine in found]

    def _images(self) -> dict[str, Any]:
        view = self.done[self.chosen.points]
        return {
            "keys": [printable(key) for key in view],
            "width": view.column("width").tolist(),
            "height": view.column("height").tolist(),
            "tiles": tile_counts(view).tolist(),
            "x": [round(x, DIGITS) for x in self.plane.places[:, 0].tolist()],
            "y": [round(y, DIGITS) for y in self.plane.places[:, 1].tolist()],
        }

    def _map(self) -> dict[str, Any]:
        return {
            "projection": self.options.projection.value,
            "explained": self.plane.explained,
            "fitted_on": self.plane.fitted_on,
            "of": len(self.done),
            "scale": SEQUENTIAL,
        }

    def _thumbnails(self) -> dict[str, Any]:
        placed = {self._place(number): one for number, one in self.thumbnails.items()}
        return {
            "size": self.options.thumbnail_size,
            "pictures": {place: _base64(one.jpeg) for place, one in placed.items() if one.jpeg},
            "problems": {place: one.problem for place, one in placed.items() if not one.jpeg},
        }

    def _token_maps(self) -> dict[str, Any]:
        maps = [
            {
                "image": self._place(number),
                "map": _base64(drawn.png),
                "box": [round(share, 6) for share in drawn.box],
                "photograph": _base64(photograph.jpeg),
                "problem": photograph.problem,
            }
            for number, drawn, photograph in zip(self.chosen.sample, self.maps.maps, self.photographs, strict=False)
        ]
        stores_tokens = len(self.done) > 0 and self.done.recipe.tokens is not Tokens.NONE
        return {"maps": maps, "explained": self.maps.explained, "stores_tokens": stores_tokens}

    def _neighbors(self) -> dict[str, Any]:
        rows = [
            {"image": self._place(number), "hits": self._placed(found)}
            for number, found in zip(self.chosen.sample, self.chosen.neighbors, strict=True)
        ]
        return {"rows": rows} | self.chosen.space.facts()

    def _duplicates(self) -> dict[str, Any]:
        groups = self.chosen.groups
        found = groups.found
        return {
            "redundant": found.redundant,
            "identical": [[self._place(number) for number in group] for group in groups.identical],
            "similar": [self._placed(group) for group in groups.similar],
            "identical_groups": len(found.identical),
            "similar_groups": len(found.similar),
            "identical_sizes": [len(group) for group in found.identical[: len(groups.identical)]],
            "similar_sizes": [len(group) for group in found.similar[: len(groups.similar)]],
        } | ({} if found.comparison is None else found.comparison.to_json())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
