"""Weights of any published layout under one set of names: found, checked, digested, read. No torch, no pickle.

The names and shapes are those of the standalone InternViT (FACTS 2a). A full InternVL chat checkpoint prefixes them
with `vision_model.`; transformers' own layout renames them and splits qkv into three, whose rows are simply joined.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model.catalog import OFFLINE_HINT, read_json
from internvit_cli.model.hub import fetch
from internvit_cli.model.safetensors_header import StoredTensor, read_header
from internvit_cli.model.tiny import tiny_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from internvit_cli.model.card import ModelCard, VisionConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_BYTES = 8 << 20

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""The types a weight may have; anything else is a quantised checkpoint, which nothing here can undo."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.", "")
_PROJECTOR_PREFIXES = ("mlp1.", "multi_modal_projector.", "model.multi_modal_projector.")

_NATIVE_RULES = (
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qk]_norm)\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layer_norm\.", "mlp1.0."),
    (r"^linear_1\.", "mlp1.1."),
    (r"^linear_2\.", "mlp1.3."),
)
_PROJECTION = re.compile(r"\.attention\.([qkv])_proj\.")
_UNUSED = {"embeddings.mask_token"}  # transformers' layout may carry it; only masked training reads it


def expected_shapes(vision: VisionConfig, blocks: int, projector_size: int | None) -> dict[str, tuple[int, ...]]:
    """Standalone names and shapes of the tensors that a run uses.

    Args:
        vision: the tower's shape.
        blocks: how many blocks run.
        projector_size: size of a projected token when the projector is used, else None.
    """
    hidden = vision.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, hidden),
        "embeddings.position_embedding": (1, 1 + vision.grid**2, hidden),
        "embeddings.patch_embedding.weight": (hidden, 3, vision.patch_size, vision.patch_size),
        "embeddings.patch_embedding.bias": (hidden,),
    }
    for block in range(blocks):
        shapes |= {f"encoder.layers.{block}.{name}": shape for name, shape in _block_shapes(vision).items()}
    if projector_size is not None:
        shapes |= {
            "mlp1.0.weight": (4 * hidden,),
            "mlp1.0.bias": (4 * hidden,),
            "mlp1.1.weight": (projector_size, 4 * hidden),
            "mlp1.1.bias": (projector_size,),
            "mlp1.3.weight": (projector_size, projector_size),
            "mlp1.3.bias": (projector_size,),
        }
    return shapes


def _block_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    hidden, mlp = vision.hidden_size, vision.mlp_size
    shapes: dict[str, tuple[int, ...]] = {
        "ls1": (hidden,),
        "ls2": (hidden,),
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.fc1.weight": (mlp, hidden),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (hidden, mlp),
        "mlp.fc2.bias": (hidden,),
    }
    if vision.norm == "layer_norm":
        shapes |= {"norm1.bias": (hidden,), "norm2.bias": (hidden,)}
    if vision.qkv_bias:
        shapes["attn.qkv.bias"] = (3 * hidden,)
    if vision.qk_norm:
        shapes |= {"attn.q_norm.weight": (hidden,), "attn.k_norm.weight": (hidden,)}
    return shapes


def standalone_name(name: str) -> tuple[str, int | None]:
    """The standalone name of a tensor, without any prefix, and which third of qkv it is (None: the whole tensor)."""
    for pattern, replacement in _NATIVE_RULES:
        name = re.sub(pattern, replacement, name)
    match = _PROJECTION.search(name)
    if match is None:
        return name, None
    return _PROJECTION.sub(".attn.qkv.", name), "qkv".index(match.group(1))


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor under its standalone name: its parts' bytes, one after another, are its own."""

    dtype: str
    """In the words of safetensors: F32, BF16, F16 or F64."""
    shape: tuple[int, ...]
    parts: tuple[StoredTensor | np.ndarray, ...]
    """In files, or for tiny-random in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * FLOAT_BYTES[self.dtype]


class Checkpoint:
    """The tensors that a run uses, located and checked; nothing is read until asked for.

    Open one with `Checkpoint.open`.
    """

    def __init__(self, card: ModelCard, blocks: int, weights: Mapping[str, Weight]) -> None:
        self.card = card
        self.blocks = blocks
        """How many blocks run."""
        self.weights = weights
        """By standalone name."""

    @classmethod
    def open(cls, card: ModelCard, *, layer: int, projector: bool = False) -> Checkpoint:
        """Locate (on the hub: fetch) the tensors of a run and check their names, types and shapes.

        Args:
            card: the model.
            layer: how many blocks run, from `ModelCard.resolve_layer`.
            projector: True when projected tokens are wanted.

        Raises:
            ModelError: no weights, or a missing, extra, misshapen or broken tensor, named in the message.
            UsageError: a projector is wanted of a model that has none.
        """
        if projector and card.projector_size is None:
            raise UsageError(f"--tokens projected: {card.name} has no projector", "use --tokens visual")
        shapes = expected_shapes(card.vision, layer, card.projector_size if projector else None)
        if card.origin == "memory":
            arrays = tiny_weights(expected_shapes(card.vision, card.vision.num_layers, None))
            weights = {name: Weight("F32", shapes[name], (arrays[name],)) for name in shapes}
            return cls(card, layer, weights)
        directory, locate = _locator(card)
        index_path = locate(INDEX_FILE)
        names = _index(index_path) if index_path else None
        if names is None:
            path = locate(SINGLE_FILE)
            if path is None:
                raise _no_weights(card, directory)
            stored = read_header(path)
            wanted = _assign(stored, card, shapes)
        else:
            wanted = _assign(names, card, shapes)
            stored = _read_shards(names, wanted, locate)
        return cls(card, layer, {name: _weight(name, shapes[name], wanted[name], stored) for name in shapes})

    def digest(self) -> str:
        """SHA-256 over the sorted names, types, shapes and bytes of the tensors used: equal across layouts.

        Raises:
            ModelError: a file can't be read.
        """
        sha = hashlib.sha256()
        buffer = np.empty(READ_BYTES, np.uint8)
        for name in sorted(self.weights):
            weight = self.weights[name]
            sha.update(f"{name}\0{weight.dtype}\0{','.join(map(str, weight.shape))}\0".encode())
            for part in weight.parts:
                for piece in _pieces(part, buffer):
                    sha.update(piece)
        return sha.hexdigest()

    def read(self, name: str) -> np.ndarray:
        """The bytes of one tensor, a fresh writable uint8 array [nbytes] that belongs to the caller.

        Raises:
            ModelError: the file can't be read.
        """
        weight = self.weights[name]
        data = np.empty(weight.nbytes, np.uint8)
        begin = 0
        for part in weight.parts:
            size = part.nbytes if isinstance(part, np.ndarray) else part.end - part.begin
            _read_into(part, data[begin : begin + size])
            begin += size
        return data


def _locator(card: ModelCard) -> tuple[str | None, Callable[[str], str | None]]:
    """A function from a file's name to its path, None when the checkpoint has no such file."""
    if card.origin == "directory" and card.directory is not None:
        directory = card.directory

        def in_directory(filename: str) -> str | None:
            path = os.path.join(directory, filename)
            return path if os.path.exists(path) else None

        return directory, in_directory
    if card.origin == "hub" and card.revision is not None:
        revision = card.revision
        return None, lambda filename: fetch(card.name, revision, filename)
    raise ModelError(f"{card.name}: its weights can't be had from here", OFFLINE_HINT)


