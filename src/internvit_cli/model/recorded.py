"""Find the model of an output again, and check the digest of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Tokens
from internvit_cli.errors import InternvitError, ModelError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.pixels import Normalization
from internvit_cli.runtime.observer import SILENT, Observer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.config import Recipe


def open_recorded(
    recipe: Recipe, attributes: Mapping[str, Any], model: str | None = None, observer: Observer = SILENT
) -> Checkpoint:
    """Find the weights for a recipe, and check their digest.

    Args:
        recipe: The recipe to repeat.
        attributes: The attributes of the output, which name the model.
        model: Where the weights are, if they are not where the output says.
        observer: Receives progress.

    Raises:
        ModelError: The weights are not available, or are different ones, or no weights repeat the recipe.
    """
    if recipe.projector_digest:
        raise ModelError(
            "the tokens were projected from stored visual tokens, so pictures alone cannot give them again",
            "use the output that internvit project read",
        )
    name = model or str(attributes.get("model", ""))
    revision = None if model else attributes.get("model_revision") or None
    try:
        card = describe_model(name, revision=revision)
        # The recipe has what the run took from the model's JSON files, which may have changed since.
        card = replace(card, normalization=Normalization(recipe.mean, recipe.std, recipe.rescale_factor))
        projector = recipe.tokens is Tokens.PROJECTED
        checkpoint = Checkpoint.open(card, layer=recipe.layer, projector=projector, observer=observer)
        digest = checkpoint.digest(observer)
    except InternvitError as error:
        raise ModelError(
            f"the weights are not available: {error.message}", error.hint or "name their folder with --model"
        ) from error
    if digest != recipe.weights_digest:
        raise ModelError(
            f"the weights of {name} are not those that made the rows: digest {digest[:12]}, not "
            f"{recipe.weights_digest[:12]}",
            "name the right ones with --model",
        )
    return checkpoint
