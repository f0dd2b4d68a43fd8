"""The network against the official code's outputs and against transformers' own class."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from folders import REFERENCE
from model_helpers import (
    FAMILIES,
    LAYOUTS,
    open_all,
    random_checkpoint,
    random_tiles,
    reference_card,
    relative_error,
    tiny_card,
)
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvit_cli.config import TokenOrder
from internvit_cli.model.catalog import KNOWN_MODELS
from internvit_cli.model.loading import load_projector, load_vit, read_tensor
from internvit_cli.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from internvit_cli.model.vit import (
    Embeddings,
    InternViT,
    TileEmbedding,
    attend_by_head,
    attend_fused,
    best_attention,
    pixel_unshuffle,
)

if TYPE_CHECKING:
    from internvit_cli.model.card import VisionConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def expected(family):
    return np.load(REFERENCE / f"{family}-expected.npz")


def native_model(checkpoint) -> InternVLVisionModel:
    """InternVLVisionModel with the same weights: an independent implementation of the same network."""
    vision = checkpoint.card.vision
    model = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=checkpoint.blocks,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_size,
            image_size=[vision.image_size] * 2,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type=vision.norm,
            layer_norm_eps=vision.eps,
        )
    )
    names = {"class_embedding": "cls_token", "position_embedding": "position_embeddings", ".ls": ".lambda_"}
    names |= {"patch_embedding.": "patch_embeddings.projection.", "encoder.layers.": "encoder.layer."}
    names |= {".attn.proj.": ".attention.projection_layer.", ".attn.": ".attention."}
    names |= {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after."}
    state = {}
    for name in checkpoint.weights:
        tensor = read_tensor(checkpoint, name, CPU, torch.float32)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            state[name] = tensor
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_reproduces_the_official_codes_hidden_states(family, layout):
    golden, card = expected(family), reference_card(family, layout)
    pixels = torch.from_numpy(golden["pixel_values"])
    hidden = load_vit(open_all(card), device=CPU, dtype=torch.float32)(pixels)
    before_last = load_vit(open_all(card, -2), device=CPU, dtype=torch.float32)(pixels)
    assert relative_error(hidden, golden["last_hidden_state"]) < 1e-5
    assert relative_error(hidden[:, 0], golden["pooler_output"]) < 1e-5
    assert relative_error(before_last, golden["hidden_states_minus_2"]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_one_pass_is_the_official_codes_hidden_state(family, layout):
    """The official code's own outputs, and for the layers that those lack, transformers' on the same weights."""
    golden, card = expected(family), reference_card(family, layout)
    pixels, blocks = torch.from_numpy(golden["pixel_values"]), card.vision.num_layers
    checkpoint = open_all(card, -1)
    model = load_vit(checkpoint, device=CPU, dtype=torch.float32, earlier_layers=tuple(range(blocks)))
    last, *earlier = model.hidden_states(pixels)
    assert relative_error(last, golden["last_hidden_state"]) < 1e-5
    assert relative_error(earlier[-1], golden["hidden_states_minus_2"]) < 1e-5
    theirs = native_model(checkpoint)(pixels, output_hidden_states=True).hidden_states
    assert len(theirs) == blocks + 1
    for ours, state in zip((*earlier, last), theirs, strict=True):
        assert relative_error(ours, state) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rectangle_of_another_size_reproduces_the_official_codes_position_table(family, layout):
    golden = expected(family)
    model = load_vit(open_all(reference_card(family, layout)), device=CPU, dtype=torch.float32)
    hidden = model(torch.from_numpy(golden["other_size_pixel_values"]))
    assert relative_error(hidden, golden["other_size_last_hidden_state"]) < 1e-5


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_projector_reproduces_the_official_codes_projected_tokens(family, layout):
    golden = expected(family)
    checkpoint = open_all(reference_card(family, layout), projector=True)
    hidden = load_vit(checkpoint, device=CPU, dtype=torch.float32)(torch.from_numpy(golden["pixel_values"]))
    tokens = load_projector(checkpoint, device=CPU, dtype=torch.float32)(pixel_unshuffle(hidden[:, 1:], TokenOrder.V2))
    assert relative_error(tokens, golden["projected"]) < 1e-5


@pytest.mark.parametrize("order", [TokenOrder.V1, TokenOrder.V2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unshuffle_is_the_official_codes_bit_for_bit(family, order):
    golden = expected(family)
    patches = torch.from_numpy(golden["last_hidden_state"])[:, 1:]
    assert np.array_equal(pixel_unshuffle(patches, order), golden[f"pixel_shuffle_{order.value}"])


@pytest.mark.parametrize("patches", [9, 15])
def test_only_squares_of_even_sides_unshuffle(patches):
    with pytest.raises(ValueError, match="unshuffle"):
        pixel_unshuffle(torch.zeros(1, patches, 4), TokenOrder.V2)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_class_with_the_reference_weights_agrees(family):
    golden, card = expected(family), reference_card(family, "hf")
    whole = open_all(card)
    pixels = torch.from_numpy(golden["pixel_values"])
    mine = load_vit(whole, device=CPU, dtype=torch.float32)(pixels)
    assert relative_error(mine, native_model(whole)(pixels).last_hidden_state) < 1e-5


@pytest.mark.parametrize("model", [KNOWN_MODELS[0], KNOWN_MODELS[2]], ids=["300m", "6b"])
def test_one_block_of_the_real_shape_agrees_with_transformers(model):
    """The 300M at its full width and size; the 6B at half its width and 224 px, to stay quick."""
    vision = replace(model.vision, num_layers=1)
    if vision.qk_norm:
        vision = replace(vision, hidden_size=1600, num_heads=25, mlp_size=3200, image_size=224)
    card = replace(tiny_card(), vision=vision, tile_size=vision.image_size)
    checkpoint = random_checkpoint(card, 1)
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, vision.image_size, vision.image_size)))
    mine = load_vit(checkpoint, device=CPU, dtype=torch.float32)(pixels.float())
    assert relative_error(mine, native_model(checkpoint)(pixels.float()).last_hidden_state) < 1e-5


def test_the_position_table_is_itself_at_its_own_size_and_bicubic_elsewhere():
    embeddings = Embeddings(tiny_card().vision)  # 4 x 4 patches
    embeddings.position_embedding.normal_()
    assert torch.equal(embeddings.position_table(4, 4), embeddings.position_embedding)
    resized = embeddings.position_table(2, 6)
    assert resized.shape == (1, 13, 64)
    assert torch.equal(resized[:, 0], embeddings.position_embedding[:, 0])


def test_pixels_that_do_not_divide_into_patches_are_refused():
    model = load_vit(random_checkpoint(tiny_card(), 1), device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="patches of 14"):
        model(torch.zeros(1, 3, 56, 60))


@pytest.mark.parametrize("size", [28, 56, 84])
def test_bytes_give_what_normalized_pixels_give(size):
    """Folding mean, std and biases into the patch weights changes nothing but the last bits."""
    card = tiny_card()
    vit = load_vit(random_checkpoint(card, 1), device=CPU, dtype=torch.float32)
    fold = TileEmbedding(vit.embeddings, normalization=card.normalization, tile_size=size, dtype=torch.float32)
    tiles = torch.from_numpy(np.stack(random_tiles(3, size)))
    pixels = tiles.permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    assert relative_error(fold(tiles), vit.embeddings(pixels)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_attention_agree_and_the_choice_is_one_of_them(dtype):
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    error = relative_error(attend_by_head(q, k, v).float(), attend_fused(q, k, v).float())
    assert error < (1e-6 if dtype is torch.float32 else 0.02)
    assert best_attention(CPU, dtype) in {attend_by_head, attend_fused}


def test_bfloat16_stays_close_to_float32():
    checkpoint = random_checkpoint(tiny_card(num_layers=6), 6)
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    exact, rounded = (
        load_vit(checkpoint, device=CPU, dtype=dtype)(pixels).float() for dtype in (torch.float32, torch.bfloat16)
    )
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    assert float(torch.cosine_similarity(rounded, exact, dim=-1).min()) > 0.999


def test_weights_are_read_in_the_wanted_type_and_only_for_the_blocks_that_run():
    checkpoint = random_checkpoint(tiny_card(), 1)
    model = load_vit(checkpoint, device=CPU, dtype=torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in types.items() if name.startswith("encoder.")} == {torch.bfloat16}
    assert set(types) == set(checkpoint.weights)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=lambda model: model.repo.rpartition("/")[2])
def test_parameter_counts_are_the_published_ones(model):
    published = {(48, 224): 5_902_793_600, (48, 448): 5_905_251_200, (45, 448): 5_536_496_000, (24, 448): 304_012_288}
    vision: VisionConfig = model.vision
    with torch.device("meta"):
        tower = InternViT(vision, blocks=vision.num_layers)
    count = sum(math.prod(parameter.shape) for parameter in tower.parameters())
    assert count == published[vision.num_layers, vision.image_size]
