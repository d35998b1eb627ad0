"""`__debug_names`, DWARF 5's accelerator table: from a name to entries by hash.

Source: the DWARF 5 standard, sections 6.1.1 and 7.19.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import Shape, size_of_form, uleb
from kvmtool.types.dwarf_apple import djb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.dwarf_sections import Section

    Place = tuple["_Index", int]

_FORMS = frozenset(
    (
        *(dw.FORM_DATA1, dw.FORM_DATA2, dw.FORM_DATA4, dw.FORM_DATA8, dw.FORM_UDATA, dw.FORM_FLAG),
        *(dw.FORM_REF1, dw.FORM_REF2, dw.FORM_REF4, dw.FORM_REF8, dw.FORM_REF_UDATA),
        *(dw.FORM_FLAG_PRESENT, dw.FORM_SEC_OFFSET, dw.FORM_REF_SIG8),
    )
)
_INDEX_LIMIT = 1 << 18
_ENTRY_LIMIT = 1 << 20  # entries of one name


class _Abbrev(NamedTuple):
    tag: int
    attributes: tuple[tuple[int, int], ...]  # (DW_IDX, form)


class NamesTable:
    """All name indexes of the section, one after another. Raises `FormatError` for damage."""

    def __init__(self, section: Section, strings: Section, byteorder: str) -> None:
        self._indexes: list[_Index] = []
        at = 0
        while at < section.size:
            index = _Index(section, strings, byteorder, at)
            self._indexes.append(index)
            at = index.end
            if len(self._indexes) > _INDEX_LIMIT:
                raise section.bad(at, f"expected at most {_INDEX_LIMIT:#x} name indexes")

    def find(self, name: str) -> list[tuple[int, int | None]]:
        """(offset, tag) of the entries of that name."""
        return [item for index in self._indexes for item in index.find(name)]

    def names(self) -> Iterator[tuple[str, Place]]:
        """Each name with the place of its entries: what `items` and `tags` take."""
        for index in self._indexes:
            for number in range(index.name_count):
                yield index.name(number), (index, number)

    def items(self, place: Place) -> list[tuple[int, int | None]]:
        """(offset, tag) of the entries at `place`."""
        return list(place[0].items(place[1]))

    def tags(self, place: Place) -> set[int] | None:
        """The tags of the entries at `place`."""
        return {tag for _, tag in place[0].items(place[1]) if tag is not None}


class _Index:
    """One name index: `end` is where the next begins."""

    def __init__(self, section: Section, strings: Section, byteorder: str, at: int) -> None:
        self._section, self._strings = section, strings
        self._order: Literal["little", "big"] = "little" if byteorder == "<" else "big"
        wide = section.read(at, 4) == b"\xff\xff\xff\xff"
        self._size = 8 if wide else 4
        start = at + (4 if wide else 0) + self._size
        self.end = start + self._number(start - self._size, self._size)
        head = section.read(start, 32)
        version, _, units, types, foreign, buckets, names, abbrevs, augmentation = Struct(
            byteorder + "2H7I"
        ).unpack(head)
        if version != 5:
            raise section.bad(start, f"version {version}, expected 5")
        self._units, self._types = units, types
        self._buckets, self.name_count = buckets, names
        self._at_units = start + 32 + (augmentation + 3) // 4 * 4
        self._at_buckets = self._at_units + self._size * (units + types) + 8 * foreign
        self._at_hashes = self._at_buckets + 4 * buckets
        self._at_strings = self._at_hashes + (4 * names if buckets else 0)
        self._at_offsets = self._at_strings + self._size * names
        self._at_abbrevs = self._at_offsets + self._size * names
        self._at_pool = self._at_abbrevs + abbrevs
        if not self._at_pool <= self.end <= section.size:
            message = f"{names:#x} names, {units:#x} units: more than its unit_length holds"
            raise section.bad(at, message)
        self._abbrevs: dict[int, _Abbrev] | None = None

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self._section.read(at, size), self._order)

    def find(self, name: str) -> Iterator[tuple[int, int | None]]:
        """(offset, tag) of the entries of that name."""
        wanted = name.encode("utf-8", "surrogateescape")
        if not self._buckets or not wanted.isascii():  # no hashes, or those of Unicode's folding
            numbers = iter(range(self.name_count))
        else:
            numbers = self._numbers(djb(wanted.lower()))
        for number in numbers:
            if self.name(number) == name:
                yield from self.items(number)
                return

    def _numbers(self, value: int) -> Iterator[int]:
        """The names of that hash, counted from 0."""
        bucket = value % self._buckets
        number = self._number(self._at_buckets + 4 * bucket, 4) - 1
        while 0 <= number < self.name_count:
            other = self._number(self._at_hashes + 4 * number, 4)
            if other % self._buckets != bucket:
                return
            if other == value:
                yield number
            number += 1

    def name(self, number: int) -> str:
        """The text of that name, counted from 0."""
        return self._strings.string(
            self._number(self._at_strings + self._size * number, self._size)
        )

    def items(self, number: int) -> Iterator[tuple[int, int | None]]:
        """(offset, tag) of the entries of that name, counted from 0."""
        start = self._number(self._at_offsets + self._size * number, self._size)
        at, section, shape = self._at_pool + start, self._section, Shape(5, 8, self._size)
        abbrevs = self._read_abbrevs()
        for _ in range(_ENTRY_LIMIT):
            code, at = self._uleb(at)
            if not code:
                return
            if code not in abbrevs:
                raise section.bad(at, f"abbreviation code {code:#x}, which the index does not have")
            values: dict[int, int] = {}
            for attribute, form in abbrevs[code].attributes:
                size = size_of_form(form, shape)
                if size < 0:
                    values[attribute], at = self._uleb(at)
                else:
                    values[attribute], at = self._number(at, size), at + size
            unit = self._unit(values)
            if unit is not None and dw.IDX_DIE_OFFSET in values:
                yield unit + values[dw.IDX_DIE_OFFSET], abbrevs[code].tag
        raise section.bad(at, f"more than {_ENTRY_LIMIT:#x} entries of one name")

    def _unit(self, values: dict[int, int]) -> int | None:
        """The offset of the unit an entry is in; None for a type unit of another file."""
        number = values.get(dw.IDX_TYPE_UNIT)
        if number is not None:
            number = number + self._units if number < self._types else None
        else:
            number = values.get(dw.IDX_COMPILE_UNIT, 0)
            if number >= self._units:
                raise self._section.bad(self._at_units, f"a unit's number {number:#x}")
        return (
            None
            if number is None
            else self._number(self._at_units + number * self._size, self._size)
        )

    def _uleb(self, at: int) -> tuple[int, int]:
        data = self._section.read(at, min(10, self.end - at))
        try:
            value, length = uleb(data, 0)
        except (IndexError, ValueError):
            raise self._section.bad(at, "expected a LEB128 number") from None
        return value, at + length

    def _read_abbrevs(self) -> dict[int, _Abbrev]:
        if self._abbrevs is None:
            found: dict[int, _Abbrev] = {}
            at = self._at_abbrevs
            while at < self._at_pool:
                code, at = self._uleb(at)
                if not code:
                    break
                tag, at = self._uleb(at)
                attributes = []
                while at < self._at_pool:
                    index, at = self._uleb(at)
                    form, at = self._uleb(at)
                    if not index:
                        break
                    if form not in _FORMS:
                        raise self._section.bad(at, f"form {form:#x} in a name index")
                    attributes.append((index, form))
                found[code] = _Abbrev(tag, tuple(attributes))
            self._abbrevs = found
        return self._abbrevs
