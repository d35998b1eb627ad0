"""C types as data: what every reader of type information makes, and nothing reads memory.

A type is immutable, and what it leads to (a pointer's target, a structure's members) is made when
it is first asked for, since the types of a kernel are one graph full of circles. Sizes and offsets
are bytes. Nothing here trusts a reader's file: chains of typedefs and nests are bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Ref = "CType | Callable[[], CType]"

DEPTH_LIMIT = 64  # of typedefs, of arrays in arrays, of structures in structures


class CType:
    """A C type. `size` is None where C has none: void, a function, a mere declaration."""

    __slots__ = ()
    kind = "type"

    @property
    def size(self) -> int | None:
        """sizeof, in bytes; None where there is none."""
        return None

    @property
    def name(self) -> str | None:
        """Its name alone: "proc", "pid_t", "unsigned int"; None for what has none."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or ''}>"


class Void(CType):
    """void."""

    __slots__ = ()
    kind = "void"

    @property
    def name(self) -> str:
        """ "void"."""
        return "void"


class Base(CType):
    """A number: `form` is "int", "char", "bool" or "float"."""

    __slots__ = ("_name", "_size", "form", "signed")
    kind = "base"

    def __init__(self, name: str, size: int, form: str = "int", signed: bool = True) -> None:
        self._name, self._size, self.form, self.signed = name, size, form, signed

    @property
    def size(self) -> int:
        """1, 2, 4, 8 or 16 bytes; a float 4, 8, 10, 12 or 16."""
        return self._size

    @property
    def name(self) -> str:
        """As in C: "unsigned int"."""
        return self._name


class Opaque(CType):
    """`size` bytes of a type that is not known, only where they lie (built-in layouts)."""

    __slots__ = ("_size",)
    kind = "opaque"

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        """How many bytes there are before what is known comes next."""
        return self._size


class _Leading(CType):
    """A type that leads to one other, which is made when it is asked for."""

    __slots__ = ("_target",)

    def __init__(self, target: CType | Callable[[], CType]) -> None:
        self._target = target

    @property
    def target(self) -> CType:
        """What it leads to. Raises what the reader raises for damaged types."""
        if not isinstance(self._target, CType):
            self._target = self._target()
        return self._target


class Pointer(_Leading):
    """A pointer to `target`; `ptrauth` tells how it is signed (key, address diversity, number)."""

    __slots__ = ("_size", "ptrauth")
    kind = "pointer"

    def __init__(
        self, target: CType | Callable[[], CType], size: int, ptrauth: int | None = None
    ) -> None:
        super().__init__(target)
        self._size, self.ptrauth = size, ptrauth

    @property
    def size(self) -> int:
        """4 or 8 bytes."""
        return self._size


class Array(_Leading):
    """`count` elements of `target`; None for a flexible array, whose size is 0 as in C."""

    __slots__ = ("count",)
    kind = "array"

    def __init__(self, target: CType | Callable[[], CType], count: int | None) -> None:
        super().__init__(target)
        self.count = count

    @property
    def size(self) -> int | None:
        """All elements together. Raises `KvmError` for arrays nested without end."""
        total, element, depth = 1, self, 0
        inner: CType = element
        while isinstance(inner := unqualified(inner), Array):
            total *= inner.count or 0
            inner = inner.target
            depth += 1
            if depth > DEPTH_LIMIT:
                raise KvmError(f"a type is an array nested deeper than {DEPTH_LIMIT}")
        return None if inner.size is None else total * inner.size


class Typedef(_Leading):
    """A typedef name of `target`."""

    __slots__ = ("_name",)
    kind = "typedef"

    def __init__(self, name: str, target: CType | Callable[[], CType]) -> None:
        super().__init__(target)
        self._name = name

    @property
    def name(self) -> str:
        """The typedef's name."""
        return self._name

    @property
    def size(self) -> int | None:
        """Its target's. Raises `KvmError` for typedefs that lead in a circle."""
        return unqualified(self).size


