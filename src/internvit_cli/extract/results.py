"""What a run did: counts that reconcile, where the time went, and one sentence on what to change."""

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
"""A stage that works this share of the time is what limits the run."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the seconds of a run's main part went. The stages overlap: each is a share of the same wall clock."""

    wall: float = 0.0
    """Seconds from the first decode to the last commit."""
    decode: float = 0.0
    """Reading and decoding, averaged over the workers."""
    device: float = 0.0
    """The encoder at work."""
    write: float = 0.0
    """Writing and syncing rows."""

    @property
    def idle(self) -> float:
        """Seconds in which the encoder waited."""
        return max(0.0, self.wall - self.device)

    def plus(self, other: Stages) -> Stages:
        """The sum of two."""
        return Stages(
            self.wall + other.wall, self.decode + other.decode, self.device + other.device, self.write + other.write
        )

    @property
    def bottleneck(self) -> str:
        """One sentence: what limits the run, and what to do about it."""
        if self.wall <= 0:
            return "Nothing had to be encoded."
        shares = {"device": self.device / self.wall, "decode": self.decode / self.wall, "write": self.write / self.wall}
        stage = max(shares, key=lambda name: shares[name])
        share = f"{100 * min(1.0, shares[stage]):.0f} %"
        if shares[stage] < BUSY:
            return f"No stage is the limit: the busiest, {stage}, worked {share} of the time."
        return {
            "device": f"The encoder is the limit: it was busy {share} of the time.",
            "decode": f"Decoding is the limit: the workers were busy {share} of the time; try more --workers.",
            "write": f"Writing is the limit: it took {share} of the time; try a faster disk, or store less.",
        }[stage]


@dataclass(frozen=True, slots=True)
class Tally:
    """Images that a run is through with, and their tiles."""

    images: int = 0
    """Encoded."""
    skipped: int = 0
    tiles: int = 0
    """Of the encoded images."""
    skipped_tiles: int = 0
    """That the skipped images would have had."""

    def plus(self, other: Tally) -> Tally:
        """The sum of two."""
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
    """Of the images to encode."""
    skipped: int
    """By now: by an earlier run, or because their headers cannot be read."""
    unlisted: int = 0
    """Images to encode, beside `found`, that an unfinished run planned and that are not in this listing."""

    @property
    def unchanged(self) -> int:
        """Images that are done already."""
        return self.found - self.to_encode - self.skipped

    @property
    def sentence(self) -> str:
        """The same in one line; what there is none of is left out."""
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
    """Rows of the output whose picture is not in the listing, beside `found`."""
    unchanged: int = 0
    """Of the done images: those that an earlier run encoded."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Skipped images by reason."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of `extract`."""

    output: str
    skipped_path: str
    """Where the skipped images are listed with their reasons."""
    model: str
    counts: Counts
    tiles: int
    """Of the images encoded by this run."""
    encoded: int
    """Images encoded by this run."""
    bytes: int
    """Bytes of the output on disk."""
    seconds: float
    """Wall clock of the whole command."""
    stages: Stages
    device: str = ""
    dtype: str = ""
    batch_tiles: int = 0
    kernels: str = ""
    """What the encoder computed with, and why where that is not the fastest."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What lies in the sources and was not taken, beside the images found."""
    notes: tuple[str, ...] = ()
    """What a user should know beside the numbers."""
    is_up_to_date: bool = False
    """Whether the run found nothing to do."""
    stopped_by: int = 0
    """The signal that ended the run early; 0 for none."""

    @property
    def is_useless(self) -> bool:
        """Whether not one image could be used."""
        return bool(self.counts.found) and self.counts.skipped == self.counts.found

    def exit_code(self, allow_skipped: int = 0) -> int:
        """The code for the shell; up to `allow_skipped` skipped images count as success."""
        if self.stopped_by:
            return 128 + self.stopped_by
        if self.is_useless:
            return ExitCode.CANNOT_RUN
        return ExitCode.SKIPPED if self.counts.skipped > allow_skipped else ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        """The flat object of `--json`."""
        counts = asdict(self.counts)
        stages = {
            "decode": self.stages.decode,
            "device": self.stages.device,
            "write": self.stages.write,
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
    """One line of a shard's log of starts: what made these rows, beside the recipe and the device."""
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
    """Version of an installed package; empty when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """The result of `plan`: what an extraction would do."""

    output: str
    model: str
    layers: tuple[int, ...]
    """Blocks after which features are taken, ascending."""
    images: int
    """Found in the sources."""
    skipped: int
    """Whose header cannot be read."""
    reasons: dict[str, int]
    tiles: int
    histogram: dict[int, int]
    """Images by number of tiles."""
    bytes: int
    """Size of the output on disk."""
    free_bytes: int
    """Free where the output would be."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What lies in the sources and would not be taken, beside the images found."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The flat object of `--json`."""
        values = asdict(self) | {"left_out": self.left_out.to_json(), "notes": list(self.notes)}
        return values | {"fits": self.bytes <= self.free_bytes}
