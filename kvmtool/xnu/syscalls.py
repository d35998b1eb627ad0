"""The system call table and the Mach trap table.

Source: bsd/sys/sysent.h (struct sysent), osfmk/kern/syscall_sw.h (mach_trap_t), xnu-792..11417.
Neither is in the debug kits of every release, so the shape is told from the table itself: the one
in which the handlers are functions the kernel has symbols for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.call_tables import (
    CALLS,
    LIMIT,
    MACH_TRAPS,
    SYSENT,
    TRAPS,
    entry_record,
    length,
    search,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.target import Target
    from kvmtool.xnu.call_tables import Known, Places, Shape

_SURE = 0.75  # the share of handlers that must be functions; a hooked table keeps most of its own
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Call:
    """One entry: `table` "syscall" or "trap", its number, and the addresses of its functions.

    `name` is the kernel's own for the call; None where it keeps none. Any field may be
    `Unreadable`. `handler_at` and `munge_at` are where the pointers lie.
    """

    table: str
    number: int
    address: int
    name: Any
    handler: Any
    munge: Any
    arguments: Any
    handler_at: int
    munge_at: int


class _Table(NamedTuple):
    """A table of calls: how it is told, its symbols, how its entries may lie."""

    name: str
    symbol: str
    length: str
    shapes: dict[int, tuple[Shape, ...]]
    known: Known


_SYSENT = _Table("syscall", "_sysent", "_nsysent", SYSENT, CALLS)
_MACH_TRAPS = _Table("trap", "_mach_trap_table", "_mach_trap_count", MACH_TRAPS, TRAPS)


def syscalls(target: Target, places: Places | None = None) -> Iterator[Call]:
    """Every entry of sysent.

    Its symbol is stripped from 10.11 on: then the table is searched in `places`. Raises
    `NotFoundError` when it is not there, `FormatError`, `FaultError`.
    """
    yield from _entries(target, _SYSENT, places)


def traps(target: Target, places: Places | None = None) -> Iterator[Call]:
    """Every entry of mach_trap_table, found and raising as `syscalls`."""
    yield from _entries(target, _MACH_TRAPS, places)


def _entries(target: Target, table: _Table, places: Places | None) -> Iterator[Call]:
    start, shape, count = _found(target, table, places)
    record, names = entry_record(target, shape), _Names(target, table.name, count)
    for number in range(count):
        at = start + number * shape.size
        raw = record.read(at)
        yield Call(
            table.name,
            number,
            at,
            names[number],
            raw["handler"],
            raw["munge"],
            raw["arguments"],
            at + shape.handler,
            at + (shape.munge or 0),
        )


def _found(target: Target, table: _Table, places: Places | None) -> tuple[int, Shape, int]:
    """Where the table starts, how its entries lie, how many there are."""
    shapes = table.shapes[target.arch.pointer_size]
    symbol = target.symbols.get(table.symbol)
    if symbol is not None:
        start = symbol.address
        count = _count(target, table)
        shape = _shape(target, table.symbol, start, count or _SAMPLE, shapes)
    elif places is not None:
        start, shape = search(target, places, table.symbol, shapes, table.known)
        count = _count(target, table)
    else:
        raise _stripped(target, table.symbol)
    if count is None and places is not None:
        count = length(target, start, shape, places.is_code)
    if not count:
        raise _stripped(target, table.length)
    return start, shape, count


def _count(target: Target, table: _Table) -> int | None:
    """How many entries the kernel says there are; None where it does not."""
    found = target.symbols.get(table.length)
    if found is None:
        return None
    count = target.integer(found.address)
    if not 0 < count <= LIMIT:
        what = f"{table.length} at {found.address:#x} is {count}, expected 1 to {LIMIT}"
        raise FormatError(table.symbol, None, what)
    return count


def _stripped(target: Target, name: str) -> NotFoundError:
    return NotFoundError("symbol", name, hint=target.symbols.hint or "it may be stripped")


def _shape(target: Target, symbol: str, start: int, count: int, shapes: Sequence[Shape]) -> Shape:
    """The shape in which the handlers are functions. Raises `FormatError` when none does."""
    best, share = shapes[0], -1.0
    for shape in shapes:
        found = _functions(target, start, min(count, _SAMPLE), shape)
        if found > share:
            best, share = shape, found
    if share < _SURE:
        what = f"{symbol} at {start:#x}: no known shape of its entries makes them functions"
        raise FormatError(symbol, None, what)
    return best


def _functions(target: Target, start: int, count: int, shape: Shape) -> float:
    """The share of handlers that are the very address of a symbol, of those that can be read."""
    known = seen = 0
    for number in range(count):
        try:
            pointer = target.pointer(start + number * shape.size + shape.handler)
        except FaultError:
            continue
        if not pointer and shape.munge is not None:
            continue
        seen += 1
        found = target.symbols.at(pointer)
        known += found is not None and found[1] == 0
    return known / seen if seen else 0.0


class _Names:
    """The names of syscallnames, an array of pointers as long as sysent."""

    def __init__(self, target: Target, table: str, count: int) -> None:
        self._target, self._count = target, count
        found = target.symbols.get("_syscallnames") if table == "syscall" else None
        self._start = None if found is None else found.address

    def __getitem__(self, number: int) -> Any:
        if self._start is None:
            return None
        try:
            at = self._target.pointer(self._start + number * self._target.arch.pointer_size)
            return self._target.text(at, 128) if at else None
        except FaultError as fault:
            return Unreadable.of(fault)
