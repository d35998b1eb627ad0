"""`__debug_pubtypes` and `__debug_pubnames`: the lists of names that gcc wrote, one for each unit.

Source: DWARF 2 to 4, section 6.1.1.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.dwarf_sections import Section

_SET_LIMIT = 1 << 18


class PubSet(NamedTuple):
    """The names of one unit: entries of `pattern` in [start, end)."""

    unit: int
    start: int
    end: int
    wide: bool


class PubTable:
    """All sets of one section. Raises `FormatError` for what cannot be one."""

    def __init__(self, section: Section, byteorder: str) -> None:
        self._section, self._order = section, byteorder
        self._sets = list(self._read_sets())

    def _read_sets(self) -> Iterator[PubSet]:
        section, order, at, count = self._section, self._order, 0, 0
        while at + 4 <= section.size:
            wide = section.read(at, 4) == b"\xff\xff\xff\xff"
            layout = Struct(order + ("4xQHQQ" if wide else "IHII"))
            if at + layout.size > section.size:
                raise section.bad(at, "a header that the section's end cuts off")
            length, version, unit, _ = layout.unpack(section.read(at, layout.size))
            end = at + (12 if wide else 4) + length
            if not at + layout.size <= end <= section.size:
                raise section.bad(at, f"unit_length {length:#x} leads outside of the section")
            if version != 2:
                raise section.bad(at, f"version {version}, expected 2")
            yield PubSet(unit, at + layout.size, end, wide)
            at, count = end, count + 1
            if count > _SET_LIMIT:
                raise section.bad(at, f"expected at most {_SET_LIMIT:#x} units")

    def find(self, name: str) -> list[int]:
        """Offsets of the entries of that name, in order."""
        section = self._section
        needle = name.encode("utf-8", "surrogateescape") + b"\0"
        found = []
        at = section.find(needle)
        sets = iter(self._sets)
        current = next(sets, None)
        while at >= 0 and current is not None:
            if at >= current.end:
                current = next(sets, None)
                continue
            found += [offset for offset, other in self._entries(current) if other + b"\0" == needle]
            at = section.find(needle, current.end)
        return found

    def _entries(self, pub: PubSet) -> Iterator[tuple[int, bytes]]:
        """(offset of the entry, name), up to the offset 0 that ends a set."""
        size = 8 if pub.wide else 4
        word = Struct(self._order + ("Q" if pub.wide else "I"))
        pattern = re.compile(rb"(?s)(.{%d})([^\0]*)\0" % size)
        data = self._section.read(pub.start, pub.end - pub.start)
        for match in pattern.finditer(data):
            offset = word.unpack(match.group(1))[0]
            if not offset:
                return
            yield pub.unit + offset, match.group(2)
