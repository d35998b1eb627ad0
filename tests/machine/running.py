"""Runs kvmtool's command line many times without starting Python each time.

Every run is a process of its own, forked from one that has imported kvmtool and used nothing of it:
what `main` does to the process stays there.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import kvmtool
from kvmtool import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SECONDS = 60
_OPTIONAL = ("kvmtool.__main__",)


class Answer(NamedTuple):
    """What a run of kvmtool left; `status` is negative for a signal, as in `subprocess`."""

    status: int
    out: bytes
    err: str


class SlowError(Exception):
    """No answer in time."""


def load() -> None:
    """Imports every module of kvmtool that can be imported here, for the runs to come."""
    for module in pkgutil.walk_packages(kvmtool.__path__, "kvmtool."):
        if module.name not in _OPTIONAL:
            try:
                import_module(module.name)
            except ImportError:  # of an extra that is not installed: the commands say so
                continue


def run(*arguments: str) -> Answer:
    """`kvmtool ARGUMENTS` in a process of its own. Raises `SlowError`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _become(arguments, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            raise SlowError(f"no answer within {_SECONDS} s")
        out.seek(0)
        err.seek(0)
        return Answer(code, out.read(), err.read().decode().strip())


def _become(arguments: tuple[str, ...], out: int, err: int) -> None:
    """The command in this process, which ends with it whatever happens."""
    status = 1
    try:
        signal.alarm(_SECONDS)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["kvmtool", *arguments]
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_work: Callable[[Any], Any]


def each(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`work` of each item in order, as many at a time as there are processors.

    They are forked, so that `work` may be any function; its answers are pickled.
    """
    global _work
    _work = work
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(items))) as pool:
        yield from pool.imap(_worked, items)


def _worked(item: Any) -> Any:
    return _work(item)
