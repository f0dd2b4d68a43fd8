"""What a checkpoint says of its pixels is done, and stands in the recipe; nonsense is refused by its key."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from folders import REFERENCE
from model_helpers import open_all, random_checkpoint, random_tiles, tiny_card
from run_helpers import internvit, make_pictures

from internvit_cli.config import DEFAULT_RESCALE_FACTOR, Preprocess
from internvit_cli.errors import ModelError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.loading import load_vit
from internvit_cli.model.own_tiling import tiling_note
from internvit_cli.model.pixels import Normalization, OwnTiling, normalization
from internvit_cli.model.vit import TileEmbedding
from internvit_cli.options import PictureOptions
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.model.card import ModelCard

CONFIG = {"model_type": "intern_vit_6b", "hidden_size": 8, "num_attention_heads": 2, "image_size": 28}
HALF = [0.5, 0.5, 0.5]


def card(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> ModelCard:
    """The card of a folder with these JSON files."""
    for name, value in ({"config": CONFIG | (config or {})} | files).items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.json").write_text(text)
    return describe_model(str(folder))


def test_without_a_word_pixels_are_normalized_as_imagenets(tmp_path: Path) -> None:
    assert card(tmp_path).normalization == Normalization()
    assert card(tmp_path, preprocessor_config={}).normalization == Normalization()
    assert Normalization().rescale_factor == 1 / 255


def test_the_section_that_transformers_5_writes_comes_before_the_older_file(tmp_path: Path) -> None:
    new = {"image_processor": {"image_mean": HALF, "image_std": HALF}, "processor_class": "InternVLProcessor"}
    old = {"image_mean": [0.1, 0.1, 0.1], "image_std": [0.2, 0.2, 0.2]}
    assert card(tmp_path, processor_config=new).mean == (0.5, 0.5, 0.5)
    assert card(tmp_path, preprocessor_config=old).mean == (0.5, 0.5, 0.5)
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 256, "processor_class": "InternVLProcessor"}')
    assert describe_model(str(tmp_path)).mean == (0.1, 0.1, 0.1)
    (tmp_path / "processor_config.json").write_text('{"image_processor": null, "video_processor": {"image_mean": 1}}')
    assert describe_model(str(tmp_path)).mean == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_normalize": False}, Normalization((0, 0, 0), (1, 1, 1), 1 / 255)),
        ({"do_rescale": False}, Normalization(rescale_factor=1.0)),
        ({"do_rescale": False, "do_normalize": False}, Normalization((0, 0, 0), (1, 1, 1), 1.0)),
        ({"do_rescale": False, "rescale_factor": 0.5}, Normalization(rescale_factor=1.0)),
        ({"rescale_offset": True, "do_normalize": False}, Normalization((1, 1, 1), (1, 1, 1))),
        ({"rescale_offset": True, "image_mean": [0.5] * 3}, Normalization((1.5, 1.5, 1.5))),
        ({"rescale_offset": True, "do_rescale": False}, Normalization(rescale_factor=1.0)),
        ({"rescale_factor": 1 / 127.5}, Normalization(rescale_factor=1 / 127.5)),
        ({"rescale_factor": 0.003921569}, Normalization()),
        ({"rescale_factor": None, "do_normalize": None, "do_rescale": None, "image_mean": None}, Normalization()),
        ({"image_mean": 0.5, "image_std": 0.25}, Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))),
        ({"image_processor_type": "ViTImageProcessor"}, Normalization()),
    ],
)
def test_every_setting_is_honored(settings: dict[str, Any], expected: Normalization) -> None:
    assert normalization(settings, "x") == expected


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPFeatureExtractor", "GotOcr2ImageProcessorFast"])
def test_a_processor_that_leaves_out_its_mean_has_the_one_of_its_class(name: str) -> None:
    key = "feature_extractor_type" if "Feature" in name else "image_processor_type"
    assert normalization({key: name}, "x").mean == (0.48145466, 0.4578275, 0.40821073)
    assert normalization({key: name, "image_mean": HALF}, "x").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"image_mean": [1' + "0" * 400 + ", 0, 0]}", "image_mean"),
        ('{"image_mean": [1e400, 0, 0]}', "image_mean"),
        ('{"image_mean": [NaN, 0, 0]}', "image_mean"),
        ('{"image_mean": [1' + "0" * 5000 + ", 0, 0]}", "preprocessor_config.json"),
        ('{"image_mean": [0.5, 0.5]}', "image_mean"),
        ('{"image_mean": [0.5, 0.5, 0.5, 0.5]}', "image_mean"),
        ('{"image_mean": [0.5, "0.5", 0.5]}', "image_mean"),
        ('{"image_mean": {"r": 1}}', "image_mean"),
        ('{"image_std": [0, 0.5, 0.5]}', "image_std"),
        ('{"image_std": [-1, 0.5, 0.5]}', "image_std"),
        ('{"image_std": [1e-300, 0.5, 0.5]}', "image_std"),
        ('{"image_std": [true, 0.5, 0.5]}', "image_std"),
        ('{"image_std": 0}', "image_std"),
        ('{"rescale_factor": 0}', "rescale_factor"),
        ('{"rescale_factor": -1}', "rescale_factor"),
        ('{"rescale_factor": "1/255"}', "rescale_factor"),
        ('{"rescale_factor": 1' + "0" * 400 + "}", "rescale_factor"),
        ('{"rescale_factor": [1]}', "rescale_factor"),
        ('{"do_normalize": "no"}', "do_normalize"),
        ('{"do_rescale": 0}', "do_rescale"),
    ],
)
def test_a_value_that_no_processor_has_is_one_line_that_names_its_key(tmp_path: Path, text: str, key: str) -> None:
    for files in ({"preprocessor_config": text}, {"processor_config": '{"image_processor": ' + text + "}"}):
        with pytest.raises(ModelError) as caught:
            card(tmp_path, **files)
        assert key.removeprefix("pre") in caught.value.message or key in caught.value.message
        assert "\n" not in caught.value.message and len(caught.value.message) < 400
        for name in files:
            (tmp_path / f"{name}.json").unlink()


def test_a_section_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image_processor is \\[1\\]"):
        card(tmp_path, processor_config={"image_processor": [1]})


@pytest.mark.parametrize(
    "how",
    [
        Normalization(),
        Normalization(rescale_factor=1 / 127.5),
        Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        Normalization((1.0, 1.0, 1.0), (1.0, 0.5, 2.0), 1 / 127.5),
        Normalization((127.5, 120.0, 110.0), (50.0, 60.0, 70.0), 1.0),
    ],
)
def test_what_is_folded_into_the_embedding_is_what_was_asked_for(how: Normalization) -> None:
    model = tiny_card()
    vit = load_vit(random_checkpoint(model, 1), device=torch.device("cpu"), dtype=torch.float32)
    tiles = torch.from_numpy(np.stack(random_tiles(2)))
    pixels = tiles.permute(0, 3, 1, 2).double() * how.rescale_factor
    pixels = (pixels - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]
    embedding = TileEmbedding(vit.embeddings, normalization=how, tile_size=56, dtype=torch.float32)
    torch.testing.assert_close(embedding(tiles), vit.embeddings(pixels.float()), rtol=1e-4, atol=1e-4)


def test_the_recipe_tells_how_pixels_were_normalized_and_a_re_extraction_agrees(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (REFERENCE / "300m-standalone").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    make_pictures(tmp_path / "imgs", 3)
    words = ("--model", folder, "--device", "cpu", "--dtype", "float32", "-q")
    plain, raw = tmp_path / "plain.h5", tmp_path / "raw.h5"
    assert internvit("extract", tmp_path / "imgs", "-o", plain, *words).returncode == 0
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        '{"image_processor": {"rescale_factor": 0.00784313725490196, "image_mean": 1.0, "image_std": 1.0}}'
    )
    assert internvit("extract", tmp_path / "imgs", "-o", raw, *words).returncode == 0
    before, after = open_features(str(plain)), open_features(str(raw))
    assert "rescale_factor" not in before.attributes["recipe"]
    assert before.recipe.rescale_factor == DEFAULT_RESCALE_FACTOR
    assert json.loads(after.attributes["recipe"])["rescale_factor"] == 0.00784313725490196
    assert after.recipe.mean == (1.0, 1.0, 1.0)
    key = next(iter(before))
    assert not np.allclose(before[key].pooled, after[key].pooled)
    result = internvit("verify", raw, "--re-extract", "3", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    refused = internvit("extract", tmp_path / "imgs", "-o", plain, *words)
    assert refused.returncode == 5
    assert "rescale_factor was 0.0039" in refused.stderr and "mean was 0.485" in refused.stderr


@pytest.mark.parametrize(
    ("own", "ours", "words"),
    [
        (OwnTiling(), {}, ()),
        (OwnTiling(True, 1, 12, True), {}, ()),
        (OwnTiling(True, 1, 6, True), {}, ("max_dynamic_patch 6", "--max-tiles 12")),
        (OwnTiling(True, 2, 12, True), {}, ("min_dynamic_patch 2", "--min-tiles 1")),
        (OwnTiling(True, 1, 12, False), {}, ("use_thumbnail false", "--thumbnail")),
        (OwnTiling(True, 1, 12, True), {"thumbnail": False}, ("use_thumbnail true", "--no-thumbnail")),
        (OwnTiling(False, 1, 12, True), {}, ("dynamic_image_size false", "--max-tiles 12")),
        (OwnTiling(False, 1, 12, True), {"max_tiles": 1}, ()),
        (OwnTiling(False), {"preprocess": Preprocess.SQUASH}, ()),
        (
            OwnTiling(True, 1, 12, True),
            {"preprocess": Preprocess.CLIP},
            ("dynamic_image_size true", "--preprocess clip"),
        ),
        (OwnTiling(False, pad_to_square=True), {"max_tiles": 1}, ("pad2square",)),
        (OwnTiling(bicubic=False), {}, ("another filter", "bicubic")),
    ],
)
def test_a_tiling_other_than_the_checkpoints_own_is_noted_with_both_sides(
    own: OwnTiling, ours: dict[str, Any], words: tuple[str, ...]
) -> None:
    note = tiling_note(own, PictureOptions(**ours))
    assert bool(note) is bool(words) and "\n" not in note
    for word in words:
        assert word in note


def test_the_tiling_is_read_from_the_config_and_nonsense_there_says_nothing(tmp_path: Path) -> None:
    chat = {"model_type": "internvl_chat", "vision_config": CONFIG, "min_dynamic_patch": 1, "max_dynamic_patch": 6}
    chat |= {"dynamic_image_size": True, "use_thumbnail": False, "pad2square": True}
    assert card(tmp_path, chat).own_tiling == OwnTiling(True, 1, 6, False, pad_to_square=True)
    odd = chat | {"max_dynamic_patch": 10**400, "use_thumbnail": "yes", "dynamic_image_size": 1}
    assert card(tmp_path, odd).own_tiling == OwnTiling(None, 1, None, None, pad_to_square=True)
    native = card(tmp_path, preprocessor_config={"min_patches": 1, "max_patches": 4, "resample": 2})
    assert native.own_tiling == OwnTiling(None, 1, 4, None, bicubic=False)


def test_extract_and_plan_note_the_checkpoints_own_tiling_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (REFERENCE / "300m-chat").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"max_dynamic_patch": 6}
    (folder / "config.json").write_text(json.dumps(config))
    make_pictures(tmp_path / "imgs", 2)
    words = (tmp_path / "imgs", "-o", tmp_path / "feats.h5", "--model", folder, "--device", "cpu")
    for command in ("plan", "extract"):
        result = internvit(command, *words)
        assert result.returncode == 0
        assert result.stderr.count("max_dynamic_patch 6") == 1 and "--max-tiles 12" in result.stderr
    assert open_all(describe_model(str(folder))).notes == ()
    assert math.isfinite(open_features(str(tmp_path / "feats.h5")).recipe.rescale_factor)
