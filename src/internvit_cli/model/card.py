"""What a checkpoint is, from its JSON alone: shapes, normalisation, feature layer, token order. No torch here.

Sources: FACTS 1 and 2: OpenGVLab's configuration_intern_vit.py and configuration_internvl_chat.py, and transformers'
InternVLVisionConfig and InternVLConfig, which rename some keys and leave out those that have their default value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from internvit_cli.config import PATCH_SIZE, Pool, TokenOrder, Tokens
from internvit_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Origin = Literal["directory", "hub", "memory", "catalog"]
Norm = Literal["layer_norm", "rms_norm"]

LLM_DEFAULT_HIDDEN_SIZE = 4096
"""Llama's, Qwen2's, Qwen3's and InternLM2's own default, which transformers leaves out of a saved config."""

# A key that a config leaves out has the default of the class that wrote it; the two classes disagree (FACTS 1.1).
_OFFICIAL_DEFAULTS = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}
_NATIVE_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
}
_NATIVE_NAMES = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}


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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, native: bool) -> VisionConfig:
        """The tower's part of a config.json.

        Args:
            raw: its keys and values; keys unknown here are ignored.
            native: True for transformers' own names and defaults, False for those of the official code.

        Raises:
            ModelError: a value that no InternViT can have; the message names its key.
        """
        keys = _Keys(raw, native=native)
        for key, only in (("hidden_act", "gelu"), ("num_channels", 3)):
            if raw.get(key, only) != only:
                raise ModelError(f"config.json: {key} is {raw[key]!r}; only {only!r} is an InternViT")
        config = cls(
            hidden_size=keys.count("hidden_size"),
            num_layers=keys.count("num_hidden_layers"),
            num_heads=keys.count("num_attention_heads"),
            mlp_size=keys.count("intermediate_size"),
            image_size=keys.side("image_size"),
            patch_size=keys.side("patch_size"),
            qkv_bias=keys.flag("qkv_bias"),
            qk_norm=keys.flag("qk_normalization"),
            norm=keys.norm("norm_type"),
            eps=keys.positive("layer_norm_eps"),
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.patch_size != PATCH_SIZE:
            raise ModelError(f"config.json: patch_size is {self.patch_size}; every InternViT has {PATCH_SIZE}")
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"config.json: hidden_size {self.hidden_size} does not divide into {self.num_heads} attention heads"
            )
        if self.image_size % self.patch_size:
            raise ModelError(f"config.json: image_size {self.image_size} is not a multiple of {self.patch_size}")


class _Keys:
    """Typed access to a config's values, under either naming; every complaint names the key as it was written."""

    def __init__(self, raw: Mapping[str, Any], *, native: bool) -> None:
        self._raw = raw
        self._names = _NATIVE_NAMES if native else {}
        self._defaults: Mapping[str, Any] = _NATIVE_DEFAULTS if native else _OFFICIAL_DEFAULTS

    def _get(self, key: str) -> tuple[str, Any]:
        name = self._names.get(key, key)
        value = self._raw.get(name)
        return name, self._defaults[key] if value is None else value

    def count(self, key: str) -> int:
        name, value = self._get(key)
        return _count(name, value)

    def side(self, key: str) -> int:
        """A side in pixels; transformers writes it as a list of two."""
        name, value = self._get(key)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise ModelError(f"config.json: {name} is {value!r}; only squares are supported")
            value = value[0]
        return _count(name, value)

    def flag(self, key: str) -> bool:
        name, value = self._get(key)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {name} is {value!r}, not true or false")
        return value

    def norm(self, key: str) -> Norm:
        name, value = self._get(key)
        if value == "layer_norm":
            return "layer_norm"
        if value == "rms_norm":
            return "rms_norm"
        raise ModelError(f"config.json: {name} is {value!r}, neither 'rms_norm' nor 'layer_norm'")

    def positive(self, key: str) -> float:
        name, value = self._get(key)
        if not _is_number(value) or not 0 < value < 1:
            raise ModelError(f"config.json: {name} is {value!r}, not a small positive number")
        return float(value)


