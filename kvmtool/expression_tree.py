"""The tree of an expression: each node with the column (from 0) where it stands."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Constant(NamedTuple):
    """An integer."""

    column: int
    value: int


class Name(NamedTuple):
    """A variable or function, `kext:symbol` for a kext's."""

    column: int
    name: str


class Unary(NamedTuple):
    """`op` is one of * & - + ! ~."""

    column: int
    op: str
    operand: Node


class Binary(NamedTuple):
    """Two operands, && and || too."""

    column: int
    op: str
    left: Node
    right: Node


class Choice(NamedTuple):
    """test ? then : other."""

    column: int
    test: Node
    then: Node
    other: Node


class Member(NamedTuple):
    """of.name, of->name."""

    column: int
    of: Node
    name: str


class Index(NamedTuple):
    """of[at]."""

    column: int
    of: Node
    at: Node


class Cast(NamedTuple):
    """(type)operand."""

    column: int
    type: str
    operand: Node


class SizeOf(NamedTuple):
    """sizeof, of an expression or of the name of a type."""

    column: int
    of: Node | str


class OffsetOf(NamedTuple):
    """offsetof(type, path)."""

    column: int
    type: str
    path: str


Node: TypeAlias = (
    Constant | Name | Unary | Binary | Choice | Member | Index | Cast | SizeOf | OffsetOf
)
