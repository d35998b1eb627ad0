"""Relocation entries of a Mach-O, applied to its bytes when they are read.

The file is never changed: `RelocatedSource` reads it and patches the answer. What each kind of
entry means is in `relocation_types`; here the tables are read and every entry is checked.

Sources: mach-o/reloc.h; libkern/kxld/kxld_object.c (xnu-2050) for where r_address counts from and
for the global offset table.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvmtool import macho
from kvmtool.errors import FormatError, MismatchError, TruncatedError, UnsupportedError
from kvmtool.nlist import N_ABS, N_SECT, N_STAB, N_TYPE
from kvmtool.relocation_types import MACHINES, R_ABS, R_SCATTERED, Entry
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.macho import MachO, Section
    from kvmtool.relocation_types import Machine

S_ATTR_DEBUG = 0x02000000  # mach-o/loader.h: a section that no linker loads

_LIMIT = 1 << 18  # entries; the whole BSD half of a ppc kernel has 107,000
_INDEX_BITS = 20
_INDEX = (1 << _INDEX_BITS) - 1
_WIDEST = 8  # bytes that one entry may change
_DYSYMTAB = {order: Struct(order + "20I") for order in "<>"}


class Table(NamedTuple):
    """`nreloc` entries at file offset `reloff`, whose r_address counts from `base` (linked).

    They change what lies in `section`, or in any segment where that is None.
    """

    name: str
    reloff: int
    nreloc: int
    base: int
    section: Section | None


class Relocations:
    """The entries of one image, for a load `slide` bytes from its link address.

    `resolve` gives the addresses of names that the image does not define. Nothing is read before
    it is needed; the first use checks every entry and raises `FormatError` (with the entry's file
    offset), `TruncatedError` or `UnsupportedError`.
    """

    def __init__(
        self, image: MachO, slide: int, resolve: Callable[[str], int | None] | None = None
    ) -> None:
        self.image, self.slide = image, slide
        self.byteorder: Literal["little", "big"] = "little" if image.byteorder == "<" else "big"
        self._resolve = resolve
        self._symbols: dict[int, int | None] = {}
        self._words = array("I")  # two of each entry, those of all tables
        self._firsts: list[int] = []  # index of the first entry of each table

    # reading and checking

    @cached_property
    def tables(self) -> list[Table]:
        """Those of the sections in an MH_OBJECT, those of LC_DYSYMTAB in anything else."""
        if self.image.filetype == macho.MH_OBJECT:
            return [
                Table(f"{s.segname},{s.sectname}", s.reloff, s.nreloc, s.addr, s)
                for s in self.image.sections
                if s.nreloc and not s.flags & S_ATTR_DEBUG
            ]
        found = []
        layout = _DYSYMTAB[self.image.byteorder]
        # r_address counts from the first segment: kxld_object.c, process_relocs_from_tables
        base = self.image.segments[0].vmaddr if self.image.segments else 0
        for command in self.image.commands(macho.LC_DYSYMTAB):
            if command.cmdsize != layout.size:
                message = f"LC_DYSYMTAB: cmdsize {command.cmdsize:#x}, expected {layout.size:#x}"
                raise FormatError(self.image.source.name, command.offset, message)
            extreloff, nextrel, locreloff, nlocrel = layout.unpack(command.data)[-4:]
            found.append(Table("LC_DYSYMTAB's external ones", extreloff, nextrel, base, None))
            found.append(Table("LC_DYSYMTAB's local ones", locreloff, nlocrel, base, None))
        return [table for table in found if table.nreloc]

    @cached_property
    def _machine(self) -> Machine:
        known = MACHINES.get(self.image.cputype)
        if known is None:
            name = macho.arch_name(self.image.cputype, self.image.cpusubtype)
            raise UnsupportedError(f"{self.image.source.name}: relocations of {name} are not known")
        return known

    @cached_property
    def _keys(self) -> list[int]:
        """File offset << 20 | index of every entry, in the order of the offsets."""
        total = sum(table.nreloc for table in self.tables)
        if total > _LIMIT:
            message = f"{total:#x} relocation entries, expected at most {_LIMIT:#x}"
            raise FormatError(self.image.source.name, self.tables[0].reloff, message)
        keys: list[int] = []
        self._firsts.clear()
        del self._words[:]
        for table in self.tables:
            first = len(self._words) // 2
            self._firsts.append(first)
            words = array("I", self.image.source.read_at(table.reloff, table.nreloc * 8))
            if self.byteorder != sys.byteorder:
                words.byteswap()
            self._words += words
            index = first
            while index < first + table.nreloc:
                entry = self._entry(index)
                offset = self._checked(table, table.reloff + (index - first) * 8, entry)
                keys.append(offset << _INDEX_BITS | index)
                index += 1 if entry.pair is None else 2
        keys.sort()
        return keys

    def _entry(self, index: int) -> Entry:
        at = bisect_right(self._firsts, index) - 1
        table = self.tables[at]
        entry = self._decode(index, table.base)
        if entry.type in self._machine.pairs and index + 1 < self._firsts[at] + table.nreloc:
            entry = entry._replace(pair=self._decode(index + 1, 0))
        return entry

    def _decode(self, index: int, base: int) -> Entry:
        first, second = self._words[2 * index], self._words[2 * index + 1]
        if first & R_SCATTERED and self._machine.scattered:
            size, pcrel = 1 << (first >> 28 & 3), bool(first >> 30 & 1)
            address, kind = base + (first & 0xFFFFFF), first >> 24 & 15
            return Entry(address, size, kind, pcrel, False, True, second, None)
        if self.byteorder == "little":
            size, kind, target = 1 << (second >> 25 & 3), second >> 28, second & 0xFFFFFF
            pcrel, extern = bool(second >> 24 & 1), bool(second >> 27 & 1)
        else:
            size, kind, target = 1 << (second >> 5 & 3), second & 15, second >> 8
            pcrel, extern = bool(second >> 7 & 1), bool(second >> 4 & 1)
        return Entry(base + first, size, kind, pcrel, extern, False, target, None)

    def _checked(self, table: Table, at: int, entry: Entry) -> int:
        """The file offset of what the entry (at file offset `at`) changes; all it says is true."""
        machine, pair = self._machine, entry.pair
        if entry.type not in machine.types:
            known = ", ".join(map(str, sorted(machine.types)))
            raise self._bad(at, table, f"r_type {entry.type}, expected one of {known}")
        if entry.size not in machine.sizes:
            sizes = " or ".join(map(str, machine.sizes))
            raise self._bad(at, table, f"r_length of {entry.size} bytes, expected {sizes}")
        wanted = machine.pairs.get(entry.type)
        if wanted is not None and (pair is None or pair.type != wanted):
            got = "nothing" if pair is None else f"r_type {pair.type}"
            message = f"r_type {entry.type}: expected r_type {wanted} to follow, got {got}"
            raise self._bad(at, table, message)
        self._check_target(table, at, entry)
        if pair is not None and pair.type in machine.types:
            self._check_target(table, at + 8, pair)
        offset = self._place(table.section, entry.address, entry.size)
        if offset is None:
            where = f"r_address {entry.address - table.base:#x}"
            raise self._bad(at, table, f"{where} is not one of its bytes in the file")
        return offset

    def _check_target(self, table: Table, at: int, entry: Entry) -> None:
        if entry.scattered:
            low, high = self._bounds
            if not low <= entry.target <= high:
                message = f"r_value {entry.target:#x}, expected {low:#x} to {high:#x}"
                raise self._bad(at, table, message)
            return
        most = len(self.image.sections)
        if entry.extern:
            most = (0 if self.image.symtab is None else len(self.image.symtab)) - 1
        if entry.target > most:
            message = f"r_symbolnum {entry.target:#x}, expected at most {most:#x}"
            raise self._bad(at, table, message)

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        """The lowest address of any section and the highest end: a label may stand there."""
        sections = self.image.sections
        low = min((section.addr for section in sections), default=0)
        return low, max((section.addr + section.size for section in sections), default=0)

    @cached_property
    def _by_address(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The segments' vmaddrs in order; and (vmaddr, bytes in the file, fileoff) of each."""
        found = sorted(
            (s.vmaddr, min(s.filesize, s.vmsize), s.fileoff) for s in self.image.segments
        )
        return [start for start, _, _ in found], found

    def _place(self, section: Section | None, address: int, size: int) -> int | None:
        """The file offset of `size` bytes linked at `address`; None if the file has none there."""
        if section is not None:
            held = 0 if section.zerofill else section.size
            start, offset = section.addr, section.offset
        else:
            starts, segments = self._by_address
            at = bisect_right(starts, address) - 1
            if at < 0:
                return None
            start, held, offset = segments[at]
        place = offset + address - start
        inside = start <= address <= start + held - size
        return place if inside and place + size <= self.image.source.size else None

    def _bad(self, at: int, table: Table, message: str) -> FormatError:
        message = f"relocation entry ({table.name}): {message}"
        return FormatError(self.image.source.name, at, message)

    # symbols

    def symbol(self, index: int) -> int | None:
        """Where the symbol at `index` lies once loaded; None if nobody defines it."""
        table = self.image.symtab
        assert table is not None
        if index not in self._symbols:
            entry = table.entry(index)
            value: int | None = entry.n_value
            if entry.n_type & N_STAB:
                message = f"symbol {index:#x}: a relocation entry names it, but it is a stab"
                raise FormatError(self.image.source.name, table.symoff, message)
            if entry.n_type & N_TYPE == N_SECT:
                value = entry.n_value + self.slide
            elif entry.n_type & N_TYPE != N_ABS:  # undefined, common, another name for one of them
                value = self._resolve(entry.name) if self._resolve is not None else None
            self._symbols[index] = value
        return self._symbols[index]

    def _externs(self) -> Iterator[Entry]:
        for key in self._keys:
            entry = self._entry(key & _INDEX)
            if entry.extern:
                yield entry
            if entry.pair is not None and entry.pair.extern:
                yield entry.pair

    @cached_property
    def unresolved(self) -> tuple[str, ...]:
        """The names that nobody defines, in the order of the symbol table: their bytes stay."""
        wanted = {entry.target for entry in self._externs()}
        lost = sorted(index for index in wanted if self.symbol(index) is None)
        table = self.image.symtab
        return tuple(table.entry(index).name for index in lost) if table is not None else ()

    @cached_property
    def got(self) -> dict[int, int]:
        """Where the symbols' slots in the global offset table are linked, by symbol index.

        Only an MH_OBJECT needs one made: kxld puts it behind all sections, in the order of the
        symbol table (create_got, populate_got).
        """
        machine = MACHINES.get(self.image.cputype)
        if self.image.filetype != macho.MH_OBJECT or machine is None or not machine.got:
            return {}
        loaded = [s for s in self.image.sections if not s.flags & S_ATTR_DEBUG]
        start = -(-max((s.addr + s.size for s in loaded), default=0) // 8) * 8
        wanted = {entry.target for entry in self._externs() if entry.type in machine.got}
        return {index: start + 8 * place for place, index in enumerate(sorted(wanted))}

    # the image at its place: relocation_types.Load

    def base(self, entry: Entry) -> int | None:
        """See `Load.base`."""
        if entry.extern:
            return self.symbol(entry.target)
        return self.slide if entry.scattered or entry.target != R_ABS else 0

    def start_of_section(self, entry: Entry) -> int:
        """See `Load.start_of_section`; 0 where it names none."""
        sections = self.image.sections
        if entry.scattered:
            around = (s.addr for s in sections if s.addr <= entry.target < s.addr + s.size)
            return next(around, 0)
        return sections[entry.target - 1].addr if entry.target != R_ABS else 0

    def got_slot(self, entry: Entry) -> int | None:
        """See `Load.got_slot`."""
        slot = self.got.get(entry.target)
        return None if slot is None else slot + self.slide

    def displacement(self, entry: Entry, value: int, bits: int) -> int:
        """See `Load.displacement`."""
        if -1 << (bits - 1) <= value < 1 << (bits - 1):
            return value
        raise MismatchError(
            f"{self.image.source.name}: the code at {entry.address + self.slide:#x} cannot reach "
            f"what it refers to, {abs(value):#x} bytes away; expected a load address nearer to it"
        )

    def patches(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """(file offset, loaded bytes) of all that changes in, or partly in, a range of the file."""
        for place, size_there, value in self._rewritten(offset, size):
            if value is not None:
                value &= (1 << 8 * size_there) - 1
                yield place, value.to_bytes(size_there, self.byteorder)

    def unknown(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """(file offset, bytes) of what refers to symbols that nobody defines, as `patches`."""
        for place, size_there, value in self._rewritten(offset, size):
            if value is None:
                yield place, size_there

    def _rewritten(self, offset: int, size: int) -> Iterator[tuple[int, int, int | None]]:
        keys, read = self._keys, self.image.source.read_at
        rewrite = self._machine.rewrite if keys else None
        at = bisect_left(keys, max(0, offset - _WIDEST + 1) << _INDEX_BITS)
        while at < len(keys) and (place := keys[at] >> _INDEX_BITS) < offset + size:
            entry = self._entry(keys[at] & _INDEX)
            at += 1
            if place + entry.size <= offset:
                continue
            stored = int.from_bytes(read(place, entry.size), self.byteorder)
            yield place, entry.size, rewrite(self, entry, stored) if rewrite else None


class RelocatedSource:
    """An image's file with its relocations applied, as a `Source`. Does not own the file's.

    Behind the file's bytes lies `tail`: what a linker adds that no file holds.
    """

    def __init__(self, relocations: Relocations, tail: bytes = b"") -> None:
        self._file = relocations.image.source
        self._relocations = relocations
        self._tail = tail
        self.name = self._file.name
        self.size = self._file.size + len(tail)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`. Raises also what `Relocations` does."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        inside = min(size, max(0, self._file.size - off))
        if not inside:
            return self._tail[off - self._file.size :][:size]
        data = bytearray(self._file.read_at(off, inside))
        for place, patch in self._relocations.patches(off, inside):
            start, stop = max(place, off), min(place + len(patch), off + inside)
            data[start - off : stop - off] = patch[start - place : stop - place]
        return bytes(data) + self._tail[: size - inside]

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
