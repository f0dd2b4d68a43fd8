"""Remember which kernels passed their probes, so that the same kernels on the same card are not probed at every start.

A stamp is an empty file in the user's cache folder. Its name is a digest of all that the result depends on: the card,
its driver, PyTorch, Triton, the source of the kernels, and the sizes of the probes. If any of them changes, the kernels
are probed again. Deleting the folder does so too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from internvit_cli.model.kernels.probes import ProbeSizes

DRIVER_FILE = "/proc/driver/nvidia/version"


def stamp_path(device: torch.device, dtype: torch.dtype, sizes: ProbeSizes) -> str:
    """Return the path of the stamp of the kernels that a CUDA device would run."""
    properties = torch.cuda.get_device_properties(device)
    facts = (properties.name, properties.total_memory, torch.cuda.get_device_capability(device), _driver())
    versions = (torch.__version__, torch.version.cuda, _version("triton"))
    digest = hashlib.sha256(repr((facts, versions, str(dtype), sizes, _source_digest())).encode()).hexdigest()
    return os.path.join(stamp_folder(), digest)


def stamp_folder() -> str:
    """Return the folder of all stamps: `internvit/kernels` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "internvit", "kernels")


def is_stamped(path: str) -> bool:
    """Return whether kernels have passed their probes before."""
    return os.path.isfile(path)


def stamp(path: str) -> None:
    """Remember that kernels have passed their probes; if the folder cannot be written, they are probed again."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        os.close(descriptor)
        os.replace(temporary, path)


def _source_digest() -> str:
    """Return a digest of the modules of this package, whose kernels and probes it holds."""
    hasher = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(module.name.encode() + b"\0" + module.read_bytes())
    return hasher.hexdigest()


def _driver() -> str:
    try:
        return Path(DRIVER_FILE).read_text()
    except OSError:  # not Linux, or a container without it
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
