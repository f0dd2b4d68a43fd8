"""Define the results of a run: counts that add up, the time per stage, and a sentence on what to change."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from internvit_cli.errors import ExitCode
from internvit_cli.runtime.words import counted
from internvit_cli.sources.left_out import LeftOut

BUSY = 0.85
"""A stage that is busy for this share of the time limits the run."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The seconds of each stage in a run's main part. Stages overlap, so each is a share of the wall time."""

    wall: float = 0.0
    """Seconds from the first decode to the last commit."""
    decode: float = 0.0
    """Seconds of reading and decoding, averaged over the workers."""
    device: float = 0.0
    """Seconds in which the encoder was busy."""
    write: float = 0.0
    """Seconds of writing and syncing rows."""
    host: float = 0.0
    """CPU seconds of the thread that fills batches and takes features apart; it waits for the rest of the time."""

    @property
    def idle(self) -> float:
        """The seconds in which the encoder waited."""
        return max(0.0, self.wall - self.device)

    def plus(self, other: Stages) -> Stages:
        """Return the sum of both."""
        return Stages(
            wall=self.wall + other.wall,
            decode=self.decode + other.decode,
            device=self.device + other.device,
            write=self.write + other.write,
            host=self.host + other.host,
        )

    @property
    def bottleneck(self) -> str:
        """A sentence on what limits the run, and what to do about it."""
        if self.wall <= 0:
            return "Nothing had to be encoded."
        seconds = {"device": self.device, "decode": self.decode, "write": self.write, "host": self.host}
        stage = max(seconds, key=lambda name: seconds[name])
        if seconds[stage] < BUSY * self.wall:
            return f"No stage is the limit: the busiest, {stage}, worked {self._share(seconds[stage])} of the time."
        busy = f"busy {self._share(seconds[stage])} of the time"
        if stage == "device":
            return f"The encoder is the limit: it was {busy}."
        idle = f"the encoder waited {self._share(self.idle)} of the time"
        return {
            "decode": f"Decoding is the limit: the workers were {busy}, and {idle}; try more --workers, or more cores.",
            "write": f"Writing is the limit: it was {busy}, and {idle}; try a faster disk, or store less, such as "
            "--tokens none or a smaller --store-dtype.",
            "host": f"Filling batches is the limit: one thread was {busy}, and {idle}; try fewer --workers if they "
            "take all cores, or --devices, which fills batches in a process per device.",
        }[stage]

    def _share(self, seconds: float) -> str:
        return f"{100 * min(1.0, seconds / self.wall):.0f} %"


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers of images that a run has finished, and their tiles."""

    images: int = 0
    """Encoded."""
    skipped: int = 0
    tiles: int = 0
    """Tiles of the encoded images."""
    skipped_tiles: int = 0
    """Tiles that the skipped images would have had."""

    def plus(self, other: Tally) -> Tally:
        """Return the sum of both."""
        return Tally(
            self.images + other.images,
            self.skipped + other.skipped,
            self.tiles + other.tiles,
            self.skipped_tiles + other.skipped_tiles,
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """The images of this command's listing before anything is encoded: found = to encode + unchanged + skipped."""

    found: int
    to_encode: int
    tiles: int
    """Tiles of the images to encode."""
    skipped: int
    """Images skipped so far, by an earlier run or because their headers cannot be read."""
    unlisted: int = 0
    """Images to encode that an unfinished run planned but that are not in this listing, not part of `found`."""

    @property
    def unchanged(self) -> int:
        """The number of images that are already done."""
        return self.found - self.to_encode - self.skipped

    @property
    def sentence(self) -> str:
        """The numbers in one line, without those that are zero."""
        terms = [f"{self.to_encode:,} to encode" + (f" ({counted(self.tiles, 'tile')})" if self.to_encode else "")]
        terms += [f"{self.unchanged:,} unchanged"] if self.unchanged else []
        terms += [f"{self.skipped:,} skipped"] if self.skipped else []
        line = f"{counted(self.found, 'image')} found = {' + '.join(terms)}"
        if self.unlisted:
            line += f"; {self.unlisted:,} more of an unfinished run, not in these sources"
        return line


