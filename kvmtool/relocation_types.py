"""The kinds of relocation entry, and what each makes of the number that stands in the file.

An image is loaded as a whole, one slide away from where it was linked. What links two places
inside it is right already; only absolute addresses and references to another image change.

Sources: mach-o/reloc.h and its i386, x86_64, arm64 and ppc twins for the entries; how they are
computed, libkern/kxld/kxld_reloc.c (xnu-1504..6153) and the linker kld was made of, cctools
ld/generic_reloc.c and ppc_reloc.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmtool import macho

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# mach-o/reloc.h
R_SCATTERED, R_ABS = 0x80000000, 0
GENERIC_VANILLA, GENERIC_PAIR, GENERIC_SECTDIFF, GENERIC_LOCAL_SECTDIFF = 0, 1, 2, 4
# mach-o/x86_64/reloc.h
X86_64_UNSIGNED, X86_64_SIGNED, X86_64_BRANCH, X86_64_GOT_LOAD, X86_64_GOT = range(5)
X86_64_SUBTRACTOR, X86_64_SIGNED_1, X86_64_SIGNED_2, X86_64_SIGNED_4 = range(5, 9)
# mach-o/arm64/reloc.h
ARM64_UNSIGNED, ARM64_SUBTRACTOR, ARM64_BRANCH26 = range(3)
# mach-o/ppc/reloc.h
PPC_VANILLA, PPC_PAIR, PPC_BR24, PPC_HI16, PPC_LO16, PPC_HA16, PPC_LO14 = 0, 1, 3, 4, 5, 6, 7
PPC_SECTDIFF, PPC_HI16_SECTDIFF, PPC_LO16_SECTDIFF, PPC_HA16_SECTDIFF = 8, 10, 11, 12
PPC_JBSR, PPC_LO14_SECTDIFF, PPC_LOCAL_SECTDIFF = 13, 14, 15

_GENERIC_DIFFERENCES = (GENERIC_SECTDIFF, GENERIC_LOCAL_SECTDIFF)
_X86_64_GOT = (X86_64_GOT_LOAD, X86_64_GOT)
_PPC_HALVES = (PPC_HI16, PPC_LO16, PPC_HA16, PPC_LO14)
_PPC_DIFFERENCES = (
    *(PPC_SECTDIFF, PPC_HI16_SECTDIFF, PPC_LO16_SECTDIFF, PPC_HA16_SECTDIFF),
    *(PPC_LO14_SECTDIFF, PPC_LOCAL_SECTDIFF),
)


class Entry(NamedTuple):
    """One entry. `address` is where it was linked (of a PAIR, r_address as it stands), in bytes.

    `target` is a symbol's index if `extern`, an address if `scattered`, else a section's number.
    """

    address: int
    size: int
    type: int
    pcrel: bool
    extern: bool
    scattered: bool
    target: int
    pair: Entry | None


class Load(Protocol):
    """One image at one place: `slide` is in bytes."""

    slide: int

    def base(self, entry: Entry) -> int | None:
        """What the target adds: a symbol's address, or how far a section moves; None: unknown."""
        ...

    def start_of_section(self, entry: Entry) -> int:
        """Where the section that a local entry names was linked."""
        ...

    def got_slot(self, entry: Entry) -> int | None:
        """Where the slot of the entry's symbol lies once loaded, if one had to be made."""
        ...

    def displacement(self, entry: Entry, value: int, bits: int) -> int:
        """`value` if so many bits, signed, hold it; raises `MismatchError`."""
        ...


class Machine(NamedTuple):
    """What the entries of one processor may say.

    `sizes` are bytes; `pairs` maps a type to that of the entry which must follow it; `got` are the
    types that mean a slot of the global offset table. `rewrite` makes the loaded number of the one
    in the file; None leaves the file's bytes.
    """

    sizes: tuple[int, ...]
    types: frozenset[int]
    pairs: Mapping[int, int]
    scattered: bool
    got: tuple[int, ...]
    rewrite: Callable[[Load, Entry, int], int | None]


def _signed(value: int, bits: int) -> int:
    sign = 1 << (bits - 1)
    return ((value & ((1 << bits) - 1)) ^ sign) - sign


def _generic(load: Load, entry: Entry, stored: int) -> int | None:
    base = load.base(entry)
    if base is None or entry.type in _GENERIC_DIFFERENCES:
        return None
    return stored + base - (load.slide if entry.pcrel else 0)


def _difference(load: Load, entry: Entry, stored: int) -> int | None:
    """SUBTRACTOR: its target is taken away from that of the UNSIGNED after it."""
    assert entry.pair is not None
    minus, plus = load.base(entry), load.base(entry.pair)
    return None if minus is None or plus is None else stored + plus - minus


