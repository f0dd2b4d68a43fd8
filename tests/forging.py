"""Outputs that somebody forged: every part of a small real one, replaced by whatever a sender could put there.

A forgery changes a copy of an output, and signs it anew, so that what refuses it is not the digest alone. `try_case`
then runs every command that opens an output, in a child of its own, and tells what came of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import traceback
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import crash_checks
import crash_driver
import h5py
import numpy as np
from crash_checks import KINDS
from pytest import MonkeyPatch

from internvit_cli import open_features
from internvit_cli.cli import app
from internvit_cli.cli.completion import complete_keys
from internvit_cli.config import Status
from internvit_cli.errors import InternvitError, OutputError
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.storage import output as output_module
from internvit_cli.storage.format.layout import index_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = b"Qz7#kV2!xW9$mJ4&pL6*rT1@yH8^bN3%dF5~gS0?cU+vX=eA"
"""What lies in a file beside the output; none of it may come out of a command."""
PICTURES = ["a.png", "b.png", "bad.png", "c/d.png", "spoiled.png"]
ADDED = "e.png"
HANG_SECONDS, BUSY_SECONDS = 300, 30
"""After so long a wait, and after so much of a processor, a command is not coming back."""
MEMORY_BYTES = 150 << 20
"""More than any command takes of an output of a few kilobytes, beyond what it takes of the sound one."""
BOMB = 1 << 31
SPARSE_BYTES = 6 << 30
DEPTH = 200_000


@dataclass(frozen=True)
class Scene:
    """A sound output of some pictures, to be copied and forged."""

    folder: Path
    kind: str
    is_unfinished: bool = False
    """Whether its run ended before the first shard had its name."""

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def secret(self) -> Path:
        return self.folder / "secret"

    @property
    def other(self) -> Path:
        """Another sound output, of the same recipe."""
        return self.folder / "other.h5"

    def output(self, where: Path) -> Path:
        return where / KINDS[self.kind][0]

    def target(self, where: Path) -> Path:
        """What commands are to read."""
        return self.shard(where) if self.kind == "file" else self.output(where)

    def shard(self, where: Path) -> Path:
        """The HDF5 file, or what the names of .npy shards begin with; the folder of one that is being filled."""
        output = self.output(where)
        name = "shard-00000.h5" if "h5" in self.kind else "shard-00000"
        finished = output if self.kind == "file" else output / name
        return Path(f"{finished}.partial") if self.is_unfinished else finished


def set_scene(folder: Path, kind: str, *, is_unfinished: bool = False) -> Scene:
    """Make pictures and two outputs with the real command, whose pixels and weights alone are stand-ins."""
    scene = Scene(folder, kind, is_unfinished)
    crash_checks.make_pictures(scene.pictures, PICTURES)
    scene.secret.write_bytes(SECRET * 1000)
    sound = folder / "sound"
    sound.mkdir()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        crash_driver.run(["extract", str(scene.pictures), "-o", str(scene.other)])
        with MonkeyPatch.context() as patch:
            if is_unfinished:
                patch.setattr(output_module.Output, "publish", end_here)
            crash_driver.run(["extract", str(scene.pictures), "-o", str(scene.output(sound)), *KINDS[kind][1:]])
    assert scene.target(sound).exists()
    crash_checks.make_pictures(scene.pictures, [ADDED], seed=1)
    return scene


def end_here(*_: Any) -> None:
    raise OutputError("the disk is gone", "mount it")


# ------------------------------------------------------------------------------------------------------- the commands


def read_all(output: Path) -> dict[str, Any]:
    """Everything that a program gets from the reader."""
    features = open_features(output)
    found: dict[str, Any] = {}
    for key, image in features.items():
        rows = [image.width, image.height, list(image.grid), image.status.word, image.path, image.digest.hex()]
        if image.status is Status.DONE:
            arrays = (image.pooled, image.visual_tokens, image.tile_pooled, image.token_map())
            rows += [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        found[key] = rows
    keys, matrix = features.pooled_matrix()
    return found | {"matrix": [keys, hashlib.sha256(matrix.tobytes()).hexdigest()], "repr": [repr(features.recipe)]}


def complete(output: Path) -> list[str]:
    return complete_keys(SimpleNamespace(params={"path": str(output)}), "")  # type: ignore[arg-type]


def command_lines(scene: Scene, output: Path, made: Path) -> Iterator[list[str]]:
    """Every command that opens an output; the last ones change it."""
    out = str(scene.target(output.parent))
    yield ["info", out]
    yield ["info", out, "--json"]
    yield ["ls", out]
    yield ["verify", out]
    yield ["show", out, "a.png", "-o", str(made / "shown"), "-q"]
    yield ["search", out, "-k", "a.png", "-q"]
    yield ["duplicates", out, "-q"]
    yield ["report", out, "-o", str(made / "report.html"), "--workers", "1", "--thumbnails", "0", "-q"]
    for name in ("made.csv", "made.h5", "made.npz-folder", "made.tar"):
        yield ["export", out, str(made / name), "-q"]
    yield ["merge", out, str(scene.other), "-o", str(made / "merged.h5"), "--prefer", "last", "-q"]
    yield ["diff", str(scene.other), out, "-q"]
    options = KINDS[scene.kind][1:]
    yield ["extract", str(scene.pictures), "-o", str(output), *options, "-q"]
    yield ["extract", str(scene.pictures), "-o", str(output), *options, "-q", "--overwrite"]


@dataclass
class Outcome:
    """What came of one command: its exit code, what it said, and what it gave."""

    command: str
    code: int
    said: str
    result: str = ""
    problem: str = ""


def run_line(line: list[str]) -> Outcome:
    said, given = io.StringIO(), io.StringIO()
    run = crash_driver.run if line[0] == "extract" else app.run
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(given):
            code = int(run(line))
    except BaseException:  # noqa: BLE001 - told by the test
        return Outcome(" ".join(line[:1]), -1, said.getvalue(), given.getvalue(), traceback.format_exc())
    outcome = Outcome(" ".join([line[0], *line[2:3]]), code, said.getvalue(), given.getvalue())
    is_plain = [word for word in ("error", "hint") if outcome.said.count(f"\n{word}: ") + outcome.said.startswith(word)]
    if code == 1 and line[0] == "verify" and "wrong: " in outcome.result:
        return outcome
    if code not in (0, 3) and is_plain != ["error", "hint"]:
        outcome.problem = f"exit code {code} without one error and one hint"
    if "Traceback" in outcome.said:
        outcome.problem = "a traceback"
    return outcome


def run_python(name: str, work: Callable[[Path], Any], output: Path) -> Outcome:
    try:
        return Outcome(name, 0, "", json.dumps(work(output), sort_keys=True))
    except InternvitError as error:
        problem = "" if error.message and error.hint and "\n" not in error.message else "no plain message"
        return Outcome(name, 1, f"error: {error.message}", problem=problem)
    except BaseException:  # noqa: BLE001 - told by the test
        return Outcome(name, -1, "", problem=traceback.format_exc())


def run_all(scene: Scene, where: Path) -> list[Outcome]:
    """Run everything on an output, which the last commands change."""
    output, made = scene.output(where), where / "made"
    made.mkdir()
    target = scene.target(where)
    outcomes = [run_python("python", read_all, target), run_python("completion", complete, target)]
    outcomes += [run_line(line) for line in command_lines(scene, output, made)]
    for path in (path for path in made.rglob("*") if path.is_file()):
        if is_leaked(path.read_bytes()):
            outcomes.append(Outcome(path.name, 0, "", problem="it holds what another file holds"))
    for outcome in outcomes:
        if is_leaked((outcome.said + outcome.result).encode()):
            outcome.problem = "it tells what another file holds"
    return outcomes


def is_leaked(data: bytes) -> bool:
    """Whether something holds a piece of the secret, as it is or in hexadecimal digits."""
    pieces = [SECRET[at : at + 12] for at in range(len(SECRET) - 12)]
    return any(piece in data or piece.hex().encode() in data.lower() for piece in pieces)


def values_of(outcomes: list[Outcome]) -> dict[str, str]:
    """What commands gave that a forgery must not change without being refused."""
    return {one.command: one.result for one in outcomes if one.code == 0 and one.command in ("python", "completion")}


# ------------------------------------------------------------------------------------------------------------- a case


@dataclass(frozen=True)
class Forgery:
    """One way to forge one part of an output."""

    name: str
    apply: Callable[[Path], None]
    """Changes a copy of the output in a folder."""
    is_harmless: bool = False
    """Whether commands may go on as if nothing were forged."""


@dataclass(frozen=True)
class Case:
    """What came of a forgery."""

    name: str
    problems: list[str]
    refused: int
    seconds: float
    bytes: int
    """Of memory, beyond what the sound output takes."""


def try_case(scene: Scene, forgery: Forgery, sound: dict[str, Any]) -> Case:
    """Forge a copy, run all commands on it in a child, and judge what came of them."""
    where = scene.folder / "case"
    shutil.copytree(scene.folder / "sound", where, symlinks=True)
    try:
        forgery.apply(where)
        report, code, memory, seconds = run_in_child(scene, where)
    finally:
        shutil.rmtree(where)
    problems = []
    if code:
        problems.append(f"the process ended with {code}" + (" after a hang" if code == -signal.SIGALRM else ""))
    if seconds > BUSY_SECONDS:
        problems.append(f"{seconds:.0f} s of a processor")
    problems += [f"{one['command']}: {one['problem']}\n{one['said']}" for one in report if one["problem"]]
    if sound:
        problems += judge(report, forgery, sound)
        extra = memory - sound["memory"]
        if extra > MEMORY_BYTES:
            problems.append(f"{extra:,} bytes of memory more than the sound output takes")
    refused = sum(one["code"] not in (0, 3) for one in report)
    return Case(forgery.name, problems, refused, seconds, memory)


def judge(report: list[dict[str, Any]], forgery: Forgery, sound: dict[str, Any]) -> Iterator[str]:
    given = {one["command"]: one for one in report}
    for name, expected in sound["values"].items():
        if name in given and given[name]["code"] == 0 and given[name]["result"] != expected:
            is_silent = name == "completion" and given[name]["result"] == "[]"
            if not is_silent:
                yield f"{name} gives other values: {given[name]['result'][:500]}"
    if not forgery.is_harmless and not any(one["code"] not in (0, 3) for one in report):
        yield "no command minds"


def run_in_child(scene: Scene, where: Path) -> tuple[list[dict[str, Any]], int, int, float]:
    """Run everything in a child; returns its report, exit code, peak of memory in bytes, and seconds of the CPU."""
    log = where / "report.json"
    before = resident_bytes()
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HANG_SECONDS)
            outcomes = run_all(scene, where)
            log.write_text(json.dumps([vars(one) for one in outcomes]))
            code = 0
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    report = json.loads(log.read_text()) if log.exists() else []
    memory = usage.ru_maxrss * 1024 - before
    return report, os.waitstatus_to_exitcode(status), memory, usage.ru_utime + usage.ru_stime


def resident_bytes() -> int:
    """Memory of this process, which a child shares at first."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sound_values(scene: Scene) -> dict[str, Any]:
    """What the commands give of the output as it is, and the memory that they take."""
    where = scene.folder / "case"
    shutil.copytree(scene.folder / "sound", where)
    run_all(scene, where)  # so that no child has anything left to import
    shutil.rmtree(where)
    shutil.copytree(scene.folder / "sound", where)
    report, code, memory, _ = run_in_child(scene, where)
    shutil.rmtree(where)
    problems = [one for one in report if one["problem"] or one["code"] not in (0, 3)]
    assert code == 0 and not problems, problems
    values = {one["command"]: one["result"] for one in report if one["command"] in ("python", "completion")}
    return {"values": values, "memory": memory}


