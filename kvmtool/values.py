"""Bytes of memory as Python values, by their C type: what `Object.value` answers.

Numbers become int, float or bool, arrays of char and what is not known bytes, other arrays lists,
structures dictionaries. A value is all or nothing, and a type's own numbers are claims: what would
be larger than `SIZE_LIMIT` bytes or `COUNT_LIMIT` parts is refused before it is read.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.arithmetic import is_bytes, size_of, wrapped
from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.fields import bit_span
from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Base,
    Compound,
    Enum,
    Opaque,
    Pointer,
    unqualified,
)
from kvmtool.types.declare import declare

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.types.ctype import CType, Field

SIZE_LIMIT = 1 << 24  # bytes
COUNT_LIMIT = 1 << 20  # numbers, elements and members, all together

_FLOATS = {4: "f", 8: "d"}


def bit_value(target: Target, field: Field, data: bytes) -> int | bool:
    """The bit-field in `data`, the bytes that `bit_span` tells."""
    bits, before = field.bit_size or 0, (field.bit_offset or 0) % 8
    if target.arch.byteorder == "<":
        number = int.from_bytes(data, "little") >> before
    else:
        number = int.from_bytes(data, "big") >> (8 * len(data) - before - bits)
    number &= (1 << bits) - 1
    plain = unqualified(field.type)
    if isinstance(plain, Base) and plain.form == "bool":
        return bool(number)
    signed = isinstance(plain, (Base, Enum)) and plain.signed
    return number - (1 << bits) if signed and bits and number >> (bits - 1) else number


def scalar(target: Target, plain: CType, data: bytes) -> int | float | bool:
    """The number, enumeration or pointer (stripped) whose bytes are `data`."""
    order = "little" if target.arch.byteorder == "<" else "big"
    if isinstance(plain, Base) and plain.form == "float":
        return _float(target.arch.byteorder, plain, data)
    number = int.from_bytes(data, order)  # type: ignore[arg-type]
    if isinstance(plain, Pointer):
        return target.strip(number) if plain.size == target.arch.pointer_size else number
    if isinstance(plain, Base) and plain.form == "bool":
        return bool(number)
    signed = isinstance(plain, (Base, Enum)) and plain.signed
    return wrapped(number, len(data), signed) if data else 0


def _float(byteorder: str, plain: Base, data: bytes) -> float:
    code = _FLOATS.get(len(data))
    if code is None:
        raise UnsupportedError(f"a {plain.name} of {len(data)} bytes is not read here")
    found: float = Struct(byteorder + code).unpack(data)[0]
    return found


def value_at(target: Target, ctype: CType, address: int) -> Any:
    """The value of the `ctype` at `address`, all of it read in one go.

    Raises: `FaultError` with the first address that cannot be read; `KvmError` for what has no
    value (void, functions) and for what is too large.
    """
    size = size_of(ctype)
    if size > SIZE_LIMIT:
        raise KvmError(
            f"{declare(ctype)} has {size:#x} bytes, expected at most {SIZE_LIMIT:#x} for a value: "
            "look at its parts"
        )
    return _Decoder(target, ctype, target.memory.read(address, size)).decode(ctype, 0, 0)


class _Decoder:
    """One value in the making: its bytes, and how many parts it has so far."""

    def __init__(self, target: Target, ctype: CType, data: bytes) -> None:
        self._target, self._type, self._data = target, ctype, data
        self._parts = 0

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > COUNT_LIMIT:
            raise KvmError(
                f"{declare(self._type)} has more than {COUNT_LIMIT:#x} parts: look at them "
                "one at a time"
            )

    def _bytes(self, at: int, size: int) -> bytes:
        data = self._data[at : at + size]
        if len(data) != size:
            raise KvmError(
                f"{declare(self._type)} has {len(self._data):#x} bytes, but a member at {at:#x} "
                f"of {size:#x}"
            )
        return data

    def decode(self, ctype: CType, at: int, depth: int) -> Any:
        """The value of the `ctype` whose bytes begin at `at`."""
        if depth > DEPTH_LIMIT:
            raise KvmError(f"{declare(self._type)}: nested deeper than {DEPTH_LIMIT}")
        plain = unqualified(ctype)
        if isinstance(plain, Compound):
            return self._compound(plain, at, depth, {})
        if isinstance(plain, Array):
            return self._array(plain, at, depth)
        data = self._bytes(at, size_of(plain))
        self._count(1)
        return data if isinstance(plain, Opaque) else scalar(self._target, plain, data)

    def _compound(
        self, compound: Compound, at: int, depth: int, found: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds the members to those `found`: the ones of unnamed structures by their own names."""
        for field in compound.fields:
            self._count(1)
            inner = unqualified(field.type)
            if field.name and field.bit_size is not None:
                first, size = bit_span(field)
                found[field.name] = bit_value(self._target, field, self._bytes(at + first, size))
            elif field.name:
                found[field.name] = self.decode(field.type, at + field.offset, depth + 1)
            elif isinstance(inner, Compound) and depth <= DEPTH_LIMIT:
                self._compound(inner, at + field.offset, depth + 1, found)
        return found

    def _array(self, array: Array, at: int, depth: int) -> bytes | list[Any]:
        count, size = array.count or 0, size_of(array.target)
        if is_bytes(array.target):
            return self._bytes(at, count)
        self._count(count)
        plain = unqualified(array.target)
        code = "bhiq"[size.bit_length() - 1] if size in (1, 2, 4, 8) else ""
        if isinstance(plain, Base) and plain.form in ("int", "char") and code:
            code = code if plain.signed else code.upper()
            layout = Struct(f"{self._target.arch.byteorder}{count}{code}")
            return list(layout.unpack(self._bytes(at, count * size)))
        return [self.decode(array.target, at + n * size, depth + 1) for n in range(count)]
