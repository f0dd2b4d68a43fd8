"""Open a projector without its tower: that of a chat model, or one that a user trained and saved alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.errors import ModelError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import TensorSet, weight_of
from internvit_cli.model.files import WEIGHTS_SUFFIX, files_of
from internvit_cli.model.layouts import PROJECTOR, find_projector, find_towers, projector_shapes
from internvit_cli.model.safetensors_header import read_safetensors_header
from internvit_cli.model.weights import choose_weights, read_stored
from internvit_cli.runtime.observer import SILENT, Observer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.model.card import ModelCard
    from internvit_cli.model.layouts import Tower
    from internvit_cli.model.safetensors_header import StoredTensor

MODULES = ("mlp1", "multi_modal_projector")
"""The names of the projector's module in the layouts of chat models."""
WIDE = f"{PROJECTOR}1.weight"
"""The tensor whose shape has both sizes."""
ORIGINAL = "name a chat model of the InternVL family, or a projector that was trained for one"


@dataclass(frozen=True, slots=True)
class OpenProjector:
    """A projector whose tensors were located and checked."""

    name: str
    """The name in feature files."""
    revision: str
    """The commit on the hub; empty for other models."""
    card: ModelCard | None
    """The chat model; None for a file that holds nothing else."""
    tensors: TensorSet

    @property
    def token_size(self) -> int:
        """The number of values of a token that it takes."""
        return self.tensors.weights[WIDE].shape[1]

    @property
    def projected_size(self) -> int:
        """The number of values of a token that it gives."""
        return self.tensors.weights[WIDE].shape[0]


def open_projector(name: str, observer: Observer = SILENT) -> OpenProjector:
    """Locate the projector of a model and check the names, types and shapes of its tensors.

    Args:
        name: A chat model, as for `--model`; or a .safetensors file that holds a projector alone, under the names of a
            chat model or of the module itself (`0.weight` or `layer_norm.weight`, and so on).
        observer: Receives the progress of downloads.

    Raises:
        ModelError: There is no projector, or the message names a tensor that is missing or misshapen.
    """
    if os.path.isfile(name) and name.endswith(WEIGHTS_SUFFIX):
        stored = read_safetensors_header(name)
        if not find_towers(stored, name):
            return OpenProjector(os.path.abspath(name), "", None, _of_file(stored, name))
    card = describe_model(name)
    if card.projector_size is None:
        raise ModelError(
            f"{card.name} has no projector",
            "name a chat model (with mlp1 or multi_modal_projector), or a .safetensors file with a projector",
        )
    files = files_of(card, observer)
    chosen = choose_weights(files, card.weights_file)
    found = find_projector(chosen.tensors, card.name)
    parts = _parts(found, card.name)
    stored = read_stored(files, chosen, parts.values())
    tensors = _checked(parts, stored, card.name)
    return OpenProjector(card.recorded_name, card.revision or "", card, tensors)


def _of_file(stored: Mapping[str, StoredTensor], path: str) -> TensorSet:
    if not any(part in MODULES for name in stored for part in name.split(".")):
        stored = {PROJECTOR + name: tensor for name, tensor in stored.items()}
    return _checked(_parts(find_projector(stored, path), path), stored, path)


def _parts(found: Tower, where: str) -> dict[str, str]:
    """Return the stored names of all tensors of a projector by standalone name.

    Raises:
        ModelError: One is missing, or there is one that no projector has.
    """
    known = projector_shapes(1, 1)
    for name in known:
        if not found.has(name):
            raise ModelError(f"{where}: tensor {name!r} is missing: its projector is not InternVL's", ORIGINAL)
    for name, _ in found.slots:
        if name not in known:
            raise ModelError(f"{where}: unexpected tensor {name!r}: its projector is not InternVL's", ORIGINAL)
    return {name: found.parts(name, where)[0] for name in known}


def _checked(parts: Mapping[str, str], stored: Mapping[str, StoredTensor], where: str) -> TensorSet:
    shape = stored[parts[WIDE]].shape
    if len(shape) != 2 or shape[1] % 4:
        raise ModelError(f"{where}: tensor {parts[WIDE]!r} has shape {shape}, which no projector has", ORIGINAL)
    size, token_size = shape
    shapes = projector_shapes(token_size, size)
    return TensorSet({name: weight_of(name, shapes[name], (parts[name],), stored) for name in shapes})