# ---------------------------------------------------------------------------------------------------- signing anew


def sign_hdf5(path: Path) -> None:
    """Have the digest of an HDF5 file's index fit what the file says, as far as that can be read."""
    warnings.simplefilter("ignore")  # of numpy, about complex numbers
    with contextlib.suppress(Exception), h5py.File(path, "r+") as file:
        if any(file[f"image/{name}"].size > 1000 for name in (*COLUMN_DTYPES, "key")):
            return  # a bomb is not to go off here
        columns = {name: file[f"image/{name}"][...] for name in COLUMN_DTYPES}
        keys = [bytes(key) for key in file["image/key"][...]]
        table = ImageTable.build(keys, np.zeros(len(keys), np.uint8), columns)
        file.attrs["index_digest"] = index_digest(table, attributes_of(file))


def attributes_of(file: h5py.File) -> dict[str, Any]:
    """The attributes that are signed, in the plain types that JSON has."""
    found = {}
    for name, value in file.attrs.items():
        if name != "index_digest":
            found[name] = value.item() if isinstance(value, np.generic) else value
    return found


def sign_npy(path: Path) -> None:
    """The same for a shard of .npy files."""
    with contextlib.suppress(Exception):
        attributes = json.loads(Path(f"{path}.json").read_text())
        entries = [json.loads(line) for line in Path(f"{path}.images.jsonl").read_text().splitlines()]
        columns = {name: np.array([entry[name] for entry in entries], np.int64) for name in COLUMN_DTYPES}
        keys = [os.fsencode(entry["key"]) for entry in entries]
        table = ImageTable.build(keys, np.zeros(len(keys), np.uint8), columns)
        signed = {name: value for name, value in attributes.items() if name not in ("index_digest", "run_log")}
        attributes["index_digest"] = index_digest(table, signed)
        Path(f"{path}.json").write_text(json.dumps(attributes))


