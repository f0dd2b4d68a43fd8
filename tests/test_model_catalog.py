"""A name becomes a card, or one line that says why not; nothing here needs a network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from model_helpers import safetensors_bytes

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model import hub
from internvit_cli.model.catalog import KNOWN_MODELS, TINY_RANDOM, describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.layouts import expected_shapes
from internvit_cli.runtime.observer import Observer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "intern_vit_6b", "hidden_size": 64, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty hub cache, offline: no test may reach the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.ask.cache_clear()


@pytest.fixture
def cached(tmp_path):
    """A hub cache that holds the default model's config, as huggingface_hub lays it out."""
    repo = tmp_path / "hub" / f"models--{DEFAULT_MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (repo / ".no_exist" / COMMIT).mkdir(parents=True)
    (repo / ".no_exist" / COMMIT / "preprocessor_config.json").touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def online(monkeypatch, error=None, sha=COMMIT, files=("config.json",)):
    """A hub that answers, or fails with this error."""
    siblings = [SimpleNamespace(rfilename=name) for name in files]

    class Api:
        def model_info(self, repo, **_):
            if error is not None:
                raise error
            return SimpleNamespace(sha=sha, siblings=siblings)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def count_calls(monkeypatch, owner, name):
    """Have something's calls counted; returns the list that grows with them."""
    real, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *given, **options: (calls.append(given), real(*given, **options))[1])
    return calls


def hub_error(kind):
    response = type("Response", (), {"status_code": 404, "headers": {}, "request": None, "text": ""})()
    error = kind.__new__(kind)
    Exception.__init__(error, "GET https://user:hf_secret@huggingface.co/ failed")
    error.response = response
    return error


def test_tiny_random_is_built_in_memory_only_when_named():
    card = describe_model(TINY_RANDOM)
    assert (card.origin, card.vision.hidden_size, card.vision.num_layers, card.tile_size) == ("memory", 64, 2, 448)
    assert card.resolve_layer() == 2
    assert card.projector_size is None


def test_tiny_random_is_the_same_for_ever():
    digest = Checkpoint.open(describe_model(TINY_RANDOM), layer=2).digest()
    assert digest == "3bd0cc49f6455b2e5f7e91a73789c1285cdd0c471792ff486394033a33759fde"


@pytest.mark.parametrize("name", ["300m", "300M", "InternViT-300M-448px-V2_5", DEFAULT_MODEL.lower(), DEFAULT_MODEL])
def test_aliases_and_short_names_in_any_case_are_the_hub_id(name):
    card = describe_model(name, allow_catalog=True)
    assert (card.name, card.origin) == (DEFAULT_MODEL, "catalog")


def test_the_catalog_knows_every_published_encoders_feature_layer():
    layers = {
        model.repo.rpartition("/")[2]: describe_model(model.repo, allow_catalog=True).resolve_layer()
        for model in KNOWN_MODELS
    }
    assert layers == {
        "InternViT-300M-448px-V2_5": 24,
        "InternViT-300M-448px": 24,
        "InternViT-6B-448px-V2_5": 45,
        "InternViT-6B-448px-V1-5": 45,
        "InternViT-6B-448px-V1-2": 45,
        "InternViT-6B-448px-V1-0": 45,
        "InternViT-6B-224px": 45,
    }


def test_a_catalog_card_has_no_weights():
    with pytest.raises(ModelError, match="the weights are not available") as caught:
        Checkpoint.open(describe_model("300m", allow_catalog=True), layer=24)
    assert TINY_RANDOM in caught.value.hint


def test_without_network_a_hub_model_is_an_error_that_names_the_ways_out():
    with pytest.raises(ModelError, match="offline") as caught:
        describe_model(DEFAULT_MODEL)
    assert "directory" in caught.value.hint
    assert TINY_RANDOM in caught.value.hint


def test_a_catalog_answer_is_never_given_for_a_revision():
    with pytest.raises(ModelError, match="offline"):
        describe_model("300m", revision="v2", allow_catalog=True)


def test_the_hub_cache_serves_without_network(cached):
    card = describe_model("300m")
    assert (card.origin, card.revision, card.vision.hidden_size) == ("hub", COMMIT, 64)
    assert describe_model("300m", revision=COMMIT) == describe_model("300m", revision="main", offline=True) == card


def test_the_hub_cache_serves_when_the_hub_cannot_be_reached(cached, monkeypatch):
    online(monkeypatch, OSError("Name or service not known"))
    assert describe_model("300m").revision == COMMIT


