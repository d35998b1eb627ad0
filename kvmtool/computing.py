"""Python's operators for objects that C computes with."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TypeVar, cast

from kvmtool.arithmetic import DOUBLE, LONG, UNSIGNED, Number, binary, inverted, negated
from kvmtool.errors import KvmError

Self = TypeVar("Self", bound="Computing")

_SIGNED_LIMIT = 1 << 63
_UNSIGNED_LIMIT = 1 << 64


class Computing:
    """Something with a number: it computes with its like and with Python's, as C does.

    Comparisons give a bool, everything else its like. / truncates between integers, as in C.
    """

    __slots__ = ()

    @abstractmethod
    def _number(self) -> Number:
        """What C computes with. Raises `KvmError` for what has no number."""

    @abstractmethod
    def _computed(self: Self, number: Number) -> Self:
        """Its like, with another number."""

    def _with(self: Self, op: str, other: object, swapped: bool = False) -> Self:
        theirs = _number_of(other)
        if theirs is None:
            return cast("Self", NotImplemented)
        ours = self._number()
        return self._computed(binary(op, theirs, ours) if swapped else binary(op, ours, theirs))

    def _is(self, op: str, other: object) -> bool:
        theirs = _number_of(other)
        if theirs is None:
            return cast("bool", NotImplemented)
        return bool(binary(op, self._number(), theirs).value)

    def __add__(self: Self, other: object) -> Self:
        return self._with("+", other)

    def __radd__(self: Self, other: object) -> Self:
        return self._with("+", other, swapped=True)

    def __sub__(self: Self, other: object) -> Self:
        return self._with("-", other)

    def __rsub__(self: Self, other: object) -> Self:
        return self._with("-", other, swapped=True)

    def __mul__(self: Self, other: object) -> Self:
        return self._with("*", other)

    def __rmul__(self: Self, other: object) -> Self:
        return self._with("*", other, swapped=True)

    def __truediv__(self: Self, other: object) -> Self:
        return self._with("/", other)

    def __rtruediv__(self: Self, other: object) -> Self:
        return self._with("/", other, swapped=True)

    def __mod__(self: Self, other: object) -> Self:
        return self._with("%", other)

    def __rmod__(self: Self, other: object) -> Self:
        return self._with("%", other, swapped=True)

    def __and__(self: Self, other: object) -> Self:
        return self._with("&", other)

    def __rand__(self: Self, other: object) -> Self:
        return self._with("&", other, swapped=True)

    def __or__(self: Self, other: object) -> Self:
        return self._with("|", other)

    def __ror__(self: Self, other: object) -> Self:
        return self._with("|", other, swapped=True)

    def __xor__(self: Self, other: object) -> Self:
        return self._with("^", other)

    def __rxor__(self: Self, other: object) -> Self:
        return self._with("^", other, swapped=True)

    def __lshift__(self: Self, other: object) -> Self:
        return self._with("<<", other)

    def __rlshift__(self: Self, other: object) -> Self:
        return self._with("<<", other, swapped=True)

    def __rshift__(self: Self, other: object) -> Self:
        return self._with(">>", other)

    def __rrshift__(self: Self, other: object) -> Self:
        return self._with(">>", other, swapped=True)

    def __neg__(self: Self) -> Self:
        return self._computed(negated(self._number()))

    def __pos__(self: Self) -> Self:
        return self._computed(self._number())

    def __invert__(self: Self) -> Self:
        return self._computed(inverted(self._number()))

    def __eq__(self, other: object) -> bool:
        return self._is("==", other)

    def __ne__(self, other: object) -> bool:
        return self._is("!=", other)

    def __lt__(self, other: object) -> bool:
        return self._is("<", other)

    def __le__(self, other: object) -> bool:
        return self._is("<=", other)

    def __gt__(self, other: object) -> bool:
        return self._is(">", other)

    def __ge__(self, other: object) -> bool:
        return self._is(">=", other)

    __hash__ = None  # type: ignore[assignment]  # equality looks into memory

    def __bool__(self) -> bool:
        return bool(self._number().value)

    def __int__(self) -> int:
        return math.trunc(self._number().value)

    def __float__(self) -> float:
        return float(self._number().value)

    def __index__(self) -> int:
        value = self._number().value
        if isinstance(value, float):
            raise KvmError(f"expected an integer, got {value}")
        return int(value)


def _number_of(other: object) -> Number | None:
    """`other` as C has it; None for what is no number."""
    if isinstance(other, Computing):
        return other._number()
    if isinstance(other, float):
        return Number(DOUBLE, other)
    if not isinstance(other, int):
        return None
    if not -_SIGNED_LIMIT <= other < _UNSIGNED_LIMIT:
        raise KvmError(f"{other:#x} has more than 64 bits")
    return Number(LONG if other < _SIGNED_LIMIT else UNSIGNED, other)
