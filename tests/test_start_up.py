"""The start of a run: the weights are hashed beside other work, and nobody can tell except by the clock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from forking import PATIENCE
from run_helpers import extract, make_pictures

from internvit_cli.encode.encoder import Encoder
from internvit_cli.errors import ExitCode, InternvitError, ModelError, OutputError, StoppedError
from internvit_cli.extract import pipeline, run_plan
from internvit_cli.extract.pipeline import extract as extract_in_process
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.options import ExtractOptions, ModelOptions, StoreOptions
from internvit_cli.runtime.background import Background, CancelledError
from internvit_cli.runtime.signals import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable

CARD_SCRIPT = Path(__file__).parent.parent / "benchmarks" / "card.sh"


@pytest.fixture
def options(tmp_path: Path) -> ExtractOptions:
    make_pictures(tmp_path / "imgs", 2, size=60)
    return ExtractOptions(
        sources=(str(tmp_path / "imgs"),),
        store=StoreOptions(output=str(tmp_path / "feats.h5")),
        model=ModelOptions(name="tiny-random"),
    )


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Do something whenever a function is called, before it begins."""
    function = getattr(owner, name)

    def called(*arguments: Any, **named: Any) -> Any:
        action()
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, called)


def hash_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hash"]


def test_work_in_the_background_raises_where_its_result_is_taken_and_each_time() -> None:
    def fail(is_cancelled: Callable[[], bool]) -> int:
        raise ModelError("broken")

    work = Background(fail, "failing")
    for _ in range(2):
        with pytest.raises(ModelError, match="broken"):
            work.result()
    work.cancel()


def test_work_in_the_background_ends_when_it_is_cancelled() -> None:
    def wait(is_cancelled: Callable[[], bool]) -> int:
        while not is_cancelled():
            threading.Event().wait(0.001)
        raise CancelledError

    work = Background(wait, "waiting")
    work.cancel()
    assert "waiting" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(CancelledError):
        work.result()


def test_hashing_ends_when_it_is_asked_to() -> None:
    checkpoint = Checkpoint.open(describe_model("tiny-random"), layer=2)
    with pytest.raises(CancelledError):
        checkpoint.digest(is_cancelled=lambda: True)


@pytest.mark.parametrize("stage", [(run_plan, "plan_images"), (Encoder, "load")], ids=["headers", "loading"])
def test_a_new_output_does_not_wait_for_the_hash_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, options: ExtractOptions, stage: tuple[Any, str]
) -> None:
    """The hash waits here for what used to come after it."""
    reached = threading.Event()
    before(monkeypatch, *stage, reached.set)
    before(monkeypatch, Checkpoint, "digest", lambda: reached.wait(PATIENCE))
    assert extract_in_process(options, StopRequest()).counts.done == 2
    assert reached.is_set() and not hash_threads()


def test_an_output_that_exists_is_compared_before_any_header_is_read(
    monkeypatch: pytest.MonkeyPatch, options: ExtractOptions
) -> None:
    extract_in_process(options, StopRequest())
    order: list[str] = []
    digest = Checkpoint.digest
    monkeypatch.setattr(Checkpoint, "digest", lambda *arguments: (order.append("hash"), digest(*arguments))[1])
    before(monkeypatch, run_plan, "plan_images", lambda: order.append("headers"))
    before(monkeypatch, Encoder, "load", lambda: order.append("loading"))
    assert extract_in_process(options, StopRequest()).counts.done == 2
    assert order == ["hash", "headers"], "once, and nothing is loaded when there is nothing to do"


@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "after the other"])
@pytest.mark.parametrize(
    "stage",
    [(run_plan, "plan_images"), (run_plan, "require_images"), (pipeline, "check_space"), (Encoder, "load")],
    ids=lambda stage: stage[1],
)
def test_an_error_of_the_weights_comes_before_one_of_what_runs_beside_their_hash(
    monkeypatch: pytest.MonkeyPatch, options: ExtractOptions, stage: tuple[Any, str], is_slow: bool
) -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise OutputError("later")

    def fail_to_hash(*_: object) -> str:
        if is_slow:
            failed.wait(PATIENCE)
        raise ModelError("first")

    before(monkeypatch, *stage, fail)
    monkeypatch.setattr(Checkpoint, "digest", fail_to_hash)
    with pytest.raises(InternvitError) as raised:
        extract_in_process(options, StopRequest())
    assert raised.value.message == "first" and failed.is_set()
    assert not hash_threads() and os.listdir(Path(options.store.output).parent) == ["imgs"]


def test_an_error_beside_the_hash_of_good_weights_is_reported_as_it_is(
    monkeypatch: pytest.MonkeyPatch, options: ExtractOptions
) -> None:
    def fail() -> None:
        raise OutputError("no space")

    before(monkeypatch, pipeline, "check_space", fail)
    with pytest.raises(OutputError, match="no space"):
        extract_in_process(options, StopRequest())
    assert not hash_threads()


@pytest.mark.parametrize("stage", [(run_plan, "plan_images"), (Encoder, "load")], ids=["headers", "loading"])
def test_a_signal_while_the_weights_are_hashed_ends_the_run_at_once_with_its_threads(
    monkeypatch: pytest.MonkeyPatch, options: ExtractOptions, stage: tuple[Any, str]
) -> None:
    stop = StopRequest()

    def hash_forever(_: Checkpoint, _observer: object, is_cancelled: Callable[[], bool]) -> str:
        while not is_cancelled():
            threading.Event().wait(0.001)
        raise CancelledError

    monkeypatch.setattr(Checkpoint, "digest", hash_forever)
    before(monkeypatch, *stage, lambda: stop.request(2))
    with pytest.raises(StoppedError):
        extract_in_process(options, stop)
    assert not hash_threads() and os.listdir(Path(options.store.output).parent) == ["imgs"]


def test_weights_that_cannot_be_read_are_reported_though_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All pictures are known to be unusable, so there is an empty output with no row to be encoded."""
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "a.jpg").write_bytes(b"no picture")
    assert extract(tmp_path / "imgs", "-o", tmp_path / "feats.h5").returncode == ExitCode.CANNOT_RUN

    def fail_to_hash(*_: object) -> str:
        raise ModelError("unreadable weights")

    monkeypatch.setattr(Checkpoint, "digest", fail_to_hash)
    result = extract(tmp_path / "imgs", "-o", tmp_path / "feats.h5")
    assert result.returncode == ExitCode.CANNOT_RUN and "unreadable weights" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.sweep
def test_the_script_for_a_card_says_in_one_line_that_there_is_none(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", CARD_SCRIPT]).returncode == 0
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    line = ["bash", str(CARD_SCRIPT), str(tmp_path / "results")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "results").exists()
    assert done.stderr.startswith("card.sh: PyTorch sees no CUDA device") and done.stderr.count("\n") == 1
