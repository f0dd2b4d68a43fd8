"""Divide labelled images into a training and a test part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import UsageError, one_line
from internvit_cli.probe.data import Part
from internvit_cli.probe.labels import FOLDER, TEST, TRAIN, Labels, check_keys, labels_of_keys, read_labels
from internvit_cli.probe.parts import PartOptions, groups_of_copies, leaks, open_test_output
from internvit_cli.probe.split import stratified_split
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from internvit_cli.runtime.observer import Observer
    from internvit_cli.storage.read.reader import Features


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions(PartOptions):
    """Where labels come from, and how images are divided."""

    labels: str = FOLDER
    """`folder`, or the path of a table."""
    depth: int = 1
    """The folder of a key that is its label, counted from 1."""
    ignore_unknown: bool = False
    """Whether labels of images that no output has are left out."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The images of the outputs."""

    train: int
    test: int
    unlabelled: int
    """Images with features and without a label."""
    skipped: int
    """Images without features."""
    unknown: int
    """Labels of images that are in no output."""


@dataclass(frozen=True, eq=False)
class LabelledParts:
    """The parts of a probe, and how they came about."""

    classes: tuple[str, ...]
    """The names of the classes, by class number."""
    train: Part
    test: Part
    counts: Counts
    label_source: str
    """Where the labels come from, in words."""
    notes: tuple[str, ...]


def labelled_parts(options: LabelOptions, features: Features, observer: Observer) -> LabelledParts:
    """Return the labelled images of one or two outputs, divided into a training and a test part.

    Args:
        options: Where labels come from, and how images are divided.
        features: The output at `options.path`.
        observer: Receives progress.

    Raises:
        OutputError: The test output is of another recipe.
        UsageError: The labels do not fit the images, or there are too few images.
    """
    if options.test_path is not None:
        return _split_outputs(options, features, open_test_output(options, features))
    labels = _labels(options, [features])
    labelled, names, unlabelled, skipped = _labelled(features, labels)
    classes = tuple(sorted(set(names)))
    numbers = _numbers(names, classes)
    part = Part(labelled, numbers)
    notes: list[str] = []
    if labels.has_split:
        splits = np.array([labels.by_key[key].split or "" for key in labelled])
        is_test, is_train = splits == TEST, splits == TRAIN
        if without := int((~is_test & ~is_train).sum()):
            notes.append(f"{counted(without, 'labelled image')} without a split left out")
        notes += leaks(part.take(is_train).features, part.take(is_test).features)
    else:
        groups = groups_of_copies(options, labelled, observer, notes)
        is_test = stratified_split(numbers, groups, options.test_fraction, np.random.default_rng(options.seed))
        is_train = ~is_test
    train, test = part.take(is_train), part.take(is_test)
    _check_parts(train, test, classes, options)
    untested = set(range(len(classes))) - set(test.labels.tolist())
    if untested:
        names_of = ", ".join(one_line(classes[number]) for number in sorted(untested)[:3])
        notes.append(f"{counted(len(untested), 'class', 'classes')} without a test image, such as {names_of}")
    counts = Counts(len(train), len(test), unlabelled, skipped, _unknown(labels, [features]))
    return LabelledParts(classes, train, test, counts, labels.source, tuple(notes))


def _split_outputs(options: LabelOptions, features: Features, other: Features) -> LabelledParts:
    """Train on one output and test on another."""
    labels = _labels(options, [features, other])
    trained, train_names, *left_of_training = _labelled(features, labels)
    tested, test_names, *left_of_test = _labelled(other, labels)
    classes = tuple(sorted(set(train_names)))
    is_known = np.array([name in set(classes) for name in test_names], bool)
    notes = []
    if not is_known.all():
        names_of = sorted({name for name, known in zip(test_names, is_known, strict=True) if not known})
        notes.append(
            f"{counted(int((~is_known).sum()), 'test image')} of classes that are not trained left out, such as "
            f"{one_line(names_of[0])}"
        )
    kept = [name for name, known in zip(test_names, is_known, strict=True) if known]
    train = Part(trained, _numbers(train_names, classes))
    test = Part(tested.at(tested.positions[is_known]), _numbers(kept, classes))
    _check_parts(train, test, classes, options)
    notes += leaks(train.features, test.features)
    unlabelled, skipped = map(sum, zip(left_of_training, left_of_test, strict=True))
    counts = Counts(len(train), len(test), unlabelled, skipped, _unknown(labels, [features, other]))
    return LabelledParts(classes, train, test, counts, labels.source, tuple(notes))


def _labels(options: LabelOptions, outputs: Sequence[Features]) -> Labels:
    keys = [key for features in outputs for key in features]
    if options.labels == FOLDER:
        labels = labels_of_keys(keys, options.depth)
        if not labels.by_key:
            raise UsageError(
                f"no image of {options.path} is in a folder at depth {options.depth}: a key is {one_line(keys[0])}"
                if keys
                else f"{options.path} holds no images",
                "give a table of labels with --labels FILE.csv, or another --depth",
            )
        return labels
    labels = read_labels(options.labels)
    if not options.ignore_unknown:
        check_keys(labels, keys, options.path)
    return labels


def _labelled(features: Features, labels: Labels) -> tuple[Features, list[str], int, int]:
    """Return the labelled images with features, their labels, and how many images lack a label or features."""
    status = features.column("status")
    keys = list(features)
    has_label = np.array([key in labels.by_key for key in keys], bool)
    is_done = status == Status.DONE
    chosen = np.flatnonzero(has_label & is_done)
    names = [labels.by_key[keys[number]].name for number in chosen.tolist()]
    return features.at(features.positions[chosen]), names, int((is_done & ~has_label).sum()), int((~is_done).sum())


def _unknown(labels: Labels, outputs: Sequence[Features]) -> int:
    """Return how many images a table names that no output has."""
    if not labels.names_keys:
        return 0
    return sum(not any(key in features for features in outputs) for key in labels.by_key)


def _numbers(names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    number = {name: place for place, name in enumerate(classes)}
    return np.array([number[name] for name in names], np.int64)


def _check_parts(train: Part, test: Part, classes: Sequence[str], options: LabelOptions) -> None:
    if not classes:
        raise UsageError(
            f"no labelled image of {options.path} has features",
            f"internvit info {options.path} counts the skipped images and says why they are",
        )
    if len(classes) < 2:
        raise UsageError(
            f"a probe needs at least two classes: all labelled images are of {one_line(classes[0])}",
            "check --labels, or --depth, which says which folder of a key is the label",
        )
    if len(np.unique(train.labels)) < 2:
        raise UsageError(
            f"the training part holds {counted(len(np.unique(train.labels)), 'class', 'classes')} in "
            f"{counted(len(train), 'image')}",
            "label more images, or check the split column",
        )
    if not len(test):
        raise UsageError(
            "there are no images to test on",
            "label more images per class" if options.test_path is None else "check the labels of the test output",
        )
