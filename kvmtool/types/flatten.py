"""A structure with the members of the structures inside it, by dotted names.

This is the form the kernel object model asks in: `proc` has "p_list.le_next" at an offset from the
start of the proc. Members of unnamed structures and unions go by their own names, as in C; what is
in an array is not listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError
from kvmtool.types.ctype import DEPTH_LIMIT, Compound, unqualified

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MEMBER_LIMIT = 1 << 16  # of one flattened structure; XNU's largest have some hundred


class Member(NamedTuple):
    """One member: `offset` in bytes; for a bit-field also which bits.

    A little-endian bit-field's value is `(n >> bit_offset) & ((1 << bit_size) - 1)`, where n is the
    number that starts at byte `offset` and is wide enough to hold the field; `ctype.Field` says how
    bits are counted in either byte order. `bit_offset` may exceed 7. A `bit_size` of 0 is C's
    unnamed zero-width field. Both are None for what is not a bit-field.
    """

    name: str
    offset: int
    bit_offset: int | None = None
    bit_size: int | None = None


class Struct:
    """A structure or union: its C tag, its size in bytes, its members by name, in memory order."""

    __slots__ = ("members", "name", "size")

    def __init__(self, name: str, size: int, members: Mapping[str, Member]) -> None:
        self.name = name
        self.size = size
        self.members = members

    def __repr__(self) -> str:
        return f"<Struct {self.name}: {self.size:#x} bytes, {len(self.members)} members>"


def flatten(compound: Compound) -> Struct:
    """The complete `compound`, flattened; of two members of one name the first counts.

    Raises `KvmError` for a nest deeper or larger than any real one.
    """
    members: dict[str, Member] = {}
    for count, member in enumerate(_members(compound)):
        if member.name:
            members.setdefault(member.name, member)
        if count > MEMBER_LIMIT:
            raise KvmError(f"struct {compound.tag}: expected at most {MEMBER_LIMIT} members")
    ordered = sorted(members.values(), key=lambda member: (member.offset, member.bit_offset or 0))
    size = compound.size or 0
    return Struct(compound.tag or "", size, {member.name: member for member in ordered})


def _members(compound: Compound) -> Iterator[Member]:
    """All members, those without a name with an empty one."""
    nest = [(iter(compound.fields), "", 0)]  # what is left of each structure, its prefix, its start
    while nest:
        fields, prefix, base = nest[-1]
        for field in fields:
            offset = base + field.offset
            name = prefix + field.name if field.name else ""  # what has none still counts
            yield Member(name, offset, field.bit_offset, field.bit_size)
            inner = unqualified(field.type)
            if isinstance(inner, Compound):
                if len(nest) > DEPTH_LIMIT:
                    what = f"structures nested deeper than {DEPTH_LIMIT}"
                    raise KvmError(f"struct {inner.tag}: {what}")
                nest.append((iter(inner.fields), f"{name}." if name else prefix, offset))
                break
        else:
            nest.pop()
