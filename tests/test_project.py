"""`internvit project`: stored visual tokens through a projector, without pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from chat_helpers import Chat, extract_for, make_chat_model
from folders import EXAMPLES
from model_helpers import relative_error
from run_helpers import assert_same_content, datasets, extract, internvit, make_pictures
from safetensors.numpy import load_file, save_file

from internvit_cli import Extractor, open_features
from internvit_cli.config import Status, StoreDtype
from internvit_cli.errors import ModelError
from internvit_cli.export import projected_shards
from internvit_cli.export.project import ProjectOptions, ProjectResult, project
from internvit_cli.runtime.signals import StopRequest

if TYPE_CHECKING:
    from pathlib import Path

SIGTERM = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model in tiny-chat, pictures in imgs, and their visual tokens in v.h5, in float32."""
    folder = tmp_path_factory.mktemp("project")
    make_chat_model(folder / "tiny-chat")
    make_pictures(folder / "imgs", 5)
    (folder / "imgs" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    visual(folder, folder / "v.h5")
    return folder


def visual(folder: Path, output: Path, *arguments: object, dtype: str = "float32", pictures: str = "imgs") -> Path:
    """Visual tokens of the pictures, one of which is broken."""
    store = () if "--store-dtype" in arguments else ("--store-dtype", dtype)
    result = internvit(
        *("extract", folder / pictures, "-o", output, "--model", folder / "tiny-chat", "--dtype", dtype),
        *("--device", "cpu", "--max-tiles", 2, "-q", *store, *arguments),
    )
    assert result.returncode == 3, result.stderr
    return output


def run(source: Path, output: Path, model: Path, **options: Any) -> ProjectResult:
    stop = options.pop("stop", None) or StopRequest()
    return project(ProjectOptions(str(source), str(output), str(model), device="cpu", **options), stop)


def ok(*arguments: object) -> str:
    result = internvit(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(code: int, *arguments: object) -> str:
    result = internvit(*arguments)
    assert result.returncode == code, result.stderr
    assert "hint: " in result.stderr
    return result.stderr


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_stored_in_the_type_of_the_encoder_give_the_bits_of_tokens_projected(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    source = visual(folder, tmp_path / "v.h5", "--tile-pooled", dtype=dtype)
    expected = visual(folder, tmp_path / "direct.h5", "--tokens", "projected", "--tile-pooled", dtype=dtype)
    run(source, tmp_path / "p.h5", folder / "tiny-chat")
    ours, theirs = datasets(tmp_path / "p.h5"), datasets(expected)
    for name in ("projected_tokens", "pooled", "tile_pooled", "image/crc32", "image/digest", "image/status"):
        found = [path for path in theirs if path.endswith(name)]
        assert found
        for path in found:
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.parametrize(
    ("store", "bound"),
    [
        ("float16", 1e-3),
        ("int8", 3e-2),
        *(pytest.param(*one, marks=pytest.mark.sweep) for one in (("bfloat16", 8e-3), ("fp8", 5e-2))),
    ],
)
def test_rounded_visual_tokens_give_projected_ones_within_the_stated_bound(
    folder: Path, tmp_path: Path, store: str, bound: float
) -> None:
    """The bounds of docs/consuming.md: the error of all values of an image, relative to their size."""
    source = visual(folder, tmp_path / "v.h5", "--store-dtype", store)
    expected = open_features(visual(folder, tmp_path / "direct.h5", "--tokens", "projected"))
    run(source, tmp_path / "p.h5", folder / "tiny-chat", store_dtype=StoreDtype.FLOAT32)
    for key, image in open_features(tmp_path / "p.h5").done.items():
        tokens, exact = image.projected_tokens, expected[key].projected_tokens
        assert 0 < np.linalg.norm(tokens - exact) / np.linalg.norm(exact) < bound
        assert (np.sum(tokens * exact, -1) > 0).all()


def test_a_chat_model_answers_from_what_was_projected(folder: Path, tmp_path: Path) -> None:
    source = extract_for(folder / "tiny-chat", tmp_path / "v.h5", pictures=EXAMPLES)
    run(source, tmp_path / "p.h5", folder / "tiny-chat")
    chat, key = Chat(folder / "tiny-chat"), "cobbles.webp"
    images = open_features(tmp_path / "p.h5").to_transformers(key)
    prompt = chat.prompt(images.text + "What is this?")
    length = {"max_new_tokens": 6, "do_sample": False}
    ours = chat.model.generate(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, **length)
    assert (ours == chat.model.generate(**prompt, pixel_values=chat.pixel_values(key), **length)).all()


def test_the_order_of_tokens_becomes_that_of_the_chat_model(folder: Path, tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference / "300m-chat", tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ps_version": "v1"}))
    pictures = {"pictures": folder / "imgs" / "part0"}
    source = extract_for(reference / "300m-standalone", tmp_path / "v.h5", "--max-tiles", 1, **pictures)
    direct = extract_for(tmp_path / "old", tmp_path / "d.h5", "--max-tiles", 1, "--tokens", "projected", **pictures)
    result = run(source, tmp_path / "p.h5", tmp_path / "old")
    assert result.notes == ()
    for key, image in open_features(tmp_path / "p.h5").items():
        expected = open_features(direct)[key]
        assert (image.chat_tokens() == expected.chat_tokens()).all()
        assert (image.tokens == expected.tokens).all()
        assert (image.tokens != image.chat_tokens().numpy()).any()


# ------------------------------------------------------------------------------------------- what the output says


def test_the_recipe_and_the_attributes_say_which_weights_projected_what(folder: Path, tmp_path: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    source, features = open_features(folder / "v.h5"), open_features(tmp_path / "p.h5")
    assert features.recipe.before_projection == source.recipe
    assert features.recipe.projected_from is StoreDtype.FLOAT32 and len(features.recipe.projector_digest) == 64
    assert features.attributes["projector"] == str(folder / "tiny-chat")
    assert features.attributes["projector_tower_digest"] == features.recipe.weights_digest
    assert features.attributes["model"] == source.attributes["model"]
    facts = json.loads(ok("info", tmp_path / "p.h5", "--json"))
    assert facts["projector"] == str(folder / "tiny-chat") and facts["runs"][-1]["images"] == 5
    assert "everything is right" in ok("verify", tmp_path / "p.h5")


def test_every_format_and_cut_holds_the_same(folder: Path, tmp_path: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    run(folder / "v.h5", tmp_path / "p", folder / "tiny-chat", shard_bytes=200_000)
    assert len(list((tmp_path / "p").glob("shard-*"))) > 1
    one, other = open_features(tmp_path / "p.h5"), open_features(tmp_path / "p")
    assert list(one) == list(other)
    for key, image in one.done.items():
        assert (image.tokens == other[key].tokens).all() and image.digest == other[key].digest
    assert "everything is right" in ok("verify", tmp_path / "p")


def test_skipped_images_stay_skipped_with_their_reasons(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    assert result.images == json.loads(ok("info", folder / "v.h5", "--json"))["images"]
    lists = [(path / "x").with_name(f"{name}.skipped.jsonl") for path, name in ((folder, "v.h5"), (tmp_path, "p.h5"))]
    assert lists[0].read_bytes() == lists[1].read_bytes()
    assert open_features(tmp_path / "p.h5")["broken.jpg"].status is open_features(folder / "v.h5")["broken.jpg"].status


def test_tokens_that_do_not_fit_skip_their_image_with_a_reason(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "tiny-chat" / "model.safetensors")
    projector = {name: array for name, array in tensors.items() if "multi_modal_projector" in name}
    bias = next(name for name in projector if name.endswith("linear_2.bias"))
    projector[bias] = np.full_like(projector[bias], 1e6)
    save_file(projector, tmp_path / "huge.safetensors")
    result = internvit("project", folder / "v.h5", tmp_path / "p.h5", "--model", tmp_path / "huge.safetensors",
                       "--store-dtype", "float16", "--device", "cpu")  # fmt: skip
    assert result.returncode == 3 and "5 images with tokens that do not fit" in result.stdout
    assert "too large" in (tmp_path / "p.h5.skipped.jsonl").read_text()
    again = internvit("project", folder / "v.h5", tmp_path / "p.h5", "--model", tmp_path / "huge.safetensors",
                      "--store-dtype", "float16", "--device", "cpu")  # fmt: skip
    assert again.returncode == 0 and "nothing new to project" in again.stdout
    assert "everything is right" in ok("verify", tmp_path / "p.h5")


# ------------------------------------------------------------------------------------------------- continuing


class StopAfter(StopRequest):
    """A stop request that comes after some images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
        super().__init__()
        monkeypatch.setattr(projected_shards, "BLOCK_BYTES", 1)  # an image per block
        whole = projected_shards.ProjectedShards._project_block

        def one(shards: Any, *arguments: Any) -> None:
            whole(shards, *arguments)
            if shards.projected >= images:
                self.signal = SIGTERM

        monkeypatch.setattr(projected_shards.ProjectedShards, "_project_block", one)


@pytest.mark.parametrize("name", ["p.h5", "p"])
def test_a_stopped_projection_keeps_what_is_done_and_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        first = run(folder / "v.h5", tmp_path / name, folder / "tiny-chat", stop=StopAfter(patch, 2))
    assert (first.projected, first.stopped_by) == (2, SIGTERM) and first.images["pending"] == 3
    second = run(folder / "v.h5", tmp_path / name, folder / "tiny-chat")
    assert second.projected == 3 and "pending" not in second.images
    run(folder / "v.h5", tmp_path / "whole.h5", folder / "tiny-chat")
    if name == "p.h5":
        assert_same_content(tmp_path / name, tmp_path / "whole.h5")
    assert "everything is right" in ok("verify", tmp_path / name)


def test_a_crash_in_the_middle_leaves_nothing_by_the_name_and_costs_only_what_was_in_flight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected_shards, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(projected_shards, "BLOCK_BYTES", 1)
        whole = projected_shards.ProjectedShards._project_block

        def crash(shards: Any, *arguments: Any) -> None:
            if shards.projected == 3:
                raise RuntimeError("crash")
            whole(shards, *arguments)

        patch.setattr(projected_shards.ProjectedShards, "_project_block", crash)
        run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    assert not (tmp_path / "p.h5").exists()
    assert int((open_features(tmp_path / "p.h5.partial").column("status") == Status.DONE).sum()) == 3
    assert run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat").projected == 2


def test_a_damaged_row_of_an_earlier_run_is_projected_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat", stop=StopAfter(patch, 2))
    with h5py.File(tmp_path / "p.h5.partial", "r+") as file:
        file["projected_tokens"][0, 0, 0] += 1
    assert run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat").projected == 4
    run(folder / "v.h5", tmp_path / "whole.h5", folder / "tiny-chat")
    assert_same_content(tmp_path / "p.h5", tmp_path / "whole.h5")


@pytest.mark.parametrize(("source", "output"), [("v.h5", "p.h5"), ("v", "p")])
def test_only_what_is_new_changed_or_gone_in_the_source_is_done_again(
    folder: Path, tmp_path: Path, source: str, output: str
) -> None:
    for name in ("tiny-chat", "imgs"):
        shutil.copytree(folder / name, tmp_path / name)
    model = tmp_path / "tiny-chat"

    def project_again() -> ProjectResult:
        return run(tmp_path / source, tmp_path / output, model)

    visual(tmp_path, tmp_path / source)
    assert project_again().projected == 5
    assert project_again().projected == 0
    make_pictures(tmp_path / "imgs" / "more", 2, seed=9)
    visual(tmp_path, tmp_path / source)
    assert project_again().projected == 2
    gone, changed = sorted((tmp_path / "imgs" / "part0").iterdir())[:2]
    gone.unlink()
    shutil.copy(min((tmp_path / "imgs" / "part1").iterdir()), changed)
    visual(tmp_path, tmp_path / source, "--prune", "--yes")
    result = project_again()
    assert result.projected == 1
    assert set(open_features(tmp_path / output)) == set(open_features(tmp_path / source))
    run(tmp_path / source, tmp_path / "whole.h5", model)
    for key, image in open_features(tmp_path / "whole.h5").done.items():
        assert (image.tokens == open_features(tmp_path / output)[key].tokens).all()
    assert project_again().projected == 0
    assert "everything is right" in ok("verify", tmp_path / output)


# ------------------------------------------------------------------------------------------------- projectors


def names_of(layout: str) -> dict[str, str]:
    ours = ["layer_norm", "linear_1", "linear_2"]
    theirs = {
        "transformers": [f"model.multi_modal_projector.{name}" for name in ours],
        "official": ["mlp1.0", "mlp1.1", "mlp1.3"],
        "sequential": ["0", "1", "3"],
        "module": ours,
        "wrapped": [f"module.multi_modal_projector.{name}" for name in ours],
    }
    return {
        f"model.multi_modal_projector.{one}.{kind}": f"{other}.{kind}"
        for one, other in zip(ours, theirs[layout], strict=True)
        for kind in ("weight", "bias")
    }


def projector_file(folder: Path, path: Path, layout: str = "sequential", **changes: np.ndarray) -> Path:
    tensors = load_file(folder / "tiny-chat" / "model.safetensors")
    names = names_of(layout)
    if not set(names) <= set(tensors):
        tensors = {name if name.startswith("model.") else f"model.{name}": array for name, array in tensors.items()}
    save_file({names[name]: tensors[name] for name in names} | changes, path)
    return path


@pytest.mark.parametrize("layout", ["transformers", "official", "sequential", "module", "wrapped"])
def test_a_projector_may_come_alone_under_the_names_of_any_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    result = run(folder / "v.h5", tmp_path / "q.h5", projector_file(folder, tmp_path / "mine.safetensors", layout))
    assert "nothing says whether it was trained for these tokens" in result.notes[0]
    one, other = open_features(tmp_path / "p.h5"), open_features(tmp_path / "q.h5")
    assert one.recipe == other.recipe  # it is the same projector
    assert all((image.tokens == other[key].tokens).all() for key, image in one.done.items())
    assert other.attributes["projector"] == str(tmp_path / "mine.safetensors")


def wide(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"1.weight": wide((48, 128)), "0.weight": wide((128,)), "0.bias": wide((128,))}, "takes tokens of 128 values"),
        ({"1.weight": wide((48, 128))}, "0.weight' has shape"),
        ({"1.weight": wide((48,))}, "1.weight' has shape"),
        ({"3.weight": wide((48, 64))}, "3.weight' has shape"),
        ({"1.bias": np.zeros(48, np.int8)}, "1.bias' is I8"),
        ({"5.weight": wide((48, 48))}, "unexpected tensor"),
    ],
)
def test_a_projector_of_another_shape_is_refused_by_its_tensor(
    folder: Path, tmp_path: Path, changes: dict[str, np.ndarray], said: str
) -> None:
    path = projector_file(folder, tmp_path / "mine.safetensors", **changes)
    result = internvit("project", folder / "v.h5", tmp_path / "p.h5", "--model", path)
    assert result.returncode in (1, 2) and said in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.safetensors"]


def test_a_file_that_lacks_a_tensor_or_holds_no_projector_is_refused(folder: Path, tmp_path: Path) -> None:
    path = projector_file(folder, tmp_path / "mine.safetensors")
    tensors = load_file(path)
    del tensors["3.bias"]
    save_file(tensors, path)
    assert "'mlp1.3.bias' is missing" in fails(1, "project", folder / "v.h5", tmp_path / "p.h5", "--model", path)
    save_file({"weight": wide((3, 3))}, path)
    assert "projector" in fails(1, "project", folder / "v.h5", tmp_path / "p.h5", "--model", path)
    assert "has no projector" in fails(1, "project", folder / "v.h5", tmp_path / "p.h5", "--model", "tiny-random")


# --------------------------------------------------------------------------------------------------- mismatches


@pytest.fixture(scope="module")
def other_tower(folder: Path) -> Path:
    """A chat model whose tower was trained further."""
    target = folder / "further-trained"
    shutil.copytree(folder / "tiny-chat", target)
    tensors = load_file(target / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("layer.1.mlp.fc1.bias")]
    tensors[name] = tensors[name] + np.float32(0.1)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_tokens_of_another_tower_are_refused_unless_told(folder: Path, tmp_path: Path, other_tower: Path) -> None:
    command = ("project", folder / "v.h5", tmp_path / "p.h5", "--model", other_tower, "--device", "cpu")
    said = fails(1, *command)
    assert "encoder.layers.1.mlp.fc1.bias (values)" in said and "--allow-mismatch" in said
    assert list(tmp_path.iterdir()) == []
    result = internvit(*command, "--allow-mismatch")
    assert result.returncode == 0 and "note: --allow-mismatch: 1 of" in result.stderr
    attributes = open_features(tmp_path / "p.h5").attributes
    assert attributes["projector_tower_digest"] != attributes["weights_digest"]


def test_exports_refuse_what_was_projected_with_a_mismatch_unless_told(
    folder: Path, tmp_path: Path, other_tower: Path
) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", other_tower, allow_mismatch=True)
    for target in ("vllm", "npy-folder"):
        export = ("export", tmp_path / "p.h5", tmp_path / target, "--to", target)
        assert "another tower" in fails(1, *export)
        assert not (tmp_path / target).exists()
        ok(*export, "--allow-mismatch")


def test_exports_for_a_chat_model_refuse_the_tokens_of_another(folder: Path, tmp_path: Path, other_tower: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    export = ("export", tmp_path / "p.h5", tmp_path / "new", "--to", "vllm", "--for")
    assert "encoder.layers.1.mlp.fc1.bias (values)" in fails(1, *export, other_tower)
    ok(*export, folder / "tiny-chat")
    ok(*export, other_tower, "--allow-mismatch", "--overwrite")


def test_info_tells_a_projector_of_its_own_from_that_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = projector_file(folder, tmp_path / "mine.safetensors", **{"3.bias": np.ones(48, np.float32)})
    run(folder / "v.h5", tmp_path / "p.h5", path)
    result = internvit("info", tmp_path / "p.h5", "--matches", folder / "tiny-chat", "--json")
    found = json.loads(result.stdout)["matches"]
    assert result.returncode == 1 and [tensor["name"] for tensor in found["different"]] == ["mlp1"]
    run(folder / "v.h5", tmp_path / "q.h5", folder / "tiny-chat")
    assert internvit("info", tmp_path / "q.h5", "--matches", folder / "tiny-chat").returncode == 0


def test_another_layer_or_normalization_is_a_mismatch_too(folder: Path, tmp_path: Path) -> None:
    source = visual(folder, tmp_path / "v.h5", "--layer", 1)
    said = fails(1, "project", source, tmp_path / "p.h5", "--model", folder / "tiny-chat")
    assert "layer 2 instead of 1" in said and "--allow-mismatch" in said


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "patch"), "holds patch tokens"),
        (("--tokens", "none"), "holds no tokens"),
        (("--tokens", "projected"), "holds projected tokens"),
        (("--layer", "1,2"), "holds the layers 1 and 2"),
    ],
)
def test_only_visual_tokens_of_one_layer_can_be_projected(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    source = visual(folder, tmp_path / "s.h5", *arguments)
    before = sorted(tmp_path.iterdir())
    assert said in fails(2, "project", source, tmp_path / "p.h5", "--model", folder / "tiny-chat")
    assert sorted(tmp_path.iterdir()) == before


def test_places_and_options_that_make_no_sense_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "v.h5", tmp_path / "v.h5")
    model = ("--model", folder / "tiny-chat")
    for code, arguments, said in [
        (2, ("v.h5", "p.h5"), "no chat model given"),
        (2, ("v.h5", "v.h5", *model, "--overwrite"), "is the output that is read"),
        (2, ("v.h5", "p.h5", *model, "--shard-size", "1MB"), "--shard-size"),
        (2, ("v.h5", "p.h5", *model, "--store-dtype", "int8"), "stored unscaled"),
        (2, ("v.h5", "p.parquet", *model), "p.parquet"),
        (1, ("w.h5", "p.h5", *model), "is not there"),
        (1, ("v.h5", "p.h5", "--model", tmp_path / "nowhere"), "nowhere"),
    ]:
        words = [tmp_path / word if number < 2 else word for number, word in enumerate(arguments)]
        assert said in fails(code, "project", *words), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["v.h5"]


def test_an_output_of_another_recipe_is_replaced_only_when_told(folder: Path, tmp_path: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    before = (tmp_path / "p.h5").read_bytes()
    other = ("project", folder / "v.h5", tmp_path / "p.h5", "--model", folder / "tiny-chat", "--store-dtype", "float16")
    assert "store_dtype was float32, is now float16" in fails(5, *other)
    mine = projector_file(folder, tmp_path / "mine.safetensors", **{"3.bias": np.ones(48, np.float32)})
    said = fails(5, "project", folder / "v.h5", tmp_path / "p.h5", "--model", mine)
    assert "projector_digest was" in said
    assert (tmp_path / "p.h5").read_bytes() == before
    ok(*other, "--overwrite")
    assert open_features(tmp_path / "p.h5").recipe.store_dtype is StoreDtype.FLOAT16


def test_a_damaged_row_of_the_source_is_named_and_what_is_committed_stays(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "v.h5", tmp_path / "v.h5")
    with h5py.File(tmp_path / "v.h5", "r+") as file:
        file["visual_tokens"][-1, 0, 0] += 1
    assert "is damaged: the rows of" in fails(
        1, "project", tmp_path / "v.h5", tmp_path / "p.h5", "--model", folder / "tiny-chat"
    )
    assert not (tmp_path / "p.h5").exists()


def test_pictures_alone_cannot_repeat_what_was_projected(folder: Path, tmp_path: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    said = internvit("verify", tmp_path / "p.h5", "--re-extract", 1)
    assert said.returncode == 1 and "were projected from stored visual tokens" in said.stdout + said.stderr
    with pytest.raises(ModelError, match="projected from stored"):
        Extractor.like(tmp_path / "p.h5", device="cpu")
    with Extractor.like(tmp_path / "p.h5", tokens="visual", device="cpu") as extractor:
        key = open_features(folder / "v.h5").done[0].key
        expected = open_features(folder / "v.h5")[key].tokens
        assert relative_error(extractor(folder / "imgs" / key).tokens, expected) < 1e-6
    result = extract(folder / "imgs", "-o", tmp_path / "p.h5", "--model", folder / "tiny-chat", "--max-tiles", 2,
                     "--tokens", "projected", "--store-dtype", "float32")  # fmt: skip
    assert result.returncode == 5 and "projector_digest was" in result.stderr


def test_vectors_alone_are_exported_without_a_word_of_the_projector(folder: Path, tmp_path: Path) -> None:
    run(folder / "v.h5", tmp_path / "p.h5", folder / "tiny-chat")
    ok("export", tmp_path / "p.h5", tmp_path / "vectors.h5", "--no-tokens")
    ok("export", folder / "v.h5", tmp_path / "expected.h5", "--no-tokens")
    assert open_features(tmp_path / "vectors.h5").recipe == open_features(tmp_path / "expected.h5").recipe


def test_a_recipe_that_contradicts_itself_about_the_projector_is_damage(folder: Path, tmp_path: Path) -> None:
    recipe = open_features(folder / "v.h5").recipe
    for broken in (replace(recipe, projector_digest="0" * 64), replace(recipe, projected_from=StoreDtype.FLOAT16)):
        shutil.copy(folder / "v.h5", tmp_path / "v.h5")
        with h5py.File(tmp_path / "v.h5", "r+") as file:
            file.attrs["recipe"], file.attrs["recipe_digest"] = broken.to_json(), broken.digest
        assert "error: " in internvit("ls", tmp_path / "v.h5").stderr
