"""How a command ends that is not let finish: it cleans up, says nothing, and dies of the signal.

Ctrl-C, SIGTERM and SIGHUP become `Ended`, which nothing catches but `main`: on its way up files
half written are removed and what is open is closed. Then the process ends by that same signal, as
programs without a handler do, so that a shell's loop around it ends, too (`$?` is 130, 143, 129).
A reader of our output who has gone (`| head`) is SIGPIPE: 141.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """The command is to end as if signal `number` had killed it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def listen() -> None:
    """From now on those of `SIGNALS` that whoever started us does not ignore raise `Ended`."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def hand_over() -> None:
    """Leave the signals to what comes: a library with handlers of its own."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends us at once
    raise Ended(number)


def die(number: int) -> NoReturn:
    """End by signal `number`."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # it is blocked
