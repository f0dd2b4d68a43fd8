"""Read what a config.json in any published layout says about the vision tower and the parts after it.

Sources, as in docs/model.md: OpenGVLab's configuration_intern_vit.py and configuration_internvl_chat.py, which NVLM-D,
H2OVL-Mississippi, Skywork-R1V and Sa2VA follow; and transformers' InternVLVisionConfig and InternVLConfig, which
Intern-S1 follows. The latter rename some keys, and leave out those with their default value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import PATCH_SIZE, TokenOrder
from internvit_cli.errors import ModelError
from internvit_cli.model.card import Norm, VisionConfig
from internvit_cli.model.json_files import short_repr
from internvit_cli.model.kinds import first_internvl_refusal, kind_of_tower, name_of_tower
from internvit_cli.model.pixels import is_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LLM_DEFAULT_HIDDEN_SIZE = 4096
"""The default of Llama, Qwen2, Qwen3 and InternLM2, which transformers leaves out of a saved config."""

MOST_LAYERS = 256
MOST_HEADS = 1024
MOST_HIDDEN = 1 << 16
MOST_MLP = 1 << 18
MOST_SIDE = 512 * PATCH_SIZE
"""Limits several times above any InternViT, because a made-up config could ask for all memory."""

TIMM_PREFIX = "vit_intern"
"""Prefix of timm's names of InternViT, such as vit_intern300m_patch14_448."""

_OFFICIAL_TYPES = ("intern_vit", "internvit")
_NATIVE_TYPES = ("internvl_vision", "interns1_vision")
_CLASSES = ("InternVisionModel", "InternVLVisionModel", "InternS1VisionModel")
_OFFICIAL_KEYS = frozenset({"qkv_bias", "qk_normalization"})
_NATIVE_KEYS = frozenset({"attention_bias", "use_qk_norm"})
_SECTIONS = ("vision_config", "llm_config", "text_config")
_DEEPEST = 4

# A missing key has the default of the class that wrote the config; the two classes disagree (docs/model.md).
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
class ConfigDescription:
    """What a config.json says about a model."""

    vision: VisionConfig | None
    """The tower; None if the config does not describe it, and the tensors have to."""
    heads: int | None
    """Attention heads of a tower that the tensors describe, because no shape depends on them."""
    select_layer: int | None
    token_order: TokenOrder
    projector_size: int | None
    tile_size: int | None
    """Side of a tile in pixels; None means the tower's own size."""
    timm: str = ""
    """The architecture, if timm wrote the config."""


NOTHING = ConfigDescription(None, None, None, TokenOrder.V2, None, None)
"""The description of a checkpoint without a config."""


def describe_config(config: Mapping[str, Any]) -> ConfigDescription:
    """Return what a config.json says, in any layout.

    Raises:
        ModelError: The config describes another model, or has an invalid value, which the message names.
    """
    _check_words(config)
    if "qllama_config" in config:
        raise first_internvl_refusal("config.json", "qllama_config")
    if looks_like_tower(config):
        native = _is_native(config)
        vision = vision_config(config, native=native)
        return ConfigDescription(vision, None, _layer(config), TokenOrder.V2, None, None)
    towers: list[Mapping[str, Any]] = []
    for tower in _towers_within(config, _DEEPEST):
        if tower not in towers:  # some configs contain it twice
            towers.append(tower)
    if len(towers) == 1:
        return _describe_whole(config, towers[0])
    if towers:
        raise ModelError(
            f"config.json: it describes {len(towers)} InternViT towers", "name a checkpoint with one of them"
        )
    return _describe_without_tower(config)


def _describe_whole(config: Mapping[str, Any], tower: Mapping[str, Any]) -> ConfigDescription:
    """Describe a model that contains a tower."""
    native = _is_native(tower)
    ratio = config.get("downsample_ratio", 0.5)
    if ratio != 0.5:
        raise ModelError(f"config.json: downsample_ratio is {short_repr(ratio)}; only 0.5 is supported")
    vision = vision_config(tower, native=native)
    return ConfigDescription(
        vision=vision,
        heads=None,
        select_layer=_layer(config),
        token_order=TokenOrder.V2 if native else _token_order(config),
        projector_size=_llm_size(config),
        tile_size=_forced_size(config),
    )


