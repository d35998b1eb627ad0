"""Two tables of types held against each other, member by member."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvmtool.types.flatten import Member
    from kvmtool.types.model import TypeTable


class Comparison(NamedTuple):
    """How much was compared; the differing members ("size": of the structure) by structure."""

    structs: int
    members: int
    differences: dict[str, list[str]]


def compare(first: TypeTable, second: TypeTable, alike: bool = False) -> Comparison:
    """Sizes and places of every structure and member both have.

    `alike` leaves out structures that are not of one size with members of the same names: what two
    releases have in common.
    """
    structs = members = 0
    differences: dict[str, list[str]] = {}
    for tag in sorted({*first.structs()} & {*second.structs()}):
        one, other = first.find_struct(tag), second.find_struct(tag)
        if one is None or other is None:
            continue
        if alike and (one.size, set(one.members)) != (other.size, set(other.members)):
            continue
        structs += 1
        wrong = ["size"] if one.size != other.size else []
        for name in one.members.keys() & other.members.keys():
            members += 1
            if _place(one.members[name]) != _place(other.members[name]):
                wrong.append(name)
        if wrong:
            differences[tag] = sorted(wrong)
    return Comparison(structs, members, differences)


def _place(member: Member) -> tuple[int, int | None]:
    """The first bit and the width: readers differ in the byte they count a bit-field from."""
    return member.offset * 8 + (member.bit_offset or 0), member.bit_size
