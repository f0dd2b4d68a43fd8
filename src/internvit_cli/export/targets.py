"""What `internvit export` can write, and which of it a name stands for."""

from __future__ import annotations

from typing import NamedTuple

from internvit_cli.config import Choice, Format
from internvit_cli.errors import UsageError
from internvit_cli.options import named_path
from internvit_cli.storage.output_names import DATA_FILE_SUFFIXES, check_place, says_folder, suffix_of


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
    check_place(path, option)
    has_slash = path.endswith("/")
    name, suffix = named_path(path), "" if has_slash else suffix_of(path)
    known = TARGET_OF_SUFFIX.get(suffix)
    if known is not None and wanted not in (None, known):
        raise UsageError(
            f"{path} names a {known.value} file, but --format {wanted.value} was given" if wanted else path,
            f"leave out --format, or choose another name for {option}",
        )
    target = known or wanted or Target.NPY
    is_folder = known is None and target in FOLDER_TARGETS
    if has_slash and not is_folder:
        raise UsageError(f"{path} names a folder, and --format {target.value} is one file", "leave out the slash")
    if is_folder and suffix in DATA_FILE_SUFFIXES and not says_folder(path):
        folder = f"{name.removesuffix(suffix)}/" if suffix == ".npy" else f"{name}/"
        what = ".npy shards go into a folder" if suffix == ".npy" else f"no {suffix} files are written"
        raise UsageError(f"{path}: {what}", f"choose {', '.join(TARGET_OF_SUFFIX)}, or a folder, such as {folder}")
    return Place(name, target, is_folder)
