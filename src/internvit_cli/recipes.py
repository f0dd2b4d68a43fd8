"""Make a recipe from options and a model, and refuse to mix two recipes in one output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from internvit_cli.config import (
    ComputeDtype,
    PixelRule,
    Preprocess,
    Recipe,
    TilingRule,
    TokenOrder,
    Tokens,
)
from internvit_cli.encode.options import EncoderOptions
from internvit_cli.errors import OtherRecipeError, OutputError, UsageError
from internvit_cli.model.card import ModelCard, feature_shapes
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.names import parse_model_name
from internvit_cli.model.own_tiling import tiling_note
from internvit_cli.model.pixels import Normalization
from internvit_cli.runtime.background import Background
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import listed
from internvit_cli.storage.format.layout import FeatureShape, stored_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from internvit_cli.options import ExtractOptions, RunOptions

LONGEST_DTYPE = ComputeDtype.BFLOAT16
UNKNOWN_DIGEST = "0" * 64
"""Stands for the digest of weights that are not hashed yet, or not at all; it has the same length."""
OPTION_OF_FIELD = {
    "weights_digest": "--model",
    "exif": "--exif",
    "tokens": "--tokens",
    "compute_dtype": "--dtype",
    "earlier_layers": "--layer",
}
"""Recipe fields whose option has another name; the others differ only in underscores."""
FIELDS_WITHOUT_OPTION = {
    *("mean", "std", "rescale_factor", "token_order", "numerics_version"),
    *("projector_digest", "projected_from", "values_per_scale"),
}
"""Fields that the checkpoint, this program, or the output that `project` read decides."""


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """The part of a recipe that depends on the model."""

    weights_digest: str
    layers: tuple[int, ...]
    """Blocks after which features are taken, ascending; the last one is the number of blocks that run."""
    tile_size: int
    """The model's tile size in pixels."""
    normalization: Normalization
    token_order: TokenOrder

    @classmethod
    def of_card(cls, card: ModelCard, layers: tuple[int, ...], weights_digest: str) -> RecipeFacts:
        """Return the facts of a model that is available."""
        return cls(weights_digest, layers, card.tile_size, card.normalization, card.token_order)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> RecipeFacts:
        """Return the facts that an output recorded, which suffice to compare recipes without the model."""
        normalization = Normalization(recipe.mean, recipe.std, recipe.rescale_factor)
        return cls(recipe.weights_digest, recipe.layers, recipe.tile_size, normalization, recipe.token_order)

    def with_kept(self, kept: Recipe | None) -> RecipeFacts:
        """Return these facts with the tile size of an output of the same model, if there is one."""
        return self if kept is None else replace(self, tile_size=kept.tile_size)


# An `auto` option keeps the value of an output of the same model: tile size (`with_kept`), layers and type.


def kept_layers(options: ExtractOptions, kept: Recipe, card: ModelCard | None) -> tuple[int, ...] | None:
    """Return the layers of an output of the same model; None if the user names layers, or the model has too few.

    Args:
        options: The options of the run.
        kept: The output's recipe.
        card: The model's description; None if it is known to be the same model.
    """
    is_same_depth = card is None or kept.layer <= card.vision.num_layers
    return kept.layers if options.model.layers is None and is_same_depth else None


def planned_dtype(options: ExtractOptions, recorded: Recipe | None) -> ComputeDtype | None:
    """Return the requested compute type, or else the output's; None if it must still be measured."""
    if options.run.dtype is not ComputeDtype.AUTO:
        return options.run.dtype
    return recorded.compute_dtype if recorded else None


