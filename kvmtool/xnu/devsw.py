"""The device switches: which driver answers open, read and ioctl of each major number.

Source: bsd/sys/conf.h (struct cdevsw, bdevsw), bsd/kern/bsd_stubs.c, bsd/dev/*/conf.c,
xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.target import Record, offset_of
from kvmtool.xnu.queues import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

_LIMIT = 1 << 12  # XNU's own tables have some 40; major numbers are 8 bits wide
CHARACTER = (
    *("open", "close", "read", "write", "ioctl", "stop", "reset", "select", "mmap", "strategy"),
    *("reserved_1", "reserved_2"),
)
BLOCK = ("open", "close", "strategy", "ioctl", "dump", "psize")
_OLD_NAMES = {"reserved_1": "d_getc", "reserved_2": "d_putc"}  # up to 10.5
TYPES = {0: None, 1: "tape", 2: "disk", 3: "tty"}  # D_TAPE, D_DISK, D_TTY


@dataclass(frozen=True, slots=True)
class Device:
    """One slot: `kind` "character" or "block", its major number, and where the slot lies.

    `functions` are the addresses behind d_open, d_read and so on (without "d_"), `type` is d_type.
    Any of them may be `Unreadable`. `places` are where the pointers lie.
    """

    kind: str
    major: int
    address: int
    functions: dict[str, Any]
    ttys: Any
    type: Any
    places: dict[str, int]


def devices(target: Target, report: Report | None = None) -> Iterator[Device]:
    """Every slot of cdevsw, then of bdevsw; a length that cannot be read goes into `report`.

    Raises `NotFoundError` for a kernel without these symbols, `FormatError` for lengths beyond
    reason.
    """
    report = report if report is not None else Report()
    for kind, struct, length, names in (
        ("character", "cdevsw", "_nchrdev", CHARACTER),
        ("block", "bdevsw", "_nblkdev", BLOCK),
    ):
        try:
            yield from _switch(target, kind, struct, length, names)
        except FaultError as fault:
            report.stop(struct, 0, f"{length} at {fault.address:#x} is {fault.reason}")


def _switch(
    target: Target, kind: str, struct: str, length: str, names: tuple[str, ...]
) -> Iterator[Device]:
    types = target.types
    start, slots = _slots(target, struct, length)
    fields: dict[str, tuple[int | None, str]] = {
        name: (offset_of(types, struct, f"d_{name}", _OLD_NAMES.get(name, "")), "P")
        for name in names
    }
    fields["type"] = (types.offset(struct, "d_type"), "i")
    fields["ttys"] = (offset_of(types, struct, "d_ttys"), "P")
    record, size = Record(target, fields), types.size(struct)
    for major in range(slots):
        slot = start + major * size
        raw = record.read(slot)
        functions = {name: raw[name] for name in names if raw[name] is not None}
        places = {name: slot + at for name in functions if (at := fields[name][0]) is not None}
        yield Device(kind, major, slot, functions, raw["ttys"], raw["type"], places)


def _slots(target: Target, struct: str, length: str) -> tuple[int, int]:
    """Where a switch starts, and how many slots it has.

    A kernel optimised as a whole has no variable for the number: then the next symbol ends it.
    """
    start, count = (target.symbols.get(name) for name in (f"_{struct}", length))
    if start is None:
        raise NotFoundError("symbol", f"_{struct}", hint=target.symbols.hint)
    if count is not None:
        slots, where = target.integer(count.address), f"{length} at {count.address:#x}"
    else:
        extent, size = target.symbols.extent(start), target.types.size(struct)
        if extent is None or extent % size:
            raise NotFoundError("symbol", length, hint=target.symbols.hint)
        slots, where = extent // size, f"the room for {start.name} at {start.address:#x}"
    if not 0 <= slots <= _LIMIT:
        raise FormatError(struct, None, f"{where} is {slots}, expected at most {_LIMIT}")
    return start.address, slots