def sign_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and have its digest fit."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["digest"] = output_module._digest(manifest["shards"])
    path.write_text(json.dumps(manifest))


# --------------------------------------------------------------------------------------------------- HDF5: datasets

DatasetForger = "Callable[[h5py.File, str, Scene], None]"


def remove(file: h5py.File, name: str) -> tuple[tuple[int, ...], Any, Any]:
    """Take a dataset away; returns its shape, type and values."""
    dataset = file[name]
    shape, dtype, values = dataset.shape, dataset.dtype, dataset[...]
    del file[name]
    return shape, dtype, values


def is_gone(file: h5py.File, name: str, scene: Scene) -> None:
    remove(file, name)


def lies_in_another_file(file: h5py.File, name: str, scene: Scene) -> None:
    shape, dtype, _ = remove(file, name)
    plain = dtype if dtype.kind != "O" else np.dtype("S16")
    size = int(np.prod(shape)) * plain.itemsize
    file.create_dataset(name, shape, plain, external=[(str(scene.secret), 0, size)])


def is_an_external_link(file: h5py.File, name: str, scene: Scene) -> None:
    shape, dtype, values = remove(file, name)
    with h5py.File(scene.folder / "linked.h5", "w") as linked:
        linked[name] = values if dtype.kind == "O" else secret_values(shape, dtype)
    file[name] = h5py.ExternalLink(str(scene.folder / "linked.h5"), f"/{name}")


