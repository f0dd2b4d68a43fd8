"""The real command in a process of its own, struck at a chosen moment.

A moment is the N-th call of some of its functions, never some seconds after its start: the same one on every machine,
however fast or busy. At that moment the process kills itself, sends itself a signal, or stands still until the test has
done what it wants to do meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forking import PATIENCE, Forked, run_apart

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

POLL_SECONDS = 0.01

LOAD = ("internvit_cli.encode.encoder:Encoder.load",)
SUBMIT = ("internvit_cli.encode.encoder:Encoder.submit",)
"""A batch goes to the encoder."""
WRITE = ("internvit_cli.storage.write.commit:ShardWriter.write_rows",)
"""An image's rows are about to be written."""
TELL = ("internvit_cli.extract.multi_device.worker:_ForwardingSink.take",)
"""A device's process is about to tell the parent of an image that it has written."""
RECORD = ("internvit_cli.storage.write.commit:ShardWriter.record",)
"""The same of an image that a device's process has written."""
COMMIT = ("internvit_cli.storage.write.commit:ShardWriter.commit",)
DISK = ("os:pwrite", "os:fsync", "os:fdatasync", "os:replace", "os:rename")
"""Whatever Python's own calls do to files; what HDF5's library does while it makes a file is not among them."""
EVERY_IMAGE = {"internvit_cli.extract.writer_thread:CHECKPOINT_BYTES": 1}
"""Settings with which every image is committed, instead of all that come within two seconds."""


@dataclass(frozen=True)
class Moment:
    """Just before the N-th call of any of some functions, counting from 1."""

    calls: tuple[str, ...]
    number: int = 1
    earlier: tuple[tuple[tuple[str, ...], int], ...] = ()
    """What has to happen first: the count above begins there."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of modules that differ from a plain run's."""

    def then(self, calls: tuple[str, ...], number: int = 1) -> Moment:
        """Some calls later."""
        return Moment(calls, number, (*self.earlier, (self.calls, self.number)), self.settings)

    def run(
        self, action: str, *arguments: object, tell: Path | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end what is struck at this moment.

        Args:
            action: a signal's name, or `hold PATH`, which stands still as long as a file is there.
            *arguments: those of `internvit`.
            tell: a file that gets a byte for every batch that goes to the encoder after that.
            **options: those of `Forked`.
        """
        return run_apart(*arguments, plan=self.plan(action, tell), **options)

    def environment(self, action: str, folder: Path, process: str, once: Path | None = None) -> dict[str, str]:
        """Variables that have other processes of a run struck: those whose command line holds a word.

        Args:
            action: as for `run`.
            folder: an empty one, for what such processes load first.
            process: the word.
            once: a file to be made by the first process that is struck; then no other is.
        """
        plan = self.plan(action, once=once)
        (folder / "sitecustomize.py").write_text(
            f"import sys\nif {process!r} in sys.orig_argv:\n"
            f"    sys.path.insert(0, {os.path.dirname(__file__)!r})\n    import moments\n    moments.arm({plan!r})\n"
        )
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    def plan(self, action: str, tell: Path | None = None, once: Path | None = None) -> str:
        """The same as `arm` takes it."""
        plan = {
            "stages": [*self.earlier, (self.calls, self.number)],
            "action": action,
            "settings": self.settings,
            "tell": None if tell is None else str(tell),
            "once": None if once is None else str(once),
        }
        return json.dumps(plan)


@dataclass(frozen=True)
class Held:
    """A run that stands still."""

    process: Forked
    mark: Path
    """The file that is there while it does."""

    def release(self) -> None:
        """Let it go on."""
        self.mark.unlink(missing_ok=True)

    def end(self) -> tuple[Any, Any]:
        """Let it go on to its end; returns what it said on both streams."""
        self.release()
        return self.process.communicate()


@contextlib.contextmanager
def held(moment: Moment, mark: Path, *arguments: object, **options: Any) -> Iterator[Held]:
    """A run that has come to a moment and stands still there; killed afterwards, if it still runs.

    Args:
        moment: where it stands still.
        mark: a file to be made when it does.
        *arguments: those of `internvit`.
        **options: those of `Forked`.
    """
    process = Forked(*arguments, plan=moment.plan(f"hold {mark}"), **options)
    try:
        wait_until(mark.exists, process)
        yield Held(process, mark)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(is_so: Callable[[], bool], process: Forked | subprocess.Popen[Any] | None = None) -> None:
    """Wait for something that has to come, as long as the process lives that brings it about."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert process is None or process.poll() is None or is_so(), f"ended with {process.returncode}, too early"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------------------------ inside the process


class _Strike:
    """Counts calls, stage by stage, and acts at the last."""

    def __init__(self, stages: list[tuple[list[str], int]], action: str, tell: str | None, once: str | None) -> None:
        self._stages = stages
        self._once = once
        self._what, _, self._path = action.partition(" ")
        self._tell = tell
        self._counts = [0] * len(stages)
        self._stage = 0
        self._lock = threading.Lock()

    def called(self, name: str) -> None:
        """Take note of a call that is about to be made."""
        with self._lock:
            is_due = self._is_due(name)
        if is_due:
            self._act()
        elif self._tell and name in SUBMIT and self._stage == len(self._stages):
            with open(self._tell, "ab") as file:
                file.write(b".")

    def _is_due(self, name: str) -> bool:
        if self._stage == len(self._stages):
            return False
        names, number = self._stages[self._stage]
        is_last = self._stage == len(self._stages) - 1
        self._counts[self._stage] += name in names
        if name not in names or self._counts[self._stage] < number:
            return False
        self._stage += 1
        return is_last

    def _act(self) -> None:
        if self._once is not None:
            try:
                os.close(os.open(self._once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if self._what != "hold":
            os.kill(os.getpid(), signal.Signals[self._what])
            return
        mark, deadline = Path(self._path), time.monotonic() + PATIENCE
        mark.touch()
        while mark.exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _watch(name: str, strike: _Strike) -> None:
    """Have a function tell of each call."""
    owner, attribute = _place(name)
    found = inspect.getattr_static(owner, attribute)
    function = getattr(owner, attribute)
    is_bound = isinstance(found, classmethod)

    @functools.wraps(function)
    def telling(*arguments: Any, **options: Any) -> Any:
        strike.called(name)
        return function(*arguments, **options)

    setattr(owner, attribute, staticmethod(telling) if is_bound else telling)


def _place(name: str) -> tuple[Any, str]:
    """The module or class that has something, and the name it has there."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def arm(text: str) -> None:
    """Have this process struck as a plan says."""
    plan = json.loads(text)
    strike = _Strike(plan["stages"], plan["action"], plan["tell"], plan["once"])
    names = {name for calls, _ in plan["stages"] for name in calls} | set(SUBMIT if plan["tell"] else ())
    for name in sorted(names):
        _watch(name, strike)
    for name, value in plan["settings"].items():
        setattr(*_place(name), value)
