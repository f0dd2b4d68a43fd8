"""A terminal of one's own: a command line run on a pseudo-terminal, and what would stand on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from internvit_cli.cli.app import run

if TYPE_CHECKING:
    from collections.abc import Iterator

BAR = "█"


@dataclass(frozen=True)
class Shown:
    """What a command drew."""

    returncode: int
    text: str

    @property
    def drawn(self) -> list[str]:
        """Every line as it was drawn, those that were drawn over too."""
        return [line.rstrip() for line in self.text.replace("\n", "\r").split("\r") if line.strip()]

    @property
    def left(self) -> list[str]:
        """The lines that stand on the screen in the end."""
        return [_overwritten(line).rstrip() for line in self.text.split("\n") if _overwritten(line).strip()]

    def phase(self, name: str) -> list[str]:
        """The lines of one phase, as they were drawn."""
        return [line for line in self.drawn if line.startswith(name)]


def _overwritten(line: str) -> str:
    """What is left of a line whose parts were drawn over each other."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown


class Terminal:
    """A pseudo-terminal that is read all the time, so that nobody who writes to it waits."""

    def __init__(self, columns: int = 80) -> None:
        self._leader, self.follower = pty.openpty()
        fcntl.ioctl(self.follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._end, self._wake = os.pipe()
        self._read = bytearray()
        self._reader = threading.Thread(target=self._run, daemon=True)
        self._reader.start()

    def hang_up(self) -> None:
        """Close its window: from now on whoever writes to it gets an I/O error."""
        if self._reader.is_alive():
            os.write(self._wake, b"!")
            self._reader.join()

    @property
    def so_far(self) -> bytes:
        """What was written to it by now."""
        return bytes(self._read)

    def close(self) -> str:
        """Give it back; returns all that was written to it."""
        os.close(self.follower)
        self._reader.join(timeout=60)
        os.close(self._end)
        os.close(self._wake)
        return self._read.decode()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # nobody holds the other end any more
            while self._end not in select.select([self._leader, self._end], [], [])[0]:
                self._read += os.read(self._leader, 65536)
        os.close(self._leader)


def on_terminal(*arguments: object, columns: int = 80, terminal: Terminal | None = None) -> Shown:
    """Run a command line in this process, with both streams on a terminal."""
    terminal = terminal or Terminal(columns)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(TERM="xterm"))
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(stack.enter_context(_stream(terminal.follower))))
        code = run([str(argument) for argument in arguments])
    return Shown(int(code), terminal.close())


def process_on_terminal(line: list[str], columns: int = 80) -> Shown:
    """Run a command line in a process of its own, with both streams on a terminal."""
    terminal = Terminal(columns)
    environment = os.environ | {"TERM": "xterm"}
    code = subprocess.run(line, stdout=terminal.follower, stderr=terminal.follower, env=environment).returncode
    return Shown(code, terminal.close())


@contextlib.contextmanager
def _stream(descriptor: int) -> Iterator[TextIO]:
    with open(os.dup(descriptor), "w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
