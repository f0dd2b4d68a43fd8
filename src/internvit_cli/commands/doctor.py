"""Check everything that a run needs on this machine, with hints, for `internvit doctor`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import shutil
import tempfile
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from internvit_cli import __version__
from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.decode.slots import Slots, SlotShape
from internvit_cli.errors import InternvitError, system_words
from internvit_cli.extract.results import package_version
from internvit_cli.model.catalog import known_card
from internvit_cli.model.files import locate_on_hub
from internvit_cli.model.hub import HubUnavailableError, is_offline
from internvit_cli.model.known import download_bytes, open_offline
from internvit_cli.model.names import ModelName, parse_model_name
from internvit_cli.runtime.words import counted
from internvit_cli.runtime.workers import FinishedTask, WorkerPool, WorkerSpec, usable_cpus
from internvit_cli.storage.durable import free_bytes, reserve, sync_data, unsynced_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "numpy",
    "h5py",
    "typer",
    "rich",
    "tqdm",
)
PICTURE_FORMATS = {"jpg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000", "libtiff": "TIFF"}
SHM = "/dev/shm"  # noqa: S108 - only inspected
FEW_OPEN_FILES = 256
LITTLE_MEMORY = 4_000_000_000
LITTLE_DISK = 1_000_000_000
TRIED_BYTES = 1 << 20


class CheckState(Enum):
    """The result of a check."""

    OK = "ok"
    NOTE = "note"
    """A run will work, but the user may want to know."""
    BAD = "bad"
    """A run will not work."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check with its result and a hint."""

    name: str
    state: CheckState
    found: str
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain values."""
        return asdict(self) | {"state": self.state.value}


def examine(output: str, model: str = DEFAULT_MODEL) -> Iterator[Check]:
    """Yield all checks, the quick ones first.

    Args:
        output: The output of the run; its folder is tested and left unchanged.
        model: The --model of the run.
    """
    yield _versions()
    yield _processor()
    yield _memory()
    yield _pictures()
    yield _open_files()
    yield _slots()
    yield _workers()
    yield from _hub()
    yield _model(model)
    yield from _folder(output)
    yield from _devices()


def _versions() -> Check:
    found = {package: package_version(package) for package in PACKAGES}
    missing = [package for package, version in found.items() if not version]
    own = {"internvit": __version__, "python": platform.python_version()}
    text = ", ".join(f"{name} {version}" for name, version in (own | found).items() if version)
    if missing:
        return Check(
            "versions", CheckState.BAD, f"{text}; not installed: {', '.join(missing)}", "install internvit-cli again"
        )
    return Check("versions", CheckState.OK, text)


def _processor() -> Check:
    cpus, all_cpus = usable_cpus(), os.cpu_count() or 1
    found = f"{cpus} of {all_cpus} cores, {platform.machine()}, {platform.system()} {platform.release()}"
    return Check("processor", CheckState.OK, found)


def _memory() -> Check:
    available = _available_memory()
    if available is None:
        return Check("memory", CheckState.OK, "not known on this system")
    state = CheckState.NOTE if available < LITTLE_MEMORY else CheckState.OK
    hint = (
        "a decode process may take up to --worker-memory (4 GiB); lower it, or --workers"
        if state is CheckState.NOTE
        else ""
    )
    return Check("memory", state, f"{available / 1e9:.1f} GB available", hint)


def _available_memory() -> int | None:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _pictures() -> Check:
    from PIL import features

    missing = [name for feature, name in PICTURE_FORMATS.items() if not features.check(feature)]
    if missing:
        return Check(
            "pictures", CheckState.NOTE, f"Pillow cannot read {', '.join(missing)}", "such pictures are skipped"
        )
    return Check("pictures", CheckState.OK, f"Pillow reads {', '.join(PICTURE_FORMATS.values())} and others")


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES:
        return Check("open files", CheckState.BAD, f"at most {soft}", f"ulimit -n {FEW_OPEN_FILES * 4}")
    return Check("open files", CheckState.OK, f"at most {soft:,}")


def _slots() -> Check:
    shape = SlotShape(slots=8, tiles=13, tile_size=448)
    try:
        Slots.allocate(shape).close()
    except InternvitError as error:
        return Check("shared memory", CheckState.BAD, error.message, error.hint)
    shm = shutil.disk_usage(SHM).total if os.path.isdir(SHM) else 0
    found = f"{shape.nbytes / 1e6:.0f} MB of tile slots allocated in memory files"
    return Check("shared memory", CheckState.OK, f"{found}; {SHM} ({shm / 1e6:,.0f} MB) is not used")


def _workers() -> Check:
    from internvit_cli.config import PixelRule

    spec = WorkerSpec("internvit_cli.plan.headers:header_reader", (PixelRule(),))
    try:
        with WorkerPool(spec, 1, 30.0) as pool:
            pool.submit(0, [os.fsencode(__file__)])
            outcomes = pool.wait(30.0)
    except InternvitError as error:
        return Check("workers", CheckState.BAD, error.message, error.hint)
    if not (outcomes and isinstance(outcomes[0], FinishedTask)):
        return Check(
            "workers",
            CheckState.BAD,
            "a worker process did not answer",
            "check that the machine has enough free memory",
        )
    return Check("workers", CheckState.OK, "a worker process started and answered")


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    folder = constants.HF_HUB_CACHE
    offline = ", offline mode is on" if constants.HF_HUB_OFFLINE else ""
    token = "a token is set" if get_token() else "no token is set"  # the token itself is never shown
    yield Check("hub cache", CheckState.OK, f"{folder}, {free_bytes(folder) / 1e9:.1f} GB free; {token}{offline}")


def _model(name: str) -> Check:
    """Check that a run would find the model, locally or on a hub that answers."""
    try:
        named = parse_model_name(name)
        try:
            checkpoint = open_offline(name)
        except HubUnavailableError as unavailable:
            return _on_hub(named, unavailable)
    except InternvitError as error:
        return Check("model", CheckState.BAD, error.message, error.hint)
    where = "in the hub cache" if named.repo else "built in" if named.is_built_in else "in its folder"
    tensors = counted(len(checkpoint.weights), "tensor")
    notes = "".join(f"; {note}" for note in (*checkpoint.card.notes, *checkpoint.notes))
    return Check("model", CheckState.OK, f"{checkpoint.card.name} is {where}, {tensors} for a run{notes}")


def _on_hub(named: ModelName, unavailable: HubUnavailableError) -> Check:
    """Check a model that is not in the cache."""
    if is_offline() or named.repo is None:
        return Check("model", CheckState.BAD, unavailable.message, unavailable.hint)
    try:
        files, _ = locate_on_hub(named.repo, named.revision)
    except HubUnavailableError as error:
        return Check("model", CheckState.BAD, error.message, error.hint)
    if files.offline:
        return Check("model", CheckState.BAD, f"{unavailable.message}; {files.offline}", unavailable.hint)
    size = f", about {download_bytes(known_card(named.known)) / 1e9:.1f} GB" if named.known else ""
    found = f"{named.repo} is on the hub; the first run fetches it{size}"
    return Check("model", CheckState.OK, found)


def _folder(output: str) -> Iterator[Check]:
    folder = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(folder):
        yield Check("output", CheckState.BAD, f"the folder {folder} does not exist", f"mkdir -p {folder}")
        return
    free = free_bytes(folder)
    state = CheckState.NOTE if free < LITTLE_DISK else CheckState.OK
    yield Check("output", state, f"{folder} on {_filesystem(folder)}, {free / 1e9:.1f} GB free")
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".internvit-doctor-")  # noqa: SIM115 - closed below
    except OSError as error:
        yield Check(
            "writing", CheckState.BAD, f"{folder}: {system_words(error)}", "choose a folder that can be written"
        )
        return
    with file:
        yield _try("writing", "written and synced", lambda: _write(file.name))
        yield _try("names", "new names survive a power cut", lambda: unsynced_folder(folder))
        yield _try("reserving", "space can be reserved", lambda: _reserve(file.name))
        yield _try("locking", "locks work", lambda: _lock(file.fileno()))


HINTS = {
    "names": "features are safe anyway; choose another folder if their names have to be safe too",
    "reserving": "a run works without it; make sure that the disk has enough space until it ends",
    "locking": "run with --no-lock, and make sure that only one run writes an output",
}
"""Hints for features that a run can do without."""


def _try(name: str, found: str, action: Callable[[], str]) -> Check:
    """Try an action on a file or its folder; it returns what does not work although a run is possible."""
    try:
        words = action()
    except OSError as error:
        return Check(name, CheckState.BAD, system_words(error), "check the disk")
    except InternvitError as error:
        return Check(name, CheckState.BAD, error.message, error.hint)
    return Check(name, CheckState.NOTE, words, HINTS[name]) if words else Check(name, CheckState.OK, found)


def _write(path: str) -> str:
    with open(path, "wb", buffering=0) as file:
        file.write(b"features")
        sync_data(file.fileno())
    return ""


def _reserve(path: str) -> str:
    os.truncate(path, TRIED_BYTES)
    return "" if reserve(path) else "the filesystem cannot reserve space"


def _lock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return system_words(error)
    return ""


def _filesystem(folder: str) -> str:
    """Return the type of a folder's filesystem, from the longest mount point above it."""
    best, kind = "", "a filesystem of unknown type"
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, mount_point, filesystem, *_ = line.split(" ")
            inside = folder == mount_point or folder.startswith(mount_point.rstrip("/") + "/")
            if inside and len(mount_point) >= len(best):
                best, kind = mount_point, filesystem
    return kind