def test_an_unreachable_hub_is_tried_once_and_not_waited_for(monkeypatch):
    online(monkeypatch, ConnectionRefusedError(111, "Connection refused"))
    tries = count_calls(monkeypatch, huggingface_hub.HfApi, "model_info")
    waits = count_calls(monkeypatch, time, "sleep")
    with pytest.raises(ModelError, match="cannot be reached \\(Connection refused, after"):
        describe_model("some/model")
    assert (len(tries), len(waits)) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no such model"),
        (errors.GatedRepoError, "restricted"),
        (errors.RevisionNotFoundError, "no revision"),
        (errors.HfHubHTTPError, "HTTP 404"),
    ],
)
def test_the_hubs_refusals_are_one_clean_line_without_secrets(monkeypatch, kind, words):
    online(monkeypatch, hub_error(kind))
    with pytest.raises(ModelError, match=words) as caught:
        describe_model("some/model", revision="x")
    assert "\n" not in caught.value.message
    assert "hf_secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "name", ["", "  ", "a/b/c", "no such", "/nowhere/at/all", "./here", "../x", "a--b/c", "x/..", "~/m"]
)
def test_a_name_that_cannot_be_a_model_is_refused_without_asking_the_hub(name):
    with pytest.raises(ModelError):
        describe_model(name)


@pytest.mark.parametrize(("typo", "meant"), [("tiny-randm", "tiny-random"), ("InternViT-300M-448px-V25", "300m-448px")])
def test_a_typo_is_answered_with_what_was_meant(typo, meant):
    with pytest.raises(ModelError) as caught:
        describe_model(typo)
    assert "did you mean" in caught.value.hint
    assert meant in caught.value.hint


def test_a_file_of_weights_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(ModelError, match="there is no such file"):
        describe_model("intern_vit_6b_224px.pth")


def test_a_revision_of_something_off_the_hub_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="--revision"):
        describe_model(TINY_RANDOM, revision="main")
    with pytest.raises(UsageError, match="--revision"):
        describe_model(str(tmp_path), revision="main")


@pytest.mark.parametrize("revision", ["", "../../x", "/etc/passwd", "a b", "x\n"])
def test_a_revision_that_can_be_none_is_a_usage_error(revision):
    with pytest.raises(UsageError, match="not a branch"):
        describe_model("300m", revision=revision, allow_catalog=True)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model_type": 5}', b'{"a": 1' + b"0" * 9999 + b"}"]
)
def test_a_broken_config_is_an_error_that_names_the_place(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=str(tmp_path)):
        describe_model(str(tmp_path))


def test_a_directory_without_config_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        describe_model(str(tmp_path))


def test_cards_and_checkpoints_need_no_torch():
    code = (
        "import sys\n"
        "from internvit_cli.model.catalog import describe_model\n"
        "from internvit_cli.model.checkpoint import Checkpoint\n"
        "Checkpoint.open(describe_model('tiny-random'), layer=2).digest()\n"
        "describe_model('300m', offline=True, allow_catalog=True)\n"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def stored_on_hub(folder) -> None:
    """A sharded chat checkpoint, whose second shard holds only the language model."""
    folder.mkdir()
    vision = {**CONFIG, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16, "image_size": 28}
    config = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": {"hidden_size": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(describe_model(str(folder)).vision, 1, None)
    tower = {f"vision_model.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    (folder / "a.safetensors").write_bytes(safetensors_bytes(tower))
    weight_map = dict.fromkeys(tower, "a.safetensors") | {"language_model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_from_the_hub_only_json_and_the_shards_with_wanted_tensors_are_fetched(tmp_path, monkeypatch):
    stored_on_hub(tmp_path / "stored")
    online(monkeypatch, files=[path.name for path in (tmp_path / "stored").iterdir()] + ["b.safetensors"])
    fetched = []

    def download(repo, filename, *, revision, **_):
        fetched.append(filename)
        assert (repo, revision) == ("some/model", COMMIT)
        return str(tmp_path / "stored" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    card = describe_model("some/model")
    assert (card.name, card.revision) == ("some/model", COMMIT)
    local = Checkpoint.open(describe_model(str(tmp_path / "stored")), layer=1)
    assert Checkpoint.open(card, layer=1).digest() == local.digest()
    assert fetched == ["config.json", "model.safetensors.index.json", "a.safetensors"]


def test_a_download_tells_how_many_bytes_have_come_and_draws_nothing(tmp_path, monkeypatch, capsys):
    states = []

    class Watching(Observer):
        def moved(self, phase):
            states.append((phase.name, phase.unit, phase.state.done, phase.state.total))

    def download(repo, filename, *, revision, etag_timeout, tqdm_class=None):
        # As huggingface_hub does: `name` is its own, and large files have a second bar for what is written.
        with (
            tqdm_class(total=30, unit="B", unit_scale=True, desc=filename, name="hub") as bar,
            tqdm_class(total=30) as written,
        ):
            bar.update(10)
            written.update(5)
            bar.update(20)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    hub.download("some/model", COMMIT, "a.safetensors", Watching())
    assert states == [("fetching a.safetensors", "B", done, 30) for done in (10, 10, 30)]
    assert capsys.readouterr().err == ""


def test_a_failing_download_is_one_clean_line(monkeypatch):
    online(monkeypatch)

    def download(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ModelError, match=r"config\.json cannot be fetched \(No space left on device\)"):
        describe_model("some/model")
