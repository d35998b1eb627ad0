"""Mac Memory Reader: physical memory as the segments of a Mach-O.

The tool (ATC-NY, 2010-2012) wrote the readable parts of the machine's EFI memory map, each as a
segment whose vmaddr is the physical address and whose name is the EFI type; no threads, no notes.
32 or 64 bits went by the size of memory, so the header's cputype says nothing of the kernel.
Source: its README.txt; the machoinfo listings of Volatility 2; the names are those of XNU's
showbootermemorymap (kgmacros, xnu-1699).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool import macho
from kvmtool.formats.run_table import RunTable
from kvmtool.macho import MachO
from kvmtool.segment_table import segment_table

if TYPE_CHECKING:
    from kvmtool.source import Source

_HEADER_SIZE = {b"\xce\xfa\xed\xfe": 28, b"\xcf\xfa\xed\xfe": 32}
_SEGMENT = {28: macho.LC_SEGMENT, 32: macho.LC_SEGMENT_64}
_NAMES = frozenset(
    (
        *("reserved", "LoaderCode", "LoaderData", "BS_code", "BS_data", "RT_code", "RT_data"),
        *("available", "Unusable", "ACPI_recl", "ACPI_NVS", "MemMapIO", "MemPortIO", "PAL_code"),
    )
)


class MacMemoryReader(RunTable):
    """An image of Mac Memory Reader."""

    name = "mac-memory-reader"
    piece = "segment"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`: a Mach-O whose first segment is named like EFI memory."""
        size = _HEADER_SIZE.get(head[:4], len(head))
        command = int.from_bytes(head[size : size + 4], "little")
        name = head[size + 8 : size + 24].split(b"\0")[0]
        return command == _SEGMENT.get(size) and name.decode("latin-1") in _NAMES

    def __init__(self, source: Source) -> None:
        """Read the segments. Raises `FormatError`."""
        super().__init__(source)
        self.macho = MachO(source)
        table = segment_table(self.macho)
        for start, size, offset, stored in zip(
            table.vmaddr, table.vmsize, table.fileoff, table.filesize, strict=True
        ):
            self.add(start, size, offset, stored=stored)
        self.warnings += self.macho.warnings
