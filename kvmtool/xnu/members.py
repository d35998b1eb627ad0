"""Members of one structure by name, bit-fields included, read in one go.

`Record` is quicker, but knows no bit-fields and no unions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtool.target import Target
    from kvmtool.types.flatten import Member

_SIZES = {"B": 1, "H": 2, "I": 4, "i": 4, "Q": 8, "q": 8}


class _Place(NamedTuple):
    """`size` bytes at `offset`; the value is `bits` wide after `shift`; `kind` is its code."""

    offset: int
    size: int
    shift: int
    bits: int
    kind: str


class Members:
    """Reads some members of `struct`. What is not in this kernel is None in every record.

    Codes are those of `struct` (B H I i Q q), "W" for an unsigned long and "P" for a pointer
    (stripped). A bit-field is read as such whatever its code is.
    """

    def __init__(
        self,
        target: Target,
        struct: str,
        wanted: Mapping[str, tuple[str, *tuple[str, ...]]],
        inside: int = 0,
    ) -> None:
        """`wanted` maps our name to (code, the member's names, newest first).

        `inside` is where the structure lies in what `read` is given the address of, in bytes.
        """
        self._target = target
        self._order: Literal["little", "big"] = "little" if target.arch.byteorder == "<" else "big"
        found = target.types.find_struct(struct)
        members = found.members if found is not None else {}
        self._places: dict[str, _Place | None] = {}
        for name, (code, *names) in wanted.items():
            member = next((members[other] for other in names if other in members), None)
            self._places[name] = None if member is None else self._place(member, code, inside)
        there = [place for place in self._places.values() if place is not None]
        self._low = min((place.offset for place in there), default=0)
        self._size = max((place.offset + place.size for place in there), default=0) - self._low

    @property
    def names(self) -> list[str]:
        """Ours of the members that this kernel has."""
        return [name for name, place in self._places.items() if place is not None]

    def _place(self, member: Member, code: str, inside: int) -> _Place:
        if member.bit_size is not None:
            start, bits = member.bit_offset or 0, member.bit_size
            size = (start % 8 + bits + 7) // 8
            before = start % 8
            shift = before if self._order == "little" else 8 * size - before - bits
            return _Place(inside + member.offset + start // 8, size, shift, bits, "I")
        size = _SIZES.get(code, self._target.arch.pointer_size)
        return _Place(inside + member.offset, size, 0, 8 * size, code)

    def read(self, address: int) -> dict[str, Any]:
        """The members of the structure at `address`; never raises `FaultError`."""
        if not self._size:
            return dict.fromkeys(self._places)
        try:
            data = self._target.memory.read(address + self._low, self._size)
        except FaultError:
            return {name: self._alone(address, place) for name, place in self._places.items()}
        return {
            name: None if place is None else self._value(place, data, place.offset - self._low)
            for name, place in self._places.items()
        }

    def _alone(self, address: int, place: _Place | None) -> Any:
        if place is None:
            return None
        try:
            data = self._target.memory.read(address + place.offset, place.size)
        except FaultError as fault:
            return Unreadable.of(fault)
        return self._value(place, data, 0)

    def _value(self, place: _Place, data: bytes, at: int) -> int:
        number = int.from_bytes(data[at : at + place.size], self._order) >> place.shift
        number &= (1 << place.bits) - 1
        if place.kind == "P":
            return self._target.strip(number)
        if place.kind in "iq" and number >> (place.bits - 1):
            number -= 1 << place.bits
        return number
