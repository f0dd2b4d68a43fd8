"""Remember which kernels passed their probes, so that the same kernels on the same card are not probed at every start.

A stamp is an empty file in the user's cache folder. Its name is a digest of all that the result depends on: the card,
its driver, PyTorch, Triton, the system with its C compiler, the source of the kernels, and the sizes of the probes. If
any of them changes, the kernels are probed again. Deleting the folder does so too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from internvit_cli.model.kernels.probes import ProbeSizes

DRIVER_FILE = "/proc/driver/nvidia/version"
SYSTEM_FILE = "/etc/os-release"


def stamp_path(device: torch.device, dtype: torch.dtype, sizes: ProbeSizes) -> str | None:
    """Return the path of the stamp of the kernels that a CUDA device would run; None if the user has no folder."""
    folder = stamp_folder()
    if folder is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    facts = (properties.name, properties.total_memory, torch.cuda.get_device_capability(device), _driver())
    versions = (torch.__version__, torch.version.cuda, _version("triton"))
    found = (facts, versions, _system(), str(dtype), sizes, _source_digest())
    return os.path.join(folder, hashlib.sha256(repr(found).encode()).hexdigest())


def stamp_folder() -> str | None:
    """Return the folder of all stamps, `internvit/kernels` in the user's cache folder; None if there is no such."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # then it is to be ignored, says the XDG specification
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "internvit", "kernels") if os.path.isabs(cache) else None


def is_stamped(path: str | None) -> bool:
    """Return whether kernels have passed their probes before."""
    return path is not None and os.path.isfile(path)


def stamp(path: str | None) -> None:
    """Remember that kernels have passed their probes; if the folder cannot be written, they are probed again."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # An empty file needs no atomic write, and whoever makes it first is right.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _source_digest() -> str:
    """Return a digest of the modules of this package, whose kernels and probes it holds."""
    hasher = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(module.name.encode() + b"\0" + module.read_bytes())
    return hasher.hexdigest()


def _system() -> tuple[str | None, ...]:
    """Return what Triton compiles with, because containers may share a home, and kernels may compile only in one."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return sys.prefix, compiler, os.environ.get("TRITON_PTXAS_PATH"), _text_of(SYSTEM_FILE)


def _driver() -> str:
    return _text_of(DRIVER_FILE)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux, or a container without it
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