class ModelInUse:
    """The model of a run, of which only as much is read as the run needs.

    A repeated command whose output names the same model on the hub is compared with what the output recorded, without
    network, weights or torch. The weights are hashed in a thread beside other work, so this is a context manager: no
    thread outlives the block, and if the hashing fails, its error comes before those of what ran beside it.
    """

    def __init__(self, options: ExtractOptions, stored: dict[str, Any] | None, observer: Observer = SILENT) -> None:
        """Read as little of the model as is needed to make the recipe.

        Args:
            options: The options of the run.
            stored: Attributes of the newest shard at the output, if there is one.
            observer: Receives progress.

        Raises:
            OutputError: The output's recipe is of another version of this program, and must not be overwritten.
            UsageError: The model does not have the layers, or projected tokens of several layers are requested.
        """
        self._options = options
        self._observer = observer
        self._card: ModelCard | None = None
        self._checkpoint: Checkpoint | None = None
        self._name = parse_model_name(options.model.name, options.model.revision)
        self._revision = options.model.revision
        recorded = _recorded_recipe(options, stored)
        kept = recorded if stored and stored.get("model") == self._name.recorded else None
        self._hashing: Background[str] | None = None
        is_pinned = kept is not None and stored is not None and self._is_on_hub(stored)
        self._kept_layers = kept_layers(options, kept, None if is_pinned else self.card) if kept else None
        if stored and is_pinned:
            self._revision = stored.get("model_revision") or None
        self._digest_is_recorded = kept is not None and is_pinned and self.layers == kept.layers
        if kept and self._digest_is_recorded:
            facts = RecipeFacts.of_recipe(kept)
        else:
            facts = RecipeFacts.of_card(self.card, self.layers, UNKNOWN_DIGEST)
        facts = facts.with_kept(kept)
        dtype = planned_dtype(options, recorded)
        self.dtype_is_known = dtype is not None
        self.draft = make_recipe(options, facts, dtype or LONGEST_DTYPE, recorded)
        """The wanted recipe without the digest of weights that are still to be hashed. An unknown compute type is
        replaced by one of the same length."""
        if not self._digest_is_recorded:
            self.hash_weights()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the hashing: at once after an interruption, or else with its result, whose error comes first."""
        if self._hashing is None:
            return
        try:
            if error is None or isinstance(error, Exception):
                self.confirm_weights()
        finally:
            self._hashing.cancel()

    @property
    def recipe(self) -> Recipe:
        """The wanted recipe, after waiting for the digest of the weights; see `draft` for the compute type.

        Raises:
            ModelError: The weights cannot be read.
        """
        return self.draft if self._digest_is_recorded else replace(self.draft, weights_digest=self._digest)

    @property
    def card(self) -> ModelCard:
        """The model's description, fetched on first use."""
        if self._card is None:
            self._card = describe_model(self._options.model.name, revision=self._revision)
        return self._card

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks after which features are taken, ascending; the last one is the number of blocks that run."""
        layers = self._kept_layers or self.card.resolve_layers(self._options.model.layers)
        check_layers(self._options.store.tokens, layers)
        return layers

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's weights, located and checked on first use, but not read."""
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(
                self.card,
                layer=self.layers[-1],
                projector=self._options.store.tokens is Tokens.PROJECTED,
                observer=self._observer,
            )
        return self._checkpoint

    @property
    def recorded_name(self) -> str:
        """The name of the model in the output."""
        return self._name.recorded

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on the model, as far as it was read."""
        if self._card is None:
            return ()
        found = (*self._card.notes, tiling_note(self._card.own_tiling, self._options.pictures))
        return tuple(note for note in (*found, *(self._checkpoint.notes if self._checkpoint else ())) if note)

    def hash_weights(self) -> None:
        """Begin to hash the weights beside other work, unless that has begun before.

        Raises:
            ModelError: There are no weights.
        """
        if self._hashing is None:
            checkpoint, observer = self.checkpoint, self._observer
            self._hashing = Background(lambda is_cancelled: checkpoint.digest(observer, is_cancelled), "hash")

    def confirm_weights(self) -> None:
        """Check that the available weights are those that the recipe names, after waiting for their digest.

        Raises:
            ModelError: The weights cannot be read.
            OtherRecipeError: They are not, so the model changed under its name.
        """
        if self._digest != self.recipe.weights_digest:
            check_same(replace(self.recipe, weights_digest=self._digest), self.recipe, self._options.store.output)

    @property
    def _digest(self) -> str:
        """The digest of the available weights: gigabytes, which are hashed once."""
        self.hash_weights()
        assert self._hashing is not None, "it has begun"
        return self._hashing.result()

    def _is_on_hub(self, stored: dict[str, Any]) -> bool:
        """Return whether the output's commit of a model on the hub is the one to use."""
        return self._name.repo is not None and self._name.revision in (None, stored.get("model_revision"))


def _recorded_recipe(options: ExtractOptions, stored: dict[str, Any] | None) -> Recipe | None:
    if stored is None:
        return None
    try:
        return stored_recipe(stored, options.store.output)
    except OutputError:
        if options.store.overwrite:
            return None
        raise


def values_per_scale(options: ExtractOptions, recorded: Recipe | None) -> int:
    """Return how many values of a token share a scale: as in an output that is continued, or as new outputs have it.

    Args:
        options: The options of the run.
        recorded: The recipe of the output, if there is one; earlier versions stored one scale per token.
    """
    store = options.store
    stored = (recorded.tokens, recorded.store_dtype) if recorded else None
    if recorded and stored == (store.tokens, store.store_dtype) and not store.overwrite:
        return recorded.values_per_scale
    return store.store_dtype.values_per_scale(store.tokens)


