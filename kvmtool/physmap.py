"""Page tables out of a dump of the kernel's address space, which holds no physical memory as such.

Some kernel addresses stand for physical ones by plain arithmetic: the static kernel, and the map of
physical memory that the kernel keeps for itself. A core has the page tables' own pages at such
addresses. What of physical memory a core has in this way is put together here; all else is absent.

Source: osfmk/i386/i386_vm_init.c, osfmk/x86_64/pmap.c (PHYSMAP_PTOV), xnu-1228..11417;
osfmk/arm64/arm_vm_init.c (phystokv, ptov_table), xnu-2782..11417.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.arch.pages import ABSENT
from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.memory import RunMemory
from kvmtool.source import find_by_chunks
from kvmtool.way_places import ARM64, I386, MASK, X86_64
from kvmtool.way_roots import of_symbols, walker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.arch import Arch
    from kvmtool.arch.walker import Walker
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.way_places import Machine
    from kvmtool.way_roots import Root

_MACHINES = {"i386": I386, "x86_64": X86_64, "arm64": ARM64, "arm64e": ARM64}
_PHYSICAL_END = 1 << 52  # no processor here has more address bits
_LOW = 1 << 20  # below lie aliases (low globals, vectors), not the pages of these numbers
_PTOV_SLOTS = 8  # PTOV_TABLE_SIZE, arm_vm_init.c, xnu-4570..11417
_PAGES = (0x4000, 0x1000)  # granules of arm64; a top table fits in a page
_PROBES = ("_version", "_kernel_pmap", "_kernel_pmap_store", "_lowGlo")
_NEEDED = {
    X86_64: "_first_avail or _avail_start, and _IdlePML4",
    I386: "_first_avail or _avail_start, and _IdlePDPT",
    ARM64: "_gVirtBase, _gPhysBase, _gPhysSize and _cpu_ttep",
}


class Linear(NamedTuple):
    """Kernel addresses [start, start + size) are those from `physical` on; `why` by what rule."""

    start: int
    size: int
    physical: int
    why: str


def kernel_walker(arch: Arch, memory: Memory, symbols: SymbolTable) -> Walker | None:
    """The kernel's page table, its pages read out of the kernel's own `memory` by `symbols`.

    It maps the kernel's variables to where the static kernel lies: that is verified. None for a
    processor whose tables are not known here (ppc). Raises `NotFoundError`, naming what is missing,
    when the symbols do not lead to a table or the dump does not hold it.
    """
    machine = _MACHINES.get(arch.name)
    if machine is None:
        return None
    linear = list(linear_ranges(machine, memory, symbols))
    if not linear:
        why = _unreadable(memory, symbols, _NEEDED[machine])
        raise _missing(why or f"{_NEEDED[machine]} are needed to find it", symbols)
    physical = PhysicalPages(memory, linear)

    def to_physical(address: int) -> int:
        found = physical_address(linear, address)
        if found is None:
            raise FaultError("kernel", address, 1, ABSENT)
        return found

    wrong = ""  # with the first: later ones are guesses
    for root in of_symbols(memory, to_physical, machine, symbols):
        for mode in root.modes:
            found = _verified(physical, root, mode, linear, symbols)
            if not isinstance(found, str):
                return found
            wrong = wrong or f"{root.how}, {root.address:#x}: {found}"
    raise _missing(wrong or "no symbol names one", symbols)


def _unreadable(memory: Memory, symbols: SymbolTable, needed: str) -> str:
    """Which of the variables that `needed` names lies on a page that is not there; "" if none."""
    for name in needed.replace(",", " ").split():
        symbol = symbols.get(name)
        try:
            if symbol is not None:
                memory.check(symbol.address, 4)
        except FaultError as fault:
            return f"{name} at {fault.address:#x} is {fault.reason}"
    return ""


def _missing(why: str, symbols: SymbolTable) -> NotFoundError:
    hint = symbols.hint if not len(symbols) and symbols.hint else why
    return NotFoundError("page table", "of the kernel in a dump of its memory", hint=hint)


def _verified(
    physical: PhysicalPages, root: Root, mode: str, linear: list[Linear], symbols: SymbolTable
) -> Walker | str:
    """The walker, if it maps the kernel's variables to where they are; else what is wrong."""
    try:
        tables = walker(physical, mode, root.address)
    except UnsupportedError as error:
        return str(error)
    probed = 0
    for name in _PROBES:
        symbol = symbols.get(name)
        expected = None if symbol is None else physical_address(linear, symbol.address)
        if symbol is None or expected is None:
            continue
        found, _, reason = tables.lookup(symbol.address)
        if found != expected:
            where = f"at {found:#x}" if found is not None else reason
            last = tables.walk(symbol.address).steps[-1:]
            if last and last[0].entry is None:
                where = f"not to be found: the table at {last[0].table:#x} is absent"
            return f"{name} is {where}, expected at {expected:#x}"
        probed += 1
    return tables if probed else "no variable of the static kernel to verify it by"


