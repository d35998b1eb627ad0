"""The value of an expression: names looked up in a kernel, the rest computed as C does."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Protocol

from kvmtool.arithmetic import INT, LONG, UNSIGNED, is_scalar
from kvmtool.errors import ExpressionError, KvmError, place_in
from kvmtool.expression import parse
from kvmtool.expression_tree import (
    Binary,
    Cast,
    Choice,
    Constant,
    Index,
    Member,
    Name,
    Node,
    OffsetOf,
    SizeOf,
    Unary,
)
from kvmtool.fields import place_of, sized
from kvmtool.object import Object
from kvmtool.types.ctype import Base, unqualified

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target
    from kvmtool.types.ctype import CType

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_PREFIX: dict[str, Callable[[Object], Object]] = {
    "*": Object.deref,
    "&": Object.address_of,
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
}


class Names(Protocol):
    """Where an expression's names are looked up; `Scope` is a kernel's."""

    @property
    def target(self) -> Target:
        """The kernel that is looked into."""

    def variable(self, name: str) -> Object:
        """What the name stands for. Raises `NotFoundError`."""

    def is_type(self, name: str) -> bool:
        """Whether the name alone means a type."""


class Expression:
    """An expression that is read once and evaluated as often as wanted."""

    def __init__(self, text: str, names: Names) -> None:
        """Raises `ExpressionError`."""
        self.text = text
        self._tree = parse(text, names.is_type)

    def value(self, names: Names) -> Object:
        """What it means where names are these. Raises as `evaluate`."""
        return _Evaluator(self.text, names).of(self._tree)


def evaluate(text: str, names: Names) -> Object:
    """What `text` (see `kvmtool.expression`) means in a kernel: a reference or a value.

    Nothing is read but the pointers on the way. Raises `ExpressionError`, `NotFoundError` for a
    symbol, member or type, `FaultError`, and `KvmError` for what C refuses; each has a note that
    shows the place.
    """
    return Expression(text, names).value(names)


def address_of(text: str, names: Names) -> int:
    """The address that `text` means: the value of a pointer or integer, else where it lies.

    So `cdevsw[11].d_read` is where the function begins, and `cdevsw[11]` where the row lies.
    Raises what `evaluate` raises, and `KvmError` for a number that is no integer.
    """
    found = evaluate(text, names)
    plain = unqualified(found.type)
    if not is_scalar(plain):
        return found.address
    if isinstance(plain, Base) and plain.form == "float":
        raise ExpressionError(f"a {plain.name} is no address", text)
    address = int(found)
    return address if address >= 0 else address & (1 << 8 * names.target.arch.pointer_size) - 1


class _Evaluator:
    """`unread` is set inside sizeof, which reads nothing: each value is 1 there."""

    def __init__(self, text: str, names: Names) -> None:
        self._text, self._names = text, names
        self._unread = False

    def of(self, node: Node) -> Object:
        """The object that `node` stands for."""
        try:
            found: Object = _METHODS[type(node)](self, node)
        except KvmError as error:
            if not getattr(error, "__notes__", None):
                error.add_note(place_in(self._text, node.column))
            raise
        return found

    def _operand(self, node: Node) -> Object:
        found = self.of(node)
        if self._unread and is_scalar(found.type):
            return Object(self._names.target, found.type, value=1)
        return found

    def _number(self, value: int, ctype: CType | None = None) -> Object:
        fitting = INT if -1 << 31 <= value < 1 << 31 else LONG if value < 1 << 63 else UNSIGNED
        return Object(self._names.target, ctype or fitting, value=value)

    def _constant(self, node: Constant) -> Object:
        return self._number(node.value)

    def _name(self, node: Name) -> Object:
        return self._names.variable(node.name)

    def _unary(self, node: Unary) -> Object:
        if node.op == "&":  # of an operand that must not become a value
            return self.of(node.operand).address_of()
        operand = self._operand(node.operand)
        if node.op == "!":
            return self._number(int(not operand))
        return _PREFIX[node.op](operand)

    def _binary(self, node: Binary) -> Object:
        left = self._operand(node.left)
        if node.op in ("&&", "||"):
            decided = bool(left) == (node.op == "||")
            return self._number(int(bool(left) if decided else bool(self._operand(node.right))))
        found = _OPERATORS[node.op](left, self._operand(node.right))
        return self._number(int(found)) if isinstance(found, bool) else found

    def _choice(self, node: Choice) -> Object:
        return self.of(node.then if self._operand(node.test) else node.other)

    def _member(self, node: Member) -> Object:
        return self._operand(node.of).member(node.name)

    def _index(self, node: Index) -> Object:
        return self._operand(node.of)[self._operand(node.at)]

    def _cast(self, node: Cast) -> Object:
        operand = self.of(node.operand)
        wanted = self._names.target.types.type(node.type)
        if self._unread and is_scalar(wanted):
            return Object(self._names.target, wanted, value=1)
        return operand.cast(wanted)

    def _sizeof(self, node: SizeOf) -> Object:
        types = self._names.target.types
        if isinstance(node.of, str):
            return self._number(sized(types, types.type(node.of)), UNSIGNED)
        before, self._unread = self._unread, True
        size = self.of(node.of).size
        self._unread = before
        return self._number(size, UNSIGNED)

    def _offsetof(self, node: OffsetOf) -> Object:
        types = self._names.target.types
        return self._number(place_of(types, types.type(node.type), node.path).offset, UNSIGNED)


_METHODS: dict[type, Callable[[_Evaluator, Any], Object]] = {
    Constant: _Evaluator._constant,
    Name: _Evaluator._name,
    Unary: _Evaluator._unary,
    Binary: _Evaluator._binary,
    Choice: _Evaluator._choice,
    Member: _Evaluator._member,
    Index: _Evaluator._index,
    Cast: _Evaluator._cast,
    SizeOf: _Evaluator._sizeof,
    OffsetOf: _Evaluator._offsetof,
}
