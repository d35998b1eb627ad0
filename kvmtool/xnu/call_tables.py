"""The shapes of sysent and mach_trap_table, and where such a table lies that has no symbol.

From xnu-3248 (10.11) on `_sysent` is stripped, and a kernelcache may have no symbols at all. But
how many arguments the oldest calls take has not changed since 4.4BSD, nor for the traps around
mach_msg since Mac OS X 10.0: the numbers, one entry apart, find the table, and that the handlers
are code proves it. A hook changes a handler, not how many arguments it is given.
Source: bsd/sys/sysent.h, bsd/kern/syscalls.master, osfmk/kern/syscall_sw.{h,c}, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import NotFoundError
from kvmtool.target import Record
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.memory import Region
    from kvmtool.target import Target

_HOOKED = 4  # handlers in a row that may be hooked
LIMIT = 1 << 12  # entries; macOS 15 has some 560 calls and 128 traps
_ARGUMENTS = 12  # that any call takes; the most so far are nine
_MOST = 64 << 20  # bytes of one segment that are searched; the largest kernel has 20 MB of data


class Shape(NamedTuple):
    """How entries of a table lie: `size` bytes each, and the offset of each member."""

    size: int
    handler: int
    munge: int | None
    arguments: int
    arguments_code: str


class Places(NamedTuple):
    """Where the kernel keeps what: the `data` of its image, and whether an address is code's."""

    data: tuple[Region, ...]
    is_code: Callable[[int], bool]


class Known(NamedTuple):
    """How many arguments the entries from number `first` on take, in every release."""

    first: int
    arguments: bytes


# nosys exit fork read write open close wait4 creat link unlink execv chdir fchdir mknod chmod chown
CALLS = Known(0, bytes((0, 1, 0, 3, 3, 3, 1, 4, 0, 2, 1, 0, 1, 1, 3, 2, 3)))
# kern_invalid, mach_msg, mach_msg_overwrite, and the semaphores' seven
TRAPS = Known(30, bytes((0, 7, 8, 1, 1, 2, 1, 2, 3, 4)))

SYSENT: dict[int, tuple[Shape, ...]] = {
    8: (
        Shape(24, 0, 8, 20, "h"),  # xnu-3248 (10.11) on, with a munger
        Shape(16, 0, None, 12, "h"),  # without one
        Shape(32, 0, 8, 28, "h"),  # xnu-2422 (10.9)
        Shape(40, 8, 16, 0, "h"),  # up to xnu-2050 (10.8)
    ),
    4: (Shape(24, 4, 8, 0, "h"), Shape(20, 4, 8, 0, "h")),  # xnu-1228 (10.5) on; 10.4
}
# Small shapes first: with twice its size a table seems to be one of functions, too.
MACH_TRAPS: dict[int, tuple[Shape, ...]] = {
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


def search(
    target: Target, places: Places, name: str, shapes: Iterable[Shape], known: Known
) -> tuple[int, Shape]:
    """Address and shape of the table whose entries take the `known` numbers of arguments.

    Raises `NotFoundError` of `name` when nothing in the kernel's data is such a table, and when two
    things are.
    """
    shapes = tuple(shapes)
    found = [
        (start, shape)
        for data_start, data in _readable(target, places.data)
        for shape in shapes
        for start in _candidates(target, data_start, data, shape, known)
        if _leads_to_code(target, start, shape, known, places.is_code)
    ]
    if len(found) == 1:
        return found[0]
    what = "nothing in the kernel's data looks like it"
    if found:
        what = "it may be at " + " or ".join(f"{start:#x}" for start, _ in found)
    raise NotFoundError("symbol", name, hint=f"it is stripped, and {what}")


def length(target: Target, start: int, shape: Shape, is_code: Callable[[int], bool]) -> int:
    """How many entries there are in a row: for a table whose count is stripped.

    Handlers that lead astray do not end it as long as an entry in order follows soon.
    """
    entries, record = 0, entry_record(target, shape)
    for number in range(LIMIT):
        if _is_entry(record, start + number * shape.size, is_code):
            entries = number + 1
        elif number - entries >= _HOOKED:
            break
    return entries


def _readable(target: Target, ranges: Iterable[Region]) -> Iterator[tuple[int, bytes]]:
    for start, size in ranges:
        at = start
        for piece in target.memory.read_pieces(start, min(size, _MOST)):
            if piece.data is not None:
                yield at, bytes(piece.data)
            at += piece.size


def _candidates(
    target: Target, data_start: int, data: bytes, shape: Shape, known: Known
) -> Iterator[int]:
    """Where an entry 0 might be: each way the entries may be aligned is one string to search."""
    low = 0 if target.arch.byteorder == "<" else {"h": 1, "i": 3, "B": 0}[shape.arguments_code]
    step = target.arch.pointer_size
    first = -data_start % step
    for begin in range(first, first + shape.size, step):
        counts = data[begin + shape.arguments + low :: shape.size]
        at = counts.find(known.arguments)
        while at >= 0:
            if at >= known.first:
                yield data_start + begin + (at - known.first) * shape.size
            at = counts.find(known.arguments, at + 1)


def _leads_to_code(
    target: Target, start: int, shape: Shape, known: Known, is_code: Callable[[int], bool]
) -> bool:
    """Whether the known entries are such, but for a few that may be hooked."""
    numbers = range(known.first, known.first + len(known.arguments))
    entries = (start + number * shape.size for number in numbers)
    record = entry_record(target, shape)
    missed = sum(not _is_entry(record, entry, is_code) for entry in entries)
    return missed * 4 <= len(numbers)


def entry_record(target: Target, shape: Shape) -> Record:
    """What reads an entry's `handler`, `munge` and `arguments`."""
    fields: dict[str, tuple[int | None, str]] = {
        "handler": (shape.handler, "P"),
        "munge": (shape.munge, "P"),
        "arguments": (shape.arguments, shape.arguments_code),
    }
    return Record(target, fields)


def _is_entry(record: Record, entry: int, is_code: Callable[[int], bool]) -> bool:
    """Whether it has a handler that is code, a munger that is too, if any, and few arguments."""
    raw = record.read(entry)
    handler, munge, arguments = raw["handler"], raw["munge"], raw["arguments"]
    if isinstance(handler, Unreadable) or isinstance(arguments, Unreadable):
        return False
    munged = not munge or (isinstance(munge, int) and is_code(munge))
    return is_code(handler) and munged and 0 <= arguments <= _ARGUMENTS
