"""`Object`: a typed, lazy reference into a kernel's memory, after drgn's model.

    kvm["allproc"].lh_first.p_comm.string()

An object is either a reference (a type and an address: nothing is read until its value is asked
for) or a value (a number, an enumeration, a pointer). Members are attributes; `member("size")`
reaches those that have the name of a method. What C would refuse is a `KvmError`.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

from kvmtool.arithmetic import Number, converted, is_bytes, is_scalar
from kvmtool.as_c import as_c
from kvmtool.computing import Computing
from kvmtool.errors import KvmError
from kvmtool.fields import all_fields, bit_span, complete, member_of, place_of, sized
from kvmtool.memory import read_cstring
from kvmtool.types.ctype import (
    Array,
    Compound,
    CType,
    Enum,
    Function,
    Opaque,
    Pointer,
    Void,
    unqualified,
)
from kvmtool.types.declare import declare
from kvmtool.values import bit_value, scalar, value_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target
    from kvmtool.types.ctype import Field

STRING_LIMIT = 1 << 16  # bytes of a C string without an end


class Untyped(CType):
    """The type of the symbol `symbol`, which nothing tells."""

    __slots__ = ("symbol", "why")
    kind = "unknown"

    def __init__(self, symbol: str, why: str = "") -> None:
        """`why` says where it was looked for."""
        self.symbol, self.why = symbol, why

    @property
    def name(self) -> str:
        """The symbol's."""
        return self.symbol

    def error(self) -> KvmError:
        """What to say when it is used."""
        hint = f" ({self.why})" if self.why else ""
        return KvmError(
            f"type of {self.symbol} is not known{hint}: cast it, e.g. (struct proc *){self.symbol}"
        )


