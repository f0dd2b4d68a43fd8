"""`internvit search` and `internvit duplicates`: what is like what, exactly, and what the approximations may miss."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from run_helpers import extract, internvit

from internvit_cli import open_features
from internvit_cli.config import Tokens
from internvit_cli.errors import InternvitError, OutputError, UsageError
from internvit_cli.runtime.observer import SILENT
from internvit_cli.similarity import ann_index, lsh, nearest, pairs, same_pictures, similarity_space
from internvit_cli.similarity import contact_sheet as contact_sheets
from internvit_cli.similarity import duplicates as duplicates_module
from internvit_cli.similarity.duplicates import DuplicateOptions, find_duplicates
from internvit_cli.similarity.links import Links
from internvit_cli.similarity.lsh import hashed_pairs, table_shape
from internvit_cli.similarity.nearest import best
from internvit_cli.similarity.pairs import BestPairs, exact_pairs
from internvit_cli.similarity.search import SearchOptions, search
from internvit_cli.similarity.similarity_space import RAW, choose_space
from internvit_cli.storage.format.layout import POOLED

if TYPE_CHECKING:
    from internvit_cli.storage.read.row_index import PooledVectors

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
TWINS = (
    ("021_exif-orientation_1200x1800.jpg", "055_exif-orientation_1200x1800.jpg"),
    ("057_metadata-extractor_776x909.webp", "074_metadata-extractor_776x909.jpg"),
    ("052_opensfm_1024x768.jpg", "072_opensfm_1024x768.jpg"),
)
"""Photographs that show the same: twice one picture under another number, one picture in two formats, one street."""


def write_vectors(path: Path, vectors: np.ndarray, first: int = 0) -> Path:
    """A finished output, or one more shard of a folder, that holds these pooled vectors; keys are numbers."""
    keys = [b"%04d.jpg" % row for row in range(first, first + len(vectors))]
    table = helpers.make_table([(1, 1, 0)] * len(vectors), keys)
    shard = helpers.make_shard(table, tokens=Tokens.NONE)
    shard = helpers.dataclasses.replace(
        shard, features=helpers.dataclasses.replace(shard.features, pooled_width=vectors.shape[1])
    )
    output = helpers.Output(str(path))
    output.prepare()
    number = output.next_number()
    helpers.create_shard(output.backend, output.partial_path(number), shard)
    writer = helpers.ShardWriter(output.backend, output.partial_path(number), table)
    for row, vector in enumerate(vectors):
        digest = np.random.default_rng((number, row)).bytes(32)
        writer.write(helpers.ImageRows(row, digest, {"pooled": [vector.astype(np.float32)[None]]}))
    writer.checkpoint()
    writer.close()
    helpers.publish(output, shard)
    return path


def anisotropic(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors with a large common part and directions of very different variance, as InternViT's are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) * np.geomspace(5, 0.05, width) @ rng.standard_normal((width, width))
    return (mixed + 40 * rng.standard_normal(width)).astype(np.float32)


def vectors_of(path: Path) -> PooledVectors:
    return open_features(path).vectors()


# ---------------------------------------------------------------------------------------------------------- the spaces


def test_in_the_balanced_space_no_direction_holds_more_than_its_share(tmp_path):
    vectors = anisotropic(4000, 64)
    space = choose_space(vectors_of(write_vectors(tmp_path / "feats.h5", vectors)))
    assert space.name == "balanced" and space.fitted_on == 4000 and 0 < len(space.scales) < 64
    centered = vectors - space.mean
    moved = centered + ((centered @ space.directions.T) * (space.scales - 1)) @ space.directions
    before, after = (np.linalg.eigvalsh(np.cov(part.T)) for part in (centered, moved))
    assert before[-1] > 0.05 * before.sum()
    assert after[-1] < 1.01 * similarity_space.MOST_SHARE * before.sum()
    small = before < 0.9 * similarity_space.MOST_SHARE * before.sum()
    assert np.allclose(np.sort(after)[: small.sum()], before[small], rtol=1e-3), "the others are left as they are"
    cosines = space.embed(vectors[:200]) @ space.embed(vectors[200:400]).T
    raw = RAW.embed(vectors[:200]) @ RAW.embed(vectors[200:400]).T
    assert abs(np.median(cosines)) < 0.1 and np.median(raw) > 0.85


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31])
def test_few_images_are_compared_raw_and_it_is_said_why(tmp_path, count):
    vectors = anisotropic(count, 12)
    space = choose_space(vectors_of(write_vectors(tmp_path / "feats.h5", vectors)))
    assert space.name == "raw" and "fewer than 32 images" in space.words
    assert np.allclose(space.embed(vectors) @ space.embed(vectors).T, RAW.embed(vectors) @ RAW.embed(vectors).T)


@pytest.mark.parametrize("noise", [0, 1e-3, 0.02])
def test_images_that_are_all_alike_are_compared_raw_and_it_is_said_why(tmp_path, noise):
    vectors = anisotropic(1, 48)[0] * (1 + noise * np.random.default_rng(0).standard_normal((200, 48)))
    space = choose_space(vectors_of(write_vectors(tmp_path / "feats.h5", vectors)))
    assert space.name == "raw" and "nearly the same" in space.words


def test_the_common_part_does_not_decide_the_space(tmp_path):
    """Vectors of which any two have a raw cosine above 0.9, as InternViT's do, are not alike."""
    vectors = np.random.default_rng(0).standard_normal((300, 48)) + 4 * np.random.default_rng(1).standard_normal(48)
    raw = RAW.embed(vectors.astype(np.float32))
    assert np.median(raw @ raw.T) > 0.92
    space = choose_space(vectors_of(write_vectors(tmp_path / "feats.h5", vectors)))
    assert space.name == "balanced"


