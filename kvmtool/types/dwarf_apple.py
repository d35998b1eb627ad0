"""Apple's accelerator tables: `__apple_types`, `__apple_names`, from a name to entries by hash.

clang writes them into every .o file, dsymutil into every dSYM. Source: LLVM,
docs/SourceLevelDebugging.rst, "Name Accelerator Tables".
"""

from __future__ import annotations

from struct import Struct
from struct import error as struct_error
from typing import TYPE_CHECKING, Literal

from kvmtool.types import dwarf_numbers as dw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.dwarf_sections import Section

_MAGIC, _NONE = 0x48415348, 0xFFFFFFFF
_SIZES = {dw.FORM_DATA1: 1, dw.FORM_FLAG: 1, dw.FORM_DATA2: 2, dw.FORM_DATA4: 4, dw.FORM_DATA8: 8}
_COLLISIONS = 64  # names of one hash that are looked through


def djb(name: bytes) -> int:
    """Bernstein's hash, as the tables use it."""
    value = 5381
    for byte in name:
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value


class AppleTable:
    """One table. Raises `FormatError` for what cannot be one."""

    def __init__(self, section: Section, strings: Section, byteorder: str) -> None:
        self._section, self._strings = section, strings
        self._word = Struct(byteorder + "I")
        self._pair = Struct(byteorder + "II")
        head = section.read(0, min(28, section.size))
        try:
            magic, version, function, self._buckets, self._hashes, length, base, atoms = Struct(
                byteorder + "IHHIIIII"
            ).unpack(head)
        except struct_error:
            raise section.bad(0, "expected the header of a hash table") from None
        if (magic, version, function) != (_MAGIC, 1, 0):
            message = f"expected a hash table ('HASH', version 1, function 0), got {head[:8].hex()}"
            raise section.bad(0, message)
        self._base = base
        self._at_buckets = 20 + length
        self._at_hashes = self._at_buckets + 4 * self._buckets
        self._at_offsets = self._at_hashes + 4 * self._hashes
        if self._at_offsets + 4 * self._hashes > section.size or length < 8 + 4 * atoms:
            message = f"{self._buckets:#x} buckets, {self._hashes:#x} hashes, {atoms:#x} atoms"
            raise section.bad(8, f"{message}: the section ends at {section.size:#x}")
        self._read_atoms(byteorder, atoms)

    def _read_atoms(self, byteorder: str, atoms: int) -> None:
        """Where in an item its entry's offset and tag stand."""
        section, size = self._section, 0
        self._die: tuple[int, int] | None = None
        self._tag: tuple[int, int] | None = None
        for kind, form in Struct(byteorder + "HH").iter_unpack(section.read(28, 4 * atoms)):
            if form not in _SIZES:
                raise section.bad(28, f"an atom of form {form:#x}, expected one of fixed size")
            if kind == dw.ATOM_DIE_OFFSET:
                self._die = (size, _SIZES[form])
            elif kind == dw.ATOM_DIE_TAG:
                self._tag = (size, _SIZES[form])
            size += _SIZES[form]
        if self._die is None:
            raise section.bad(28, "its items have no DIE offset")
        self._item = size
        self._order: Literal["little", "big"] = "little" if byteorder == "<" else "big"

    def find(self, name: str) -> list[tuple[int, int | None]]:
        """(offset, tag) of the entries of that name; the tag is None where it is not told."""
        wanted = name.encode("utf-8", "surrogateescape")
        if not self._buckets:
            return []
        section, value = self._section, djb(wanted)
        index = self._at(self._at_buckets, value % self._buckets)
        tried = 0
        while index < self._hashes:  # no entries: 0xffffffff
            other = self._at(self._at_hashes, index)
            if other % self._buckets != value % self._buckets:
                break
            if other == value:
                at = self._at(self._at_offsets, index)
                for string, start, count in self._names(at, section.size):
                    tried += 1
                    if self._strings.string(string) == name:
                        return list(self._items(start, count))
                    if tried > _COLLISIONS:
                        raise section.bad(at, f"more than {_COLLISIONS} names of one hash")
            index += 1
        return []

    def _at(self, base: int, index: int) -> int:
        number: int = self._word.unpack(self._section.read(base + 4 * index, 4))[0]
        return number

    def _names(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(string, offset of its items, how many) of the names of one hash."""
        section = self._section
        while at < end:
            string = self._word.unpack(section.read(at, 4))[0]
            if not string:
                return
            count = self._word.unpack(section.read(at + 4, 4))[0]
            at += 8
            if count * self._item > end - at:
                message = f"{count:#x} items, the section ends at {end:#x}"
                raise section.bad(at - 4, message)
            yield string, at, count
            at += count * self._item

    def _items(self, start: int, count: int) -> Iterator[tuple[int, int | None]]:
        assert self._die is not None
        data = self._section.read(start, count * self._item)
        (die, size), tag = self._die, self._tag
        for at in range(0, len(data), self._item):
            offset = int.from_bytes(data[at + die : at + die + size], self._order)
            kind = None
            if tag is not None:
                raw = data[at + tag[0] : at + tag[0] + tag[1]]
                kind = int.from_bytes(raw, self._order)
            yield self._base + offset, kind

    def names(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Each name with the place of its items: what `items` and `tags` take."""
        section, budget = self._section, 2 * self._section.size
        offsets = section.read(self._at_offsets, 4 * self._hashes)
        for (at,) in self._word.iter_unpack(offsets):
            for string, start, count in self._names(at, section.size):
                budget -= 8 + count * self._item
                if budget < 0:
                    raise section.bad(at, "lists of names that lie in each other")
                yield self._strings.string(string), (start, count)

    def items(self, place: tuple[int, int]) -> list[tuple[int, int | None]]:
        """(offset, tag) of the entries at `place`; the tag is None where it is not told."""
        return list(self._items(*place))

    def tags(self, place: tuple[int, int]) -> set[int] | None:
        """The tags of the entries at `place`; None where they are not told."""
        if self._tag is None:
            return None
        data = self._section.read(place[0], place[1] * self._item)
        (at, size), order = self._tag, self._order
        columns = [data[at + byte :: self._item] for byte in range(size)]
        return {int.from_bytes(bytes(raw), order) for raw in set(zip(*columns, strict=True))}
