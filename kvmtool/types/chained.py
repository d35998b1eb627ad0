"""Two sources of types as one: what the first does not say, the second answers.

An object file holds the few structures it uses, and of many of those only that they exist; the
built-in layouts know where the members of the rest lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.types.ctype import Array, Compound, Enum, Pointer, Typedef
from kvmtool.types.model import TypeTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtool.types.ctype import CType
    from kvmtool.types.flatten import Struct
    from kvmtool.types.model import TypeSource


class Chained:
    """A `TypeSource`: `first`, and `then` for what that does not define."""

    def __init__(self, first: TypeSource, then: TypeSource) -> None:
        """`then` must be of the same byte order and word size: offsets are mixed by name."""
        self.first, self.then = first, then
        self.name = first.name
        self.origin = f"{first.origin}; what that lacks: {then.name}, {then.origin}"
        self.byteorder, self.pointer_size = first.byteorder, first.pointer_size

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`; a mere declaration in the first gives way to a definition."""
        found = self.first.find(kind, name)
        if found is not None and not _declared(found):
            return found
        other = self.then.find(kind, name)
        return found if other is None or (found is not None and _declared(other)) else other

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        return dict.fromkeys((*self.first.names(kind), *self.then.names(kind)))

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`; one that only `then` knows leads to the first's structures."""
        found = self.first.variable(name)
        if found is not None:
            return found
        other = self.then.variable(name)
        return None if other is None else self._ours(other)

    def _ours(self, ctype: CType) -> CType:
        """`ctype` of `then`, leading to the types that `find` finds by the same names."""
        if isinstance(ctype, Pointer):
            return Pointer(lambda: self._ours(ctype.target), ctype.size, ctype.ptrauth)
        if isinstance(ctype, Array):
            return Array(lambda: self._ours(ctype.target), ctype.count)
        if isinstance(ctype, (Compound, Enum)) and ctype.tag:
            return self.find("tag", ctype.tag) or ctype
        if isinstance(ctype, Compound):
            fields = [field._replace(type=self._ours(field.type)) for field in ctype.fields]
            return Compound(ctype.kind, None, ctype.size, fields)
        if isinstance(ctype, Typedef):
            return self.find("typedef", ctype.name) or ctype
        return ctype


def _declared(ctype: CType) -> bool:
    return isinstance(ctype, (Compound, Enum)) and ctype.size is None


def chain(exact: TypeSource, below: TypeTable) -> TypeTable:
    """The types of `exact`, and those of `below` for what it lacks."""
    alone = TypeTable(exact)

    def flat(name: str) -> Struct | None:
        found = alone.find_struct(name)
        return below.find_struct(name) if found is None else found

    return TypeTable(Chained(exact, below.source), flat)


def origin_of(source: TypeSource, ctype: CType) -> str:
    """Which types `ctype`, that `source` found, is one of, and where these come from."""
    while isinstance(source, Chained):
        known = True  # what has no name of its own is written in C: "struct proc *"
        if isinstance(ctype, (Typedef, Compound, Enum)) and ctype.name:
            kind = "typedef" if isinstance(ctype, Typedef) else "tag"
            found = source.first.find(kind, ctype.name)
            known = found is not None and (not _declared(found) or ctype.size is None)
        source = source.first if known else source.then
    # readers of files name the file in both
    return source.origin if source.name in source.origin else f"{source.name}: {source.origin}"
