"""Debugging entries (DIEs), read one at a time by their offset. Only what a type needs is kept.

Sources: the DWARF standards, 2 to 5, sections 7.5.3 to 7.5.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvmtool.errors import FormatError
from kvmtool.types import dwarf_abbrevs as ab
from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import AbbrevTables, sleb, uleb
from kvmtool.types.dwarf_units import Units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmtool.types.dwarf_abbrevs import Abbrev, Step
    from kvmtool.types.dwarf_sections import Section
    from kvmtool.types.dwarf_units import Unit

    Values = dict[int, int | bytes | str]

_PEEK = 256  # bytes read for one entry of a unit that has not been read as a whole
_KEPT = 64  # units whose bytes are kept
NEST_LIMIT = 1 << 10  # entries in entries; compilers write some tens


class Die:
    """A debugging entry: `values` by attribute, `end` is where what follows it begins.

    A reference is an entry's offset (or the 8 bytes of a type's signature), a number an int, a
    block bytes; a name is its text, its offset in `__debug_str`, or ~ its index in the unit's part
    of `__debug_str_offs`: `DebugInfo.name` gives the text.
    """

    __slots__ = ("children", "end", "offset", "tag", "unit", "values")

    def __init__(self, unit: Unit, offset: int, abbrev: Abbrev, values: Values, end: int) -> None:
        self.unit, self.offset, self.end = unit, offset, end
        self.tag, self.children = abbrev.tag, abbrev.children
        self.values = values

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
        self.sections, self.byteorder = sections, byteorder
        self.order: Literal["little", "big"] = "little" if byteorder == "<" else "big"
        self.units = Units(sections, byteorder)
        self._abbrevs = AbbrevTables(sections["__debug_abbrev"])
        self._strings = sections.get("__debug_str")
        self._bytes: dict[int, bytes] = {}
        self._roots: dict[int, Die] = {}

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
        unit = self.units.at(offset) if unit is None else unit
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
        values: Values = {}
        at = self._values(unit, data, at, abbrev.steps, values)
        if at > len(data):
            raise IndexError
        return Die(unit, offset, abbrev, values, base + at)

    def _values(
        self, unit: Unit, data: bytes, at: int, steps: Sequence[Step], values: Values
    ) -> int:
        """What `steps` read from `at` on; where they end, which may be behind the data's end."""
        order = self.order
        for step in steps:
            action, attribute, size = step
            if action == ab.SKIP:
                at += size
            elif action == ab.NUMBER or action == ab.STRP:
                values[attribute] = int.from_bytes(data[at : at + size], order)
                at += size
            elif action == ab.CONSTANT:
                values[attribute] = size
            elif action == ab.REFERENCE:
                values[attribute] = unit.offset + int.from_bytes(data[at : at + size], order)
                at += size
            elif action == ab.INDIRECT:
                form, at = uleb(data, at)
                if form in (dw.FORM_INDIRECT, dw.FORM_IMPLICIT_CONST):
                    raise ValueError(f"form {form:#x} inside DW_FORM_indirect")
                inner = ab.step_of(attribute, form, unit.shape)
                at = self._values(unit, data, at, (inner,), values)
            else:
                value, at = self._other(unit, data, at, step)
                if attribute:
                    values[attribute] = value
        return at

    def _other(self, unit: Unit, data: bytes, at: int, step: Step) -> tuple[int | bytes | str, int]:
        """What the less common steps read, and where they end."""
        action, _, size = step
        if action == ab.STRING:
            end = data.find(b"\0", at)
            if end < 0:
                raise IndexError
            return data[at:end].decode("utf-8", "backslashreplace"), end + 1
        if action == ab.UDATA:
            return uleb(data, at)
        if action == ab.SDATA:
            return sleb(data, at)
        if action == ab.BLOCK_ULEB:
            length, at = uleb(data, at)
            return data[at : at + length], at + length
        if action == ab.BLOCK_FIXED:
            length, at = int.from_bytes(data[at : at + size], self.order), at + size
            return data[at : at + length], at + length
        if action == ab.REF_UDATA:
            number, at = uleb(data, at)
            return unit.offset + number, at
        if action == ab.STRX_ULEB:
            number, at = uleb(data, at)
            return ~number, at
        return self._fixed(action, data[at : at + size]), at + size

    def _fixed(self, action: int, raw: bytes) -> int | bytes | str:
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
            value = self.text(value)
        return value if isinstance(value, str) and value else None

    def text(self, offset: int) -> str:
        """The string at `offset` in `__debug_str`. Raises `FormatError`."""
        if self._strings is None:
            message = f"a string at {offset:#x}, but there is no __debug_str"
            raise self.sections["__debug_info"].bad(0, message)
        return self._strings.string(offset)

    def _indexed(self, die: Die, index: int) -> int:
        """The offset of the string of that index in the unit's part of `__debug_str_offs`."""
        offsets = self.sections.get("__debug_str_offs")
        if offsets is None:
            raise die.bad("an indexed string, but there is no __debug_str_offs")
        size = die.unit.shape.offset_size
        raw = offsets.read(self.strings_base(die.unit) + index * size, size)
        return int.from_bytes(raw, self.order)

    def strings_base(self, unit: Unit) -> int:
        """Where the unit's part of `__debug_str_offs` begins, behind its header."""
        base = self.root(unit).number(dw.AT_STR_OFFSETS_BASE)
        return 2 * unit.shape.offset_size if base is None else base