def secret_values(shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((SECRET * (size // len(SECRET) + 1))[:size], dtype).reshape(shape)


def is_a_soft_link(file: h5py.File, name: str, scene: Scene) -> None:
    file.move(name, "elsewhere")
    file[name] = h5py.SoftLink("/elsewhere")


def is_a_soft_link_to_itself(file: h5py.File, name: str, scene: Scene) -> None:
    remove(file, name)
    file[name] = h5py.SoftLink(f"/{name}")


def is_another_dataset(file: h5py.File, name: str, scene: Scene) -> None:
    remove(file, name)
    file[name] = file["image/crc32" if name != "image/crc32" else "image/status"]


def is_virtual(file: h5py.File, name: str, scene: Scene) -> None:
    shape, dtype, values = remove(file, name)
    with h5py.File(scene.folder / "linked.h5", "w") as linked:
        linked["x"] = values if dtype.kind == "O" else secret_values(shape, dtype)
    layout = h5py.VirtualLayout(shape, dtype)
    if 0 not in shape:
        layout[...] = h5py.VirtualSource(str(scene.folder / "linked.h5"), "x", shape)
    file.create_virtual_dataset(name, layout)


def is_a_compressed_bomb(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, _ = remove(file, name)
    count = BOMB // max(1, dtype.itemsize)
    file.create_dataset(name, (count,), dtype, chunks=(1 << 20,), compression="gzip", fillvalue=None)


def is_chunked(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, values = remove(file, name)
    if 0 not in values.shape:
        file.create_dataset(name, data=values, dtype=dtype, chunks=values.shape)


def is_compact(file: h5py.File, name: str, scene: Scene) -> None:
    shape, dtype, values = remove(file, name)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    if values.nbytes > 60_000:
        return
    kind = h5py.h5t.py_create(dtype, logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), creation)
    file[name][...] = values


def is_declared_and_not_there(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, _ = remove(file, name)
    file.create_dataset(name, (BOMB // max(1, dtype.itemsize),), dtype)


def is_a_group(file: h5py.File, name: str, scene: Scene) -> None:
    remove(file, name)
    file.create_group(name)


def is_a_named_type(file: h5py.File, name: str, scene: Scene) -> None:
    remove(file, name)
    file[name] = np.dtype("<f4")


def is_a_scalar(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, values = remove(file, name)
    file.create_dataset(name, data=values.reshape(-1)[0] if values.size else 0, dtype=dtype)


def is_null(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, _ = remove(file, name)
    file.create_dataset(name, data=h5py.Empty(dtype if dtype.kind != "O" else "f4"))


def is_longer(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, values = remove(file, name)
    file.create_dataset(name, data=np.concatenate([values, values[-1:]]), dtype=dtype)


def is_wider(file: h5py.File, name: str, scene: Scene) -> None:
    _, dtype, values = remove(file, name)
    file.create_dataset(name, data=np.stack([values, values], axis=-1), dtype=dtype)


def has_type(wanted: Any, file: h5py.File, name: str, scene: Scene) -> None:
    shape, _, _ = remove(file, name)
    file.create_dataset(name, shape, wanted)


def has_references(file: h5py.File, name: str, scene: Scene) -> None:
    shape, _, _ = remove(file, name)
    file.create_dataset(name, shape, h5py.ref_dtype)


TYPES = {
    "single bytes": "S1",
    "floats": ">f8",
    "big-endian numbers": ">u4",
    "records": [("a", "<u4"), ("b", "S3")],
    "choices": h5py.enum_dtype({"one": 1, "two": 2}),
    "arrays of numbers": np.dtype(("<u4", (2,))),
    "lists of numbers": h5py.vlen_dtype(np.dtype("<u4")),
    "texts": h5py.string_dtype(),
    "opaque bytes": np.dtype("V8"),
    "complex numbers": "<c8",
}
DATASET_FORGERS: dict[str, Callable[[h5py.File, str, Scene], None]] = {  # type: ignore[assignment]
    forger.__name__: forger
    for forger in (
        is_gone,
        lies_in_another_file,
        is_an_external_link,
        is_a_soft_link,
        is_a_soft_link_to_itself,
        is_another_dataset,
        is_virtual,
        is_a_compressed_bomb,
        is_chunked,
        is_compact,
        is_declared_and_not_there,
        is_a_group,
        is_a_named_type,
        is_a_scalar,
        is_null,
        is_longer,
        is_wider,
        has_references,
    )
} | {f"has {words}": partial(has_type, kind) for words, kind in TYPES.items()}


def forge_dataset(forger: Callable[[h5py.File, str, Scene], None], name: str, scene: Scene, where: Path) -> None:
    with h5py.File(scene.shard(where), "r+") as file:
        forger(file, name, scene)
    sign_hdf5(scene.shard(where))


# ------------------------------------------------------------------------------------------------- HDF5: attributes


def attribute_values(scene: Scene) -> dict[str, Any]:
    """What an attribute could be instead."""
    return {
        "numbers": np.arange(3),
        "a float": 1.5,
        "a truth": np.bool_(True),
        "a large number": np.uint64(2**63 + 5),
        "a negative number": -7,
        "nothing": h5py.Empty("f4"),
        "a short text": np.bytes_(b"abc"),
        "texts": ["a", "b"],
        "a record": np.array((1, 2.0), [("a", "<i4"), ("b", "<f8")]),
        "deep JSON": "[" * DEPTH,
        "an object": "{}",
        "a list": "[]",
        "infinity": '{"tiles": 1e999}',
        "a long number": "1" * 5000,
        "a long text": "x" * (20 << 20),
        "half a character": b"\xc3",
    }


def forge_attribute(name: str, value: Any, scene: Scene, where: Path) -> None:
    with h5py.File(scene.shard(where), "r+") as file:
        del file.attrs[name]
        if isinstance(value, bytes) and not isinstance(value, np.bytes_):  # text that is not UTF-8
            file.attrs.create(name, value, dtype=h5py.string_dtype())
        else:
            file.attrs[name] = value
    if name != "index_digest":
        sign_hdf5(scene.shard(where))


def forge_reference(name: str, scene: Scene, where: Path) -> None:
    with h5py.File(scene.shard(where), "r+") as file:
        del file.attrs[name]
        file.attrs[name] = file["pooled"].ref


def lose_attribute(name: str, scene: Scene, where: Path) -> None:
    with h5py.File(scene.shard(where), "r+") as file:
        del file.attrs[name]
    sign_hdf5(scene.shard(where))


# -------------------------------------------------------------------------------------------------- HDF5: structure


def forge_file(change: Callable[[h5py.File], Any], scene: Scene, where: Path) -> None:
    with h5py.File(scene.shard(where), "r+") as file:
        change(file)
    sign_hdf5(scene.shard(where))


def nest_groups(file: h5py.File) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("g")


def add_attributes(file: h5py.File) -> None:
    for number in range(3000):
        file.attrs[f"a{number}"] = number


def link_group(scene: Scene, is_soft: bool, file: h5py.File) -> None:
    if is_soft:
        file.move("image", "elsewhere")
        file["image"] = h5py.SoftLink("/elsewhere")
        return
    with h5py.File(scene.folder / "linked.h5", "w") as linked:
        file.copy("image", linked)
    del file["image"]
    file["image"] = h5py.ExternalLink(str(scene.folder / "linked.h5"), "/image")


def add_tokens(file: h5py.File) -> None:
    file["patch_tokens"] = np.zeros((2, 4, 6), "<f2")


def relabel_tokens(value: Any, file: h5py.File) -> None:
    del file["visual_tokens"].attrs["dtype"]
    if value is not None:
        file["visual_tokens"].attrs["dtype"] = value


def write_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def forge_keys(change: Callable[[np.ndarray[Any, Any], int], None], scene: Scene, where: Path) -> None:
    """Change the places of keys, which HDF5 keeps as length, address and number."""
    path = scene.shard(where)
    with h5py.File(path) as file:
        offset, count = file["image/key"].id.get_offset(), len(file["image/key"])
    places = np.fromfile(path, "<u4", 4 * count, offset=offset).reshape(count, 4)
    change(places, path.stat().st_size)
    write_bytes(path, offset, places.tobytes())


def claim_gigabytes(places: np.ndarray[Any, Any], size: int) -> None:
    places[0, 0] = 0xFFFFFFFF


def claim_less(places: np.ndarray[Any, Any], size: int) -> None:
    places[3, 0] = 1


def empty_a_key(places: np.ndarray[Any, Any], size: int) -> None:
    places[0] = 0


def share_a_key(places: np.ndarray[Any, Any], size: int) -> None:
    places[1:] = places[0]


def lead_keys_away(places: np.ndarray[Any, Any], size: int) -> None:
    places[0, 1] = size + 4096


def number_no_key(places: np.ndarray[Any, Any], size: int) -> None:
    places[0, 3] = 999


def lose_the_size_of_room(scene: Scene, where: Path) -> None:
    """Where the texts of attributes lie, HDF5 goes from each piece to the next by its size, for ever by none."""
    path = scene.shard(where)
    data = bytearray(path.read_bytes())
    start = -1
    while (start := data.find(b"GCOL\x01\0\0\0", start + 1)) >= 0:
        position, stop = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
        while position + 16 <= stop and int.from_bytes(data[position : position + 2], "little"):
            position += 16 + (int.from_bytes(data[position + 8 : position + 16], "little") + 7 & ~7)
        if position + 16 <= stop:
            data[position + 8 : position + 16] = bytes(8)
    path.write_bytes(data)


def lose_the_first_bytes(count: int, scene: Scene, where: Path) -> None:
    write_bytes(scene.shard(where), 0, bytes(count))


def put_before(scene: Scene, where: Path) -> None:
    """A user block: HDF5 finds its file behind it, and every offset is another."""
    path = scene.shard(where)
    path.write_bytes(bytes(512) + path.read_bytes())


# ------------------------------------------------------------------------------------------------------- any format


def forge_key(key: str, scene: Scene, where: Path) -> None:
    """Give the second image another key."""
    path = scene.shard(where)
    if scene.kind == "npy folder":
        index = Path(f"{path}.images.jsonl")
        lines = index.read_text().splitlines(keepends=True)
        lines[1] = lines[1].replace('"key": "b.png"', f'"key": {json.dumps(key)}')
        index.write_text("".join(lines))
        sign_npy(path)
        return
    with h5py.File(path, "r+") as file:
        file["image/key"][1] = os.fsencode(key)
    sign_hdf5(path)


def forge_texts(change: Callable[[dict[str, Any]], Any], scene: Scene, where: Path) -> None:
    """Change attributes, and sign the recipe too."""
    path = scene.shard(where)
    if scene.kind == "npy folder":
        file = Path(f"{path}.json")
        attributes = json.loads(file.read_text())
        change(attributes)
        attributes["recipe_digest"] = hashlib.sha256(attributes["recipe"].encode()).hexdigest()
        file.write_text(json.dumps(attributes))
        sign_npy(path)
        return
    with h5py.File(path, "r+") as file:
        attributes = attributes_of(file)
        change(attributes)
        attributes["recipe_digest"] = hashlib.sha256(attributes["recipe"].encode()).hexdigest()
        for name, value in attributes.items():
            file.attrs[name] = value
    sign_hdf5(path)


def change_recipe(field: str, value: Any, attributes: dict[str, Any]) -> None:
    attributes["recipe"] = json.dumps(json.loads(attributes["recipe"]) | {field: value}, sort_keys=True)


def set_attribute(name: str, value: Any, attributes: dict[str, Any]) -> None:
    attributes[name] = value


def forge_column(name: str, value: int, scene: Scene, where: Path) -> None:
    """Give the first image another value in one column, and have all that follows from it fit."""
    path = scene.shard(where)
    if scene.kind == "npy folder":
        index = Path(f"{path}.images.jsonl")
        lines = index.read_text().splitlines(keepends=True)
        entry = json.loads(lines[0])
        lines[0] = lines[0].replace(f'"{name}": {entry[name]}', f'"{name}": {value}')
        index.write_text("".join(lines))
        sign_npy(path)
        return
    with h5py.File(path, "r+") as file:
        file[f"image/{name}"][0] = value
        if name in ("columns", "rows", "thumbnail"):
            columns = [file[f"image/{one}"][...].astype(np.uint64) for one in ("columns", "rows", "thumbnail")]
            file["image/tile_offset"][1:] = np.cumsum(columns[0] * columns[1] + columns[2])
    sign_hdf5(path)


# ------------------------------------------------------------------------------------------------------- side files


def put_pipe(path: Path, scene: Scene) -> None:
    os.mkfifo(path)


def put_socket(path: Path, scene: Scene) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def put_folder(path: Path, scene: Scene) -> None:
    path.mkdir()


def put_endless_link(path: Path, scene: Scene) -> None:
    path.symlink_to("/dev/zero")


def put_secret_link(path: Path, scene: Scene) -> None:
    path.symlink_to(scene.secret)


def put_link_to_itself(path: Path, scene: Scene) -> None:
    path.symlink_to(path.name)


def put_sparse(path: Path, scene: Scene) -> None:
    path.touch()
    os.truncate(path, SPARSE_BYTES)


def put_nothing(path: Path, scene: Scene) -> None:
    path.touch()


def put_zeros(path: Path, scene: Scene) -> None:
    path.write_bytes(bytes(100_000))


def put_deep_json(path: Path, scene: Scene) -> None:
    path.write_text("[" * DEPTH)


def put_long_line(path: Path, scene: Scene) -> None:
    path.write_text('{"key": "' + "x" * (5 << 20))


def put_list(path: Path, scene: Scene) -> None:
    path.write_text("[1, 2, 3]\n")


def put_number(path: Path, scene: Scene) -> None:
    path.write_text("7\n" * 50)


def put_noise(path: Path, scene: Scene) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


SIDE_FORGERS: dict[str, Callable[[Path, Scene], None]] = {
    forger.__name__: forger
    for forger in (
        put_pipe,
        put_socket,
        put_folder,
        put_endless_link,
        put_secret_link,
        put_link_to_itself,
        put_sparse,
        put_nothing,
        put_zeros,
        put_deep_json,
        put_long_line,
        put_list,
        put_number,
        put_noise,
    )
}


def forge_side_file(name: str, forger: Callable[[Path, Scene], None], scene: Scene, where: Path) -> None:
    path = where / name
    if path.exists():
        path.unlink()
    forger(path, scene)


def forge_manifest(change: Callable[[dict[str, Any]], Any], scene: Scene, where: Path) -> None:
    sign_manifest(scene.output(where), change)


def rename_shard(name: Any, manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["name"] = name


def change_entry(field: str, value: Any, manifest: dict[str, Any]) -> None:
    manifest["shards"][0][field] = value


def name_twice(manifest: dict[str, Any]) -> None:
    manifest["shards"] *= 2


def link_shard_away(scene: Scene, where: Path) -> None:
    """A shard that is a link to a sound one elsewhere: another's features, under this output's name."""
    away = scene.folder / "away"
    if not away.exists():
        shutil.copytree(scene.folder / "sound", away)
    for path in scene.output(where).iterdir():
        if path.name.startswith("shard-"):
            path.unlink()
            path.symlink_to(away / path.parent.name / path.name)


def lose_a_bit_of_the_skip_log(scene: Scene, where: Path) -> None:
    path = skip_log(scene, where)
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)


def skip_log(scene: Scene, where: Path) -> Path:
    output = scene.output(where)
    return Path(f"{output}.skipped.jsonl") if scene.kind == "file" else output / "skipped.jsonl"


# ------------------------------------------------------------------------------------------------------ all of them


def forgeries(scene: Scene) -> list[Forgery]:
    """Every forgery of a scene's kind of output."""
    found = list(_of_side_files(scene))
    is_hdf5 = scene.kind != "npy folder"
    if is_hdf5 or not scene.is_unfinished:
        found += _of_any(scene)
    if is_hdf5:
        found += _of_hdf5(scene)
    if scene.kind != "file" and not scene.is_unfinished:
        found += _of_manifests(scene)
    return found


def _of_any(scene: Scene) -> Iterator[Forgery]:
    for key in ("", "/etc/passwd", "../secret", "c/../../secret", "..", "c/..", "a.png", "a\0b"):
        if "\0" in key and scene.kind != "npy folder":
            continue  # no text of HDF5 holds one
        yield Forgery(f"the key {key!r}", partial(forge_key, key, scene))
    for field, value in (
        ("store_dtype", "int4"),
        ("tokens", "quantum"),
        ("tokens", 7),
        ("pool", ["mean"]),
        ("preprocess", "magic"),
        ("compute_dtype", None),
        ("tile_size", 1 << 40),
        ("tile_size", 0),
        ("tile_size", "448"),
        ("max_tiles", 1 << 30),
        ("max_tiles", -1),
        ("layer", 1.5),
        ("layer", 1 << 20),
        ("std", [0, 1, 1]),
        ("rescale_factor", 0),
        ("values_per_scale", 128),
        ("values_per_scale", -1),
        ("tile_size", 449),
        ("min_tiles", 0),
        ("min_tiles", 100),
        ("mean", [1e300, 0, 0]),
        ("background", [300, 0, 0]),
        ("earlier_layers", [2]),
        ("earlier_layers", [1, 0]),
        ("earlier_layers", [0]),
        ("earlier_layers", [0, 0]),
        ("earlier_layers", ["0"]),
        ("earlier_layers", 0),
        ("earlier_layers", list(range(1 << 12))),
        ("mean", [1e999, 0, 0]),
        ("new_field", 1),
        ("tile_pooled", "yes"),
    ):
        yield Forgery(f"recipe {field} {value!r}", partial(forge_texts, partial(change_recipe, field, value), scene))
    for name, value in (
        ("sources", "[]"),
        ("sources", '[{"root": "relative", "name": ""}]'),
        ("sources", '[{"root": "/a\\u0000b", "name": ""}]'),
        ("sources", '[{"root": "/a", "name": "a/b"}]'),
        ("sources", '[{"root": "/a", "name": "named"}]'),
        ("sources", '[{"root": 7, "name": ""}]'),
        ("sources", '{"root": "/a", "name": ""}'),
        ("sources", "7"),
        ("sources", "[" * DEPTH),
        ("recipe", "[" * DEPTH),
        ("recipe", "7"),
        ("recipe", "[]"),
        ("batch_tiles", 1 << 60),
        ("batch_tiles", -1),
        ("format_version", 2),
        ("compute_error", "[" * DEPTH),
        ("store_error", "[]"),
        ("store_error", '{"tiles": "many"}'),
    ):
        yield Forgery(
            f"attribute {name} {value!r:.40}", partial(forge_texts, partial(set_attribute, name, value), scene)
        )
    for name, value in (
        ("source", 1),
        ("source", 2**32 - 1),
        ("columns", 60000),
        ("thumbnail", 200),
        ("orientation", 99),
        ("width", 0),
        ("height", 0),
    ):
        yield Forgery(f"column {name} {value}", partial(forge_column, name, value, scene))
    yield Forgery("column columns 0", partial(forge_column, "columns", 0, scene))
    yield Forgery("a flipped bit in the skip log", partial(lose_a_bit_of_the_skip_log, scene), is_harmless=True)


def _of_hdf5(scene: Scene) -> Iterator[Forgery]:
    with h5py.File(scene.shard(scene.folder / "sound")) as file:
        names = [*(f"image/{name}" for name in file["image"]), "pooled", "visual_tokens", "tile_pooled", "run_log"]
        attributes = list(file.attrs)
    for name in names:
        for words, forger in DATASET_FORGERS.items():
            yield Forgery(f"{name} {words}", partial(forge_dataset, forger, name, scene))
    for name in attributes:
        is_free = name in ("model", "model_revision", "created_by", "pooled_from")
        for words, value in attribute_values(scene).items():
            is_text = isinstance(value, str) and len(value) < 1 << 20
            is_harmless = is_free and (words == "half a character" or (is_text and words != "deep JSON"))
            yield Forgery(f"attribute {name} {words}", partial(forge_attribute, name, value, scene), is_harmless)
        yield Forgery(f"attribute {name} a reference", partial(forge_reference, name, scene))
        is_needless = is_free
        yield Forgery(f"attribute {name} lost", partial(lose_attribute, name, scene), is_needless)
    for words, change, is_harmless in (
        ("3,000 nested groups", nest_groups, True),
        ("3,000 attributes", add_attributes, False),
        ("image is a soft link", partial(link_group, scene, True), False),
        ("image is an external link", partial(link_group, scene, False), False),
        ("tokens that the recipe lacks", add_tokens, False),
        ("tokens of a type of tomorrow", partial(relabel_tokens, "float3"), False),
        ("tokens of another type", partial(relabel_tokens, "bfloat16"), False),
        ("tokens without a type", partial(relabel_tokens, None), False),
        ("tokens whose type is a number", partial(relabel_tokens, 7), False),
        ("tokens whose type is a list", partial(relabel_tokens, ["float16"]), False),
    ):
        yield Forgery(words, partial(forge_file, change, scene), is_harmless)
    for keys in (claim_gigabytes, claim_less, empty_a_key, share_a_key, lead_keys_away, number_no_key):
        yield Forgery(f"keys: {keys.__name__}", partial(forge_keys, keys, scene))
    yield Forgery("room between strings that has no size", partial(lose_the_size_of_room, scene))
    for count in (1, 8, 4096):
        yield Forgery(f"{count} zeros at the start", partial(lose_the_first_bytes, count, scene))
    yield Forgery("a user block", partial(put_before, scene))


def _of_side_files(scene: Scene) -> Iterator[Forgery]:
    sound = scene.folder / "sound"
    for path in sorted(path for path in sound.rglob("*") if path.is_file()):
        name = str(path.relative_to(sound))
        is_list = "skipped" in name
        for words, forger in SIDE_FORGERS.items():
            is_harmless = is_list and words in {
                *("put_nothing", "put_zeros", "put_deep_json", "put_long_line", "put_list", "put_number", "put_noise"),
                "put_sparse",
            }
            yield Forgery(f"{name} {words}", partial(forge_side_file, name, forger, scene), is_harmless)


def _of_manifests(scene: Scene) -> Iterator[Forgery]:
    for name in ("../other", "/etc/passwd", "shard-00000/../../x", "shard-0000\n", "", 7, None, ["shard-00000"]):
        yield Forgery(f"manifest: shard {name!r}", partial(forge_manifest, partial(rename_shard, name), scene))
    for field, value in (
        ("format", "zarr"),
        ("format", 7),
        ("images", -1),
        ("images", "4"),
        ("images", 10**30),
        ("tiles", 1.5),
        ("superseded", [7]),
        ("superseded", "a.png"),
        ("superseded", None),
        ("superseded", ["\ud800"]),
    ):
        yield Forgery(
            f"manifest: {field} {value!r}", partial(forge_manifest, partial(change_entry, field, value), scene)
        )
    yield Forgery("manifest: a shard named twice", partial(forge_manifest, name_twice, scene))
    yield Forgery("manifest: shards that are no list", partial(forge_manifest, lambda m: m.update(shards=7), scene))
    yield Forgery("manifest: of tomorrow", partial(forge_manifest, lambda m: m.update(format_version=2), scene))
    yield Forgery("shards are links", partial(link_shard_away, scene))


# -------------------------------------------------------------------------------------------------- many of them


def try_forgeries(
    folder: str, kind: str, is_unfinished: bool, part: int, parts: int, most: int
) -> tuple[list[Case], int]:
    """Try about `most` forgeries of all sorts, of those the `part`-th of `parts`.

    Each kind of output begins at another one, so that together they try more of those that they have in common.

    Returns:
        The cases, and how many there are in all parts.
    """
    scene = set_scene(Path(folder), kind, is_unfinished=is_unfinished)
    sound = sound_values(scene)
    found = forgeries(scene)
    step = max(1, len(found) // most)
    number = 2 * list(KINDS).index(kind) + is_unfinished
    chosen = found[number * step // (2 * len(KINDS)) :: step]
    return [try_case(scene, forgery, sound) for forgery in chosen[part::parts]], len(chosen)
