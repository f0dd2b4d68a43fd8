"""Several layers of one run: each is what a run of that layer alone stores, and every command knows them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import forging
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_helpers import open_all, random_tiles, tiny_card
from run_helpers import assert_same_content, extract, internvit, make_pictures, summary_of
from safetensors.numpy import load_file

from internvit_cli import Extractor, FeatureDataset, open_features
from internvit_cli.config import Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.encode.to_host import on_host
from internvit_cli.errors import OutputError, UsageError
from internvit_cli.model.features import FeatureModel, FeatureSpec, LayerTensors
from internvit_cli.model.vit import MLP, Block
from internvit_cli.storage.format.layout import FeatureName, crc_order, dataset_of
from internvit_cli.verify.checks import verify
from internvit_cli.verify.result import VerifyOptions

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.storage.read.image import ImageFeatures

FEW = ("--max-tiles", 2)
ALL = ("--layer", "0,-2,-1")
"""All three hidden states of tiny-random, which has two blocks."""
KINDS = {"file": ("feats.h5",), "npy": ("feats",), "h5": ("feats", "--format", "h5")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 5)
    (folder / "text.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def three(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three layers."""
    path = tmp_path_factory.mktemp("three") / "feats.h5"
    assert extract(pictures, "-o", path, *FEW, *ALL, "--tile-pooled").returncode == 3
    return path


def assert_same_image(one: ImageFeatures, other: ImageFeatures) -> None:
    assert np.array_equal(one.pooled, other.pooled)
    assert np.array_equal(one.token_map(), other.token_map())
    assert np.array_equal(one.tile_pooled, other.tile_pooled)


# ------------------------------------------------------------------------------------------------------------- names


def test_names_of_datasets_are_read_back_as_they_are_made() -> None:
    for kind in ("pooled", "visual_tokens", "fp8_scales"):
        for layer in (None, 0, 7, 45):
            parsed = FeatureName.parse(dataset_of(kind, layer))
            assert parsed == (None if kind == "fp8_scales" else (kind, layer))
    for strange in (
        "pooled_layer_",
        "pooled_layer_01",
        "pooled_layer_-1",
        "image/digest",
        "x_layer_1",
        "pooled_layer_²",
    ):
        assert FeatureName.parse(strange) is None


def test_the_crc_goes_over_the_main_layer_and_then_over_the_earlier_ones_by_number() -> None:
    names = ["tile_pooled_layer_3", "visual_tokens", "pooled_layer_21", "image/key", "pooled_layer_3", "pooled"]
    names += ["visual_scales_layer_3", "visual_tokens_layer_3"]
    assert crc_order(names) == (
        "pooled",
        "visual_tokens",
        "pooled_layer_3",
        "visual_tokens_layer_3",
        "visual_scales_layer_3",
        "tile_pooled_layer_3",
        "pooled_layer_21",
    )


# ----------------------------------------------------------------------------------------------------------- the model


def features_of(layers: tuple[int, ...], tiles: list[np.ndarray], **changes: Any) -> tuple[LayerTensors, ...]:
    options = {"tokens": Tokens.VISUAL, "pool": Pool.MEAN, "tile_size": 56, "token_order": TokenOrder.V2}
    options |= {"store_dtype": StoreDtype.FLOAT32, "earlier_layers": layers[:-1]}
    model = FeatureModel.load(
        open_all(tiny_card(), layers[-1]),
        FeatureSpec(**options | changes),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with torch.inference_mode():
        found: tuple[LayerTensors, ...] = model(torch.from_numpy(np.stack(tiles)))
        return found


def test_all_layers_come_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], Block.forward

    def counted(block: Block, *arguments: Any) -> Any:
        calls.append(block)
        return forward(block, *arguments)

    monkeypatch.setattr(Block, "forward", counted)
    assert len(features_of((0, 1, 2), random_tiles(1))) == 3
    assert len(calls) == len(set(calls)) == 2


