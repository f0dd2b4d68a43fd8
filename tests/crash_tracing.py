"""Runs of the crash driver under strace, which kills them, or fails them, at a chosen system call.

A run is forked from a process that has imported everything already, so that a cut costs a twentieth of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import crash_checks
import crash_driver
from forking import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = (
    *("write", "pwrite64", "writev", "pwritev", "copy_file_range", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "sync_file_range", "rename", "renameat", "renameat2"),
    *("link", "linkat", "symlink", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
)
"""All that changes a file or a folder, and every sync."""
SYNCS = ("fsync", "fdatasync")
TRACE = "trace=" + ",".join(f"?{name}" for name in CALLS)
ANY_PROCESS = -1
PR_SET_PTRACER = 0x59616D61


class Cut(NamedTuple):
    """A system call of a run: the `number`-th call of that name, counting from 1."""

    call: str
    number: int


@functools.cache
def why_not_traceable() -> str:
    """Why strace cannot be used here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "strace is for Linux"
    if shutil.which("strace") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-q", "strace"], capture_output=True, timeout=PATIENCE)
    if shutil.which("strace") is None:
        return "strace is not installed (Debian package strace)"
    probe = ["strace", "-qq", "-e", "trace=none", "-e", "inject=getppid:error=EIO", "true"]
    run = subprocess.run(probe, capture_output=True, text=True)
    return f"strace cannot trace here: {run.stderr.strip()}" if run.returncode else ""


def warm_up(behavior: crash_driver.Behavior) -> None:
    """Prepare the driver and run it once, so that no child has anything left to import."""
    crash_driver.prepare(behavior)
    with tempfile.TemporaryDirectory() as folder:
        crash_checks.make_pictures(Path(folder, "pictures"), ["a.png", "spoiled.png"])
        for output in ("feats.h5", "feats"):
            arguments = ["extract", f"{folder}/pictures", "-o", f"{folder}/{output}", "--json"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                crash_driver.run(arguments)
    gc.freeze()  # a child that collects would copy every page of its parent


def run_traced(arguments: list[str], log: Path, *options: str) -> int:
    """Run the driver's command line in a child under strace; returns its exit code, or minus the signal's number.

    What it says goes to `log`. The caller has called `crash_driver.prepare`, inline, and has one thread.
    """
    gate, release = os.pipe()

    def wait_and_run() -> int:
        os.close(release)
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_long(ANY_PROCESS), 0, 0, 0)
        os.read(gate, 1)
        return crash_driver.run(arguments)

    child = fork(wait_and_run, log)
    os.close(gate)
    tracer = None
    if options:
        tracer = subprocess.Popen(["strace", "-p", str(child), *options], stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        assert b"attached" in attached, attached
    os.write(release, b".")
    os.close(release)
    status = os.waitpid(child, 0)[1]
    if tracer is not None:
        tracer.communicate(timeout=PATIENCE)
    return os.waitstatus_to_exitcode(status)


def run_forked(work: Callable[[], int], log: Path) -> int:
    """Do some work in a child; returns its exit code, or minus the signal's number: that of SIGALRM after a hang."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1])


def fork(work: Callable[[], int], log: Path) -> int:
    """Start some work in a child whose output goes to `log`; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            signal.alarm(int(PATIENCE))
            descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = _do_and_say(work)
        os._exit(code)
    return child


def _do_and_say(work: Callable[[], int]) -> int:
    try:
        return work()
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def calls_on(folder: Path, arguments: list[str], scratch: Path) -> list[Cut]:
    """The calls of a run that touch a folder, in their order."""
    trace = scratch / "trace"
    code = run_traced(arguments, scratch / "log", "-y", "-s", "1", "-o", str(trace), "-e", TRACE)
    assert code in (0, 3), (scratch / "log").read_text()
    counts: dict[str, int] = {}
    cuts = []
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"(\w+)\(", line)
        if match is None:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        if str(folder) in line:
            cuts.append(Cut(name, counts[name]))
    return cuts


def kill_at(cut: Cut, arguments: list[str], log: Path) -> int:
    """Run until a call and kill the process before the kernel does it."""
    return run_traced(
        arguments, log, "-o", "/dev/null", "-e", TRACE, "-e", f"inject={cut.call}:signal=SIGKILL:when={cut.number}"
    )


def fail_at(cut: Cut, arguments: list[str], log: Path) -> int:
    """Run with an I/O error in place of one call."""
    return run_traced(
        arguments, log, "-o", "/dev/null", "-e", TRACE, "-e", f"inject={cut.call}:error=EIO:when={cut.number}"
    )
