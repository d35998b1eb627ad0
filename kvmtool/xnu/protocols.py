"""Protocol families and protocols: who answers for a packet and for a socket's calls.

Source: bsd/sys/domain.h (domain), bsd/sys/protosw.h (protosw, pr_usrreqs), bsd/kern/uipc_domain.c,
xnu-792..11417. Up to 10.8 domains and protocols are chained by a pointer of their own (dom_next,
pr_next), from 10.9 on by TAILQs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu.queues import Report, walk_list

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmtool.target import Target

_LIMIT = 1 << 10
_NAME = 32  # bytes
_FAMILY_FUNCTIONS = ("dom_init", "dom_externalize", "dom_dispose", "dom_rtattach")
_FUNCTIONS = (
    *("pr_input", "pr_output", "pr_ctlinput", "pr_ctloutput", "pr_ousrreq", "pr_init"),
    *("pr_fasttimo", "pr_slowtimo", "pr_drain", "pr_sysctl", "pr_lock", "pr_unlock", "pr_getlock"),
    *("pr_update_last_owner", "pr_copy_last_owner"),
)
# pr_usrreqs has had 20 words at least: pointers all, but from 10.9 on the first holds flags
_REQUESTS = 20
_FLAGS = 0x1000


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol, or with `number` None its family itself.

    `family` is dom_name ("internet"), `number` pr_protocol. `functions` maps a member to (where the
    pointer lies, the pointer); `requests` are those of its pr_usrreqs. Any may be `Unreadable`.
    """

    address: int
    family: Any
    number: Any
    functions: Mapping[str, tuple[int, Any]]
    requests: Mapping[str, tuple[int, Any]]


def protocols(target: Target, report: Report | None = None) -> Iterator[Protocol]:
    """Every family, each followed by its protocols. Where a walk stopped goes into `report`.

    Raises `NotFoundError` for a kernel without the symbol _domains.
    """
    report = report if report is not None else Report()
    head = target.symbols.get("_domains")
    if head is None:
        raise NotFoundError("symbol", "_domains", hint=target.symbols.hint or "it may be stripped")
    types = target.types
    link = _link(target, "domain", "dom_entry", "dom_next")
    inner = _link(target, "protosw", "pr_entry", "pr_next")
    first = offset_of(types, "domain", "dom_protosw.tqh_first", "dom_protosw")
    name = types.offset("domain", "dom_name")
    number = types.offset("protosw", "pr_protocol")
    for at in walk_list(target, head.address, link, "domains", report, _LIMIT):
        family = _text(target, at + name)
        functions = _members(target, "domain", at, _FAMILY_FUNCTIONS)
        yield Protocol(at, family, None, functions, {})
        if first is None:
            continue
        walk = f"protocols of {family}"
        for protocol in walk_list(target, at + first, inner, walk, report, _LIMIT):
            try:
                said: Any = target.unsigned(protocol + number, "H")
            except FaultError as fault:
                said = Unreadable.of(fault)
            functions = _members(target, "protosw", protocol, _FUNCTIONS)
            yield Protocol(protocol, family, said, functions, dict(_requests(target, protocol)))


def _link(target: Target, struct: str, queue: str, pointer: str) -> int:
    at = offset_of(target.types, struct, f"{queue}.tqe_next", queue, pointer)
    return target.types.offset(struct, queue) if at is None else at


def _requests(target: Target, protocol: int) -> Iterator[tuple[str, tuple[int, Any]]]:
    """The functions of pr_usrreqs by name where the types have them, else by their number."""
    at = target.types.offset("protosw", "pr_usrreqs")
    start = _pointer(target, protocol + at)
    if not isinstance(start, int):
        yield "pr_usrreqs", (protocol + at, start)
        return
    if not start:
        return
    size, known = target.arch.pointer_size, target.types.find_struct("pr_usrreqs")
    if known is not None:
        for member in known.members.values():
            if member.name != "pru_flags":
                place = start + member.offset
                yield member.name, (place, _pointer(target, place))
        return
    for index in range(_REQUESTS):
        place = start + index * size
        pointer = _pointer(target, place)
        if index or not isinstance(pointer, int) or pointer >= _FLAGS:
            yield f"pr_usrreqs[{index}]", (place, pointer)


def _members(
    target: Target, struct: str, at: int, names: Sequence[str]
) -> dict[str, tuple[int, Any]]:
    found = {}
    for name in names:
        offset = offset_of(target.types, struct, name)
        if offset is not None:
            found[name] = (at + offset, _pointer(target, at + offset))
    return found


def _text(target: Target, at: int) -> Any:
    try:
        pointer = target.pointer(at)
        return target.text(pointer, _NAME) if pointer else None
    except FaultError as fault:
        return Unreadable.of(fault)


def _pointer(target: Target, at: int) -> Any:
    return guarded(lambda: target.pointer(at))
