"""Mac Memory Reader: physical memory as the segments of a Mach-O.

The tool (ATC-NY, 2010-2012) wrote the readable parts of the machine's EFI memory map, each as a
segment whose vmaddr is the physical address and whose name is the EFI type; no threads, no notes.
32 or 64 bits went by the size of memory, so the header's cputype says nothing of the kernel.
Source: its README.txt; the machoinfo listings of Volatility 2; the names are those of XNU's
showbootermemorymap (kgmacros, xnu-1699).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from kvmtool import macho
from kvmtool.errors import FormatError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.macho import MachO
from kvmtool.memory import RunMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

_HEADER_SIZE = {b"\xce\xfa\xed\xfe": 28, b"\xcf\xfa\xed\xfe": 32}
_SEGMENT = {28: macho.LC_SEGMENT, 32: macho.LC_SEGMENT_64}
_NAMES = frozenset(
    (
        *("reserved", "LoaderCode", "LoaderData", "BS_code", "BS_data", "RT_code", "RT_data"),
        *("available", "Unusable", "ACPI_recl", "ACPI_NVS", "MemMapIO", "MemPortIO", "PAL_code"),
    )
)
_ADDRESS_BITS = 52


class MacMemoryReader:
    """An image of Mac Memory Reader."""

    name = "mac-memory-reader"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`: a Mach-O whose first segment is named like EFI memory."""
        size = _HEADER_SIZE.get(head[:4], len(head))
        command = int.from_bytes(head[size : size + 4], "little")
        name = head[size + 8 : size + 24].split(b"\0")[0]
        return command == _SEGMENT.get(size) and name.decode("latin-1") in _NAMES

    def __init__(self, source: Source) -> None:
        """Read the segments. Raises `FormatError`."""
        self.source = source
        self.container: Any = None
        self.facts = Facts(UNSAID, 0)
        self.notes: tuple[Note, ...] = ()
        self.macho = MachO(source)
        self.warnings: list[str] = []
        self.lost: list[tuple[int, int]] = []
        self._table = self.macho.segment_table()
        self._sizes = array("Q", map(self._held, range(len(self._table.vmaddr))))
        self.warnings += self.macho.warnings

    def _held(self, index: int) -> int:
        """How many bytes of a segment are in the file."""
        table = self._table
        start, size, offset = table.vmaddr[index], table.vmsize[index], table.fileoff[index]
        if (start + size) >> _ADDRESS_BITS:
            raise FormatError(
                self.source.name,
                None,
                f"segment {index}: {start:#x} + {size:#x} is no physical address",
            )
        promised = min(size, table.filesize[index])
        held = min(promised, max(0, self.source.size - offset))
        if held < size:
            self.lost.append((start + held, start + size))
        if held < promised:
            self.warnings.append(
                f"segment {index} ({start:#x}) ends past the end of the file: "
                f"{promised - held:#x} bytes of memory are absent"
            )
        return held

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`."""
        table = self._table
        for start, size, offset in zip(table.vmaddr, self._sizes, table.fileoff, strict=True):
            yield Run("physical", start, size, offset)

    def virtual(self) -> None:
        """See `Format.virtual`: a kernel's address space has to be found in here."""

    def physical(self) -> RunMemory:
        """The machine's memory: where segments overlap the first in the file wins."""
        starts, offsets = self._table.vmaddr, self._table.fileoff
        ends = array("Q", (start + size for start, size in zip(starts, self._sizes, strict=True)))
        return RunMemory(self.source, starts, ends, offsets, space="physical", lost=self.lost)