def make_recipe(
    options: ExtractOptions, facts: RecipeFacts, dtype: ComputeDtype, recorded: Recipe | None = None
) -> Recipe:
    """Return the recipe of a run.

    Args:
        options: The options of the run.
        facts: What the model decides.
        dtype: The compute type.
        recorded: The recipe of the output, if there is one.
    """
    pictures, store = options.pictures, options.store
    single_view = pictures.preprocess is not Preprocess.TILES
    return Recipe(
        weights_digest=facts.weights_digest,
        layer=facts.layers[-1],
        tile_size=pictures.tile_size or facts.tile_size,
        # A single view has no tiles to bound, and options without effect must not prevent resuming a run.
        min_tiles=1 if single_view else pictures.min_tiles,
        max_tiles=1 if single_view else pictures.max_tiles,
        thumbnail=not single_view and pictures.thumbnail,
        preprocess=pictures.preprocess,
        exif=pictures.exif,
        background=pictures.background,
        mean=facts.normalization.mean,
        std=facts.normalization.std,
        tokens=store.tokens,
        token_order=facts.token_order,
        pool=store.pool,
        tile_pooled=store.tile_pooled,
        compute_dtype=dtype,
        store_dtype=store.store_dtype,
        on_overflow=store.on_overflow,
        rescale_factor=facts.normalization.rescale_factor,
        earlier_layers=facts.layers[:-1],
        truncated=pictures.truncated,
        grey_range=pictures.grey_range,
        values_per_scale=values_per_scale(options, recorded),
    )


def check_layers(tokens: Tokens, layers: Sequence[int]) -> None:
    """Refuse projected tokens of several layers.

    Raises:
        UsageError: They are requested.
    """
    if tokens is Tokens.PROJECTED and len(layers) > 1:
        raise UsageError(
            f"--tokens projected for the layers {listed(layers)}: the projector was trained on one layer",
            "give one --layer, or use --tokens visual",
        )


def pixel_rule(recipe: Recipe, max_pixels: int) -> PixelRule:
    """Return how pictures become tiles with a recipe."""
    return PixelRule(
        tiling=TilingRule(recipe.tile_size, recipe.min_tiles, recipe.max_tiles, recipe.thumbnail, recipe.preprocess),
        exif=recipe.exif,
        background=recipe.background,
        # Without tokens, the other tiles matter only if the image's vector is their mean.
        global_view_only=recipe.tokens is Tokens.NONE
        and not recipe.tile_pooled
        and recipe.thumbnail | (recipe.max_tiles == 1),
        max_pixels=max_pixels,
        truncated=recipe.truncated,
        grey_range=recipe.grey_range,
    )


def feature_shape(options: ExtractOptions, card: ModelCard, recipe: Recipe) -> FeatureShape:
    """Return the sizes of stored features.

    Raises:
        UsageError: The model cannot provide what is requested.
    """
    shapes = feature_shapes(card, options.store.tokens, options.store.pool, recipe.tile_size)
    return FeatureShape(
        tokens=options.store.tokens,
        tokens_per_tile=shapes.tokens,
        channels=shapes.token_size,
        pooled_width=shapes.pooled_size,
        store_dtype=options.store.store_dtype,
        tile_pooled=options.store.tile_pooled,
        earlier_layers=recipe.earlier_layers,
        values_per_scale=recipe.values_per_scale,
    )


def encoder_options(recipe: Recipe, device: str, batch_tiles: int | None) -> EncoderOptions:
    """Return the options with which an encoder gives a recipe's values.

    Args:
        recipe: The recipe, with its final compute type.
        device: Auto, cpu, cuda, cuda:N or mps.
        batch_tiles: Tiles per batch; None lets the encoder choose.
    """
    return EncoderOptions(
        device=device,
        dtype=recipe.compute_dtype,
        batch_tiles=batch_tiles,
        tokens=recipe.tokens,
        pool=recipe.pool,
        tile_size=recipe.tile_size,
        layer=recipe.layer,
        token_order=recipe.token_order,
        store_dtype=recipe.store_dtype,
        on_overflow=recipe.on_overflow,
        earlier_layers=recipe.earlier_layers,
        values_per_scale=recipe.values_per_scale,
    )


def encoder_options_of_run(run: RunOptions, recipe: Recipe, device: str) -> EncoderOptions:
    """Return the same for a run on a device; the type is the requested one, which may be AUTO."""
    how = encoder_options(recipe, device, run.batch_tiles)
    return replace(
        how,
        dtype=run.dtype,
        threads=run.threads,
        compile=run.compile,
        measure_batch=run.measure_batch,
        resize=run.resize,
    )


def check_same(wanted: Recipe, stored: Recipe, path: str) -> None:
    """Refuse to continue an output of another recipe.

    Raises:
        OtherRecipeError: Names each differing field with both values.
    """
    different = wanted.differences(stored)
    if not different:
        return
    listed = "; ".join(
        f"{name} was {_short(getattr(stored, name))}, is now {_short(getattr(wanted, name))}" for name in different
    )
    options = dict.fromkeys(
        OPTION_OF_FIELD.get(name, "--" + name.replace("_", "-"))
        for name in different
        if name not in FIELDS_WITHOUT_OPTION
    )
    same = f"give the same {' and '.join(options)} as before, " if options else ""
    raise OtherRecipeError(
        f"{path} was made with another recipe: {listed}", f"{same}choose another output, or replace it with --overwrite"
    )


def _short(value: Any) -> str:
    text = (listed(value) if value else "none") if isinstance(value, tuple) else str(value)
    return text[:12] + "..." if len(text) > 40 else text
