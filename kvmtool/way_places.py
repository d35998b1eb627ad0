"""Where a kernel can lie in physical memory.

A `Place` is a pair of addresses, virtual and physical, at which the Mach-O header of one kernel may
be; whoever believes it must find a page table that maps the one to the other.

The static part of a kernel on Intel lies where it was linked, less a constant, also when it is slid
(osfmk/x86_64/idle_pt.c, xnu-1504..11417: VM_MIN_KERNEL_ADDRESS; i386: no difference at all). On
arm64 neither address says anything of the other; there the header itself and the low globals page
hold the virtual one (osfmk/arm64/arm_vm_init.c, xnu-4903..11417).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho, way_scan
from kvmtool.errors import FaultError, FormatError, TruncatedError
from kvmtool.image import LoadedImage
from kvmtool.macho import MachO
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.memory import Memory, Piece, Region
    from kvmtool.way_scan import Progress

MASK = (1 << 64) - 1
_COMMANDS_LIMIT = 1 << 20
HEADER = "kernel header"
STEXT = 0x10  # of lgStext in the low globals page of the 64-bit kernels: lowglobals.h, xnu-2050


class LowGlobals(NamedTuple):
    """The low globals page: how it begins, and the virtual address some kernels also give it."""

    eyecatcher: bytes
    alias: int


class Machine(NamedTuple):
    """What is known of the kernels of one cputype.

    `head` are the first bytes of their header. `base` is the virtual minus the physical address of
    the static kernel, None where that is no constant. `first` is the lowest address of a header,
    further ones follow at
    `step` bytes, `slides` in all. `roots` are the symbols that lead to the
    page table, each with its paging mode.
    """

    cputype: int
    head: bytes
    base: int | None
    first: int
    step: int
    slides: int
    low_globals: tuple[LowGlobals, ...]
    roots: tuple[tuple[str, str], ...]


X86_64 = Machine(
    macho.CPU_TYPE_X86_64,
    b"\xcf\xfa\xed\xfe\x07\0\0\1",
    0xFFFFFF8000000000,
    0xFFFFFF8000200000,
    2 << 20,
    512,  # slides below 1 GiB
    (LowGlobals(b"Catfish ", 0xFFFFFF8000002000),),
    (("_IdlePML4", "4-level"),),
)
I386 = Machine(
    macho.CPU_TYPE_I386,
    b"\xce\xfa\xed\xfe\x07\0\0\0",
    0,
    0,
    4096,
    4096,  # the lowest 16 MiB; never slid
    (LowGlobals(b"Catfish ", 0x2000),),
    (("_IdlePDPT", "PAE"), ("_IdlePML4", "4-level"), ("_IdlePTD", "2-level")),
)
ARM64 = Machine(
    macho.CPU_TYPE_ARM64,
    b"\xcf\xfa\xed\xfe\x0c\0\0\1",
    None,
    0,
    0,
    0,
    tuple(
        LowGlobals(b"Kraken  ", alias)
        for alias in (0xFFFFFE0000004000, 0xFFFFFFF000004000, 0xFFFFFFF000002000)
    ),
    (("_cpu_ttep", ""),),
)
MACHINES = (X86_64, I386, ARM64)


class Place(NamedTuple):
    """A kernel's header may be at `address`, in physical memory at `physical`.

    It is told by `what`, found at physical `at`.
    """

    machine: Machine
    address: int
    physical: int
    what: str
    at: int

    @property
    def how(self) -> str:
        """What tells it, in words."""
        return self.if_from(0)

    def if_from(self, base: int) -> str:
        """The same if memory, taken to begin at 0, begins at `base`."""
        return f"{self.what} at physical {base + self.at:#x}"

    def static(self, physical: Memory) -> Shifted:
        """The static part of the kernel, as it is mapped if this is right."""
        return Shifted(physical, (self.address - self.physical) & MASK)


class Shifted:
    """Physical memory at other addresses: `delta` more than its own. See `Memory`."""

    def __init__(self, physical: Memory, delta: int) -> None:
        self.space = "kernel"
        self._physical, self._delta = physical, delta

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        try:
            return self._physical.read((address - self._delta) & MASK, size)
        except FaultError as fault:
            bad = (fault.address + self._delta) & MASK
            raise FaultError(self.space, bad, size, fault.reason) from None

    def __len__(self) -> int:
        return len(self._physical)

    def check(self, address: int, size: int) -> None:
        """See `Memory.check`."""
        try:
            self._physical.check((address - self._delta) & MASK, size)
        except FaultError as fault:
            bad = (fault.address + self._delta) & MASK
            raise FaultError(self.space, bad, size, fault.reason) from None

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """See `Memory.find`; the addresses are pages apart, so steps go up to a page."""
        for address in self._physical.find(needle, step):
            yield (address + self._delta) & MASK

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """See `RunMemory.stored`; all of it where the memory below cannot tell."""
        parts = getattr(self._physical, "stored", None)
        if parts is None:
            yield start, end
            return
        at = (start - self._delta) & MASK
        for first, last in parts(at, at + end - start):
            yield start + first - at, start + last - at

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`."""
        for piece in self._physical.read_pieces((address - self._delta) & MASK, size):
            yield piece._replace(address=(piece.address + self._delta) & MASK)

    def regions(self) -> Iterator[Region]:
        """See `Memory.regions`."""
        for region in self._physical.regions():
            yield region._replace(start=(region.start + self._delta) & MASK)


