"""Train and test segmentation heads on the stored tokens of images that have masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.config import Status, Tokens
from internvit_cli.errors import OutputError, UsageError, one_line
from internvit_cli.model.caveats import caveats
from internvit_cli.probe.data import MapReader
from internvit_cli.probe.masks import (
    PixelSample,
    check_classes,
    find_masks,
    numbers_in,
    open_masks,
    read_mask,
    refuse_unusable,
    sample_pixels,
)
from internvit_cli.probe.metrics import Interval, PixelCounts
from internvit_cli.probe.parts import PartOptions, groups_of_copies, leaks, open_test_output
from internvit_cli.probe.split import stratified_split
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from internvit_cli.probe.masks import MaskFolder
    from internvit_cli.probe.segmenters import Segmenter
    from internvit_cli.storage.read.reader import Features

LINEAR, CONVOLUTIONS = "linear", "head"
HEADS = (LINEAR, CONVOLUTIONS)
SAMPLED_PIXELS = 32 << 20
"""Pixels of all training masks together that are trained on."""
FEWEST_PIXELS, MOST_PIXELS = 1 << 10, 1 << 16
"""Pixels of one mask that are trained on, whatever the number of masks."""
OF_NO_CLASS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions(PartOptions):
    """What to train on what, and how it is tested."""

    masks: str
    """The folder of masks."""
    heads: tuple[str, ...] = HEADS


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """The images of the outputs."""

    train: int
    test: int
    unlabelled: int
    """Images with features and without a mask."""
    blank: int
    """Images whose mask has no class at any pixel that the tokens cover."""
    skipped: int
    """Images without features."""


@dataclass(frozen=True, eq=False)
class MaskPart:
    """The images of one part, which have features and masks."""

    features: Features
    paths: tuple[str, ...]
    """The paths of their masks."""
    numbers: tuple[NDArray[np.int64], ...]
    """The class numbers that occur in each mask."""
    samples: tuple[PixelSample, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, is_chosen: NDArray[np.bool_]) -> MaskPart:
        """Return some of the images."""
        chosen = np.flatnonzero(is_chosen).tolist()
        picked = (tuple(values[number] for number in chosen) for values in (self.paths, self.numbers, self.samples))
        return MaskPart(self.features.at(self.features.positions[chosen]), *picked)


@dataclass(frozen=True, eq=False)
class SegmentScore:
    """What one head reaches on the test part."""

    name: str
    mean_iou: Interval
    counts: PixelCounts


@dataclass(frozen=True, eq=False)
class SegmentResult:
    """All that was measured."""

    options: SegmentOptions
    classes: tuple[str, ...]
    numbers: tuple[int, ...]
    """The pixel values of the classes."""
    counts: SegmentCounts
    test: MaskPart
    scores: tuple[SegmentScore, ...]
    heads: dict[str, Segmenter] = field(repr=False)
    """Trained heads by name."""
    notes: tuple[str, ...]

    @property
    def best(self) -> SegmentScore:
        """The score with the highest mean intersection over union; the first of equals."""
        return max(self.scores, key=lambda score: score.mean_iou.value)

    @property
    def gap(self) -> float | None:
        """By how much the convolutional head is above the linear one; None if either did not run."""
        by_name = {score.name: score.mean_iou.value for score in self.scores}
        return by_name[CONVOLUTIONS] - by_name[LINEAR] if len(by_name) == len(HEADS) else None


def run_segmentation(options: SegmentOptions, observer: Observer = SILENT) -> SegmentResult:
    """Train and test all heads.

    Raises:
        OutputError: An output lacks tokens, or is of another recipe.
        UsageError: The masks do not fit the images, or there are too few of them.
    """
    features = open_features(options.path, options.layer)
    _check_tokens(features)
    outputs = [features] if options.test_path is None else [features, open_test_output(options, features)]
    folder = open_masks(options.masks)
    surveyed, left_out = _survey(outputs, find_masks(folder, outputs), options.seed, observer)
    numbers = check_classes(
        folder, [own for part in surveyed for own in part.numbers], [path for part in surveyed for path in part.paths]
    )
    notes: list[str] = []
    train, test = surveyed if len(surveyed) == 2 else _divided(options, surveyed[0], observer, notes)
    if len(surveyed) == 2:
        notes += leaks(train.features, test.features)
    _check_parts(train, test, numbers, folder, notes)
    counts = SegmentCounts(len(train), len(test), *left_out)
    heads = _train(options, train, numbers, observer)
    scores = _scores(options, test, numbers, heads, observer)
    classes = tuple(map(folder.name_of, numbers))
    return SegmentResult(options, classes, numbers, counts, test, scores, heads, (*notes, *caveats(features)))


def _check_tokens(features: Features) -> None:
    if features.recipe.tokens is Tokens.NONE:
        raise OutputError(
            f"{features.path} holds no tokens, which segmentation needs", "extract with --tokens visual or patch"
        )


# --------------------------------------------------------------------------------------------------- masks and parts


def _survey(
    outputs: Sequence[Features], paths: Sequence[Sequence[str | None]], seed: int, observer: Observer
) -> tuple[list[MaskPart], tuple[int, int, int]]:
    """Read every mask once, and return the images that have one, and how many have none, blank ones, or no features."""
    is_done = [features.column("status") == Status.DONE for features in outputs]
    used = [
        [number for number, path in enumerate(own) if path is not None and done[number]]
        for own, done in zip(paths, is_done, strict=True)
    ]
    total = sum(map(len, used))
    most = int(np.clip(SAMPLED_PIXELS // max(1, total), FEWEST_PIXELS, MOST_PIXELS))
    random = np.random.default_rng(seed)
    parts, problems, blank, read = [], [], 0, 0
    with observer.phase("reading masks", "mask", total) as phase:
        for features, own, chosen in zip(outputs, paths, used, strict=True):
            kept, numbers, samples = [], [], []
            for number in chosen:
                path = own[number] or ""
                values = read_mask(path, features[number])
                phase.at(read := read + 1)
                if isinstance(values, str):
                    problems.append((path, values))
                elif len(found := numbers_in(values)):
                    kept.append(number)
                    numbers.append(found)
                    samples.append(sample_pixels(values, most, random))
                else:
                    blank += 1
            view = features.at(features.positions[kept])
            parts.append(MaskPart(view, tuple(own[number] or "" for number in kept), tuple(numbers), tuple(samples)))
    refuse_unusable(problems)
    done = sum(int(own.sum()) for own in is_done)
    return parts, (done - total, blank, sum(map(len, outputs)) - done)


def _divided(
    options: SegmentOptions, part: MaskPart, observer: Observer, notes: list[str]
) -> tuple[MaskPart, MaskPart]:
    """Divide images so that every class is in the training part, and in the test part too if it can be."""
    groups = groups_of_copies(options, part.features, observer, notes)
    frequency = np.bincount(np.concatenate(part.numbers))
    # An image counts as one of its rarest class, because common classes come to both parts anyway.
    rarest = np.array([own[np.argmin(frequency[own])] for own in part.numbers])
    is_test = stratified_split(rarest, groups, options.test_fraction, np.random.default_rng(options.seed))
    return part.take(~is_test), part.take(is_test)


def _check_parts(
    train: MaskPart, test: MaskPart, numbers: tuple[int, ...], folder: MaskFolder, notes: list[str]
) -> None:
    if not len(train) or not len(test):
        raise UsageError(
            f"{counted(len(train) + len(test), 'image')} with masks cannot be divided into a training and a test part"
            if not len(train) + len(test) > 1
            else f"there are no images with masks to {'test' if len(train) else 'train'} on",
            "draw more masks, or check their names",
        )
    trained, tested = (set(np.concatenate(part.numbers).tolist()) for part in (train, test))
    if len(trained) < 2:
        raise UsageError(
            f"all masks of the training part hold one class, {one_line(folder.name_of(min(trained)))}",
            "draw more masks, or choose another --seed",
        )
    for missing, what in ((set(numbers) - trained, "training"), (set(numbers) - tested, "test")):
        if missing:
            words = ", ".join(one_line(folder.name_of(number)) for number in sorted(missing)[:3])
            notes.append(f"{counted(len(missing), 'class', 'classes')} without a {what} image, such as {words}")


# ---------------------------------------------------------------------------------------------------------- the heads


def _train(
    options: SegmentOptions, train: MaskPart, numbers: tuple[int, ...], observer: Observer
) -> dict[str, Segmenter]:
    import torch

    from internvit_cli.encode.devices import find_device
    from internvit_cli.probe.segmenters import ConvSegmenter, LinearSegmenter, train_segmenter

    device = find_device(options.device)
    reader = MapReader(train.features, str(device))
    samples = [PixelSample(one.places, _table(numbers)[one.numbers]) for one in train.samples]
    heads: dict[str, Segmenter] = {}
    torch.manual_seed(options.seed)
    for name in options.heads:
        kind = LinearSegmenter if name == LINEAR else ConvSegmenter
        head = kind(reader.width, len(numbers)).to(device)
        with observer.phase(f"training the {name} probe", "step", None) as phase:
            train_segmenter(head, reader, samples, reader.values, options.seed, phase.at)
        heads[name] = head
    return heads


def _scores(
    options: SegmentOptions, test: MaskPart, numbers: tuple[int, ...], heads: dict[str, Segmenter], observer: Observer
) -> tuple[SegmentScore, ...]:
    """Count pixels of the test images at the resolution of their masks."""
    reader = reader_for(test, heads)
    counts = {name: PixelCounts.zeros(len(test), len(numbers)) for name in heads}
    with observer.phase("testing", "image", len(test)) as phase:
        for number in range(len(test)):
            labels = labels_of(test, number, numbers)
            for name, head in heads.items():
                for rows, found in predicted(head, reader, number, *labels.shape):
                    counts[name].add(number, labels[rows], found)
            phase.at(number + 1)
    return tuple(SegmentScore(name, found.mean_iou(options.seed), found) for name, found in counts.items())


def reader_for(part: MaskPart, heads: dict[str, Segmenter]) -> MapReader:
    """Return a reader of a part's maps, on the device of its heads."""
    device = next(next(iter(heads.values())).parameters()).device
    return MapReader(part.features, str(device))


def labels_of(part: MaskPart, number: int, numbers: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the classes of an image's pixels, [h, w], as places in `numbers`; OF_NO_CLASS where there is none.

    Raises:
        UsageError: The mask has changed since it was first read, and cannot be used any more.
    """
    values = read_mask(part.paths[number], part.features[number])
    if isinstance(values, str):
        raise UsageError(f"{one_line(part.paths[number])}: {values}", "do not change masks while they are used")
    labels: NDArray[np.int32] = _table(numbers)[values]
    return labels


def predicted(
    head: Segmenter, reader: MapReader, number: int, height: int, width: int
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield what a head takes the pixels of an image for, in bands of rows; see `segmenters.predicted_rows`."""
    import torch

    from internvit_cli.probe.segmenters import predicted_rows

    with torch.inference_mode():
        (scores,) = head([reader(number)])
        yield from predicted_rows(scores, height, width)


@lru_cache(maxsize=2)
def _table(numbers: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the place of each pixel value in `numbers`, [65536]."""
    table = np.full(1 << 16, OF_NO_CLASS, np.int32)
    table[list(numbers)] = np.arange(len(numbers))
    return table
