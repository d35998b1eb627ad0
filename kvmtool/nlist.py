"""The nlist entries and string table of a Mach-O symbol table.

One name is found without decoding the table: the string is searched in the mapped string table, and
its index in the column of indices. Only a question about all symbols, or about many, goes further.
Source: EXTERNAL_HEADERS/mach-o/nlist.h and stab.h, xnu-11417.121.6.
"""

from __future__ import annotations

from array import array
from itertools import compress
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

N_STAB, N_PEXT, N_TYPE, N_EXT = 0xE0, 0x10, 0x0E, 0x01
N_UNDF, N_ABS, N_INDR, N_PBUD, N_SECT = 0x0, 0x2, 0xA, 0xC, 0xE

_ENTRY = {
    (order, wide): Struct(order + ("IBBhQ" if wide else "IBBhI"))
    for order in "<>"
    for wide in (False, True)
}
_NATIVE = Struct("=I")
# n_type → whether it may be found: no stab, nothing undefined or common
_DEFINED = bytes(not kind & N_STAB and kind & N_TYPE not in (N_UNDF, N_PBUD) for kind in range(256))
_EXTERNAL = bytes(kind & N_EXT and _DEFINED[kind] for kind in range(256))
_SCAN = 1 << 14  # entries held at a time in a pass over all


class Nlist(NamedTuple):
    """One entry. `n_value` is as linked: no slide; `place` is where it stands in the table."""

    name: str
    n_type: int
    n_sect: int
    n_desc: int
    n_value: int
    place: int

    @property
    def defined(self) -> bool:
        """Whether it names an address or a number: no stab, nothing undefined or common."""
        return not self.n_type & N_STAB and self.n_type & N_TYPE not in (N_UNDF, N_PBUD)


