"""`internvit probe`: what stored features are worth, held against scikit-learn and against what must be."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from run_helpers import extract, internvit
from torch import nn

from internvit_cli import open_features
from internvit_cli.errors import UsageError
from internvit_cli.probe import training
from internvit_cli.probe.attention import AttentionPooling, QueryPooling, heads_for, probabilities, train
from internvit_cli.probe.labels import labels_of_keys, read_labels
from internvit_cli.probe.linear import choose_strength, fit_linear
from internvit_cli.probe.metrics import accuracy, confusion
from internvit_cli.probe.nearest import NearestNeighbors, choose_neighbors
from internvit_cli.probe.results_folder import OF_CLASSIFICATION, OF_SEGMENTATION
from internvit_cli.probe.split import group_numbers, shots_of, stratified_split

ROOT = Path(__file__).resolve().parents[1]
EACH = 14
CLASSES = {"blue": (40, 60, 210), "green": (60, 190, 50), "red": (210, 50, 40)}
QUICK = ("--probe", "knn,linear", "--ignore-duplicates")


def draw(folder: Path, seed: int = 0, each: int = EACH) -> None:
    """Noisy pictures of three colors, in a folder each."""
    random = np.random.default_rng(seed)
    for name, color in CLASSES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = np.clip(np.array(color) + random.normal(0, 40, (56, 56, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{seed}-{number:02d}.png")


def extracted(pictures: Path, output: Path, *options: object) -> Path:
    result = extract(pictures, "-o", output, "--tile-size", "56", *options)
    assert result.returncode in (0, 3), result.stderr
    return output


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colors are learned in a few steps."""
    monkeypatch.setattr(training, "LEAST_STEPS", 60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder)
    (folder / "red" / "text.png").write_text("no picture")
    Image.new("RGB", (56, 56)).save(folder / "loose.png")
    return folder


@pytest.fixture(scope="module")
def output(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(pictures, tmp_path_factory.mktemp("output") / "feats.h5")


def probed(*arguments: object) -> dict[str, Any]:
    result = internvit("probe", *arguments, "--json", "-q")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> str:
    result = internvit("probe", *arguments, "-q")
    assert result.returncode in (1, 2), result.stdout
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
    return error


# ------------------------------------------------------------------------------------------------------ the command


def test_folders_of_keys_are_labels_and_every_image_is_counted(output: Path) -> None:
    found = probed(output, *QUICK)
    images = found["images"]
    assert found["classes"] == 3 and images["train"] + images["test"] == 3 * EACH
    assert (images["unlabelled"], images["skipped"]) == (1, 1), "the loose picture, and the text"
    for name in ("knn", "linear"):
        score = found["probes"][name]
        assert score["accuracy"] == 1.0, "colors are told apart"
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
    assert probed(output, *QUICK) == found, "the same seed gives the same result"
    assert probed(output, *QUICK, "--seed", 1)["images"] == images


def test_all_probes_run_and_their_results_are_files(output: Path, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    found = probed(output, "-o", folder, "--shots", "1,3", "--tries", 2)
    assert list(found["probes"]) == ["knn", "linear", "attention", "queries"]
    assert found["probes"]["attention"]["accuracy"] > 0.8 and found["gap"] is not None
    assert [(one["probe"], one["shots"]) for one in found["few_shots"]] == [
        ("knn", 1),
        ("linear", 1),
        ("knn", 3),
        ("linear", 3),
    ]
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "per_class.csv", "predictions.csv", "confusion.png", "head.safetensors"} <= names
    stored = json.loads((folder / "results.json").read_text())
    assert stored["probes"] == found["probes"] and stored["recipe"]["tile_size"] == 56
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["images"]["test"]
    right = sum(row["label"] == row["linear"] for row in rows) / len(rows)
    assert right == found["probes"]["linear"]["accuracy"]
    assert "exists already" in refusal(output, *QUICK, "-o", folder)
    (folder / "mine.txt").touch()
    assert "mine.txt" in refusal(output, *QUICK, "-o", folder, "--overwrite")
    (folder / "mine.txt").unlink()
    probed(output, *QUICK, "-o", folder, "--overwrite")
    assert set(json.loads((folder / "results.json").read_text())["probes"]) == {"knn", "linear"}
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]


