"""--pager: the answer through a pager, when the user asks for it and sits at a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from kvmtool.errors import KvmError

if TYPE_CHECKING:
    import click

_STARTED = "kvmtool.pager"
_PLAIN = "FRSX"  # less: quit if one screen, keep colours, do not wrap, leave the screen alone


def start_pager(ctx: click.Context) -> None:
    """Send standard output to $KVMTOOL_PAGER, $PAGER or less, until the command ends.

    What is paged is plain and untruncated, as in any pipe. Without a terminal nothing is done.
    Raises `KvmError` for a pager that cannot be started.
    """
    if ctx.meta.get(_STARTED) or not sys.stdout.isatty():
        return
    ctx.meta[_STARTED] = True
    environ = os.environ
    command = environ.get("KVMTOOL_PAGER") or environ.get("PAGER") or "less"
    try:
        import shlex

        pager = subprocess.Popen(  # noqa: S603  the user's own pager
            shlex.split(command), stdin=subprocess.PIPE, env={"LESS": _PLAIN, **environ}
        )
    except (OSError, ValueError) as error:
        raise KvmError(f"pager {command} cannot be started: {error}; name one in PAGER") from error
    assert pager.stdin is not None
    sys.stdout.flush()
    terminal = os.dup(1)
    os.dup2(pager.stdin.fileno(), 1)
    pager.stdin.close()
    ctx.find_root().call_on_close(lambda: _end(pager, terminal))


def _end(pager: subprocess.Popen[bytes], terminal: int) -> None:
    """Give the pager its end of file, and wait until the user has read."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pager's now
    after = terminal
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the user has seen enough: what is left is not for the terminal
        after = os.open(os.devnull, os.O_WRONLY)
    finally:
        os.dup2(after, 1)
        for fd in {after, terminal}:
            os.close(fd)
        pager.wait()
        signal.signal(signal.SIGINT, before)