def _x86_64(load: Load, entry: Entry, stored: int) -> int | None:
    if entry.type == X86_64_SUBTRACTOR:
        return _difference(load, entry, stored)
    base = load.base(entry)
    if base is None or entry.type == X86_64_UNSIGNED:
        return None if base is None else stored + base
    if not entry.extern:  # a displacement inside the image is right already
        return None
    if entry.type in _X86_64_GOT:
        base = load.got_slot(entry)
        if base is None:
            return None
    # what follows the four bytes (SIGNED_1, _2, _4) is part of the addend: mach-o/x86_64/reloc.h
    away = _signed(stored, 32) + base - (entry.address + load.slide + entry.size)
    return load.displacement(entry, away, 32)


def _arm64(load: Load, entry: Entry, stored: int) -> int | None:
    if entry.type == ARM64_SUBTRACTOR:
        return _difference(load, entry, stored)
    base = load.base(entry)
    if base is None or entry.type == ARM64_UNSIGNED:
        return None if base is None else stored + base
    if not entry.extern:
        return None
    away = _signed(stored << 2, 28) + base - (entry.address + load.slide)
    return (stored & 0xFC000000) | (load.displacement(entry, away, 28) >> 2 & 0x03FFFFFF)


def _ppc(load: Load, entry: Entry, stored: int) -> int | None:
    base = load.base(entry)
    if base is None or entry.type in _PPC_DIFFERENCES:
        return None
    moved = base - (load.slide if entry.pcrel else 0)
    if entry.type == PPC_VANILLA:
        return stored + moved
    if entry.type == PPC_BR24:
        away = load.displacement(entry, _signed(stored & 0x03FFFFFC, 26) + moved, 26)
        return (stored & 0xFC000003) | (away & 0x03FFFFFC)
    if entry.type == PPC_JBSR:
        return _ppc_jbsr(load, entry, stored, base)
    return _ppc_half(entry, stored, moved)


def _ppc_half(entry: Entry, stored: int, moved: int) -> int:
    """One half of an address, the other of which stands in the PAIR's r_address."""
    assert entry.pair is not None
    half, other = stored & 0xFFFF, entry.pair.address & 0xFFFF
    if entry.type == PPC_HI16:
        half = ((half << 16 | other) + moved) >> 16
    elif entry.type == PPC_HA16:  # the low half will be added as a signed number
        half = ((half << 16) + _signed(other, 16) + moved + 0x8000) >> 16
    elif entry.type == PPC_LO16:
        half += moved
    else:  # LO14: the last two bits belong to the instruction
        half = ((half & 0xFFFC) + moved) & 0xFFFC | (half & 3)
    return (stored & 0xFFFF0000) | (half & 0xFFFF)


def _ppc_jbsr(load: Load, entry: Entry, stored: int, base: int) -> int | None:
    """A branch to an island, sent straight to its target where that is near enough.

    The target is the symbol, or the section's start, plus the PAIR's r_address.
    """
    assert entry.pair is not None
    to = base + entry.pair.address + (0 if entry.extern else load.start_of_section(entry))
    away = to - (entry.address + load.slide)
    return None if abs(away) > 0x01FFFFFF else (stored & 0xFC000003) | (away & 0x03FFFFFC)


MACHINES = {
    macho.CPU_TYPE_I386: Machine(
        sizes=(4,),
        types=frozenset((GENERIC_VANILLA, *_GENERIC_DIFFERENCES)),
        pairs=dict.fromkeys(_GENERIC_DIFFERENCES, GENERIC_PAIR),
        scattered=True,
        got=(),
        rewrite=_generic,
    ),
    macho.CPU_TYPE_X86_64: Machine(
        sizes=(4, 8),
        types=frozenset(range(X86_64_UNSIGNED, X86_64_SIGNED_4 + 1)),
        pairs={X86_64_SUBTRACTOR: X86_64_UNSIGNED},
        scattered=False,
        got=_X86_64_GOT,
        rewrite=_x86_64,
    ),
    macho.CPU_TYPE_ARM64: Machine(
        sizes=(4, 8),
        types=frozenset((ARM64_UNSIGNED, ARM64_SUBTRACTOR, ARM64_BRANCH26)),
        pairs={ARM64_SUBTRACTOR: ARM64_UNSIGNED},
        scattered=False,
        got=(),
        rewrite=_arm64,
    ),
    macho.CPU_TYPE_POWERPC: Machine(
        sizes=(4,),
        types=frozenset((PPC_VANILLA, PPC_BR24, PPC_JBSR, *_PPC_HALVES, *_PPC_DIFFERENCES)),
        pairs=dict.fromkeys((PPC_JBSR, *_PPC_HALVES, *_PPC_DIFFERENCES), PPC_PAIR),
        scattered=True,
        got=(),
        rewrite=_ppc,
    ),
}