def test_another_output_is_the_test_part_and_a_head_labels_it(output: Path, tmp_path: Path) -> None:
    draw(tmp_path / "more", seed=1, each=4)
    other = extracted(tmp_path / "more", tmp_path / "more.h5")
    found = probed(output, "--test", other, *QUICK, "-o", tmp_path / "probe")
    assert found["images"]["train"] == 3 * EACH and found["images"]["test"] == 12
    applied = internvit("probe", other, "--apply", tmp_path / "probe" / "head.safetensors", "-q")
    assert applied.returncode == 0, applied.stderr
    rows = list(csv.DictReader(applied.stdout.splitlines()))
    assert [row["key"] for row in rows] == list(open_features(other))
    assert all(row["label"] == row["key"].split("/")[0] for row in rows)


def test_a_head_of_attention_labels_as_it_was_tested(output: Path, tmp_path: Path) -> None:
    probed(output, "--probe", "attention", "--ignore-duplicates", "-o", tmp_path / "probe")
    with (tmp_path / "probe" / "predictions.csv").open(newline="") as file:
        tested = {row["key"]: row for row in csv.DictReader(file)}
    results = json.loads((tmp_path / "probe" / "results.json").read_text())["probes"]
    best = max(results, key=lambda name: results[name]["accuracy"])
    applied = internvit("probe", output, "--apply", tmp_path / "probe" / "head.safetensors", "--json", "-q")
    found = json.loads(applied.stdout)
    assert found["probe"] == best
    for row in found["labels"]:
        if row["key"] in tested:
            assert row["label"] == tested[row["key"]][best]
            assert abs(row["confidence"] - float(tested[row["key"]][f"{best}_confidence"])) < 1e-3


