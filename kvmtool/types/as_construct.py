"""C types as construct declares them: bytes to values, and back to the same bytes.

A structure is a construct `Struct` of its own size. Numbers are integers or floats in the machine's
byte order, pointers unsigned integers, enums construct's `Enum`, char arrays and bytes of no known
type `bytes`, other arrays lists, structures Containers. Members of unnamed structures and unions
go by their own names, as in C. What shows no member keeps its bytes under a name with an underscore
in front, which Containers neither print nor compare: "_hole_0x14".

Members that share bytes (of a union, bit-fields) are views of bytes under such a name
("_bytes_0x14"): when building, those bytes are taken, and members that differ from them put in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import construct

from kvmtool.errors import KvmError
from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Base,
    Compound,
    CType,
    Enum,
    Opaque,
    Pointer,
    unqualified,
)
from kvmtool.types.outline import element, in_order, length, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import Field

_TYPES_LIMIT = 1 << 14  # in one structure, all nests counted; XNU's largest have some hundred
_INTEGERS = {1: "B", 2: "H", 4: "L", 8: "Q"}
_FLOATS = {4: "f", 8: "d"}


def construct_of(ctype: CType, byteorder: str = "<") -> Any:
    """The construct for a `ctype` of a machine whose `byteorder` is "<" or ">".

    Raises `KvmError` for what has no size, or members outside of itself, and for a nest deeper or
    larger than any real one.
    """
    return _Maker(byteorder).made(ctype, 0)


def parse(ctype: CType, data: bytes, byteorder: str = "<") -> Any:
    """The value of the `ctype` that `data` begins with.

    Raises as `construct_of`, and `KvmError` for too few bytes.
    """
    made = construct_of(ctype, byteorder)
    if len(data) < (ctype.size or 0):
        name = ctype.name or ctype.kind
        raise KvmError(f"{name}: expected {ctype.size or 0:#x} bytes, got {len(data):#x}")
    return made.parse(data)


class _Member(NamedTuple):
    """A member on bytes `begin` to `end` of its structure; `view` reads and writes its value."""

    name: str
    begin: int
    end: int
    view: _Bits | Any  # a construct


class _Bits(NamedTuple):
    """A bit-field: `skip` bits from the first of its bytes on, in the machine's order."""

    skip: int
    size: int
    signed: bool
    order: str

    def parse(self, data: bytes) -> int:
        """The value."""
        value = int.from_bytes(data, self.order) >> self._shift(data)  # type: ignore[arg-type]
        value &= (1 << self.size) - 1
        return value - (1 << self.size) if self.signed and value >> self.size - 1 else value

    def put(self, value: int, data: bytes) -> bytes:
        """`data` with the value in it."""
        mask = (1 << self.size) - 1 << self._shift(data)
        number = int.from_bytes(data, self.order) & ~mask  # type: ignore[arg-type]
        number |= value << self._shift(data) & mask
        return number.to_bytes(len(data), self.order)  # type: ignore[arg-type]

    def _shift(self, data: bytes) -> int:
        return self.skip if self.order == "little" else 8 * len(data) - self.skip - self.size


