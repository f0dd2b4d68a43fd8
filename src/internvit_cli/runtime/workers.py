"""Run tasks in a pool of worker processes, in which a crash or a hang costs only the current task.

Each worker is a fresh interpreter with one socket to the parent. It holds no lock, ignores the signals that stop a run,
and ends when its socket closes, so that neither a killed worker nor a killed parent leaves anything behind. A shared
queue would not work, because a killed process would never release its lock.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Status
from internvit_cli.errors import InternvitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Self

QUEUE_DEPTH = 2
"""Tasks per worker: the current one and the next, so that it never waits for the parent."""

CLOCK_SECONDS = 0.5
"""Longest sleep between two looks at the clock; a longer one means that all processes were stopped meanwhile."""

START_ATTEMPTS = 5
"""Workers in a row that may end before they are ready; after that, the pool gives up."""

BOOTSTRAP = """\
import importlib, sys
sys.path[:] = sys.argv[4:]
getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(int(sys.argv[3]))
"""
"""Code of a worker, which imports from exactly the paths of its parent, and never from the working directory."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What every worker of a pool runs."""

    handler: str
    """`package.module:factory`; `factory(*arguments)` returns the function that turns a task into a result."""
    arguments: tuple[Any, ...] = ()
    descriptors: tuple[int, ...] = ()
    """File descriptors that the worker inherits under the same numbers."""
    memory_bytes: int | None = None
    """Address space that a worker may use, in bytes; above it, the task raises a MemoryError."""


@dataclass(frozen=True, slots=True)
class FinishedTask:
    """The result of a task, and the seconds that it took in the worker."""

    task_id: int
    result: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class LostTask:
    """A task whose worker died or ran out of time."""

    task_id: int
    status: Status
    """TIMEOUT or WORKER_DIED."""
    message: str


@dataclass(frozen=True, slots=True)
class _Task:
    task_id: int
    payload: Any
    alone: bool


