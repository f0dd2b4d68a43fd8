"""Compare the weights behind an output with those of a checkpoint, tensor by tensor; without PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Tokens
from internvit_cli.errors import InternvitError, ModelError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.projector import open_projector
from internvit_cli.model.recorded import open_recorded
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.config import Recipe
    from internvit_cli.model.card import ModelCard

ALLOW_MISMATCH = "--allow-mismatch"
"""The option with which commands go on although weights differ."""
MOST_NAMED = 5
"""Tensors that a message names."""


@dataclass(frozen=True, slots=True)
class DifferentTensor:
    """A tensor that differs between the weights behind an output and a checkpoint."""

    name: str
    """The standalone name; `mlp1` for the whole projector that `internvit project` applied."""
    difference: str
    """What differs: `values`, `type`, `shape`, or that the checkpoint has `no such tensor`."""
    recorded_digest: str
    """The SHA-256 of the tensor behind the output."""
    digest: str
    """That of the tensor in the checkpoint; empty if there is none."""


@dataclass(frozen=True, slots=True)
class WeightsMatch:
    """The result of a comparison."""

    checkpoint: str
    matches: bool
    tensors: int
    """The number of tensors behind the output."""
    recorded_digest: str
    digest: str
    """The digest of the checkpoint's tensors; empty if it has too few blocks."""
    different: tuple[DifferentTensor, ...]
    """The tensors that differ; empty if they are not known."""
    unknown: str
    """Why it is not known which tensors differ; empty if it is."""
    settings: tuple[str, ...]
    """Other settings of the checkpoint that differ from the recipe, such as its normalization; they do not decide
    whether the weights match."""

    @property
    def summary(self) -> str:
        """One sentence on the weights."""
        if self.matches:
            return f"yes: the {self.tensors:,} tensors behind these features are those of {self.checkpoint}"
        if self.unknown:
            return f"no: the weights of {self.checkpoint} are other ones; {self.unknown}"
        names = ", ".join(f"{tensor.name} ({tensor.difference})" for tensor in self.different[:MOST_NAMED])
        more = f" and {len(self.different) - MOST_NAMED:,} more" if len(self.different) > MOST_NAMED else ""
        count = f"{len(self.different):,} of {counted(self.tensors, 'tensor')}"
        return f"no: {count} in {self.checkpoint} {'differs' if len(self.different) == 1 else 'differ'}: {names}{more}"

    def to_json(self) -> dict[str, Any]:
        """Return the values for `--json`."""
        return asdict(self)


def match_weights(
    recipe: Recipe, attributes: Mapping[str, Any], name: str, observer: Observer = SILENT
) -> WeightsMatch:
    """Compare the weights behind an output with those of a checkpoint, which may be a chat model with a tower inside.

    These are the tower's, and those of the projector if tokens are projected; `mlp1` stands for all tensors of a
    projector that `internvit project` applied. Which tensors of the tower differ can be said only if the weights behind
    the output are available where the output says.

    Args:
        recipe: The recipe of the output.
        attributes: The attributes of the output, which name its model.
        name: The checkpoint, as for `--model`.
        observer: Receives progress.

    Raises:
        ModelError: The checkpoint is not available, or is broken.
    """
    card = describe_model(name)
    tower = recipe.before_projection
    settings = tuple(_settings(tower, card))
    if tower.layer > card.vision.num_layers:
        blocks = counted(card.vision.num_layers, "block")
        unknown = f"it has {blocks}, and the features are of layer {tower.layer}"
        return WeightsMatch(name, False, 0, tower.weights_digest, "", (), unknown, settings)
    projector = tower.tokens is Tokens.PROJECTED and card.projector_size is not None
    checkpoint = Checkpoint.open(card, layer=tower.layer, projector=projector, observer=observer)
    digest = checkpoint.digest(observer)
    different: tuple[DifferentTensor, ...] = ()
    if recipe.projector_digest and (found := _other_projector(recipe, card, name, observer)):
        different = (found,)
    if digest == tower.weights_digest:
        count = len(checkpoint.weights)
        return WeightsMatch(name, not different, count, tower.weights_digest, digest, different, "", settings)
    try:
        recorded = open_recorded(tower, attributes, observer=observer)
        ours, theirs = recorded.tensor_digests(observer), checkpoint.tensor_digests(observer)
    except InternvitError as error:
        unknown = f"which tensors differ is not known, because {error.message}"
        return WeightsMatch(name, False, 0, tower.weights_digest, digest, (), unknown, settings)
    in_tower = tuple(
        DifferentTensor(tensor, _difference(recorded, checkpoint, tensor), ours[tensor], theirs.get(tensor, ""))
        for tensor in recorded.weights
        if ours[tensor] != theirs.get(tensor)
    )
    return WeightsMatch(name, False, len(ours), tower.weights_digest, digest, (*in_tower, *different), "", settings)


def _other_projector(recipe: Recipe, card: ModelCard, name: str, observer: Observer) -> DifferentTensor | None:
    """Return how a model's projector differs from the one that was applied to stored tokens; None if it does not."""
    if card.projector_size is None:
        return DifferentTensor("mlp1", "no such tensor", recipe.projector_digest, "")
    digest = open_projector(name, observer).tensors.digest(observer)
    return (
        None
        if digest == recipe.projector_digest
        else DifferentTensor("mlp1", "values", recipe.projector_digest, digest)
    )


def mismatch_error(match: WeightsMatch) -> ModelError:
    """Return the error that an output does not have the weights of a checkpoint."""
    return ModelError(
        match.summary.removeprefix("no: "),
        f"extract again with --model {match.checkpoint}; or {ALLOW_MISMATCH} if that is what you want",
    )


def _settings(recipe: Recipe, card: ModelCard) -> list[str]:
    """Return the settings of a model in which it differs from a recipe, as words."""
    own = {
        "mean": (recipe.mean, card.mean),
        "std": (recipe.std, card.std),
        "rescale factor": (recipe.rescale_factor, card.normalization.rescale_factor),
        "token order": (recipe.token_order.value, card.token_order.value),
    }
    different = [f"{name} {theirs} instead of {ours}" for name, (ours, theirs) in own.items() if ours != theirs]
    try:
        layer = card.resolve_layer()
    except InternvitError:
        return different
    return different if layer == recipe.layer else [*different, f"layer {layer} instead of {recipe.layer}"]


def _difference(recorded: Checkpoint, checkpoint: Checkpoint, name: str) -> str:
    ours, theirs = recorded.weights[name], checkpoint.weights.get(name)
    if theirs is None:
        return "no such tensor"
    if ours.shape != theirs.shape:
        return f"shape {list(theirs.shape)} instead of {list(ours.shape)}"
    return f"type {theirs.dtype} instead of {ours.dtype}" if ours.dtype != theirs.dtype else "values"
