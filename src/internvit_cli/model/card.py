"""What is known of a model before its weights are read: its shape, its pixels, its feature layer. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from internvit_cli.config import PATCH_SIZE, Pool, TokenOrder, Tokens
from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model.pixels import Normalization, OwnTiling
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.model.pixels import Triple

Origin = Literal["directory", "hub", "memory", "catalog"]
Norm = Literal["layer_norm", "rms_norm"]


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The shape of the vision tower, whichever layout its config had."""

    hidden_size: int
    num_layers: int
    """Blocks in the checkpoint; fewer may run."""
    num_heads: int
    mlp_size: int
    image_size: int
    """Side of the square picture that the position table was trained for, pixels."""
    patch_size: int
    qkv_bias: bool
    qk_norm: bool
    """RMS norm of queries and keys over all heads joined (the 6B family)."""
    norm: Norm
    eps: float

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of the position table."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class ModelCard:
    """All that planning needs to know of a model; made from its JSON files, never from its weights."""

    name: str
    """As reports and feature files call it: a hub id, a directory, or tiny-random."""
    origin: Origin
    """Where the weights are; `catalog` when only the facts of a known model are at hand."""
    directory: str | None
    """The folder that holds the checkpoint, for origin `directory`."""
    revision: str | None
    """The resolved commit, for origin `hub`."""
    vision: VisionConfig
    normalization: Normalization
    """What a tile's bytes become before the network."""
    select_layer: int | None
    """The checkpoint's own choice as an index into hidden_states; None when it makes none."""
    token_order: TokenOrder
    """Order of visual tokens: v2 row by row, v1 column by column (older chat checkpoints)."""
    projector_size: int | None
    """Size of a projected token; None when the checkpoint has no projector."""
    tile_size: int
    """The default side of a tile, pixels."""
    weights_file: str | None = None
    """The file with the weights, where the user named one."""
    own_tiling: OwnTiling = field(default_factory=OwnTiling)
    """How the checkpoint's own code cuts pictures."""
    offline: str = field(default="", compare=False)
    """Why nothing more is fetched, for origin `hub`; empty when it may be."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know of how the model was found."""

    @property
    def mean(self) -> Triple:
        """Per channel, of rescaled values."""
        return self.normalization.mean

    @property
    def std(self) -> Triple:
        """Per channel, of rescaled values."""
        return self.normalization.std

    @property
    def recorded_name(self) -> str:
        """What a feature file calls the model: a name that --model takes, from any working directory."""
        return recorded_name(self.name, self.directory, self.weights_file)

    def without_fetching(self) -> ModelCard:
        """Return the same model with what is at hand of it."""
        return self if self.offline else replace(self, offline="nothing is fetched now")

    def resolve_layers(self, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
        """Numbers of blocks after which features are taken, ascending, each once; the last one is how many run.

        Args:
            wanted: indices into hidden_states, as `resolve_layer` takes one. None is the checkpoint's own choice.

        Raises:
            UsageError: one is out of range, or there are none.
            ModelError: the checkpoint's own choice is out of range.
        """
        if wanted is None:
            return (self.resolve_layer(),)
        if not wanted:
            raise UsageError("--layer: no layer is named", "give numbers such as -4,-1, or auto")
        return tuple(sorted({self.resolve_layer(layer) for layer in wanted}))

    def resolve_layer(self, layer: int | None = None) -> int:
        """Number of blocks that run, 0 to `vision.num_layers`.

        Args:
            layer: an index into hidden_states, which has one entry more than there are blocks: 0 is the embeddings,
                k is after block k, -1 is after the last. None is the checkpoint's own choice, or without one -4 for
                models of 48 blocks (their last three only serve contrastive training), else -1.

        Raises:
            UsageError: `layer` is out of range.
            ModelError: the checkpoint's own choice is.
        """
        entries = self.vision.num_layers + 1
        index = layer
        if index is None:
            index = self.select_layer
        if index is None:
            index = -4 if self.vision.num_layers == 48 else -1
        if -entries <= index < entries:
            return index % entries
        if layer is None:
            raise ModelError(
                f"config.json: feature layer {index} of a model with {counted(entries - 1, 'block')}", "give --layer"
            )
        raise UsageError(
            f"--layer {layer}: {self.name} has {counted(entries - 1, 'block')}",
            f"give a number from -{entries} to {entries - 1}",
        )


def recorded_name(name: str, directory: str | None, weights_file: str | None) -> str:
    """Return what a feature file calls a model that is at hand by this name, or in this directory."""
    if directory is not None:
        return os.path.join(os.path.abspath(directory), weights_file or "").rstrip("/") or "/"
    return f"hf://{name}/{weights_file}" if weights_file else name


class FeatureShapes(NamedTuple):
    """What one tile leaves behind."""

    tokens: int
    """T: tokens a tile; 0 when none are stored."""
    token_size: int
    """C: values a token; 0 when none are stored."""
    pooled_size: int
    """d: values of the pooled vector."""


def feature_shapes(card: ModelCard, tokens: Tokens, pool: Pool, tile_size: int) -> FeatureShapes:
    """Shapes of a tile's features, and the check that the options fit the model.

    Args:
        card: the model.
        tokens: which tokens are stored.
        pool: how the pooled vector is made.
        tile_size: side of a tile, pixels.

    Raises:
        UsageError: the tile does not divide into whole tokens, or the model has no projector.
    """
    unit = 2 * PATCH_SIZE if tokens in {Tokens.VISUAL, Tokens.PROJECTED} else PATCH_SIZE
    if tile_size < unit or tile_size % unit:
        below = max(unit, tile_size - tile_size % unit)
        raise UsageError(
            f"--tile-size {tile_size} is not a multiple of {unit}, which --tokens {tokens.value} needs",
            f"try --tile-size {below}",
        )
    hidden = card.vision.hidden_size
    pooled_size = 2 * hidden if pool is Pool.CLS_MEAN else hidden
    patches = (tile_size // PATCH_SIZE) ** 2
    if tokens is Tokens.PROJECTED:
        if card.projector_size is None:
            raise UsageError(
                f"--tokens projected: {card.name} has no projector",
                "name a full InternVL checkpoint (with mlp1 or multi_modal_projector), or use --tokens visual",
            )
        return FeatureShapes(patches // 4, card.projector_size, pooled_size)
    if tokens is Tokens.VISUAL:
        return FeatureShapes(patches // 4, 4 * hidden, pooled_size)
    if tokens is Tokens.PATCH:
        return FeatureShapes(patches, hidden, pooled_size)
    return FeatureShapes(0, 0, pooled_size)
