"""What can go wrong, drawn as a tree.

::

    KvmError
    ├── FormatError(ValueError)        a file is not what it claims to be
    │   ├── UnknownFormatError         no format recognises the bytes
    │   └── TruncatedError             the file ends before what it promises
    ├── FaultError                     an address cannot be read
    ├── NotFoundError(LookupError)     no such symbol, structure, member or process
    ├── ExpressionError(ValueError)    an expression that cannot be understood
    ├── MismatchError(ValueError)      kernel and dump (or layout) do not belong together
    └── UnsupportedError               understood, but not possible here

Every error carries its datum, so that a program need not parse the text. Messages are lower case,
name the thing first, give numbers in hex, and always the file and the offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class KvmError(Exception):
    """Root of everything kvmtool raises on purpose; its text is one line, whatever is in it.

    `tried` is what was tried before, and why it would not do: one sentence each.
    """

    tried: tuple[str, ...] = ()

    def __init__(self, message: str = "") -> None:
        super().__init__(message.replace("\n", "\\n"))


class KvmWarning(UserWarning):
    """Something the user should know although the answer stands."""


class FormatError(KvmError, ValueError):
    """A file that is not what it claims to be: `source` (its name), `offset` (bytes), `reason`."""

    def __init__(self, source: str, offset: int | None, message: str) -> None:
        self.source = source
        self.offset = offset
        self.reason = message
        where = source if offset is None else f"{source}: at offset {offset:#x}"
        super().__init__(f"{where}: {message}")


class UnknownFormatError(FormatError):
    """No known format recognises the bytes."""


class TruncatedError(FormatError):
    """A file that ends early: `wanted` and `got` are bytes at `offset`."""

    def __init__(self, source: str, offset: int, wanted: int, got: int, what: str = "") -> None:
        self.wanted = wanted
        self.got = got
        thing = f"{what}: " if what else ""
        super().__init__(
            source, offset, f"{thing}expected {wanted:#x} bytes, got {got:#x} (file is cut off)"
        )


class FaultError(KvmError):
    """An address that cannot be read.

    `space` is "kernel", "physical" or a process; `address` the first bad address; `size` how many
    bytes were asked for; `reason` is "unmapped" (no translation), "absent" (translated, but not in
    the dump), "compressed", "swapped", "malformed" (a page table entry with reserved bits set) or
    "non-canonical" (no page table could hold it).
    """

    def __init__(self, space: str, address: int, size: int, reason: str = "unmapped") -> None:
        self.space = space
        self.address = address
        self.size = size
        self.reason = reason
        super().__init__(f"{space} address {address:#x} is {reason} (reading {size:#x} bytes)")


class NotFoundError(KvmError, LookupError):
    """Nothing of that name: `kind` ("symbol", "structure", ...), `name`, and `near` misses."""

    def __init__(self, kind: str, name: str, near: Sequence[str] = (), hint: str = "") -> None:
        message = f"{kind} {name} not found"
        if near:
            message += f" (did you mean {', '.join(near)}?)"
        if hint:
            message += f"; {hint}"
        super().__init__(message)
        # last: in a class that is an AttributeError as well, Python 3.14 comes to its __init__,
        # which clears the name
        self.kind, self.name, self.near = kind, name, tuple(near)


class ExpressionError(KvmError, ValueError):
    """An expression that cannot be understood: `expression`, the `column` (from 0), `reason`.

    Its note, as that of any error met while an expression is evaluated, shows the place.
    """

    def __init__(self, reason: str, expression: str = "", column: int = 0) -> None:
        self.reason, self.expression, self.column = reason, expression, column
        super().__init__(reason)
        if expression:
            self.add_note(place_in(expression, column))


def place_in(expression: str, column: int) -> str:
    """The expression, and below it a mark at `column`: two lines."""
    return f"{expression}\n{' ' * column}^"


class MismatchError(KvmError, ValueError):
    """Kernel and dump, or layout and kernel, that do not belong together."""


class UnsupportedError(KvmError):
    """Understood, but not possible: a write to a dump, an encrypted file, an unknown machine."""
