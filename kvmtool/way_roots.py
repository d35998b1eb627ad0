"""What may be the top of the kernel's page table: candidates, to be verified by whoever asks.

Source: osfmk/i386/pmap.h and i386_init.c, idle_pt.c, osfmk/arm64/pmap.c, xnu-792..11417; Intel SDM
volume 3A, 2.5 (control registers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool import way_scan
from kvmtool.arch import arm64_pages, x86_pages
from kvmtool.arch.pages import TABLE
from kvmtool.errors import FaultError, UnsupportedError
from kvmtool.way_places import ARM64, I386, X86_64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmtool.arch.walker import Walker
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.way_places import Machine, Place
    from kvmtool.way_scan import Progress

_PAGE = 4096
_PDPT_SIZE = 32
_FRAMES = 0x0000FFFFFFFFF000
_PMAP_SIZE = 512  # bytes; struct pmap has 64 (10.4) to about 400
_SLOT = (1 << 39) - 1  # what one entry of a PML4 maps
_ARM64_MODES = tuple(arm64_pages.mode_name(*mode) for mode in arm64_pages.KERNEL_MODES)
_KERNEL_ALONE = 256  # entries of a PML4 that a kernel's own leaves empty: the user's half


class Root(NamedTuple):
    """A page table at physical address `address`, of one of `modes`; `how` says who names it."""

    address: int
    modes: tuple[str, ...]
    how: str


def walker(physical: Memory, mode: str, root: int) -> Walker:
    """The walker of a paging mode. Raises `UnsupportedError` for a mode there is not."""
    if mode in x86_pages.WALKERS:
        return x86_pages.WALKERS[mode](physical, root)
    return arm64_pages.Arm64(physical, root, *arm64_pages.mode_of(mode))


def of_process(physical: Memory, mode: str, root: int) -> Iterator[Walker]:
    """The walkers that a process's table at `root` may need under a kernel of that mode.

    The kernel's own kind first. On arm64 a process has the lower half, under TTBR0.
    """
    if mode in x86_pages.WALKERS:
        for kind in dict.fromkeys((mode, *x86_pages.WALKERS)):
            yield x86_pages.WALKERS[kind](physical, root)
        return
    for granule, size in dict.fromkeys((arm64_pages.mode_of(mode), *arm64_pages.KERNEL_MODES)):
        yield arm64_pages.Arm64(physical, root, granule, size, user=True)


def of_registers(registers: Mapping[str, int]) -> Iterator[Root]:
    """By the control registers of one CPU."""
    if "cr3" in registers:
        yield Root(registers["cr3"], x86_pages.modes_of(registers), "CR3")
    if "TTBR1_EL1" in registers:
        modes = _ARM64_MODES
        if "TCR_EL1" in registers:
            modes = (arm64_pages.mode_name(*arm64_pages.kernel_size(registers["TCR_EL1"])),)
        yield Root(registers["TTBR1_EL1"], modes, "TTBR1_EL1")


def of_symbols(
    memory: Memory, to_physical: Callable[[int], int], machine: Machine, symbols: SymbolTable
) -> Iterator[Root]:
    """By the kernel's own variables, read from `memory` (kernel addresses)."""
    for name, mode in machine.roots:
        symbol = symbols.get(name)
        if symbol is None:
            continue
        value = _word(memory, symbol.address, 4 if machine is I386 else 8)
        if machine is ARM64:
            if value:
                yield Root(value, _ARM64_MODES, f"the variable {name}")
            continue
        size = _PDPT_SIZE if mode == x86_pages.Pae.mode else _PAGE
        # a variable that points to the table, in some releases; in others the table itself
        for address, how in ((value, f"the pointer {name}"), (symbol.address, f"the table {name}")):
            if address and address % size == 0:
                try:
                    yield Root(to_physical(address), (mode,), how)
                except FaultError:
                    continue
    yield from _of_pmap(memory, machine, symbols)


