"""Locate, check, hash and read the weights of any published layout under one set of names, without torch or pickle."""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model.files import files_of
from internvit_cli.model.json_files import unreadable_error
from internvit_cli.model.kinds import (
    ORIGINAL_HINT,
    no_tower_error,
    other_tower_error,
    refuse_altered,
    refuse_first_internvl,
)
from internvit_cli.model.layouts import (
    FINAL_NORMS,
    PROJECTOR,
    UNUSED,
    choose_tower,
    expected_shapes,
    find_projector,
    find_towers,
)
from internvit_cli.model.tiny import tiny_weights
from internvit_cli.model.weights import choose_weights, read_stored
from internvit_cli.runtime.background import CancelledError
from internvit_cli.runtime.observer import BYTES, SILENT, Observer
from internvit_cli.runtime.untrusted import opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import BinaryIO

    from internvit_cli.model.card import ModelCard
    from internvit_cli.model.layouts import Tower
    from internvit_cli.model.safetensors_header import StoredTensor

READ_BYTES = 8 << 20

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""The types that a weight may have; other types mean a quantized checkpoint, which is not supported."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor under its standalone name; its bytes are those of its parts, one after the other."""

    dtype: str
    """The safetensors name of the type: F32, BF16, F16 or F64."""
    shape: tuple[int, ...]
    parts: tuple[StoredTensor | np.ndarray, ...]
    """The parts, in files or, for tiny-random, in memory."""

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * FLOAT_BYTES[self.dtype]


class TensorSet:
    """Tensors that were located and checked; they are read on demand."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        """The tensors by standalone name."""

    def digest(self, observer: Observer = SILENT, is_cancelled: Callable[[], bool] = lambda: False) -> str:
        """Return the SHA-256 of the names, types, shapes and bytes of the tensors in use, equal for all layouts.

        Args:
            observer: Receives progress.
            is_cancelled: Asked before every 8 MiB whether to end.

        Raises:
            CancelledError: It was asked to end.
            ModelError: A file cannot be read.
        """
        sha = hashlib.sha256()
        for _, piece in self._hashed(observer, is_cancelled):
            sha.update(piece)
        return sha.hexdigest()

    def tensor_digests(self, observer: Observer = SILENT) -> dict[str, str]:
        """Return the SHA-256 of every tensor in use by standalone name: of its name, type, shape and bytes.

        Raises:
            ModelError: A file cannot be read.
        """
        shas = {name: hashlib.sha256() for name in self.weights}
        for name, piece in self._hashed(observer):
            shas[name].update(piece)
        return {name: sha.hexdigest() for name, sha in shas.items()}

    def _hashed(
        self, observer: Observer, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, bytes | memoryview]]:
        """Yield what is hashed of each tensor, by name in alphabetical order; a piece is valid until the next one."""
        buffer = np.empty(READ_BYTES, np.uint8)
        total = sum(weight.nbytes for weight in self.weights.values())
        done = 0
        with observer.phase("hashing the weights", BYTES, total) as phase:
            for name in sorted(self.weights):
                weight = self.weights[name]
                yield name, f"{name}\0{weight.dtype}\0{','.join(map(str, weight.shape))}\0".encode()
                for part in weight.parts:
                    for piece in _pieces(part, buffer):
                        if is_cancelled():
                            raise CancelledError
                        yield name, piece
                        done += len(piece)
                        phase.at(done)

    def read(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor as a new writable uint8 array [nbytes].

        Raises:
            ModelError: The file cannot be read.
        """
        weight = self.weights[name]
        data = np.empty(weight.nbytes, np.uint8)
        begin = 0
        for part in weight.parts:
            size = part.nbytes if isinstance(part, np.ndarray) else part.end - part.begin
            _read_into(part, data[begin : begin + size])
            begin += size
        return data


