"""How a signal ends a run: at once while nothing would be lost, and after the batch in flight when there is one."""

from __future__ import annotations

from typing import Protocol


class Stop(Protocol):
    """Whether a signal has asked the run to end."""

    signal: int
    """Its number; 0 for none."""


class Interruption(KeyboardInterrupt):
    """Raised wherever the run happens to be. Not an Exception: libraries retry over those."""


class StopRequest:
    """Takes the first signal. The second one is for whoever installs the handlers: it ends the process."""

    def __init__(self) -> None:
        self.signal = 0
        self.is_working = False
        """Whether there are batches in flight, which a stop has to wait for."""

    def request(self, number: int) -> None:
        """Ask the run to end, from a signal handler.

        Raises:
            Interruption: nothing is in flight, so the run ends where it stands; all that is on the disk is sound.
        """
        self.signal = number
        if not self.is_working:
            raise Interruption
