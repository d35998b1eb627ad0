"""What CTF says of variables and functions: it numbers them in the order of the symbol table.

The objects part has one type number for each external symbol outside `__text`, the functions part a
record for each one inside. CTF holds no names for them, so both are taken at their word only if
they have exactly as many entries as the symbols want. Apple's linker sorts a table's external
symbols by name; in a table that some tool has put into another order since, the order that counts
is told by variables whose types every kernel agrees on. Source: tools/ctf/cvt/output.c of dtrace.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvmtool.nlist import N_SECT, N_TYPE, N_UNDF
from kvmtool.types.ctf_format import FUNCTION, MAX_VLEN
from kvmtool.types.ctype import Array, Function, Void, unqualified

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.macho import MachO
    from kvmtool.types.ctf import CtfTypes
    from kvmtool.types.ctf_format import CtfBody
    from kvmtool.types.ctype import CType

    Place = tuple[int, int, int]  # of a function: result, offset and count of the parameters

_T = TypeVar("_T")


class External(NamedTuple):
    """An external symbol: its name; whether it lies in `__text`; whether it is defined here."""

    name: str
    function: bool
    defined: bool = True


def symbols_of(macho: MachO) -> Iterator[External]:
    """The external symbols that CTF counts, in table order."""
    text = [section.sectname == "__text" for section in macho.sections]
    table = macho.symtab
    for entry in () if table is None else table.externals():
        kind, sect = entry.n_type & N_TYPE, entry.n_sect
        if (kind == N_SECT and sect) or (kind == N_UNDF and not sect):
            inside = 0 < sect <= len(text) and text[sect - 1]
            yield External(entry.name, inside, kind == N_SECT)


class Variables(Mapping[str, "CType"]):
    """The types of variables and functions by C name, without those that CTF leaves open."""

    def __init__(self, types: CtfTypes, body: CtfBody, symbols: Sequence[External]) -> None:
        self._types = types
        self._objects: dict[str, int] = {}
        self._functions: dict[str, Place] = {}
        order = sorted(symbols, key=lambda symbol: (not symbol.defined, symbol.name))
        numbers, places = _objects(body), _functions(body)
        orders = [symbols] if list(symbols) == order else [symbols, order]
        for candidate in orders:
            self._objects = _joined(candidate, numbers, function=False)
            self._functions = _joined(candidate, places, function=True)
            seen = [self._holds(name) for name in _WITNESSES if name in self._objects]
            if all(seen) and (seen or len(orders) == 1):
                return
        self._objects, self._functions = {}, {}

    def _holds(self, name: str) -> bool:
        """Whether the variable of that name is what it is in every kernel."""
        found = unqualified(self._types.type(self._objects[name]))
        kind = _WITNESSES[name]
        if kind == "string":
            return isinstance(found, Array) and found.target.size == 1
        return found.kind == kind

    def __getitem__(self, name: str) -> CType:
        if name in self._objects:
            return self._types.type(self._objects[name])
        result, at, count = self._functions[name]
        if count == 0 and isinstance(self._types.type(result), Void):
            return Function(Void())  # ctfconvert leaves out what those take that return nothing
        return self._types.function(result, at, count)

    def __iter__(self) -> Iterator[str]:
        yield from self._objects
        yield from self._functions

    def __len__(self) -> int:
        return len(self._objects) + len(self._functions)


# The same from 10.4 to macOS 15: osfmk/conf/version.c, bsd/kern/bsd_init.c, bsd/conf/param.c
_WITNESSES = {
    "version": "string",
    "hostname": "string",
    "kernproc": "pointer",
    "initproc": "pointer",
    "nprocs": "base",
    "maxproc": "base",
}


def _joined(
    symbols: Sequence[External], values: Sequence[_T | None], function: bool
) -> dict[str, _T]:
    names = [symbol.name.removeprefix("_") for symbol in symbols if symbol.function == function]
    if len(values) - len(names) not in (0, 1):  # one may be there to align what comes next
        return {}
    return {name: value for name, value in zip(names, values, strict=False) if value}


def _objects(body: CtfBody) -> tuple[int, ...]:
    """The type's number of each variable; 0 if it is not told."""
    start, end = body.header.objtoff, body.header.funcoff
    unit, code = (4, "I") if body.wide else (2, "H")
    count = (end - start) // unit
    found: tuple[int, ...] = Struct(f"{body.byteorder}{count}{code}").unpack_from(body.data, start)
    return found


def _functions(body: CtfBody) -> list[Place | None]:
    """(return type, body offset of the parameters' types, how many) of each; None if not told."""
    at, end = body.header.funcoff, body.header.typeoff
    unit, code = (4, "I") if body.wide else (2, "H")
    count = (end - at) // unit
    words = Struct(f"{body.byteorder}{count}{code}").unpack_from(body.data, at)
    found: list[Place | None] = []
    place = 0
    while place < count:
        kind, vlen = words[place] >> 11 & 31, words[place] & MAX_VLEN
        if kind != FUNCTION:
            found.append(None)
            place += 1
        elif place + 2 + vlen > count:
            break
        else:
            found.append((words[place + 1], at + (place + 2) * unit, vlen))
            place += 2 + vlen
    return found
