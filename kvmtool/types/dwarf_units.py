"""Units and the debugging entries (DIEs) in them, read one at a time by their offset.

Offsets of entries count from the start of `__debug_info`; those of `__debug_types` (DWARF 4) go on
where it ends. Sources: the DWARF standards, 2 to 5, section 7.5.
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING, Literal

from kvmtool.errors import FormatError
from kvmtool.types import dwarf_abbrevs as ab
from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import AbbrevTables, Shape, sleb, uleb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.types.dwarf_abbrevs import Abbrev, Step
    from kvmtool.types.dwarf_sections import Section

_PEEK = 256  # bytes read for one entry of a unit that has not been read as a whole
_KEPT = 64  # units whose bytes are kept
_UNIT_LIMIT = 1 << 18
NEST_LIMIT = 1 << 10  # entries in entries; compilers write some tens


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


class Die:
    """A debugging entry: `values` by attribute, `end` is where what follows it begins.

    A reference is an entry's offset (or the 8 bytes of a type's signature), a number an int, a
    block bytes; a name is its text, its offset in `__debug_str`, or ~ its index in the unit's part
    of `__debug_str_offs`: `DebugInfo.name` gives the text.
    """

    __slots__ = ("children", "end", "offset", "tag", "unit", "values")

    def __init__(
        self, unit: Unit, offset: int, abbrev: Abbrev, values: dict[int, int | bytes | str]
    ) -> None:
        self.unit, self.offset = unit, offset
        self.tag, self.children = abbrev.tag, abbrev.children
        self.values = values
        self.end = 0

    def number(self, attribute: int) -> int | None:
        """A constant; None where there is none, or none that is known before the program runs."""
        value = self.values.get(attribute)
        return value if isinstance(value, int) else None

    def bad(self, message: str) -> FormatError:
        """The error for this entry."""
        return self.unit.bad(self.offset, f"debugging entry: {message}")


class DebugInfo:
    """The entries of `sections`, which have `__debug_info` and `__debug_abbrev`."""

    def __init__(self, sections: Mapping[str, Section], byteorder: str) -> None:
        self.sections = sections
        self.byteorder = byteorder
        self.order: Literal["little", "big"] = "little" if byteorder == "<" else "big"
        self._abbrevs = AbbrevTables(sections["__debug_abbrev"])
        self._strings = sections.get("__debug_str")
        self._units: list[Unit] | None = None
        self._starts: list[int] = []
        self._bytes: dict[int, bytes] = {}
        self._roots: dict[int, Die] = {}
        self._signatures: dict[bytes, Unit] | None = None

    # units

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of their offsets. Raises `FormatError`."""
        if self._units is None:
            info, types = self.sections["__debug_info"], self.sections.get("__debug_types")
            found = list(self._headers(info, 0))
            if types is not None:
                found += self._headers(types, info.size)
            self._starts = [unit.offset for unit in found]
            self._units = found
        return self._units

    def _headers(self, section: Section, start: int) -> Iterator[Unit]:
        at = count = 0
        while at < section.size:
            unit = self._header(section, start, at)
            yield unit
            at = unit.end - start
            count += 1
            if count > _UNIT_LIMIT:
                raise section.bad(at, f"expected at most {_UNIT_LIMIT:#x} units")

    def _header(self, section: Section, start: int, at: int) -> Unit:
        data = section.read(at, min(48, section.size - at))
        order = self.byteorder
        try:
            wide = data[:4] == b"\xff\xff\xff\xff"
            size, head = (8, 12) if wide else (4, 4)
            length = Struct(order + ("Q" if wide else "I")).unpack_from(data, head - size)[0]
            version = Struct(order + "H").unpack_from(data, head)[0]
            unit = Unit(section, start, start + at, start + at + head + length)
            if head + length > section.size - at or (not wide and length >= 0xFFFFFFF0):
                left = section.size - at - head
                raise section.bad(at, f"unit_length {length:#x}, expected at most {left:#x}")
            if not 2 <= version <= 5:
                raise section.bad(at + head, f"DWARF version {version}, expected 2 to 5")
            self._rest_of_header(unit, data, head + 2, version, size)
        except (IndexError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise section.bad(at, "a unit's header that the section's end cuts off") from None
        if unit.shape.address_size not in (4, 8):
            message = f"address_size {unit.shape.address_size:#x}, expected 0x4 or 0x8"
            raise section.bad(at, message)
        if unit.first > unit.end:
            raise section.bad(at, f"unit_length {length:#x} is shorter than the unit's header")
        return unit

    def _rest_of_header(self, unit: Unit, data: bytes, at: int, version: int, size: int) -> None:
        """What comes after the version, which DWARF 5 orders anew (7.5.1)."""
        if len(data) < at + size + 2:
            raise IndexError
        kind = data[at] if version >= 5 else 0
        if version >= 5:
            address_size, at = data[at + 1], at + 2
        unit.abbrev_offset = int.from_bytes(data[at : at + size], self.order)
        at += size
        if version < 5:
            address_size, at = data[at], at + 1
        if kind == dw.UT_TYPE or unit.section.name == "__debug_types":
            unit.signature = data[at : at + 8]
            where = data[at + 8 : at + 8 + size]
            if len(where) < size:
                raise IndexError
            unit.type_offset = unit.offset + int.from_bytes(where, self.order)
            at += 8 + size
        elif kind in (dw.UT_SKELETON, dw.UT_SPLIT_COMPILE):
            at += 8
        unit.shape = Shape(version, address_size, size)
        unit.first = unit.offset + at

    def unit_at(self, offset: int) -> Unit:
        """The unit whose entries hold `offset`. Raises `FormatError`."""
        units = self.units
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and units[index].first <= offset < units[index].end:
            return units[index]
        raise self.sections["__debug_info"].bad(offset, "expected a debugging entry of some unit")

    def of_signature(self, signature: bytes) -> int | None:
        """The offset of the type that has this signature; None if it is not here."""
        if self._signatures is None:
            self._signatures = {u.signature: u for u in self.units if u.signature is not None}
        unit = self._signatures.get(signature)
        return None if unit is None else unit.type_offset

    def root(self, unit: Unit) -> Die:
        """The unit's first entry, which tells its language."""
        if unit.offset not in self._roots:
            self._roots[unit.offset] = self.die(unit.first, unit)
        return self._roots[unit.offset]

    def cplusplus(self, unit: Unit) -> bool:
        """Whether names may lie in other names."""
        return self.root(unit).number(dw.AT_LANGUAGE) in dw.CPLUSPLUS

    def bytes_of(self, unit: Unit) -> bytes:
        """All of the unit's bytes, from its header on."""
        data = self._bytes.pop(unit.offset, None)
        if data is None:
            data = unit.section.read(unit.offset - unit.start, unit.end - unit.offset)
            if len(self._bytes) >= _KEPT:
                del self._bytes[next(iter(self._bytes))]
        self._bytes[unit.offset] = data
        return data

    def abbrevs(self, unit: Unit) -> dict[int, Abbrev]:
        """What the unit's codes stand for."""
        return self._abbrevs.table(unit.abbrev_offset, unit.shape)

    # entries

    def die(self, offset: int, unit: Unit | None = None) -> Die:
        """The entry at `offset`. Raises `FormatError`, also where none begins that is known."""
        unit = self.unit_at(offset) if unit is None else unit
        if not unit.first <= offset < unit.end:
            raise unit.bad(offset, "expected a debugging entry inside its unit")
        data = self._bytes.get(unit.offset)
        if data is None:
            chunk = unit.section.read(offset - unit.start, min(_PEEK, unit.end - offset))
            try:
                found = self._read(unit, chunk, offset, offset)
            except (IndexError, ValueError):
                found = None  # longer than that, or damaged: the whole unit tells
            if found is not None:
                return found
        found = self._checked(unit, self.bytes_of(unit), unit.offset, offset)
        if found is None:
            raise unit.bad(offset, "expected a debugging entry, got the end of a list of them")
        return found

    def children(self, die: Die) -> Iterator[Die]:
        """The entries directly inside `die`, in order. Raises `FormatError`."""
        if not die.children:
            return
        unit, data, at = die.unit, self.bytes_of(die.unit), die.end
        while at < unit.end:
            child = self._checked(unit, data, unit.offset, at)
            if child is None:
                return
            yield child
            at = self._after(child, data) if child.children else child.end
        raise die.bad("its list of entries has no end")

    def _after(self, die: Die, data: bytes) -> int:
        """Where the entry behind `die` and all that is inside it begins."""
        sibling = die.values.get(dw.AT_SIBLING)
        if isinstance(sibling, int):
            if not die.end <= sibling <= die.unit.end:
                raise die.bad(f"DW_AT_sibling {sibling:#x} does not lead forward in its unit")
            return sibling
        unit, at, depth = die.unit, die.end, 1
        while depth and at < unit.end:
            inner = self._checked(unit, data, unit.offset, at)
            if inner is None:
                depth, at = depth - 1, at + 1
                continue
            sibling = inner.values.get(dw.AT_SIBLING)
            if inner.children and isinstance(sibling, int) and inner.end <= sibling <= unit.end:
                at = sibling
                continue
            depth, at = depth + inner.children, inner.end
            if depth > NEST_LIMIT:
                raise inner.bad(f"more than {NEST_LIMIT} entries in each other")
        return at

    def _checked(self, unit: Unit, data: bytes, base: int, offset: int) -> Die | None:
        try:
            return self._read(unit, data, base, offset)
        except IndexError:
            raise unit.bad(offset, "a debugging entry that its unit's end cuts off") from None
        except ValueError as error:
            if isinstance(error, FormatError):
                raise
            raise unit.bad(offset, f"debugging entry: {error}") from None

    def _read(self, unit: Unit, data: bytes, base: int, offset: int) -> Die | None:
        """The entry at `offset`, `data` beginning at `base`; None for the end of a list."""
        at = offset - base
        code = data[at]
        if code < 0x80:
            at += 1
        else:
            code, at = uleb(data, at)
        if not code:
            return None
        abbrev = self.abbrevs(unit).get(code)
        if abbrev is None:
            raise unit.bad(offset, f"abbreviation code {code:#x}, which its unit does not have")
        values: dict[int, int | bytes | str] = {}
        order = self.order
        for step in abbrev.steps:
            action, attribute, size = step
            if action == ab.SKIP:
                at += size
            elif action == ab.NUMBER or action == ab.STRP:
                values[attribute] = int.from_bytes(data[at : at + size], order)
                at += size
            elif action == ab.CONSTANT:
                values[attribute] = size
            elif action == ab.REFERENCE:
                number = int.from_bytes(data[at : at + size], order)
                values[attribute] = unit.offset + number
                at += size
            else:
                at = self._other(unit, data, at, step, values)
        if at > len(data):
            raise IndexError
        die = Die(unit, offset, abbrev, values)
        die.end = base + at
        return die

    def _other(
        self,
        unit: Unit,
        data: bytes,
        at: int,
        step: Step,
        values: dict[int, int | bytes | str],
    ) -> int:
        """The less common steps; where they end."""
        action, attribute, size = step
        value: int | bytes | str
        if action == ab.STRING:
            end = data.find(b"\0", at)
            if end < 0:
                raise IndexError
            value, at = data[at:end].decode("utf-8", "backslashreplace"), end + 1
        elif action == ab.UDATA or action == ab.REF_UDATA:
            value, at = uleb(data, at)
            value += unit.offset if action == ab.REF_UDATA else 0
        elif action == ab.SDATA:
            value, at = sleb(data, at)
        elif action == ab.BLOCK_FIXED or action == ab.BLOCK_ULEB:
            if action == ab.BLOCK_ULEB:
                length, at = uleb(data, at)
            else:
                length = int.from_bytes(data[at : at + size], self.order)
                at += size
            value, at = data[at : at + length], at + length
        elif action == ab.INDIRECT:
            form, at = uleb(data, at)
            if form in (dw.FORM_INDIRECT, dw.FORM_IMPLICIT_CONST):
                raise ValueError(f"form {form:#x} inside DW_FORM_indirect")
            return self._indirect(unit, data, at, ab.step_of(attribute, form, unit.shape), values)
        elif action == ab.STRX_ULEB:
            value, at = uleb(data, at)
            value = ~value
        else:
            raw = data[at : at + size]
            at += size
            value = self._fixed(unit, action, raw)
        if attribute:
            values[attribute] = value
        return at

    def _indirect(
        self,
        unit: Unit,
        data: bytes,
        at: int,
        step: Step,
        values: dict[int, int | bytes | str],
    ) -> int:
        action, attribute, size = step
        if action == ab.SKIP:
            return at + size
        if action == ab.CONSTANT:
            values[attribute] = size
            return at
        if action in (ab.NUMBER, ab.STRP, ab.REFERENCE):
            number = int.from_bytes(data[at : at + size], self.order)
            values[attribute] = number + (unit.offset if action == ab.REFERENCE else 0)
            return at + size
        return self._other(unit, data, at, step, values)

    def _fixed(self, unit: Unit, action: int, raw: bytes) -> int | bytes | str:
        if action == ab.SIGNATURE:
            return raw
        number = int.from_bytes(raw, self.order)
        if action == ab.LINE_STRP:
            lines = self.sections.get("__debug_line_str")
            if lines is None:
                raise ValueError("DW_FORM_line_strp, but there is no __debug_line_str")
            return lines.string(number)
        if action == ab.STRX:
            return ~number
        if action == ab.REF_ADDR:
            return number
        raise ValueError("a form that leads to a supplementary file, which Mach-O does not have")

    # names

    def name(self, die: Die, attribute: int = dw.AT_NAME) -> str | None:
        """The entry's name; None without one. Raises `FormatError`."""
        value = die.values.get(attribute)
        if isinstance(value, int):
            if value < 0:
                value = self._indexed(die, ~value)
            if self._strings is None:
                raise die.bad("a string's offset, but there is no __debug_str")
            value = self._strings.string(value)
        return value if isinstance(value, str) and value else None

    def _indexed(self, die: Die, index: int) -> int:
        """The offset of the string of that index in the unit's part of `__debug_str_offs`."""
        offsets = self.sections.get("__debug_str_offs")
        if offsets is None:
            raise die.bad("an indexed string, but there is no __debug_str_offs")
        size = die.unit.shape.offset_size
        base = self.root(die.unit).number(dw.AT_STR_OFFSETS_BASE)
        raw = offsets.read((2 * size if base is None else base) + index * size, size)
        return int.from_bytes(raw, self.order)
