"""Decide which images are for training and which for testing, for every kind of probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.probe.split import group_numbers
from internvit_cli.runtime.words import counted
from internvit_cli.similarity.duplicates import DuplicateOptions, find_duplicates
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from internvit_cli.runtime.observer import Observer
    from internvit_cli.similarity.duplicates import Duplicates
    from internvit_cli.storage.read.reader import Features


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOptions:
    """The outputs that a probe is trained and tested on, and how they are divided."""

    path: str
    test_path: str | None = None
    """Another output to test on; None divides the images of `path`."""
    test_fraction: float = 0.2
    seed: int = 0
    ignore_duplicates: bool = False
    """Whether copies of a picture may come to different parts."""
    device: str = "auto"
    layer: int | None = None
    """The stored layer; None means the deepest."""
    pictures: str | None = None
    """The folder that holds the pictures; None means where they were when they were encoded."""

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise UsageError(
                f"--test-fraction {self.test_fraction} is not between 0 and 1", "give a share, such as 0.2"
            )


def open_test_output(options: PartOptions, features: Features) -> Features:
    """Return the output that is for testing.

    Raises:
        OutputError: Its features are of another kind than those of the training.
    """
    other = open_features(options.test_path or "", options.layer)
    ignored = ("compute_dtype", "values_per_scale")
    different = [name for name in other.recipe.differences(features.recipe) if name not in ignored]
    if different:
        raise OutputError(
            f"{options.path} and {options.test_path} are of different recipes: {', '.join(different)} differ",
            "extract both with the same model and options",
        )
    return other


def groups_of_copies(options: PartOptions, images: Features, observer: Observer, notes: list[str]) -> NDArray[np.int64]:
    """Return a group number per image, [n], which copies of a picture share.

    Args:
        options: The output, and whether copies are looked for.
        images: Some images of the output.
        observer: Receives progress.
        notes: Receives a sentence on the copies, if there are any.
    """
    if options.ignore_duplicates:
        return np.arange(len(images))
    found = find_duplicates(DuplicateOptions(options.path, pictures=options.pictures, layer=options.layer), observer)
    place = {key: number for number, key in enumerate(images)}
    groups = [[place[key] for key in group if key in place] for group in _keys_of_groups(found)]
    groups = [group for group in groups if len(group) > 1]
    if groups:
        copies = counted(sum(map(len, groups)), "image")
        notes.append(f"{copies} are copies of each other, and each group of copies is in one part")
    return group_numbers(len(images), groups)


def _keys_of_groups(found: Duplicates) -> Iterable[list[str]]:
    for group in found.identical:
        yield [image.key for image in group]
    for members in found.similar:
        yield [member.image.key for member in members]


def leaks(train: Features, test: Features) -> list[str]:
    """Return a sentence on test images whose file is also one for training; none if there are no such images."""
    known = {image.digest for image in train.values()} - {bytes(32)}
    both = sum(image.digest in known for image in test.values())
    return [f"{counted(both, 'test image')} are the same file as a training image"] if both else []
