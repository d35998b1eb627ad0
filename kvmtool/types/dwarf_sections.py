"""The DWARF sections of a Mach-O: where they lie, under their own names, relocated in an MH_OBJECT.

Section names are cut to 16 characters in a Mach-O. In a .o file the offsets from one DWARF section
into another may be left to the linker: they stand there as addresses, with a relocation entry.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmtool import macho
from kvmtool.errors import FormatError, TruncatedError
from kvmtool.source import BytesSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.macho import MachO
    from kvmtool.source import Source

SEGMENT = "__DWARF"
_R_SCATTERED = 0x80000000  # mach-o/reloc.h
_LIMIT = 1 << 20  # relocation entries of one section


class Section:
    """`size` bytes at file offset `offset`; offsets here count from the section's start."""

    __slots__ = ("_source", "_start", "file", "name", "offset", "size")

    def __init__(self, source: Source, name: str, offset: int, size: int) -> None:
        if offset + size > source.size:
            left = max(0, source.size - offset)
            raise TruncatedError(source.name, offset, size, left, f"section {name}")
        self._source, self._start = source, offset
        self.file, self.name, self.offset, self.size = source.name, name, offset, size

    def relocated(self, data: bytes) -> None:
        """Let `data` stand for the bytes in the file."""
        self._source, self._start = BytesSource(data, self.file), 0

    def read(self, off: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises `FormatError`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise self.bad(off, f"expected {size:#x} bytes, the section ends at {self.size:#x}")
        return self._source.read_at(self._start + off, size)

    def all(self) -> bytes:
        """The section's bytes."""
        return self._source.read_at(self._start, self.size)

    def find(self, needle: bytes, start: int = 0, end: int | None = None) -> int:
        """Lowest offset in [start, end) where `needle` lies wholly inside, or -1."""
        stop = self._start + (self.size if end is None else min(end, self.size))
        found = self._source.find(needle, self._start + start, stop)
        return -1 if found < 0 else found - self._start

    def string(self, off: int) -> str:
        """The text at `off`, up to its NUL. Raises `FormatError`."""
        if not 0 <= off < self.size:
            raise self.bad(off, f"a string's offset, expected less than {self.size:#x}")
        start, end = self._start + off, self._start + self.size
        stop = self._source.find(b"\0", start, end)
        if stop < 0:
            raise self.bad(off, "a string without an end")
        return self._source.read_at(start, stop - start).decode("utf-8", "backslashreplace")

    def bad(self, off: int, message: str) -> FormatError:
        """The error for what stands at `off`."""
        return FormatError(self.file, self.offset + off, f"{self.name}+{off:#x}: {message}")


def dwarf_sections(image: MachO) -> dict[str, Section]:
    """The DWARF sections that have bytes, by name ("__debug_info"). Raises `TruncatedError`."""
    found: dict[str, Section] = {}
    for section in image.sections:
        if section.segname != SEGMENT or not section.size or section.zerofill:
            continue
        if section.sectname in found:
            continue
        new = Section(image.source, section.sectname, section.offset, section.size)
        found[section.sectname] = new
        if image.filetype == macho.MH_OBJECT and section.nreloc:
            _relocate(image, section, new)
    return found


def _relocate(image: MachO, section: macho.Section, target: Section) -> None:
    """Turn the addresses of DWARF sections in this one into offsets from their start."""
    starts = [s.addr if s.segname == SEGMENT else None for s in image.sections]
    words = {
        size: Struct(image.byteorder + letter) for size, letter in zip((4, 8), "IQ", strict=True)
    }
    data: bytearray | None = None
    for at, size, number in _local_entries(image, section):
        start = starts[number - 1] if 1 <= number <= len(starts) else None
        if not start:  # not a DWARF section, or one at address 0: nothing to take away
            continue
        if at + size > target.size:
            message = f"a relocation entry for {size} bytes, the section ends at {target.size:#x}"
            raise target.bad(at, message)
        data = bytearray(target.all()) if data is None else data
        value = words[size].unpack_from(data, at)[0]
        words[size].pack_into(data, at, (value - start) % (1 << 8 * size))
    if data is not None:
        target.relocated(bytes(data))


def _local_entries(image: MachO, section: macho.Section) -> Iterator[tuple[int, int, int]]:
    """(offset, bytes, section number) of the entries that name a section and are absolute."""
    if section.nreloc > _LIMIT:
        message = f"{section.sectname}: nreloc {section.nreloc:#x}, expected at most {_LIMIT:#x}"
        raise FormatError(image.source.name, section.reloff, message)
    table = image.source.read_at(section.reloff, section.nreloc * 8)
    little = image.byteorder == "<"
    paired = False
    for address, info in Struct(image.byteorder + "II").iter_unpack(table):
        # mach-o/reloc.h: bit fields, which the two byte orders fill from opposite ends
        if little:
            number, pcrel, length = info & 0xFFFFFF, info >> 24 & 1, info >> 25 & 3
            extern, kind = info >> 27 & 1, info >> 28
        else:
            number, pcrel, length = info >> 8, info >> 7 & 1, info >> 5 & 3
            extern, kind = info >> 4 & 1, info & 0xF
        second, paired = paired, kind != 0
        # kind 0 is VANILLA or UNSIGNED on every machine; after a SUBTRACTOR it is half a difference
        if not (address & _R_SCATTERED or kind or second or extern or pcrel or length < 2):
            yield address, 1 << length, number
