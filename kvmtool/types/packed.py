"""C types in the cache's own form: columns of numbers that are read where they lie.

A header, the columns that `COLUMNS` lists, and a table of strings. A type is a number, its node; a
node has a kind (`Kind`), flags and up to four numbers that mean what the kind says:

    VOID       -
    BASE       text name, size; flags: form, signed
    OPAQUE     size
    POINTER    node target, size; flags: ptrauth is told, in c
    ARRAY      node target, count in size; flags: no count
    TYPEDEF    text name, node target in c
    QUALIFIED  text qualifier, node target in c
    COMPOUND   text tag, size, first field c, fields d; flags: kind, complete
    ENUM       text tag, size, first value c, values d; flags: signed, complete
    FUNCTION   node result, first parameter c, parameters d; flags: variadic, prototype
    NAMED      text name; flags: kind of name. What the source finds under it

Names lead to nodes by a sorted index. Numbers are the machine's own: the form never leaves it. All
of them are checked once, at C speed, when a table is loaded; text offsets lead into the strings,
where 0 is no name, and every other string ends with a NUL.
"""

from __future__ import annotations

import sys
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Literal

    from kvmtool.types.ctype import CType

    Code = Literal["B", "I", "i", "q", "Q"]  # of `array`, and of a memoryview's cast
    Find = Callable[[str, str], CType | None]

MAGIC = b"KVMTYPE1" if sys.byteorder == "little" else b"1EPYTMVK"
HEADER = Struct("<8sBBBxIIII16s")  # magic, order, pointer size, flags, 4 texts, UUID
COMPLETE, HAS_UUID = 1, 2  # flags: knows every name of its source; has a UUID

VOID, BASE, OPAQUE, POINTER, ARRAY, TYPEDEF, QUALIFIED, COMPOUND, ENUM, FUNCTION, NAMED = range(11)
KINDS = ("tag", "typedef", "base", "variable")
FORMS = ("int", "char", "bool", "float", "void")
COMPOUNDS = ("struct", "union", "class")
ABSENT = 0xFFFFFFFF  # in the index: the source has nothing of that name
NO_BITS = -1

COLUMNS: tuple[tuple[str, Code], ...] = (
    *(("kind", "B"), ("flags", "B"), ("a", "I"), ("size", "Q"), ("c", "I"), ("d", "I")),
    *(("field_name", "I"), ("field_type", "I"), ("field_offset", "q")),
    *(("field_bit", "i"), ("field_bits", "i")),
    *(("value_name", "I"), ("value", "q"), ("value_high", "B")),
    ("parameter", "I"),
    *(("index_kind", "B"), ("index_name", "I"), ("index_node", "I")),
    ("strings", "B"),
)
_SIZES = {"B": 1, "I": 4, "i": 4, "q": 8, "Q": 8}
_SMALL = 16  # bytes of the largest number
_LENGTHS = Struct(f"<{len(COLUMNS)}I")


class Identity(NamedTuple):
    """What a packed table says of the source it was made from."""

    name: str
    origin: str
    byteorder: str
    pointer_size: int
    uuid: bytes | None = None
    banner: str | None = None


