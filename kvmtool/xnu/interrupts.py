"""The interrupt descriptor tables of Intel kernels.

Source: osfmk/i386/mp_desc.c (master_idt, master_idt64, fix_desc, fix_desc64), idt.s and idt64.s
(HI_TEXT, IDT64_BASE_ENTRY), i386_init.c (doublemap_init, idt64_remap), xnu-792..11417; gates: Intel
SDM vol. 3A, 6.11 and 6.14.1.

Gates may lead to a second mapping of the kernel's code. i386 kernels have one of the pages at
hi_remap_text at the very top of every address space, since they give processes all of theirs; from
10.13.2 on x86_64 kernels have one, dblmap_dist bytes away, in user page tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

ENTRIES, SIZE = 256, 16
_GATE = Struct("<HHBBHII")  # offset 15..0, selector, IST, access, offset 31..16, 63..32, reserved
_NARROW = Struct("<HHBBH")  # offset 15..0, selector, 0, access, offset 31..16
_PRESENT, _TYPE = 0x80, 0x1F
_GATES = (0xE, 0xF)  # interrupt gate, trap gate; an i386 task gate has no address
_UBER = 0xFFFFFF80  # KERNEL_UBER_BASE_HI32: where a 64-bit processor finds an i386 kernel
_TOPS = (0xFFE00000, 0xFFC00000)  # HIGH_MEM_BASE: the last page directory entry's, of 2 or 4 MB
_ROOM = 1 << 21


@dataclass(frozen=True, slots=True)
class Gate:
    """Vector `number` of the table: `handler` is the address of the code that answers it.

    `mapped` is the address in the gate itself, which may be that of a second mapping.
    """

    number: int
    address: int
    handler: int | Unreadable
    mapped: int | Unreadable
    access: int


class _Mapping(NamedTuple):
    """What lies at [low, high) lies `distance` bytes before, too."""

    low: int
    high: int
    distance: int


def gates(target: Target, table: int | None = None) -> Iterator[Gate]:
    """The gates that are present in the table of 64 bits at `table`, by default master_idt64.

    Raises `UnsupportedError` for kernels of other machines, `NotFoundError` without the symbol.
    """
    if target.arch.name not in ("x86_64", "i386"):
        raise UnsupportedError(f"the interrupt table of {target.arch.name} kernels is not known")
    if table is None:
        table = _table(target, "_master_idt64")
    mappings = _second_mappings(target)
    for number, at, raw in _entries(target, table, SIZE):
        if isinstance(raw, Unreadable):
            yield Gate(number, at, raw, raw, 0)
            continue
        first, _, _, access, middle, last, _ = _GATE.unpack(raw)
        if access & _PRESENT and access & _TYPE in _GATES:
            if target.arch.name == "i386" and last == _UBER:
                last = 0
            mapped = first | middle << 16 | last << 32
            yield Gate(number, at, _origin(mapped, mappings), mapped, access)


def narrow_gates(target: Target) -> Iterator[Gate]:
    """The gates that are present in an i386 kernel's master_idt; task gates are left out.

    Raises `NotFoundError` without the symbol.
    """
    mappings = _second_mappings(target)
    for number, at, raw in _entries(target, _table(target, "_master_idt"), _NARROW.size):
        if isinstance(raw, Unreadable):
            yield Gate(number, at, raw, raw, 0)
            continue
        first, _, _, access, last = _NARROW.unpack(raw)
        if access & _PRESENT and access & _TYPE in _GATES:
            mapped = first | last << 16
            yield Gate(number, at, _origin(mapped, mappings), mapped, access)


def _table(target: Target, name: str) -> int:
    symbol = target.symbols.get(name)
    if symbol is None:
        raise NotFoundError("symbol", name, hint=target.symbols.hint or "it may be stripped")
    return symbol.address


def _entries(
    target: Target, table: int, size: int
) -> Iterator[tuple[int, int, bytes | Unreadable]]:
    for number in range(ENTRIES):
        at = table + number * size
        try:
            yield number, at, target.memory.read(at, size)
        except FaultError as fault:
            yield number, at, Unreadable.of(fault)


def _origin(address: int, mappings: list[_Mapping]) -> int:
    for low, high, distance in mappings:
        if low <= address < high:
            return address - distance & 0xFFFFFFFFFFFFFFFF
    return address


def _second_mappings(target: Target) -> list[_Mapping]:
    if target.arch.name == "i386":
        return list(_high_text(target))
    try:
        found = [target.variable(name) for name in ("_dblmap_base", "_dblmap_max", "_dblmap_dist")]
    except FaultError:
        return []
    low, high, distance = (value or 0 for value in found)
    return [_Mapping(low, high, distance)]


def _high_text(target: Target) -> Iterator[_Mapping]:
    """Where hi_remap_text to hi_remap_etext may lie once more; not where something else does."""
    names = ("_hi_remap_text", "_hi_remap_etext")
    start, end = (None if (s := target.symbols.get(n)) is None else s.address for n in names)
    if start is None or end is None or not 0 < end - start <= _ROOM:
        return
    for base in _TOPS:
        try:
            there = target.memory.read(base, end - start)
            alike = there == target.memory.read(start, end - start)
        except FaultError:
            alike = True
        if alike:
            yield _Mapping(base, base + end - start, base - start)
