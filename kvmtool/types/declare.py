"""Types as C writes them: "int (*d_read)(dev_t, struct uio *, int)"."""

from __future__ import annotations

from kvmtool.errors import KvmError
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
_TYPES_LIMIT = 256  # in one declaration; parameters beyond are left out


def declare(ctype: CType, name: str = "") -> str:
    """The declaration of `name` as a `ctype`, without the semicolon; of no name, the type itself.

    Of a structure only the head ("struct proc p"), never its members; one without a tag, and an
    enum without, is "struct {...}". Parameters that no person would read to the end are "...".
    Raises `KvmError` for a type that leads on without end, and what the reader raises.
    """
    return _declare(ctype, name, 0, [_TYPES_LIMIT])


def _declare(ctype: CType, left: str, nest: int, budget: list[int]) -> str:
    """From the name outwards, as C is read: `left` and `right` are what stands around it so far."""
    budget[0] -= 1
    right, found, words = "", ctype, []
    for _ in range(DEPTH_LIMIT):
        if isinstance(found, Qualified):
            words.append(found.qualifier)
            found = found.target
        elif isinstance(found, Pointer):
            own = " ".join(words)
            left, found = f"*{own}{' ' if own and left else ''}{left}", found.target
            words = []
            if _is_postfix(found):
                left, right = f"({left}", f"{right})"
        elif isinstance(found, Array):  # what is said of an array is said of its elements
            right += f"[{'' if found.count is None else found.count}]"
            found = found.target
        elif isinstance(found, Opaque):
            return f"unsigned char{' ' if left else ''}{left}{right}[{found.size}]"
        elif isinstance(found, Function):  # whose own qualifiers C does not have
            right += f"({_parameters(found, nest + 1, budget)})"
            found, words = found.result, []
        else:
            words.append(_head(found))
            space = " " if left or right[:1] == "(" else ""
            return f"{' '.join(words)}{space}{left}{right}"
    raise KvmError(f"a type leads on through more than {DEPTH_LIMIT} others")


def _is_postfix(ctype: CType) -> bool:
    """Whether what C writes of it stands behind the name: [4], (int)."""
    for _ in range(DEPTH_LIMIT):
        if not isinstance(ctype, Qualified):
            break
        ctype = ctype.target
    return isinstance(ctype, (Array, Function, Opaque))


def _parameters(function: Function, nest: int, budget: list[int]) -> str:
    words: list[str] = []
    if nest > _NEST_LIMIT:
        return "..."
    if function.parameters is None:
        return ""
    for parameter in function.parameters:
        if budget[0] <= 0:
            return ", ".join([*words, "..."])
        words.append(_declare(parameter, "", nest, budget))
    if function.variadic:
        words.append("...")
    return ", ".join(words) or "void"


def _head(ctype: CType) -> str:
    """The words before a declarator: "struct proc", "pid_t"."""
    if isinstance(ctype, (Compound, Enum)):
        return f"{ctype.kind} {ctype.tag or '{...}'}"
    return ctype.name or ctype.kind
