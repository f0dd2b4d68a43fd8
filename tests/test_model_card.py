"""Configs in every published layout become one card; nonsense is refused by the key's name."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import FAMILIES, LAYOUTS, reference_card, tiny_card

from internvit_cli.config import Pool, Tokens
from internvit_cli.errors import InternvitError, ModelError, UsageError
from internvit_cli.model.card import ModelCard, feature_shapes
from internvit_cli.model.catalog import describe_model


def official(**changes):
    return {"model_type": "intern_vit_6b", "hidden_size": 64, "num_attention_heads": 2, **changes}


def chat(**changes):
    return {"model_type": "internvl_chat", "vision_config": official(), "llm_config": {"hidden_size": 48}, **changes}


def native(**changes):
    vision = {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]}
    return {"model_type": "internvl", "vision_config": vision, "text_config": {"hidden_size": 48}, **changes}


def card(config, preprocessor=None) -> ModelCard:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        if preprocessor is not None:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return describe_model(folder)


def test_a_missing_norm_type_is_rms_norm_for_the_official_code_and_layer_norm_for_transformers():
    assert card(official()).vision.norm == "rms_norm"
    assert card(native()).vision.norm == "layer_norm"


def test_an_almost_empty_config_has_the_defaults_of_the_class_that_wrote_it():
    ours, theirs = card({"model_type": "intern_vit_6b"}).vision, card({"model_type": "internvl_vision"}).vision
    assert (ours.hidden_size, ours.num_layers, ours.num_heads, ours.mlp_size) == (3200, 48, 25, 12800)
    assert (ours.image_size, ours.qkv_bias, ours.qk_norm) == (224, False, True)
    assert (theirs.hidden_size, theirs.num_layers, theirs.num_heads, theirs.mlp_size) == (1024, 24, 16, 4096)
    assert (theirs.image_size, theirs.qkv_bias, theirs.qk_norm) == (448, False, False)


def test_renamed_keys_and_lists_of_two_mean_the_same():
    config = native()
    config["vision_config"] |= {"attention_bias": True, "use_qk_norm": True}
    vision = card(config).vision
    assert (vision.image_size, vision.patch_size, vision.qkv_bias, vision.qk_norm) == (448, 14, True, True)


def test_unknown_keys_are_ignored():
    assert card(official(num_experts=8, moe_coeff_ratio=0.5)).vision == card(official()).vision


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_of_one_model_have_the_same_tower(family):
    towers = {reference_card(family, layout).vision for layout in LAYOUTS}
    assert len(towers) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", 65),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 1.5),
        ("intermediate_size", 1 << 40),
        ("image_size", [448, 224]),
        ("image_size", [448]),
        ("image_size", 450),
        ("patch_size", 16),
        ("qkv_bias", 1),
        ("qk_normalization", "yes"),
        ("norm_type", "batch_norm"),
        ("layer_norm_eps", math.nan),
        ("layer_norm_eps", -1e-6),
        ("layer_norm_eps", "tiny"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("num_channels", 4),
    ],
)
def test_a_nonsensical_value_is_refused_by_its_key(key, value):
    with pytest.raises(ModelError, match=key):
        card(official(**{key: value}))


def test_only_internvit_configs_are_taken():
    with pytest.raises(ModelError, match="clip_vision_model"):
        card({"model_type": "clip_vision_model"})
    with pytest.raises(ModelError, match="model_type is 'qwen2'"):
        card({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    with pytest.raises(ModelError, match="vision_config is 'x', not an object"):
        card(chat(vision_config="x"))


def test_other_unshuffle_ratios_are_refused():
    with pytest.raises(ModelError, match=r"downsample_ratio is 0\.25"):
        card(chat(downsample_ratio=0.25))


def test_adapters_that_were_merged_leave_a_mark_in_the_config_that_means_nothing():
    assert card(chat(use_backbone_lora=16)).vision == card(chat()).vision


def test_token_order_is_the_chat_configs_and_v1_where_that_says_nothing():
    assert card(chat()).token_order == "v1"
    assert card(chat(ps_version="v2")).token_order == "v2"
    assert card(native()).token_order == card(official()).token_order == "v2"
    with pytest.raises(ModelError, match="ps_version"):
        card(chat(ps_version="v3"))


def test_projector_size_is_the_language_models():
    assert card(chat()).projector_size == card(native()).projector_size == 48
    assert card(official()).projector_size is None
    assert card(chat(llm_config={})).projector_size == 4096


def test_tile_size_is_the_chat_configs_when_it_forces_one():
    assert card(chat(force_image_size=448)).tile_size == 448
    assert card(chat()).tile_size == 224
    with pytest.raises(ModelError, match="force_image_size"):
        card(chat(force_image_size=100))


def test_normalization_is_the_preprocessors_or_imagenets():
    assert card(official()).mean == (0.485, 0.456, 0.406)
    assert card(official(), {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [[0.5, 0.5], [0, 0.5, 0.5], [math.inf, 1, 1], "0.5", [True, 1, 1]])
def test_a_nonsensical_standard_deviation_is_refused(value):
    with pytest.raises(ModelError, match="image_std"):
        card(official(), {"image_std": value})


def test_layers_count_hidden_states_so_minus_one_is_all_blocks_and_zero_the_embeddings():
    model = card(official(num_hidden_layers=24))
    assert [model.resolve_layer(layer) for layer in (None, -1, -2, 24, 1, 0, -25)] == [24, 24, 23, 24, 1, 0, 0]


@pytest.mark.parametrize("layer", [25, -26])
def test_a_layer_out_of_range_is_a_usage_error(layer):
    with pytest.raises(UsageError, match="24 blocks"):
        card(official(num_hidden_layers=24)).resolve_layer(layer)


def test_auto_layer_is_the_checkpoints_choice_then_minus_four_for_48_blocks():
    assert card(official(num_hidden_layers=48)).resolve_layer() == 45
    assert card(official(num_hidden_layers=45)).resolve_layer() == 45
    assert card(chat(select_layer=-2)).resolve_layer() == 47
    assert card(chat(select_layer=-1)).resolve_layer() == 48
    assert card(native(vision_feature_layer=-3)).resolve_layer() == 22


def test_a_broken_layer_choice_of_the_checkpoint_is_a_model_error():
    with pytest.raises(ModelError, match="feature layer 99"):
        card(chat(select_layer=99)).resolve_layer()
    with pytest.raises(ModelError, match="vision_feature_layer"):
        card(native(vision_feature_layer=[-1, -2]))


@pytest.mark.parametrize(
    ("tokens", "pool", "size", "shapes"),
    [
        (Tokens.VISUAL, Pool.MEAN, 448, (256, 256, 64)),
        (Tokens.PATCH, Pool.CLS, 448, (1024, 64, 64)),
        (Tokens.PATCH, Pool.CLS, 42, (9, 64, 64)),
        (Tokens.NONE, Pool.CLS_MEAN, 448, (0, 0, 128)),
    ],
)
def test_feature_shapes_follow_from_the_card(tokens, pool, size, shapes):
    assert feature_shapes(tiny_card(), tokens, pool, size) == shapes


def test_projected_tokens_have_the_projectors_size():
    assert feature_shapes(card(chat()), Tokens.PROJECTED, Pool.MEAN, 448) == (256, 48, 64)


def test_projected_tokens_need_a_projector():
    with pytest.raises(UsageError, match="no projector"):
        feature_shapes(tiny_card(), Tokens.PROJECTED, Pool.MEAN, 448)


@pytest.mark.parametrize(("tokens", "size"), [(Tokens.VISUAL, 42), (Tokens.PATCH, 20), (Tokens.NONE, 0)])
def test_a_tile_that_leaves_half_a_token_is_a_usage_error(tokens, size):
    with pytest.raises(UsageError, match="multiple of"):
        feature_shapes(tiny_card(), tokens, Pool.MEAN, size)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*official(), *chat(), *native(), "num_hidden_layers", "image_size", "qkv_bias", "norm_type", "architectures"]
KEYS += [
    "architecture",
    "model_args",
    "pretrained_cfg",
    "mm_vision_tower",
    "select_layer",
    "force_image_size",
    "ps_version",
]
PIXEL_KEYS = [
    "image_mean",
    "image_std",
    "rescale_factor",
    "do_normalize",
    "do_rescale",
    "resample",
    "image_processor_type",
]


@given(
    st.sampled_from([official, chat, native]),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), json_values, max_size=4),
    st.dictionaries(st.sampled_from(PIXEL_KEYS), json_values, max_size=3),
    st.booleans(),
)
def test_whatever_a_config_says_it_is_a_card_or_one_bounded_line(kind, changes, pixels, inside):
    config = kind()
    if inside and "vision_config" in config:
        config["vision_config"] |= changes
    else:
        config |= changes
    try:
        found = card(config, pixels)
    except InternvitError as error:
        assert "\n" not in error.message and len(error.message) < 500
    else:
        assert all(map(math.isfinite, (*found.mean, *found.std, found.normalization.rescale_factor)))
        assert found.vision.num_layers <= 256
