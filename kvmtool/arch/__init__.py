"""What differs between processors: word size, pages, registers, pointer bits.

One file per family holds the constants; `arch_for` chooses by Mach-O cputype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable


class Flavor(NamedTuple):
    """A register set of LC_THREAD: its name, and (name, size in bytes) of each register."""

    name: str
    registers: tuple[tuple[str, int], ...]


class Arch(NamedTuple):
    """A processor as seen from its memory.

    `pointer_size` and `page_size` are bytes; `byteorder` is a struct prefix; `flavors` maps
    LC_THREAD flavor numbers; `pc`, `sp`, `fp` name registers; `strip(pointer, bits)` takes the tag
    and signature off a kernel pointer when the kernel's addresses have `bits` bits.
    """

    name: str
    layouts: str
    pointer_size: int
    byteorder: str
    page_size: int
    flavors: dict[int, Flavor]
    pc: str
    sp: str
    fp: str
    strip: Callable[[int, int], int]

    def registers(self, flavor: int, data: bytes) -> dict[str, int]:
        """The registers of one thread state by name; empty for an unknown flavor."""
        known = self.flavors.get(flavor)
        values: dict[str, int] = {}
        at = 0
        order = "little" if self.byteorder == "<" else "big"
        for name, size in known.registers if known else ():
            if at + size > len(data):
                break
            values[name] = int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]
            at += size
        return values


def arch_for(cputype: int, cpusubtype: int = 0) -> Arch:
    """The machine of a Mach-O file. Raises `UnsupportedError` for one no XNU ran on."""
    if cputype in (macho.CPU_TYPE_I386, macho.CPU_TYPE_X86_64):
        from kvmtool.arch import x86

        return x86.I386 if cputype == macho.CPU_TYPE_I386 else x86.X86_64
    if cputype in (macho.CPU_TYPE_ARM64, macho.CPU_TYPE_ARM):
        from kvmtool.arch import arm64

        if cputype == macho.CPU_TYPE_ARM:
            return arm64.ARM
        return arm64.ARM64E if cpusubtype & 0xFFFFFF == macho.CPU_SUBTYPE_ARM64E else arm64.ARM64
    if cputype in (macho.CPU_TYPE_POWERPC, macho.CPU_TYPE_POWERPC64):
        from kvmtool.arch import ppc

        return ppc.PPC if cputype == macho.CPU_TYPE_POWERPC else ppc.PPC64
    raise UnsupportedError(f"cputype {cputype:#x} is no machine that XNU runs on")


def whole(pointer: int, bits: int) -> int:
    """A pointer of a machine that keeps nothing but an address in it."""
    return pointer