class Qualified(_Leading):
    """`target` with "const", "volatile", "restrict" or "_Atomic" before it."""

    __slots__ = ("qualifier",)
    kind = "qualified"

    def __init__(self, qualifier: str, target: CType | Callable[[], CType]) -> None:
        super().__init__(target)
        self.qualifier = qualifier

    @property
    def size(self) -> int | None:
        """Its target's. Raises `KvmError` for a circle."""
        return unqualified(self).size


class Field(NamedTuple):
    """A member: `offset` in bytes from the start of its own structure; `name` None if unnamed.

    Of a bit-field, `bit_size` is its width and `bit_offset` the bits before it from byte `offset`
    on, in the order the machine fills bytes: from the lowest bit of a little-endian byte, from the
    highest of a big-endian one (DW_AT_data_bit_offset's way of counting).
    """

    name: str | None
    type: CType
    offset: int
    bit_offset: int | None = None
    bit_size: int | None = None


class Compound(CType):
    """A struct, union or class (`kind`); `tag` None if unnamed, `size` None for a declaration."""

    __slots__ = ("_fields", "_size", "kind", "tag")

    def __init__(
        self,
        kind: str,
        tag: str | None,
        size: int | None,
        fields: Sequence[Field] | Callable[[], Sequence[Field]] = (),
    ) -> None:
        self.kind = kind
        self.tag, self._size, self._fields = tag, size, fields

    @property
    def size(self) -> int | None:
        """In bytes, padding at the end included."""
        return self._size

    @property
    def name(self) -> str | None:
        """The tag."""
        return self.tag

    @property
    def fields(self) -> Sequence[Field]:
        """The members in the order of the declaration. Raises what the reader raises."""
        if callable(self._fields):
            self._fields = self._fields()
        return self._fields

    @property
    def complete(self) -> bool:
        """Whether this is the definition, not only "struct proc;"."""
        return self._size is not None


class Enum(CType):
    """An enumeration; `values` are (name, number) in the order of the declaration."""

    __slots__ = ("_size", "_values", "signed", "tag")
    kind = "enum"

    def __init__(
        self,
        tag: str | None,
        size: int | None,
        values: Sequence[tuple[str, int]] | Callable[[], Sequence[tuple[str, int]]] = (),
        signed: bool = True,
    ) -> None:
        self.tag, self._size, self._values, self.signed = tag, size, values, signed

    @property
    def size(self) -> int | None:
        """In bytes; None for a declaration."""
        return self._size

    @property
    def name(self) -> str | None:
        """The tag."""
        return self.tag

    @property
    def values(self) -> Sequence[tuple[str, int]]:
        """Names and numbers."""
        if callable(self._values):
            self._values = self._values()
        return self._values


class Function(CType):
    """A function: what it returns (`result`) and takes; `parameters` None if not told."""

    __slots__ = ("_parameters", "_result", "variadic")
    kind = "function"

    def __init__(
        self,
        result: CType | Callable[[], CType],
        parameters: Sequence[CType] | Callable[[], Sequence[CType]] | None = None,
        variadic: bool = False,
    ) -> None:
        self._result, self._parameters, self.variadic = result, parameters, variadic

    @property
    def result(self) -> CType:
        """The type it returns."""
        if not isinstance(self._result, CType):
            self._result = self._result()
        return self._result

    @property
    def parameters(self) -> Sequence[CType] | None:
        """The types it takes; None for a declaration without a prototype."""
        if callable(self._parameters):
            self._parameters = self._parameters()
        return self._parameters


def unqualified(ctype: CType) -> CType:
    """`ctype` without typedefs and qualifiers around it. Raises `KvmError` for a circle."""
    found = ctype
    for _ in range(DEPTH_LIMIT):
        if not isinstance(found, (Typedef, Qualified)):
            return found
        found = found.target
    name = ctype.name or ctype.kind
    raise KvmError(f"type {name}: more than {DEPTH_LIMIT} typedefs lead from one to the next")