def test_a_head_is_refused_for_features_of_another_kind(output: Path, pictures: Path, tmp_path: Path) -> None:
    probed(output, *QUICK, "-o", tmp_path / "probe")
    other = extracted(pictures, tmp_path / "other.h5", "--pool", "cls")
    assert "pool differ" in refusal(other, "--apply", tmp_path / "probe" / "head.safetensors")
    for content in (b"", b"x" * 100, (tmp_path / "probe" / "head.safetensors").read_bytes()[:-8]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert "is not the head of a probe" in refusal(output, "--apply", tmp_path / "bad.safetensors")


def test_copies_of_a_picture_are_in_one_part(tmp_path: Path) -> None:
    draw(tmp_path / "pictures", each=6)
    for number in range(8):  # most of a class is one picture
        copy = (tmp_path / "pictures" / "red" / "0-00.png").read_bytes()
        (tmp_path / "pictures" / "red" / f"copy-{number}.png").write_bytes(copy)
    output = extracted(tmp_path / "pictures", tmp_path / "feats.h5")
    for seed in range(5):
        found = probed(output, "--probe", "knn", "--seed", seed, "-o", tmp_path / f"probe{seed}")
        assert any("copies of each other" in note for note in found["notes"])
        text = (tmp_path / f"probe{seed}" / "predictions.csv").read_text()
        assert text.count("copy-") + text.count("red/0-00") in (0, 9)


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.fixture
def keys(output: Path) -> list[str]:
    return [key for key in open_features(output).done if "/" in key]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_labels_and_splits_come_from_a_table(output: Path, keys: list[str], tmp_path: Path, suffix: str) -> None:
    rows = [
        {"path": key, "Label": "warm" if key.startswith("red") else "cold", "split": "val" if number % 3 else "train"}
        for number, key in enumerate(keys)
    ]
    table = tmp_path / f"labels{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    found = probed(output, "--labels", table, "--probe", "linear")
    assert found["classes"] == 2 and "Label and split" in found["labels"]
    assert found["images"]["train"] == len(keys[::3]) and found["images"]["test"] == len(keys) - len(keys[::3])


def test_labels_that_cannot_be_used_are_one_line_that_names_the_problem(
    output: Path, keys: list[str], tmp_path: Path
) -> None:
    def said(text: str, *options: object, name: str = "labels.csv") -> str:
        (tmp_path / name).write_text(text)
        return refusal(output, "--labels", tmp_path / name, "--probe", "linear", *options)

    lines = [f"{key},{key[0]}" for key in keys]
    whole = "key,label\n" + "\n".join(lines) + "\n"
    assert "such as moon.png" in said(whole + "moon.png,m\n")
    assert "no column is named label" in said("key,size\na,1\n")
    assert f"{keys[0]} is both b and x" in said(whole + f"{keys[0]},x\n")
    assert "at least two classes: all labelled images are of x" in said(f"key,label\n{keys[0]},x\n{keys[1]},x\n")
    assert "it holds no labels" in said("key,label\n")
    assert "is 'perhaps'" in said(f"key,label,split\n{keys[0]},x,perhaps\n")
    assert "not a jsonl table" in said("{", name="labels.jsonl")
    assert "not a table of labels" in said("", name="labels.txt")
    assert "no image" in refusal(output, "--depth", 3, *QUICK)
    assert refusal(output, "--labels", tmp_path / "missing.csv", *QUICK)
    (tmp_path / "more.csv").write_text(whole + "moon.png,m\n")
    found = probed(output, "--labels", tmp_path / "more.csv", "--probe", "linear", "--ignore-unknown")
    assert found["images"]["unknown"] == 1


def test_attention_needs_tokens_of_a_view_of_the_whole_picture(pictures: Path, tmp_path: Path) -> None:
    pooled = extracted(pictures, tmp_path / "pooled.h5", "--tokens", "none")
    assert "holds no tokens" in refusal(pooled, "--probe", "attention")
    assert set(probed(pooled, "--ignore-duplicates")["probes"]) == {"knn", "linear"}, "what the output allows"
    wide = tmp_path / "wide"
    for name in ("a", "b"):
        (wide / name).mkdir(parents=True)
        for number in range(4):
            Image.effect_noise((200, 60), 50 + number).convert("RGB").save(wide / name / f"{number}.png")
    several = extracted(wide, tmp_path / "wide.h5", "--no-thumbnail")
    assert "a/0.png has several tiles and no thumbnail" in refusal(several, "--probe", "attention")


@given(st.lists(st.sampled_from(["a/x.png", "a/b/y.png", "c/b/z.png", "w.png"]), unique=True), st.integers(1, 3))
def test_a_label_is_the_folder_at_a_depth(keys: list[str], depth: int) -> None:
    labels = labels_of_keys(keys, depth).by_key
    for key in keys:
        folders = key.split("/")[:-1]
        assert (labels[key].name if key in labels else None) == (folders[depth - 1] if len(folders) >= depth else None)


def test_a_table_with_a_mark_of_its_encoding_and_blank_labels_is_read(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbfkey,label\na.png,cat\nb.png,\n")
    assert {key: label.name for key, label in read_labels(str(tmp_path / "labels.csv")).by_key.items()} == {
        "a.png": "cat"
    }
    (tmp_path / "latin.csv").write_bytes(b"key,label\na.png,caf\xe9\n")
    with pytest.raises(UsageError, match="not a csv table"):
        read_labels(str(tmp_path / "latin.csv"))


# ------------------------------------------------------------------------------------------------------------- parts


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=2, max_size=80),
    st.floats(0.05, 0.6),
    st.integers(0, 99),
)
def test_groups_are_never_divided_and_every_class_stays_in_training(
    images: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    groups = np.array([group for _, group in images])
    first = {group: label for label, group in reversed(images)}
    labels = np.array([first[group] for group in groups])  # a group has one class
    is_test = stratified_split(labels, groups, fraction, np.random.default_rng(seed))
    assert not set(groups[is_test]) & set(groups[~is_test])
    assert set(labels[~is_test]) == set(labels)
    for label in set(labels.tolist()):
        if len(set(groups[labels == label])) > 1:
            assert is_test[labels == label].any(), "a class of several groups is tested"


def test_the_share_of_each_class_for_testing_is_what_was_asked_for() -> None:
    labels = np.repeat([0, 1], [1000, 50])
    is_test = stratified_split(labels, np.arange(1050), 0.2, np.random.default_rng(0))
    assert abs(is_test[:1000].mean() - 0.2) < 0.002 and abs(is_test[1000:].mean() - 0.2) <= 0.02


def test_links_join_groups() -> None:
    assert len(set(group_numbers(6, [(0, 1), (1, 2), (4, 5)]).tolist())) == 3


def test_shots_are_so_many_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 2, 30])
    chosen = shots_of(labels, 5, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [5, 2, 5] and len(set(chosen.tolist())) == 12


# ------------------------------------------------------------------------------- the probes, against scikit-learn


def blobs(seed: int = 0, classes: int = 6, each: int = 60, width: int = 24) -> tuple[np.ndarray, ...]:
    """Overlapping clouds, of which some axes are much longer than others."""
    random = np.random.default_rng(seed)
    centers = random.normal(0, 1.0, (classes, width))
    labels = np.repeat(np.arange(classes), each)
    vectors = (centers[labels] + random.normal(0, 1.4, (len(labels), width))) * np.geomspace(0.1, 30, width) + 5
    order = random.permutation(len(labels))
    vectors, labels = vectors[order].astype(np.float32), labels[order]
    half = len(labels) // 2
    return vectors[:half], labels[:half], vectors[half:], labels[half:]


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_logistic_regression_is_that_of_scikit_learn(strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, tested, expected = blobs()
    scaled = (x - x.mean(0)) / x.std(0), (tested - x.mean(0)) / x.std(0)
    reference = linear_model.LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaled[0], y)
    head = fit_linear(x, y, 6, strength)
    found = head.probabilities(tested)
    assert np.abs(found - reference.predict_proba(scaled[1])).max() < 0.02
    assert abs((found.argmax(1) == expected).mean() - reference.score(scaled[1], expected)) <= 0.005


def test_neighbors_are_those_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y, tested, expected = blobs()
    trained = NearestNeighbors.fit(x, y, 6)
    votes = trained.votes(tested, (10, 20))
    unit = [(part - x.mean(0)) / np.linalg.norm(part - x.mean(0), axis=1, keepdims=True) for part in (x, tested)]
    for k, shares in votes.items():
        reference = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(unit[0], y)
        assert np.abs(shares - reference.predict_proba(unit[1])).max() < 1e-3
        assert abs((shares.argmax(1) == expected).mean() - reference.score(unit[1], expected)) <= 0.005
    alone = trained.votes(x, (1,), leave_one_out=True)[1].argmax(1)
    assert (alone == y).mean() < 1, "no image votes for itself"
    assert choose_neighbors(trained, x) in (10, 20, 100)


def test_more_neighbors_than_images_are_all_images() -> None:
    trained = NearestNeighbors.fit(np.eye(3, dtype=np.float32), np.array([0, 1, 1]), 2)
    assert trained.votes(np.eye(3, dtype=np.float32), (200,))[200].shape == (3, 2)


def test_the_strength_is_chosen_on_images_that_were_not_fitted() -> None:
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (200, 60)).astype(np.float32)
    y = (x[:, 0] + random.normal(0, 1.5, 200) > 0).astype(np.int64)
    held_out = np.arange(200) % 4 == 0
    chosen = choose_strength(x, y, 2, held_out)
    assert chosen < 1.0, "noise is not worth fitting"


