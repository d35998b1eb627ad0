"""C's arithmetic on values of C types, in 64 bits.

Integers are computed as `long long`, or as `unsigned long long` where one of the two is a pointer
or an unsigned number of 64 bits, and wrap; narrower types are widened first, which C does too, if
not always as far. Pointers move by what they point at. Division by zero, shifts by more bits than
there are, and what C has no meaning for are refused.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import KvmError
from kvmtool.types.ctype import Base, Enum, Function, Pointer, Void, unqualified
from kvmtool.types.declare import declare

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.types.ctype import CType

INT = Base("int", 4)
LONG = Base("long long", 8)
UNSIGNED = Base("unsigned long long", 8, signed=False)
DOUBLE = Base("double", 8, "float")

_ADDING: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub}
_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {**_ADDING, "*": operator.mul}
_BITS: dict[str, Callable[[int, int], int]] = {
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Number(NamedTuple):
    """A value of a scalar type: an int for integers, enumerations and pointers, else a float."""

    type: CType
    value: int | float


def size_of(ctype: CType) -> int:
    """sizeof, in bytes. Raises `KvmError` where C has none: void, functions, declarations."""
    size = ctype.size
    if size is None:
        raise KvmError(f"{declare(ctype)} has no size here")
    return size


def wrapped(value: int, size: int, signed: bool) -> int:
    """`value` cut to `size` bytes."""
    value &= (1 << 8 * size) - 1
    return value - (1 << 8 * size) if signed and value >> (8 * size - 1) else value


def converted(ctype: CType, value: int | float) -> int | float:
    """`value` as a `ctype`, as a cast does. Raises `KvmError` for types that are not numbers."""
    plain = unqualified(ctype)
    if isinstance(plain, Base) and plain.form == "float":
        return float(value)
    if isinstance(plain, Base) and plain.form == "bool":
        return bool(value)
    if isinstance(value, float) and not abs(value) < 1e30:
        raise KvmError(f"{value} is no {declare(ctype)}")
    if isinstance(plain, Base):
        return wrapped(int(value), plain.size, plain.signed)
    if isinstance(plain, Enum):
        return wrapped(int(value), size_of(plain), plain.signed)
    if isinstance(plain, Pointer):
        return wrapped(int(value), plain.size, signed=False)
    raise KvmError(f"a number cannot be cast to {declare(ctype)}")


def step_of(pointer: Pointer) -> int:
    """How many bytes `pointer + 1` is further on; void and functions count 1, as GNU C has it."""
    target = unqualified(pointer.target)
    if isinstance(target, (Void, Function)):
        return 1
    return size_of(target)


def binary(op: str, left: Number, right: Number) -> Number:
    """`left op right` for C's arithmetic, bit, shift and comparison operators."""
    ours, theirs = _pointer(left), _pointer(right)
    if op in COMPARISONS:
        return Number(INT, int(_compare(op, left, right)))
    if ours or theirs:
        return _moved(op, left, right, ours, theirs)
    if isinstance(left.value, float) or isinstance(right.value, float):
        return Number(DOUBLE, _float(op, float(left.value), float(right.value)))
    if op in ("<<", ">>"):
        return _shifted(op, left, right)
    unsigned = _unsigned(left) or _unsigned(right)
    found = _integer(op, _wide(left, unsigned), _wide(right, unsigned))
    return _result(found, unsigned)


def negated(number: Number) -> Number:
    """-x."""
    if isinstance(number.value, float):
        return Number(DOUBLE, -number.value)
    return binary("-", Number(LONG, 0), number)


def inverted(number: Number) -> Number:
    """~x."""
    return binary("^", number, Number(LONG, -1))


def _pointer(number: Number) -> Pointer | None:
    plain = unqualified(number.type)
    return plain if isinstance(plain, Pointer) else None


def _unsigned(number: Number) -> bool:
    """Whether 64-bit arithmetic with it is unsigned."""
    plain = unqualified(number.type)
    if isinstance(plain, Pointer):
        return True
    return isinstance(plain, Base) and plain.size >= 8 and not plain.signed


def _wide(number: Number, unsigned: bool) -> int:
    return wrapped(int(number.value), 8, not unsigned)


def _result(value: int, unsigned: bool) -> Number:
    return Number(UNSIGNED if unsigned else LONG, wrapped(value, 8, not unsigned))


def _compare(op: str, left: Number, right: Number) -> bool:
    if isinstance(left.value, float) or isinstance(right.value, float):
        return COMPARISONS[op](left.value, right.value)
    unsigned = _unsigned(left) or _unsigned(right)
    return COMPARISONS[op](_wide(left, unsigned), _wide(right, unsigned))


def _moved(
    op: str, left: Number, right: Number, ours: Pointer | None, theirs: Pointer | None
) -> Number:
    """Arithmetic with at least one pointer."""
    if ours and theirs and op == "-":
        step = step_of(ours)
        if step == 0 or step != step_of(theirs):
            raise KvmError(f"{declare(left.type)} - {declare(right.type)}: not of one size")
        apart = int(left.value) - int(right.value)
        return Number(LONG, apart // step if apart >= 0 else -(-apart // step))
    if isinstance(left.value, float) or isinstance(right.value, float):
        raise KvmError(f"{declare(left.type)} {op} {declare(right.type)}: expected an integer")
    if ours and not theirs and op in _ADDING:
        moved = _ADDING[op](int(left.value), int(right.value) * step_of(ours))
        return Number(left.type, wrapped(moved, ours.size, signed=False))
    if theirs and not ours and op == "+":
        return _moved(op, right, left, theirs, ours)
    text = f"{declare(left.type)} {op} {declare(right.type)}"
    raise KvmError(f"{text}: C has no such arithmetic on pointers, cast to unsigned long first")


def _float(op: str, left: float, right: float) -> float:
    if op in _NUMBERS:
        return float(_NUMBERS[op](left, right))
    if op == "/":
        if right == 0:
            raise KvmError("division by zero")
        return left / right
    raise KvmError(f"{op} needs integers, got a floating-point number")


def _integer(op: str, left: int, right: int) -> int:
    if op in _NUMBERS:
        return int(_NUMBERS[op](left, right))
    if op in _BITS:
        return _BITS[op](left, right)
    if op not in ("/", "%"):
        raise KvmError(f"no operator {op}")
    if right == 0:
        raise KvmError("division by zero")
    quotient = abs(left) // abs(right)
    if (left < 0) != (right < 0):
        quotient = -quotient
    return quotient if op == "/" else left - quotient * right


def _shifted(op: str, left: Number, right: Number) -> Number:
    unsigned, bits = _unsigned(left), int(right.value)
    if not 0 <= bits < 64:
        raise KvmError(f"a shift by {bits}, expected 0 to 63")
    value = _wide(left, unsigned)
    return _result(value << bits if op == "<<" else value >> bits, unsigned)


def is_scalar(ctype: CType) -> bool:
    """Whether C computes with it: a number, an enumeration, a pointer."""
    return isinstance(unqualified(ctype), (Base, Enum, Pointer))


def is_bytes(ctype: CType) -> bool:
    """Whether an array of it is text or bytes: char, signed or not."""
    plain = unqualified(ctype)
    return isinstance(plain, Base) and plain.form == "char" and plain.size == 1
