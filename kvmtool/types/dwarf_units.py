"""The units of `__debug_info`: where each lies, and how it writes numbers.

Offsets count from the start of `__debug_info`; those of `__debug_types` (DWARF 4) go on where it
ends. Sources: the DWARF standards, 2 to 5, section 7.5.1.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.errors import FormatError
    from kvmtool.types.dwarf_sections import Section

_UNIT_LIMIT = 1 << 18
_WIDE = b"\xff\xff\xff\xff"  # 64-bit DWARF: the length follows in 8 bytes
_RESERVED = 0xFFFFFFF0  # lengths from here on mean something else (7.2.2)


class Unit:
    """A unit's header: it lies at [offset, end), its first entry at `first`."""

    __slots__ = (
        *("abbrev_offset", "end", "first", "offset", "section", "shape", "signature"),
        *("start", "type_offset"),
    )

    def __init__(self, section: Section, start: int, offset: int, end: int) -> None:
        self.section, self.start = section, start  # `start` is the offset of the section's start
        self.offset, self.end = offset, end
        self.shape = Shape(0, 0, 0)
        self.abbrev_offset = self.first = self.type_offset = 0
        self.signature: bytes | None = None

    def bad(self, offset: int, message: str) -> FormatError:
        """The error for what stands at `offset`."""
        return self.section.bad(offset - self.start, message)


class Units:
    """All units, in the order of their offsets; headers are read when one is first asked for."""

    def __init__(self, sections: Mapping[str, Section], byteorder: str) -> None:
        self._info, self._types = sections["__debug_info"], sections.get("__debug_types")
        self._order: Literal["little", "big"] = "little" if byteorder == "<" else "big"

    @cached_property
    def all(self) -> list[Unit]:
        """Every unit. Raises `FormatError`."""
        found = list(self._headers(self._info, 0))
        if self._types is not None:
            found += self._headers(self._types, self._info.size)
        return found

    @cached_property
    def _starts(self) -> list[int]:
        return [unit.offset for unit in self.all]

    @cached_property
    def _signatures(self) -> dict[bytes, Unit]:
        return {unit.signature: unit for unit in self.all if unit.signature is not None}

    def at(self, offset: int) -> Unit:
        """The unit whose entries hold `offset`. Raises `FormatError`."""
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and self.all[index].first <= offset < self.all[index].end:
            return self.all[index]
        raise self._info.bad(offset, "expected a debugging entry of some unit")

    def of_signature(self, signature: bytes) -> int | None:
        """The offset of the type that has this signature; None if it is not here."""
        unit = self._signatures.get(signature)
        return None if unit is None else unit.type_offset

    def _headers(self, section: Section, start: int) -> Iterator[Unit]:
        at = 0
        for _ in range(_UNIT_LIMIT):
            if at >= section.size:
                return
            unit = self._header(section, start, at)
            yield unit
            at = unit.end - start
        raise section.bad(at, f"expected at most {_UNIT_LIMIT:#x} units")

    def _header(self, section: Section, start: int, at: int) -> Unit:
        data = section.read(at, min(48, section.size - at))
        wide = data[:4] == _WIDE
        size, head = (8, 12) if wide else (4, 4)
        length = int.from_bytes(data[head - size : head], self._order)
        left = section.size - at - head
        if length > left or (length >= _RESERVED and not wide):
            raise section.bad(at, f"unit_length {length:#x}, expected at most {max(left, 0):#x}")
        version = int.from_bytes(data[head : head + 2], self._order)
        if not 2 <= version <= 5:
            raise section.bad(at + head, f"DWARF version {version}, expected 2 to 5")
        unit = Unit(section, start, start + at, start + at + head + length)
        try:
            self._rest_of_header(unit, data, head + 2, version, size)
        except IndexError:
            raise section.bad(at, "a unit's header that the section's end cuts off") from None
        if unit.shape.address_size not in (4, 8):
            message = f"address_size {unit.shape.address_size:#x}, expected 0x4 or 0x8"
            raise section.bad(at, message)
        if unit.first > unit.end:
            raise section.bad(at, f"unit_length {length:#x} is shorter than the unit's header")
        return unit

    def _rest_of_header(self, unit: Unit, data: bytes, at: int, version: int, size: int) -> None:
        """What comes after the version, in the order of DWARF 5 or that of all before."""
        if version >= 5:
            kind, address_size, at = data[at], data[at + 1], at + 2
            unit.abbrev_offset = int.from_bytes(data[at : at + size], self._order)
            at += size
        else:
            kind = dw.UT_TYPE if unit.section is self._types else 0
            unit.abbrev_offset = int.from_bytes(data[at : at + size], self._order)
            address_size, at = data[at + size], at + size + 1
        if kind == dw.UT_TYPE:
            unit.signature = data[at : at + 8]
            at += 8
            unit.type_offset = unit.offset + int.from_bytes(data[at : at + size], self._order)
            at += size
        elif kind in (dw.UT_SKELETON, dw.UT_SPLIT_COMPILE):
            at += 8
        if at > len(data):
            raise IndexError
        unit.shape = Shape(version, address_size, size)
        unit.first = unit.offset + at
