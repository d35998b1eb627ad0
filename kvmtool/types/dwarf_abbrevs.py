"""Abbreviation tables, compiled: for each kind of entry, the steps that read it.

DWARF 5, section 7.5.3. What is not wanted is skipped in one step as far as its size is known from
the form alone, which is most of every entry a compiler writes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.types import dwarf_numbers as dw

if TYPE_CHECKING:
    from kvmtool.errors import FormatError
    from kvmtool.types.dwarf_sections import Section

# What a step does. SKIP passes `size` bytes over; the others read their attribute.
SKIP, NUMBER, REFERENCE, REF_ADDR, STRP, STRING, SDATA, UDATA, REF_UDATA, CONSTANT = range(10)
BLOCK_FIXED, BLOCK_ULEB, SIGNATURE, LINE_STRP, STRX, STRX_ULEB, INDIRECT, FOREIGN = range(10, 18)

_ULEB = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_DECLARATION = re.compile(
    rb"(?s)(%b)(%b)([\x00\x01])((?:(?!\0\0)%b(?:\x21%b|(?!\x21)%b))*+)\0\0" % ((_ULEB,) * 5)
)
_PAIR = re.compile(rb"(?s)(%b)(?:\x21(%b)|(?!\x21)(%b))" % (_ULEB, _ULEB, _ULEB))

_FIXED = {
    **dict.fromkeys((dw.FORM_DATA1, dw.FORM_FLAG, dw.FORM_REF1, dw.FORM_STRX1, dw.FORM_ADDRX1), 1),
    **dict.fromkeys((dw.FORM_DATA2, dw.FORM_REF2, dw.FORM_STRX2, dw.FORM_ADDRX2), 2),
    **dict.fromkeys((dw.FORM_STRX3, dw.FORM_ADDRX3), 3),
    **dict.fromkeys((dw.FORM_DATA4, dw.FORM_REF4, dw.FORM_STRX4, dw.FORM_ADDRX4), 4),
    dw.FORM_REF_SUP4: 4,
    **dict.fromkeys((dw.FORM_DATA8, dw.FORM_REF8, dw.FORM_REF_SIG8, dw.FORM_REF_SUP8), 8),
    dw.FORM_DATA16: 16,
    **dict.fromkeys((dw.FORM_FLAG_PRESENT, dw.FORM_IMPLICIT_CONST), 0),
}
_OFFSETS = (dw.FORM_STRP, dw.FORM_SEC_OFFSET, dw.FORM_LINE_STRP, dw.FORM_STRP_SUP)
_ULEBS = (dw.FORM_ADDRX, dw.FORM_LOCLISTX, dw.FORM_RNGLISTX)
_BLOCK_SIZES = {dw.FORM_BLOCK1: 1, dw.FORM_BLOCK2: 2, dw.FORM_BLOCK4: 4}
_REFERENCE_FORMS = (dw.FORM_REF1, dw.FORM_REF2, dw.FORM_REF4, dw.FORM_REF8)
_STRX = (dw.FORM_STRX1, dw.FORM_STRX2, dw.FORM_STRX3, dw.FORM_STRX4)
_SUPPLEMENTARY = (dw.FORM_REF_SUP4, dw.FORM_REF_SUP8, dw.FORM_STRP_SUP)


class Shape(NamedTuple):
    """How a unit writes numbers: its DWARF version, bytes of an address and of an offset."""

    version: int
    address_size: int
    offset_size: int


class Step(NamedTuple):
    """`action` as above, for `attribute`; `size` in bytes (of a CONSTANT, its value)."""

    action: int
    attribute: int
    size: int


class Abbrev:
    """One kind of entry: its tag, and whether entries inside it follow."""

    __slots__ = ("_specs", "_steps", "children", "tag")

    def __init__(self, tag: int, children: bool, specs: bytes, shape: Shape) -> None:
        self.tag, self.children = tag, children
        self._specs = (specs, shape)
        self._steps: tuple[Step, ...] | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What reads an entry. Raises ValueError for a form that no standard has."""
        if self._steps is None:
            self._steps = _compile(*self._specs)
        return self._steps