@pytest.mark.parametrize("pool", [Pool.CLS, Pool.CLS_MEAN])
def test_without_tokens_each_layer_has_its_own_vector(pool: Pool) -> None:
    """The class token alone is computed by another way in the last block, and is the same within rounding."""
    tiles = random_tiles(3)
    together = features_of((0, 1, 2), tiles, tokens=Tokens.NONE, pool=pool)
    for number, layer in enumerate((2, 0, 1)):
        (alone,) = features_of((layer,), tiles, tokens=Tokens.NONE, pool=pool)
        assert together[number].tokens is None
        torch.testing.assert_close(together[number].pooled, alone.pooled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "pool", "rows"),
    [
        (Tokens.NONE, Pool.CLS, 1),
        (Tokens.NONE, Pool.MEAN, 17),
        (Tokens.NONE, Pool.CLS_MEAN, 17),
        (Tokens.PATCH, Pool.CLS, 17),
    ],
)
def test_the_last_block_computes_the_rows_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, tokens: Tokens, pool: Pool, rows: int
) -> None:
    """For the class token alone, that is one row of the projection after attention and of the MLP."""
    widths, forward = [], MLP.forward

    def counted(mlp: MLP, h: torch.Tensor) -> torch.Tensor:
        widths.append(h.shape[1])
        return forward(mlp, h)

    monkeypatch.setattr(MLP, "forward", counted)
    features_of((2,), random_tiles(1), tokens=tokens, pool=pool)
    assert widths == [17, rows]


def test_one_layer_that_cannot_be_stored_is_enough_to_skip_a_tile() -> None:
    spec = FeatureSpec(Tokens.NONE, Pool.MEAN, 56, TokenOrder.V2, StoreDtype.FLOAT16, earlier_layers=(1, 2))

    def layer(largest: list[float], clamped: int) -> LayerTensors:
        extremes = torch.tensor([[0.0, one] for one in largest])
        return LayerTensors(None, torch.zeros(4, 2), extremes, torch.tensor([clamped] * 4))

    worst = [layer([1, 1e6, 1, 1], 1), layer([1, 1, float("nan"), 1], 2), layer([1, 1, 1e6, 1], 3)]
    found = on_host(worst, spec)
    assert found.fits.tolist() == [0, 1, 2, 0]
    assert found.clamped == 24


# ------------------------------------------------------------------------------------------------------------ storing


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{name}-{kind}", marks=[] if quick == name else pytest.mark.sweep)
        for kind, quick in zip(KINDS, ("visual", "patch", "none"), strict=True)
        for name, options in {
            "visual": (),
            "patch": ("--tokens", "patch", "--store-dtype", "int8", "--no-thumbnail"),
            "none": ("--tokens", "none", "--pool", "cls+mean"),
        }.items()
    ],
)
def test_every_layer_is_bit_for_bit_what_a_run_of_it_alone_stores(
    pictures: Path, tmp_path: Path, kind: str, options: tuple[object, ...]
) -> None:
    name, *more = KINDS[kind]
    common = (*FEW, *options, "--tile-pooled")
    assert extract(pictures, "-o", tmp_path / name, *ALL, *common, *more).returncode == 3
    features = open_features(tmp_path / name)
    assert (features.layers, features.layer) == ((0, 1, 2), 2)
    for layer in (0, 1, 2):
        assert extract(pictures, "-o", tmp_path / f"{layer}.h5", "--layer", layer, *common).returncode == 3
        alone, view = open_features(tmp_path / f"{layer}.h5"), features.at_layer(layer)
        assert view.stored == alone.stored and list(view) == list(alone)
        for key, image in alone.done.items():
            assert np.array_equal(view[key].pooled, image.pooled)
            assert np.array_equal(view[key].tile_pooled, image.tile_pooled)
            if "none" not in options:
                assert np.array_equal(view[key].tokens, image.tokens)
                assert torch.equal(view[key].to_torch(), image.to_torch())
        assert np.array_equal(view.pooled_matrix()[1], alone.pooled_matrix()[1])
    assert not verify(VerifyOptions(str(tmp_path / name))).findings


