"""Towers in every layout that people have give the tensors of the published one; what is refused is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from folders import REFERENCE
from model_helpers import open_all, reference_card, relative_error, safetensors_bytes
from safetensors.numpy import load_file, save_file

from internvit_cli.errors import ModelError
from internvit_cli.model.catalog import KNOWN_MODELS, describe_model, known_card
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.layouts import expected_shapes
from internvit_cli.model.loading import load_vit
from internvit_cli.model.shapes import PUBLISHED_HEADS

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, np.ndarray]
Rename = Callable[[str], str]

STANDALONE = {
    "model_type": "intern_vit_6b",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 28,
}


def to_timm(name: str) -> str:
    for pattern, replacement in (
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.position_embedding$", "pos_embed"),
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^encoder\.layers\.", "blocks."),
        (r"\.(ls[12])$", r".\1.gamma"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def prefixed(prefix: str) -> Rename:
    return lambda name: prefix + name


def compiled_by_block(name: str) -> str:
    return re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", "_orig_mod." + name)


def sharded_by_module(name: str) -> str:
    name = re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module._fsdp_wrapped_module.", name)
    return "_fsdp_wrapped_module.vision_model." + name


LAYOUTS: dict[str, Rename] = {
    "timm": to_timm,
    "timm in a module": lambda name: "backbone." + to_timm(name),
    **{
        prefix: prefixed(prefix)
        for prefix in (
            "vision_model.",
            "model.vision_model.",
            "module.",
            "module.module.vision_model.",
            "_orig_mod.",
            "_orig_mod.vision_model.",
            "model.vision_tower.vision_tower.",
            "base_model.model.vision_model.",
            "vision_model.base_model.model.",
            "mllm.model.vision_model.",
            "any.thing.that.nobody.thought.of.",
        )
    },
    "compiled by block": compiled_by_block,
    "sharded by module": sharded_by_module,
}


def write(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> str:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: np.require(array, requirements="C") for name, array in tensors.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def reference(family: str, layout: str = "standalone") -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config of a golden checkpoint."""
    folder = REFERENCE / f"{family}-{layout}"
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "config.json").read_text())