def _no_weights(card: ModelCard, directory: str | None) -> ModelError:
    pickles = [] if directory is None else sorted(name for name in os.listdir(directory) if name.endswith(_PICKLES))
    if pickles:
        return ModelError(
            f"{card.name}: only pickle weights ({pickles[0]}), which can run code when they are opened",
            "convert them to safetensors (safetensors.torch.save_file) and pass that directory",
        )
    return ModelError(f"{card.name}: there is no {SINGLE_FILE} and no {INDEX_FILE}", OFFLINE_HINT)


def _index(path: str) -> dict[str, str]:
    """Which shard holds which tensor, from the index file."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{path}: weight_map is missing")
    for name, shard in names.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{path}: tensor {name!r} is said to be in {shard!r}, which is no shard beside the index")
    return names


def _read_shards(
    names: Mapping[str, str], wanted: Mapping[str, Iterable[str]], locate: Callable[[str], str | None]
) -> dict[str, StoredTensor]:
    """The stored tensors of those shards, and only those, that hold something wanted."""
    needed = {names[stored_name] for stored_names in wanted.values() for stored_name in stored_names}
    found: dict[str, StoredTensor] = {}
    for shard in sorted(needed):
        path = locate(shard)
        if path is None:
            raise ModelError(f"{shard}: the index names this shard, but it is not there", "download the model again")
        header = read_header(path)
        found |= {name: header[name] for name in header if names.get(name) == shard}
    return found


def _assign(
    stored_names: Iterable[str], card: ModelCard, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """For each wanted standalone name the stored names of its parts, in order."""
    slots = _slots(stored_names, card)
    known = expected_shapes(card.vision, card.vision.num_layers, card.projector_size)
    for (name, _), stored_name in slots.items():
        if name not in known and name not in _UNUSED and not name.startswith("mlp1."):
            raise ModelError(
                f"{card.name}: unexpected tensor {stored_name!r}", "its config.json does not describe these weights"
            )
    return {name: _parts(name, slots, card) for name in shapes}


def _slots(stored_names: Iterable[str], card: ModelCard) -> dict[tuple[str, int | None], str]:
    """Stored names of the tower and the projector by standalone name and third of qkv."""
    stored_names = list(stored_names)
    prefix = _tower_prefix(stored_names, card)
    slots: dict[tuple[str, int | None], str] = {}
    for stored_name in stored_names:
        bare = _without_prefix(stored_name, prefix)
        if bare is None:
            continue
        slot = standalone_name(bare)
        if slot in slots:
            raise ModelError(f"{card.name}: tensors {slots[slot]!r} and {stored_name!r} are the same one")
        slots[slot] = stored_name
    return slots


def _tower_prefix(stored_names: list[str], card: ModelCard) -> str:
    if any(name.startswith(("vision_model.base_model.", "base_model.")) for name in stored_names):
        raise ModelError(
            f"{card.name}: the tower's weights are wrapped in adapters",
            "merge them into the model first (peft's merge_and_unload)",
        )
    found = [
        prefix for prefix in _TOWER_PREFIXES if any(name.startswith(f"{prefix}embeddings.") for name in stored_names)
    ]
    if not found:
        raise ModelError(
            f"{card.name}: no vision tower among its {len(stored_names)} tensors",
            "name an InternViT or a full InternVL checkpoint",
        )
    if len(found) > 1:
        raise ModelError(f"{card.name}: two vision towers, under {found[0]!r} and {found[1]!r}")
    return found[0]


def _without_prefix(stored_name: str, tower_prefix: str) -> str | None:
    """The name within tower or projector; None for a tensor of neither, such as the language model's."""
    for prefix in _PROJECTOR_PREFIXES:
        if stored_name.startswith(prefix):
            return stored_name if prefix == "mlp1." else stored_name.removeprefix(prefix)
    return stored_name.removeprefix(tower_prefix) if stored_name.startswith(tower_prefix) else None


