"""Classify the pixels of pictures from maps of tokens: the official linear head, and a small convolutional one.

Source of the linear head: segmentation/configs/intern_vit_6b/linear_probing in OpenGVLab/InternVL, an FCNHead without
convolutions: BatchNorm and a 1 x 1 convolution, resized to the mask. Maps differ in size from picture to picture, so
heads take lists of maps, and every BatchNorm normalizes by all places of all maps of a batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from internvit_cli.probe.masks import PixelSample
from internvit_cli.probe.training import epochs_for, fit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray


WIDTH = 128
"""Channels of the convolutional head."""
BATCH = 8
BATCH_VALUES = 32 << 20
"""Numbers in the maps of a batch at most, unless a single map has more."""
STEP_PIXELS = 4096
"""Pixels of each picture that a step is trained on."""
BAND_VALUES = 16 << 20
"""Class scores that are computed at once at the resolution of a mask."""


class Segmenter(nn.Module):
    """Takes maps of tokens to maps of class scores."""

    weight_decay = 0.0

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return class scores, [classes, h, w] each, for maps [h, w, C]."""
        raise NotImplementedError


class LinearSegmenter(Segmenter):
    """BatchNorm and a 1 x 1 convolution."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.classify = _pointwise(width, classes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return class scores, [classes, h, w] each, for maps [h, w, C]."""
        return [F.conv2d(one, self.classify.weight, self.classify.bias) for one in _normed(self.norm, _planes(maps))]


class ConvSegmenter(Segmenter):
    """BatchNorm and a 1 x 1 convolution to fewer channels, and two 3 x 3 convolutions, each with BatchNorm and ReLU."""

    weight_decay = 0.05

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.narrow = nn.Conv2d(width, WIDTH, 1, bias=False)
        self.blocks = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH) for _ in range(3)])
        self.classify = _pointwise(WIDTH, classes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return class scores, [classes, h, w] each, for maps [h, w, C]."""
        planes = _normed(self.norm, _planes(maps))
        for convolution, norm in zip((self.narrow, *self.blocks), self.norms, strict=True):
            planes = [one.relu() for one in _normed(norm, [convolution(one) for one in planes])]
        return [self.classify(one) for one in planes]


def _pointwise(width: int, classes: int) -> nn.Conv2d:
    convolution = nn.Conv2d(width, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def _planes(maps: Sequence[Tensor]) -> list[Tensor]:
    return [one.permute(2, 0, 1) for one in maps]


def _normed(norm: nn.Module, planes: Sequence[Tensor]) -> list[Tensor]:
    """Normalize maps [C, h, w] of any sizes by the mean and the variance over all their places."""
    together: Tensor = norm(torch.cat([one.flatten(1) for one in planes], dim=1)[None])[0]
    parts = torch.split(together, [one.shape[1] * one.shape[2] for one in planes], dim=1)
    return [part.view(one.shape) for part, one in zip(parts, planes, strict=True)]


# ----------------------------------------------------------------------------------------------------------- training


def train_segmenter(
    head: Segmenter,
    maps: Callable[[int], Tensor],
    samples: Sequence[PixelSample],
    values: NDArray[np.int64],
    seed: int,
    on_step: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Train a head on some pixels of each picture, and leave it in evaluation mode.

    Args:
        head: The head to train.
        maps: Reads the map of a training image, [h, w, C] float32 on the head's device.
        samples: The pixels of each training image, with classes from 0.
        values: The numbers in the map of each image, [n].
        seed: Decides the order of images.
        on_step: Called with the number of steps made, and of all steps.
    """
    random = np.random.default_rng(seed)

    def loss_of(batch: NDArray[np.int64]) -> Tensor:
        found = head([maps(number) for number in batch.tolist()])
        drawn = [_some(samples[number], random) for number in batch.tolist()]
        scores = [scores_at(one, pixels.places) for one, pixels in zip(found, drawn, strict=True)]
        wanted = np.concatenate([pixels.numbers for pixels in drawn]).astype(np.int64)
        return F.cross_entropy(torch.cat(scores), torch.from_numpy(wanted).to(scores[0].device))

    per_epoch = len(list(_batches(random.permutation(len(samples)), values)))
    batches = [
        batch for _ in range(epochs_for(per_epoch)) for batch in _batches(random.permutation(len(samples)), values)
    ]
    fit(head, batches, loss_of, head.weight_decay, on_step)


def _some(pixels: PixelSample, random: np.random.Generator) -> PixelSample:
    if len(pixels.numbers) <= STEP_PIXELS:
        return pixels
    chosen = random.integers(0, len(pixels.numbers), STEP_PIXELS)
    return PixelSample(pixels.places[chosen], pixels.numbers[chosen])


def _batches(order: NDArray[np.int64], values: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Divide images into batches of nearly the same size that fit into memory."""
    largest = int(values.max())
    size = max(1, min(BATCH, BATCH_VALUES // largest))
    yield from np.array_split(order, math.ceil(len(order) / size))


def scores_at(scores: Tensor, places: NDArray[np.float32]) -> Tensor:
    """Return class scores at some pixels, [n, classes]: those of a map [classes, h, w] that is resized bilinearly.

    Args:
        scores: The map.
        places: The centers of the pixels as shares of the width and the height, [n, 2].
    """
    grid = torch.from_numpy(places).to(scores.device)[None, None] * 2 - 1
    found = F.grid_sample(scores[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0].T


# ---------------------------------------------------------------------------------------------------------- predicting


def predicted_rows(scores: Tensor, height: int, width: int) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the most probable class of each pixel, in bands of rows, so that memory does not grow with the picture.

    Args:
        scores: A map of class scores, [classes, h, w], which is resized bilinearly.
        height: The rows of pixels.
        width: The pixels of a row.

    Yields:
        The rows of a band, and their classes [rows, width] int64.
    """
    classes, rows, _ = scores.shape
    band = max(1, BAND_VALUES // (classes * width))
    for top in range(0, height, band):
        bottom = min(top + band, height)
        place = (torch.arange(top, bottom, device=scores.device) + 0.5) * (rows / height) - 0.5
        place = place.clamp(0, rows - 1)
        above = place.floor().long()
        share = (place - above)[:, None]
        below = (above + 1).clamp(max=rows - 1)
        mixed = scores[:, above] * (1 - share) + scores[:, below] * share  # [classes, band, w]
        wide = F.interpolate(mixed[None], size=(bottom - top, width), mode="bilinear", align_corners=False)[0]
        yield slice(top, bottom), wide.argmax(dim=0).cpu().numpy()