@dataclass(eq=False, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    ready: bool = False
    head_since: float = 0.0

    def accepts(self, task: _Task) -> bool:
        if task.alone:
            return not self.tasks
        return len(self.tasks) < QUEUE_DEPTH and not any(queued.alone for queued in self.tasks)


class WorkerPool:
    """A fixed number of workers for one queue of tasks. It is not thread-safe: one thread submits and waits."""

    def __init__(self, spec: WorkerSpec, count: int, task_seconds: float) -> None:
        """Start `count` workers; a task may take `task_seconds` before its worker is killed."""
        self._spec = spec
        self._task_seconds = task_seconds
        self._queue: deque[_Task] = deque()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        for _ in range(count):
            self._workers.append(self._start())

    @property
    def capacity(self) -> int:
        """The number of tasks that workers can hold at once."""
        return QUEUE_DEPTH * len(self._workers)

    @property
    def outstanding(self) -> int:
        """The number of submitted tasks whose outcome has not been returned."""
        return len(self._queue) + sum(len(worker.tasks) for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, task_id: int, payload: Any, *, alone: bool = False) -> None:
        """Queue a task. With `alone`, no other task shares its worker, so only this task can cause a crash."""
        self._queue.append(_Task(task_id, payload, alone))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> list[FinishedTask | LostTask]:
        """Return the available outcomes, or the first within `timeout` seconds; an empty list if there are none."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.outstanding:
            outcomes = self._collect(self._patience(deadline))
            self._dispatch()
            if outcomes or (deadline is not None and time.monotonic() >= deadline):
                return outcomes
        return []

    def close(self) -> None:
        """End every worker at once."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        self._queue.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        # One thread per worker, because the pool provides the parallelism. Stderr is closed to libraries such as
        # libtiff, whose messages on pictures would go to the user's terminal.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process, connection = start_process(serve_socket, self._spec.descriptors, environment, is_silent=True)
        # A worker that has already ended is noticed when its connection is read.
        with contextlib.suppress(OSError):
            connection.send(self._spec)
        return _Worker(process, connection)

    def _dispatch(self) -> None:
        while self._queue:
            task = self._queue[0]
            worker = min((w for w in self._workers if w.accepts(task)), key=lambda w: len(w.tasks), default=None)
            if worker is None:
                return
            self._queue.popleft()
            if not worker.tasks:
                worker.head_since = time.monotonic()
            worker.tasks.append(task)
            # A worker that just died is noticed when its connection is read, and its tasks go back to the queue.
            with contextlib.suppress(OSError):
                worker.connection.send((task.task_id, task.payload))

    def _patience(self, deadline: float | None) -> float | None:
        """Return the seconds until the caller's deadline, a worker's time limit, or the next look at the clock."""
        ends = [worker.head_since + self._task_seconds for worker in self._workers if worker.tasks and worker.ready]
        if deadline is not None:
            ends.append(deadline)
        return min(max(0.0, min(ends) - time.monotonic()), CLOCK_SECONDS) if ends else None

    def _collect(self, patience: float | None) -> list[FinishedTask | LostTask]:
        outcomes: list[FinishedTask | LostTask] = []
        by_connection = {worker.connection: worker for worker in self._workers}
        begun = time.monotonic()
        ready = wait(list(by_connection), patience)
        if patience is not None:
            self._forgive(time.monotonic() - begun - patience)
        for connection in ready:
            outcomes += self._receive(by_connection[connection])  # type: ignore[index]
        now = time.monotonic()
        for worker in list(self._workers):
            late = worker.ready and worker.tasks and now - worker.head_since > self._task_seconds
            if late and not worker.connection.poll():
                worker.process.kill()
                message = f"gave no result within {self._task_seconds:g} s"
                outcomes += self._replace(worker, Status.TIMEOUT, message)
        return outcomes

    def _forgive(self, overslept: float) -> None:
        """Do not count the time in which this process and its workers were stopped, for example by a batch system."""
        if overslept > 0:
            for worker in self._workers:
                worker.head_since += overslept

    def _receive(self, worker: _Worker) -> list[FinishedTask | LostTask]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            if not worker.ready:
                self._start_again(worker)
                return []
            return self._replace(
                worker, Status.WORKER_DIED, f"its worker process ended ({describe_exit(worker.process)})"
            )
        self._failed_starts = 0
        if isinstance(message, _Ready):
            if message.failure:
                raise InternvitError(f"a worker process cannot start: {message.failure}")
            worker.ready = True
            worker.head_since = time.monotonic()
            return []
        task = worker.tasks.popleft()
        worker.head_since = time.monotonic()
        task_id, result, seconds = message
        assert task_id == task.task_id
        return [FinishedTask(task_id, result, seconds)]

    def _replace(self, worker: _Worker, status: Status, message: str) -> list[FinishedTask | LostTask]:
        """Replace a dead worker: its current task is lost, and the others go back to the front of the queue."""
        head = [worker.tasks.popleft()] if worker.tasks else []
        self._succeed(worker)
        return [LostTask(task.task_id, status, message) for task in head]

    def _start_again(self, worker: _Worker) -> None:
        """Replace a worker that was never ready, for which no task is to blame; a few may be killed by chance."""
        self._failed_starts += 1
        if self._failed_starts >= START_ATTEMPTS:
            raise InternvitError(
                f"a worker process ended before it was ready ({describe_exit(worker.process)})",
                "check that there is enough memory to start Python processes, or lower --workers",
            )
        self._succeed(worker)

    def _succeed(self, worker: _Worker) -> None:
        """Start a worker in place of a dead one, whose tasks go back to the front of the queue."""
        worker.connection.close()
        worker.process.kill()
        worker.process.wait()
        self._workers[self._workers.index(worker)] = self._start()
        self._queue.extendleft(reversed(worker.tasks))


def start_process(
    serve: Callable[[int], None],
    descriptors: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
    *,
    is_silent: bool,
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a fresh interpreter with a connection to it.

    Args:
        serve: A function of a module, called with the file descriptor of the process's end of the connection.
        descriptors: File descriptors that the process inherits under the same numbers.
        environment: Environment variables to set in addition to the current ones.
        is_silent: Whether to discard its stderr.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        place = [serve.__module__, serve.__name__, str(theirs.fileno())]
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, and nothing from outside
            [sys.executable, "-c", BOOTSTRAP, *place, *(path for path in sys.path if path)],
            pass_fds=(theirs.fileno(), *descriptors),
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if is_silent else None,
            # Ctrl-C goes to the whole process group of the terminal, and would kill a process that is still starting.
            start_new_session=True,
        )
    return process, Connection(ours.detach())


def ignore_stop_signals() -> None:
    """Ignore signals that stop a run; the parent handles them, and closing the connection ends this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def map_in_workers(pool: WorkerPool, payloads: Iterable[Any]) -> Iterable[FinishedTask | LostTask]:
    """Yield the outcomes of all payloads as they are ready, with task ids from 0; the pool is never overfilled."""
    numbered = enumerate(payloads)
    exhausted = False
    while True:
        while not exhausted and pool.outstanding < pool.capacity:
            task = next(numbered, None)
            if task is None:
                exhausted = True
            else:
                pool.submit(*task)
        if exhausted and not pool.outstanding:
            return
        yield from pool.wait()


def usable_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_exit(process: subprocess.Popen[bytes]) -> str:
    """Describe how a process ended."""
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


# ------------------------------------------------------------------------------------------------ inside the worker


@dataclass(frozen=True, slots=True)
class _Ready:
    """The first message of a worker: it is ready for tasks, or why it will never be."""

    failure: str = ""


def serve_socket(descriptor: int) -> None:
    """Run a worker over an inherited socket until the parent closes it."""
    ignore_stop_signals()
    with contextlib.suppress(EOFError, OSError), Connection(descriptor) as connection:
        spec: WorkerSpec = connection.recv()
        try:
            handle = _build_handler(spec)
        except Exception:  # noqa: BLE001 - the parent has to know about any failure
            connection.send(_Ready(traceback.format_exc().strip().splitlines()[-1]))
            return
        connection.send(_Ready())
        while True:
            task_id, payload = connection.recv()
            started = time.perf_counter()
            result = handle(payload)
            connection.send((task_id, result, time.perf_counter() - started))


def _build_handler(spec: WorkerSpec) -> Callable[[Any], Any]:
    module, _, factory = spec.handler.partition(":")
    handle: Callable[[Any], Any] = getattr(importlib.import_module(module), factory)(*spec.arguments)
    if spec.memory_bytes is not None and sys.platform.startswith("linux"):  # macOS does not support this limit
        _limit_memory(spec.memory_bytes)
    return handle


def _limit_memory(limit: int) -> None:
    """Lower the limit on the address space of this process; a tighter one, such as from `ulimit -v`, is kept."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
