"""What differs in a structure between two kernels: what came, went, moved, or changed its type.

Members are known by their names. Types are compared by what they mean, not by how they are written:
a `pid_t` that became an `int` is the same number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.types.ctype import Array, Base, Compound, Enum, Function, Opaque, Pointer, unqualified
from kvmtool.types.outline import outline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import CType
    from kvmtool.types.outline import Line

_DEPTH = 4  # of pointers to pointers and arrays of arrays


class Change(NamedTuple):
    """A member that is not the same in both; `before` or `after` is None where it is not there.

    `kinds` are "added" or "gone", or any of "moved", "resized" and "retyped".
    """

    name: str
    kinds: tuple[str, ...]
    before: Line | None
    after: Line | None


def compare(before: Compound, after: Compound, expand: bool = False) -> list[Change]:
    """The members that differ between two complete structures, in memory order.

    What lies in a structure without a name is compared with its place there: it is not listed for
    being moved, added or gone along with that. With `expand` the same goes for structures with a
    name; else these are members like any other, as is what only one of the two shows the inside
    of. Of types that are not known only the places are compared.
    """
    old, new = _by_path(before, expand), _by_path(after, expand)
    found = []
    for path in dict.fromkeys((*new, *old)):
        was, now = old.get(path), new.get(path)
        if now is None:
            kinds: tuple[str, ...] = () if was is None or _came_along(was, new) else ("gone",)
        elif was is None:
            kinds = () if _came_along(now, old) else ("added",)
        else:
            kinds = tuple(_differences(was, now))
        if kinds:
            found.append(Change(path, kinds, was.line if was else None, now.line if now else None))
    return sorted(found, key=_place)


def compare_values(
    before: Enum, after: Enum
) -> list[tuple[str, list[str], int | None, int | None]]:
    """The values that differ between two enums: name, what happened, number in each."""
    old, new = dict(before.values), dict(after.values)
    found = []
    for name in dict.fromkeys((*new, *old)):
        was, now = old.get(name), new.get(name)
        if was != now:
            kind = "added" if was is None else "gone" if now is None else "changed"
            found.append((name, [kind], was, now))
    return found


class _Member(NamedTuple):
    line: Line
    within: int  # bits from the start of the structure around it that has a name
    around: str | None  # the path of that


def _by_path(compound: Compound, expand: bool) -> dict[str, _Member]:
    """The members by their paths."""
    found: dict[str, _Member] = {}
    around: list[tuple[int, str | None]] = [(0, None)]
    for line in outline(compound, expand):
        start, (base, path) = 8 * line.offset + (line.bit_offset or 0), around[-1]
        if line.path is not None:
            found.setdefault(line.path, _Member(line, start - base, path))
        if line.what == "open":
            around.append(around[-1] if line.path is None else (start, line.path))
        elif line.what == "close":
            around.pop()
    return found


def _came_along(member: _Member, others: dict[str, _Member]) -> bool:
    """Whether the other kernel does not show what is in the structure that this is in."""
    if member.around is None:
        return False
    around = others.get(member.around)
    return around is None or around.line.what != "open"


def _differences(was: _Member, now: _Member) -> Iterator[str]:
    if was.within != now.within:
        yield "moved"
    if _width(was.line) != _width(now.line) and not (was.line.unknown or now.line.unknown):
        yield "resized"
    if meanings_differ(was.line.type, now.line.type):
        yield "retyped"


def _width(line: Line) -> int:
    """In bits."""
    return 8 * (line.size or 0) if line.bit_size is None else line.bit_size


def _place(change: Change) -> tuple[int, int]:
    line = change.after or change.before
    assert line is not None
    return 8 * line.offset + (line.bit_offset or 0), change.after is not None


def meanings_differ(was: CType | None, now: CType | None) -> bool:
    """Whether two types that are both known mean different things; see `meaning`."""
    old, new = was and meaning(was), now and meaning(now)
    return old != new and old is not None and new is not None


def meaning(ctype: CType, depth: int = 0) -> Any:
    """What two equal types have in common, to compare; None for a type that is not known.

    How large a number is, is not part of it, nor what a pointer to a pointer leads to.
    """
    found = unqualified(ctype)
    if isinstance(found, Opaque):
        return None
    if isinstance(found, Base):
        return "number" if found.form == "int" else found.form, found.signed
    if isinstance(found, Array):
        inner = meaning(found.target, depth + 1) if depth < _DEPTH else ()
        return None if inner is None else ("array", inner)
    if isinstance(found, Pointer):
        inner = meaning(found.target, depth + 1) if depth < _DEPTH else ()
        return None if inner is None else ("pointer", inner)
    if isinstance(found, (Compound, Enum)):
        return found.kind, found.tag
    if isinstance(found, Function):
        return "function"
    return found.kind