def test_a_layer_that_is_named_twice_is_one_and_an_output_of_one_layer_is_as_ever(
    pictures: Path, tmp_path: Path
) -> None:
    for name, layer in (("one", "-1"), ("twice", "-1,2")):
        assert extract(pictures, "-o", tmp_path / f"{name}.h5", *FEW, "--layer", layer).returncode == 3
    assert_same_content(tmp_path / "one.h5", tmp_path / "twice.h5")
    features = open_features(tmp_path / "twice.h5")
    assert "earlier_layers" not in features.recipe.to_json() and "model_layers" not in features.attributes
    with h5py.File(tmp_path / "twice.h5") as file:
        assert set(file) == {"image", "pooled", "visual_tokens", "run_log"}


def test_a_skipped_image_has_no_vector_in_any_layer(three: Path) -> None:
    with h5py.File(three) as file:
        names = [name for name in file if name.startswith("pooled")]
        row = int(np.flatnonzero(file["image/status"][:] != 1)[0])
        assert sorted(names) == ["pooled", "pooled_layer_0", "pooled_layer_1"]
        assert all(np.isnan(file[name][row]).all() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_several_layers_grows_without_being_told_which(pictures: Path, tmp_path: Path, kind: str) -> None:
    name, *more = KINDS[kind]
    folder, output = tmp_path / "pictures", tmp_path / name
    shutil.copytree(pictures, folder)
    later = folder / "zz-later.jpg"
    shutil.move(next(folder.glob("*/*.jpg")), later)
    moved = later.rename(tmp_path / "later.jpg")
    assert extract(folder, "-o", output, *FEW, *ALL, *more).returncode == 3
    moved.rename(later)
    grown = extract(folder, "-o", output, *FEW, *more, "--json")  # auto: what the output has
    assert grown.returncode == 3 and summary_of(grown)["encoded"] == 1
    assert extract(folder, "-o", tmp_path / "whole.h5", *FEW, *ALL).returncode == 3
    features, whole = open_features(output), open_features(tmp_path / "whole.h5")
    for layer in whole.layers:
        for key, image in whole.at_layer(layer).done.items():
            assert np.array_equal(features.at_layer(layer)[key].tokens, image.tokens)
    later.unlink()
    pruned = extract(folder, "-o", output, *FEW, *more, "--prune")
    assert pruned.returncode == 3 and "zz-later.jpg" not in open_features(output)
    assert not verify(VerifyOptions(str(output))).findings


@pytest.mark.parametrize("layer", ["-1", "1,2", "0,1"])
def test_other_layers_are_another_recipe(three: Path, pictures: Path, layer: str) -> None:
    refused = extract(pictures, "-o", three, *FEW, "--tile-pooled", "--layer", layer)
    assert refused.returncode == 5
    assert "layer" in refused.stderr and "--layer as before" in refused.stderr


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("-1,9", "--layer 9: tiny-random has 2 blocks"),
        ("auto,1", "not auto, a whole number, or several separated by commas"),
        ("1,", "not auto, a whole number, or several separated by commas"),
        ("1;2", "not auto, a whole number, or several separated by commas"),
        ("", "not auto, a whole number, or several separated by commas"),
    ],
)
def test_layers_that_are_none_are_a_usage_error(pictures: Path, tmp_path: Path, layer: str, message: str) -> None:
    refused = extract(pictures, "-o", tmp_path / "f.h5", "--layer", layer)
    assert refused.returncode == 2 and message in refused.stderr
    assert not os.listdir(tmp_path)


