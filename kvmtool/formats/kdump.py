"""kdump-compressed: what makedumpfile and QEMU's dump-guest-memory write.

A header, two bitmaps of page frames, and the pages of the second one, each compressed for itself.
Pages that were left out (free ones, or those of another piece of a split dump) are absent.

Source: diskdump_mod.h of makedumpfile, include/sysemu/dump.h and dump/dump.c of QEMU.
"""

from __future__ import annotations

import re
from array import array
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FormatError, TruncatedError
from kvmtool.formats import UNSAID, Facts, Note
from kvmtool.formats.elf_notes import CpuNotes
from kvmtool.formats.kdump_pages import DESCRIPTOR, PageSource, Table, lost_pages
from kvmtool.formats.run_table import ADDRESS_BITS, RunTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.source import Source

_SIGNATURE = b"KDUMP   "
_VERSIONS = range(1, 7)  # header_version; later fields are there from a version on
_MACHINE_AT, _MACHINE_SIZE = 12 + 4 * 65, 65  # utsname.machine
# status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr, total_ram_blocks, device_blocks,
# written_blocks, current_cpu, nr_cpus: behind a timestamp that is aligned and sized as the writer's
_COUNTS = Struct("<10I")
_INCOMPLETE = 0x08  # of status: the writer ran out of room
_MIN_BLOCK, _MAX_BLOCK = 512, 64 << 10
_SUB_LIMIT = 1 << 16  # blocks; it holds the notes of all CPUs
_BITMAP_LIMIT = 1 << 30  # bytes
_NOTES_LIMIT = 64 << 20
_NOTE = Struct("<III")
_MACHINES = {"x86_64": 62, "i686": 3, "i386": 3, "aarch64": 183, "arm64": 183}  # to e_machine
_EM_386, _EM_AARCH64 = 3, 183


class _Layout(NamedTuple):
    """Where a 32-bit or 64-bit writer puts things."""

    counts: int  # of `_COUNTS` in the header
    split: Struct  # split, start_pfn, end_pfn; from version 2 on
    note: Struct  # offset_note, size_note; from version 4 on
    mapnr: Struct  # start_pfn_64, end_pfn_64, max_mapnr_64; from version 6 on


_LAYOUTS = {
    64: _Layout(424, Struct("<12xI2Q"), Struct("<48x2Q"), Struct("<80x3Q")),
    32: _Layout(412, Struct("<8xI2I"), Struct("<32xQI"), Struct("<56x3Q")),
}
_SUB_SIZE = 104  # bytes of the longer sub header; a block is always more

_EDGES = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