def _describe_without_tower(config: Mapping[str, Any]) -> ConfigDescription:
    """Describe a config without an InternViT: either the tensors describe the tower, or it is another model."""
    architecture = config.get("architecture")
    if isinstance(architecture, str):
        if not architecture.startswith(TIMM_PREFIX):
            raise ModelError(
                f"config.json: timm's {architecture[:80]} is not an InternViT", "name a checkpoint of vit_intern300m"
            )
        own = config.get("model_args")
        heads = own.get("num_heads") if isinstance(own, dict) else None
        return ConfigDescription(None, _heads(heads), None, TokenOrder.V2, None, None, timm=architecture)
    other = config.get("vision_config")
    if isinstance(other, dict):
        raise ModelError(
            f"config.json: the vision tower is {name_of_tower(other)}, not an InternViT",
            "name an InternViT, or a model that contains one",
        )
    if "mm_vision_tower" in config:  # a key of LLaVA's code, with which the first InternVL models were trained
        named = config["mm_vision_tower"]
        if isinstance(named, str) and "intern" not in named.casefold() and (kind := kind_of_tower(named)):
            raise ModelError(
                f"config.json: the vision tower is {kind} ({named[:80]}), not an InternViT",
                "name an InternViT, or a model that contains one",
            )
        layer = config.get("mm_vision_select_layer")
        return ConfigDescription(None, None, _whole_number("mm_vision_select_layer", layer), TokenOrder.V2, None, None)
    model_type = config.get("model_type")
    if model_type is None and "architectures" not in config:
        return ConfigDescription(None, _heads(config.get("num_attention_heads")), None, TokenOrder.V2, None, None)
    if other is not None:
        raise ModelError(
            f"config.json: vision_config is {short_repr(other)}, not an object", "download the model again"
        )
    said = f"model_type is {model_type!r}" if model_type else f"architectures is {str(config['architectures'])[:80]}"
    kind = kind_of_tower(str(model_type)) or ""
    raise ModelError(
        f"config.json: {said}{kind and f' ({kind})'}, which neither is nor contains an InternViT",
        "name a checkpoint whose model_type is intern_vit_6b, internvl_chat, internvl or internvl_vision, "
        "or another model that contains an InternViT",
    )


def looks_like_tower(section: Mapping[str, Any]) -> bool:
    """Return whether a part of a config describes an InternViT, by its type, its class, or its special keys."""
    model_type = section.get("model_type")
    if isinstance(model_type, str) and (
        model_type in _NATIVE_TYPES or model_type.casefold().startswith(_OFFICIAL_TYPES)
    ):
        return True
    classes = section.get("architectures")
    if isinstance(classes, list) and any(name in _CLASSES for name in classes if isinstance(name, str)):
        return True
    keys = section.keys()
    return keys >= _OFFICIAL_KEYS or ("norm_type" in keys and keys >= _NATIVE_KEYS)


def _is_native(section: Mapping[str, Any]) -> bool:
    """Return whether the keys of a tower have transformers' names and defaults."""
    if _OFFICIAL_KEYS & section.keys():
        return False
    return section.get("model_type") in _NATIVE_TYPES or bool(_NATIVE_KEYS & section.keys())


