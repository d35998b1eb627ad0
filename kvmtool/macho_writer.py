"""A Mach-O that lives inside something else, as a file by itself.

The kernel and the kexts of a kernel collection have file offsets that count from the start of the
collection, and share one __LINKEDIT; a kext of a prelinked kernel ends somewhere in a segment of
the kernel. Here such an image gets offsets and a __LINKEDIT of its own.

Source: EXTERNAL_HEADERS/mach-o/loader.h, xnu-11417.121.6.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.linkedit import LC_DYLD_CHAINED_FIXUPS, segment_sections, tables
from kvmtool.macho import CPU_TYPE_ARM64, LC_SYMTAB, MH_CORE, MH_FILESET, MH_OBJECT
from kvmtool.nlist_writer import NlistWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.linkedit import SegmentShape
    from kvmtool.macho import MachO, Section, Segment
    from kvmtool.memory import Memory

_ALIGN = 16  # of a table; what code signatures need
_CHUNK = 1 << 20  # bytes held at a time


class _Span(NamedTuple):
    """`size` bytes at offset `at` of the new file."""

    at: int
    size: int
    pieces: Callable[[], Iterator[bytes]]


class _Part(NamedTuple):
    """A table that was at file offset `off`; the word at offset `field` is to point to it."""

    off: int
    field: int
    size: int
    pieces: Callable[[], Iterator[bytes]]


class Standalone:
    """`image` as a file by itself: `size` bytes, which `pieces` gives in file order.

    Segments keep their addresses, their order and their zero-fill; the one that begins with the
    header comes first, each begins at a page. Segments, sections and every table of a load command
    of loader.h have offsets in the new file. A new __LINKEDIT, the last, holds these tables alone:
    the image's own symbols, in their order, and the names that these have. What no command speaks
    of is left out; a code signature is kept as evidence, but no longer fits.

    Bytes are those of the file, raw: pointers stay packed where they are (chained fixups), and the
    kernel of a collection has no command that tells where its chains begin. With `memory`, at link
    addresses, segments are read from there instead: where that decodes pointers, as the memory of a
    `KernelCache` does, the copy has them decoded, and says nothing of chains any more.
    """

    def __init__(self, image: MachO, memory: Memory | None = None) -> None:
        """Plan the file; of the segments' bytes only headers are read yet.

        Raises `FormatError` for an image that does not hold together, `UnsupportedError` for a
        core or a collection, which are no such image.
        """
        if image.filetype in (MH_CORE, MH_FILESET):
            kind = "a core" if image.filetype == MH_CORE else "a kernel collection"
            raise UnsupportedError(f"{image.source.name} is {kind}, expected one kernel or kext")
        self._image, self._source, self._memory = image, image.source, memory
        self._word = Struct(image.byteorder + "I")
        self._head = bytearray(self._source.read_at(0, image.header_size + image.sizeofcmds))
        self._page = 0x4000 if image.cputype == CPU_TYPE_ARM64 else 0x1000
        if image.filetype == MH_OBJECT:
            self._page = _ALIGN  # nobody maps these
        self._spans = [_Span(0, len(self._head), lambda: iter((bytes(self._head),)))]
        named = (s for s in image.segments if s.segname == "__LINKEDIT" and not s.nsects)
        self._linkedit = next(named, None)
        self._place_segments()
        self._place_linkedit()
        if memory is not None:
            self._drop(LC_DYLD_CHAINED_FIXUPS)

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        return self._spans[-1].at + self._spans[-1].size

    def pieces(self) -> Iterator[bytes]:
        """The new file, at most 1 MiB at a time.

        Raises `TruncatedError` (`FaultError` with a `memory`) for bytes that are not there.
        """
        at = 0
        for span in self._spans:
            if at < span.at:
                yield bytes(span.at - at)
            yield from span.pieces()
            at = span.at + span.size

    # segments

    def _place_segments(self) -> None:
        """Give every segment its place, and the header their new offsets."""
        segments = [s for s in self._image.segments if s is not self._linkedit]
        self._check_segments(segments)
        first = next((s for s in segments if self._has_header(s)), None)
        if first is not None:
            self._append(first, 0, len(self._head))
        places = {first: 0}
        for segment in sorted(segments, key=lambda s: s.fileoff):
            if segment not in places:
                places[segment] = _up(self.size, self._page) if _held(segment) else 0
                self._append(segment, places[segment], 0)
        for segment, shape, sections in segment_sections(self._image):
            if segment is not self._linkedit:
                place = places[segment]
                self._put_sizes(segment, shape, segment.vmsize, place, _held(segment))
                self._put_sections(segment, shape, place, sections)

    def _check_segments(self, segments: list[Segment]) -> None:
        for segment in segments:
            held, there = _held(segment), max(0, self._source.size - segment.fileoff)
            if held > there:
                what = f"segment {segment.segname}"
                raise TruncatedError(self._source.name, segment.fileoff, held, there, what)
        self._check_sum(sum(map(_held, segments)), "segments")

    def _check_sum(self, total: int, what: str) -> None:
        """Nothing may become larger by being written: parts of a real file do not overlap."""
        size = self._source.size
        if total > size:
            message = f"{what} of {total:#x} bytes in a file of {size:#x}: they overlap"
            raise self._bad(None, message)

    def _has_header(self, segment: Segment) -> bool:
        # told by the bytes: an image knows neither its place in a collection nor its address
        size = len(self._head)
        return _held(segment) >= size and (
            self._source.read_at(segment.fileoff, size) == self._head
        )

    def _append(self, segment: Segment, at: int, skip: int) -> None:
        """The bytes of `segment` at `at`, but the first `skip`."""
        size = _held(segment) - skip
        if size <= 0:
            return
        read: Callable[[int, int], bytes] = self._source.read_at
        start = segment.fileoff + skip
        if self._memory is not None:
            read, start = self._memory.read, segment.vmaddr + skip
        self._spans.append(_Span(at + skip, size, lambda: _chunks(read, start, size)))

    def _put_sizes(
        self, segment: Segment, shape: SegmentShape, vmsize: int, fileoff: int, filesize: int
    ) -> None:
        wide = shape.sizes == "3Q"
        if segment.vmaddr + vmsize > 1 << (64 if wide else 32):
            raise self._bad(
                segment.offset,
                f"segment {segment.segname}: vmaddr {segment.vmaddr:#x} + {vmsize:#x} leaves the "
                "address space",
            )
        if not wide:
            self._check32(fileoff)
        layout = Struct(self._image.byteorder + shape.sizes)
        layout.pack_into(self._head, segment.offset + shape.vmsize, vmsize, fileoff, filesize)

    def _put_sections(
        self, segment: Segment, shape: SegmentShape, place: int, sections: list[Section]
    ) -> None:
        """Sections move with their segment; one without bytes in the file has offset 0."""
        held = _held(segment)
        for index, section in enumerate(sections):
            at = segment.offset + shape.sections + index * shape.section
            inside, offset = section.offset - segment.fileoff, 0
            if held and section.size and not section.zerofill:
                if inside < 0 or inside + section.size > held:
                    raise self._bad(
                        at,
                        f"section {section.sectname}: {section.size:#x} bytes at offset "
                        f"{section.offset:#x}, segment {segment.segname} has {held:#x} at "
                        f"{segment.fileoff:#x}",
                    )
                offset = place + inside
            self._put(at + shape.offset, offset)
            if self._memory is not None and section.sectname == "__thread_starts":
                self._head[at + shape.size : at + shape.offset] = bytes(shape.offset - shape.size)

    # __LINKEDIT

    def _place_linkedit(self) -> None:
        """The new __LINKEDIT, its tables in the order of the old one."""
        parts = [*self._tables(), *self._symbols()]
        self._check_sum(sum(part.size for part in parts), "tables")
        start = _up(self.size, self._page)
        for part in sorted(parts):
            at = max(start, _up(self.size, _ALIGN))
            self._put(part.field, at)
            self._spans.append(_Span(at, part.size, part.pieces))
        size = self.size - start if parts else 0
        for segment, shape, _ in segment_sections(self._image):
            if segment is self._linkedit:
                place = start if parts else 0
                self._put_sizes(segment, shape, _up(size, self._page), place, size)

    def _tables(self) -> Iterator[_Part]:
        for table in tables(self._image):
            if self._memory is not None and table.cmd == LC_DYLD_CHAINED_FIXUPS:
                continue
            if not table.size:
                self._put(table.field, 0)
                continue
            yield _Part(table.off, table.field, table.size, self._copy(table.off, table.size))

    def _copy(self, off: int, size: int) -> Callable[[], Iterator[bytes]]:
        return lambda: _chunks(self._source.read_at, off, size)

    def _symbols(self) -> Iterator[_Part]:
        commands, table = list(self._image.commands(LC_SYMTAB)), self._image.symtab
        if table is None:
            return
        if len(commands) > 1:
            raise self._bad(commands[1].offset, "a second LC_SYMTAB, expected one")
        at, symbols = commands[0].offset, NlistWriter(self._image, table)
        if not len(table):
            self._head[at + 8 : at + 24] = bytes(16)
            return
        self._put(at + 20, symbols.strings_size)
        yield _Part(table.symoff, at + 8, symbols.entries_size, symbols.entries)
        yield _Part(table.stroff, at + 16, symbols.strings_size, symbols.strings)

    # the header

    def _put(self, at: int, value: int) -> None:
        self._check32(value)
        self._word.pack_into(self._head, at, value)

    def _check32(self, value: int) -> None:
        if value >> 32:
            raise self._bad(None, f"offset {value:#x} in the new file, expected less than 4 GiB")

    def _drop(self, cmd: int) -> None:
        """Take a load command out; the header keeps its size, the room behind it is zero."""
        gone = list(self._image.commands(cmd))
        for command in reversed(gone):
            del self._head[command.offset : command.offset + command.cmdsize]
            self._head += bytes(command.cmdsize)
        self._put(16, self._image.ncmds - len(gone))
        self._put(20, self._image.sizeofcmds - sum(command.cmdsize for command in gone))

    def _bad(self, offset: int | None, message: str) -> FormatError:
        return FormatError(self._source.name, offset, message)


def _held(segment: Segment) -> int:
    """Bytes of the file that a segment maps."""
    return min(segment.filesize, segment.vmsize)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _chunks(read: Callable[[int, int], bytes], start: int, size: int) -> Iterator[bytes]:
    for at in range(0, size, _CHUNK):
        yield read(start + at, min(_CHUNK, size - at))
