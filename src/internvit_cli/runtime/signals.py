"""End a run on a signal: at once if nothing would be lost, and otherwise after the batch in flight."""

from __future__ import annotations

from typing import Protocol


class Stop(Protocol):
    """Says whether a signal has asked the run to end."""

    signal: int
    """The number of the signal; 0 if there was none."""


class Interruption(KeyboardInterrupt):
    """Raised by a signal wherever the run is. It is not an Exception, because libraries may catch and retry those."""


class StopRequest:
    """Records the first signal. The code that installs the handlers ends the process on the second one."""

    def __init__(self) -> None:
        self.signal = 0
        self.is_working = False
        """Whether a stop has to wait for batches in flight."""

    def request(self, number: int) -> None:
        """Ask the run to end, from a signal handler.

        Raises:
            Interruption: Nothing is in flight, so the run ends at once; everything on the disk is valid.
        """
        self.signal = number
        if not self.is_working:
            raise Interruption