def test_projected_tokens_are_of_one_layer(pictures: Path, three: Path, reference: Path, tmp_path: Path) -> None:
    """The projector was trained on one; nothing is read or made before that is said."""
    options = ("-o", tmp_path / "f.h5", "--model", reference / "300m-chat", "--tokens", "projected", "--layer", "-2,-1")
    for command in ("extract", "plan"):
        refused = internvit(command, pictures, *options)
        assert refused.returncode == 2 and "the projector was trained on one layer" in refused.stderr
    with pytest.raises(UsageError, match="the projector was trained on one layer"):
        Extractor(str(reference / "300m-chat"), tokens="projected", layer=[-2, -1])
    with pytest.raises(UsageError, match="the projector was trained on one layer"):
        Extractor.like(three, tokens="projected")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_knows_the_bytes_of_all_layers(pictures: Path, tmp_path: Path, kind: str) -> None:
    name, *more = KINDS[kind]
    options = ("-o", tmp_path / name, "--model", "tiny-random", *FEW, *ALL, "--dtype", "float32", *more)
    plan = summary_of(internvit("plan", pictures, *options, "--json"))
    planned: Any = plan["bytes"]
    assert plan["layers"] == [0, 1, 2]
    assert internvit("extract", pictures, *options).returncode == 3
    found = tmp_path / name
    files = [found] if found.is_file() else [file for file in found.iterdir() if file.name.startswith("shard-")]
    size = sum(file.stat().st_size for file in files)
    assert size == planned if kind != "npy" else 0 <= size - planned <= 8192  # the log of starts
    left_to_auto = ("-o", tmp_path / name, "--model", "tiny-random", "--max-tiles", FEW[-1], *more)
    again = summary_of(internvit("plan", pictures, *left_to_auto, "--json"))
    assert (again["layers"], again["bytes"]) == ([0, 1, 2], planned), "as a run would keep them"


# ------------------------------------------------------------------------------------------------------------ reading


def test_layers_are_chosen_by_the_numbers_of_the_option(three: Path) -> None:
    features = open_features(three)
    assert [features.at_layer(layer).layer for layer in (0, 1, 2, -1, -2, -3)] == [0, 1, 2, 2, 1, 0]
    image = features.done[0]
    assert [image.at_layer(layer).layer for layer in (0, -2, -1)] == [0, 1, 2]
    assert image.layers == (0, 1, 2) and "of layer 2 (stored: 0, 1 and 2)" in repr(image)
    assert "of layer 1 (stored: 0, 1 and 2)" in repr(features.at_layer(1)) + repr(open_features(three, layer=-2))
    assert_same_image(image.at_layer(0).at_layer(-1), image)
    for chosen in (features, image):
        for layer in (3, -4, 1 << 40):
            with pytest.raises(UsageError, match=rf"holds no layer {layer}") as caught:
                chosen.at_layer(layer)
            assert caught.value.hint == "it holds the layers 0, 1 and 2"


def test_a_layer_counted_from_the_end_needs_a_file_that_knows_the_end(pictures: Path, tmp_path: Path) -> None:
    assert extract(pictures, "-o", tmp_path / "f.h5", *FEW, "--layer", "1").returncode == 3
    features = open_features(tmp_path / "f.h5")
    assert features.at_layer(1).layers == (1,)
    with pytest.raises(UsageError, match="counts from the end of the model") as caught:
        features.at_layer(-2)
    assert caught.value.hint == "it holds layer 1"


def test_every_view_of_a_view_is_of_its_layer(three: Path) -> None:
    view = open_features(three).at_layer(1)
    key = view.done[0].key
    for other in (view[::-1], view.done, view[[key]], view.matching("**"), pickle.loads(pickle.dumps(view))):
        assert other.layer == 1
        assert_same_image(other[key], view[key])
    assert view.get(key).layer == 1 and view.vectors().image(0).layer == 1
    tile = next(view.done.iter_tiles())
    assert np.array_equal(tile.tokens, view[key].tile_tokens(0)) and np.array_equal(
        tile.pooled, view[key].tile_pooled[0]
    )
    assert not np.array_equal(view[key].pooled, view[key].at_layer(2).pooled)


def test_a_dataset_trains_on_the_layer_that_is_chosen(three: Path) -> None:
    features = open_features(three).done
    for dataset in (
        FeatureDataset(features, layer=-2),
        FeatureDataset(features.at_layer(1)),
        FeatureDataset(three, layer=1),
    ):
        spawned = pickle.loads(pickle.dumps(dataset))
        sample = next(one for one in map(spawned.__getitem__, range(len(features))) if one["key"] == features[0].key)
        assert torch.equal(sample["tokens"], features.at_layer(1)[0].to_torch())
        assert torch.equal(sample["pooled"], features.at_layer(1)[0].to_torch("pooled"))
    with pytest.raises(UsageError, match="holds no layer 7"):
        FeatureDataset(three, layer=7)


