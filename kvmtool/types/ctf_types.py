"""C types out of the records of CTF, each made when something leads to it.

What CTF does not say: where a bit-field was declared (its storage unit is taken to be the declared
type's, in its place); how wide an enumeration's bit-field is (it is taken to reach the next
member); whether a forward declaration is of a struct or a union; and the members beyond the 1023
that a record can count (ctfconvert cuts them off; `KvmWarning` says so).
"""

from __future__ import annotations

import warnings
from functools import cached_property, partial
from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, FormatError, KvmWarning
from kvmtool.types import ctf_format as ctf
from kvmtool.types.ctf_index import NameIndex
from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Pointer,
    Qualified,
    Typedef,
    Void,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvmtool.types.ctf_format import CtfBody, Record
    from kvmtool.types.ctf_variables import External
    from kvmtool.types.ctype import CType

    Symbols = Callable[[], Iterable[External]]  # the kernel's, in the order of its symbol table

_SIGNED, _CHAR, _BOOL = 1, 2, 4  # of an INTEGER's encoding
_BASE_LIMIT = 32  # bytes
_SIZE_LIMIT = 1 << 32
_KIND_NAMES = {ctf.STRUCT: "struct", ctf.UNION: "union"}
_QUALIFIERS = {ctf.VOLATILE: "volatile", ctf.CONST: "const", ctf.RESTRICT: "restrict"}


