"""A line on stderr that says how far a command is: on a terminal, once it takes a while."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtool.progress import Step

_PATIENCE = 0.5  # seconds before anything is shown
_PACE = 0.1  # seconds between two changes of the line
_MEMORY = 1.0  # seconds without a word after which something else may be told
_FORESIGHT = 2.0  # seconds after which the rest can be foretold


class ProgressLine:
    """Listens to `kvmtool.progress`; what it shows is gone when something else is to be written."""

    def __init__(self) -> None:
        self._what = ""  # of what is told; that which goes on inside of it is not
        self._began = self._heard = self._last = 0.0
        self._shown = 0  # cells

    def __call__(self, step: Step | None) -> None:
        """Hear of a step, or (None) that the line has to go."""
        if step is None:
            self.clear()
            return
        now = time.monotonic()
        if step.what != self._what:
            if now - self._heard < _MEMORY:
                return
            self._what, self._began = step.what, now
        self._heard = now
        if step.total and step.done >= step.total:
            self._heard = 0.0
            self.clear()
        elif now - self._began >= _PATIENCE and now - self._last >= _PACE:
            self._last = now
            self._show(line_of(step, now - self._began))

    def _show(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + text.ljust(self._shown))
        sys.stderr.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            sys.stderr.flush()
            self._shown = 0


def line_of(step: Step, seconds: float) -> str:
    """What is said of a step after `seconds`: "searching memory: 42 %, 7 s left"."""
    if not step.total:
        count = f"{step.done >> 20} MiB" if step.unit == "bytes" else f"{step.done} {step.unit}"
        return f"{step.what}: {count}"
    share = step.done / step.total
    left = seconds * (1 - share) / share if share else 0.0
    foretold = f", {left:.0f} s left" if seconds >= _FORESIGHT and left >= 1 else ""
    return f"{step.what}: {share:.0%}{foretold}".replace("%", " %")