class Object(Computing):
    """A `ctype` at `address`, or the `value` of one; of a bit-field member also its `field`.

    Numbers, enumerations and pointers compute as in C (`kvmtool.arithmetic`), with each other and
    with Python's numbers; comparisons give a bool. Arrays and functions stand for their address
    there, and so does a symbol whose type is not known.
    """

    __slots__ = ("_address", "_field", "_target", "_type", "_value")

    def __init__(
        self,
        target: Target,
        ctype: CType,
        address: int | None = None,
        value: int | float | None = None,
        field: Field | None = None,
    ) -> None:
        """Either an `address` or a `value`. `field` is the member this object is, if it is one."""
        self._target, self._type, self._field = target, ctype, field
        self._value = None if value is None else converted(ctype, value)
        self._address = None
        if value is None:
            if address is None:
                raise KvmError("an object has an address or a value")
            self._address = address & ((1 << 8 * target.arch.pointer_size) - 1)

    # what it is

    @property
    def type(self) -> CType:
        """Its C type, typedefs and qualifiers kept."""
        return self._type

    @property
    def address(self) -> int:
        """Where it lies; of a bit-field the byte it counts from. Raises `KvmError` for values."""
        if self._address is None:
            raise KvmError(f"{self!r} is a value, it has no address")
        return self._address

    @property
    def size(self) -> int:
        """sizeof, in bytes. Raises `KvmError` for what has none: void, functions, bit-fields."""
        if self._is_bits:
            raise KvmError(f"{self._name} is a bit-field, it has no size in bytes")
        return sized(self._target.types, self._known)

    @property
    def offset(self) -> int | None:
        """Bytes from the start of the structure it was taken from; None if it was from none."""
        return None if self._field is None else self._field.offset

    @property
    def is_value(self) -> bool:
        """Whether it is a value, which lies nowhere."""
        return self._address is None

    @property
    def bit_field(self) -> tuple[int, int] | None:
        """Of a bit-field the bits before it from its byte on, and its width; else None."""
        field = self._field
        if field is None or field.bit_size is None:
            return None
        return field.bit_offset or 0, field.bit_size

    @property
    def _is_bits(self) -> bool:
        return self._field is not None and self._field.bit_size is not None

    @property
    def _name(self) -> str:
        return declare(self._type, (self._field and self._field.name) or "")

    @property
    def _known(self) -> CType:
        if isinstance(self._type, Untyped):
            raise self._type.error()
        return self._type

    # what is there

    def value(self) -> Any:
        """int, float, bool; bytes for arrays of char; lists and dicts for arrays and structures.

        Pointers are addresses, stripped of tags and signatures; enumerations numbers. All or
        nothing. Raises: `FaultError` with the first address that cannot be read; `KvmError` for
        what has no value and for what is too large for one (see `values`).
        """
        if self._value is not None:
            return self._value
        if self._is_bits:
            assert self._field is not None
            first, size = bit_span(self._field)
            data = self._target.memory.read(self.address + first - self._field.offset, size)
            return bit_value(self._target, self._field, data)
        plain = unqualified(self._known)
        if is_scalar(plain):
            data = self._target.memory.read(self.address, self.size)
            return scalar(self._target, plain, data)
        if isinstance(plain, Function):
            raise KvmError(f"{declare(plain)} is a function, it has no value")
        if isinstance(plain, Compound):
            plain = complete(self._target.types, plain)
        return value_at(self._target, plain, self.address)

    def string(self, limit: int = STRING_LIMIT) -> str:
        """The text in an array of char, or at a pointer to char, up to its NUL.

        At most `limit` bytes; bytes that are not UTF-8 become lone surrogates. Raises `FaultError`,
        `KvmError` for what is no text.
        """
        plain = unqualified(self._known)
        if isinstance(plain, Array) and is_bytes(plain.target):
            limit = limit if plain.count is None else min(limit, plain.count)
            address = self.address
        elif isinstance(plain, Opaque):
            address, limit = self.address, min(limit, plain.size)
        elif isinstance(plain, Pointer) and is_bytes(plain.target):
            address = int(self.value())
        else:
            raise KvmError(f"{declare(plain)} is no text: cast it to (char *)")
        return read_cstring(self._target.memory, address, limit).decode("utf-8", "surrogateescape")

    def enumerator(self) -> str | None:
        """The name of an enumeration's value; None for a number that has none."""
        plain = unqualified(self._known)
        if not isinstance(plain, Enum):
            raise KvmError(f"{declare(plain)} is no enumeration")
        number = self.value()
        return next((name for name, value in plain.values if value == number), None)

    def __bytes__(self) -> bytes:
        return self._target.memory.read(self.address, self.size)

    # members and elements

    def member(self, name: str) -> Object:
        """The member `name` of a structure, or of the structure this points at.

        Raises: NotFoundError("member") with near misses, also for what has no members.
        """
        ctype = self._pointed()
        field = member_of(self._target.types, ctype, name)
        return Object(self._target, field.type, self._base() + field.offset, field=field)

    def members(self) -> Iterator[tuple[str, Object]]:
        """Every member with its name, in the order of the declaration.

        Unnamed structures and unions give the members inside them.
        """
        ctype = unqualified(self._pointed())
        if not isinstance(ctype, Compound):
            raise KvmError(f"{declare(self._type)} has no members")
        base = self._base()
        for field in all_fields(complete(self._target.types, ctype)):
            member = Object(self._target, field.type, base + field.offset, field=field)
            yield field.name or "", member

    def _pointed(self) -> CType:
        """The type whose members these are: a pointer's target, else its own."""
        plain = unqualified(self._known)
        return plain.target if isinstance(plain, Pointer) else self._type

    def _base(self) -> int:
        """Where the structure with the members lies, or the elements."""
        if isinstance(unqualified(self._type), Pointer):
            return self._target.strip(int(self.value()))
        return self.address

    def __getattr__(self, name: str) -> Object:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self.member(name)

    def __dir__(self) -> list[str]:
        plain = unqualified(self._type)
        plain = unqualified(plain.target) if isinstance(plain, Pointer) else plain
        fields = all_fields(plain) if isinstance(plain, Compound) else ()
        return [*super().__dir__(), *(field.name or "" for field in fields)]

    def __getitem__(self, index: int | Object) -> Object:
        plain = unqualified(self._known)
        if not isinstance(plain, (Array, Pointer)):
            raise KvmError(f"{declare(self._type)} has no elements: only arrays and pointers have")
        past = operator.index(index) * sized(self._target.types, plain.target)
        return Object(self._target, plain.target, self._base() + past)

    def __len__(self) -> int:
        plain = unqualified(self._known)
        if not isinstance(plain, Array) or plain.count is None or plain.count >= sys.maxsize:
            raise KvmError(f"{declare(self._type)} has no length")
        return plain.count

    def __iter__(self) -> Iterator[Object]:
        """The elements of an array, each made when it is asked for."""
        return (self[index] for index in range(len(self)))

    # pointers

    def deref(self) -> Object:
        """`*x`. Raises `KvmError` for what is no pointer, or points at nothing known."""
        plain = unqualified(self._known)
        if isinstance(plain, Function):
            return self
        if not isinstance(plain, (Array, Pointer)):
            raise KvmError(f"{declare(self._type)} is no pointer")
        if isinstance(unqualified(plain.target), Void):
            raise KvmError(f"{declare(self._type)} points at nothing known: cast it first")
        return Object(self._target, plain.target, self._base())

    def address_of(self) -> Object:
        """`&x`. Raises `KvmError` for values and bit-fields."""
        if self._is_bits:
            raise KvmError(f"{self._name} is a bit-field, it has no address")
        return self._pointer_to(self._type, self.address)

    def container_of(self, struct: str | CType, member: str) -> Object:
        """A pointer to the `struct` whose `member` ("p_list", "a.b[1]") this is, or points at."""
        types = self._target.types
        outer = types.type(struct) if isinstance(struct, str) else struct
        self._known  # noqa: B018  raises
        return self._pointer_to(outer, self._base() - place_of(types, outer, member).offset)

    def cast(self, ctype: str | CType) -> Object:
        """`(type)x`: its value as another type; of what has no known type, the bytes as that type.

        Raises: NotFoundError("type"), `KvmError` for what is no number.
        """
        wanted = self._target.types.type(ctype) if isinstance(ctype, str) else ctype
        plain = unqualified(self._type)
        if isinstance(plain, Opaque) and (wanted.size or 0) > plain.size:
            room = f"{plain.size:#x} bytes before what comes next"
            raise KvmError(f"{self._name} has {room}, {declare(wanted)} {wanted.size:#x}")
        if isinstance(plain, (Untyped, Opaque)):
            return Object(self._target, wanted, self.address, field=self._field)
        if unqualified(wanted) is plain:
            return Object(self._target, wanted, self._address, self._value, self._field)
        number = self._number()
        if not is_scalar(wanted):
            raise KvmError(f"{declare(self._type)} cannot be cast to {declare(wanted)}")
        return Object(self._target, wanted, value=number.value)

    def _pointer_to(self, ctype: CType, address: int) -> Object:
        known = Void() if isinstance(ctype, Untyped) else ctype
        return Object(self._target, Pointer(known, self._target.arch.pointer_size), value=address)

    # arithmetic: the operators are those of `Computing`

    def _number(self) -> Number:
        """What C computes with: a value; of arrays, functions and untyped symbols the address.

        Raises: `FaultError`, `KvmError` for structures and for what has no known type.
        """
        plain = unqualified(self._type)
        if isinstance(plain, (Array, Function, Untyped)):
            target = plain.target if isinstance(plain, Array) else self._type
            pointer = self._pointer_to(target, self.address)
            return Number(pointer.type, self.address)
        if isinstance(plain, Opaque):
            raise KvmError(f"type of {self._name} is not known: cast it, e.g. (int)")
        if not is_scalar(plain):
            raise KvmError(f"{declare(self._type)} is no number")
        return Number(self._type, self.value())

    def _computed(self, number: Number) -> Object:
        """`number` as a value of this kernel."""
        return Object(self._target, number.type, value=number.value)

    def __repr__(self) -> str:
        return as_c(self)