def test_the_official_block_is_its_plain_form() -> None:
    """Keys and values projected token by token, as in the source."""
    torch.manual_seed(0)
    width, heads, tokens = 48, 4, torch.randn(5, 9, 48) * 3 + 1
    block = AttentionPooling(width, heads, 7).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    q = block.q(block.norm_q(tokens.mean(1, keepdim=True))).view(5, 1, heads, -1).transpose(1, 2)
    k, v = (
        part(norm(tokens)).view(5, 9, heads, -1).transpose(1, 2)
        for part, norm in ((block.k, block.norm_k), (block.v, block.norm_v))
    )
    pooled = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(5, width)
    torch.testing.assert_close(block(tokens), block.head(block.proj(pooled)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: AttentionPooling(32, 2, 2), lambda: QueryPooling(32, 2)])
def test_attention_finds_what_the_mean_hides(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class is told by one token among many, whose channels cancel in the mean."""
    monkeypatch.setattr(training, "LEAST_STEPS", 400)
    random = np.random.default_rng(0)
    labels = np.arange(120) % 2
    tokens = random.normal(0, 0.3, (120, 16, 32)).astype(np.float32)
    for image, label in enumerate(labels):
        place, other = random.permutation(16)[:2]
        tokens[image, place, :4] += 4 if label else 0
        tokens[image, other, :4] -= 4 if label else 0
    torch.manual_seed(0)
    head = make()
    read = lambda chosen: torch.from_numpy(tokens[chosen])  # noqa: E731
    train(head, read, labels, seed=0)
    found = probabilities(head, read, 120, lambda _: None)
    assert (found.argmax(1) == labels).mean() > 0.95


def test_the_heads_are_those_of_the_models() -> None:
    assert [heads_for(width) for width in (1024, 3200, 384, 64, 100)] == [16, 25, 6, 1, 1]


# ----------------------------------------------------------------------------------------------------------- measures


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 9))
def test_an_interval_holds_the_accuracy_or_nearly_and_narrows_with_images(count: int, share: float, seed: int) -> None:
    is_right = np.arange(count) < round(share * count)
    found = accuracy(is_right, seed)
    assert found.value == is_right.mean() and found == accuracy(is_right, seed)
    assert 0 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1
    assert found.high - found.low <= 4.5 * 0.5 / count**0.5 or count < 20
    if share == 1:
        assert 0.025 <= found.low < 1, "that all are right by chance is never ruled out"


def test_confusions_are_counted_by_row() -> None:
    counts = confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_the_commands_of_the_page_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, fewer pictures and fewer steps."""
    monkeypatch.setattr(training, "LEAST_STEPS", 20)
    page = (ROOT / "docs" / "probe.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    first, *lines = block.strip().splitlines()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVIT_MODEL", "tiny-random")
    python, script, *arguments = shlex.split(first)
    assert python == "python"
    subprocess.run([sys.executable, ROOT / script, *arguments, "--each", "8"], check=True)
    for line in lines:
        result = internvit(*shlex.split(line)[1:])
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert result.stdout.startswith("key,label,confidence\n") and len(result.stdout.splitlines()) == 41
    listed = set(re.findall(r"^\| `([a-z_]+\.[a-z]+)` \|", page, re.MULTILINE))
    assert listed == {*OF_CLASSIFICATION, *OF_SEGMENTATION}
    assert {path.name for path in (tmp_path / "probe").iterdir()} <= set(OF_CLASSIFICATION)
    assert {path.name for path in (tmp_path / "segments").iterdir()} == set(OF_SEGMENTATION)


@pytest.mark.parametrize(
    ("option", "word", "expected"),
    [
        ("--probe", "knn,linaer", "not a list of knn, linear, attention, head\nhint: did you mean linear?"),
        ("--probe", "", "not a list of knn, linear, attention, head"),
        ("--shots", "0", "not a list of numbers of images from 1 to 99,999\nhint: give numbers such as 1,5,10"),
    ],
)
def test_a_list_with_an_unknown_word_is_told_what_was_expected(option: str, word: str, expected: str) -> None:
    result = internvit("probe", "f.h5", option, word)
    assert result.returncode == 2 and expected in result.stderr


@pytest.mark.parametrize("end", ['"a/1.png,x', f"a/1.png,{'x' * 200_000}\n"])
def test_a_table_that_is_damaged_after_its_first_lines_is_no_table(end: str, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("key,label\na/0.png,x\n" + end)
    with pytest.raises(UsageError, match="not a csv table"):
        read_labels(str(table))


def test_images_that_were_all_skipped_are_told_as_such(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "0.png").write_bytes(b"no picture")
    extract(tmp_path / "pictures", "-o", tmp_path / "f.h5", "--tile-size", "56")
    result = internvit("probe", tmp_path / "f.h5")
    assert result.returncode == 2 and "no labelled image" in result.stderr, result.stderr


def test_a_head_is_applied_to_the_layer_that_it_was_trained_on(tmp_path: Path) -> None:
    draw(tmp_path / "pictures", each=4)
    output = extracted(tmp_path / "pictures", tmp_path / "f.h5", "--layer", "1,2")
    trained = internvit("probe", output, "--layer", "1", *QUICK, "-o", tmp_path / "probe")
    assert trained.returncode == 0, trained.stderr
    head = tmp_path / "probe" / "head.safetensors"
    one, other = (internvit("probe", output, "--apply", head, *more) for more in ((), ("--layer", "1")))
    assert one.returncode == 0 and one.stdout == other.stdout
    wrong = internvit("probe", output, "--apply", head, "--layer", "2")
    assert wrong.returncode == 1 and "trained on: layer differs" in wrong.stderr