def loaded_kernel(memory: Memory, address: int, name: str) -> MachO | None:
    """The kernel whose header is at `address`: MH_EXECUTE with a __KLD segment; else None."""
    try:
        image = MachO(LoadedImage(memory, address, name))
        looks_right = image.filetype == macho.MH_EXECUTE and image.segment("__KLD") is not None
    except (FaultError, FormatError):
        return None
    return image if looks_right else None


def addresses(memory: Memory, machine: Machine, link: int | None) -> Iterator[int]:
    """Where `memory`, mapped as the kernel has it, holds a header; the likeliest first.

    `link` is where the kernel's file puts it: only slides of that are tried.
    """
    for low_globals in machine.low_globals:
        if machine is I386:
            break  # has no lgStext
        stext = _stext(memory, low_globals.alias, low_globals.eyecatcher)
        if stext and _read(memory, stext, 8) == machine.head:
            yield stext
    start = machine.first if link is None else link
    count = 1 if link is not None and machine is I386 else machine.slides
    step = machine.step or 4096  # of a machine without slides nothing but `link` is tried
    end = start + max(count, link is not None) * step
    parts = getattr(memory, "stored", None)
    for first, last in ((start, end),) if parts is None else parts(start, end):
        for address in range(first + (start - first) % step, last, step):
            if _read(memory, address, 8) == machine.head:
                yield address


def _stext(memory: Memory, address: int, eyecatcher: bytes) -> int:
    """The lgStext of the low globals page at `address`, 0 if there is none."""
    if _read(memory, address, 8) != eyecatcher:
        return 0
    return int.from_bytes(_read(memory, address + STEXT, 8), "little")


def _read(memory: Memory, address: int, size: int) -> bytes:
    try:
        return memory.read(address, size)
    except FaultError:
        return b""


def scanned(
    physical: Memory,
    machines: tuple[Machine, ...],
    low_globals_at: int | None,
    link: int | None,
    name: str,
    progress: Progress | None,
) -> Iterator[Place]:
    """Places by kernel headers and low globals pages in all of memory.

    `low_globals_at` and `link` are where the kernel's file has its low globals page and its header.
    """
    heads = {way_scan.word(machine.head): machine for machine in machines}
    eyes = {way_scan.word(m.low_globals[0].eyecatcher): m for m in machines if m is not I386}
    for at, head in way_scan.page_heads(physical, frozenset((*heads, *eyes)), progress):
        if head in eyes:
            place = _by_low_globals(physical, eyes[head], at, low_globals_at, link)
            if place is not None:
                yield place
        if head in heads:
            yield from _by_header(physical, heads[head], at, name)


def _by_low_globals(
    physical: Memory, machine: Machine, at: int, low_globals_at: int | None, link: int | None
) -> Place | None:
    stext = _stext(physical, at, machine.low_globals[0].eyecatcher)
    if low_globals_at is not None and link is not None:
        # 10.6 and 10.7 have no lgStext: there the place of the page tells
        slide = (stext - link if stext else at + (machine.base or 0) - low_globals_at) & MASK
        address, delta = (link + slide) & MASK, (low_globals_at + slide - at) & MASK
    elif stext and machine.base is not None:
        address, delta = stext, machine.base
    else:
        return None
    return Place(machine, address, (address - delta) & MASK, "low globals page", at)


def _by_header(physical: Memory, machine: Machine, at: int, name: str) -> Iterator[Place]:
    # filetype first: programs have headers as well, and begin pages with them
    filetype = _read(physical, at + 12, 4)
    if int.from_bytes(filetype, "little") != macho.MH_EXECUTE:
        return
    try:
        image = MachO(_Header(physical, at, name))
        text, kld = image.segment("__TEXT"), image.segment("__KLD")
    except FormatError:
        return
    if text is None or kld is None:
        return
    if machine.base is not None:
        yield Place(machine, at + machine.base, at, HEADER, at)
    if text.vmaddr != at + (machine.base or 0):  # slid together with the kernel
        yield Place(machine, text.vmaddr, at, HEADER, at)


class _Header:
    """The header and load commands at a physical address, as a `Source`."""

    def __init__(self, physical: Memory, at: int, name: str) -> None:
        self.name, self.size = f"{name} at physical {at:#x}", _COMMANDS_LIMIT
        self._physical, self._at = physical, at

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        try:
            return self._physical.read(self._at + off, size)
        except FaultError as fault:
            raise TruncatedError(self.name, off, size, fault.address - self._at) from fault

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
