"""`search` and `duplicates` on vectors of trained weights, with the pictures that they are of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from internvit_cli.similarity.duplicates import DuplicateOptions, find_duplicates
from internvit_cli.similarity.search import SearchOptions, search
from internvit_cli.similarity.similarity_space import choose_space

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import similarity as bench

if TYPE_CHECKING:
    from internvit_cli.similarity.duplicates import Duplicates

SOME = 8
"""Photographs of which the quick tests make copies."""
EACH = 1 + len(bench.CHANGES)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    with np.load(Path(__file__).parent / "data" / "trained_vectors.npz") as arrays:
        mean: np.ndarray = arrays["mean"].astype(np.float32)
    assert len(mean) == 42 * EACH + bench.BURST + bench.RE_SAVED
    return mean


@pytest.fixture(scope="module")
def pictures(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bench.Pictures:
    """Copies of some photographs; their vectors are the first ones."""
    files = sorted(photos.glob("*_*.*"))[:SOME]
    return bench.make_pictures(files, tmp_path_factory.mktemp("copies"), side=500, with_burst=False)


def duplicates_of(
    pictures: bench.Pictures, vectors: np.ndarray, rows: np.ndarray, folder: Path, *, are_there: bool = True
) -> tuple[Duplicates, tuple[int, int, int]]:
    path, keys = bench.output_of(pictures, vectors, rows, folder, are_there=are_there)
    found = find_duplicates(DuplicateOptions(str(path)))
    return found, bench.counted_groups(found, keys, pictures.scenes[rows])


def copies_of(photograph: int, count: int = EACH) -> np.ndarray:
    return EACH * photograph + np.arange(count)


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_copies_of_one_photograph_and_nothing_else_are_one_group(pictures, vectors, tmp_path, count):
    rows = np.resize(copies_of(3), count)
    found, (copies, of, joins) = duplicates_of(pictures, vectors, rows, tmp_path)
    assert (copies, of, joins) == (count - 1, count - 1, 0) and len(found.similar) == 1
    assert found.comparison.space.name == "raw" and found.comparison.pictures.different == 0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_few_different_photographs_are_no_group(pictures, vectors, tmp_path, count):
    found, _ = duplicates_of(pictures, vectors, EACH * np.arange(count), tmp_path)
    assert not found.similar


def test_every_copy_of_every_photograph_is_found_and_no_two_photographs_are_joined(pictures, vectors, tmp_path):
    found, (copies, of, joins) = duplicates_of(pictures, vectors, np.arange(SOME * EACH), tmp_path)
    assert (copies, of, joins) == (SOME * (EACH - 1), SOME * (EACH - 1), 0)
    assert found.comparison.space.name == "balanced"


def test_most_copies_of_one_photograph_beside_a_few_others_are_found(pictures, vectors, tmp_path):
    rows = np.concatenate([np.resize(copies_of(1), 40), EACH * np.array([2, 3, 4])])
    _, counts = duplicates_of(pictures, vectors, rows, tmp_path)
    assert counts == (39, 39, 0)


def test_without_pictures_vectors_decide_and_join_no_different_photographs(vectors, pictures, tmp_path):
    found, (copies, of, joins) = duplicates_of(pictures, vectors, np.arange(SOME * EACH), tmp_path, are_there=False)
    assert joins == 0 and copies > 0.6 * of
    assert found.comparison.pictures.unseen > 0 and found.comparison.pictures.same == 0


def test_a_changed_picture_is_not_compared(pictures, vectors, tmp_path):
    path, keys = bench.output_of(pictures, vectors, copies_of(0, 3), tmp_path, are_there=True)
    other = pictures.paths[EACH].read_bytes()
    (tmp_path / "pictures" / keys[0]).write_bytes(other)
    told = find_duplicates(DuplicateOptions(str(path))).comparison.pictures
    assert told.unseen == 2 and told.same + told.different == 1


def test_a_frame_of_a_burst_that_was_saved_anew_finds_itself_first(vectors):
    frames = 42 * EACH + np.array([place for place in range(25) if place % 5 != 1])
    again = 42 * EACH + np.arange(1, 25, 5)
    for known in (frames, np.concatenate([EACH * np.arange(42), frames])):
        space = choose_space(vectors[known])
        order = known[np.argsort(-(space.embed(vectors[again]) @ space.embed(vectors[known]).T), axis=1)]
        assert (order[:, 0] == again - 1).all()


def test_a_copy_finds_its_photograph_among_the_first_three(vectors, pictures, tmp_path):
    originals = EACH * np.arange(42)
    path = tmp_path / "feats.h5"
    rows = np.concatenate([originals, copies_of(5)[1:]])
    keys = [f"{row:05d}.png" for row in range(len(rows))]
    digests = np.random.default_rng(0).integers(0, 256, (len(rows), 32), np.uint8)
    bench.write_output(path, keys, vectors.shape[1], [vectors[rows]], digests=digests)
    found = search(SearchOptions(str(path), keys=keys[42:], count=8))
    assert found.space.name == "balanced"
    for answer in found.answers:
        assert keys[5] in [hit.image.key for hit in answer.hits][:8]
        assert {hit.image.key for hit in answer.hits[:3]} <= {keys[5], *keys[42:]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_similarities_in_a_tiny_output_are_raw_cosines_and_make_sense(vectors, pictures, tmp_path, count):
    path, keys = bench.output_of(pictures, vectors, copies_of(2, count), tmp_path, are_there=True)
    found = search(SearchOptions(str(path), keys=keys[:1]))
    assert found.space.name == "raw" and "fewer than" in found.space.words
    assert len(found.answers[0].hits) == count - 1
    assert all(0.95 < hit.similarity <= 1 for hit in found.answers[0].hits)


@pytest.mark.parametrize("rows", [np.arange(16), np.arange(64)], ids=["raw", "balanced"])
def test_search_and_duplicates_tell_the_same_similarity_of_a_pair(vectors, pictures, tmp_path, rows):
    path, _ = bench.output_of(pictures, vectors, rows, tmp_path, are_there=True)
    groups = find_duplicates(DuplicateOptions(str(path))).similar
    assert groups
    for first, *others in groups:
        answer = search(SearchOptions(str(path), keys=[first.image.key], count=len(rows))).answers[0]
        similarity = {hit.image.key: hit.similarity for hit in answer.hits}
        for member in others:
            assert member.similarity == pytest.approx(similarity[member.image.key], abs=1e-5)


@pytest.mark.sweep
def test_of_all_photographs_every_copy_is_found_and_different_ones_are_not_joined(photos, vectors, tmp_path):
    (tmp_path / "copies").mkdir()
    files = sorted(photos.glob("*_*.*"))
    pictures = bench.make_pictures(files, tmp_path / "copies", side=900, with_burst=False)
    _, (copies, of, joins) = duplicates_of(pictures, vectors, np.arange(42 * EACH), tmp_path)
    assert (copies, joins) == (of, 0)
