"""Types as C writes them: "int (*d_read)(dev_t, struct uio *, int)"."""

from __future__ import annotations

from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Compound,
    CType,
    Enum,
    Function,
    Opaque,
    Pointer,
    Qualified,
)

_NEST_LIMIT = 8  # of functions that take functions


def declare(ctype: CType, name: str = "", nest: int = 0) -> str:
    """The declaration of `name` as a `ctype`, without the semicolon; of no name, the type itself.

    Of a structure only the head ("struct proc p"), never its members. `nest` counts the functions
    around this one: beyond a few their parameters are left out.
    """
    left, right = name, ""
    found = ctype
    for _ in range(DEPTH_LIMIT):
        if isinstance(found, Pointer):
            left, found = f"*{left}", found.target
            if isinstance(found, (Array, Function)):
                left, right = f"({left}", f"){right}"
        elif isinstance(found, Array):
            right += f"[{'' if found.count is None else found.count}]"
            found = found.target
        elif isinstance(found, Opaque):
            return f"unsigned char {left}{right}[{found.size}]"
        elif isinstance(found, Function):
            right += f"({_parameters(found, nest + 1)})"
            found = found.result
        elif isinstance(found, Qualified) and isinstance(found.target, Pointer):
            left, found = f"*{found.qualifier} {left}".rstrip(), found.target.target
            if isinstance(found, (Array, Function)):
                left, right = f"({left}", f"){right}"
        else:
            break
    head = _head(found)
    return f"{head}{' ' if left else ''}{left}{right}"


def _parameters(function: Function, nest: int) -> str:
    if function.parameters is None:
        return ""
    if nest > _NEST_LIMIT:
        return "..."
    words = [declare(parameter, "", nest) for parameter in function.parameters]
    if function.variadic:
        words.append("...")
    return ", ".join(words) or "void"


def _head(ctype: CType) -> str:
    """The words before a declarator: "const struct proc", "pid_t"."""
    words = []
    for _ in range(DEPTH_LIMIT):
        if not isinstance(ctype, Qualified):
            break
        words.append(ctype.qualifier)
        ctype = ctype.target
    if isinstance(ctype, (Compound, Enum)):
        words.append(f"{ctype.kind} {ctype.tag or '{...}'}")
    elif isinstance(ctype, (Pointer, Array, Function)):
        words.append(f"typeof({declare(ctype)})")
    else:
        words.append(ctype.name or ctype.kind)
    return " ".join(words)
