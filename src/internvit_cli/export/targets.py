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
    VLLM = "vllm"
    """A folder with one array of projected tokens per image, as vLLM takes them."""
    NPY_FOLDER = "npy-folder"
    PT_FOLDER = "pt-folder"

    @property
    def is_feature_file(self) -> bool:
        """Whether `extract`, `verify` and all other commands can use the result."""
        return self in (Target.H5, Target.NPY)

    @property
    def is_sample_folder(self) -> bool:
        """Whether the result is a folder with one file per image."""
        return self in SAMPLE_FOLDERS

    @property
    def sample_suffix(self) -> str:
        """The end of the names of an image's file in such a folder."""
        return ".pt" if self is Target.PT_FOLDER else ".npy"

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
SAMPLE_FOLDERS = (Target.VLLM, Target.NPY_FOLDER, Target.PT_FOLDER)
FOLDER_TARGETS = (Target.H5, Target.NPY, *SAMPLE_FOLDERS)
INDEX, EXPORT_FACTS = "index.jsonl", "export.json"
"""The files of a folder with one file per image that are not of an image."""


class ResultPlace(NamedTuple):
    """The path and the format of a result."""

    path: str
    target: Target
    is_folder: bool
    """Whether the result is a folder instead of one file."""

    @property
    def has_shards(self) -> bool:
        """Whether the result is a folder of shards or may be a series of tars, to which `--shard-size` applies."""
        return self.target is Target.TAR or (self.is_folder and not self.target.is_sample_folder)


def choose_target(path: str, wanted: Target | None, option: str = "NEW") -> ResultPlace:
    """Return the result for a name and `--to`, as for `extract -o`.

    Raises:
        UsageError: They contradict each other, or no format has such a name.
    """
    check_place(path, option)
    has_slash = path.endswith("/")
    name, suffix = named_path(path), "" if has_slash else suffix_of(path)
    known = TARGET_OF_SUFFIX.get(suffix)
    if known is not None and wanted not in (None, known):
        raise UsageError(
            f"{path} names a {known.value} file, but --to {wanted.value} was given" if wanted else path,
            f"leave out --to, or choose another name for {option}",
        )
    target = known or wanted or Target.NPY
    is_folder = known is None and target in FOLDER_TARGETS
    if has_slash and not is_folder:
        raise UsageError(f"{path} names a folder, and --to {target.value} is one file", "leave out the slash")
    if is_folder and suffix in DATA_FILE_SUFFIXES and not says_folder(path):
        folder = f"{name.removesuffix(suffix)}/" if suffix == ".npy" else f"{name}/"
        what = ".npy shards go into a folder" if suffix == ".npy" else f"{suffix} files are not supported"
        raise UsageError(f"{path}: {what}", f"choose {', '.join(TARGET_OF_SUFFIX)}, or a folder, such as {folder}")
    return ResultPlace(name, target, is_folder)
