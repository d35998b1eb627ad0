"""Debugging entries as C types: made once for each entry, the inside when it is asked for.

Sources: the DWARF standards, chapter 5; for what a compiler does where they leave it open, LLVM's
DwarfUnit.cpp and gcc's dwarf2out.c.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Base,
    Compound,
    Enum,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
    unqualified,
)
from kvmtool.types.dwarf_declared import DeclaredCompound
from kvmtool.types.dwarf_fields import SIZE_LIMIT, fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmtool.types.ctype import CType
    from kvmtool.types.dwarf_dies import DebugInfo, Die

_COMPOUNDS = {
    dw.TAG_STRUCTURE: "struct",
    dw.TAG_UNION: "union",
    dw.TAG_CLASS: "class",
    dw.TAG_INTERFACE: "class",
}
_QUALIFIERS = {
    dw.TAG_CONST: "const",
    dw.TAG_IMMUTABLE: "const",
    dw.TAG_VOLATILE: "volatile",
    dw.TAG_RESTRICT: "restrict",
    dw.TAG_ATOMIC: "_Atomic",
}
_POINTERS = (dw.TAG_POINTER, dw.TAG_REFERENCE, dw.TAG_RVALUE_REFERENCE)
_FUNCTIONS = (dw.TAG_SUBROUTINE, dw.TAG_SUBPROGRAM)
# DW_ATE_* -> form and sign: address, boolean, complex, float, signed, signed char, unsigned, ...
_ENCODINGS = {
    **dict.fromkeys((0x1, 0x7), ("int", False)),
    **dict.fromkeys((0x5, 0xD), ("int", True)),
    0x2: ("bool", False),
    **dict.fromkeys((0x3, 0x4, 0x9, 0xF), ("float", True)),
    0x6: ("char", True),
    **dict.fromkeys((0x8, 0x10, 0x11, 0x12), ("char", False)),
}
_UNNAMED = {1: "char", 2: "short", 4: "int", 8: "long long", 16: "__int128"}
_BASE_LIMIT = 64
_CHAIN_LIMIT = 8  # of DW_AT_specification and DW_AT_abstract_origin


class TypeMaker:
    """Makes types from entries.

    `full_name` gives an entry's name with the scopes it is in, `define` the definition of the type
    that an entry declares.
    """

    def __init__(
        self,
        info: DebugInfo,
        full_name: Callable[[Die], str | None],
        define: Callable[[Die], CType | None],
    ) -> None:
        self._info, self._full_name, self._define = info, full_name, define
        self._made: dict[int, CType] = {}
        self._depth = 0

    def at(self, offset: int) -> CType:
        """The type of the entry at `offset`. Raises `FormatError`."""
        found = self._made.get(offset)
        if found is not None:
            return found
        self._depth += 1
        try:
            die = self._info.die(offset)
            if self._depth > DEPTH_LIMIT:
                raise die.bad(f"more than {DEPTH_LIMIT} types lead from one to the next")
            found = self._made[offset] = self._make(die)
        finally:
            self._depth -= 1
        return found

    def type_of(self, die: Die) -> CType:
        """What `die` says its type is; void where it says nothing."""
        target = self._target(die)
        return Void() if target is None else self.at(target)

    def _target(self, die: Die) -> int | None:
        return self._resolved(die, dw.AT_TYPE)

    def _resolved(self, die: Die, attribute: int) -> int | None:
        value = die.values.get(attribute)
        if value is None or isinstance(value, int):
            return value
        if isinstance(value, bytes) and len(value) == 8:
            found = self._info.units.of_signature(value)
            if found is None:
                raise die.bad(f"no type has the signature {value.hex()}")
            return found
        raise die.bad(f"attribute {attribute:#x}: expected a reference to an entry")

    def _leading(self, die: Die) -> CType | Callable[[], CType]:
        target = self._target(die)
        if target is None:
            return Void()
        return self._made.get(target) or partial(self.at, target)

    def _make(self, die: Die) -> CType:
        tag = die.tag
        if tag in _COMPOUNDS:
            return self._compound(die)
        if tag == dw.TAG_TYPEDEF:
            return Typedef(self._full_name(die) or "", self._leading(die))
        if tag in _POINTERS:
            return Pointer(self._leading(die), self._pointer_size(die))
        if tag in _QUALIFIERS:
            return Qualified(_QUALIFIERS[tag], self._leading(die))
        if tag == dw.TAG_BASE:
            return self._base(die)
        if tag == dw.TAG_ARRAY:
            return self._array(die)
        if tag == dw.TAG_ENUMERATION:
            return self._enum(die)
        if tag in _FUNCTIONS:
            return self.function(die)
        if tag == dw.TAG_LLVM_PTRAUTH:
            return self._signed_pointer(die)
        return self._rare(die)

    def _rare(self, die: Die) -> CType:
        if die.tag == dw.TAG_PACKED or (die.tag == dw.TAG_SUBRANGE and self._target(die)):
            return self.type_of(die)
        if die.tag == dw.TAG_UNSPECIFIED:  # decltype(nullptr); gcc's name for void elsewhere
            name = self._info.name(die)
            pointer = die.unit.shape.address_size
            if name is not None and "nullptr" in name:
                return Base(name, pointer, "int", signed=False)
            return Void()
        if die.tag == dw.TAG_PTR_TO_MEMBER:
            # Itanium C++ ABI 2.3: an offset, or a function and an offset
            kind = unqualified(self.type_of(die))
            return Opaque(die.unit.shape.address_size * (2 if isinstance(kind, Function) else 1))
        size = self._size(die)
        if size is None:
            raise die.bad(f"tag {die.tag:#x} where a type was expected")
        return Opaque(size)

    def _size(self, die: Die) -> int | None:
        size = die.number(dw.AT_BYTE_SIZE)
        if size is not None and not 0 <= size <= SIZE_LIMIT:
            raise die.bad(f"DW_AT_byte_size {size:#x}, expected at most {SIZE_LIMIT:#x}")
        return size

    def _pointer_size(self, die: Die) -> int:
        size = self._size(die)
        if size is None:
            return die.unit.shape.address_size
        if size not in (4, 8):
            raise die.bad(f"a pointer of {size:#x} bytes, expected 0x4 or 0x8")
        return size

    def _base(self, die: Die) -> CType:
        size = self._size(die) or 0
        if size > _BASE_LIMIT:
            raise die.bad(f"a number of {size:#x} bytes, expected at most {_BASE_LIMIT:#x}")
        form, signed = _ENCODINGS.get(die.number(dw.AT_ENCODING) or 0, ("int", False))
        name = self._info.name(die)
        if name is None:  # gcc's own type of array indices
            name = f"{'' if signed else 'unsigned '}{_UNNAMED.get(size, 'int')}"
        return Base(name, size, form, signed)

    def _compound(self, die: Die) -> CType:
        info, kind, size = self._info, _COMPOUNDS[die.tag], self._size(die)
        name = self._full_name(die)
        if dw.AT_SIGNATURE in die.values:
            target = self._resolved(die, dw.AT_SIGNATURE)
            if target is not None and target != die.offset:
                return self.at(target)
        if die.number(dw.AT_DECLARATION) or size is None:
            return DeclaredCompound(kind, name, partial(self._define, die))
        return Compound(kind, name, size, partial(fields, self, info, die))

    def _enum(self, die: Die) -> CType:
        info, size = self._info, self._size(die)
        name = self._full_name(die)
        if die.number(dw.AT_DECLARATION):
            found = self._define(die)
            return found if isinstance(found, Enum) else Enum(name, size)
        values = []
        for child in info.children(die):
            number = child.number(dw.AT_CONST_VALUE)
            if child.tag == dw.TAG_ENUMERATOR and number is not None:
                values.append((info.name(child) or "", number))
        signed = any(number < 0 for _, number in values)
        if self._target(die) is not None:
            under = unqualified(self.type_of(die))
            if isinstance(under, Base):
                signed, size = under.signed, under.size if size is None else size
        if size is not None and not signed:
            mask = (1 << 8 * size) - 1
            values = [(text, number & mask if number < 0 else number) for text, number in values]
        return Enum(name, size, values, signed)

    def _array(self, die: Die) -> CType:
        counts = [
            self._count(child)
            for child in self._info.children(die)
            if child.tag in (dw.TAG_SUBRANGE, dw.TAG_ENUMERATION)
        ]
        if len(counts) > DEPTH_LIMIT:
            raise die.bad(f"an array of {len(counts)} dimensions, expected at most {DEPTH_LIMIT}")
        target = self._leading(die)
        for count in reversed(counts or [None]):
            target = Array(target, count)
        assert isinstance(target, Array)
        return target

    def _count(self, die: Die) -> int | None:
        """Elements in one dimension; None where the type does not tell."""
        count, upper = die.number(dw.AT_COUNT), die.number(dw.AT_UPPER_BOUND)
        if count is None:
            if upper is None:
                return None
            if upper in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF):  # how gcc writes the -1 of "x[0]"
                return 0
            count = upper - (die.number(dw.AT_LOWER_BOUND) or 0) + 1
        if not 0 <= count <= SIZE_LIMIT:
            raise die.bad(f"{count:#x} elements, expected at most {SIZE_LIMIT:#x}")
        return count

    def function(self, die: Die) -> Function:
        """The type of the function or function type `die`."""
        offsets, variadic = [], False
        for child in self._info.children(die):
            if child.tag == dw.TAG_FORMAL_PARAMETER:
                offsets.append(self._of_variable(child))
            elif child.tag == dw.TAG_UNSPECIFIED_PARAMETERS:
                variadic = True
        told = offsets or die.number(dw.AT_PROTOTYPED) or self._info.cplusplus(die.unit)
        parameters = partial(self._parameters, offsets) if told else None
        target = self._of_variable(die)
        result = Void() if target is None else partial(self.at, target)
        return Function(result, parameters, variadic and bool(told))

    def _parameters(self, offsets: Sequence[int | None]) -> list[CType]:
        return [Void() if offset is None else self.at(offset) for offset in offsets]

    def _of_variable(self, die: Die) -> int | None:
        """The type's offset of a variable, which another entry may tell."""
        for _ in range(_CHAIN_LIMIT):
            target = self._target(die)
            if target is not None:
                return target
            for attribute in (dw.AT_SPECIFICATION, dw.AT_ABSTRACT_ORIGIN):
                other = self._resolved(die, attribute)
                if other is not None:
                    die = self._info.die(other)
                    break
            else:
                return None
        raise die.bad(f"more than {_CHAIN_LIMIT} entries lead from one to the next")

    def variable(self, die: Die) -> CType | None:
        """The type of the variable or function `die`; None where it does not tell."""
        if die.tag == dw.TAG_SUBPROGRAM:
            return self.function(die)
        target = self._of_variable(die)
        return None if target is None else self.at(target)

    def _signed_pointer(self, die: Die) -> CType:
        """A pointer with its `ptrauth`: address diversity << 24 | key << 16 | discriminator."""
        key = die.number(dw.AT_PTRAUTH_KEY) or 0
        extra = die.number(dw.AT_PTRAUTH_EXTRA_DISCRIMINATOR) or 0
        diverse = die.number(dw.AT_PTRAUTH_ADDRESS_DISCRIMINATED) or 0
        if not (0 <= key <= 0xFF and 0 <= extra <= 0xFFFF):
            raise die.bad(f"a pointer signed with key {key:#x}, discriminator {extra:#x}")
        word = bool(diverse) << 24 | key << 16 | extra
        inner = unqualified(self.type_of(die))
        if not isinstance(inner, Pointer):
            return self.type_of(die)
        return Pointer(lambda: inner.target, inner.size, word)
