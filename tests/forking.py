"""Processes that run the real command without the seconds that an interpreter needs to import torch.

One process has imported everything, and forks: what a test gets is a process like any other, with streams, signals and
an exit code of its own. Where the start of the interpreter counts, or what it imports, `run_helpers.command` is right.

Another one, without torch, forks the workers that read pictures: `start_worker` stands in for the start of an
interpreter in all tests but those of the workers themselves.

    python forking.py commands|workers SOCKET    (the process that forks; it ends with its standard input)
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from subprocess import DEVNULL, PIPE
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

PATIENCE = 600.0
"""Seconds after which a process counts as hung: more than any machine takes, so that no test depends on its speed."""
LONGEST_REQUEST, MOST_DESCRIPTORS = 1 << 20, 16
FREE_DESCRIPTOR = 1000
"""Above all that a process of the tests has open."""


class Child:
    """A process that another one has forked; of `subprocess.Popen` what tests and worker pools need."""

    def __init__(self, server: str, request: list[Any], descriptors: list[int]) -> None:
        """Have a process forked.

        Args:
            server: which process forks.
            request: what the new one is to do.
            descriptors: what it inherits, as the request says.
        """
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server(server))
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], descriptors)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, minus the signal's number after a kill; None while it runs."""
        return self._wait(0.0)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; returns the exit code."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("internvit", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the word of it is on its way
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.recv(100)
            except (BlockingIOError, TimeoutError):
                return None
            self.returncode = int(answer)
            self._answers.close()
            self._connection.close()
        return self.returncode


class Forked(Child):
    """A run of the command in a process of its own."""

    def __init__(
        self,
        *arguments: object,
        plan: str | None = None,
        stdin: int = DEVNULL,
        stdout: int = DEVNULL,
        stderr: int = DEVNULL,
        env: dict[str, str] | None = None,
        text: bool = True,
        start_new_session: bool = False,
    ) -> None:
        """Start a run.

        Args:
            *arguments: those of `internvit`.
            plan: a moment at which it is struck, as `Moment.plan` gives it.
            stdin: a file descriptor or DEVNULL, as the next two, which may be PIPE.
            stdout: see `stdin`.
            stderr: see `stdin`.
            env: all its variables; None is those of this process.
            text: whether what comes through a pipe is str.
            start_new_session: whether it leaves this session and its terminal.
        """
        self.stdout, out = _stream(stdout, text=text)
        self.stderr, err = _stream(stderr, text=text)
        null = os.open(os.devnull, os.O_RDWR)
        streams = [null if given == DEVNULL else given for given in (stdin, out, err)]
        words = list(map(str, arguments))
        variables = dict(os.environ if env is None else env)
        super().__init__("commands", ["command", words, plan, variables, os.getcwd(), start_new_session], streams)
        for descriptor in {null, *([out] if stdout == PIPE else []), *([err] if stderr == PIPE else [])}:
            os.close(descriptor)

    def communicate(self, timeout: float = PATIENCE) -> tuple[Any, Any]:
        """Read both streams to their end, and wait; returns what they held, None for what is no pipe."""
        said: list[Any] = [None, None]

        def read(place: int, stream: IO[Any]) -> None:
            said[place] = stream.read()
            stream.close()

        readers = [
            threading.Thread(target=read, args=(place, stream), daemon=True)
            for place, stream in enumerate((self.stdout, self.stderr))
            if stream is not None and not stream.closed
        ]
        deadline = time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        self.wait(max(0.0, deadline - time.monotonic()))
        return said[0], said[1]