class Checkpoint(TensorSet):
    """The tensors that a run uses.

    Use `Checkpoint.open` to create one.
    """

    def __init__(
        self, card: ModelCard, blocks: int, weights: Mapping[str, Weight], notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(weights)
        self.card = card
        self.blocks = blocks
        """The number of blocks that run."""
        self.notes = notes
        """Notes for the user on how the weights were found."""

    @classmethod
    def open(cls, card: ModelCard, *, layer: int, projector: bool = False, observer: Observer = SILENT) -> Checkpoint:
        """Locate the tensors of a run, fetch them from the hub if needed, and check their names, types and shapes.

        Args:
            card: The model.
            layer: The number of blocks that run, from `ModelCard.resolve_layer`.
            projector: Whether projected tokens are needed.
            observer: Receives the progress of downloads.

        Raises:
            ModelError: There are no weights, or the message names a tensor that is missing, unexpected, misshapen or
                broken.
            UsageError: The model has no projector, but one is needed.
        """
        if projector and card.projector_size is None:
            raise UsageError(f"--tokens projected: {card.name} has no projector", "use --tokens visual")
        shapes = expected_shapes(card.vision, layer, card.projector_size if projector else None)
        if card.origin == "memory":
            arrays = tiny_weights(expected_shapes(card.vision, card.vision.num_layers, None))
            weights = {name: Weight("F32", shapes[name], (arrays[name],)) for name in shapes}
            return cls(card, layer, weights)
        files = files_of(card, observer)
        chosen = choose_weights(files, card.weights_file)
        wanted = _locate(list(chosen.tensors), card, shapes)
        stored = read_stored(files, chosen, [part for parts in wanted.values() for part in parts])
        weights = {name: weight_of(name, shapes[name], wanted[name], stored) for name in shapes}
        return cls(card, layer, weights, (chosen.note,) if chosen.note else ())


def _locate(
    stored_names: list[str], card: ModelCard, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return the stored names of the parts of each standalone name, in order."""
    refuse_first_internvl(stored_names, card.name)
    towers = find_towers(stored_names, card.name)
    if not towers:
        raise no_tower_error(stored_names, card.name)
    known = expected_shapes(card.vision, card.vision.num_layers, None)
    tower = choose_tower(towers, known, [name for name in shapes if not name.startswith(PROJECTOR)], card.name)
    _refuse_others(tower, known, card.name)
    projector = find_projector(stored_names, card.name) if PROJECTOR + "1.weight" in shapes else None
    found = {}
    for name in shapes:
        place = projector if projector is not None and name.startswith(PROJECTOR) else tower
        if not place.has(name):
            raise _missing(name, tower, card.name)
        found[name] = place.parts(name, card.name)
    return found


def _refuse_others(tower: Tower, known: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a tower with tensors that the config does not describe."""
    refuse_altered(tower.slots.values(), where)
    for (name, _), stored_name in tower.slots.items():
        if name in known or name in UNUSED:
            continue
        if other := other_tower_error([stored_name], where):
            raise other
        why = ": a norm after the last block, which no InternViT has" if name in FINAL_NORMS else ""
        raise ModelError(
            f"{where}: unexpected tensor {stored_name!r}{why}", "its config.json does not describe these weights"
        )


def _missing(name: str, tower: Tower, where: str) -> ModelError:
    if name.startswith(PROJECTOR):
        return ModelError(
            f"{where}: tensor {name!r} is missing: its projector is not InternVL's", "use --tokens visual"
        )
    return ModelError(
        f"{where}: tensor {tower.prefix + name!r} is missing",
        "the checkpoint is not complete: download it again",
    )


def weight_of(
    name: str, shape: tuple[int, ...], stored_names: tuple[str, ...], stored: Mapping[str, StoredTensor]
) -> Weight:
    """Return a tensor that consists of stored ones.

    Args:
        name: Its standalone name.
        shape: The shape that it must have.
        stored_names: The stored names of its parts, in order.
        stored: All stored tensors by name.

    Raises:
        ModelError: A part is missing, or has another type or shape than it must have.
    """
    parts = []
    for stored_name in stored_names:
        tensor = stored.get(stored_name)
        if tensor is None:
            raise ModelError(f"tensor {stored_name!r} is not in the shard that the index names", "download it again")
        if tensor.dtype not in FLOAT_BYTES:
            raise ModelError(
                f"{tensor.path}: tensor {stored_name!r} is {tensor.dtype}: quantized weights are not supported",
                ORIGINAL_HINT,
            )
        wanted = (shape[0] // len(stored_names), *shape[1:])
        if tensor.shape != wanted:
            raise ModelError(f"{tensor.path}: tensor {stored_name!r} has shape {tensor.shape}, not {wanted}")
        parts.append(tensor)
    if len({part.dtype for part in parts}) > 1:
        raise ModelError(f"{parts[0].path}: the parts of {name!r} differ in type")
    return Weight(parts[0].dtype, shape, tuple(parts))


def _pieces(part: StoredTensor | np.ndarray, buffer: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of a part in pieces of the buffer's size; each piece is valid until the next one."""
    if isinstance(part, np.ndarray):
        yield part.reshape(-1).view(np.uint8).data
        return
    with _opened(part.path) as file:
        for begin in range(part.begin, part.end, len(buffer)):
            piece = buffer[: min(len(buffer), part.end - begin)]
            _fill(file, part.path, begin, piece)
            yield piece.data


def _read_into(part: StoredTensor | np.ndarray, target: np.ndarray) -> None:
    if isinstance(part, np.ndarray):
        target[:] = part.reshape(-1).view(np.uint8)
        return
    with _opened(part.path) as file:
        _fill(file, part.path, part.begin, target)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with opened(path) as file:
            yield file
    except OSError as error:
        raise unreadable_error(path, error) from error


def _fill(file: BinaryIO, path: str, offset: int, target: np.ndarray) -> None:
    """Fill the target from a file; a single read returns at most 2 GiB, and less if the file has shrunk."""
    done = 0
    file.seek(offset)
    while done < len(target):
        count = file.readinto(target[done:].data)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{path}: became shorter while it was read", "run again once nothing writes to it")
        done += count