def uleb(data: bytes, at: int) -> tuple[int, int]:
    """The unsigned LEB128 number at `at`, and where it ends; IndexError behind the end."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 70:
            raise ValueError("a LEB128 number of more than 10 bytes")


def sleb(data: bytes, at: int) -> tuple[int, int]:
    """The signed LEB128 number at `at`, and where it ends; IndexError behind the end."""
    value, end = uleb(data, at)
    bits = 7 * (end - at)
    return value - (1 << bits) if value >> (bits - 1) & 1 else value, end


def step_of(attribute: int, form: int, shape: Shape, constant: int = 0) -> Step:
    """The step that reads `attribute` in `form`. Raises ValueError for an unknown form."""
    size = size_of_form(form, shape)
    if attribute in dw.WANTED:
        action = _action(form, shape)
        if form == dw.FORM_IMPLICIT_CONST:
            return Step(CONSTANT, attribute, constant)
        if form == dw.FORM_FLAG_PRESENT:
            return Step(CONSTANT, attribute, 1)
        return Step(action, attribute, _BLOCK_SIZES.get(form, max(size, 0)))
    if size >= 0:
        return Step(SKIP, 0, size)
    return Step(_action(form, shape), 0, _BLOCK_SIZES.get(form, 0))


def size_of_form(form: int, shape: Shape) -> int:
    """Bytes of a value in `form`; -1 where that varies. Raises ValueError for an unknown form."""
    if form in _FIXED:
        return _FIXED[form]
    if form in _OFFSETS:
        return shape.offset_size
    if form == dw.FORM_ADDR:
        return shape.address_size
    if form == dw.FORM_REF_ADDR:  # an address in DWARF 2
        return shape.address_size if shape.version == 2 else shape.offset_size
    return -1


_ACTIONS = {
    dw.FORM_STRP: STRP,
    dw.FORM_STRING: STRING,
    dw.FORM_SDATA: SDATA,
    dw.FORM_UDATA: UDATA,
    dw.FORM_REF_UDATA: REF_UDATA,
    dw.FORM_REF_ADDR: REF_ADDR,
    dw.FORM_REF_SIG8: SIGNATURE,
    dw.FORM_LINE_STRP: LINE_STRP,
    dw.FORM_STRX: STRX_ULEB,
    dw.FORM_INDIRECT: INDIRECT,
    dw.FORM_BLOCK: BLOCK_ULEB,
    dw.FORM_EXPRLOC: BLOCK_ULEB,
    **dict.fromkeys(_BLOCK_SIZES, BLOCK_FIXED),
    **dict.fromkeys(_REFERENCE_FORMS, REFERENCE),
    **dict.fromkeys(_STRX, STRX),
    **dict.fromkeys(_SUPPLEMENTARY, FOREIGN),
    **dict.fromkeys(_ULEBS, UDATA),
}


def _action(form: int, shape: Shape) -> int:
    action = _ACTIONS.get(form)
    if action is None:
        if size_of_form(form, shape) < 0:
            raise ValueError(f"form {form:#x}, which no DWARF up to 5 has")
        return NUMBER
    return action


def _compile(specs: bytes, shape: Shape) -> tuple[Step, ...]:
    """Steps of the attributes in `specs`, what is skipped in a row as one."""
    steps: list[Step] = []
    for match in _PAIR.finditer(specs):
        attribute = uleb(match.group(1), 0)[0]
        if match.group(2) is not None:
            step = step_of(attribute, dw.FORM_IMPLICIT_CONST, shape, sleb(match.group(2), 0)[0])
        else:
            step = step_of(attribute, uleb(match.group(3), 0)[0], shape)
        if step.action == SKIP and steps and steps[-1].action == SKIP:
            step = Step(SKIP, 0, steps.pop().size + step.size)
        if step != (SKIP, 0, 0):
            steps.append(step)
    return tuple(steps)


class AbbrevTables:
    """The tables of `__debug_abbrev`, each read when a unit first names it."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._data: bytes | None = None
        self._tables: dict[tuple[int, Shape], dict[int, Abbrev]] = {}
        # Tables that lie apart are together no longer than the section, whatever shapes there are
        self._budget = 8 * section.size + 64

    def table(self, offset: int, shape: Shape) -> dict[int, Abbrev]:
        """Entries' kinds by code. Raises `FormatError`."""
        found = self._tables.get((offset, shape))
        if found is None:
            found = self._tables[offset, shape] = self._read(offset, shape)
        return found

    def _read(self, offset: int, shape: Shape) -> dict[int, Abbrev]:
        section = self._section
        if offset >= section.size:
            raise section.bad(offset, f"a table's offset, expected less than {section.size:#x}")
        data = self._data = section.all() if self._data is None else self._data
        found: dict[int, Abbrev] = {}
        at = offset
        while at < len(data) and data[at]:
            match = _DECLARATION.match(data, at)
            if match is None:
                raise section.bad(at, "expected an abbreviation: code, tag, children, attributes")
            code, tag = uleb(match.group(1), 0)[0], uleb(match.group(2), 0)[0]
            children = match.group(3) == b"\1"
            found.setdefault(code, Abbrev(tag, children, match.group(4), shape))
            at = match.end()
        self._budget -= at - offset
        if self._budget < 0:
            raise self._overlap(offset)
        return found

    def _overlap(self, offset: int) -> FormatError:
        return self._section.bad(offset, "abbreviation tables that lie in each other")
