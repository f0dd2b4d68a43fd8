"""What `internvit export` can write, and which of it a name stands for."""

from __future__ import annotations

import os
from typing import NamedTuple

from internvit_cli.config import Choice, Format
from internvit_cli.errors import UsageError
from internvit_cli.options import named_path


class Target(Choice):
    """A format to export to."""

    H5 = "h5"
    NPY = "npy"
    PARQUET = "parquet"
    SAFETENSORS = "safetensors"
    TAR = "tar"
    CSV = "csv"

    @property
    def is_feature_file(self) -> bool:
        """Whether `extract`, `verify` and all other commands go on with the result."""
        return self in (Target.H5, Target.NPY)

    @property
    def shard_format(self) -> Format:
        """The format of a feature file's shards."""
        return Format(self.value)


TARGET_OF_SUFFIX = {
    ".h5": Target.H5,
    ".hdf5": Target.H5,
    ".parquet": Target.PARQUET,
    ".safetensors": Target.SAFETENSORS,
    ".tar": Target.TAR,
    ".csv": Target.CSV,
}
OTHER_FORMATS = (".npy", ".npz", ".pt", ".pth", ".pkl", ".json", ".jsonl", ".arrow", ".feather", ".zip", ".gz", ".tgz")
"""Names that look like a file of a format that is not written: no folder is made by such a name."""
OWN_SUFFIXES = (".partial", ".lock", ".exporting", ".tmp")
"""Names of what lies beside a result while it is made."""
FOLDER_TARGETS = (Target.H5, Target.NPY)


class Place(NamedTuple):
    """What is written, and where."""

    path: str
    target: Target
    is_folder: bool
    """A folder of shards instead of one file."""


def choose_target(path: str, wanted: Target | None, option: str = "NEW") -> Place:
    """What a name and `--format` stand for together, as with `extract -o`.

    Raises:
        UsageError: they contradict each other, or no format of ours has such a name.
    """
    name = named_path(path)
    suffix = os.path.splitext(name)[1].lower()
    known = TARGET_OF_SUFFIX.get(suffix)
    if known is not None and wanted not in (None, known):
        raise UsageError(
            f"{path} names a {known.value} file, but --format {wanted.value} was given" if wanted else path,
            f"leave out --format, or choose another name for {option}",
        )
    if suffix in OWN_SUFFIXES:
        raise UsageError(f"{path}: {suffix} is what ends the name of an unfinished result", "choose another name")
    if known is None and suffix in OTHER_FORMATS and (wanted is None or suffix == ".npy"):
        folder = f"; .npy shards go into a folder, such as {name.removesuffix(suffix)}/" if suffix == ".npy" else ""
        raise UsageError(
            f"{path}: no {suffix} files are written", f"choose {', '.join(TARGET_OF_SUFFIX)}, or a folder{folder}"
        )
    target = known or wanted or Target.NPY
    return Place(name, target, is_folder=known is None and target in FOLDER_TARGETS)
