"""Processes that run the real command without the seconds that an interpreter needs to import torch.

One process has imported everything, and forks: what a test gets is a process like any other, with streams, signals and
an exit code of its own. Where the start of the interpreter counts, or what it imports, `run_helpers.command` is right.

    python forking.py SOCKET    (the process that forks; it ends with its standard input)
"""

from __future__ import annotations

import atexit
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
from subprocess import DEVNULL, PIPE
from typing import IO, Any

PATIENCE = 600.0
"""Seconds after which a process counts as hung: more than any machine takes, so that no test depends on its speed."""
LONGEST_REQUEST = 1 << 20


class Forked:
    """A run in a process of its own; of `subprocess.Popen` what tests need."""

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
        self.returncode: int | None = None
        self.stdout, out = _stream(stdout, text=text)
        self.stderr, err = _stream(stderr, text=text)
        null = os.open(os.devnull, os.O_RDWR)
        streams = [null if given == DEVNULL else given for given in (stdin, out, err)]
        words = list(map(str, arguments))
        request = [words, plan, dict(os.environ if env is None else env), os.getcwd(), start_new_session]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], streams)
        for descriptor in {null, *([out] if stdout == PIPE else []), *([err] if stderr == PIPE else [])}:
            os.close(descriptor)
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
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

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


@functools.cache
def _server() -> str:
    """Start the process that forks; returns the path of its socket."""
    path = os.path.join(tempfile.mkdtemp(prefix="forking-"), "socket")
    process = subprocess.Popen([sys.executable, __file__, path], stdin=PIPE, stdout=PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == "ready\n"
    return path


# ------------------------------------------------------------------------------------------------- the forking process


def serve(path: str) -> None:
    """Fork a run for every connection, until standard input ends."""
    import gc
    import importlib
    import pkgutil
    import select

    import internvit_cli.cli
    import internvit_cli.encode.encoder
    import internvit_cli.extract.pipeline

    for module in pkgutil.iter_modules(internvit_cli.cli.__path__):
        importlib.import_module(f"internvit_cli.cli.{module.name}")
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


def _look_after(connection: socket.socket) -> None:
    """Start one run, and tell its process id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, streams, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(LONGEST_REQUEST)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(json.loads(data), streams)
    for descriptor in streams:
        os.close(descriptor)
    connection.sendall(b"%d\n" % child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(b"%d" % status)
    finally:
        os._exit(0)


def _become(request: list[Any], streams: list[int]) -> None:
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
    serve(sys.argv[1])