def _towers_within(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a config that describe an InternViT."""
    for value in config.values():
        if not isinstance(value, dict):
            continue
        if looks_like_tower(value):
            yield value
        elif depth > 1:
            yield from _towers_within(value, depth - 1)


def _check_words(config: Mapping[str, Any]) -> None:
    """Refuse a model_type that is not a string."""
    sections = [("", config)] + [(f"{key}.", config[key]) for key in _SECTIONS if isinstance(config.get(key), dict)]
    for prefix, section in sections:
        model_type = section.get("model_type")
        if model_type is not None and not isinstance(model_type, str):
            raise ModelError(f"config.json: {prefix}model_type is {short_repr(model_type)}, not a string")


def vision_config(raw: Mapping[str, Any], *, native: bool) -> VisionConfig:
    """Return the tower that a part of a config.json describes.

    Args:
        raw: Its keys and values; unknown keys are ignored.
        native: True for transformers' own names and defaults, False for those of the official code.

    Raises:
        ModelError: A value is impossible for an InternViT; the message names its key.
    """
    keys = _Keys(raw, native=native)
    for key, only in (("hidden_act", "gelu"), ("num_channels", 3)):
        if raw.get(key, only) != only:
            raise ModelError(f"config.json: {key} is {short_repr(raw[key])}; only {only!r} is an InternViT")
    return checked_vision_config(
        VisionConfig(
            hidden_size=keys.count("hidden_size", MOST_HIDDEN),
            num_layers=keys.count("num_hidden_layers", MOST_LAYERS),
            num_heads=keys.count("num_attention_heads", MOST_HEADS),
            mlp_size=keys.count("intermediate_size", MOST_MLP),
            image_size=keys.side("image_size"),
            patch_size=keys.side("patch_size"),
            qkv_bias=keys.flag("qkv_bias"),
            qk_norm=keys.flag("qk_normalization"),
            norm=keys.norm("norm_type"),
            eps=keys.positive("layer_norm_eps"),
        )
    )


def checked_vision_config(vision: VisionConfig) -> VisionConfig:
    """Return the shape of a tower if it is consistent.

    Raises:
        ModelError: The numbers contradict each other.
    """
    if vision.patch_size != PATCH_SIZE:
        raise ModelError(f"config.json: patch_size is {vision.patch_size}; every InternViT has {PATCH_SIZE}")
    if vision.hidden_size % vision.num_heads:
        raise ModelError(
            f"config.json: hidden_size {vision.hidden_size} does not divide into {vision.num_heads} attention heads"
        )
    if vision.image_size % vision.patch_size:
        raise ModelError(f"config.json: image_size {vision.image_size} is not a multiple of {vision.patch_size}")
    return vision


class _Keys:
    """Typed access to the values of a config with either naming; every error names the key as it was written."""

    def __init__(self, raw: Mapping[str, Any], *, native: bool) -> None:
        self._raw = raw
        self._names = _NATIVE_NAMES if native else {}
        self._defaults: Mapping[str, Any] = _NATIVE_DEFAULTS if native else _OFFICIAL_DEFAULTS

    def _get(self, key: str) -> tuple[str, Any]:
        name = self._names.get(key, key)
        value = self._raw.get(name)
        return name, self._defaults[key] if value is None else value

    def count(self, key: str, most: int) -> int:
        name, value = self._get(key)
        return _count(name, value, most)

    def side(self, key: str) -> int:
        """Return a side in pixels, which transformers writes as a list of two."""
        name, value = self._get(key)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise ModelError(f"config.json: {name} is {short_repr(value)}; only squares are supported")
            value = value[0]
        return _count(name, value, MOST_SIDE)

    def flag(self, key: str) -> bool:
        name, value = self._get(key)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {name} is {short_repr(value)}, not true or false")
        return value

    def norm(self, key: str) -> Norm:
        name, value = self._get(key)
        if value == "layer_norm":
            return "layer_norm"
        if value == "rms_norm":
            return "rms_norm"
        raise ModelError(f"config.json: {name} is {short_repr(value)}, neither 'rms_norm' nor 'layer_norm'")

    def positive(self, key: str) -> float:
        name, value = self._get(key)
        if not is_number(value) or not 0 < value < 1:
            raise ModelError(f"config.json: {name} is {short_repr(value)}, not a small positive number")
        return float(value)


def _count(name: str, value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(f"config.json: {name} is {short_repr(value)}, not a whole number from 1 to {most}")
    return value


def _heads(value: Any) -> int | None:
    return None if value is None else _count("num_heads", value, MOST_HEADS)


def _whole_number(name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or abs(value) > MOST_LAYERS):
        raise ModelError(f"config.json: {name} is {short_repr(value)}, not one whole number")
    return value


def _layer(config: Mapping[str, Any]) -> int | None:
    """Return the checkpoint's own feature layer, which has one of two names."""
    name = "select_layer" if config.get("select_layer") is not None else "vision_feature_layer"
    return _whole_number(name, config.get(name))


def _token_order(config: Mapping[str, Any]) -> TokenOrder:
    value = config.get("ps_version", "v1")  # the default of the chat code if the key is absent
    try:
        return TokenOrder(value)
    except ValueError as error:
        raise ModelError(f"config.json: ps_version is {short_repr(value)}, neither 'v1' nor 'v2'") from error


def _llm_size(config: Mapping[str, Any]) -> int | None:
    """Return the size of a projected token, which is that of the language model; None if there is none."""
    for key in ("llm_config", "text_config"):
        section = config.get(key)
        if isinstance(section, dict):
            return _count(f"{key}.hidden_size", section.get("hidden_size", LLM_DEFAULT_HIDDEN_SIZE), MOST_HIDDEN)
    return None


def _forced_size(config: Mapping[str, Any]) -> int | None:
    forced = config.get("force_image_size")
    if not forced:
        return None
    size = _count("force_image_size", forced, MOST_SIDE)
    if size % (2 * PATCH_SIZE):
        raise ModelError(f"config.json: force_image_size {size} is not a multiple of {2 * PATCH_SIZE}")
    return size
