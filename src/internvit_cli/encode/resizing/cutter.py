"""Cut whole pictures into tiles on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.encode.resizing.passes import choose_pass, table_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from internvit_cli.plan.tiling import View


class Cutter:
    """Makes the tiles of a picture on one device, with the pixels that decode workers would make."""

    def __init__(self, device: torch.device, tile_size: int) -> None:
        self._side = tile_size
        self._pass, self.problem = choose_pass(device)
        """Why a CUDA device does not use its own kernel; usually empty."""

    def cut(self, picture: Tensor, views: Sequence[View]) -> Tensor:
        """Return the tiles of all views, uint8 [n,S,S,3], row by row.

        Args:
            picture: uint8 [H,W,3] RGB on the device, contiguous.
            views: The result of `views_of` for its size.
        """
        side = self._side
        tiles = picture.new_empty((sum(view.tiles for view in views), side, side, 3))
        at = 0
        for view in views:
            resized = self._resized(picture, view).view(view.rows, side, view.columns, side, 3)
            tiles[at : at + view.tiles].view(view.rows, view.columns, side, side, 3).copy_(resized.transpose(1, 2))
            at += view.tiles
        return tiles

    def _resized(self, picture: Tensor, view: View) -> Tensor:
        """Return the part of the resized picture that the view's tiles cover, [rows S, columns S, 3]."""
        height, width, _ = picture.shape
        columns = slice(view.left, view.left + view.columns * self._side)
        rows = slice(view.top, view.top + view.rows * self._side)
        if view.width == width:
            part = picture[:, columns].contiguous()
        else:
            part = self._pass(picture, table_on(picture.device, width, view.width)[columns])
        if view.height == height:
            return part[rows].contiguous()
        lines = part.view(1, height, -1)
        resized = self._pass(lines, table_on(picture.device, height, view.height)[rows])
        return resized.view(view.rows * self._side, view.columns * self._side, 3)
