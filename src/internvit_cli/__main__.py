"""Run `python -m internvit_cli` and the `internvit` command."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line of this process."""
    # Set before the imports, which take a tenth of a second, so that Ctrl-C prints no traceback during them.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from internvit_cli.cli.app import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
