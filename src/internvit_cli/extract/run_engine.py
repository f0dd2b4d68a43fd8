"""Start the engine of a run when there is something to encode, and measure the accuracy of its types."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status
from internvit_cli.decode.decoder import decode_jobs
from internvit_cli.extract.engine import EngineOptions, Workload
from internvit_cli.extract.multi_device.engine import find_devices, start_engine
from internvit_cli.extract.run_plan import decoded_tiles
from internvit_cli.extract.sampling import SAMPLE_IMAGES
from internvit_cli.model.accuracy import Accuracy, check_recorded, measured_attributes, to_attributes
from internvit_cli.recipes import encoder_options_of_run
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.config import PixelRule, Recipe
    from internvit_cli.extract.engine import Engine
    from internvit_cli.extract.run_plan import Run, RunPlan
    from internvit_cli.plan.table import ImageTable


class RunEngine:
    """Starts the engine of a run at most once; it has to be closed."""

    def __init__(self, run: Run, plan: RunPlan) -> None:
        """Prepare without starting anything."""
        self._run = run
        self._model = plan.model
        self._rule = plan.rule
        self._recorded_batch_tiles = int((plan.existing.attributes or {}).get("batch_tiles", 0)) or None
        self.started: Engine | None = None
        """The engine; None until there is something to encode."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, once the weights are hashed, with the compute type once the engine has started."""
        recipe = self._model.recipe
        return recipe if self.started is None else replace(recipe, compute_dtype=self.started.info.dtype)

    @property
    def batch_tiles_to_record(self) -> int:
        """The batch size that a later run has to use for the same bits; 0 if it does not matter."""
        return self.started.info.batch_tiles_to_record if self.started else 0

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about this run for a shard's log of runs."""
        engine = self.started
        assert engine is not None, "facts are those of an engine that has encoded something"
        info = engine.info
        return {
            "device": info.device_name,
            "dtype": info.dtype.value,
            "batch_tiles": info.batch_tiles,
            "kernels": info.kernels,
            "workers": engine.workers,
            "resizing": info.resizing or "on the CPU",
            "model": self._model.recorded_name,
            "output": os.path.abspath(self._run.output.path),
        }

    def start(self, workload: Workload) -> Engine:
        """Return the engine, started for this work if it is not yet.

        Raises:
            InternvitError: A device does not exist, the model does not fit, or its weights cannot be read.
        """
        if self.started is not None:
            return self.started
        engine = self._start(workload)
        info = engine.info
        label = f"{self._model.card.name} in {info.dtype.value} on {info.device_name}"
        batch = f"{counted(info.batch_tiles, 'tile')} per batch"
        how = self._run.options.run
        is_measured = how.measure_batch and not how.compile and info.device_name.startswith("cuda")
        if is_measured and not self._recorded_batch_tiles:
            batch += " as measured here, which another run or card may not repeat"
        resizing = f", {info.resizing}" if info.resizing else ""
        self._run.observer.note(f"encoding with {label}, {batch}, {info.kernels}{resizing}")
        return engine

    def start_for_types(self) -> None:
        """Determine the compute type if there is nothing to encode and only a device can tell.

        Raises:
            InternvitError: See `start`.
        """
        if self.started is None and not self._model.dtype_is_known:
            self._start(None)

    def _start(self, workload: Workload | None) -> Engine:
        how, recipe = self._run.options.run, self._model.draft
        devices = find_devices(how.devices)
        encoder = replace(
            encoder_options_of_run(how, recipe, devices[0]),
            dtype=recipe.compute_dtype if self._model.dtype_is_known else how.dtype,
            recorded_batch_tiles=self._recorded_batch_tiles,
        )
        options = EngineOptions(
            rule=self._rule,
            encoder=encoder,
            devices=devices,
            workers=how.workers,
            decode_timeout=how.decode_timeout,
            worker_memory=how.worker_memory,
        )
        with self._run.observer.phase("loading the model"):
            self.started = start_engine(self._model.checkpoint, options, workload)
        return self.started

    def close(self) -> None:
        """End the workers and release the devices, however the run ended."""
        if self.started is not None:
            self.started.close()


def workload_of(table: ImageTable, rows: NDArray[Any], rule: PixelRule) -> Workload:
    """Return the amount of work of some images.

    Args:
        table: The table of their shard.
        rows: The rows of the images, [k] int64, k at least 1.
        rule: Decides how many tiles are decoded.
    """
    pixels = table.width[rows].astype(np.int64) * table.height[rows]
    return Workload(len(rows), int(decoded_tiles(table, rule)[rows].max()), int(pixels.max()))


def measure_accuracy(run: Run, plan: RunPlan, engine: RunEngine) -> dict[str, str]:
    """Return the accuracy of low-precision types as attributes, as recorded or measured on the first pictures.

    Raises:
        AccuracyError: A type is too inaccurate.
        InternvitError: A device or the workers fail.
    """
    recipe, recorded = engine.recipe, plan.existing.attributes or {}
    names = measured_attributes(recipe)
    if all(name in recorded for name in names):
        check_recorded(recorded, run.options.run.lowest_cosine)
        return {name: recorded[name] for name in names}
    accuracy = Accuracy()
    table = plan.planned.table
    is_pending = table.status == Status.PENDING
    if engine.started is not None and is_pending.any():
        workload = workload_of(table, np.flatnonzero(is_pending), plan.rule)
        jobs = list(decode_jobs(table, np.flatnonzero(is_pending)[:SAMPLE_IMAGES], plan.listing.sources))
        with run.observer.phase("measuring what coarse types cost"):
            accuracy = engine.started.measure(jobs, workload, run.stop)
    accuracy.check(run.options.run.lowest_cosine)
    if accuracy.words:
        run.observer.note(f"on the first pictures: {accuracy.words}")
    return to_attributes(recipe, accuracy)