class PackedTypes:
    """A `TypeSource` over packed types.

    `knows(kind, name)` tells whether there is an answer here; what there is none for, and names
    that types here refer to, are asked of `behind`.
    """

    def __init__(self, content: bytes, behind: Find | None = None, where: str = "cache") -> None:
        """Raises `FormatError` for what is not whole and consistent; `where` is for the message."""
        self._where, self.behind = where, behind
        self._content = content
        if len(content) < HEADER.size + _LENGTHS.size or not content.startswith(MAGIC):
            raise self._bad("expected packed types")
        _, order, self.pointer_size, self._flags, *texts, uuid = HEADER.unpack_from(content)
        self._load(HEADER.size + _LENGTHS.size)
        self._check(texts)
        self.byteorder = ">" if order else "<"
        self.name, self.origin = self._text(texts[0]) or "", self._text(texts[1]) or ""
        self.banner = self._text(texts[2])
        self.uuid: bytes | None = uuid if self._flags & HAS_UUID else None
        self._made: dict[int, CType] = {}

    def identity(self) -> Identity:
        """What the table was made from."""
        return Identity(
            self.name, self.origin, self.byteorder, self.pointer_size, self.uuid, self.banner
        )

    # the source's answers

    def knows(self, kind: str, name: str) -> bool:
        """Whether `find` (or, of a "variable", `variable`) answers without `behind`."""
        return bool(self._flags & COMPLETE) or self._entry(kind, name) is not None

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        node = self._entry(kind, name)
        if node is not None:
            return None if node == ABSENT else self.node(node)
        if self.behind is None or self._flags & COMPLETE:
            return None
        return self.behind(kind, name)

    def names(self, kind: str) -> Iterable[str]:
        """The names of that kind that there is a type for here."""
        number = KINDS.index(kind) if kind in KINDS else len(KINDS)
        columns = self._index_kind, self._index_name, self._index_node
        return [
            self._text(text) or ""
            for of_kind, text, node in zip(*columns, strict=True)
            if of_kind == number and node != ABSENT
        ]

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`."""
        return self.find("variable", name)

    def entries(self) -> list[tuple[str, str]]:
        """Every name there is an answer for, "there is none" included."""
        columns = self._index_kind, self._index_name
        return [(KINDS[kind], self._text(text) or "") for kind, text in zip(*columns, strict=True)]

    def _entry(self, kind: str, name: str) -> int | None:
        """The node in the index, or None; by bisection."""
        wanted = KINDS.index(kind), name.encode("utf-8", "surrogateescape")
        low, high = 0, len(self._index_kind)
        while low < high:
            middle = (low + high) // 2
            if (self._index_kind[middle], self._raw(self._index_name[middle])) < wanted:
                low = middle + 1
            else:
                high = middle
        if low == len(self._index_kind):
            return None
        here = self._index_kind[low], self._raw(self._index_name[low])
        return self._index_node[low] if here == wanted else None

    # nodes

    def node(self, number: int) -> CType:
        """The type of node `number`, made when it is first asked for."""
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def _make(self, number: int) -> CType:
        kind, flags, size = self._kind[number], self._flag[number], self._size[number]
        first, c, d = self._a[number], self._c[number], self._d[number]
        if kind == VOID:
            return Void()
        if kind == BASE:
            return Base(self._text(first) or "", size, FORMS[flags >> 1], bool(flags & 1))
        if kind == OPAQUE:
            return Opaque(size)
        if kind == POINTER:
            return Pointer(partial(self.node, first), size, c if flags else None)
        if kind == ARRAY:
            return Array(partial(self.node, first), None if flags else size)
        if kind == TYPEDEF:
            return Typedef(self._text(first) or "", partial(self.node, c))
        if kind == QUALIFIED:
            return Qualified(self._text(first) or "", partial(self.node, c))
        tag, whole = self._text(first), size if flags & 1 else None
        if kind == COMPOUND:
            return Compound(COMPOUNDS[flags >> 1], tag, whole, partial(self._fields, c, d))
        if kind == ENUM:
            return Enum(tag, whole, partial(self._values, c, d), bool(flags >> 1))
        if kind == FUNCTION:
            parameters = partial(self._parameters, c, d) if flags & 2 else None
            return Function(partial(self.node, first), parameters, bool(flags & 1))
        name = tag or ""
        found = self.find(KINDS[flags], name)
        return found if found is not None else Compound("struct", name, None)

    def _fields(self, first: int, count: int) -> list[Field]:
        fields = []
        for at in range(first, first + count):
            bit, bits = self._field_bit[at], self._field_bits[at]
            fields.append(
                Field(
                    self._text(self._field_name[at]),
                    self.node(self._field_type[at]),
                    self._field_offset[at],
                    None if bit == NO_BITS else bit,
                    None if bits == NO_BITS else bits,
                )
            )
        return fields

    def _values(self, first: int, count: int) -> list[tuple[str, int]]:
        return [
            (
                self._text(self._value_name[at]) or "",
                self._value[at] + ((1 << 64) if self._value_high[at] else 0),
            )
            for at in range(first, first + count)
        ]

    def _parameters(self, first: int, count: int) -> list[CType]:
        return [self.node(self._parameter[at]) for at in range(first, first + count)]

    # bytes

    def _raw(self, text: int) -> bytes:
        return self._content[self._strings + text : self._content.index(0, self._strings + text)]

    def _text(self, text: int) -> str | None:
        return self._raw(text).decode("utf-8", "surrogateescape") if text else None

    def _load(self, at: int) -> None:
        """Put the columns into attributes of their names. Raises `FormatError` for a cut one."""
        view = memoryview(self._content)
        columns: dict[str, Sequence[int]] = {}
        lengths = _LENGTHS.unpack_from(self._content, HEADER.size)
        for (name, code), length in zip(COLUMNS, lengths, strict=True):
            end = at + length * _SIZES[code]
            if end > len(view):
                raise self._bad(f"column {name} ends at {end:#x}, there are {len(view):#x} bytes")
            columns[name] = view[at:end].cast(code)
            if name == "strings":
                self._strings = at
            at = end
        if at != len(view):
            raise self._bad(f"expected {at:#x} bytes, got {len(view):#x}")
        self._kind, self._flag = columns["kind"], columns["flags"]
        self._a, self._size = columns["a"], columns["size"]
        self._c, self._d = columns["c"], columns["d"]
        self._field_name, self._field_type = columns["field_name"], columns["field_type"]
        self._field_offset = columns["field_offset"]
        self._field_bit, self._field_bits = columns["field_bit"], columns["field_bits"]
        self._value_name, self._value = columns["value_name"], columns["value"]
        self._value_high, self._parameter = columns["value_high"], columns["parameter"]
        self._index_kind, self._index_name = columns["index_kind"], columns["index_name"]
        self._index_node = columns["index_node"]
        self._text_bytes = len(columns["strings"])

    def _check(self, texts: list[int]) -> None:
        """Every number leads to where it should. Raises `FormatError`."""
        nodes, strings = len(self._kind), self._text_bytes
        tables = (
            (self._kind, self._flag, self._a, self._size, self._c, self._d),
            (
                *(self._field_name, self._field_type, self._field_offset),
                *(self._field_bit, self._field_bits),
            ),
            (self._value_name, self._value, self._value_high),
            (self._index_kind, self._index_name, self._index_node),
        )
        if any(len({len(column) for column in table}) > 1 for table in tables):
            raise self._bad("columns of one table differ in length")
        if not strings or self._content[-1] or max(self._kind, default=0) > NAMED:
            raise self._bad("strings do not end, or a node is of no kind")
        limits = (
            *((texts, strings), (self._field_name, strings), (self._value_name, strings)),
            *((self._index_name, strings), (self._field_type, nodes), (self._parameter, nodes)),
            (self._index_kind, len(KINDS)),
            ([node for node in self._index_node if node != ABSENT], nodes),
        )
        if any(max(column, default=-1) >= limit for column, limit in limits):
            raise self._bad("a number leads out of its table")
        if NAMED in {self._kind[node] for node in self._index_node if node != ABSENT}:
            raise self._bad("a name leads to a name")
        if not all(map(self._consistent, range(nodes))):
            raise self._bad("a node leads out of its table")

    def _consistent(self, number: int) -> bool:
        """Whether one node's numbers are what its kind allows."""
        kind, flags, first = self._kind[number], self._flag[number], self._a[number]
        nodes, c = len(self._kind), self._c[number]
        if kind in (POINTER, ARRAY, FUNCTION):
            if first >= nodes:
                return False
        elif first >= self._text_bytes:
            return False
        if kind in (BASE, POINTER):
            return self._size[number] <= _SMALL and flags >> 1 < len(FORMS)
        if kind in (TYPEDEF, QUALIFIED):
            return c < nodes
        if kind in (COMPOUND, ENUM, FUNCTION):
            table = {COMPOUND: self._field_name, ENUM: self._value_name}.get(kind, self._parameter)
            return c + self._d[number] <= len(table) and flags >> 1 < len(COMPOUNDS)
        return kind != NAMED or flags < len(KINDS)

    def _bad(self, message: str) -> FormatError:
        return FormatError(self._where, None, message)
