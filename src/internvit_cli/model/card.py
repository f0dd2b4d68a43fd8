"""Describe a model before its weights are read: its shape, its pixels and its feature layer, without torch."""

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
    """The shape of the vision tower, for every layout of its config."""

    hidden_size: int
    num_layers: int
    """Number of blocks in the checkpoint; fewer may run."""
    num_heads: int
    mlp_size: int
    image_size: int
    """Side of the square picture for which the position table was trained, in pixels."""
    patch_size: int
    qkv_bias: bool
    qk_norm: bool
    """Whether queries and keys have an RMS norm over all heads together (the 6B family)."""
    norm: Norm
    eps: float

    @property
    def head_dim(self) -> int:
        """The number of values of a head."""
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """The number of patches along a side of the position table."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything that planning needs to know about a model, from its JSON files and never from its weights."""

    name: str
    """The name in reports and feature files: a hub id, a directory, or tiny-random."""
    origin: Origin
    """Where the weights are; `catalog` if only the facts of a known model are available."""
    directory: str | None
    """The folder of the checkpoint, for origin `directory`."""
    revision: str | None
    """The resolved commit, for origin `hub`."""
    vision: VisionConfig
    normalization: Normalization
    """The arithmetic on pixel values before the network."""
    select_layer: int | None
    """The checkpoint's own choice as an index into hidden_states; None if it has none."""
    token_order: TokenOrder
    """The order of visual tokens: v2 row by row, v1 column by column (older chat checkpoints)."""
    projector_size: int | None
    """The size of a projected token; None if the checkpoint has no projector."""
    tile_size: int
    """The default side of a tile, in pixels."""
    weights_file: str | None = None
    """The file with the weights, if the user named one."""
    own_tiling: OwnTiling = field(default_factory=OwnTiling)
    """How the checkpoint's own code cuts pictures."""
    offline: str = field(default="", compare=False)
    """Why nothing is fetched, for origin `hub`; empty if files may be fetched."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Notes for the user on how the model was found."""

    @property
    def mean(self) -> Triple:
        """The mean of rescaled values, per channel."""
        return self.normalization.mean

    @property
    def std(self) -> Triple:
        """The standard deviation of rescaled values, per channel."""
        return self.normalization.std

    @property
    def recorded_name(self) -> str:
        """The name in feature files, which --model accepts in any working directory."""
        return recorded_name(self.name, self.directory, self.weights_file)

    def without_fetching(self) -> ModelCard:
        """Return the card with fetching turned off."""
        return self if self.offline else replace(self, offline="nothing may be fetched now")

    def resolve_layers(self, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the numbers of blocks after which features are taken, ascending and unique; the last is how many run.

        Args:
            wanted: Indices into hidden_states, as for `resolve_layer`. None means the checkpoint's own choice.

        Raises:
            UsageError: An index is out of range, or there are none.
            ModelError: The checkpoint's own choice is out of range.
        """
        if wanted is None:
            return (self.resolve_layer(),)
        if not wanted:
            raise UsageError("--layer names no layer", "give numbers such as -4,-1, or auto")
        return tuple(sorted({self.resolve_layer(layer) for layer in wanted}))

    def resolve_layer(self, layer: int | None = None) -> int:
        """Return the number of blocks that run, 0 to `vision.num_layers`.

        Args:
            layer: An index into hidden_states, which has one entry more than there are blocks: 0 is the embeddings,
                k is after block k, -1 is after the last. None means the checkpoint's own choice; without one, it means
                -4 for models with 48 blocks (their last three only serve contrastive training), and -1 for others.

        Raises:
            UsageError: `layer` is out of range.
            ModelError: The checkpoint's own choice is out of range.
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
    """Return the name that feature files have for a model with this name, or in this directory."""
    if directory is not None:
        return os.path.join(os.path.abspath(directory), weights_file or "").rstrip("/") or "/"
    return f"hf://{name}/{weights_file}" if weights_file else name


class FeatureShapes(NamedTuple):
    """The shapes of the features of one tile."""

    tokens: int
    """T: tokens per tile; 0 if none are stored."""
    token_size: int
    """C: values per token; 0 if none are stored."""
    pooled_size: int
    """d: values of the pooled vector."""


def feature_shapes(card: ModelCard, tokens: Tokens, pool: Pool, tile_size: int) -> FeatureShapes:
    """Return the shapes of a tile's features, and check that the options fit the model.

    Args:
        card: The model.
        tokens: Which tokens are stored.
        pool: How the pooled vector is computed.
        tile_size: The side of a tile in pixels.

    Raises:
        UsageError: The tile does not divide into whole tokens, or the model has no projector.
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