def _count(name: str, value: object, most: int = 1 << 20) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(f"config.json: {name} is {value!r}, not a whole number from 1 to {most}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    mean: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    std: tuple[float, float, float]
    select_layer: int | None
    """The checkpoint's own choice as an index into hidden_states; None when it makes none."""
    token_order: TokenOrder
    """Order of visual tokens: v2 row by row, v1 column by column (older chat checkpoints)."""
    projector_size: int | None
    """Size of a projected token; None when the checkpoint has no projector."""
    tile_size: int
    """The default side of a tile, pixels."""

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
            raise ModelError(f"config.json: feature layer {index} of a model with {entries - 1} blocks", "give --layer")
        raise UsageError(
            f"--layer {layer}: {self.name} has {entries - 1} blocks", f"give a number from -{entries} to {entries - 1}"
        )


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


def card_from_json(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    *,
    name: str,
    origin: Origin,
    directory: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """The card of a checkpoint in any published layout.

    Args:
        config: its config.json.
        preprocessor: its preprocessor_config.json; None means ImageNet's mean and standard deviation, as all have.
        name: the model's name in reports.
        origin: where the weights are.
        directory: the folder, for origin `directory`.
        revision: the commit, for origin `hub`.

    Raises:
        ModelError: not an InternViT, or a nonsensical value; the message names the key.
    """
    model_type = config.get("model_type")
    chat = model_type == "internvl_chat"
    native = model_type in {"internvl", "internvl_vision"}
    if not chat and not native and model_type != "intern_vit_6b":
        raise ModelError(
            f"{name}: model_type is {model_type!r}, which is no InternViT or InternVL",
            "name a checkpoint whose model_type is intern_vit_6b, internvl_chat, internvl or internvl_vision",
        )
    whole = chat or model_type == "internvl"
    tower = _section(config, "vision_config") if whole else config
    vision = VisionConfig.from_dict(tower, native=native)
    if whole:
        _check_unshuffle(config)
        _check_adapters(config)
    mean, std = _normalisation(preprocessor or {})
    return ModelCard(
        name=name,
        origin=origin,
        directory=directory,
        revision=revision,
        vision=vision,
        mean=mean,
        std=std,
        select_layer=_select_layer(config, "vision_feature_layer" if native else "select_layer"),
        token_order=_token_order(config) if chat else TokenOrder.V2,
        projector_size=_llm_size(config, "llm_config" if chat else "text_config") if whole else None,
        tile_size=_tile_size(config, vision) if chat else vision.image_size,
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise ModelError(f"config.json: {key} is missing")
    return section


def _check_unshuffle(config: Mapping[str, Any]) -> None:
    ratio = config.get("downsample_ratio", 0.5)
    if ratio != 0.5:
        raise ModelError(f"config.json: downsample_ratio is {ratio!r}; only 0.5 is supported")


def _check_adapters(config: Mapping[str, Any]) -> None:
    if config.get("use_backbone_lora"):
        raise ModelError(
            "config.json: use_backbone_lora is set: the tower's weights are wrapped in adapters",
            "merge them into the model first (peft's merge_and_unload)",
        )


def _select_layer(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ModelError(f"config.json: {key} is {value!r}, not one whole number")
    return value


def _token_order(config: Mapping[str, Any]) -> TokenOrder:
    value = config.get("ps_version", "v1")  # the chat code's default when the key is absent
    try:
        return TokenOrder(value)
    except ValueError as error:
        raise ModelError(f"config.json: ps_version is {value!r}, neither 'v1' nor 'v2'") from error


def _llm_size(config: Mapping[str, Any], key: str) -> int:
    return _count(f"{key}.hidden_size", _section(config, key).get("hidden_size", LLM_DEFAULT_HIDDEN_SIZE))


def _tile_size(config: Mapping[str, Any], vision: VisionConfig) -> int:
    size = _count("force_image_size", config.get("force_image_size") or vision.image_size)
    if size % (2 * PATCH_SIZE):
        raise ModelError(f"config.json: force_image_size {size} is not a multiple of {2 * PATCH_SIZE}")
    return size


def _normalisation(
    preprocessor: Mapping[str, Any],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean = _triple("image_mean", preprocessor.get("image_mean", list(IMAGENET_MEAN)))
    std = _triple("image_std", preprocessor.get("image_std", list(IMAGENET_STD)))
    if min(std) <= 0:
        raise ModelError(f"preprocessor_config.json: image_std is {list(std)}; all must be above 0")
    return mean, std


def _triple(key: str, value: object) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(_is_number(item) for item in value):
        raise ModelError(f"preprocessor_config.json: {key} is {value!r}, not three numbers")
    red, green, blue = value
    return float(red), float(green), float(blue)
