"""The system call table and the Mach trap table.

Source: bsd/sys/sysent.h (struct sysent), osfmk/kern/syscall_sw.h (mach_trap_t), xnu-792..11417.
Neither is in the debug kits of every release, so the shape is told from the table itself: the one
in which the handlers are functions the kernel has symbols for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.target import Record
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.target import Target

_LIMIT = 1 << 12  # entries; macOS 15 has some 560 calls and 128 traps
_SURE = 0.75  # the share of handlers that must be functions; a hooked table keeps most of its own
_SAMPLE = 64


class Shape(NamedTuple):
    """How entries of a table lie: `size` bytes each, and the offset of each member."""

    size: int
    handler: int
    munge: int | None
    arguments: int
    arguments_code: str


_SYSENT: dict[int, tuple[Shape, ...]] = {
    8: (
        Shape(24, 0, 8, 20, "h"),  # xnu-3248 (10.11) on, with a munger
        Shape(16, 0, None, 12, "h"),  # without one
        Shape(32, 0, 8, 28, "h"),  # xnu-2422 (10.9)
        Shape(40, 8, 16, 0, "h"),  # up to xnu-2050 (10.8)
    ),
    4: (Shape(24, 4, 8, 0, "h"), Shape(20, 4, 8, 0, "h")),  # xnu-1228 (10.5) on; 10.4
}
# Small shapes first: with twice its size a table seems to be one of functions, too.
_TRAPS: dict[int, tuple[Shape, ...]] = {
    8: (
        Shape(16, 8, None, 0, "B"),  # xnu-1456 (10.6) to 2050 (10.8), and arm64
        Shape(24, 8, 16, 0, "B"),
        Shape(32, 8, 16, 0, "i"),  # xnu-2422 (10.9) on
        Shape(40, 8, 16, 0, "i"),
    ),
    4: (
        Shape(8, 4, None, 0, "i"),
        Shape(12, 4, 8, 0, "i"),
        Shape(16, 4, None, 0, "i"),  # xnu-1228 (10.5): mach_trap_stack instead of a munger
        Shape(20, 4, 8, 0, "i"),
    ),
}


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


def syscalls(target: Target) -> Iterator[Call]:
    """Every entry of sysent. Raises `NotFoundError`: its symbol is stripped from 10.11 on."""
    yield from _table(target, "syscall", "_sysent", "_nsysent", _SYSENT)


def traps(target: Target) -> Iterator[Call]:
    """Every entry of mach_trap_table. Raises `NotFoundError`, `FormatError`, `FaultError`."""
    yield from _table(target, "trap", "_mach_trap_table", "_mach_trap_count", _TRAPS)


def _table(
    target: Target, table: str, symbol: str, length: str, shapes: dict[int, tuple[Shape, ...]]
) -> Iterator[Call]:
    start, count_at = (_address(target, name) for name in (symbol, length))
    count = target.integer(count_at)
    if not 0 < count <= _LIMIT:
        what = f"{length} at {count_at:#x} is {count}, expected 1 to {_LIMIT}"
        raise FormatError(symbol, None, what)
    shape = _shape(target, symbol, start, count, shapes[target.arch.pointer_size])
    fields: dict[str, tuple[int | None, str]] = {
        "handler": (shape.handler, "P"),
        "munge": (shape.munge, "P"),
        "arguments": (shape.arguments, shape.arguments_code),
    }
    record, names = Record(target, fields), _Names(target, table, count)
    for number in range(count):
        at = start + number * shape.size
        raw = record.read(at)
        yield Call(
            table,
            number,
            at,
            names[number],
            raw["handler"],
            raw["munge"],
            raw["arguments"],
            at + shape.handler,
            at + (shape.munge or 0),
        )


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
            return Unreadable(f"{fault.reason} at {fault.address:#x}")


def _address(target: Target, name: str) -> int:
    found = target.symbols.get(name)
    if found is None:
        raise NotFoundError("symbol", name, hint=target.symbols.hint or "it may be stripped")
    return found.address