class CtfTypes:
    """A `TypeSource` over one piece of CTF."""

    def __init__(
        self,
        body: CtfBody,
        name: str,
        origin: str,
        pointer_size: int | None = None,
        symbols: Symbols | None = None,
        parent: CtfTypes | None = None,
    ) -> None:
        """`pointer_size` is for CTF without a `long`, which is as wide. `parent` has the types that
        a kext shares with its kernel; without it they are void. `symbols` let `variable` answer.
        """
        self.name, self.origin, self.byteorder = name, origin, body.byteorder
        self.symbols, self.parent = symbols, parent
        self._body, self._data = body, body.data
        self._offsets, self._kinds = body.records()
        self._first = 1
        if body.string(body.header.parname):
            self._first |= 0x80000000 if body.wide else 0x8000
        self._made: dict[int, CType] = {}
        self._word = Struct(body.byteorder + "I")
        self.pointer_size = self._long_size() or pointer_size or 8

    def __len__(self) -> int:
        """How many types there are."""
        return len(self._kinds)

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`; of several structures of that tag, the one with most members."""
        place = self._index.find(kind, name)
        if place is None:
            return None if self.parent is None else self.parent.find(kind, name)
        return self.type(self._first + place)

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        own = self._index.names(kind)
        return own if self.parent is None else dict.fromkeys((*self.parent.names(kind), *own))

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`: None without `symbols`, or where they are not these types'."""
        return self._variables.get(name)

    @cached_property
    def _variables(self) -> Mapping[str, CType]:
        if self.symbols is None:
            return {}
        from kvmtool.types.ctf_variables import Variables

        try:
            symbols = list(self.symbols())
        except (FaultError, FormatError):
            # A kernel in memory gives its symbol table up when it has booted; whoever asks for the
            # symbol itself is told so.
            return {}
        return Variables(self, self._body, symbols)

    def type(self, number: int) -> CType:
        """The type of that number. Raises `FormatError` for a number there is none of."""
        if number == 0:  # ctfconvert's void, and the end of a variadic function's parameters
            return Void()
        found = self._made.get(number)
        if found is None:
            found = self._made[number] = self._make(number)
        return found

    def _make(self, number: int) -> CType:
        record = self._record(number)
        if record is None:
            return Void() if self.parent is None else self.parent.type(number)
        kind, size = record.kind, record.size
        if kind in (ctf.INTEGER, ctf.FLOAT):
            return self._number(record)
        if kind in _KIND_NAMES:
            return self._compound(record)
        if kind == ctf.ENUM:
            tag = self._body.string(record.name) or None
            self._checked(size, f"enum {tag}", record)
            return Enum(tag, size, partial(self._constants, record))
        if kind == ctf.POINTER:
            return Pointer(partial(self.type, size), self.pointer_size)
        if kind == ctf.TYPEDEF:
            return Typedef(self._body.string(record.name), partial(self.type, size))
        if kind in _QUALIFIERS:
            return Qualified(_QUALIFIERS[kind], partial(self.type, size))
        return self._other(record)

    def _other(self, record: Record) -> CType:
        kind = record.kind
        if kind == ctf.ARRAY:
            item = "III" if self._body.wide else "HHI"
            contents, _, count = Struct(self.byteorder + item).unpack_from(self._data, record.tail)
            return Array(partial(self.type, contents), count)
        if kind == ctf.FUNCTION:
            return self.function(record.size, record.tail, record.vlen)
        if kind == ctf.FORWARD:
            tag = self._body.string(record.name)
            place = self._index.find("tag", tag)
            if place is not None and self._kinds[place] != ctf.FORWARD:
                return self.type(self._first + place)
            return Compound("struct", tag or None, None)
        if kind == ctf.PTRAUTH:
            return self._signed_pointer(record)
        return Void()  # UNKNOWN: a number that ctfmerge left unused

    def _record(self, number: int) -> Record | None:
        """The record of type `number`; None if it is the parent's."""
        place = number - self._first
        if not 0 <= place < len(self._offsets):
            if self._first > 1 and 0 < number < self._first:
                return None
            least, most = self._first, self._first + len(self._offsets) - 1
            raise self._body.bad(
                self._body.header.typeoff,
                f"a reference to type {number:#x}, expected {least:#x} to {most:#x}",
            )
        return self._body.record(self._offsets[place])

    def _number(self, record: Record) -> CType:
        (word,) = self._word.unpack_from(self._data, record.tail)
        name, size = self._body.string(record.name), record.size
        if size == 0:
            return Void()
        if size > _BASE_LIMIT:
            raise self._body.bad(record.tail, f"type {name}: {size:#x} bytes of a number")
        if record.kind == ctf.FLOAT:
            return Base(name, size, "float")
        flags = word >> 24
        form = "bool" if flags & _BOOL else "char" if flags & _CHAR else "int"
        return Base(name, size, form, bool(flags & _SIGNED))

    def _compound(self, record: Record) -> CType:
        kind, tag = _KIND_NAMES[record.kind], self._body.string(record.name) or None
        self._checked(record.size, f"{kind} {tag}", record)
        return Compound(kind, tag, record.size, partial(self._fields, record))

    def _checked(self, size: int, what: str, record: Record) -> None:
        if size > _SIZE_LIMIT:
            raise self._body.bad(record.tail, f"{what}: {size:#x} bytes, expected a 32-bit size")
        if record.vlen == ctf.MAX_VLEN:
            warnings.warn(
                KvmWarning(f"{self.origin}: {what} may have more than the {record.vlen} members"),
                stacklevel=2,
            )

    def _fields(self, record: Record) -> list[Field]:
        large = record.size >= ctf.LARGE_STRUCT
        item = _member(self.byteorder, self._body.wide, large)
        data = self._data[record.tail : record.tail + record.vlen * item.size]
        members = [
            (name, number, place[0] << 32 | place[1] if large else place[0])
            for name, number, *place in item.iter_unpack(data)
        ]
        ends = [bits for _, _, bits in members[1:]] + [record.size * 8]
        fields = []
        for (name, number, bits), end in zip(members, ends, strict=False):
            shown = self._body.string(name) or None
            if bits > record.size * 8:
                message = f"member {shown} at bit {bits:#x} of {record.size:#x} bytes"
                raise self._body.bad(record.tail, message)
            room = end - bits if record.kind == ctf.STRUCT else None
            fields.append(self._field(shown, number, bits, room))
        return fields

    def _field(self, name: str | None, number: int, bits: int, room: int | None) -> Field:
        """The member at bit `bits`, `room` bits before the next one (None in a union)."""
        kind, width = self.type(number), self._width(number)
        unit = 8 * (kind.size or 0) if width is not None else 0
        if width == 0:  # an enumeration: ctfconvert keeps its own type, and so no width
            width = room if room is not None and 0 < room < unit else unit
        if width is None or width >= unit:
            if bits % 8:
                message = f"member {name} at bit {bits:#x} is no bit-field"
                raise self._body.bad(self._body.header.typeoff, message)
            return Field(name, kind, bits // 8)
        start = bits // unit * unit if bits % unit + width <= unit else bits & ~7
        return Field(name, kind, start // 8, bits - start, width)

    def _width(self, number: int) -> int | None:
        """Bits of a type that bit-fields have; 0 for an enumeration, None for any other type."""
        for _ in range(DEPTH_LIMIT):
            record = self._record(number) if number else None
            if record is None or record.kind not in (ctf.TYPEDEF, *_QUALIFIERS):
                break
            number = record.size
        if record is not None and record.kind == ctf.INTEGER:
            return int(self._word.unpack_from(self._data, record.tail)[0] & 0xFFFF)
        return 0 if record is not None and record.kind == ctf.ENUM else None

    def _constants(self, record: Record) -> list[tuple[str, int]]:
        data = self._data[record.tail : record.tail + record.vlen * 8]
        pairs = Struct(self.byteorder + "Ii").iter_unpack(data)
        return [(self._body.string(name), value) for name, value in pairs]

    def function(self, result: int, at: int, count: int) -> Function:
        """The function that returns type `result`, with `count` parameters at body offset `at`."""
        code = "I" if self._body.wide else "H"
        numbers = Struct(f"{self.byteorder}{count}{code}").unpack_from(self._data, at)
        variadic = count > 1 and numbers[-1] == 0
        taken = numbers[:-1] if variadic else numbers
        return Function(
            partial(self.type, result), lambda: [self.type(number) for number in taken], variadic
        )

    def _signed_pointer(self, record: Record) -> CType:
        """The type that a PTRAUTH (kind 14) signs; a pointer remembers how.

        `ptrauth` is CTF's word: address diversity << 24 | key << 16 | the number mixed in.
        """
        (word,) = self._word.unpack_from(self._data, record.tail)
        number = record.size
        for _ in range(DEPTH_LIMIT):
            inner = self._record(number) if number else None
            if inner is None or inner.kind not in (ctf.TYPEDEF, *_QUALIFIERS):
                break
            number = inner.size
        if inner is None or inner.kind != ctf.POINTER:
            return Qualified("__ptrauth", partial(self.type, record.size))
        return Pointer(partial(self.type, inner.size), self.pointer_size, word)

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self._body, self._offsets, self._kinds)

    def _long_size(self) -> int | None:
        """Bytes of `long`, which on Darwin are a pointer's; None if nothing uses it."""
        found = self.find("base", "long") or self.find("base", "unsigned long")
        return found.size if found is not None and found.size in (4, 8) else None


def _member(byteorder: str, wide: bool, large: bool) -> Struct:
    if large:
        return Struct(byteorder + ("IIII" if wide else "IHxxII"))
    return Struct(byteorder + ("IIHxx" if wide else "IHH"))