def _devices() -> Iterator[Check]:
    from internvit_cli.commands.torch_info import torch_facts

    facts = torch_facts()
    build = f"PyTorch {facts.version}, " + (f"built for CUDA {facts.cuda}" if facts.cuda else "built without CUDA")
    if facts.problem:
        yield Check(
            "devices", CheckState.NOTE, f"{build}: {facts.problem}", "check nvidia-smi; the CPU is used meanwhile"
        )
    elif facts.cards:
        yield Check("devices", CheckState.OK, build)
    elif facts.has_apple_gpu:
        yield Check("devices", CheckState.OK, f"{build}; an Apple GPU")
    else:
        hint = "install a CUDA build of torch to use a card" if _has_nvidia() else ""
        state = CheckState.NOTE if hint else CheckState.OK
        yield Check("devices", state, f"{build}; only the CPU, with {facts.cpu}", hint)
    for number, card in enumerate(facts.cards):
        types = ["float32", *(["bfloat16"] if card.has_bfloat16 else []), *(["fp8"] if card.has_fp8 else [])]
        found = f"{card.name}, {card.memory / 2**30:.0f} GiB, {card.free / 2**30:.0f} free, {', '.join(types)}"
        state = CheckState.OK if card.has_bfloat16 else CheckState.NOTE
        yield Check(f"cuda:{number}", state, found, "" if card.has_bfloat16 else "too old for bfloat16: slow")
    if facts.cards and not facts.triton:
        yield Check(
            "triton", CheckState.NOTE, "not installed", "run pip install triton; without it the encoder is slower"
        )


def _has_nvidia() -> bool:
    return os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None
