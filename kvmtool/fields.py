"""Members of structures by name, as C finds them: through unnamed structures and unions too."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from kvmtool.arithmetic import size_of
from kvmtool.errors import KvmError, NotFoundError
from kvmtool.types.ctype import DEPTH_LIMIT, Array, Compound, Field, unqualified
from kvmtool.types.declare import declare
from kvmtool.types.flatten import MEMBER_LIMIT
from kvmtool.types.near import near_members, whose_types

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import CType
    from kvmtool.types.model import TypeTable

_PART = re.compile(r"\.?([A-Za-z_$][\w$]*)|\[([0-9]{1,18}|0[xX][0-9a-fA-F]{1,16})\]")


class NoMemberError(NotFoundError, AttributeError):  # type: ignore[misc]  # both have a name
    """No such member; also an AttributeError, so that hasattr() and getattr() do as in Python."""


@functools.lru_cache(maxsize=4096)
def field_of(compound: Compound, name: str) -> Field | None:
    """The member `name` of a structure, its offset from the structure's start.

    Members of unnamed structures and unions inside count, as in C. Raises `KvmError` for a nest
    without end, and what the reader of the type raises.
    """
    return next((field for field in all_fields(compound) if field.name == name), None)


def all_fields(compound: Compound) -> Iterator[Field]:
    """Every member that can be named directly; offsets from the structure's start."""
    waiting = [(iter(compound.fields), 0)]
    looked = 0
    while waiting:
        fields, base = waiting[-1]
        field = next(fields, None)
        looked += 1
        if looked > MEMBER_LIMIT or len(waiting) > DEPTH_LIMIT:
            raise KvmError(f"{declare(compound)}: members nested without end")
        if field is None:
            waiting.pop()
        elif field.name:
            yield field._replace(offset=base + field.offset) if base else field
        elif isinstance(inner := unqualified(field.type), Compound):
            waiting.append((iter(inner.fields), base + field.offset))


def complete(types: TypeTable, compound: Compound) -> Compound:
    """The definition of a structure that is only declared where it was met.

    Raises `KvmError` where `types` have none.
    """
    if compound.complete:
        return compound
    found = types.source.find("tag", compound.tag) if compound.tag else None
    if not isinstance(found, Compound) or not found.complete:
        raise KvmError(f"{declare(compound)} is declared, but its members are not in {types.name}")
    return found


def sized(types: TypeTable, ctype: CType) -> int:
    """sizeof(ctype) in bytes, of a declaration its definition's. Raises `KvmError`."""
    plain = unqualified(ctype)
    return size_of(complete(types, plain) if isinstance(plain, Compound) else plain)


def member_of(types: TypeTable, ctype: CType, name: str) -> Field:
    """The member `name` of the structure `ctype`; its offset from the structure's start.

    Raises: NotFoundError("member") with near misses, also where there are no members at all.
    """
    plain = unqualified(ctype)
    if not isinstance(plain, Compound):
        raise NoMemberError("member", name, (), f"{declare(ctype)} has no members")
    compound = complete(types, plain)
    field = field_of(compound, name)
    if field is None:
        near = near_members(name, [field.name or "" for field in all_fields(compound)])
        hint = whose_types(types.name, types.origin)
        raise NoMemberError("member", f"{declare(compound)}.{name}", near, hint)
    return field


def place_of(types: TypeTable, ctype: CType, path: str) -> Field:
    """Where `path` ("p_list", "a.b[3].c") lies in `ctype`: a field at an offset from its start.

    Raises: NotFoundError("member"), `KvmError` for what is no path.
    """
    place, at = Field(None, ctype, 0), 0
    while at < len(path):
        part = _PART.match(path, at)
        if part is None:
            raise KvmError(f"{path!r}: expected members, as p_list or a.b[3].c")
        plain, (name, index) = unqualified(place.type), part.groups()
        if name:
            field = member_of(types, plain, name)
            place = field._replace(offset=place.offset + field.offset)
        elif isinstance(plain, Array):
            past = int(index, 0) * sized(types, plain.target)
            place = Field(None, plain.target, place.offset + past)
        else:
            raise KvmError(f"{path!r}: {declare(place.type)} is no array")
        at = part.end()
    return place


def bit_span(field: Field) -> tuple[int, int]:
    """Of a bit-field: the first byte it touches, from its structure's start, and how many.

    Raises `KvmError` for a width that no number has.
    """
    start, bits = field.bit_offset or 0, field.bit_size or 0
    if start < 0 or not 0 <= bits <= 128:
        raise KvmError(f"bit-field {field.name}: {bits} bits at bit {start} are no number's")
    first = start // 8
    return field.offset + first, (start + bits + 7) // 8 - first
