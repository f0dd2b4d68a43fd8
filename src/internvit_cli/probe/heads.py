"""Keep a trained probe in a file, and label images with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.config import Recipe, RecipeError
from internvit_cli.errors import OutputError, UsageError, one_line, system_words
from internvit_cli.probe.attention import AttentionPooling, QueryPooling
from internvit_cli.probe.linear import LinearHead
from internvit_cli.runtime.untrusted import parse_json, read_bounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

LARGEST_FILE = 4 << 30
_FORMAT = "internvit probe 1"
_HINT = "give a head.safetensors that internvit probe wrote"


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A classifier, the names of its classes, and the features that it was trained on."""

    probe: str
    """`linear`, `attention` or `queries`."""
    model: LinearHead | torch.nn.Module
    classes: tuple[str, ...]
    recipe: Recipe
    layer: int
    """The layer of the features, as a number of blocks."""

    @property
    def needs_tokens(self) -> bool:
        """Whether it takes tokens; otherwise it takes pooled vectors."""
        return self.probe != "linear"


def to_bytes(head: TrainedHead) -> bytes:
    """Return a head as a .safetensors file."""
    from safetensors.torch import save

    facts = {
        "format": _FORMAT,
        "probe": head.probe,
        "classes": json.dumps(head.classes),
        "recipe": head.recipe.to_json(),
        "layer": str(head.layer),
        "heads": str(getattr(head.model, "heads", 0)),
    }
    return save({name: tensor.contiguous() for name, tensor in _tensors(head).items()}, facts)


def _tensors(head: TrainedHead) -> dict[str, Tensor]:
    if isinstance(head.model, LinearHead):
        return {name: getattr(head.model, name) for name in ("mean", "scale", "weight", "bias")}
    return {name: tensor.detach().cpu() for name, tensor in head.model.state_dict().items()}


def read_head(path: str) -> TrainedHead:
    """Read a head that `to_bytes` made.

    Raises:
        UsageError: The file cannot be read, or is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = read_bounded(path, LARGEST_FILE)
    except OSError as error:
        raise UsageError(f"{path}: {system_words(error)}", _HINT) from error
    try:
        tensors = load(data)
        facts = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        return _head(facts, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecipeError) as error:
        raise UsageError(f"{path} is not the head of a probe: {one_line(str(error))}", _HINT) from error


def _head(facts: Mapping[str, str], tensors: dict[str, Tensor]) -> TrainedHead:
    if facts.get("format") != _FORMAT:
        raise ValueError(f"its format is {facts.get('format')!r}")
    classes = parse_json(facts["classes"])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no names")
    model = _model(facts, tensors, len(classes))
    return TrainedHead(facts["probe"], model, tuple(classes), Recipe.from_json(facts["recipe"]), int(facts["layer"]))


def _model(facts: Mapping[str, str], tensors: dict[str, Tensor], classes: int) -> LinearHead | torch.nn.Module:
    if facts["probe"] == "linear":
        head = LinearHead(*(tensors[name].float() for name in ("mean", "scale", "weight", "bias")))
        if head.weight.shape != (classes, len(head.mean)) or head.bias.shape != (classes,):
            raise ValueError("its tensors do not fit together")
        return head
    width = tensors["head.0.weight"].shape[0]
    model: torch.nn.Module
    if facts["probe"] == "attention":
        heads = int(facts["heads"])
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels")
        model = AttentionPooling(width, heads, classes)
    elif facts["probe"] == "queries":
        model = QueryPooling(width, classes)
    else:
        raise ValueError(f"there is no probe {facts['probe']!r}")
    model.load_state_dict(tensors)
    return model.eval()


def check_features(head: TrainedHead, recipe: Recipe, layer: int, path: str) -> None:
    """Refuse features that are not of the kind that a head was trained on.

    Raises:
        OutputError: Names what differs.
    """
    # The tiles of a picture may be chosen otherwise; its vectors still mean the same.
    ignored = {"store_dtype", "compute_dtype", "tile_pooled", "on_overflow", "max_tiles", "min_tiles", "thumbnail"}
    ignored |= {"truncated", "grey_range", "numerics_version", "earlier_layers", "layer", "values_per_scale"}
    ignored |= {"tokens", "token_order", "projected_from"} if not head.needs_tokens else {"pool"}
    different = [name for name in recipe.differences(head.recipe) if name not in ignored]
    if layer != head.layer:
        different.append("layer")
    if different:
        raise OutputError(
            f"{path} is not what the head was trained on: {', '.join(different)} "
            + ("differs" if len(different) == 1 else "differ"),
            "extract the pictures with the same model and options as those of the training",
        )