class Kdump(RunTable):
    """A kdump-compressed file; offsets are those of the decoded pages, one after the other."""

    name = "kdump"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return head.startswith(_SIGNATURE)

    def __init__(self, source: Source) -> None:
        """Read headers, bitmap and notes. Raises `FormatError`."""
        super().__init__(source)
        self._read_header()
        self._read_sub_header()
        self._read_bitmap()
        self._cut_off_lost()
        self._cpus = CpuNotes("<")
        self.notes = tuple(self._read_notes())
        self.warnings += self._cpus.warnings
        self.facts = self._facts()

    def _read_header(self) -> None:
        source = self.source
        size = _LAYOUTS[64].counts + _COUNTS.size
        if source.size < size:
            raise TruncatedError(source.name, 0, size, source.size, "kdump header")
        head = source.read_at(0, size)
        if not head.startswith(_SIGNATURE):
            raise FormatError(source.name, 0, f"expected a KDUMP signature, got {head[:8].hex()}")
        self.version = int.from_bytes(head[8:12], "little")
        if self.version not in _VERSIONS:
            raise FormatError(source.name, 8, f"header_version {self.version:#x}, expected 1 to 6")
        machine = head[_MACHINE_AT : _MACHINE_AT + _MACHINE_SIZE].partition(b"\0")[0]
        self._machine = _MACHINES.get(machine.decode("latin-1"), 0)
        fitting = [bits for bits, layout in _LAYOUTS.items() if _plausible(head, layout.counts)]
        if not fitting:
            raise FormatError(
                source.name, 0, "no block size and no size of a sub header, 32-bit or 64-bit"
            )
        self.bits = fitting[0]
        counts = _COUNTS.unpack_from(head, _LAYOUTS[self.bits].counts)
        self._status, self.block_size, self._sub_blocks, self._bitmap_blocks, self._mapnr = counts[
            :5
        ]

    def _read_sub_header(self) -> None:
        """Sets the page frames that this file has, and where the notes are."""
        layout, at = _LAYOUTS[self.bits], self.block_size
        sub = self.source.read_at(at, _SUB_SIZE)
        split, first, end = layout.split.unpack_from(sub) if self.version >= 2 else (0, 0, 0)
        if self.version >= 6:
            first, end, self._mapnr = layout.mapnr.unpack_from(sub)
        self._note_at = layout.note.unpack_from(sub) if self.version >= 4 else (0, 0)
        if self._mapnr * self.block_size >> ADDRESS_BITS:
            raise FormatError(self.source.name, at, f"max_mapnr {self._mapnr:#x} is no page frame")
        self._frames = range(self._mapnr)
        if split:
            self._frames = range(first, min(end, self._mapnr))
            self.warnings.append(
                f"this is one piece of a split dump, with the page frames from {first:#x} to "
                f"{end:#x}: what is in the other pieces is absent"
            )

    def _read_bitmap(self) -> None:
        """Sets the runs of pages; the n-th page of all is the n-th of `PageSource`."""
        source, block = self.source, self.block_size
        at = (1 + self._sub_blocks) * block
        size = self._bitmap_blocks * block
        if size > _BITMAP_LIMIT or at + size > source.size:
            raise FormatError(
                source.name,
                at,
                f"the bitmaps take {size:#x} bytes, the file has {source.size:#x}",
            )
        needed = (self._mapnr + 7) // 8
        if size >= 2 * (-(-needed // block) * block):  # the first tells which pages there were
            bitmap = source.read_at(at + size // 2, size // 2)
        else:
            bitmap = source.read_at(at, size)
        if needed > len(bitmap):
            raise FormatError(
                source.name,
                at,
                f"max_mapnr {self._mapnr:#x} needs {needed:#x} bytes of bitmap, there are "
                f"{len(bitmap):#x}",
            )
        self._starts, self._ends, self._offsets, count = _runs(bitmap, self._frames, block)
        table = at + size
        held = min(count, max(0, source.size - table) // DESCRIPTOR.size)
        self._table, self._promised = Table(table, held, block), count
        self.memory_source = PageSource(source, self._table)

    def _cut_off_lost(self) -> None:
        """Takes out the pages that the bitmap promises and the file does not hold."""
        suspect = bool(self._status & _INCOMPLETE) or self._table.pages < self._promised
        lost = list(lost_pages(self.source, self._table, suspect)) if self._table.pages else []
        if self._table.pages < self._promised:
            lost.append((self._table.pages, self._promised))
        if not lost:
            return
        count = sum(end - first for first, end in lost)
        self.warnings.append(
            f"the file is cut off or incomplete: {count:#x} of {self._promised:#x} pages are absent"
        )
        columns = (array("Q"), array("Q"), array("Q"))
        for start, end, offset, gone in _without(
            zip(self._starts, self._ends, self._offsets, strict=True),
            [(first * self.block_size, end * self.block_size) for first, end in lost],
        ):
            if gone:
                self.lost.append((start, end))
                continue
            for column, value in zip(columns, (start, end, offset), strict=True):
                column.append(value)
        self._starts, self._ends, self._offsets = columns

    def _read_notes(self) -> Iterator[Note]:
        offset, size = self._note_at
        held = min(size, _NOTES_LIMIT, max(0, self.source.size - offset))
        data = self.source.read_at(offset, held) if held else b""
        if held < size:
            self.warnings.append(f"the notes end past the end of the file ({held:#x} of {size:#x})")
        at = 0
        while at + _NOTE.size <= held:
            namesz, descsz, kind = _NOTE.unpack_from(data, at)
            name_at = at + _NOTE.size
            desc_at = name_at + (namesz + 3 & ~3)
            if desc_at + descsz > held:
                self.warnings.append(f"the note at offset {offset + at:#x} ends past the notes")
                break
            at = desc_at + (descsz + 3 & ~3)
            owner = data[name_at : name_at + namesz].rstrip(b"\0").decode("latin-1")
            self._cpus.take(owner, kind, self._machine, data[desc_at : desc_at + descsz])
            if owner:
                yield Note(owner, offset + desc_at, descsz)

    def _facts(self) -> Facts:
        cputype, said = UNSAID, {}
        if self._machine == _EM_AARCH64:
            cputype, said["cputype"] = macho.CPU_TYPE_ARM64, "utsname.machine aarch64"
        elif self._machine == _EM_386 and self._cpus.writer == "QEMU":
            # as in its ELF cores: written for a CPU outside long mode, where no 64-bit kernel runs
            cputype, said["cputype"] = macho.CPU_TYPE_I386, "utsname.machine i686"
        return Facts(
            cputype, 0, threads=self._cpus.threads(), said=said, control=self._cpus.control()
        )


def _plausible(head: bytes, at: int) -> bool:
    block_size, sub_blocks, bitmap_blocks = _COUNTS.unpack_from(head, at)[1:4]
    return bool(
        _MIN_BLOCK <= block_size <= _MAX_BLOCK
        and block_size & block_size - 1 == 0
        and 0 < sub_blocks <= _SUB_LIMIT
        and bitmap_blocks > 0
    )


def _runs(
    bitmap: bytes, frames: range, page_size: int
) -> tuple[array[int], array[int], array[int], int]:
    """Starts, ends and places (of their first page among all) of the runs of set bits in `frames`.

    Starts and ends are addresses, places bytes; the fourth is the number of pages.
    """
    bits = int.from_bytes(bitmap[: (frames.stop + 7) // 8], "little")
    bits = (bits & (1 << frames.stop) - 1) >> frames.start << frames.start if frames else 0
    edges = bits ^ bits << 1  # a bit where a run begins, and one where it has ended
    size = len(bitmap) + 1
    found: array[int] = array("Q")
    for match in re.finditer(rb"[^\0]", edges.to_bytes(size, "little")):
        at = match.start() * 8
        found.extend([(at + bit) * page_size for bit in _EDGES[match[0][0]]])
    starts, ends, ranks, total = found[::2], found[1::2], array("Q"), 0
    for start, end in zip(starts, ends, strict=True):
        ranks.append(total)
        total += end - start
    return starts, ends, ranks, total // page_size


def _without(
    runs: Iterable[tuple[int, int, int]], lost: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int, bool]]:
    """Runs (start, end, place) cut where their places are in `lost`, as (..., whether lost)."""
    at = 0
    for start, end, place in runs:
        while start < end:
            while at < len(lost) and lost[at][1] <= place:
                at += 1
            gone = at < len(lost) and lost[at][0] <= place
            stop = lost[at][int(gone)] if at < len(lost) else place + end - start
            size = min(end - start, stop - place)
            yield start, start + size, place, gone
            start, place = start + size, place + size
