"""The interrupt descriptor table of x86_64 kernels.

Source: osfmk/i386/mp_desc.c (master_idt64, fix_desc64), osfmk/i386/i386_init.c (doublemap_init,
idt64_remap), xnu-1456..11417; gates: Intel SDM vol. 3A, 6.14.1. From 10.13.2 on the gates lead to
a second mapping of the same code, dblmap_dist bytes away, which user page tables have too.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

ENTRIES, SIZE = 256, 16
_GATE = Struct("<HHBBHII")  # offset 15..0, selector, IST, access, offset 31..16, 63..32, reserved
_PRESENT, _TYPE = 0x80, 0x1F
_GATES = (0xE, 0xF)  # interrupt gate, trap gate


@dataclass(frozen=True, slots=True)
class Gate:
    """Vector `number` of the table: `handler` is the address of the code that answers it.

    `mapped` is the address in the gate itself, which from 10.13.2 on may be that of the second
    mapping.
    """

    number: int
    address: int
    handler: int | Unreadable
    mapped: int | Unreadable
    access: int


def gates(target: Target, table: int | None = None) -> Iterator[Gate]:
    """The gates that are present in the table at `table`, by default master_idt64.

    Raises `UnsupportedError` for kernels of other machines, `NotFoundError` without the symbol.
    """
    if target.arch.name != "x86_64":
        raise UnsupportedError(f"the interrupt table of {target.arch.name} kernels is not known")
    if table is None:
        symbol = target.symbols.get("_master_idt64")
        if symbol is None:
            hint = target.symbols.hint or "it may be stripped"
            raise NotFoundError("symbol", "_master_idt64", hint=hint)
        table = symbol.address
    low, high, distance = _second_mapping(target)
    for number in range(ENTRIES):
        at = table + number * SIZE
        try:
            raw = target.memory.read(at, SIZE)
        except FaultError as fault:
            unreadable = Unreadable.of(fault)
            yield Gate(number, at, unreadable, unreadable, 0)
            continue
        first, _, _, access, middle, last, _ = _GATE.unpack(raw)
        if not access & _PRESENT or access & _TYPE not in _GATES:
            continue
        mapped = first | middle << 16 | last << 32
        handler = mapped - distance if low <= mapped < high else mapped
        yield Gate(number, at, handler & 0xFFFFFFFFFFFFFFFF, mapped, access)


def _second_mapping(target: Target) -> tuple[int, int, int]:
    """dblmap_base, dblmap_max and dblmap_dist; zeros in a kernel without."""
    try:
        found = [target.variable(name) for name in ("_dblmap_base", "_dblmap_max", "_dblmap_dist")]
    except FaultError:
        return 0, 0, 0
    low, high, distance = (value or 0 for value in found)
    return low, high, distance