def _parts(name: str, slots: Mapping[tuple[str, int | None], str], card: ModelCard) -> tuple[str, ...]:
    whole = slots.get((name, None))
    thirds = [slots.get((name, third)) for third in range(3)]
    if whole is not None and not any(thirds):
        return (whole,)
    if whole is None and all(thirds):
        return tuple(third for third in thirds if third is not None)
    if whole is not None:
        raise ModelError(f"{card.name}: tensor {name!r} is there both whole and in parts")
    raise ModelError(f"{card.name}: tensor {name!r} is missing", "the checkpoint is not complete: download it again")


def _weight(
    name: str, shape: tuple[int, ...], stored_names: tuple[str, ...], stored: Mapping[str, StoredTensor]
) -> Weight:
    parts = []
    for stored_name in stored_names:
        tensor = stored.get(stored_name)
        if tensor is None:
            raise ModelError(f"tensor {stored_name!r} is not in the shard that the index names", "download it again")
        if tensor.dtype not in FLOAT_BYTES:
            raise ModelError(
                f"{tensor.path}: tensor {stored_name!r} is {tensor.dtype}; quantised checkpoints are not supported",
                "use the original weights (bfloat16, float16 or float32)",
            )
        wanted = (shape[0] // len(stored_names), *shape[1:])
        if tensor.shape != wanted:
            raise ModelError(f"{tensor.path}: tensor {stored_name!r} has shape {tensor.shape}, not {wanted}")
        parts.append(tensor)
    if len({part.dtype for part in parts}) > 1:
        raise ModelError(f"{parts[0].path}: the parts of {name!r} differ in type")
    return Weight(parts[0].dtype, shape, tuple(parts))


def _pieces(part: StoredTensor | np.ndarray, buffer: np.ndarray) -> Iterator[memoryview]:
    """The bytes of a part, a buffer's worth at a time; each piece is valid until the next."""
    if isinstance(part, np.ndarray):
        yield part.reshape(-1).view(np.uint8).data
        return
    with _opened(part.path) as file:
        for begin in range(part.begin, part.end, len(buffer)):
            piece = buffer[: min(len(buffer), part.end - begin)]
            _fill(file, begin, piece)
            yield piece.data


def _read_into(part: StoredTensor | np.ndarray, target: np.ndarray) -> None:
    if isinstance(part, np.ndarray):
        target[:] = part.reshape(-1).view(np.uint8)
        return
    with _opened(part.path) as file:
        _fill(file, part.begin, target)


def _opened(path: str) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def _fill(file: io.FileIO, offset: int, target: np.ndarray) -> None:
    """Read exactly the target's bytes; one read returns at most 2 GiB, and fewer when the file has shrunk."""
    done = 0
    try:
        file.seek(offset)
        while done < len(target):
            count = file.readinto(target[done:].data)
            if not count:
                raise ModelError(
                    f"{file.name}: became shorter while it was read", "run again when nothing writes to it"
                )
            done += count
    except OSError as error:
        raise ModelError(f"{file.name}: {error.strerror or error}") from error