def test_a_vector_without_direction_is_like_nothing():
    assert not RAW.embed(np.zeros((3, 4), np.float32)).any()


def test_the_leading_directions_are_those_of_the_eigenvectors():
    rng = np.random.default_rng(0)
    spread = np.concatenate([np.geomspace(9, 3, 12), np.full(188, 0.5)])
    turn, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    variances, directions = similarity_space._leading(turn @ np.diag(spread) @ turn.T)
    assert np.allclose(np.sort(variances)[::-1][:12], spread[:12], rtol=1e-6)
    assert np.allclose(np.abs(directions @ turn)[::-1][:12, :12], np.eye(12), atol=1e-4)


def test_of_very_many_vectors_evenly_spread_ones_are_fitted_to(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity_space, "MOST_FITTED", 500)
    path = write_vectors(tmp_path / "feats.h5", anisotropic(3000, 12))
    some = choose_space(vectors_of(path))
    monkeypatch.undo()
    every = choose_space(vectors_of(path))
    assert some.fitted_on == 500 and every.fitted_on == 3000
    probe = anisotropic(50, 12, seed=0)
    one, other = (space.embed(probe) @ space.embed(probe).T for space in (some, every))
    assert np.abs(one - other).max() < 0.25 and np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99


# -------------------------------------------------------------------------------------- exact neighbors


@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 9))
def test_the_best_are_the_highest_and_of_equal_ones_the_first(rows, count):
    similarities = np.array(rows, np.float32)
    numbers = np.broadcast_to(np.arange(7)[::-1], similarities.shape)
    found, kept = best(numbers, similarities, count)
    for row, (one, other) in enumerate(zip(found.tolist(), kept.tolist(), strict=True)):
        expected = sorted(zip((-similarities[row]).tolist(), numbers[row].tolist(), strict=True))[:count]
        assert list(zip([-value for value in other], one, strict=True)) == expected


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_and_shards_find_what_one_product_finds(tmp_path, monkeypatch, is_raw, shards):
    vectors = anisotropic(600, 12)
    vectors[100] = vectors[50]  # a tie
    path = tmp_path / ("feats.h5" if shards == 1 else "feats")
    for part in np.array_split(np.arange(600), shards):
        write_vectors(path, vectors[part], first=int(part[0]))
    stored = vectors_of(path)
    space = choose_space(stored, raw=is_raw)
    queries = space.embed(vectors[:20] + 0.1)
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 4 * 12 * 37)
    told: list[int] = []
    numbers, similarities = nearest.nearest(stored, space, queries, 25, told.append)
    scores = queries @ space.embed(vectors).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :25]
    assert np.allclose(similarities, np.take_along_axis(scores, order, axis=1), atol=1e-6)
    assert (numbers == order).mean() > 0.98, "but for what rounding makes equal"
    assert told == [*range(37, 600, 37), 600]
    assert nearest.nearest(stored, space, queries, 10_000)[0].shape == (20, 600)


# ----------------------------------------------------------------------------------------------------------- the index


@pytest.fixture(scope="module")
def many_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("usearch")
    return write_vectors(tmp_path_factory.mktemp("many") / "feats.h5", anisotropic(3000, 24))


@pytest.fixture
def many(many_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(many_once, tmp_path))


@pytest.mark.parametrize("is_raw", [True, False])
def test_an_index_finds_nearly_what_the_comparison_with_all_finds(many, is_raw):
    keys = [f"{number:04d}.jpg" for number in range(0, 3000, 60)]
    exact = search(SearchOptions(str(many), keys=keys, raw=is_raw))
    quick = search(SearchOptions(str(many), keys=keys, raw=is_raw, index=True))
    assert (exact.how, quick.how, quick.index_is_new) == ("exact", "approximate", True)
    found = 0
    for one, other in zip(exact.answers, quick.answers, strict=True):
        expected = {hit.image.key: hit.similarity for hit in one.hits}
        for hit in other.hits:
            if hit.image.key in expected:
                assert hit.similarity == pytest.approx(expected[hit.image.key], abs=1e-5)
        found += len(expected.keys() & {hit.image.key for hit in other.hits})
    assert found >= 0.98 * 10 * len(keys)


