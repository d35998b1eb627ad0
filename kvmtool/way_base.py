"""Where raw memory begins: the physical address of the first byte of a file that does not say it.

It is taken for 0, which is right on Intel. On arm64 memory begins where the processor's maker put
it, and until that is known every physical address is an offset in the file. Two things tell: the
kernel's own variables, and its page tables, for they name each other by physical addresses while
their offsets are there to be seen. Both only propose; what is proposed has to lead through the
page tables to the kernel's header and banner, as everything else.

Source: osfmk/arm64/arm_vm_init.c (gPhysBase, gVirtBase), xnu-4903..11417; Arm ARM D8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool import way_scan
from kvmtool.arch.arm64_pages import ACCESSED, KERNEL_MODES, mode_name
from kvmtool.arch.pages import PAGE, TABLE
from kvmtool.errors import FaultError
from kvmtool.way_places import MASK
from kvmtool.way_roots import Root, walker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.arch.walker import Walker
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.way_places import Place
    from kvmtool.way_scan import Progress

_ADDRESS_BITS = 48  # of what an entry of these tables can name
_PAGE = 4096
_CANDIDATES = 1 << 20  # that are kept of one level; a memory has fewer tables

Tables = dict[int, list[int]]  # physical address of a table -> where memory begins, if it is there


def of_variables(memory: Memory, place: Place, symbols: SymbolTable) -> int | None:
    """By gVirtBase and gPhysBase: the static kernel lies as far from the one as from the other.

    `memory` is that of the static kernel, at kernel addresses. None where they do not tell.
    """
    values = []
    for name in ("_gVirtBase", "_gPhysBase"):
        symbol = symbols.get(name)
        if symbol is None:
            return None
        try:
            values.append(int.from_bytes(memory.read(symbol.address, 8), "little"))
        except FaultError:
            return None
    base = (place.address - values[0] + values[1] - place.physical) & MASK
    return base if _plausible(base, _PAGE) else None


def searched(
    physical: Memory, place: Place, progress: Progress | None
) -> Iterator[tuple[int, Root]]:
    """(where memory begins, root) by tables that map the place, from the last level up.

    The entry for its page gives the page's address, and with it where memory begins; a table above
    must hold this table's address. Which a pass finds: levels that modes share are passed once.
    Tables with more in them come first: those of the boot are still there, and map the kernel too.
    """
    levels: dict[tuple[object, ...], Tables] = {}
    for granule, size in KERNEL_MODES:
        mode = mode_name(granule, size)
        model = walker(physical, mode, 0)
        if not model.holds(place.address):
            continue
        found: Tables = {}
        for depth in range(len(model.levels) - 1, -1, -1):
            key = (granule, *model.levels[depth:])
            if key not in levels:
                levels[key] = _level(physical, model, depth, found, place, progress)
            found = levels[key]
        roots = [(base, table) for table, bases in found.items() for base in bases]
        for base, table in sorted(roots, key=lambda root: -_filled(physical, model, *root)):
            yield base, Root(table, (mode,), f"search for page tables, found at {table:#x}")


def _filled(physical: Memory, model: Walker, base: int, root: int) -> int:
    """How many entries of a root lead somewhere."""
    try:
        entries = physical.read(root - base, model.entry_size << model.levels[0].bits)
    except FaultError:
        return 0
    return sum(entry & 1 for entry in entries[:: model.entry_size])


def _level(
    physical: Memory,
    model: Walker,
    depth: int,
    below: Tables,
    place: Place,
    progress: Progress | None,
) -> Tables:
    """The tables at `depth` that map the place themselves, or lead to one of `below` that does."""
    found: Tables = {}
    last = depth == len(model.levels) - 1
    maps = last or (depth > 0 and model.decode(depth, 1)[0] == PAGE)
    if not maps and not below:
        return found
    count = 0
    for table, entry in _entries(physical, model, depth, place.address, progress):
        outcome, target = model.decode(depth, entry)
        bases: list[int] = []
        if outcome == TABLE:
            bases = below.get(target, [])
        elif outcome == PAGE and maps and entry & ACCESSED:
            span = 1 << model.levels[depth].shift
            base = target + (place.address & span - 1) - place.physical
            if _plausible(base, model.page_size) and (
                not last or _goes_on(physical, model, table, place.address, target)
            ):
                bases = [base]
        for base in bases:
            # of a table that is reached, its own address is known only through where memory begins
            if base + table < 1 << _ADDRESS_BITS and count < _CANDIDATES:
                found.setdefault(base + table, []).append(base)
                count += 1
    return found


def _entries(
    physical: Memory, model: Walker, depth: int, address: int, progress: Progress | None
) -> Iterator[tuple[int, int]]:
    """(offset of a table, its entry for `address`) for all pages that may be one."""
    level = model.levels[depth]
    inside = (address >> level.shift & (1 << level.bits) - 1) * model.entry_size
    align = max(_PAGE, model.entry_size << level.bits)
    valid = 3 if depth == len(model.levels) - 1 else 1
    for first, words in way_scan.column(physical, inside % _PAGE, _PAGE, progress):
        for number in [number for number, entry in enumerate(words) if entry & valid == valid]:
            table = first + number * _PAGE - inside
            if table >= 0 and table % align == 0:
                yield table, words[number]


def _goes_on(physical: Memory, model: Walker, table: int, address: int, target: int) -> bool:
    """Whether the next page is mapped behind this one, as a kernel's are; True at a table's end."""
    level = model.levels[-1]
    following = (address >> level.shift & (1 << level.bits) - 1) + 1
    if following == 1 << level.bits:
        return True
    try:
        data = physical.read(table + following * model.entry_size, model.entry_size)
    except FaultError:
        return False
    entry = int.from_bytes(data, "little")
    return model.decode(len(model.levels) - 1, entry) == (PAGE, target + model.page_size)


def _plausible(base: int, page: int) -> bool:
    return 0 < base < 1 << _ADDRESS_BITS and base % page == 0
