"""`python -m kvmtool`, and the console script."""

from __future__ import annotations

import signal


def main() -> None:
    """The command line; until it is loaded Ctrl-C ends the process as it ends one of C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kvmtool.cli import main as run

    run()


if __name__ == "__main__":
    main()
