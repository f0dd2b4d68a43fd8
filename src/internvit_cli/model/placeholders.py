"""Write the text that stands for images in a prompt of InternVL's chat models, and count its tokens; without PyTorch.

A chat model replaces every `<IMG_CONTEXT>` by one visual token, so a prompt needs exactly as many of them as its images
have tokens: 256 per tile of 448 pixels, where the thumbnail is a tile too. The labels are those of the official code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.config import PATCH_SIZE, Choice, member_named
from internvit_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"
"""The special tokens around and for visual tokens, in all of InternVL's tokenizers."""


class PlaceholderStyle(Choice):
    """The label before the placeholder of an image."""

    PLAIN = "plain"
    """No label, for a single image."""
    IMAGE = "image"
    """`Image-1: `, for several images."""
    FRAME = "frame"
    """`Frame-1: `, for frames of a video: InternVL 2.5 and later."""
    OLD_FRAME = "old-frame"
    """`Frame1: `, for frames of a video: InternVL 1.5 and 2.0, and transformers' processor."""

    def label(self, number: int) -> str:
        """Return the label of an image, which are numbered from 1."""
        labels = {
            PlaceholderStyle.IMAGE: f"Image-{number}: ",
            PlaceholderStyle.FRAME: f"Frame-{number}: ",
            PlaceholderStyle.OLD_FRAME: f"Frame{number}: ",
        }
        return labels.get(self, "")


def style_named(word: str) -> PlaceholderStyle:
    """Return the style for a word.

    Raises:
        UsageError: There is no such style.
    """
    found = member_named(PlaceholderStyle, word)
    if found is None:
        raise UsageError(f"a placeholder has no style {word!r}", f"choose {', '.join(PlaceholderStyle)}")
    return found


def tokens_per_tile(tile_size: int) -> int:
    """Return the number of visual tokens of a tile, of which each covers 2 x 2 patches.

    Raises:
        UsageError: The tile does not divide into whole tokens.
    """
    unit = 2 * PATCH_SIZE
    if tile_size % unit:
        raise UsageError(
            f"tiles of {tile_size} pixels do not divide into visual tokens of {unit} pixels",
            f"extract with a --tile-size that is a multiple of {unit}",
        )
    return (tile_size // unit) ** 2


def placeholder(tokens: int, style: PlaceholderStyle, number: int = 1) -> str:
    """Return the text that stands for an image of so many visual tokens.

    Args:
        tokens: The number of visual tokens, from `tokens_per_tile` times the number of tiles.
        style: The label.
        number: The number of the image or frame, from 1.
    """
    return f"{style.label(number)}{START}{CONTEXT * tokens}{END}"


def prompt_text(tokens: Sequence[int], style: PlaceholderStyle | None = None) -> str:
    """Return the text that stands for several images, one per line, as it begins a prompt of the official code.

    Args:
        tokens: The number of visual tokens of each image.
        style: The labels; None means none for a single image, and `Image-1: ` and so on for several.
    """
    chosen = style or (PlaceholderStyle.PLAIN if len(tokens) == 1 else PlaceholderStyle.IMAGE)
    return "".join(placeholder(count, chosen, number) + "\n" for number, count in enumerate(tokens, 1))
