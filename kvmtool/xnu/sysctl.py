"""The sysctl tree: every name, its number, its handler, and the value where memory holds it.

Source: bsd/sys/sysctl.h (struct sysctl_oid, CTLTYPE_*, CTLFLAG_*), bsd/kern/kern_newsysctl.c
(sysctl_handle_*), xnu-792..11417. A handler of its own computes its answer: there is no value to
read then, and none is made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report, walk_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Record, Target

CTLTYPE = 0xF
NODE, INT, STRING, QUAD, OPAQUE = 1, 2, 3, 4, 5
TYPES = {NODE: "node", INT: "int", STRING: "string", QUAD: "quad", OPAQUE: "opaque"}
FLAGS = (
    (0x80000000, "rd"),
    (0x40000000, "wr"),
    (0x10000000, "anybody"),
    (0x08000000, "secure"),
    (0x04000000, "masked"),
    (0x01000000, "kern"),
    (0x00800000, "locked"),
)
_DEPTH = 24  # CTL_MAXNAME is 12
_CHILDREN = 1 << 14  # of one node
_NAME = 256  # bytes
_VALUE = 1 << 16  # bytes of an opaque value
_FIELDS = {
    "number": ("i", "oid_number"),
    "kind": ("I", "oid_kind"),
    "arg1": ("P", "oid_arg1"),
    "arg2": ("i", "oid_arg2"),
    "name": ("P", "oid_name"),
    "handler": ("P", "oid_handler"),
    "fmt": ("P", "oid_fmt"),
}


@dataclass(frozen=True, slots=True)
class Oid:
    """One node or leaf: its dotted `name`, its numbers (`mib`), and what the kernel keeps of it.

    `arg1` and `handler` are kernel addresses; `value` is an int, text or bytes read from memory,
    None where the handler computes it. Any field may be `Unreadable`. `handler_at` is where the
    pointer to the handler lies.
    """

    name: str
    mib: tuple[int, ...]
    address: int
    kind: Any
    fmt: Any
    handler: Any
    arg1: Any
    arg2: Any
    value: Any
    handler_at: int

    @property
    def type(self) -> Any:
        """ "node", "int", "string", "quad" or "opaque"."""
        return TYPES.get(self.kind & CTLTYPE) if isinstance(self.kind, int) else self.kind

    @property
    def flags(self) -> Any:
        """The flags in words: "rd", "wr", "locked" and so on."""
        if not isinstance(self.kind, int):
            return self.kind
        return [word for bit, word in FLAGS if self.kind & bit]


class _Place(NamedTuple):
    """A list of oids that is still to be walked: where its head lies, and what is above it."""

    head: int
    names: tuple[str, ...]
    mib: tuple[int, ...]


def oids(target: Target, report: Report | None = None) -> Iterator[Oid]:
    """The whole tree below sysctl__children, parents before children, siblings in their order.

    Where a walk stopped goes into `report`. Raises `NotFoundError` for a kernel without the symbol.
    """
    report = report if report is not None else Report()
    root = target.symbols.get("_sysctl__children")
    if root is None:
        raise NotFoundError("symbol", "_sysctl__children", hint=target.symbols.hint)
    reader = _Reader(target)
    waiting = [_Place(root.address, (), ())]
    seen = {root.address}
    while waiting:
        place = waiting.pop(0)
        below = []
        for oid, children in reader.children(place, report):
            yield oid
            if children and children not in seen:
                seen.add(children)
                if len(oid.mib) < _DEPTH:
                    below.append(_Place(children, tuple(oid.name.split(".")), oid.mib))
                else:
                    report.stop("sysctl", len(seen), f"{oid.name} is nested deeper than {_DEPTH}")
        waiting = below + waiting


class _Reader:
    def __init__(self, target: Target) -> None:
        self.target = target
        self._record: Record = record(target, "sysctl_oid", _FIELDS)
        self._link = target.types.offset("sysctl_oid", "oid_link")
        self._handler = target.types.offset("sysctl_oid", "oid_handler")
        self._handlers = self._known_handlers()

    def _known_handlers(self) -> dict[int, str]:
        """Address → what a generic handler reads: "int", "long", "quad", "string", "opaque"."""
        kinds = ("int", "int2quad", "long", "quad", "string", "opaque")
        found = {kind: self.target.symbols.get(f"_sysctl_handle_{kind}") for kind in kinds}
        return {symbol.address: kind for kind, symbol in found.items() if symbol is not None}

    def children(self, place: _Place, report: Report) -> Iterator[tuple[Oid, int]]:
        """The oids of one list; with each where its own children's list is (0: it has none)."""
        walk = ".".join(("sysctl", *place.names))
        link = self._link
        for address in walk_list(self.target, place.head, link, walk, report, _CHILDREN):
            raw = self._record.read(address)
            name = self._text(raw["name"])
            shown = name if isinstance(name, str) else "?"
            number = raw["number"] if isinstance(raw["number"], int) else -1
            node = isinstance(raw["kind"], int) and raw["kind"] & CTLTYPE == NODE
            inner = raw["arg1"] if node and raw["handler"] == 0 else 0
            oid = Oid(
                ".".join((*place.names, shown)),
                (*place.mib, number),
                address,
                raw["kind"],
                self._text(raw["fmt"]),
                raw["handler"],
                raw["arg1"],
                raw["arg2"],
                None if node else self._value(raw),
                address + self._handler,
            )
            yield oid, inner if isinstance(inner, int) else 0

    def _text(self, pointer: Any, limit: int = _NAME) -> Any:
        if isinstance(pointer, Unreadable):
            return pointer
        if not pointer:
            return None
        try:
            return self.target.text(pointer, limit)
        except FaultError as fault:
            return Unreadable.of(fault)

    def _value(self, raw: dict[str, Any]) -> Any:
        """What the generic handlers of kern_newsysctl.c would copy out."""
        handler, arg1, arg2 = raw["handler"], raw["arg1"], raw["arg2"]
        for field in (handler, arg1, arg2):
            if isinstance(field, Unreadable):
                return field
        kind = self._handlers.get(handler)
        try:
            if kind == "int":
                return self.target.integer(arg1) if arg1 else arg2
            if kind in ("long", "quad", "int2quad"):
                return self._wide(kind, arg1)
            if kind == "string":
                return self.target.text(arg1, max(1, min(arg2 or _NAME, _VALUE))) if arg1 else None
            if kind == "opaque" and arg1 and 0 < arg2 <= _VALUE:
                return self.target.memory.read(arg1, arg2)
        except FaultError as fault:
            return Unreadable.of(fault)
        return None

    def _wide(self, kind: str, at: int) -> int | None:
        if not at:
            return None
        if kind == "int2quad":
            return self.target.integer(at)
        code = "I" if kind == "long" and self.target.arch.pointer_size == 4 else "Q"
        value = self.target.unsigned(at, code)
        bits = 32 if code == "I" else 64
        return value - (1 << bits) if value >> (bits - 1) else value
