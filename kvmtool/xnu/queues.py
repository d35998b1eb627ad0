"""Guarded walks of the kernel's linked lists.

Every walk ends: at the list's end, at an element it has met before, at memory it cannot read, or at
a limit; and it says which. Source: bsd/sys/queue.h and osfmk/kern/queue.h, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvmtool.target import Target

LIMIT = 1 << 20  # elements; XNU's largest lists (processes, threads) stay far below


class Difference(NamedTuple):
    """`subject`, at `address`, stands on the lists `on`, not on those `missing`, where it belongs.

    Without `missing` the lists have it, but do not say the same of it; `text` says what.
    """

    subject: str
    address: int | None
    on: tuple[str, ...]
    missing: tuple[str, ...]
    text: str


class Report:
    """What happened on the way: `stops` of walks that did not reach their end, and `notes`.

    `differences` are the notes that say how two lists of the kernel's disagree. `partial` is
    whether something is missing from the answer.
    """

    def __init__(self) -> None:
        self.stops: list[str] = []
        self.notes: list[str] = []
        self.differences: list[Difference] = []

    @property
    def partial(self) -> bool:
        """Whether some walk stopped before its end."""
        return bool(self.stops)

    def stop(self, walk: str, after: int, reason: str) -> None:
        """A walk ended early, after `after` elements."""
        self.stops.append(f"{walk}: stopped after {after} elements: {reason}")

    def differ(self, difference: Difference) -> None:
        """Two lists of the kernel's disagree: a note, too."""
        self.notes.append(difference.text)
        self.differences.append(difference)


def walk_list(
    target: Target, head: int, link: int, name: str, report: Report, limit: int = LIMIT
) -> Iterator[int]:
    """Elements of a BSD LIST, SLIST or TAILQ: `head` is where the first pointer is stored.

    `link` is the offset in bytes of the next pointer in an element.
    """
    seen: set[int] = set()
    reason = yield from _along(target, _Way(head, link, 0, (0,)), seen, limit)
    if reason:
        report.stop(name, len(seen), reason)


def walk_queue(
    target: Target, head: int, link: int, name: str, report: Report, limit: int = LIMIT
) -> Iterator[int]:
    """Elements of a Mach queue whose links point at elements (queue_enter), `head` its queue_head.

    `link` is the offset in bytes of the queue_chain in an element. Where the way is cut, what lies
    behind is found from the queue's tail, backwards: those elements come last, nearest the tail
    first.
    """
    size = target.arch.pointer_size
    forth, back = _Way(head, link, 0, (0, head)), _Way(head + size, link + size, 0, (0, head))
    return _both(target, forth, back, name, report, limit)


def walk_tail_queue(
    target: Target, head: int, link: int, name: str, report: Report, limit: int = LIMIT
) -> Iterator[int]:
    """Elements of a BSD TAILQ, `head` its TAILQ_HEAD; `link` is where an element has its entry.

    As `walk_queue`, both ways: what points back points at the next pointer of the one before.
    """
    size = target.arch.pointer_size
    forth = _Way(head, link, 0, (0,))
    back = _Way(head + size, link + size, link, (-link, head - link))
    return _both(target, forth, back, name, report, limit)


class _Way(NamedTuple):
    """A way along a list: where its first link is; in an element the next lies `link` bytes in.

    A link points `into` bytes into an element; an element of `ends` is none.
    """

    first: int
    link: int
    into: int
    ends: tuple[int, ...]


def _both(
    target: Target, forth: _Way, back: _Way, name: str, report: Report, limit: int
) -> Iterator[int]:
    """The way forth; when it is cut, from the other end as far as that leads."""
    seen: set[int] = set()
    reason = yield from _along(target, forth, seen, limit)
    if not reason:
        return
    count = len(seen)
    if count < limit:
        yield from _along(target, back, seen, limit)
    found = len(seen) - count
    report.stop(name, count, reason + (f"; {found} more from its tail" if found else ""))


def _along(target: Target, way: _Way, seen: set[int], limit: int) -> Generator[int, None, str]:
    """The elements on the way, each added to `seen`; then why it ended early, "" if it did not."""
    where = way.first
    while True:
        try:
            element = target.pointer(where) - way.into
        except FaultError as fault:
            return f"the link at {where:#x} is {fault.reason}"
        if element in way.ends:
            return ""
        if element in seen:
            return f"{element:#x} was met before (the list runs in a circle)"
        if len(seen) >= limit:
            return f"more than {limit} elements"
        seen.add(element)
        yield element
        where = element + way.link