@dataclass(frozen=True, slots=True)
class Counts:
    """The images of this command's listing: found = done + skipped + pending."""

    found: int = 0
    done: int = 0
    skipped: int = 0
    pending: int = 0
    kept: int = 0
    """Rows of the output whose picture is not in the listing, not part of `found`."""
    unchanged: int = 0
    """Done images that an earlier run encoded."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Skipped images by reason."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of `extract`."""

    output: str
    skipped_path: str
    """The list of skipped images with their reasons."""
    model: str
    counts: Counts
    tiles: int
    """Tiles of the images encoded by this run."""
    encoded: int
    """Images encoded by this run."""
    bytes: int
    """The size of the output on disk in bytes."""
    seconds: float
    """The wall time of the whole command in seconds."""
    stages: Stages
    device: str = ""
    dtype: str = ""
    batch_tiles: int = 0
    kernels: str = ""
    """The kernels of the encoder, with the reason if they are not the fastest."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files in the sources that were not taken."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
    is_up_to_date: bool = False
    """Whether the run found nothing to do."""
    stopped_by: int = 0
    """The signal that ended the run early; 0 for none."""

    @property
    def is_useless(self) -> bool:
        """Whether no image could be used."""
        return bool(self.counts.found) and self.counts.skipped == self.counts.found

    def exit_code(self, allow_skipped: int = 0) -> int:
        """Return the exit code; up to `allow_skipped` skipped images count as success."""
        if self.stopped_by:
            return 128 + self.stopped_by
        if self.is_useless:
            return ExitCode.CANNOT_RUN
        return ExitCode.SKIPPED if self.counts.skipped > allow_skipped else ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        counts = asdict(self.counts)
        stages = {
            "decode": self.stages.decode,
            "device": self.stages.device,
            "write": self.stages.write,
            "host": self.stages.host,
            "idle": self.stages.idle,
            "wall": self.stages.wall,
        }
        return {
            "output": self.output,
            "skipped_path": self.skipped_path if self.counts.skipped else None,
            "model": self.model,
            **counts,
            "left_out": self.left_out.to_json(),
            "encoded": self.encoded,
            "tiles": self.tiles,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "stages": {name: round(value, 3) for name, value in stages.items()},
            "bottleneck": self.stages.bottleneck,
            "device": self.device,
            "dtype": self.dtype,
            "batch_tiles": self.batch_tiles,
            "kernels": self.kernels,
            "notes": list(self.notes),
        }


VERSIONED_PACKAGES = ("internvit-cli", "torch", "pillow", "numpy", "h5py")


def run_log_entry(stages: Stages, images: int, tiles: int) -> dict[str, Any]:
    """Return an entry for a shard's log of runs: facts about the run beyond the recipe and the device."""
    return {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "images": images,
        "tiles": tiles,
        "seconds": round(stages.wall, 3),
        "bottleneck": stages.bottleneck,
        "python": platform.python_version(),
    } | {package: package_version(package) for package in VERSIONED_PACKAGES}


def package_version(package: str) -> str:
    """Return the version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """The result of `plan`."""

    output: str
    model: str
    layers: tuple[int, ...]
    """Numbers of blocks after which features are taken, ascending."""
    images: int
    """Images found in the sources."""
    skipped: int
    """Images whose header cannot be read."""
    reasons: dict[str, int]
    tiles: int
    histogram: dict[int, int]
    """Numbers of images by number of tiles."""
    bytes: int
    """The size of the output on disk in bytes."""
    free_bytes: int
    """The free space at the place of the output in bytes."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files in the sources that would not be taken."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        values = asdict(self) | {"left_out": self.left_out.to_json(), "notes": list(self.notes)}
        return values | {"fits": self.bytes <= self.free_bytes}
