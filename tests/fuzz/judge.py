"""What a parser may do with any bytes: answer, or raise `KvmError` of one line, soon, in bounds."""

from __future__ import annotations

import os
import resource
import time
import traceback
import warnings
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError, KvmWarning

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 3.0  # of CPU for one input
BYTES = 700 << 20  # that one input may add to the process's peak; a peeled kernel may take 384 MiB
_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = f"{os.sep}kvmtool{os.sep}"


class Finding(NamedTuple):
    """What an input did that none may do; `place` tells it from other findings."""

    kind: str
    place: str
    text: str


def judge(run: Callable[[bytes], None], data: bytes, patience: float = 1.0) -> Finding | None:
    """Runs `run` on `data`; `patience` multiplies the seconds, for code that is being traced."""
    peak = _peak()
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KvmWarning)
            run(data)
    except KvmError as error:
        if "\n" in str(error):
            return Finding("two lines", _place(error), repr(str(error)))
    except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
        text = "".join(traceback.format_exception(error)[-6:])
        return Finding(type(error).__name__, _place(error), text)
    took = time.process_time() - began
    if took > SECONDS * patience:
        return Finding("slow", "", f"{took:.1f} s")
    grown = _peak() - peak
    return Finding("memory", "", f"{grown >> 20} MiB") if grown > BYTES else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """File and line in kvmtool that the error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _PACKAGE in f.filename and not f.filename.startswith(_HERE)]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
