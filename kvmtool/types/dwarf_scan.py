"""Every named type and variable of a unit, by walking all its entries: the slow way.

What has an accelerator table is looked up there. Walked are .o files without one, and the units of
C++, where only the entries around a name tell its full name ("OSMetaClass::ExpansionData").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from kvmtool.types import dwarf_abbrevs as ab
from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.dwarf_abbrevs import uleb
from kvmtool.types.dwarf_dies import NEST_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.dwarf_abbrevs import Abbrev, Shape
    from kvmtool.types.dwarf_dies import DebugInfo, Die
    from kvmtool.types.dwarf_units import Unit

ANONYMOUS = "(anonymous namespace)"
_SCOPES = (dw.TAG_NAMESPACE, dw.TAG_STRUCTURE, dw.TAG_CLASS, dw.TAG_UNION)
_BODIES = (dw.TAG_SUBPROGRAM, dw.TAG_LEXICAL_BLOCK, dw.TAG_INLINED_SUBROUTINE)
_SIZED = (
    *(ab.SKIP, ab.NUMBER, ab.STRP, ab.REFERENCE, ab.REF_ADDR),
    *(ab.SIGNATURE, ab.LINE_STRP, ab.STRX),
)
_PARTS = (dw.AT_NAME, dw.AT_BYTE_SIZE, dw.AT_DECL_LINE, dw.AT_DECLARATION)
_SLOW = (dw.AT_SPECIFICATION, dw.AT_LINKAGE_NAME, dw.AT_MIPS_LINKAGE_NAME)
_NO_PART = slice(0, 0)


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
    """How to pass over an entry: `size` bytes after the code, or -1 where that is not so simple.

    With `block` the length of an expression stands there, and behind the expression `rest` bytes
    more. `read` is whether the entry may have a name that counts, `local` whether it does inside a
    function; `body` is whether it is one. If all that is needed is in the first `size` bytes,
    `quick` is its kind, and `parts` where name, size, line and declaration stand.
    """

    size: int
    block: bool
    rest: int
    children: bool
    read: bool
    local: bool
    body: bool
    quick: str | None
    parts: tuple[slice, slice, slice, slice]


class Scanner:
    """Walks units; what it learns of their kinds of entries and of strings is kept."""

    def __init__(self, info: DebugInfo) -> None:
        self._info = info
        self._plans: dict[tuple[int, Shape, bool], tuple[dict[int, _Plan], list[int]]] = {}
        self._strings: dict[int, str] = {}

    def scan(self, unit: Unit) -> Iterator[Named]:
        """The named entries of `unit`, in order. Raises `FormatError`."""
        info, data, base = self._info, self._info.bytes_of(unit), unit.offset
        nested = info.cplusplus(unit)
        plans, leaves = self._planned(unit, nested)
        at, end = unit.first - base, len(data)
        scope, scopes = Scope("", False), list[Scope]()
        while at < end:
            code = data[at]
            if code < 0x80:
                if leaves[code]:  # most of all entries
                    at += leaves[code]
                    continue
                start, at = at, at + 1
            else:
                start, (code, at) = at, _code(unit, data, at)
            if not code:
                if scopes:  # else it is padding behind the unit's entries
                    scope = scopes.pop()
                continue
            plan = plans.get(code) or self._refuse(unit, base + start)
            inner = Scope(scope.prefix, True) if plan.body else scope
            counts = plan.local if scope.local else plan.read
            if plan.size < 0 or (counts and (plan.quick is None or (nested and plan.children))):
                die = info.die(base + start, unit)
                at = die.end - base
                if counts:
                    yield from _named(info, die, scope)
                    inner = _scope(info, die, scope, nested) if plan.children else scope
            else:
                if counts:
                    yield from self._quick(plan, data[at : at + plan.size], base + start, scope)
                at += plan.size
                if plan.block:
                    length, at = _code(unit, data, at)
                    at += length + plan.rest
            if plan.children:
                scopes.append(scope)
                if len(scopes) > NEST_LIMIT:
                    raise unit.bad(base + start, f"more than {NEST_LIMIT} entries in each other")
                scope = inner
        if at > end:
            raise unit.bad(unit.end, "a debugging entry that its unit's end cuts off")

    def _refuse(self, unit: Unit, offset: int) -> NoReturn:
        self._info.die(offset, unit)  # says what is wrong with its code or its forms
        raise unit.bad(offset, "expected an entry of a known kind")

    def _planned(self, unit: Unit, nested: bool) -> tuple[dict[int, _Plan], list[int]]:
        """Plans by code; and by code the size of entries that are only passed over, or 0."""
        key = (unit.abbrev_offset, unit.shape, nested)
        if key not in self._plans:
            plans = {}
            for code, abbrev in self._info.abbrevs(unit).items():
                try:
                    plans[code] = _plan(abbrev, nested)
                except ValueError:
                    continue  # it is an error where an entry has that code
            leaves = [0] * 0x80
            for code, plan in plans.items():
                if (
                    0 < code < 0x80
                    and plan.size >= 0
                    and not (plan.block or plan.read or plan.children)
                ):
                    leaves[code] = 1 + plan.size
            self._plans[key] = (plans, leaves)
        return self._plans[key]

    def _quick(self, plan: _Plan, raw: bytes, offset: int, scope: Scope) -> Iterator[Named]:
        """What `_named` gives, of an entry with all its values at fixed places."""
        order = self._info.order
        name, size, line, declared = (raw[part] for part in plan.parts)
        if plan.quick is None or not name:
            return
        string = int.from_bytes(name, order)
        text = self._strings.get(string)
        if text is None:
            text = self._strings[string] = self._info.text(string)
        form = (
            int.from_bytes(size, order) if size else None,
            int.from_bytes(line, order) if line else None,
        )
        rank = int(scope.local)
        if any(declared):
            rank = 2 if plan.quick == "variable" else 3
        if text:
            yield Named(plan.quick, scope.prefix + text, offset, rank, form)


def _code(unit: Unit, data: bytes, at: int) -> tuple[int, int]:
    try:
        return uleb(data, at)
    except (IndexError, ValueError):
        raise unit.bad(unit.offset + at, "expected an abbreviation's code") from None


def _plan(abbrev: Abbrev, nested: bool) -> _Plan:
    sizes = [0, 0]  # before and behind an expression
    block, quick, size = False, True, -1
    places = dict.fromkeys(_PARTS, _NO_PART)
    for step in abbrev.steps:
        quick = quick and step.attribute not in _SLOW
        if step.action in _SIZED:
            if step.attribute in places:
                quick = quick and not block and step.action in (ab.STRP, ab.NUMBER)
                places[step.attribute] = slice(sizes[0], sizes[0] + step.size)
            sizes[block] += step.size
        elif step.action == ab.CONSTANT:
            quick = quick and step.attribute not in places
        elif step.action == ab.BLOCK_ULEB and not block:
            block = True
        else:
            break
    else:
        size = sizes[0]
    kind = dw.KIND_OF.get(abbrev.tag)
    read = kind is not None or (abbrev.tag == dw.TAG_NAMESPACE and nested)
    # a variable inside a function counts if it is not on a stack
    told = {step.attribute for step in abbrev.steps}
    local = read and (abbrev.tag != dw.TAG_VARIABLE or dw.AT_EXTERNAL in told)
    body = abbrev.tag in _BODIES
    name, length, line, declared = places.values()
    parts = (name, length, line, declared)
    how = kind if quick and size >= 0 else None
    return _Plan(size, block, sizes[1], abbrev.children, read, local, body, how, parts)


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