def small(folder: Path, **changes: Any) -> Tensors:
    """Random tensors of a small tower of the 6B family."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STANDALONE | changes))
    shapes = expected_shapes(describe_model(str(folder)).vision, 2, None)
    (folder / "config.json").unlink()
    generator = np.random.default_rng(0)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def refusal(path: str, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_all(describe_model(path), **options)
    assert "\n" not in caught.value.message + caught.value.hint
    assert path in caught.value.message
    return caught.value


# ------------------------------------------------------------------------------------------------------ names, prefixes


@pytest.mark.parametrize("family", ["300m", "6b"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_renaming_of_a_golden_checkpoint_holds_the_same_tensors(tmp_path, family, layout):
    tensors, config = reference(family)
    renamed = {LAYOUTS[layout](name): array for name, array in tensors.items()}
    digest = open_all(describe_model(write(tmp_path / "m", renamed, config))).digest()
    assert digest == open_all(reference_card(family, "standalone")).digest()


@pytest.mark.parametrize(
    "prefix", ["model.vision_tower.", "model.model.vision_tower.", "base_model.model.vision_tower."]
)
def test_transformers_names_are_found_behind_any_prefix(tmp_path, prefix):
    tensors, config = reference("6b", "hf")
    renamed = {
        name.replace("vision_tower.", prefix).replace("multi_modal_projector.", "model.multi_modal_projector."): array
        for name, array in tensors.items()
    }
    card = describe_model(write(tmp_path / "m", renamed, config))
    original = reference_card("6b", "hf")
    assert open_all(card, projector=True).digest() == open_all(original, projector=True).digest()


def test_a_second_tower_that_is_not_whole_is_no_tower(tmp_path):
    tensors = small(tmp_path / "m")
    other = {f"teacher.{name}": array for name, array in tensors.items() if ".1." not in name}
    sam = {"grounding_encoder.trunk.pos_embed": np.zeros((1, 2, 3), np.float32)}
    both = {f"vision_model.{name}": array for name, array in tensors.items()} | other | sam
    card = describe_model(write(tmp_path / "m", both, STANDALONE))
    Checkpoint.open(card, layer=1)  # though the other one has all that one block needs
    digest = open_all(card).digest()
    assert digest == open_all(describe_model(write(tmp_path / "n", tensors, STANDALONE))).digest()


def test_two_whole_towers_are_refused_by_their_prefixes(tmp_path):
    tensors = small(tmp_path / "m")
    both = {f"{prefix}.{name}": array for prefix in ("teacher", "student") for name, array in tensors.items()}
    for config in (STANDALONE, {"num_attention_heads": 2}):
        message = refusal(write(tmp_path / "m", both, config)).message
        assert "'student.'" in message and "'teacher.'" in message


def test_so_many_prefixes_are_no_model(tmp_path):
    names = {f"a{number}.cls_token": np.zeros(1, np.float32) for number in range(1000)}
    assert "1000 parts" in refusal(write(tmp_path / "m", names, STANDALONE)).message


# ------------------------------------------------------------------------------------------------------------- configs


def whole(model_type: str, vision: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, "vision_config": vision, **changes}


def as_model_of(family: str) -> dict[str, dict[str, Any]]:
    """Configs of models that have a golden tower in them, as their makers write them."""
    official = reference(family)[1]
    native = reference(family, "hf")[1]["vision_config"]
    chat = {"downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "llm_config": {"hidden_size": 48}}
    bare = {key: value for key, value in official.items() if key not in {"model_type", "architectures", "auto_map"}}
    return {
        "NVLM-D": whole("NVLM_D", official, architectures=["NVLM_D_Model"], **chat),
        "H2OVL": whole("h2ovl_chat", bare | {"model_type": "intern_vit_300m"}, **chat),
        "Skywork-R1V": whole("skywork_chat", bare | {"model_type": "skywork_vit"}, **chat),
        "Sa2VA": whole("sa2va_chat", official, architectures=["Sa2VAChatModel"], **chat),
        "Intern-S1": whole("interns1", native | {"model_type": "interns1_vision"}, text_config={"hidden_size": 48}),
        "a wrapper": {"model_type": "agent", "backbone": {"mllm": whole("internvl_chat", official, **chat)}},
        "no types at all": {"vision_config": bare},
        "said twice": whole("x", official, **chat) | {"copy": official},
        "a class alone": whole("x", bare | {"architectures": ["InternVisionModel"]}),
    }


MODELS = (
    "NVLM-D",
    "H2OVL",
    "Skywork-R1V",
    "Sa2VA",
    "Intern-S1",
    "a wrapper",
    "no types at all",
    "said twice",
    "a class alone",
)


@pytest.mark.parametrize("family", ["300m", "6b"])
@pytest.mark.parametrize("model", MODELS)
def test_a_config_with_an_internvit_in_it_is_taken_whosever_it_is(tmp_path, family, model):
    tensors, _ = reference(family, "hf" if model == "Intern-S1" else "chat")
    if model == "Intern-S1":
        tensors = {f"model.{name}": array for name, array in tensors.items()}
    card = describe_model(write(tmp_path / "m", tensors, as_model_of(family)[model]))
    original = reference_card(family, "standalone")
    assert card.vision == original.vision
    assert card.token_order == ("v1" if model in {"no types at all", "a class alone", "a wrapper"} else "v2")
    assert open_all(card).digest() == open_all(original).digest()
    if model in {"NVLM-D", "Intern-S1", "Sa2VA"}:
        assert card.projector_size == 48
        chat = open_all(reference_card(family, "chat"), projector=True)
        assert open_all(card, projector=True).digest() == chat.digest()


def test_a_projector_of_another_kind_is_refused_and_the_tower_still_serves(tmp_path):
    tensors, _ = reference("6b", "chat")
    without = {name: array for name, array in tensors.items() if not re.fullmatch(r"mlp1\.[13]\.bias", name)}
    path = write(tmp_path / "m", without, as_model_of("6b")["NVLM-D"])
    assert open_all(describe_model(path)).digest()
    error = refusal(path, projector=True)
    assert "not InternVL's" in error.message and "--tokens visual" in error.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (whole("internvl_chat", {"model_type": "siglip_vision_model"}), "SigLIP (siglip_vision_model)"),
        (whole("llava", {"model_type": "clip_vision_model"}), "CLIP (clip_vision_model)"),
        (whole("x", {"architectures": ["Dinov2Model"]}), "DINO (Dinov2Model)"),
        (whole("Llama_Nemotron_Nano_VL", {"auto_map": {}, "model_type": "radio"}), "RADIO"),
        (whole("qwen2_5_vl", {"hidden_size": 1280, "model_type": "qwen2_5_vl"}), "Qwen-VL"),
        (whole("x", {"hidden_size": 8}), "of no known kind"),
        ({"model_type": "siglip"}, "SigLIP"),
        ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14"}, "CLIP"),
        ({"architecture": "vit_base_patch14_dinov2", "pretrained_cfg": {}}, "timm's vit_base_patch14_dinov2"),
        (whole("internvl", {"model_type": "intern_vit_6b"}, qllama_config={}), "InternVL-C or InternVL-G"),
        ({"model_type": ["a"]}, "model_type is ['a']"),
        (whole(["a"], {"model_type": "intern_vit_6b"}), "model_type is ['a']"),  # type: ignore[arg-type]
        (whole("internvl_chat", {"model_type": [14, 14]}), "vision_config.model_type is [14, 14]"),
        ({"a": {"model_type": "intern_vit_6b"}, "b": {"model_type": "internvl_vision"}}, "2 InternViT"),
    ],
)
def test_a_config_of_another_model_is_refused_by_what_it_is(tmp_path, config, words):
    assert words in refusal(write(tmp_path / "m", {"x": np.zeros(1, np.float32)}, config)).message


# ----------------------------------------------------------------------------------------------------- without a config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_without_a_config_is_described_by_its_shapes(tmp_path, layout):
    tensors, _ = reference("300m")
    named = {LAYOUTS[layout](name): array for name, array in tensors.items()}
    card, original = (
        describe_model(write(tmp_path / "m", named, {"num_attention_heads": 4})),
        reference_card("300m", "standalone"),
    )
    assert card.vision == original.vision and "4 heads of 16" in card.notes[0]
    assert open_all(card).digest() == open_all(original).digest()


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_heads_that_show_in_no_shape_are_not_guessed(tmp_path, family):
    tensors, _ = reference(family)
    error = refusal(write(tmp_path / "m", tensors, None))
    assert "no shape gives the number of heads" in error.message
    assert '{"num_attention_heads": 16}' in error.hint


def test_a_checkpoint_of_timm_is_described_by_its_shapes_and_normalized_as_it_says(tmp_path):
    tensors, _ = reference("300m")
    head = {"head.weight": np.zeros((10, 64), np.float32), "head.bias": np.zeros(10, np.float32)}
    config = {
        "architecture": "vit_intern300m_patch14_448",
        "num_classes": 10,
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "tag": "ogvl_2pt5"},
    }
    config["model_args"] = {"num_heads": 4}
    path = write(tmp_path / "m", {to_timm(name): array for name, array in tensors.items()} | head, config)
    card = describe_model(path)
    assert card.vision.num_heads == 4
    assert (card.mean, card.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert open_all(card).digest() == open_all(reference_card("300m", "standalone")).digest()


def test_heads_of_a_published_size_are_known(tmp_path):
    changes = {"hidden_size": 1024, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
    tensors = small(tmp_path / "m", **changes)
    card = describe_model(write(tmp_path / "m", tensors, None))
    expected = {"num_heads": 16, "num_layers": 2, "mlp_size": 16, "image_size": 28, **changes}
    expected["norm"], expected["qk_norm"] = expected.pop("norm_type"), expected.pop("qk_normalization")
    assert {name: getattr(card.vision, name) for name in expected} == expected


@pytest.mark.parametrize("model", [model for model in KNOWN_MODELS if model.aliases], ids=lambda model: model.repo)
def test_heads_of_every_published_model_are_those_of_its_size(model):
    vision = known_card(model).vision
    assert PUBLISHED_HEADS[vision.norm, vision.hidden_size] == vision.num_heads


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96}, "no published InternViT has"),
        (
            {"hidden_size": 128, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
            "no published",
        ),
        ({"hidden_size": 128, "norm_type": "layer_norm"}, "fit neither family"),
        ({"hidden_size": 128, "qkv_bias": True}, "fit neither family"),
    ],
)
def test_heads_that_nothing_decides_are_asked_for(tmp_path, changes, words):
    error = refusal(write(tmp_path / "m", small(tmp_path / "m", **changes), None))
    assert words in error.message and "num_attention_heads" in error.hint


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("embeddings.position_embedding", (1, 4, 8), "not fit a square picture"),
        ("embeddings.position_embedding", (5, 8), "not fit a square picture"),
        ("embeddings.class_embedding", (8,), "a class token"),
        ("embeddings.patch_embedding.weight", (8, 3, 16, 16), "patches"),
        ("embeddings.patch_embedding.bias", None, "'embeddings.patch_embedding.bias' is missing"),
        ("encoder.layers.0.attn.proj.bias", None, "attn.proj.bias' is missing"),
        ("encoder.layers.3.ls1", (8,), "blocks have gaps"),
        ("encoder.layers.0.mlp.fc1.weight", (), "mlp.fc1.weight"),
        ("encoder.layers.0.mlp.fc1.weight", (0, 8), "mlp.fc1.weight"),
        ("embeddings.class_embedding", (1, 1, 0), "a class token"),
        ("embeddings.patch_embedding.weight", (), "patches"),
    ],
)
def test_shapes_that_are_no_towers_are_refused_by_the_tensor(tmp_path, name, shape, words):
    tensors = small(tmp_path / "m")
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = np.zeros(shape, np.float32)
    assert words in refusal(write(tmp_path / "m", tensors, None)).message


# ------------------------------------------------------------------------------------------------------ what is refused


def without_weight(tensors: Tensors, name: str) -> Tensors:
    return {key: array for key, array in tensors.items() if key != name}


QKV = "encoder.layers.0.attn.qkv.weight"
ALTERED = {
    "bitsandbytes": {f"{QKV}.absmax": 4, f"{QKV}.quant_state.bitsandbytes__nf4": 4},
    "bitsandbytes ": {"encoder.layers.0.attn.qkv.SCB": 4},
    "AWQ or GPTQ": {"encoder.layers.0.attn.qkv.qweight": 4, "encoder.layers.0.attn.qkv.qzeros": 4},
    "GPTQ": {"encoder.layers.0.attn.qkv.g_idx": 4},
    "compressed-tensors": {"encoder.layers.0.attn.qkv.weight_packed": 4},
    "fp8": {f"{QKV}_scale": 1},
    "fp8 ": {f"{QKV}_scale_inv": 1},
    "LoRA": {"encoder.layers.0.attn.qkv.lora_A.default.weight": 4},
    "LoRA ": {"encoder.layers.0.attn.qkv.base_layer.weight": 4, "encoder.layers.0.attn.qkv.lora_B.weight": 4},
}


@pytest.mark.parametrize("kind", ALTERED)
@pytest.mark.parametrize("config", [STANDALONE, None], ids=["config", "no config"])
@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_model.base_model.model."])
def test_a_tower_that_was_altered_is_refused_by_who_altered_it(tmp_path, kind, config, prefix):
    tensors = small(tmp_path / "m")
    extra = {name: np.zeros(size, np.float32) for name, size in ALTERED[kind].items()}
    altered = without_weight(tensors, QKV) | extra
    error = refusal(write(tmp_path / "m", {prefix + name: array for name, array in altered.items()}, config))
    assert kind.strip() in error.message
    assert ("merge" if "LoRA" in kind else "original weights") in error.hint


@pytest.mark.parametrize("extra", ["qweight", "lora_A.default.weight", "weight.absmax"])
def test_an_altered_language_model_beside_a_plain_tower_does_no_harm(tmp_path, extra):
    tensors = {f"vision_model.{name}": array for name, array in small(tmp_path / "m").items()}
    tensors[f"language_model.model.layers.0.mlp.{extra}"] = np.zeros(4, np.float32)
    assert open_all(describe_model(write(tmp_path / "m", tensors, STANDALONE))).digest()


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F8_E5M2"])
def test_weights_of_a_type_of_eight_bits_are_quantized(tmp_path, dtype):
    tensors = small(tmp_path / "m")
    path = write(tmp_path / "m", tensors, STANDALONE)
    data = safetensors_bytes(tensors)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[QKV]
    entry["dtype"], entry["shape"] = dtype, [entry["shape"][0] * 4, entry["shape"][1]]
    text = json.dumps(header).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert dtype in refusal(path).message


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"], "CLIP"),
        (["vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe"], "SigLIP"),
        (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "CLIP or SigLIP"),
        (["embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"], "DINOv2"),
        (["cls_token", "pos_embed", "reg_token"], "DINOv2 with registers"),
        (["visual.blocks.0.attn.qkv.weight"], "Qwen-VL"),
        (["vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight"], "a plain ViT"),
        (["vision_model.radio_model.model.blocks.0.attn.qkv.weight"], "RADIO"),
        (["qllama.model.norm.weight", "vision_model.embeddings.class_embedding"], "InternVL-C or InternVL-G"),
        (["cls_token", "clip_projector.norm1_q.weight"], "InternVL-C or InternVL-G"),
        (["base_model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"], "LoRA adapters, not a model"),
        (["model.layers.0.self_attn.q_proj.weight"], "no vision tower"),
    ],
)
@pytest.mark.parametrize("config", [STANDALONE, None], ids=["config", "no config"])
def test_another_tower_is_refused_by_its_name(tmp_path, names, words, config):
    tensors = {name: np.zeros((1, 1, 8), np.float32) for name in names}
    assert words in refusal(write(tmp_path / "m", tensors, config)).message


@pytest.mark.parametrize("name", ["norm.weight", "layernorm.bias"])
def test_a_norm_behind_the_last_block_is_refused(tmp_path, name):
    tensors = small(tmp_path / "m") | {name: np.zeros(8, np.float32)}
    assert "a norm after the last block" in refusal(write(tmp_path / "m", tensors, STANDALONE)).message


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("model", ["Intern-S1", "Sa2VA"])
def test_features_of_another_layout_are_the_golden_ones(tmp_path, model):
    tensors, _ = reference("300m", "hf" if model == "Intern-S1" else "chat")
    card = describe_model(write(tmp_path / "m", tensors, as_model_of("300m")[model]))
    shutil.copy(REFERENCE / "300m-hf" / "preprocessor_config.json", tmp_path / "m")
    checkpoint = Checkpoint.open(card, layer=card.resolve_layer())
    with np.load(REFERENCE / "300m-expected.npz") as expected, torch.inference_mode():
        vit = load_vit(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        hidden = vit(torch.from_numpy(expected["pixel_values"]))
        assert relative_error(hidden, expected["last_hidden_state"]) < 1e-5