class NlistTable:
    """`nsyms` entries at file offset `symoff`, their names in `strsize` bytes at `stroff`."""

    def __init__(
        self,
        source: Source,
        symoff: int,
        nsyms: int,
        stroff: int,
        strsize: int,
        byteorder: str,
        is64: bool,
    ) -> None:
        """Raises `FormatError` when entries or names do not lie inside the file."""
        self._source = source
        self._entry = _ENTRY[byteorder, is64]
        self._index = Struct(byteorder + "I")
        self.symoff, self.nsyms, self.stroff, self.strsize = symoff, nsyms, stroff, strsize
        self._table_end = symoff + nsyms * self._entry.size
        self._strings: bytes | None = None
        for what, start, end in (
            ("symbol table", symoff, self._table_end),
            ("string table", stroff, stroff + strsize),
        ):
            if end > source.size:
                raise FormatError(
                    source.name,
                    start,
                    f"{what}: expected {end - start:#x} bytes, the file ends at {source.size:#x}",
                )

    def __len__(self) -> int:
        return self.nsyms

    @property
    def table_size(self) -> int:
        """Bytes of all entries."""
        return self._table_end - self.symoff

    def find(self, name: str) -> list[Nlist]:
        """Every entry called exactly `name`, stabs and undefined ones too, in table order."""
        encoded = name.encode("utf-8", "surrogateescape")
        if not encoded or b"\0" in encoded:
            return []
        return [self.at(at, name) for at in self._entries_with(self._places(encoded))]

    def _entries_with(self, places: list[int]) -> Iterator[int]:
        """Entries whose n_strx is one of `places`, in one pass over the table.

        Its two low bytes are columns of bytes, on which `translate` marks those that one of the
        places has; where both are marked the whole number is looked at.
        """
        wanted = frozenset(self._index.pack(strx) for strx in places)
        low = (0, 1) if self._index.pack(1)[0] else (3, 2)
        seen = [(at, {raw[at] for raw in wanted}) for at in low]
        marks = [(at, bytes(n in some for n in range(256))) for at, some in seen]
        size = self._entry.size
        for start in range(0, self.nsyms if places else 0, _SCAN):
            count = min(_SCAN, self.nsyms - start)
            raw = self._source.read_at(self.symoff + start * size, count * size)
            marked = -1
            for first, mark in marks:
                marked &= int.from_bytes(raw[first::size].translate(mark), "little")
            hits = marked.to_bytes(count, "little") if marked else b""
            at = hits.find(1)
            while at >= 0:
                if raw[at * size : at * size + 4] in wanted:
                    yield start + at
                at = hits.find(1, at + 1)

    def best_by_name(self) -> dict[bytes, int]:
        """Name → the index of the entry that it means: the first external one, else the first.

        Of defined entries only, all in one pass; one whose name lies outside the string table has
        no name to be found by.
        """
        size, data = self._entry.size, self._entries()
        column = array("I", memoryview(data).cast("I")[:: size // 4].tobytes())
        if self._index.pack(1) != _NATIVE.pack(1):
            column.byteswap()
        defined = data[4::size].translate(_DEFINED)
        external = bytes(compress(data[4::size].translate(_EXTERNAL), defined))
        strings = self._source.read_at(self.stroff, self.strsize) + b"\0"
        end = strings.find
        # mach-o/nlist.h: 0 is the empty name, whatever the string table begins with
        names = [strings[at : end(b"\0", at)] if at else b"" for at in compress(column, defined)]
        named = list(zip(names, compress(range(self.nsyms), defined), strict=True))
        best = dict(reversed(named))  # of one name the last stays, so from behind
        best.update(reversed(list(compress(named, external))))
        best.pop(b"", None)
        return best

    def _places(self, encoded: bytes) -> list[int]:
        # A linker may store "read" as the tail of "mmread": any place that ends in NUL will do.
        end = self.stroff + self.strsize
        needle = encoded + b"\0"
        places = []
        at = self._source.find(needle, self.stroff + 1, end)  # index 0 is no name: mach-o/nlist.h
        while at >= 0:
            places.append(at - self.stroff)
            at = self._source.find(needle, at + 1, end)
        tail = end - len(encoded)  # the table's last name may lack its NUL
        if tail > self.stroff and self._source.read_at(tail, len(encoded)) == encoded:
            places.append(tail - self.stroff)
        return places

    def _entries(self) -> bytes:
        return self._source.read_at(self.symoff, self._table_end - self.symoff)

    def at(self, index: int, name: str) -> Nlist:
        """The entry at `index`, which is called `name`."""
        size = self._entry.size
        fields = self._entry.unpack(self._source.read_at(self.symoff + index * size, size))
        return Nlist._make((name, *fields[1:], index))

    def __iter__(self) -> Iterator[Nlist]:
        """Every entry in table order; a name outside the string table is an error."""
        name_of = self._name_of
        for index, (strx, n_type, n_sect, n_desc, n_value) in enumerate(
            self._entry.iter_unpack(self._entries())
        ):
            yield Nlist(name_of(strx, index), n_type, n_sect, n_desc, n_value, index)

    def values(self) -> Iterator[tuple[int, int, int]]:
        """(index, n_type, n_value) of every entry that is no stab, in bulk and without names."""
        for index, (_, n_type, _, _, n_value) in enumerate(
            self._entry.iter_unpack(self._entries())
        ):
            if not n_type & N_STAB:
                yield index, n_type, n_value

    def externals(self) -> Iterator[Nlist]:
        """The entries with N_EXT that are no stabs, undefined ones too, in table order."""
        entries = self._entry.iter_unpack(self._entries())
        for index, (strx, n_type, n_sect, n_desc, n_value) in enumerate(entries):
            if n_type & (N_STAB | N_EXT) == N_EXT:
                name = self._name_of(strx, index)
                yield Nlist(name, n_type, n_sect, n_desc, n_value, index)

    def entry(self, index: int) -> Nlist:
        """The entry at `index`, with its name."""
        size = self._entry.size
        raw = self._source.read_at(self.symoff + index * size, size)
        return self.at(index, self._name_of(self._index.unpack_from(raw)[0], index))

    def _name_of(self, strx: int, index: int) -> str:
        strings = self._strings
        if strings is None:
            strings = self._strings = self._source.read_at(self.stroff, self.strsize)
        if strx == 0:  # mach-o/nlist.h: the empty name, whatever the string table begins with
            return ""
        if strx >= len(strings):
            raise FormatError(
                self._source.name,
                self.symoff + index * self._entry.size,
                f"symbol: n_strx {strx:#x}, expected less than strsize {self.strsize:#x}",
            )
        end = strings.find(b"\0", strx)
        return strings[strx : end if end >= 0 else None].decode("utf-8", "surrogateescape")


def type_letter(entry: Nlist, sections: tuple[tuple[str, str], ...], kext: bool = False) -> str:
    """The letter nm prints: `sections` are (segname, sectname) in file order, n_sect from 1.

    `kext` is whether the file is a 64-bit MH_KEXT_BUNDLE, whose code sits in __TEXT_EXEC.
    """
    if entry.n_type & N_STAB:
        return "-"
    kind = entry.n_type & N_TYPE
    if kind == N_UNDF and entry.n_type & N_EXT:
        # An undefined entry with a value is a common symbol of that size (mach-o/nlist.h).
        return "C" if entry.n_value else "U"
    letter = {N_ABS: "a", N_INDR: "i"}.get(kind, "?")
    if kind == N_SECT:
        letter = "s"
        if 1 <= entry.n_sect <= len(sections):
            letter = _SECTION_LETTER.get(sections[entry.n_sect - 1], "s")
            if kext and sections[entry.n_sect - 1] == ("__TEXT_EXEC", "__text"):
                letter = "t"
    return letter.upper() if entry.n_type & N_EXT else letter


_SECTION_LETTER = {
    ("__TEXT", "__text"): "t",
    ("__DATA", "__data"): "d",
    ("__DATA", "__bss"): "b",
}