def test_an_extractor_gives_the_layers_that_a_run_stores(three: Path) -> None:
    features = open_features(three).done
    with (
        Extractor(
            "tiny-random", layer=(0, -2, -1), max_tiles=2, tile_pooled=True, device="cpu", dtype="float32"
        ) as extractor,
        Extractor.like(three, device="cpu") as same,
    ):
        assert extractor.recipe == same.recipe == features.recipe
        paths = [image.path for image in features.values()]
        for ours, again, stored in zip(extractor(paths), same(paths), features.values(), strict=True):
            for layer in (0, 1, -1):
                assert_same_image(ours.at_layer(layer), stored.at_layer(layer))
                assert_same_image(again.at_layer(layer), stored.at_layer(layer))
    with pytest.raises(UsageError, match="names no layer"):
        Extractor("tiny-random", layer=())


# ----------------------------------------------------------------------------------------------------------- commands


def test_info_lists_the_datasets_of_every_layer(three: Path) -> None:
    facts = summary_of(internvit("info", three, "--json"))
    datasets: Any = facts["datasets"]
    assert list(datasets)[:3] == ["pooled", "visual_tokens", "tile_pooled"] and len(datasets) == 9
    assert facts["layers"] == [0, 1, 2]
    assert "0, 1 and 2; names without a number mean layer 2" in internvit("info", three).stdout
    assert datasets["visual_tokens_layer_1"] == datasets["visual_tokens"]
    assert datasets["visual_tokens"]["dtype"] == "float16" and datasets["pooled_layer_0"]["dtype"] == "float32"


