"""Page tables of i386 and x86_64.

Source: Intel SDM volume 3A chapter 4 (paging); osfmk/i386/pmap.h, xnu-2422 and xnu-7195 (which bits
XNU uses in entries that are not present).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.arch.pages import (
    ALL_RIGHTS,
    COMPRESSED,
    EXECUTE,
    MALFORMED,
    PAGE,
    TABLE,
    UNMAPPED,
    USER,
    WRITE,
    Level,
)
from kvmtool.arch.walker import Walker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtool.memory import Memory

_P, _RW, _US, _PS, _NX = 1 << 0, 1 << 1, 1 << 2, 1 << 7, 1 << 63
_COMPRESSED = 1 << 62  # INTEL_PTE_COMPRESSED, in entries that are not present (xnu-2422)
_FRAME = 0x000FFFFFFFFFF000
_FLAGS = (
    (0, "P"),
    (1, "RW"),
    (2, "US"),
    (3, "PWT"),
    (4, "PCD"),
    (5, "A"),
    (6, "D"),
    (7, "PS"),
    (8, "G"),
    (63, "NX"),
)
# Of PAE: no rights, no page (SDM table 4-8). Bit 5 is reserved there, too, but QEMU's emulated
# processor sets it as the accessed bit it is everywhere else.
_PDPTE_RESERVED = 0xFFF00000000001C6

_LONG_MODE = (Level("PML4", 39, 9), Level("PDPT", 30, 9), Level("PD", 21, 9), Level("PT", 12, 9))

CR0_PG, CR4_PAE, CR4_LA57, EFER_LMA = 1 << 31, 1 << 5, 1 << 12, 1 << 10


def _flags(entry: int, leaf: bool) -> str:
    words = [name for bit, name in _FLAGS if entry >> bit & 1]
    if leaf and "PS" in words:
        words[words.index("PS")] = "PAT"  # in an entry of a page table bit 7 is that
    if leaf and not entry & _P and entry & _COMPRESSED:
        words.append("COMPRESSED")
    return " ".join(words)


class LongMode(Walker):
    """IA-32e paging: four levels, or five with CR4.LA57. `mode` is "4-level" or "5-level"."""

    frame = _FRAME
    keep = _P | _RW | _US | _COMPRESSED | _NX | _FRAME
    levels: tuple[Level, ...] = _LONG_MODE
    ranges: tuple[tuple[int, int], ...] = ((0, 1 << 47), ((1 << 64) - (1 << 47), 1 << 64))
    mode = "4-level"

    def __init__(self, physical: Memory, root: int) -> None:
        """`root` is CR3: the PCID and cache bits in it are taken off."""
        super().__init__(physical, root & _FRAME)

    def decode(self, depth: int, entry: int) -> tuple[str, int]:
        """See `Walker.decode`."""
        left = len(self.levels) - 1 - depth
        if not entry & _P:
            return (COMPRESSED if left == 0 and entry & _COMPRESSED else UNMAPPED), 0
        if left == 0:
            return PAGE, entry & _FRAME
        if not entry & _PS:
            return TABLE, entry & _FRAME
        span = 1 << self.levels[depth].shift
        # bit 12 is PAT; the bits below the page's own must be zero, and no level above may map
        if left > 2 or entry & _FRAME & (span - 1) & ~(1 << 12):
            return MALFORMED, 0
        return PAGE, entry & _FRAME & -span

    def rights(self, depth: int, entry: int) -> int:
        """See `Walker.rights`."""
        return (
            (WRITE if entry & _RW else 0)
            | (USER if entry & _US else 0)
            | (0 if entry & _NX else EXECUTE)
        )

    def flags(self, depth: int, entry: int) -> str:
        """See `Walker.flags`."""
        return _flags(entry, depth == len(self.levels) - 1)


class LongMode5(LongMode):
    """IA-32e paging with CR4.LA57."""

    levels = (Level("PML5", 48, 9), *_LONG_MODE)
    ranges = ((0, 1 << 56), ((1 << 64) - (1 << 56), 1 << 64))
    mode = "5-level"


class Pae(LongMode):
    """PAE paging of 32-bit kernels: three levels, the top one of four entries."""

    levels = (Level("PDPT", 30, 2), *_LONG_MODE[2:])
    ranges = ((0, 1 << 32),)
    mode = "PAE"

    def __init__(self, physical: Memory, root: int) -> None:
        """`root` is CR3: a table of 32 bytes, aligned to 32."""
        super().__init__(physical, 0)
        self.root = root & 0xFFFFFFE0

    def decode(self, depth: int, entry: int) -> tuple[str, int]:
        """See `Walker.decode`."""
        if depth == 0 and entry & _P:
            return (MALFORMED, 0) if entry & _PDPTE_RESERVED else (TABLE, entry & _FRAME)
        return super().decode(depth, entry)

    def rights(self, depth: int, entry: int) -> int:
        """See `Walker.rights`; the top level has none to give or take."""
        return ALL_RIGHTS if depth == 0 else super().rights(depth, entry)


class TwoLevel(Walker):
    """32-bit paging without PAE, pages of 4 KiB and (PSE, PSE-36) 4 MiB."""

    levels = (Level("PD", 22, 10), Level("PT", 12, 10))
    ranges = ((0, 1 << 32),)
    mode = "2-level"
    entry_size = 4
    frame = 0xFFFFF000
    keep = _P | _RW | _US | 0xFFFFF000

    def __init__(self, physical: Memory, root: int) -> None:
        """`root` is CR3."""
        super().__init__(physical, root & 0xFFFFF000)

    def decode(self, depth: int, entry: int) -> tuple[str, int]:
        """See `Walker.decode`."""
        if not entry & _P:
            return UNMAPPED, 0
        if depth == 1:
            return PAGE, entry & 0xFFFFF000
        if not entry & _PS:
            return TABLE, entry & 0xFFFFF000
        if entry & 1 << 21:
            return MALFORMED, 0
        high = (entry >> 13 & 0xFF) << 32  # PSE-36
        return PAGE, high | entry & 0xFFC00000

    def rights(self, depth: int, entry: int) -> int:
        """See `Walker.rights`; every page can be executed."""
        return EXECUTE | (WRITE if entry & _RW else 0) | (USER if entry & _US else 0)

    def flags(self, depth: int, entry: int) -> str:
        """See `Walker.flags`."""
        return _flags(entry, depth == 1)


WALKERS: dict[str, type[Walker]] = {
    walker.mode: walker for walker in (LongMode, LongMode5, Pae, TwoLevel)
}


def modes_of(registers: Mapping[str, int]) -> tuple[str, ...]:
    """The paging modes that control registers leave open, likeliest first; none: paging is off.

    `registers` holds cr0, cr4 and, where the container knows it, efer.
    """
    if not registers.get("cr0", CR0_PG) & CR0_PG:
        return ()
    if "cr4" not in registers:
        return tuple(WALKERS)
    cr4 = registers["cr4"]
    if not cr4 & CR4_PAE:
        return (TwoLevel.mode,)
    long_mode = LongMode5.mode if cr4 & CR4_LA57 else LongMode.mode
    if "efer" in registers:
        return (long_mode if registers["efer"] & EFER_LMA else Pae.mode,)
    return long_mode, Pae.mode