def _of_pmap(memory: Memory, machine: Machine, symbols: SymbolTable) -> Iterator[Root]:
    """By whatever in the kernel's pmap may be its pm_cr3 or ttep: it moves between releases."""
    store = symbols.get("_kernel_pmap_store")
    if store is None:
        return
    size = 4 if machine is I386 else 8
    modes = _ARM64_MODES if machine is ARM64 else tuple(mode for _, mode in machine.roots)
    align = _PDPT_SIZE if machine is I386 else _PAGE
    for offset in range(0, _PMAP_SIZE, size):
        value = _word(memory, store.address + offset, size)
        if value and value % align == 0 and value >> 52 == 0:
            yield Root(value, modes, f"the word at _kernel_pmap_store+{offset:#x}")


def _word(memory: Memory, address: int, size: int) -> int:
    try:
        return int.from_bytes(memory.read(address, size), "little")
    except FaultError:
        return 0


def static_address(machine: Machine, delta: int) -> Callable[[int], int]:
    """From a kernel address to a physical one while there is no page table."""
    if machine is X86_64:
        return lambda address: address & _SLOT  # the kernel's slot, and as well the physmap's
    return lambda address: address - delta


def searched(physical: Memory, place: Place, progress: Progress | None) -> Iterator[Root]:
    """By a search for tables that map a place; those of the kernel before those of processes."""
    end = max((region.start + region.size for region in physical.regions()), default=0)
    found: list[tuple[int, int, Root]] = []
    for mode in _modes(place.machine):
        try:
            model = walker(physical, mode, 0)
        except UnsupportedError:
            continue
        if not model.holds(place.address):
            continue
        for root in _entries(physical, model, place.address, end, progress):
            candidate = walker(physical, mode, root)
            if candidate.lookup(place.address)[0] != place.physical:
                continue
            others = _user_entries(physical, place.machine, root)
            if others is not None:
                how = f"search for a page table, found at {root:#x}"
                found.append((others, root, Root(root, (mode,), how)))
    yield from (root for _, _, root in sorted(found, key=lambda item: item[:2]))


def _modes(machine: Machine) -> tuple[str, ...]:
    return _ARM64_MODES if machine is ARM64 else tuple(mode for _, mode in machine.roots)


def _entries(
    physical: Memory, model: Walker, address: int, end: int, progress: Progress | None
) -> Iterator[int]:
    """Addresses of tables whose entry for `address` may lead on."""
    if model.entry_size != 8:
        return  # no Mac had tables of that kind
    level = model.levels[0]
    index = address >> level.shift & (1 << level.bits) - 1
    # a PDPT of PAE is 32 bytes anywhere; other tables fill pages, so their entry is in one column
    step = _PDPT_SIZE if model.mode == x86_pages.Pae.mode else _PAGE
    align = max(step, 8 << level.bits) if step == _PAGE else step
    valid = 1 | _FRAMES & -(1 << end.bit_length())  # no table lies above the end of memory
    for first, words in way_scan.column(physical, index * 8 % step, step, progress):
        for number in [number for number, entry in enumerate(words) if entry & valid == 1]:
            root = first + number * step - index * 8
            outcome, target = model.decode(0, words[number])
            if outcome == TABLE and target < end and root % align == 0:
                yield root


def _user_entries(physical: Memory, machine: Machine, root: int) -> int | None:
    """How many entries a PML4 has for users; None for boot tables, which map more than there is."""
    if machine is not X86_64:
        return 0
    try:
        table = memoryview(physical.read(root, _PAGE)).cast("Q").tolist()
    except FaultError:
        return None
    # BootPML4 has the same table in its first and last entry (idle_pt.c): an identity map
    if table[0] and table[0] & ~0xFFF == table[-1] & ~0xFFF:
        return None
    return sum(1 for entry in table[:_KERNEL_ALONE] if entry)