@pytest.mark.parametrize("name", ["pooled_layer_1", "visual_tokens_layer_0", "tile_pooled_layer_1"])
def test_a_damaged_row_of_an_earlier_layer_is_found_and_not_exported(three: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.h5"
    shutil.copy(three, path)
    with h5py.File(path, "r+") as file:
        file[name][2] = 7
    (finding,) = verify(VerifyOptions(str(path))).findings
    assert "its rows have CRC" in finding.problem
    refused = internvit("export", path, tmp_path / "copy.h5")
    assert refused.returncode == 1 and "is damaged" in refused.stderr


def test_a_dataset_of_a_layer_that_is_missing_or_of_another_shape_is_refused(three: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    shutil.copy(three, path)
    with h5py.File(path, "r+") as file:
        file.move("pooled_layer_1", "elsewhere")
    with pytest.raises(OutputError, match="pooled_layer_1 is missing"):
        open_features(path)
    with h5py.File(path, "r+") as file:
        file.move("tile_pooled", "pooled_layer_1")
        file.move("elsewhere", "tile_pooled")
    with pytest.raises(OutputError, match="tile_pooled has shape"):
        open_features(path)


@pytest.mark.parametrize("name", ["pooled_layer_1", "visual_tokens_layer_0", "tile_pooled", "tile_pooled_layer_1"])
def test_forged_datasets_of_any_layer_are_refused(three: Path, tmp_path: Path, name: str) -> None:
    scene = forging.Scene(tmp_path, "file")
    scene.secret.write_bytes(forging.SECRET * 1000)
    changes = forging.DATASET_FORGERS | {
        "has narrower rows": lambda file, name, _: replace_dataset(file, name, file[name][..., 1:]),
        "has rows of another kind": lambda file, name, _: replace_dataset(file, name, file[name][..., :1]),
        "is shorter": lambda file, name, _: replace_dataset(file, name, file[name][1:]),
    }
    for words, forge in changes.items():
        path = tmp_path / "f.h5"
        shutil.copy(three, path)
        with h5py.File(path, "r+") as file:
            forge(file, name, scene)
        with pytest.raises(OutputError):
            open_features(path)
            pytest.fail(f"{name} {words}: opened")


def replace_dataset(file: h5py.File, name: str, values: np.ndarray) -> None:
    named = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=values).attrs.update(named)


@pytest.mark.parametrize("name", ["pooled_layer_1", "visual_tokens_layer_0", "tile_pooled", "tile_pooled_layer_1"])
def test_forged_npy_files_of_any_layer_are_refused(three: Path, tmp_path: Path, name: str) -> None:
    sound = tmp_path / "sound"
    assert internvit("export", three, sound).returncode == 0
    sound_array = sound / f"shard-00000.{name}.npy"
    rows = np.load(sound_array)
    header = sound_array.read_bytes()[:4096]
    shape = str(rows.shape).encode()
    changes = {
        "shorter": header.replace(shape, str((rows.shape[0] - 1, *rows.shape[1:])).encode()) + rows[1:].tobytes(),
        "narrower": header.replace(shape, str((*rows.shape[:-1], rows.shape[-1] // 2)).encode().ljust(len(shape)))
        + rows[..., : rows.shape[-1] // 2].tobytes(),
        "of another type": header.replace(rows.dtype.str.encode(), b"<i4") + np.zeros(rows.shape, "<i4").tobytes(),
        "cut": header + rows.tobytes()[:-1],
        "empty": b"",
    }
    for words, data in changes.items():
        folder = tmp_path / words
        shutil.copytree(sound, folder)
        (folder / sound_array.name).write_bytes(data)
        with pytest.raises(OutputError):
            open_features(folder)
            pytest.fail(f"{name} {words}: opened")
    (sound / sound_array.name).unlink()
    with pytest.raises(OutputError, match=f"{name} is missing"):
        open_features(sound)


@pytest.mark.parametrize("target", ["copy.h5", "copy", "copy.parquet", "copy.safetensors", "copy.tar"])
def test_an_export_holds_all_layers(three: Path, tmp_path: Path, target: str) -> None:
    assert internvit("export", three, tmp_path / target).returncode == 0
    again = tmp_path / "again.h5"
    if target in {"copy.h5", "copy"}:
        assert internvit("export", tmp_path / target, again).returncode == 0
        assert_same_content(again, three)
        found = summary_of(internvit("diff", three, again, "--json"))
        assert found["identical"] and found["layers"] == [[0, 0], [1, 1], [2, 2]]
        return
    data = (tmp_path / target).read_bytes()
    assert all(name.encode() in data for name in ("pooled_layer_0", "visual_tokens_layer_1", "tile_pooled_layer_1"))


def test_an_export_without_tokens_keeps_every_layers_vectors(three: Path, tmp_path: Path) -> None:
    assert internvit("export", three, tmp_path / "vectors.h5", "--no-tokens").returncode == 0
    features, whole = open_features(tmp_path / "vectors.h5"), open_features(three)
    for layer in (0, 1, 2):
        assert features.at_layer(layer).stored == ("pooled", "tile_pooled")
        assert np.array_equal(features.at_layer(layer).pooled_matrix()[1], whole.at_layer(layer).pooled_matrix()[1])
    assert not verify(VerifyOptions(str(tmp_path / "vectors.h5"))).findings


@pytest.mark.parametrize(("name", "more"), [("file.h5", ()), ("npy", ()), ("h5", ("--format", "h5"))])
def test_an_export_of_the_deepest_layer_is_what_a_run_of_it_alone_stores(
    pictures: Path, three: Path, tmp_path: Path, name: str, more: tuple[str, ...]
) -> None:
    assert internvit("export", three, tmp_path / name, "--layer", "-1", *more).returncode == 0
    assert extract(pictures, "-o", tmp_path / "alone.h5", *FEW, "--tile-pooled", "--layer", "-1").returncode == 3
    assert internvit("export", tmp_path / name, tmp_path / "again.h5").returncode == 0
    assert_same_content(tmp_path / "again.h5", tmp_path / "alone.h5")
    one, other = (open_features(tmp_path / found).attributes for found in ("again.h5", "alone.h5"))
    assert one == other
    assert not verify(VerifyOptions(str(tmp_path / name))).findings
    again = extract(pictures, "-o", tmp_path / name, *FEW, "--tile-pooled", *more, "--json")
    assert summary_of(again)["encoded"] == 0


def test_an_export_of_some_layers_leaves_out_the_others(three: Path, tmp_path: Path) -> None:
    assert internvit("export", three, tmp_path / "two.h5", "--layer", "1,-1").returncode == 0
    features = open_features(tmp_path / "two.h5")
    assert features.layers == (1, 2) and features.at_layer(-2).layer == 1
    found = summary_of(internvit("diff", three, tmp_path / "two.h5", "--json"))
    assert found["layers"] == [[1, 1], [2, 2]] and found["equal_vectors"] == found["equal_tokens"] == 5
    assert not verify(VerifyOptions(str(tmp_path / "two.h5"))).findings


@pytest.mark.parametrize("target", ["one.parquet", "one.safetensors", "one.tar"])
def test_another_format_takes_an_earlier_layer_alone(three: Path, tmp_path: Path, target: str) -> None:
    path = tmp_path / target
    assert internvit("export", three, path, "--layer", "-2").returncode == 0
    image = open_features(three).done[0].at_layer(1)
    expected = {"pooled_layer_1": image.pooled, "visual_tokens_layer_1": image.tokens}
    expected |= {"tile_pooled_layer_1": image.tile_pooled}
    if target == "one.parquet":
        table = pq.read_table(path)
        names = {name for name in table.column_names if FeatureName.parse(name)}
        cells = table.slice(table["key"].to_pylist().index(image.key), 1)
        found: dict[str, Any] = {name: np.frombuffer(cells[name][0].as_py(), "<f4") for name in names if "tile" in name}
        found["pooled_layer_1"] = np.array(cells["pooled_layer_1"][0].as_py(), np.float32)
        found["visual_tokens_layer_1"] = np.frombuffer(cells["visual_tokens_layer_1"][0].as_py(), "<f2")
    elif target == "one.safetensors":
        tensors = load_file(path)
        row = int(np.flatnonzero(tensors["status"] == 1)[0])
        tiles = slice(*tensors["tile_offset"][row : row + 2])
        found = {name: rows for name, rows in tensors.items() if FeatureName.parse(name)}
        found = {name: rows[row if name == "pooled_layer_1" else tiles] for name, rows in found.items()}
    else:
        with tarfile.open(path) as tar:
            members = {name.partition(".")[2]: name for name in tar.getnames() if name.startswith("00000000")}
            found = {
                part.removesuffix(".npy"): np.load(io.BytesIO(tar.extractfile(name).read()))  # type: ignore[union-attr]
                for part, name in members.items()
                if part.endswith(".npy")
            }
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].ravel(), values.ravel()) for name, values in expected.items())


def test_layers_that_an_export_cannot_write_are_a_usage_error(three: Path, tmp_path: Path) -> None:
    for target in ("one.h5", "one"):
        refused = internvit("export", three, tmp_path / target, "--layer", "0,1")
        assert refused.returncode == 2 and "without layer 2, the deepest" in refused.stderr
    refused = internvit("export", three, tmp_path / "one.parquet", "--layer", "7")
    assert refused.returncode == 2 and "holds no layer 7" in refused.stderr
    refused = internvit("export", three, tmp_path / "one.parquet", "--layer", "auto")
    assert refused.returncode == 2 and "not a whole number, or several separated by commas" in refused.stderr
    assert not os.listdir(tmp_path)


def test_two_halves_merge_into_what_one_run_makes(pictures: Path, three: Path, tmp_path: Path) -> None:
    for name, part in (("one.h5", "part0"), ("two.h5", "part1")):
        options = ("--root", pictures, "--tile-pooled", *FEW, *ALL)
        assert extract(*sorted((pictures / part).iterdir()), "-o", tmp_path / name, *options).returncode == 0
    merged = tmp_path / "both.h5"
    assert internvit("merge", tmp_path / "one.h5", tmp_path / "two.h5", "-o", merged).returncode == 0
    features, whole = open_features(merged), open_features(three).done
    assert list(features) == list(whole)
    for layer in (0, -2, -1):
        for key, image in whole.at_layer(layer).items():
            assert_same_image(features.at_layer(layer)[key], image)


def test_a_difference_in_an_earlier_layer_is_told(pictures: Path, three: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    shutil.copy(three, path)
    with h5py.File(path, "r+") as file:
        first = int(np.flatnonzero(file["image/status"][:] == 1)[0])
        file["pooled_layer_0"][first] *= -1
        file["visual_tokens_layer_1"][int(file["image/tile_offset"][first])] *= -1
    found = summary_of(internvit("diff", three, path, "--json"))
    assert not found["identical"] and found["equal_vectors"] == found["equal_tokens"] == 4
    assert found["pooled"]["lowest"] == pytest.approx(-1) and found["tokens"]["lowest"] == pytest.approx(-1)  # type: ignore[index]
    assert extract(pictures, "-o", tmp_path / "one.h5", *FEW, "--tile-pooled", "--layer", 1).returncode == 3
    found = summary_of(internvit("diff", three, tmp_path / "one.h5", "--json"))
    assert found["layers"] == [[1, 1]] and found["equal_vectors"] == found["equal_tokens"] == found["common"] == 5
    assert "only layer 1" in str(found["notes"]) and not found["identical"]


def test_duplicates_are_found_in_the_layer_that_is_chosen(three: Path) -> None:
    pairs = set()
    for layer in (0, 2):
        vectors = open_features(three).at_layer(layer).pooled_matrix()[1]
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        nearest = float(np.sort((unit @ unit.T)[np.triu_indices(len(unit), 1)])[-1])
        options = ("--raw", "--threshold", f"{nearest - 1e-6:.8f}", "--layer", layer, "--json")
        (group,) = summary_of(internvit("duplicates", three, *options))["similar"]  # type: ignore[misc,attr-defined]
        assert group[1]["similarity"] == pytest.approx(nearest, abs=1e-5)
        pairs.add(nearest)
    assert len(pairs) == 2


def test_search_show_and_report_take_a_layer(three: Path, tmp_path: Path) -> None:
    key = open_features(three).done[0].key
    answers = {}
    for layer in (0, 1, -1):
        result = internvit("search", three, "--key", key, "--layer", layer, "--raw", "--json")
        found: Any = summary_of(result)
        answers[found["layer"]] = [(hit["key"], hit["similarity"]) for hit in found["queries"][0]["hits"]]
        vectors = open_features(three).at_layer(layer).pooled_matrix()
        unit = vectors[1] / np.linalg.norm(vectors[1], axis=1, keepdims=True)
        cosines = dict(zip(vectors[0], unit @ unit[vectors[0].index(key)], strict=True))
        assert all(cosine == pytest.approx(cosines[other], abs=1e-5) for other, cosine in answers[found["layer"]])
    assert answers.keys() == {0, 1, 2} and answers[0] != answers[1] != answers[2]
    drawn = internvit("show", three, key, "-o", tmp_path, "--layer", "-3", "--json")
    assert drawn.returncode == 0 and len(os.listdir(tmp_path)) == 1
    page = tmp_path / "page.html"
    assert internvit("report", three, "-o", page, "--layer", 1, "-q").returncode == 0
    assert "Features of layer 1 are shown; the output holds layers 0, 1 and 2." in page.read_text()
    for command in (
        ("search", three, "--key", key),
        ("show", three, key, "-o", tmp_path),
        ("report", three, "-o", page),
    ):
        refused = internvit(*command, "--layer", 7)
        assert refused.returncode == 2 and "holds no layer 7" in refused.stderr


def test_a_picture_is_searched_for_in_the_layer_that_is_chosen(three: Path) -> None:
    image = open_features(three).done[0]
    result = internvit("search", three, image.path, "--layer", "0", "--device", "cpu", "--raw", "--json")
    found: Any = json.loads(result.stdout)["queries"][0]["hits"]
    assert (found[0]["key"], found[0]["similarity"]) == (image.key, pytest.approx(1, abs=1e-6))