def test_an_index_is_used_again_until_the_output_changes(many):
    options = SearchOptions(str(many), keys=["0007.jpg"], index=True)
    first, second = search(options), search(options)
    assert (first.index_is_new, second.index_is_new) == (True, False)
    assert [hit.image.key for hit in first.answers[0].hits] == [hit.image.key for hit in second.answers[0].hits]
    assert sorted(os.listdir(f"{many}.search")) == ["chosen.json", "chosen.npz", "chosen.usearch"]
    assert search(SearchOptions(str(many), keys=["0007.jpg"], index=True, raw=True)).index_is_new
    many.unlink()
    write_vectors(many, anisotropic(3000, 24, seed=5))
    assert search(options).index_is_new
    assert not search(options).index_is_new


DAMAGES = {
    "removed": lambda path: None,
    "garbage": lambda path: path.write_bytes(b"nonsense" * 40),
    "empty": lambda path: path.touch(),
    "a pipe": os.mkfifo,
    "an endless link": lambda path: path.symlink_to("/dev/zero"),
    "a sparse file": lambda path: (path.touch(), os.truncate(path, 8 << 30)),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", ["chosen.json", "chosen.npz", "chosen.usearch"])
@pytest.mark.parametrize(
    "how",
    [
        *("removed", "garbage", "a pipe"),
        *(pytest.param(how, marks=pytest.mark.sweep) for how in DAMAGES if how not in ("removed", "garbage", "a pipe")),
    ],
)
def test_a_damaged_index_is_made_again(many, damage, how):
    options = SearchOptions(str(many), keys=["0007.jpg"], index=True)
    expected = [hit.image.key for hit in search(options).answers[0].hits]
    path = Path(f"{many}.search") / damage
    path.unlink()
    DAMAGES[how](path)
    again = search(options)
    assert again.index_is_new and [hit.image.key for hit in again.answers[0].hits] == expected
    assert not search(options).index_is_new


@pytest.mark.parametrize(
    "arrays",
    [
        {"mean": np.zeros(24, np.float32), "directions": np.zeros((24, 25), np.float32)},
        {"mean": np.zeros(24), "directions": np.eye(24)},
        {"mean": np.zeros(24, np.float32), "directions": np.zeros((1 << 13, 1 << 13), np.float32)},
    ],
    ids=["another shape", "another type", "compressed a thousandfold"],
)
def test_an_index_whose_space_is_of_another_shape_or_compressed_is_made_again(many, arrays):
    """The files beside an output come from whoever sent it."""
    options = SearchOptions(str(many), keys=["0007.jpg"], index=True)
    expected = [hit.image.key for hit in search(options).answers[0].hits]
    base = f"{many}.search/chosen"
    np.savez_compressed(f"{base}.npz", **arrays)
    facts = json.loads(Path(f"{base}.json").read_text())
    facts["bytes"]["npz"] = os.path.getsize(f"{base}.npz")
    Path(f"{base}.json").write_text(json.dumps(facts))
    again = search(options)
    assert again.index_is_new and [hit.image.key for hit in again.answers[0].hits] == expected


def test_an_index_that_names_vectors_which_are_not_there_is_an_error_with_a_hint(many):
    options = SearchOptions(str(many), keys=["0007.jpg"], index=True)
    search(options)
    base = f"{many}.search/chosen"
    from usearch.index import Index

    graph = Index(ndim=24, metric="ip", dtype="f16")
    graph.add(np.arange(10_000, 13_000), anisotropic(3000, 24))
    graph.save(f"{base}.usearch")
    facts = json.loads(Path(f"{base}.json").read_text())
    facts["bytes"]["usearch"] = os.path.getsize(f"{base}.usearch")
    Path(f"{base}.json").write_text(json.dumps(facts))
    with pytest.raises(OutputError, match="names vectors that do not exist") as caught:
        search(options)
    assert caught.value.hint


def test_without_usearch_an_index_is_an_error_that_says_how_to_get_it(many, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(InternvitError, match="usearch") as caught:
        search(SearchOptions(str(many), keys=["0007.jpg"], index=True))
    assert "internvit-cli[search]" in caught.value.hint
    assert search(SearchOptions(str(many), keys=["0007.jpg"])).how == "exact"


def test_the_digest_of_an_output_follows_its_rows(tmp_path):
    one, other = anisotropic(40, 12), anisotropic(40, 12)
    other[17, 3] += 1
    digests = set()
    for number, vectors in enumerate((one, other)):
        digests.add(ann_index.contents_digest(open_features(write_vectors(tmp_path / f"{number}.h5", vectors))))
    same = open_features(write_vectors(tmp_path / "same.h5", one))
    assert len(digests) == 2 and ann_index.contents_digest(same) in digests


# ----------------------------------------------------------------------------------- photographs, and what becomes of


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return Image.open(stream)


def middle(image: Image.Image, share: float) -> Image.Image:
    width, height = round(image.width * share), round(image.height * share)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


CHANGES = {
    "JPEG at 90": lambda image: saved(image, "JPEG", 90),
    "JPEG at 20": lambda image: saved(image, "JPEG", 20),
    "WebP at 50": lambda image: saved(image, "WEBP", 50),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "the middle 95 %": lambda image: middle(image, 0.95),
    "the middle 90 %": lambda image: middle(image, 0.9),
}


@pytest.fixture(scope="module")
def stored_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All photographs under their names, made smaller for speed."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "pictures").mkdir()
    for path in sorted(photos.glob("*_*.*")):
        with Image.open(path) as image:
            image.draft("RGB", (1200, 1200))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((600, 600))
            small.save(folder / "pictures" / path.name, quality=95)
    assert extract(folder / "pictures", "-o", folder / "feats.h5", "--tokens", "none", *FLOAT32).returncode == 0
    return folder / "feats.h5"


@pytest.mark.parametrize(
    "name",
    [
        *("JPEG at 20", "half as large", "the middle 90 %"),
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("JPEG at 90", "WebP at 50", "the middle 95 %")),
    ],
)
def test_a_photograph_that_was_cropped_or_saved_anew_finds_its_original_first(stored_photos, tmp_path, name):
    """All 42 of them, though the weights are random; of photographs that show the same, either."""
    scenes = {key: names[0] for names in TWINS for key in names}
    paths = []
    for path in sorted((stored_photos.parent / "pictures").iterdir()):
        with Image.open(path) as image:
            changed = CHANGES[name](ImageOps.exif_transpose(image).convert("RGB"))
        paths.append(tmp_path / f"{path.name}.png")
        changed.convert("RGB").save(paths[-1], compress_level=1)
    found = search(SearchOptions(str(stored_photos), [str(path) for path in paths], count=1, device="cpu"))
    assert found.exit_code == 0 and len(found.answers) == 42
    for path, answer in zip(paths, found.answers, strict=True):
        original, first = path.name.removesuffix(".png"), answer.hits[0].image.key
        assert scenes.get(first, first) == scenes.get(original, original)


def test_an_image_of_the_output_finds_its_twin_and_not_itself(stored_photos):
    keys = [key for names in TWINS for key in names]
    found = search(SearchOptions(str(stored_photos), keys=keys, count=3))
    twin_of = dict(TWINS) | {other: one for one, other in TWINS}
    for key, answer in zip(keys, found.answers, strict=True):
        assert len(answer.hits) == 3 and key not in [hit.image.key for hit in answer.hits]
        assert answer.hits[0].image.key == twin_of[key]
    picture = stored_photos.parent / "pictures" / keys[0]
    (answer,) = search(SearchOptions(str(stored_photos), [str(picture)], device="cpu")).answers
    assert answer.hits[0].image.key == keys[0] and answer.hits[0].similarity == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- the command


def test_json_is_one_object_and_a_sheet_is_drawn(stored_photos, tmp_path):
    picture = stored_photos.parent / "pictures" / "040_imageio_768x512.png"
    (tmp_path / "bad.jpg").write_text("no picture")
    arguments = (picture, tmp_path / "bad.jpg", "--key", TWINS[0][0], "-n", 4, "--sheet", tmp_path / "sheet.png")
    result = internvit("search", stored_photos, *arguments, "--json", "--device", "cpu")
    assert result.returncode == 3, result.stderr
    told = json.loads(result.stdout)
    assert (told["exit_code"], told["error"], told["space"], told["images"]) == (3, None, "balanced", 42)
    first, bad, key = told["queries"]
    assert first["picture"] == str(picture) and first["hits"][0]["key"] == "040_imageio_768x512.png"
    assert bad["hits"] == [] and "not_an_image" in bad["problem"]
    assert key["key"] == TWINS[0][0] and key["hits"][0]["key"] == TWINS[0][1]
    assert [hit["similarity"] for hit in key["hits"]] == sorted((h["similarity"] for h in key["hits"]), reverse=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900 and sheet.height > 500


def test_a_table_tells_rank_similarity_and_key(stored_photos):
    result = internvit("search", stored_photos, "--key", TWINS[0][0], "-n", 2)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0] == f"key {TWINS[0][0]}"
    rank, similarity, key = lines[1].split()
    assert (rank, key) == ("1", TWINS[0][1]) and 0.9 < float(similarity) <= 1
    assert "42 images compared" in result.stderr and "exact" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "nothing to search for"),
        (("--key", "021_exif.jpg"), 2, "has no image"),
        (("a dog",), 2, "'a dog' is not a file: search finds images similar to a picture"),
        (("missing.jpg", "--key", TWINS[0][0]), 2, "'missing.jpg' is not a file"),
        (("/",), 2, "is a folder"),
        ((TWINS[0][0],), 2, "is not a file"),
        ((os.devnull,), 1, "no picture can be used"),
        (("--key", TWINS[0][0], "--sheet", "x.txt"), 2, "not a PNG"),
        (("--key", TWINS[0][0], "-n", "0"), 2, "--count is '0'"),
    ],
)
def test_what_cannot_be_searched_for_is_said_with_a_way_out(stored_photos, arguments, code, words):
    result = internvit("search", stored_photos, *arguments)
    assert result.returncode == code and words in result.stderr and "hint:" in result.stderr
    told = internvit("search", stored_photos, *arguments, "--json")
    assert json.loads(told.stdout)["exit_code"] == code and json.loads(told.stdout)["error"]


