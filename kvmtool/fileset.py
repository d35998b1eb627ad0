"""MH_FILESET: one Mach-O around others, as kernel collections are since macOS 11.

The file offsets of an entry count from the start of the whole file, and its symbol table lies in
the __LINKEDIT that all of them share. An auxiliary or system collection is linked against others.

Sources: EXTERNAL_HEADERS/mach-o/loader.h and pexpert/gen/kc.c, xnu-11417.121.6.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.macho import LC_REQ_DYLD, MachO
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

LC_FILESET_ENTRY = LC_REQ_DYLD | 0x35

# pexpert/gen/kc.c: the kinds of collection, as indices of basePointers[] (a pointer's cacheLevel)
PRIMARY, PAGEABLE, AUXILIARY = 0, 1, 3
COLLECTIONS = {PRIMARY: "boot", PAGEABLE: "system", AUXILIARY: "auxiliary"}

ENTRY_LIMIT = 1 << 14  # the largest collections have some 800
_ENTRY = {order: Struct(order + "2I2Q2I") for order in "<>"}  # fileset_entry_command


class FilesetEntry(NamedTuple):
    """A Mach-O in a fileset: its header lies at address `vmaddr`, file offset `fileoff`."""

    identifier: str
    vmaddr: int
    fileoff: int


class EntrySource:
    """A fileset as one of its entries sees it: header and commands at 0, all else where it is."""

    def __init__(self, parent: Source, fileoff: int, name: str) -> None:
        """Does not own `parent`. Raises `FormatError` when no Mach-O begins at `fileoff`."""
        self.name = name
        self.size = parent.size
        self._parent, self._fileoff = parent, fileoff
        self._head = parent.size - fileoff
        if self._head <= 0:
            raise FormatError(
                parent.name, fileoff, f"fileset entry {name}: the file ends at {parent.size:#x}"
            )
        header = MachO(self)
        self._head = header.header_size + header.sizeofcmds

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        inside = min(max(self._head - off, 0), size)
        head = self._parent.read_at(self._fileoff + off, inside) if inside else b""
        rest = self._parent.read_at(off + inside, size - inside) if inside < size else b""
        return head + rest

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        if start >= self._head:
            return self._parent.find(needle, start, end)
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""


def fileset_entries(image: MachO) -> Iterator[FilesetEntry]:
    """The entries of a fileset, in file order. Raises `FormatError`."""
    layout, name = _ENTRY[image.byteorder], image.source.name
    for count, command in enumerate(image.commands(LC_FILESET_ENTRY)):
        if count == ENTRY_LIMIT:
            raise FormatError(name, command.offset, f"more than {ENTRY_LIMIT:#x} fileset entries")
        if command.cmdsize < layout.size:
            raise FormatError(
                name,
                command.offset,
                f"LC_FILESET_ENTRY: cmdsize {command.cmdsize:#x}, expected {layout.size:#x}",
            )
        _, _, vmaddr, fileoff, entry_id, _ = layout.unpack_from(command.data)
        if not layout.size <= entry_id < command.cmdsize:
            raise FormatError(
                name,
                command.offset,
                f"LC_FILESET_ENTRY: entry_id at {entry_id:#x}, expected {layout.size:#x} to "
                f"{command.cmdsize:#x}",
            )
        identifier = command.data[entry_id:].split(b"\0", 1)[0]
        yield FilesetEntry(identifier.decode("utf-8", "surrogateescape"), vmaddr, fileoff)


def entry_image(image: MachO, entry: FilesetEntry) -> MachO:
    """The Mach-O of an entry. Raises `FormatError` when there is none."""
    source = image.source
    return MachO(EntrySource(source, entry.fileoff, f"{source.name} {entry.identifier}"))
