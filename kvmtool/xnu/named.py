"""The kernel's own variables by name: numbers, texts, pointers.

One that this kernel has not is None; one whose page is not in the dump is `Unreadable`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.types.ctype import Base, Enum, unqualified
from kvmtool.unreadable import guarded

if TYPE_CHECKING:
    from kvmtool.target import Target

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def address_of(target: Target, *names: str) -> int | None:
    """Where the first of the variables `names` that this kernel has lies; None if it has none."""
    for name in names:
        found = target.symbols.get(name)
        if found is not None:
            return found.address
    return None


def number(target: Target, *names: str, code: str = "I") -> Any:
    """The unsigned number in the first of the variables `names` that there is.

    As wide as the kernel's own types say; else of the `struct` code B, H, I or Q.
    """
    for name in names:
        found = target.symbols.get(name)
        if found is not None:
            known = _width(target, name)
            return _unsigned(target, found.address, known or code)
    return None


def _width(target: Target, name: str) -> str | None:
    """The `struct` code of the variable `name` as the kernel's own types have it."""
    known = target.types.variable(name)
    plain = None if known is None else unqualified(known)
    return _CODES.get(plain.size) if isinstance(plain, (Base, Enum)) and plain.size else None


def _unsigned(target: Target, address: int, code: str) -> Any:
    return guarded(lambda: target.unsigned(address, code))


def word(target: Target, *names: str) -> Any:
    """As `number`, of one that is a C long or size_t."""
    return number(target, *names, code="Q" if target.arch.pointer_size == 8 else "I")


def text(target: Target, name: str, limit: int = 256) -> Any:
    """The text in the array of char `name`; bytes that are not UTF-8 become lone surrogates."""
    at = address_of(target, name)
    return None if at is None else guarded(lambda: target.text(at, limit))


def pointer(target: Target, name: str) -> Any:
    """The pointer in the variable `name`, stripped."""
    return guarded(lambda: target.variable(name))