class PhysicalPages(RunMemory):
    """What a dump of the kernel's address space holds of physical memory. See `Memory`."""

    def __init__(self, memory: Memory, linear: list[Linear]) -> None:
        """Where two of `linear` give the same physical page, the first does."""
        starts, ends, offsets = array("Q"), array("Q"), array("Q")
        regions = list(memory.regions())
        for piece in linear:
            for region in regions:
                start = max(region.start, piece.start)
                end = min(region.start + region.size, piece.start + piece.size)
                if start < end:
                    starts.append(start - piece.start + piece.physical)
                    ends.append(end - piece.start + piece.physical)
                    offsets.append(start)
        lost = [(0, _PHYSICAL_END)]
        super().__init__(_Kernel(memory), starts, ends, offsets, space="physical", lost=lost)


class _Kernel:
    """The kernel's memory as a `Source`: an offset is an address."""

    name, size = "kernel memory", MASK

    def __init__(self, memory: Memory) -> None:
        self.read_at = memory.read

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """The memory is another's."""


def physical_address(linear: list[Linear], address: int) -> int | None:
    """The physical address that arithmetic gives a kernel address; None where none does."""
    for piece in linear:
        if piece.start <= address < piece.start + piece.size:
            return address - piece.start + piece.physical
    return None


def linear_ranges(machine: Machine, memory: Memory, symbols: SymbolTable) -> Iterator[Linear]:
    """The kernel addresses that stand for physical ones, by the symbols that the kernel has."""
    words = _Words(memory, symbols, 4 if machine is I386 else 8)
    pieces = _of_arm(words) if machine is ARM64 else _of_intel(words, machine.base or 0)
    for piece in pieces:
        inside = piece.start + piece.size <= 1 << 64
        if inside and piece.size > 0 and piece.physical + piece.size <= _PHYSICAL_END:
            yield piece


class _Words:
    """The kernel's variables, as far as there are symbols for them and the dump holds them."""

    def __init__(self, memory: Memory, symbols: SymbolTable, size: int) -> None:
        self.memory, self.symbols, self.size = memory, symbols, size

    def at(self, address: int) -> int | None:
        """The little-endian word at `address`."""
        try:
            return int.from_bytes(self.memory.read(address, self.size), "little")
        except FaultError:
            return None

    def get(self, name: str) -> int | None:
        """The value of the variable `name`."""
        symbol = self.symbols.get(name)
        return None if symbol is None else self.at(symbol.address)


def _of_intel(words: _Words, base: int) -> Iterator[Linear]:
    """The static kernel, up to where free memory began; and the physmap, up to its end."""
    for name in ("_first_avail", "_avail_start"):
        end = words.get(name)
        if end:  # first_avail has been a physical address and a kernel's
            top = end - base if end >= base else end
            yield Linear(base + _LOW, top - _LOW, _LOW, f"static kernel, up to {name}")
            break
    first, last = words.get("_physmap_base"), words.get("_physmap_max")
    if first and last and last > first:
        yield Linear(first, last - first, 0, "_physmap_base")


def _of_arm(words: _Words) -> Iterator[Linear]:
    """The pieces of ptov_table, and the static kernel where these leave physical memory out."""
    mapped = sorted(_ptov_table(words), key=lambda piece: piece.physical)
    table, top = words.get("_cpu_tte"), words.get("_cpu_ttep")
    if table and top:
        size = next((size for size in _PAGES if (table | top) % size == 0), 0)
        yield Linear(table, size, top, "_cpu_tte")
    yield from mapped
    virtual, first = words.get("_gVirtBase"), words.get("_gPhysBase")
    length = words.get("_gPhysSize")
    if not virtual or first is None or not length:
        return
    at, end = first, first + length
    for piece in mapped:
        start = min(piece.physical, end)
        yield Linear(virtual + at - first, start - at, at, "_gVirtBase")
        at = max(at, piece.physical + piece.size)
    yield Linear(virtual + at - first, end - at, at, "_gVirtBase")


def _ptov_table(words: _Words) -> Iterator[Linear]:
    """Entries {pa, va, len}, the unused ones zero."""
    symbol = words.symbols.get("_ptov_table")
    for slot in range(_PTOV_SLOTS if symbol is not None else 0):
        at = symbol.address + slot * 24 if symbol is not None else 0
        physical, start, size = (words.at(at + offset) for offset in (0, 8, 16))
        if physical is not None and start and size:
            yield Linear(start, size, physical, "_ptov_table")
