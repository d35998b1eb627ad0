"""Every named type and variable of a unit, by walking all its entries: the slow way.

What has an accelerator table is looked up there. Walked are .o files without one, and the units of
C++, where only the entries around a name tell its full name ("OSMetaClass::ExpansionData").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.types import dwarf_abbrevs as ab
from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import uleb
from kvmtool.types.dwarf_dies import NEST_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.dwarf_abbrevs import Abbrev
    from kvmtool.types.dwarf_dies import DebugInfo, Die
    from kvmtool.types.dwarf_units import Unit

ANONYMOUS = "(anonymous namespace)"
_SCOPES = (dw.TAG_NAMESPACE, dw.TAG_STRUCTURE, dw.TAG_CLASS, dw.TAG_UNION)
_BODIES = (dw.TAG_SUBPROGRAM, dw.TAG_LEXICAL_BLOCK, dw.TAG_INLINED_SUBROUTINE)


_SIZED = (
    *(ab.SKIP, ab.NUMBER, ab.STRP, ab.REFERENCE, ab.REF_ADDR),
    *(ab.SIGNATURE, ab.LINE_STRP, ab.STRX),
)


class Named(NamedTuple):
    """A name of one `kind` ("tag", "typedef", "base", "variable"), of the entry at `offset`.

    `rank` orders entries of one name: 0 a definition, 1 one inside a function, 2 a variable and 3 a
    type that is declared only. `form` (size, line of the source) is the same for entries that
    define the same thing.
    """

    kind: str
    name: str
    offset: int
    rank: int
    form: tuple[int | None, int | None]


class Scope(NamedTuple):
    """What names inside an entry begin with, and whether it is a function's body."""

    prefix: str
    local: bool


class _Plan(NamedTuple):
    """How to pass over an entry: its size after the code if that is fixed, else -1."""

    size: int
    children: bool
    read: bool


def scan(info: DebugInfo, unit: Unit) -> Iterator[Named]:
    """The named entries of `unit`, in order. Raises `FormatError`."""
    data, base = info.bytes_of(unit), unit.offset
    nested = info.cplusplus(unit)
    plans = {code: _plan(abbrev, nested) for code, abbrev in _tried(info, unit)}
    at, end = unit.first - base, len(data)
    scope = Scope("", False)
    scopes: list[Scope] = []
    while at < end:
        code = data[at]
        start = at
        if code < 0x80:
            at += 1
        else:
            code, at = _code(unit, data, at)
        if not code:
            if not scopes:  # padding behind the unit's entries
                continue
            scope = scopes.pop()
            continue
        plan = plans.get(code)
        if plan is None:
            raise unit.bad(base + start, f"abbreviation code {code:#x}, which its unit has not")
        size, children, read = plan
        inner = scope
        if read or size < 0:
            die = info.die(base + start, unit)
            at = die.end - base
            if read:
                yield from _named(info, die, scope)
                if children:
                    inner = _scope(info, die, scope, nested)
        else:
            at += size
        if children:
            scopes.append(scope)
            if len(scopes) > NEST_LIMIT:
                raise unit.bad(base + start, f"more than {NEST_LIMIT} entries in each other")
            scope = inner


def _code(unit: Unit, data: bytes, at: int) -> tuple[int, int]:
    try:
        return uleb(data, at)
    except (IndexError, ValueError):
        raise unit.bad(unit.offset + at, "expected an abbreviation's code") from None


def _tried(info: DebugInfo, unit: Unit) -> Iterator[tuple[int, Abbrev]]:
    for code, abbrev in info.abbrevs(unit).items():
        try:
            _ = abbrev.steps
        except ValueError:
            continue  # it is an error where an entry has that code
        yield code, abbrev


def _plan(abbrev: Abbrev, nested: bool) -> _Plan:
    size = 0
    for step in abbrev.steps:
        if step.action in _SIZED:
            size += step.size
        elif step.action != ab.CONSTANT:
            size = -1
            break
    read = abbrev.tag in dw.KIND_OF or abbrev.tag in _BODIES
    if abbrev.tag == dw.TAG_NAMESPACE:
        read = nested
    return _Plan(size, abbrev.children, read)


def form_of(die: Die) -> tuple[int | None, int | None]:
    """See `Named.form`."""
    return die.number(dw.AT_BYTE_SIZE), die.number(dw.AT_DECL_LINE)


def last_part(name: str) -> str:
    """A C++ name without the scopes before it: "Inner" of "os::Base<a::b>::Inner"."""
    depth = 0
    for at in range(len(name) - 1, 0, -1):
        depth += {">": 1, "<": -1}.get(name[at], 0)
        if not depth and name[at - 1 : at + 1] == "::":
            return name[at + 1 :]
    return name


def _scope(info: DebugInfo, die: Die, scope: Scope, nested: bool) -> Scope:
    if die.tag in _BODIES:
        return Scope(scope.prefix, True)
    if not nested or die.tag not in _SCOPES:
        return scope
    name = info.name(die) or (ANONYMOUS if die.tag == dw.TAG_NAMESPACE else "")
    return Scope(f"{scope.prefix}{name}::", scope.local) if name else scope


def _named(info: DebugInfo, die: Die, scope: Scope) -> Iterator[Named]:
    kind = dw.KIND_OF.get(die.tag)
    if kind is None:
        return
    name, declared = info.name(die), bool(die.number(dw.AT_DECLARATION))
    if kind != "variable":
        rank = 3 if declared else int(scope.local)
        if name is not None:
            yield Named(kind, scope.prefix + name, die.offset, rank, form_of(die))
        return
    if scope.local and die.tag == dw.TAG_VARIABLE and not die.number(dw.AT_EXTERNAL):
        return  # on a stack
    rank = 2 if declared else int(scope.local)
    if name is not None:
        yield Named(kind, scope.prefix + name, die.offset, rank, form_of(die))
    for attribute in (dw.AT_LINKAGE_NAME, dw.AT_MIPS_LINKAGE_NAME):
        mangled = info.name(die, attribute)
        if mangled is not None and mangled != name:
            yield Named(kind, mangled, die.offset, rank, form_of(die))
