"""Guarded walks of the kernel's linked lists.

Every walk ends: at the list's end, at an element it has met before, at memory it cannot read, or at
a limit; and it says which. Source: bsd/sys/queue.h and osfmk/kern/queue.h, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    return _walk(target, head, lambda element: element + link, (0,), name, report, limit)


def walk_queue(
    target: Target, head: int, link: int, name: str, report: Report, limit: int = LIMIT
) -> Iterator[int]:
    """Elements of a Mach queue whose links point at elements (queue_enter), `head` its queue_head.

    `link` is the offset in bytes of the queue_chain in an element.
    """
    ends = (0, head)
    return _walk(target, head, lambda element: element + link, ends, name, report, limit)


def _walk(
    target: Target,
    head: int,
    next_at: Callable[[int], int],
    ends: tuple[int, ...],
    name: str,
    report: Report,
    limit: int,
) -> Iterator[int]:
    seen: set[int] = set()
    where = head
    while True:
        try:
            element = target.pointer(where)
        except FaultError as fault:
            reason = f"the link at {where:#x} is {fault.reason}"
            report.stop(name, len(seen), reason)
            return
        if element in ends:
            return
        if element in seen:
            reason = f"{element:#x} was met before (the list runs in a circle)"
            report.stop(name, len(seen), reason)
            return
        if len(seen) >= limit:
            report.stop(name, len(seen), f"more than {limit} elements")
            return
        seen.add(element)
        yield element
        where = next_at(element)
