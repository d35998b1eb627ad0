"""How far something long is: told by whoever does it, heard by whoever asked to.

A listener hears only what is done in its own thread (and what that hands on); without one, telling
costs a look at a variable. Whoever told a step calls `end` when the work is over.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Listener: TypeAlias = Callable[["Step | None"], None]


class Step(NamedTuple):
    """`what` is done ("searching memory"), how much of it, of how much in all (0: not known)."""

    what: str
    done: int
    total: int
    unit: str = "bytes"


_listener: ContextVar[Listener | None] = ContextVar("kvmtool.progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside of this, `listener` is told every `Step`, and None when something else is written."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Listener | None:
    """Who listens, for work that goes on in other threads."""
    return _listener.get()


def step(what: str, done: int, total: int, unit: str = "bytes") -> None:
    """Tell how far `what` is: it has ended when `done` has come to `total`."""
    heard = _listener.get()
    if heard is not None:
        heard(Step(what, done, total, unit))


def end(what: str) -> None:
    """Tell that `what` is over, whether it came to its end or not."""
    step(what, 1, 1)


def pause() -> None:
    """Tell that something else is about to be written: what is shown has to go."""
    heard = _listener.get()
    if heard is not None:
        heard(None)