def test_a_query_that_is_no_picture_is_refused_before_weights_are_loaded(stored_photos, monkeypatch):
    """With a hint that fits: a key is one, a folder has pictures, and words find nothing."""
    monkeypatch.setattr("internvit_cli.similarity.search._encode", lambda *_: pytest.fail("weights are loaded"))
    for query, hint in (
        ("a dog", "name a picture file"),
        (TWINS[0][0], f"--key '{TWINS[0][0]}'"),
        (str(stored_photos.parent), "such as"),
        ("", "name a picture file"),
    ):
        with pytest.raises(UsageError) as caught:
            search(SearchOptions(str(stored_photos), [query]))
        assert hint in caught.value.hint


def test_another_model_is_refused(stored_photos, reference):
    picture = stored_photos.parent / "pictures" / "040_imageio_768x512.png"
    result = internvit("search", stored_photos, picture, "--model", reference / "300m-standalone")
    assert result.returncode == 1 and "not those that made the rows" in result.stderr


def test_an_output_without_vectors_is_said_to_have_none(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.jpg").write_text("x")
    extract(tmp_path / "pictures", "-o", tmp_path / "feats.h5", *FLOAT32)
    result = internvit("search", tmp_path / "feats.h5", "--key", "bad.jpg")
    assert result.returncode == 1 and "no image with features" in result.stderr
    assert internvit("duplicates", tmp_path / "feats.h5").returncode == 0


def test_searching_by_key_and_finding_duplicates_need_no_torch(stored_photos):
    code = (
        "import sys; from internvit_cli.cli.app import run; assert run(sys.argv[1:]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    for arguments in (["search", str(stored_photos), "--key", TWINS[0][0]], ["duplicates", str(stored_photos)]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


# -------------------------------------------------------------------------------------------------------------- pairs


def planted(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, a sixth of them at chosen angles to others."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(0, count - 1, 6):
        cosine = rng.uniform(0.7, 1.0)
        other = rng.standard_normal(width)
        other -= other @ vectors[row] * vectors[row]
        other /= np.linalg.norm(other)
        vectors[row + 1] = cosine * vectors[row] + np.sqrt(1 - cosine**2) * other
    return vectors.astype(np.float32)[rng.permutation(count)]


def as_set(found: Any) -> set[tuple[int, int]]:
    numbers = set()
    for first, second, products in found:
        assert len(first) == len(second) == len(products)
        numbers |= {(min(pair), max(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    return numbers


@given(st.integers(1, 60), st.sampled_from([0.5, 0.75, 0.9, 0.999]))
@settings(max_examples=30)
def test_exact_pairs_are_all_pairs_whatever_the_blocks(count, threshold):
    vectors = planted(count, 16)
    products = vectors @ vectors.T
    expected = {(i, j) for i in range(count) for j in range(i + 1, count) if products[i, j] >= threshold}
    before = pairs.PRODUCT_ROWS
    pairs.PRODUCT_ROWS = 7
    try:
        assert as_set(exact_pairs(vectors, threshold)) == expected
    finally:
        pairs.PRODUCT_ROWS = before


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.98])
def test_hashed_pairs_are_right_and_miss_next_to_nothing(threshold, monkeypatch):
    monkeypatch.setattr(lsh, "PAIRS_AT_ONCE", 1000)
    vectors = planted(6000, 32)
    expected = as_set(exact_pairs(vectors, threshold))
    found = as_set(hashed_pairs(vectors, threshold, lambda first, second: np.ones(len(first), bool)))
    assert found <= expected and len(expected) > 50
    assert len(found) >= 0.998 * len(expected)


def test_pairs_at_the_threshold_meet_with_the_promised_probability():
    """Over tables of planes: pairs exactly at the threshold, counted."""
    rng = np.random.default_rng(3)
    bits, tables = table_shape(1000, 0.9)
    one = rng.standard_normal((20_000, 24))
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    other = rng.standard_normal(one.shape)
    other -= (one * other).sum(axis=1, keepdims=True) * one
    other = 0.9 * one + np.sqrt(0.19) * other / np.linalg.norm(other, axis=1, keepdims=True)
    met = np.zeros(len(one), bool)
    for _ in range(tables):
        planes = rng.standard_normal((24, bits))
        met |= ((one @ planes > 0) == (other @ planes > 0)).all(axis=1)
    assert met.mean() > 0.997
    assert table_shape(1_000_000, 1.0)[1] == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_all_pairs_of_one_code_come_once(codes, at_once):
    array = np.array(codes, np.uint8)[:, None]
    before = lsh.PAIRS_AT_ONCE
    lsh.PAIRS_AT_ONCE = at_once
    try:
        found = [
            (min(pair), max(pair))
            for first, second in lsh._sharing(array)
            for pair in zip(first.tolist(), second.tolist(), strict=True)
        ]
    finally:
        lsh.PAIRS_AT_ONCE = before
    expected = [(i, j) for j in range(len(codes)) for i in range(j) if codes[i] == codes[j]]
    assert sorted(found) == sorted(expected)


# ----------------------------------------------------------------------------------------------------------- duplicates


@pytest.fixture(scope="module")
def stored_copies(stored_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs with copies, re-encodings and halvings of some."""
    folder = tmp_path_factory.mktemp("copies")
    pictures = folder / "pictures"
    shutil.copytree(stored_photos.parent / "pictures", pictures)
    names = sorted(os.listdir(pictures))
    for name in names[::4]:
        shutil.copy(pictures / name, pictures / f"{name}-copy.{name.rpartition('.')[2]}")
    for name in names[1::4]:
        with Image.open(pictures / name) as image:
            image.save(pictures / f"{name}-again.webp", quality=60)
            image.resize((image.width // 2, image.height // 2)).save(pictures / f"{name}-half.png")
    assert extract(pictures, "-o", folder / "feats.h5", "--tokens", "none", *FLOAT32).returncode == 0
    return folder / "feats.h5"


def families(found: Any) -> set[frozenset[str]]:
    return {frozenset(member.image.key for member in group) for group in found.similar}


@pytest.mark.parametrize("how", ["each with each", "exact", "hashed"])
def test_copies_and_re_encodings_are_grouped_and_nothing_else(stored_copies, monkeypatch, how):
    monkeypatch.setattr(duplicates_module, "EXACT_UP_TO", 10 if how == "hashed" else 1000)
    monkeypatch.setattr(duplicates_module, "EACH_WITH_EACH", 256 if how == "each with each" else 1)
    found = find_duplicates(DuplicateOptions(str(stored_copies)))
    assert found.comparison.how == ("hashed" if how == "hashed" else "exact")
    assert found.comparison.pictures.unseen == 0 and "random weights" in found.notes[0]
    names = sorted(os.listdir(stored_copies.parent / "pictures"))
    copies = {frozenset((name, name.partition("-copy")[0])) for name in names if "-copy" in name}
    assert {frozenset(image.key for image in group) for group in found.identical} == copies
    expected = {name: {name, f"{name}-again.webp", f"{name}-half.png"} for name in names if f"{name}-half.png" in names}
    for one, other in TWINS[:2]:  # one picture twice; the third are two views of a street
        family = expected.pop(one, {one}) | expected.pop(other, {other})
        expected[one] = family
    assert families(found) == {frozenset(family) for family in expected.values()}
    for group in found.similar:
        assert group[0].similarity == pytest.approx(1, abs=1e-5) and len({m.image.key for m in group}) == len(group)
        sizes = [member.image.width * member.image.height for member in group]
        assert sizes[0] == max(sizes)
        assert all(member.similarity > 0.8 for member in group)
    assert found.redundant == sum(len(group) - 1 for group in (*found.identical, *found.similar))


@pytest.mark.sweep
def test_shards_memory_limits_and_formats_change_nothing(stored_copies, tmp_path, monkeypatch):
    expected = find_duplicates(DuplicateOptions(str(stored_copies)))
    options = ("--tokens", "none", "--shard-size", "25KB", *FLOAT32)
    assert extract(stored_copies.parent / "pictures", "-o", tmp_path / "feats", *options).returncode == 0
    monkeypatch.setattr(duplicates_module, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(pairs, "PRODUCT_ROWS", 9)
    found = find_duplicates(DuplicateOptions(str(tmp_path / "feats")))
    assert len(open_features(tmp_path / "feats").shards) > 2
    assert families(found) == families(expected)
    assert [[i.key for i in group] for group in found.identical] == [[i.key for i in g] for g in expected.identical]


def test_identical_files_alone_need_no_vectors(stored_copies, monkeypatch):
    monkeypatch.setattr(duplicates_module, "choose_space", lambda *_: pytest.fail("vectors are read"))
    found = find_duplicates(DuplicateOptions(str(stored_copies), bytes_only=True))
    assert len(found.identical) == 11 and not found.similar


def test_raw_vectors_beyond_the_exact_size_are_refused_unless_asked_for(stored_copies, monkeypatch):
    monkeypatch.setattr(duplicates_module, "EXACT_UP_TO", 10)
    with pytest.raises(UsageError, match="--raw") as caught:
        find_duplicates(DuplicateOptions(str(stored_copies), raw=True))
    assert "--exact" in caught.value.hint
    found = find_duplicates(DuplicateOptions(str(stored_copies), raw=True, exact=True))
    assert (found.comparison.how, found.comparison.space) == ("exact", RAW)


def test_images_that_are_all_alike_are_compared_raw_and_each_with_each_however_many(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates_module, "EXACT_UP_TO", 10)
    monkeypatch.setattr(duplicates_module, "EACH_WITH_EACH", 1)
    vectors = anisotropic(1, 48) * (1 + 1e-3 * np.random.default_rng(0).standard_normal((90, 48)))
    found = find_duplicates(DuplicateOptions(str(write_vectors(tmp_path / "feats.h5", vectors))))
    assert (found.comparison.space.name, found.comparison.how) == ("raw", "exact")
    assert [len(group) for group in found.similar] == [90]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_copies_whose_pictures_are_gone_are_one_group_and_others_none(tmp_path, count):
    copy = anisotropic(1, 48)
    copies = copy * (1 + 1e-3 * np.random.default_rng(0).standard_normal((count, 48)))
    found = find_duplicates(DuplicateOptions(str(write_vectors(tmp_path / "copies.h5", copies))))
    assert [len(group) for group in found.similar] == [count] and found.comparison.space.name == "raw"
    others = np.random.default_rng(1).standard_normal((count, 48)) + 3 * copy / np.linalg.norm(copy) * 48**0.5
    assert not find_duplicates(DuplicateOptions(str(write_vectors(tmp_path / "others.h5", others)))).similar


def test_a_threshold_has_vectors_decide_and_looks_at_no_picture(stored_copies, monkeypatch):
    monkeypatch.setattr(duplicates_module, "link_same", lambda *_: pytest.fail("pictures are compared"))
    for threshold, fewest in ((0.9, 10), (0.99, 1)):
        found = find_duplicates(DuplicateOptions(str(stored_copies), threshold=threshold))
        assert found.comparison.threshold == threshold and len(found.similar) >= fewest
        assert found.comparison.pictures is None


def test_no_more_pictures_are_read_than_allowed_those_of_the_nearest_pairs_first(stored_copies, monkeypatch):
    monkeypatch.setattr(same_pictures, "MOST_PICTURES", 8)
    told = find_duplicates(DuplicateOptions(str(stored_copies))).comparison.pictures
    assert told.same >= 3 and told.unseen > 0


def test_an_image_is_compared_with_a_few_that_differ_and_no_more(monkeypatch):
    """Of a long burst each is near each; only so many comparisons are made, however the pairs come."""
    monkeypatch.setattr(
        same_pictures, "read_gray_squares", lambda _, count, __: (np.zeros((count, 64, 64)), np.ones(count, bool))
    )
    compared = []

    def differ(ones, others):
        compared.append(len(ones))
        return np.zeros(len(ones))

    monkeypatch.setattr(same_pictures, "agreement", differ)
    first, second = np.triu_indices(60, 1)
    vectors: Any = type("Vectors", (), {"__len__": lambda _: 60, "image": lambda _, number: number})()
    links = Links(60)
    told = same_pictures.link_same(links, vectors, (first, second, np.ones(len(first))), 0.9, SILENT)
    assert told.same == 0 and told.different == sum(compared) <= 60 * same_pictures.MOST_REFUSALS
    assert not links.groups()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 20)), max_size=60), st.integers(1, 4))
def test_the_best_pairs_of_each_are_kept_whatever_the_order(triples, each):
    pairs_of = {(min(a, b), max(a, b)): similarity / 20 for a, b, similarity in triples if a != b}
    best = BestPairs(10, each)
    for start in range(0, len(pairs_of), 3):
        part = list(pairs_of.items())[start : start + 3]
        first, second = np.array([pair for pair, _ in part]).T
        best.add((first, second, np.array([value for _, value in part], np.float32)))
        best._drop()
    first, second, similarities = best.best_first()
    assert list(similarities) == sorted(similarities, reverse=True)
    found = list(zip(first.tolist(), second.tolist(), strict=True))
    assert len(set(found)) == len(found) and set(found) <= set(pairs_of)
    for number in range(10):
        values = sorted((value for pair, value in pairs_of.items() if number in pair), reverse=True)[:each]
        kept = sorted((pairs_of[pair] for pair in found if number in pair), reverse=True)[:each]
        assert kept == values


def test_a_crowd_of_copies_is_one_group(tmp_path, monkeypatch):
    """Vectors that are all but equal meet in one bucket of every table, and are linked once."""
    monkeypatch.setattr(duplicates_module, "EXACT_UP_TO", 10)
    vectors = anisotropic(2000, 64)
    vectors[500:1500] = vectors[500] + 1e-4 * np.random.default_rng(0).standard_normal((1000, 64))
    found = find_duplicates(DuplicateOptions(str(write_vectors(tmp_path / "feats.h5", vectors))))
    assert [len(group) for group in found.similar] == [1000]


def test_equal_vectors_pass_any_threshold(tmp_path):
    vectors = anisotropic(50, 24)
    vectors[7] = vectors[31]
    path = str(write_vectors(tmp_path / "feats.h5", vectors))
    for threshold in (0.5, 0.99999, 1.0):
        found = find_duplicates(DuplicateOptions(path, threshold=threshold))
        assert {"0007.jpg", "0031.jpg"} in [{member.image.key for member in group} for group in found.similar]


def test_identical_files_alone_are_told_without_a_word_on_similarity(stored_copies):
    result = internvit("duplicates", stored_copies, "--bytes-only")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "75 images: 11 groups of identical files; 11 redundant images"
    assert "cosine" not in result.stdout + result.stderr and "similar" not in result.stdout + result.stderr
    told = json.loads(internvit("duplicates", stored_copies, "--bytes-only", "--json").stdout)
    assert (told["threshold"], told["space"], told["pictures"], told["similar"]) == (None, None, None, [])


def test_one_image_is_counted_as_one(tmp_path):
    path = write_vectors(tmp_path / "feats.h5", anisotropic(1, 12))
    assert "1 image: 0 groups of identical files; 0 redundant images" in internvit("duplicates", path).stdout
    assert "1 image compared" in internvit("search", path, "--key", "0000.jpg").stderr


def test_the_command_prints_groups_json_and_a_sheet(stored_copies, tmp_path):
    result = internvit("duplicates", stored_copies, "--sheet", tmp_path / "same.png")
    assert result.returncode == 0 and "identical 1: 2 files" in result.stdout and "similar 1:" in result.stdout
    assert "11 groups of identical files" in result.stdout and (tmp_path / "same.png").exists()
    told = json.loads(internvit("duplicates", stored_copies, "--json", "--threshold", "0.95").stdout)
    assert (told["exit_code"], told["error"], told["threshold"], told["how"]) == (0, None, 0.95, "exact")
    assert len(told["identical"]) == 11 and all(group[0]["similarity"] == 1 for group in told["similar"])
    for wrong in ("0", "1.5", "-1"):
        refused = internvit("duplicates", stored_copies, "--threshold", wrong, "--json")
        assert refused.returncode == 2 and json.loads(refused.stdout)["exit_code"] == 2


def drawn_problems(monkeypatch) -> list[str]:
    """Why pictures are missing on the sheets that are drawn, in order; empty words for those that are there."""
    problems: list[str] = []
    real = contact_sheets.contact_sheet

    def spy(rows, notes):
        assert any("random weights" in note for note in notes)
        problems.extend(cell.problem for row in rows for cell in row.cells)
        assert all((cell.picture is None) == bool(cell.problem) for row in rows for cell in row.cells)
        return real(rows, notes)

    monkeypatch.setattr(contact_sheets, "contact_sheet", spy)
    return problems


def test_sheets_show_pictures_of_the_named_folder_that_are_the_ones_that_were_encoded(
    stored_photos, tmp_path, monkeypatch
):
    """A picture that is searched for is where its user says, whatever the folder."""
    problems = drawn_problems(monkeypatch)
    query = stored_photos.parent / "pictures" / TWINS[0][1]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copyfile(stored_photos.parent / "pictures" / TWINS[0][0], moved / TWINS[0][0])
    (moved / TWINS[0][1]).write_bytes(query.read_bytes() + b"more")
    sheet = ("--sheet", tmp_path / "sheet.png", "--pictures", moved)
    arguments = (query, "--key", TWINS[0][0], "-n", 2, *sheet, "--device", "cpu")
    assert internvit("search", stored_photos, *arguments).returncode == 0
    by_picture, by_key = problems[:3], problems[3:]
    assert by_picture[0] == "" and "changed since" in by_picture[1] and by_picture[2] == ""
    assert by_key[0] == "" and "changed since" in by_key[1] and "No such file" in by_key[2]


def test_duplicates_compare_and_draw_the_pictures_of_the_named_folder(stored_copies, tmp_path, monkeypatch):
    problems = drawn_problems(monkeypatch)
    pictures = open_features(stored_copies)
    here = Path(pictures[0].path.removesuffix(pictures[0].key))
    assert internvit("duplicates", stored_copies, "--sheet", tmp_path / "a.png", "--pictures", here).returncode == 0
    assert problems and not any(problems)
    problems.clear()
    (tmp_path / "empty").mkdir()
    arguments = ("--sheet", tmp_path / "b.png", "--pictures", tmp_path / "empty", "--json")
    told = json.loads(internvit("duplicates", stored_copies, *arguments).stdout)
    assert told["pictures"]["same"] == told["pictures"]["different"] == 0 < told["pictures"]["unseen"]
    assert problems and all("No such file" in problem for problem in problems)


def test_stored_vectors_are_never_held_all_at_once(tmp_path, monkeypatch):
    """The comparison reads blocks; only numbers and similarities grow with the images."""
    path = write_vectors(tmp_path / "feats.h5", anisotropic(2000, 24))
    vectors = vectors_of(path)
    largest = 0
    real = type(vectors).__getitem__

    def watched(self, wanted):
        nonlocal largest
        block = real(self, wanted)
        largest = max(largest, block.size * 4)
        return block

    monkeypatch.setattr(type(vectors), "__getitem__", watched)
    for module in (nearest, similarity_space):
        monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    search(SearchOptions(str(path), keys=["0001.jpg"]))
    assert 0 < largest <= 20_000
    assert POOLED in open_features(path).stored
