"""What the load commands of a Mach-O point at outside of its segments' own bytes: __LINKEDIT.

Source: EXTERNAL_HEADERS/mach-o/loader.h, reloc.h, xnu-11417.121.6.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.macho import LC_DYSYMTAB, LC_REQ_DYLD, LC_SEGMENT, LC_SEGMENT_64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.macho import LoadCommand, MachO, Section, Segment

LC_DYLD_CHAINED_FIXUPS = LC_REQ_DYLD | 0x34

# Commands, and their tables: the 32-bit words of the command with file offset and number of
# entries, and the bytes of an entry (0: those of a dylib_module). LC_SYMTAB is for `nlist`.
_DATA = ((2, 3, 1),)
_DYLD_INFO = tuple((word, word + 1, 1) for word in range(2, 12, 2))
_TABLES: dict[int, tuple[tuple[int, int, int], ...]] = {
    LC_DYSYMTAB: ((8, 9, 8), (10, 11, 0), (12, 13, 4), (14, 15, 4), (16, 17, 8), (18, 19, 8)),
    0x16: ((2, 3, 4),),  # LC_TWOLEVEL_HINTS
    0x1D: _DATA,  # LC_CODE_SIGNATURE
    0x1E: _DATA,  # LC_SEGMENT_SPLIT_INFO
    0x22: _DYLD_INFO,  # LC_DYLD_INFO
    LC_REQ_DYLD | 0x22: _DYLD_INFO,  # LC_DYLD_INFO_ONLY
    0x26: _DATA,  # LC_FUNCTION_STARTS
    0x29: _DATA,  # LC_DATA_IN_CODE
    0x2B: _DATA,  # LC_DYLIB_CODE_SIGN_DRS
    0x2E: _DATA,  # LC_LINKER_OPTIMIZATION_HINT
    LC_REQ_DYLD | 0x33: _DATA,  # LC_DYLD_EXPORTS_TRIE
    LC_DYLD_CHAINED_FIXUPS: _DATA,
    0x36: _DATA,  # LC_ATOM_INFO
}
_MODULE = {False: 52, True: 56}  # sizeof(struct dylib_module), dylib_module_64
_RELOCATION = 8  # sizeof(struct relocation_info)


class SegmentShape(NamedTuple):
    """Where fields lie in LC_SEGMENT or LC_SEGMENT_64 (vmsize, fileoff, filesize: `sizes`, at
    `vmsize`), where its sections begin, bytes of each, and where fields lie in these."""

    sizes: str
    vmsize: int
    sections: int
    section: int
    size: int
    offset: int
    reloff: int


_SHAPES = {
    False: SegmentShape("3I", 28, 56, 68, 36, 40, 48),
    True: SegmentShape("3Q", 32, 72, 80, 40, 48, 56),
}


class Table(NamedTuple):
    """`size` bytes at file offset `off`, which the 32-bit word at offset `field` points to.

    `cmd` is the load command that this word is in, `what` a name for it.
    """

    off: int
    field: int
    size: int
    cmd: int
    what: str


def segment_sections(image: MachO) -> Iterator[tuple[Segment, SegmentShape, list[Section]]]:
    """Every segment with the shape of its command and its sections. Raises `FormatError`."""
    sections = iter(image.sections)
    commands = image.commands(LC_SEGMENT, LC_SEGMENT_64)
    for command, segment in zip(commands, image.segments, strict=True):
        shape = _SHAPES[command.cmd == LC_SEGMENT_64]
        yield segment, shape, list(islice(sections, segment.nsects))


def tables(image: MachO) -> Iterator[Table]:
    """Every table but that of LC_SYMTAB, empty ones too, each checked to lie in the file.

    Raises `FormatError` or `TruncatedError`.
    """
    for table in (*_command_tables(image), *_relocations(image)):
        there = max(0, image.source.size - table.off)
        if table.size > there:
            raise TruncatedError(image.source.name, table.off, table.size, there, table.what)
        yield table


def _command_tables(image: MachO) -> Iterator[Table]:
    for command in image.commands(*_TABLES):
        for offset_word, count_word, entry in _TABLES[command.cmd]:
            count = _word(image, command, count_word)
            yield Table(
                _word(image, command, offset_word),
                command.offset + 4 * offset_word,
                count * (entry or _MODULE[image.is64]),
                command.cmd,
                f"load command {command.cmd:#x}",
            )


def _word(image: MachO, command: LoadCommand, index: int) -> int:
    if 4 * index + 4 > command.cmdsize:
        raise FormatError(
            image.source.name,
            command.offset,
            f"load command {command.cmd:#x}: cmdsize {command.cmdsize:#x}, "
            f"expected {4 * index + 4:#x} or more",
        )
    value: int = Struct(image.byteorder + "I").unpack_from(command.data, 4 * index)[0]
    return value


def _relocations(image: MachO) -> Iterator[Table]:
    """Those of the sections of an object."""
    for segment, shape, sections in segment_sections(image):
        at = segment.offset + shape.sections + shape.reloff
        for index, section in enumerate(sections):
            size = section.nreloc * _RELOCATION
            what = f"relocations of section {section.sectname}"
            yield Table(section.reloff, at + index * shape.section, size, 0, what)
