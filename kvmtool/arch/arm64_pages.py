"""Page tables of arm64, with a granule of 4 KiB or 16 KiB.

Source: Arm ARM D8 (VMSAv8-64); osfmk/arm64/proc_reg.h, xnu-4903 and xnu-11417 (ARM_PTE_COMPRESSED).
The permissions are those the architecture gives the bits: Apple's processors read the same bits
through a table of their own (SPRR), so that what is called writable there may not be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.arch.pages import (
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
from kvmtool.errors import UnsupportedError

if TYPE_CHECKING:
    from kvmtool.memory import Memory

_VALID, _TABLE = 1 << 0, 1 << 1
_AP_USER, _AP_READ_ONLY, _NG, _PXN, _UXN = 1 << 6, 1 << 7, 1 << 11, 1 << 53, 1 << 54
ACCESSED = 1 << 10  # the access flag: without it the processor faults
_PXN_TABLE, _UXN_TABLE, _AP_TABLE_NO_USER, _AP_TABLE_READ_ONLY = 1 << 59, 1 << 60, 1 << 61, 1 << 62
_COMPRESSED, _COMPRESSED_ALT = 1 << 63, 1 << 62  # in entries that are not valid
_OUTPUT = 0x0000FFFFFFFFFFFF
_TTBR = 0x0000FFFFFFFFFFFE  # without the ASID above and CnP below
_LEAF_FLAGS = (
    (_VALID, "V"),
    (_AP_USER, "USER"),
    (_AP_READ_ONLY, "RO"),
    (ACCESSED, "AF"),
    (_NG, "nG"),
    (_PXN, "PXN"),
    (_UXN, "UXN"),
)
_TABLE_FLAGS = (
    (_VALID, "V"),
    (_TABLE, "TABLE"),
    (_PXN_TABLE, "PXNTable"),
    (_UXN_TABLE, "UXNTable"),
    (_AP_TABLE_NO_USER, "APTable-NoUser"),
    (_AP_TABLE_READ_ONLY, "APTable-RO"),
)

GRANULES = {12: "4K", 14: "16K"}

# (granule's bits, T1SZ) that XNU has used for the kernel: proc_reg.h and pmap init, xnu-4903..11417
KERNEL_MODES = ((14, 17), (14, 25), (12, 25), (12, 26), (14, 16), (12, 16), (14, 28))


def mode_name(granule: int, size: int) -> str:
    """How a granule (its bits) and a T1SZ are called: "arm64 16K T1SZ 17"."""
    return f"arm64 {GRANULES[granule]} T1SZ {size}"


def mode_of(name: str) -> tuple[int, int]:
    """The granule's bits and T1SZ of a `mode_name`. Raises `UnsupportedError`."""
    for granule, text in GRANULES.items():
        start = f"arm64 {text} T1SZ "
        if name.startswith(start) and name[len(start) :].isdigit():
            return granule, int(name[len(start) :])
    raise UnsupportedError(f"{name} is no paging mode of arm64")


def kernel_size(tcr: int) -> tuple[int, int]:
    """The granule's bits and T1SZ in a TCR_EL1. Raises `UnsupportedError` for a 64K granule."""
    granule = {1: 14, 2: 12}.get(tcr >> 30 & 3)
    if granule is None:
        raise UnsupportedError(f"TCR_EL1 {tcr:#x}: TG1 is {tcr >> 30 & 3}, expected 1 or 2")
    return granule, tcr >> 16 & 63


class Arm64(Walker):
    """The tables of one TTBR: the kernel's (TTBR1), or a process's (TTBR0)."""

    keep = 3 | _AP_USER | _AP_READ_ONLY | _PXN | _UXN | _COMPRESSED | _COMPRESSED_ALT

    def __init__(
        self, physical: Memory, root: int, granule: int, size: int, *, user: bool = False
    ) -> None:
        """`root` is the TTBR, `granule` the bits of a page's offset, `size` its T1SZ or T0SZ.

        Raises `UnsupportedError` for a granule or size that these tables cannot have.
        """
        if granule not in GRANULES or not 16 <= size <= 39:
            raise UnsupportedError(f"arm64 tables of granule {granule} bits and TxSZ {size}")
        bits = 64 - size
        step = granule - 3
        levels: list[Level] = []
        for number in (3, 2, 1, 0):
            shift = granule + (3 - number) * step
            if shift < bits:
                levels.insert(0, Level(f"L{number}", shift, min(step, bits - shift)))
        self.levels = tuple(levels)
        self.mode = mode_name(granule, size)
        self.user = user
        # all bits above are ones in the kernel's half, zeros in a user's
        self.ranges = ((0, 1 << bits) if user else ((1 << 64) - (1 << bits), 1 << 64),)
        self.frame = _OUTPUT & -(1 << granule)
        self.keep = Arm64.keep | self.frame
        # a block maps 1 GiB or 2 MiB, or 32 MiB with 16K pages
        self._blocks = ("L1", "L2") if granule == 12 else ("L2",)
        super().__init__(physical, root & _TTBR & -(8 << self.levels[0].bits))

    def decode(self, depth: int, entry: int) -> tuple[str, int]:
        """See `Walker.decode`."""
        leaf = depth == len(self.levels) - 1
        if not entry & _VALID:
            return (COMPRESSED if leaf and entry & _COMPRESSED else UNMAPPED), 0
        if entry & _TABLE:
            return (PAGE if leaf else TABLE), entry & self.frame
        level = self.levels[depth]
        if level.name not in self._blocks:
            return MALFORMED, 0
        return PAGE, entry & _OUTPUT & -(1 << level.shift)

    def rights(self, depth: int, entry: int) -> int:
        """See `Walker.rights`; execution is the kernel's in its half, the user's in the other."""
        if depth < len(self.levels) - 1 and entry & _TABLE:
            no_execute = _UXN_TABLE if self.user else _PXN_TABLE
            return (
                (0 if entry & _AP_TABLE_READ_ONLY else WRITE)
                | (0 if entry & _AP_TABLE_NO_USER else USER)
                | (0 if entry & no_execute else EXECUTE)
            )
        return (
            (0 if entry & _AP_READ_ONLY else WRITE)
            | (USER if entry & _AP_USER else 0)
            | (0 if entry & (_UXN if self.user else _PXN) else EXECUTE)
        )

    def flags(self, depth: int, entry: int) -> str:
        """See `Walker.flags`."""
        leaf = depth == len(self.levels) - 1
        table = not leaf and entry & _TABLE
        words = [name for bit, name in (_TABLE_FLAGS if table else _LEAF_FLAGS) if entry & bit]
        if leaf and not entry & _VALID and entry & _COMPRESSED:
            return "COMPRESSED"
        if not leaf and entry & _VALID and not entry & _TABLE:
            words.append("BLOCK")
        return " ".join(words)
