"""Walks of any list by the types of its head and its elements, guarded.

Source: bsd/sys/queue.h (LIST, SLIST, STAILQ, TAILQ, CIRCLEQ), osfmk/kern/queue.h (queue_head_t),
xnu-792..11417. A Mach queue ends at its own head; its links point at elements (queue_enter) or at
the queue_chain inside them (enqueue): which, the first element's way back to the head tells.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, KvmError
from kvmtool.fields import place_of
from kvmtool.object import Object
from kvmtool.types.ctype import Compound, CType, Field, Pointer, Void, unqualified
from kvmtool.types.declare import declare
from kvmtool.xnu.queues import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target
    from kvmtool.xnu.queues import Report

_FIRST = ("lh_first", "slh_first", "stqh_first", "tqh_first", "cqh_first", "next")
_NEXT = ("le_next", "sle_next", "stqe_next", "tqe_next", "cqe_next", "next")
_CONTAINER = re.compile(r"\s*((?:struct\s+|union\s+|class\s+)?[A-Za-z_$][\w$]*)\s*(?:\.(.+))?")


class Chain(NamedTuple):
    """How a list is chained: where its first link is and what every element is.

    A link points `into` bytes into an element of type `element`, and lies `link` bytes from an
    element's start. The list ends at one of `ends`; `ring` says that it has no head that tells.
    """

    first: Object
    element: CType
    into: int
    link: int
    ends: tuple[int, ...]
    ring: bool


def chain_of(
    target: Target, head: Object, follow: str | None = None, container: str | None = None
) -> Chain:
    """The list that begins at `head`: a head of queue.h's, or a pointer to the first element.

    `follow` is the member with the next pointer ("p_list", "p_list.le_next"). `container` is the
    elements' type where the head does not tell, or "TYPE.MEMBER" where links point at that member;
    it then has the next pointer, too, if `follow` does not say otherwise. What a Mach queue's links
    point at is seen from the queue itself, where it can be read.

    Raises: NotFoundError for a type or member, `KvmError` for what is no list.
    """
    first, ends = _first(target, head)
    pointer = unqualified(first.type)
    assert isinstance(pointer, Pointer)
    element, member = pointer.target, None
    if container is not None:
        parts = _CONTAINER.fullmatch(container)
        if parts is None:
            raise KvmError(f"{container!r}: expected TYPE or TYPE.MEMBER, as thread.task_threads")
        element, member = target.types.type(parts.group(1)), parts.group(2)
    if isinstance(unqualified(element), Void):
        raise KvmError(f"{declare(first.type)} does not tell the elements' type (--container)")
    follow = follow or member
    if follow is None:
        raise KvmError(f"which member of {declare(element)} has the next pointer? (--next)")
    link = _link(target, place_of(target.types, element, follow))
    into = place_of(target.types, element, member).offset if member else 0
    chain = Chain(first, element, into, link.offset, ends, ring=len(ends) == 1)
    return chain if chain.ring else _seen_from_head(target, chain)


def _seen_from_head(target: Target, chain: Chain) -> Chain:
    """The chain with `into` as the first element's prev, which leads to the head, shows it."""
    after = target.arch.pointer_size  # struct queue_entry is next, prev
    for into in (0, chain.link):
        with suppress(FaultError):
            back = int(chain.first) - into + chain.link + after
            if target.pointer(back) in chain.ends[1:]:
                return chain._replace(into=into)
    return chain


def _first(target: Target, head: Object) -> tuple[Object, tuple[int, ...]]:
    """The first link, and the addresses that end the list."""
    plain = unqualified(head.type)
    if isinstance(plain, Pointer):
        return head, (0,)
    if isinstance(plain, Compound) and not head.is_value:
        names = [name for name, _ in head.members()]
        known = next((name for name in _FIRST if name in names), None)
        if known is not None:
            link = _link(target, Field(None, head.member(known).type, 0))
            start = head.member(known).address
            return Object(target, link.type, start + link.offset), (0, head.address)
        return head.address_of(), (0,)
    raise KvmError(
        f"{declare(head.type)} is no list: expected a head of queue.h's, as allproc, or a pointer "
        "to the first element"
    )


def _link(target: Target, place: Field) -> Field:
    """The next pointer at, or inside, a member."""
    for _ in range(4):  # p_list.le_next.__smr_ptr
        plain = unqualified(place.type)
        if isinstance(plain, Pointer):
            return place
        fields = list(plain.fields) if isinstance(plain, Compound) else []
        known = [field for field in fields if field.name in _NEXT] or fields[: len(fields) == 1]
        if not known:
            break
        place = known[0]._replace(offset=place.offset + known[0].offset)
    raise KvmError(f"{declare(place.type, place.name or '')} has no next pointer")


def walk_chain(
    target: Target, chain: Chain, name: str, report: Report, limit: int = LIMIT
) -> Iterator[Object]:
    """The elements, each a reference; where the walk stopped early goes into `report`."""
    seen: dict[int, None] = {}
    where = None
    while True:
        try:
            pointer = target.strip(int(chain.first)) if where is None else target.pointer(where)
        except FaultError as fault:
            reason = f"the link at {fault.address:#x} is {fault.reason}"
            report.stop(name, len(seen), reason)
            return
        if pointer in chain.ends:
            return
        if pointer in seen:
            if chain.ring and pointer == next(iter(seen)):
                report.notes.append(f"{name}: back at the first element, the list is a ring")
            else:
                reason = f"{pointer:#x} was met before (the list runs in a circle)"
                report.stop(name, len(seen), reason)
            return
        if len(seen) >= limit:
            report.stop(name, len(seen), f"more than {limit} elements")
            return
        seen[pointer] = None
        element = Object(target, chain.element, pointer - chain.into)
        yield element
        where = element.address + chain.link
