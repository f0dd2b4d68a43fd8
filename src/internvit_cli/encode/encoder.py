"""Encode uint8 tiles into features on one device, with several batches in flight.

On a CPU, each tile is a task on one thread, and threads encode tiles in parallel. So no result depends on which tiles
were submitted together, and no core waits at a barrier. On an accelerator, batches have one fixed size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from internvit_cli.config import ComputeDtype, Resize
from internvit_cli.encode.devices import device_name, fastest_dtype, find_fit_device
from internvit_cli.encode.interface import EncoderInfo
from internvit_cli.errors import DeviceError, UsageError
from internvit_cli.model.accuracy import Accuracy
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.model.kernels.fp8 import FP8
from internvit_cli.runtime.malloc import keep_freed_memory
from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

    from internvit_cli.encode.interface import PendingBatch, Placed, Runner
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.encode.tile_features import Tiles
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.plan.tiling import View

TORCH_DTYPE = {
    ComputeDtype.BFLOAT16: torch.bfloat16,
    ComputeDtype.FLOAT16: torch.float16,
    ComputeDtype.FLOAT32: torch.float32,
    ComputeDtype.FP8: FP8,
}

COMPILED_BATCH = 64
"""Batch size with torch.compile; it is not measured, because every size would have to be compiled."""


class Encoder:
    """A loaded model on its device. Create it with `Encoder.load`, and close it."""

    def __init__(self, checkpoint: Checkpoint, options: EncoderOptions, model: FeatureModel, runner: Runner) -> None:
        """Own what `load` created; `options` have a concrete dtype."""
        self._dtype = options.dtype
        self.shapes = model.shapes
        self._tile_shape = (model.spec.tile_size, model.spec.tile_size, 3)
        self._checkpoint = checkpoint
        self._compile = options.compile
        self._resize = options.resize
        self._model = model
        self._runner = runner

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: EncoderOptions) -> Encoder:
        """Load the weights onto the device, choose dtype and batch size, and prepare for the first batch.

        Raises:
            DeviceError: The device does not exist or cannot compute in that dtype, or a batch does not fit.
            ModelError: The weights cannot be read.

            UsageError: The options contradict each other or the model.
        """
        _check(options, checkpoint)
        device = find_fit_device(options.device, options.dtype, compile=options.compile)
        # Operations on the host are never split over threads: on a CPU, tiles run in parallel, and with a card, the
        # cores are for the decode workers. PyTorch's threads would wait for theirs in the middle of every copy.
        torch.set_num_threads(1)
        if device.type == "cpu":
            keep_freed_memory()
        if options.dtype is ComputeDtype.AUTO:
            options = replace(options, dtype=fastest_dtype(device, checkpoint.card.vision, options.tile_size))
        model = _load_model(checkpoint, options, device)
        return cls(checkpoint, options, model, _make_runner(model, options))

    @property
    def info(self) -> EncoderInfo:
        """The current facts: the batch is smaller after running out of memory."""
        runner, kernels = self._runner, self._model.kernels.name
        return EncoderInfo(
            device_name=device_name(self._model.device),
            dtype=self._dtype,
            batch_tiles=runner.batch_tiles,
            batch_tiles_to_record=runner.batch_tiles if runner.fixed_batch else 0,
            kernels=(f"torch.compile over {kernels}" if self._compile else kernels) + runner.note,
            halved=runner.halved,
            resizing=self._resizing(),
        )

    @property
    def resizes(self) -> bool:
        """Whether whole pictures should be resized here by `cut`, and not by Pillow; the pixels are the same."""
        if self._resize is Resize.AUTO:
            return self._model.device.type == "cuda" and not self._runner.resize_problem
        return self._resize is Resize.DEVICE

    def _resizing(self) -> str:
        if not self.resizes:
            return ""
        problem = self._runner.resize_problem
        return f"pictures resized there{f' ({problem})' if problem else ''}"

    @property
    def device_seconds(self) -> float:
        """Seconds that the device was busy so far."""
        return self._runner.device_seconds

    def buffer(self) -> NDArray[np.uint8]:
        """Return an empty batch, uint8 [n,S,S,3], to be filled and submitted partly or completely.

        The device reads from this memory, so a tile that is copied into it is copied only once. The next call returns
        another batch, and tiles that were not submitted are lost. `n` is the current batch size.
        """
        return self._runner.buffer()

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Prepare page-aligned memory in which pictures for `cut` will lie, and forget any from before."""
        self._runner.register(memory)

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Resize a picture on the device, with the pixels of Pillow, and return its tiles there, uint8 [n,S,S,3].

        Args:
            picture: uint8 [H,W,3] RGB, C-contiguous, turned upright; its memory is free when this returns.
            views: The result of `plan.tiling.views_of` for its size.

        Raises:
            DeviceError: The device ran out of memory.
        """
        return self._runner.cut(picture, views)

    def submit(self, tiles: Tiles, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Start encoding and return at once; several batches may be in flight.

        Args:
            tiles: uint8 [S,S,3] RGB each, C-contiguous, at least one; the first ones of a `buffer`, or any others. On a
                CPU, their memory is read until `result` returns. On other devices, it is free when this returns, except
                that of a `buffer`, which belongs to the encoder.
            placed: Tiles from `cut`, with places in the batch; those of `tiles` at these places are not read.

        Raises:
            DeviceError: The device ran out of memory a second time.
        """
        self._check_tiles(tiles)
        return self._runner.submit(tiles, placed)

    def accuracy(self, tiles: Sequence[np.ndarray]) -> Accuracy:
        """Measure the accuracy of low-precision types: fp8 arithmetic against bfloat16 and float32, int8 or fp8 tokens.

        For fp8 arithmetic, the model is loaded in both wider types, one after the other, and freed again.

        Args:
            tiles: uint8 [S,S,3] RGB each; without tiles, nothing is measured.

        Raises:
            DeviceError: A reference does not fit into the device's memory.
            ModelError: The weights cannot be read again.
        """
        from internvit_cli.encode.quantization import measure_computing, measure_storing

        self._check_tiles(tiles)
        if not tiles:
            return Accuracy()
        stores_coarsely = self._model.spec.store_dtype.is_scaled
        computes_coarsely = self._dtype is ComputeDtype.FP8
        return Accuracy(
            compute=measure_computing(self._checkpoint, self._model, tiles) if computes_coarsely else None,
            store=measure_storing(self._model, tiles) if stores_coarsely else None,
        )

    def _check_tiles(self, tiles: Tiles) -> None:
        for tile in tiles:
            if tile.dtype != np.uint8 or tile.shape != self._tile_shape:
                raise ValueError(f"a tile is {tile.dtype} {tile.shape}, not uint8 {self._tile_shape}")

    def close(self) -> None:
        """Finish batches in flight, then release threads and memory."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(options: EncoderOptions, checkpoint: Checkpoint) -> None:
    if options.layer not in {None, checkpoint.blocks}:
        raise ValueError(f"the checkpoint was opened for {checkpoint.blocks} blocks, not {options.layer}")
    if any(layer >= checkpoint.blocks for layer in options.earlier_layers):
        raise ValueError(f"one of the layers {options.earlier_layers} is not before block {checkpoint.blocks}")
    if options.batch_tiles is not None and options.batch_tiles < 1:
        raise UsageError(f"--batch-size {options.batch_tiles}: it must be at least 1", "leave it out to have it chosen")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads {options.threads}: it must be at least 1", "leave it out to use all cores")


def feature_spec(options: EncoderOptions) -> FeatureSpec:
    """Return what is kept of a tile with these options."""
    return FeatureSpec(
        tokens=options.tokens,
        pool=options.pool,
        tile_size=options.tile_size,
        token_order=options.token_order,
        store_dtype=options.store_dtype,
        values_per_scale=options.values_per_scale,
        on_overflow=options.on_overflow,
        earlier_layers=options.earlier_layers,
    )


def _load_model(checkpoint: Checkpoint, options: EncoderOptions, device: torch.device) -> FeatureModel:
    """Load the model and its weights onto the device."""
    try:
        model = FeatureModel.load(
            checkpoint,
            feature_spec(options),
            device=device,
            dtype=TORCH_DTYPE[options.dtype],
            fused=options.fused and not options.compile,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{device}: the model does not fit into its memory", "use --dtype bfloat16, or another device"
        ) from error
    if options.compile:
        model.encoder.compile(dynamic=False)
    return model


def _make_runner(model: FeatureModel, options: EncoderOptions) -> Runner:
    """Return the runner of batches for the model's device."""
    if model.device.type == "cpu":
        from internvit_cli.encode.cpu import CpuRunner

        return CpuRunner(model, threads=options.threads or usable_cpus(), batch_tiles=options.batch_tiles)
    from internvit_cli.encode.accelerators import accelerator_runner

    batch_tiles = options.batch_tiles or options.recorded_batch_tiles
    try:
        return accelerator_runner(
            model, batch_tiles or (COMPILED_BATCH if options.compile else None), measure=options.measure_batch
        )
    except RuntimeError as error:
        if not options.compile:
            raise
        raise DeviceError(
            f"torch.compile failed: {' '.join(str(error).split())[:200]}", "leave --compile out"
        ) from error
