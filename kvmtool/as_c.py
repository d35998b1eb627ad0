"""Objects as C writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.arithmetic import is_bytes, is_scalar
from kvmtool.errors import KvmError
from kvmtool.types.ctype import Array, Enum, Pointer, unqualified
from kvmtool.types.declare import declare

if TYPE_CHECKING:
    from kvmtool.object import Object
    from kvmtool.types.ctype import CType


def as_c(found: Object) -> str:
    """The object as C would write it: "(struct proc *)0x…", "(pid_t)57", "*(struct proc *)0x…"."""
    plain, name = unqualified(found.type), declare(found.type)
    if plain.kind == "unknown":
        return f"<{plain.name} at {found.address:#x}, type not known>"
    try:
        if isinstance(plain, Array) and is_bytes(plain.target) and plain.count is not None:
            return f"({name}){quoted(found.string())}"
        if is_scalar(plain):
            return f"({name}){_constant(found, plain)}"
    except KvmError as error:
        return f"<{name}: {error}>"
    return f"*({declare(Pointer(found.type, 8))}){found.address:#x}"


def _constant(found: Object, plain: CType) -> str:
    value = found.value()
    if isinstance(plain, Pointer):
        return f"{value:#x}"
    return (found.enumerator() if isinstance(plain, Enum) else None) or str(value)


def quoted(text: str) -> str:
    """`text` as a C string constant; what does not print as escapes."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    raw = plain.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)
    return f'"{"".join(shown)}"'
