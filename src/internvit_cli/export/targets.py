"""List the formats that `internvit export` writes, and choose one by the name of the result."""

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
        """Whether `extract`, `verify` and all other commands can use the result."""
        return self in (Target.H5, Target.NPY)

    @property
    def shard_format(self) -> Format:
        """The shard format of a feature file."""
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


class ResultPlace(NamedTuple):
    """The path and the format of a result."""

    path: str
    target: Target
    is_folder: bool
    """Whether the result is a folder of shards instead of one file."""


def choose_target(path: str, wanted: Target | None, option: str = "NEW") -> ResultPlace:
    """Return the result for a name and `--format`, as for `extract -o`.

    Raises:
        UsageError: They contradict each other, or no format has such a name.
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
        what = ".npy shards go into a folder" if suffix == ".npy" else f"{suffix} files are not supported"
        raise UsageError(f"{path}: {what}", f"choose {', '.join(TARGET_OF_SUFFIX)}, or a folder, such as {folder}")
    return ResultPlace(name, target, is_folder)
