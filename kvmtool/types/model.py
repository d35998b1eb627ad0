"""What every source of types gives, and `TypeTable`, which is asked.

A reader of DWARF, CTF, ISF or of the built-in layouts is a `TypeSource`: it finds a type by name.
The table answers in both forms: whole C types (`ctype`), and flattened structures (`flatten`) with
offsets by dotted names, which is how the kernel object model asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kvmtool.errors import KvmError, NotFoundError
from kvmtool.types.ctype import Compound, unqualified
from kvmtool.types.flatten import Struct, flatten
from kvmtool.types.near import near_members, near_misses, whose_types

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtool.types.ctype import CType


class TypeSource(Protocol):
    """Where a TypeTable has its types from; one reader per file format.

    `name` says which types these are ("10.9.5 x86_64"), `origin` where they come from, `byteorder`
    is "<" or ">", `pointer_size` 4 or 8 bytes. C has three kinds of names: a "tag" (of a struct,
    union, class or enum), a "typedef", and a "base" type's own ("unsigned int").
    """

    name: str
    origin: str
    byteorder: str
    pointer_size: int

    def find(self, kind: str, name: str) -> CType | None:
        """The type of that name, its definition rather than a declaration; None if there is none.

        Raises `FormatError` where the file is damaged.
        """

    def names(self, kind: str) -> Iterable[str]:
        """All names of that kind that `find` finds."""

    def variable(self, name: str) -> CType | None:
        """The type of the kernel's variable or function of that C name; None if it is not said."""


class TypeTable:
    """The types of one kernel, each made when it is first asked for.

    `name` says which they are ("10.9.5 x86_64"), `origin` where they come from.
    """

    def __init__(
        self, source: TypeSource, flat: Callable[[str], Struct | None] | None = None
    ) -> None:
        """`flat` gives a tag's flattened structure where that is to be had more quickly."""
        self.source, self.name, self.origin = source, source.name, source.origin
        self._flat = flat or self._flattened
        self._constructs: dict[str, Any] = {}
        self._loaded: dict[str, Struct | None] = {}

    def __repr__(self) -> str:
        return f"<TypeTable {self.name}: {self.origin}>"

    def type(self, text: str) -> CType:
        """The type C calls that: "struct proc *", "pid_t", "char[17]"; a bare tag will do too.

        Raises: NotFoundError("type") with near misses, `KvmError` for what is no type's name.
        """
        from kvmtool.types.type_names import parse_type

        return parse_type(text, self.source)

    def construct(self, name: str) -> Any:
        """The structure `name` as a construct `Struct`: see `as_construct`.

        Raises: as `type`, and `KvmError` for what is no structure these types define.
        """
        from kvmtool.types.as_construct import construct_of
        from kvmtool.types.declare import declare

        if name not in self._constructs:
            found = unqualified(self.type(name))
            if not isinstance(found, Compound):
                raise KvmError(f"{name}: expected a structure, got {declare(found)}")
            self._constructs[name] = construct_of(found, self.source.byteorder)
        return self._constructs[name]

    def variable(self, name: str) -> CType | None:
        """The type of the kernel variable or function `name` (with or without its underscore).

        As in `SymbolTable.get`, "_printf" is printf before it is _printf.
        """
        found = self.source.variable(name[1:]) if name[:1] == "_" else None
        return self.source.variable(name) if found is None else found

    def struct(self, name: str) -> Struct:
        """The structure with this C tag, or typedef name of one, flattened.

        Raises: NotFoundError("structure") with near misses.
        """
        found = self.find_struct(name)
        if found is None:
            known = {*self.source.names("tag"), *self.source.names("typedef")}
            near = near_misses(name, sorted(known))
            raise NotFoundError("structure", name, near, whose_types(self.name, self.origin))
        return found

    def find_struct(self, name: str) -> Struct | None:
        """As `struct`, but None where there is no such structure."""
        if name not in self._loaded:
            self._loaded[name] = self._flat(name)
        return self._loaded[name]

    def _flattened(self, name: str) -> Struct | None:

        found = self.source.find("tag", name)
        if not isinstance(found, Compound) or not found.complete:
            alias = self.source.find("typedef", name)
            found = None if alias is None else unqualified(alias)
        return flatten(found) if isinstance(found, Compound) and found.complete else None

    def has(self, struct: str, member: str | None = None) -> bool:
        """Whether there is such a structure, and such a member in it (bit-fields included)."""
        found = self.find_struct(struct)
        return found is not None and (member is None or member in found.members)

    def offset(self, struct: str, member: str) -> int:
        """Bytes from the start of `struct` to `member`; of a bit-field, to the byte it counts from.

        Raises: NotFoundError("structure") or ("member"), with near misses.
        """
        members = self.struct(struct).members
        found = members.get(member)
        if found is None:
            near = [f"{struct}.{name}" for name in near_members(member, list(members))]
            hint = whose_types(self.name, self.origin)
            raise NotFoundError("member", f"{struct}.{member}", near, hint)
        return found.offset

    def size(self, struct: str) -> int:
        """sizeof(struct), in bytes. Raises: NotFoundError("structure")."""
        return self.struct(struct).size

    def structs(self) -> list[str]:
        """The C tags, sorted; typedef names are found too, but not listed."""
        return sorted(self.source.names("tag"))
