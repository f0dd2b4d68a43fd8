"""The encoder-cache connector for vLLM, against the abstract base of vLLM as it is described here.

vLLM itself is not installed for the tests: `SIGNATURES` says what its base class demands.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import storage_helpers as helpers
import torch
from exchange_helpers import make, mixed_shard

import internvit_cli
from internvit_cli import OutputError, UsageError, open_features
from internvit_cli.config import TokenOrder, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = "vllm.distributed.ec_transfer.ec_connector.base"
CONNECTOR = "internvit_cli.api.vllm_connector"
SIGNATURES = """
def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs) -> None: ...
def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs) -> None: ...
def has_cache_item(self, identifier: str) -> bool: ...
def update_state_after_alloc(self, request: Request, index: int): ...
def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata: ...
"""
"""The abstract methods of ECConnectorBase, read in vLLM 0.33."""
DEMANDED = {node.name: node.args for node in ast.parse(SIGNATURES).body if isinstance(node, ast.FunctionDef)}


def base_module() -> ModuleType:
    """A base with those abstract methods, and with what it provides to connectors."""

    class Metadata(ABC):  # noqa: B024
        def __init__(self) -> None:
            self.evict_orphan: set[str] = set()

    def initialize(self: Any, vllm_config: Any, role: Any) -> None:
        self._metadata, self._role = None, role

    methods = {name: abstractmethod(lambda self, *_, **__: None) for name in DEMANDED}
    provided = {
        "__init__": initialize,
        "bind_connector_metadata": lambda self, metadata: setattr(self, "_metadata", metadata),
        "_get_connector_metadata": lambda self: self._metadata,
    }
    module = ModuleType(BASE)
    module.ECConnectorBase = type("ECConnectorBase", (ABC,), methods | provided)
    module.ECConnectorMetadata = Metadata
    return module


@pytest.fixture(scope="module")
def connector() -> Iterator[ModuleType]:
    """The module, as vLLM would import it."""
    parts = BASE.split(".")
    with pytest.MonkeyPatch.context() as patch:
        for end in range(1, len(parts)):
            patch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        patch.setitem(sys.modules, BASE, base_module())
        platforms = ModuleType("vllm.platforms")
        platforms.current_platform = SimpleNamespace(device_type="cpu")
        patch.setitem(sys.modules, "vllm.platforms", platforms)
        patch.delitem(sys.modules, CONNECTOR, raising=False)
        yield importlib.import_module(CONNECTOR)
        sys.modules.pop(CONNECTOR, None)


def config(features: object, dtype: torch.dtype = torch.bfloat16) -> Any:
    extra = {} if features is None else {"features": str(features)}
    transfer = SimpleNamespace(get_from_extra_config=extra.get)
    return SimpleNamespace(ec_transfer_config=transfer, model_config=SimpleNamespace(dtype=dtype))


def request(*identifiers: str) -> Any:
    return SimpleNamespace(mm_features=[SimpleNamespace(identifier=identifier) for identifier in identifiers])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make(tmp_path / "chat.h5", mixed_shard(tokens=Tokens.PROJECTED))
    return tmp_path / "chat.h5"


def test_every_abstract_method_is_there_with_the_arguments_of_the_base(connector: ModuleType) -> None:
    assert len(DEMANDED) == 5
    for name, arguments in DEMANDED.items():
        found = inspect.signature(getattr(connector.FeatureConnector, name)).parameters
        expected = [argument.arg for argument in arguments.args]
        assert [p.name for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == expected, name
        keywords = [p.name for p in found.values() if p.kind is p.VAR_KEYWORD]
        assert keywords == ([arguments.kwarg.arg] if arguments.kwarg else []), name


def test_nothing_else_of_the_package_imports_vllm() -> None:
    package = Path(internvit_cli.__file__).parent
    users = [path.name for path in package.rglob("*.py") if re.search(r"(import|from) vllm", path.read_text())]
    assert users == ["vllm_connector.py"]


def test_what_the_scheduler_notes_the_worker_loads(connector: ModuleType, path: Path) -> None:
    features = open_features(path)
    done = list(features.done)
    scheduler = connector.FeatureConnector(config(path), "scheduler")
    asked = request(done[0], done[1])
    for index in (0, 1, 0):
        scheduler.update_state_after_alloc(asked, index)
    plan = pickle.loads(pickle.dumps(scheduler.build_connector_meta(None)))
    assert plan.keys == done[:2] and plan.evict_orphan == set()
    assert scheduler.build_connector_meta(None).keys == []  # each step begins anew
    worker = connector.FeatureConnector(vllm_config=config(path), role="worker")
    worker.bind_connector_metadata(plan)
    present = torch.zeros(1)
    cache = {done[1]: present}
    worker.start_load_caches(cache)
    assert cache[done[1]] is present
    tokens = features[done[0]].chat_tokens()
    assert cache[done[0]].dtype is torch.bfloat16 and cache[done[0]].shape == (tokens.shape[0] * 4, tokens.shape[2])
    assert torch.equal(cache[done[0]], tokens.flatten(0, 1).to(torch.bfloat16))


def test_only_images_with_features_are_in_the_cache(connector: ModuleType, path: Path) -> None:
    scheduler = connector.FeatureConnector(config(path), "scheduler")
    features = open_features(path)
    for key, image in features.items():
        assert scheduler.has_cache_item(key) is image.is_done
        scheduler.update_state_after_alloc(request(key), 0)
    assert scheduler.has_cache_item("a picture of someone else") is False
    assert scheduler.build_connector_meta(None).keys == list(features.done)


def test_tokens_are_in_the_order_of_the_model(connector: ModuleType, tmp_path: Path) -> None:
    make(tmp_path / "old.h5", mixed_shard(tokens=Tokens.PROJECTED, token_order=TokenOrder.V1))
    image = open_features(tmp_path / "old.h5").done[0]
    worker = connector.FeatureConnector(config(tmp_path / "old.h5", torch.float16), "worker")
    worker.bind_connector_metadata(connector.TokensToLoad([image.key]))
    cache: dict[str, torch.Tensor] = {}
    worker.start_load_caches(cache)
    assert torch.equal(cache[image.key], image.chat_tokens().flatten(0, 1))


def test_nothing_is_saved(connector: ModuleType, path: Path) -> None:
    before = path.read_bytes()
    worker = connector.FeatureConnector(config(path), "worker")
    worker.save_caches({"new": torch.zeros(4, 6)}, "new")
    assert path.read_bytes() == before and not worker.has_cache_item("new")


def test_an_output_that_no_language_model_reads_is_refused(connector: ModuleType, tmp_path: Path) -> None:
    helpers.make_output(tmp_path / "v.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    with pytest.raises(UsageError, match="no projected tokens"):
        connector.FeatureConnector(config(tmp_path / "v.h5"), "scheduler")
    with pytest.raises(UsageError, match="names no features"):
        connector.FeatureConnector(config(None), "scheduler")
    with pytest.raises(OutputError):
        connector.FeatureConnector(config(tmp_path / "nothing.h5"), "scheduler")