def run_apart(*arguments: object, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a command line to its end; the options are those of `Forked`."""
    process = Forked(*arguments, **({"stdout": PIPE, "stderr": PIPE} | options))
    said = process.communicate()
    return subprocess.CompletedProcess(list(map(str, arguments)), process.wait(), *said)


def _stream(given: int, *, text: bool) -> tuple[IO[Any] | None, int]:
    """What this process reads from, and what the other one writes to."""
    if given != PIPE:
        return None, given
    ours, theirs = os.pipe()
    return os.fdopen(ours, "r" if text else "rb"), theirs


def start_worker(
    serve: Callable[[int], None],
    descriptors: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
    *,
    is_silent: bool,
    server: str = "workers",
) -> tuple[Child, Connection]:
    """Start a worker as `workers.start_process` does, without the quarter of a second that an interpreter needs."""
    ours, theirs = socket.socketpair()
    with theirs, open(os.devnull, "r+b", buffering=0) as null:
        inherited = (theirs.fileno(), *descriptors)
        variables = os.environ | (environment or {})
        request = [
            "worker",
            serve.__module__,
            serve.__name__,
            inherited,
            variables,
            os.getcwd(),
            [*filter(None, sys.path)],
        ]
        streams = [null.fileno(), null.fileno(), null.fileno() if is_silent else 2]
        process = Child(server, request, [*streams, *inherited])
    return process, Connection(ours.detach())


@functools.cache
def _server(kind: str) -> str:
    """Start the process that forks; returns the path of its socket."""
    path = os.path.join(tempfile.mkdtemp(prefix="forking-"), "socket")
    process = subprocess.Popen([sys.executable, __file__, kind, path], stdin=PIPE, stdout=PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == "ready\n"
    return path


# ------------------------------------------------------------------------------------------------- the forking process


def serve(kind: str, path: str) -> None:
    """Fork a process for every connection, until standard input ends."""
    import gc
    import select

    {"commands": _prepare_commands, "workers": _prepare_workers}[kind]()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _look_after(connection)
            connection.close()


def _prepare_commands() -> None:
    """Import all that the command may need."""
    import importlib
    import pkgutil

    import typer.main
    from shortcuts import build_command_once

    import internvit_cli.cli
    import internvit_cli.encode.encoder
    import internvit_cli.extract.pipeline
    from internvit_cli.cli.app import app
    from internvit_cli.runtime import workers

    for module in pkgutil.iter_modules(internvit_cli.cli.__path__):
        importlib.import_module(f"internvit_cli.cli.{module.name}")
    build_command_once()
    typer.main.get_command(app)
    workers.start_process = start_worker  # type: ignore[assignment]
    _server("workers")


def _prepare_workers() -> None:
    """Import what workers need, all formats of Pillow too, and not torch: their address space is bounded."""
    from PIL import Image, ImageOps  # noqa: F401

    import internvit_cli.decode.decoder
    import internvit_cli.plan.scan
    import internvit_cli.viz.photograph  # noqa: F401

    Image.init()


def _look_after(connection: socket.socket) -> None:
    """Start one process, and tell its process id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, descriptors, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, MOST_DESCRIPTORS)
    while not data.endswith(b"\n"):
        data += connection.recv(LONGEST_REQUEST)
    child = os.fork()
    if child == 0:
        connection.close()
        kind, *request = json.loads(data)
        _become(request, descriptors) if kind == "command" else _become_worker(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(b"%d\n" % child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(b"%d" % status)
    finally:
        os._exit(0)


def _become_worker(request: list[Any], descriptors: list[int]) -> NoReturn:
    """Be a worker that has just been started; never returns."""
    import importlib

    module, function, numbers, environment, folder, path = request
    os.setsid()
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FREE_DESCRIPTOR) for descriptor in descriptors]
    os.closerange(3, FREE_DESCRIPTOR)
    for descriptor, number in zip(high, [0, 1, 2, *numbers], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        getattr(importlib.import_module(module), function)(numbers[0])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        import traceback

        traceback.print_exc()
    os._exit(code)


def _become(request: list[Any], streams: list[int]) -> NoReturn:
    """Be a process that the shell has started with this command line; never returns."""
    arguments, plan, environment, folder, is_session = request
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
    for descriptor in streams:
        if descriptor > 2:
            os.close(descriptor)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = ["internvit", *arguments]
    code = 1
    try:
        code = _run(plan)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        import traceback

        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = code or 120  # as the interpreter does
    os._exit(code)


def _run(plan: str | None) -> int:
    from internvit_cli.cli.app import main

    if plan is not None:
        import moments

        moments.arm(plan)
    main()
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