class _Maker:
    def __init__(self, byteorder: str) -> None:
        self._byteorder = byteorder
        self._order = "little" if byteorder == "<" else "big"
        self._left = _TYPES_LIMIT

    def made(self, ctype: CType, depth: int) -> Any:
        self._count(ctype, depth)
        found = unqualified(ctype)
        if isinstance(found, Base):
            return self._number(found)
        if isinstance(found, Pointer):
            return self._integer(found.size, signed=False)
        if isinstance(found, Opaque):
            return construct.Bytes(found.size)
        if isinstance(found, Array) and found.size is not None:
            return self._array(found, depth)
        if isinstance(found, Enum) and found.size is not None:
            return _enum(found, self._integer(found.size, found.signed))
        if isinstance(found, Compound) and found.complete:
            return self._struct(found, depth)
        raise KvmError(f"{_name(ctype)} has no size in these types")

    def _count(self, ctype: CType, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > DEPTH_LIMIT:
            raise KvmError(f"{_name(ctype)}: nested deeper or larger than any real type")

    def _number(self, base: Base) -> Any:
        if base.form == "float":
            if base.size in _FLOATS:
                return construct.FormatField(self._byteorder, _FLOATS[base.size])
            return construct.Bytes(base.size)
        return self._integer(base.size, base.signed and base.form != "bool")

    def _integer(self, size: int, signed: bool) -> Any:
        if size in _INTEGERS:
            code = _INTEGERS[size]
            return construct.FormatField(self._byteorder, code.lower() if signed else code)
        if size <= 0:
            return construct.Bytes(0)
        return construct.BytesInteger(size, signed=signed, swapped=self._order == "little")

    def _array(self, array: Array, depth: int) -> Any:
        of = unqualified(array.target)
        if isinstance(of, Base) and of.form == "char" and of.size == 1:
            return construct.Bytes(array.count or 0)
        if not array.size:
            return construct.Array(0, construct.Byte)
        return construct.Array(array.count, self.made(array.target, depth + 1))

    def _struct(self, compound: Compound, depth: int) -> Any:
        members: list[Any] = []
        at, size = 0, compound.size or 0
        for group in _groups(self._checked(compound, depth)):
            begin, end = group[0].begin, max(member.end for member in group)
            members += _hole(at, begin)
            if len(group) == 1 and not isinstance(group[0].view, _Bits):
                members.append(group[0].name / group[0].view)
            else:
                members += _shared(begin, end, group)
            at = end
        return construct.Struct(*members, *_hole(at, size))

    def _checked(self, compound: Compound, depth: int) -> list[_Member]:
        """The members by place, each within the structure and with a name of its own."""
        found, names = [], set()
        for member in self._members(compound, 0, compound.size or 0, depth):
            if not 0 <= member.begin <= member.end <= (compound.size or 0):
                raise KvmError(
                    f"{_name(compound)}: expected members within {compound.size:#x} bytes, "
                    f"got {member.name} at {member.begin:#x} to {member.end:#x}"
                )
            name = member.name
            if name in names or name == "_":
                name = f"{name}_{member.begin:#x}"
            names.add(name)
            found.append(member._replace(name=name))
        return sorted(found, key=lambda member: member[1:3])

    def _members(self, compound: Compound, base: int, end: int, depth: int) -> Iterator[_Member]:
        """With those of unnamed structures; one whose type has no size gets the room there is."""
        fields = in_order(compound)
        starts = [field.offset for field in fields]
        for number, field in enumerate(fields):
            begin = base + start(field) // 8
            if field.bit_size is not None:
                if field.name and field.bit_size > 0:
                    self._count(field.type, depth)
                    yield self._bits(field, field.name, base)
                continue
            found = unqualified(field.type)
            if not field.name:
                if isinstance(found, Compound):
                    self._count(found, depth)
                    yield from self._members(found, begin, begin + (found.size or 0), depth + 1)
                continue
            if field.type.size is None:
                after = next((base + at for at in starts[number:] if base + at > begin), end)
                room = max(0, after - begin)
                yield _Member(field.name, begin, begin + room, construct.Bytes(room))
            else:
                view = self.made(field.type, depth + 1)
                yield _Member(field.name, begin, begin + field.type.size, view)

    def _bits(self, field: Field, name: str, base: int) -> _Member:
        first, size = start(field), length(field)
        of = element(field.type)
        signed = isinstance(of, (Base, Enum)) and of.signed
        if isinstance(of, Base) and of.form == "bool":
            signed = False
        view = _Bits(first % 8, size, signed, self._order)
        return _Member(name, base + first // 8, base + (first + size + 7) // 8, view)


def _groups(members: list[_Member]) -> Iterator[list[_Member]]:
    """Members that have bytes in common with the next, directly or not, together."""
    group: list[_Member] = []
    end = 0
    for member in members:
        if group and member.begin >= end:
            yield group
            group = []
        group.append(member)
        end = max(end, member.end) if len(group) > 1 else member.end
    if group:
        yield group


def _hole(begin: int, end: int) -> list[Any]:
    if begin >= end:
        return []
    zeros = construct.Default(construct.Bytes(end - begin), lambda _: bytes(end - begin))
    return [f"_hole_{begin:#x}" / zeros]


def _shared(begin: int, end: int, members: list[_Member]) -> list[Any]:
    """The constructs of members that share the bytes from `begin` to `end`."""
    name = f"_bytes_{begin:#x}"

    def built(context: Any) -> bytes:
        data = before = context.get(name) or bytes(end - begin)
        for member in members:
            low, high = member.begin - begin, member.end - begin
            value = context.get(member.name)
            if value is None or value == member.view.parse(before[low:high]):
                continue
            if isinstance(member.view, _Bits):
                after = member.view.put(value, data[low:high])
            else:
                after = member.view.build(value)
            data = data[:low] + after + data[high:]
        return data

    def viewed(member: _Member) -> Any:
        low, high = member.begin - begin, member.end - begin
        return member.name / construct.Computed(
            lambda context: member.view.parse(context[name][low:high])
        )

    return [
        name / construct.Rebuild(construct.Bytes(end - begin), built),
        *map(viewed, members),
    ]


def _enum(enum: Enum, number: Any) -> Any:
    values = {name: value for name, value in enum.values if name not in ("self", "subcon")}
    return construct.Enum(number, **values)


def _name(ctype: CType) -> str:
    return f"{ctype.kind} {ctype.name or '{...}'}"
