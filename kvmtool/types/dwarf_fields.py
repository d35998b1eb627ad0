"""The members of a structure: offsets, and DWARF's two ways of counting the bits of a bit-field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.ctype import Field
from kvmtool.types.dwarf_abbrevs import uleb

if TYPE_CHECKING:
    from kvmtool.types.ctype import CType
    from kvmtool.types.dwarf_dies import DebugInfo, Die

SIZE_LIMIT = 1 << 32  # bytes of any type; elements of any array
_OP_CONSTU, _OP_PLUS_UCONST = 0x10, 0x23


class Maker(Protocol):
    """What makes the members' types."""

    def type_of(self, die: Die) -> CType:
        """See `dwarf_types.TypeMaker`."""


def fields(maker: Maker, info: DebugInfo, die: Die) -> list[Field]:
    """The members of the complete structure `die`. Raises `FormatError`.

    Static members have no place in it; where a virtual base class lies only an object tells.
    """
    found = []
    for child in info.children(die):
        if child.tag not in (dw.TAG_MEMBER, dw.TAG_INHERITANCE) or _is_static(child):
            continue
        offset = _location(child)
        if offset is None:
            continue
        name = info.name(child) if child.tag == dw.TAG_MEMBER else None
        found.append(_field(maker, info, die, child, name, offset))
    return found


def _is_static(child: Die) -> bool:
    return bool(child.number(dw.AT_DECLARATION)) or (
        bool(child.number(dw.AT_EXTERNAL)) and dw.AT_DATA_MEMBER_LOCATION not in child.values
    )


def _location(child: Die) -> int | None:
    """DW_AT_data_member_location in bytes; 0 where it is left out, None for what is computed."""
    value = child.values.get(dw.AT_DATA_MEMBER_LOCATION, 0)
    if isinstance(value, int):
        return value
    if isinstance(value, bytes) and value[:1] and value[0] in (_OP_PLUS_UCONST, _OP_CONSTU):
        try:
            offset, end = uleb(value, 1)
        except (IndexError, ValueError):
            raise child.bad(f"a member's location, got {value.hex()}") from None
        if end == len(value):
            return offset
    return None


def _field(
    maker: Maker, info: DebugInfo, die: Die, child: Die, name: str | None, offset: int
) -> Field:
    ctype = maker.type_of(child)
    width = child.number(dw.AT_BIT_SIZE)
    if width is None:
        _check(die, child, offset)
        return Field(name, ctype, offset)
    size = ctype.size or 8
    if not 0 <= width <= 8 * size:
        raise child.bad(f"a bit-field of {width:#x} bits in a type of {size:#x} bytes")
    start = _first_bit(info, child, offset, width, size)
    _check(die, child, start // 8)
    # from the storage unit on, as pahole shows it, unless packing made it cross that unit's end
    begin = start // (8 * size) * size
    if start + width > 8 * (begin + size):
        begin = start // 8
    return Field(name, ctype, begin, start - 8 * begin, width)


def _first_bit(info: DebugInfo, child: Die, offset: int, width: int, size: int) -> int:
    """Bits from the structure's start to the bit-field, in the order the machine fills them."""
    first = child.number(dw.AT_DATA_BIT_OFFSET)  # DWARF 4, 5.5.6
    if first is not None:
        return 8 * offset + first
    skipped = child.number(dw.AT_BIT_OFFSET)  # DWARF 2, 5.5.4: from the most significant bit
    if skipped is None:
        return 8 * offset
    if skipped >= 1 << 31:  # below zero, from a compiler that wrote it without its sign
        skipped -= 1 << (64 if skipped >= 1 << 63 else 32)
    if info.byteorder == ">":
        return 8 * offset + skipped
    storage = child.number(dw.AT_BYTE_SIZE)
    return 8 * offset + 8 * (size if storage is None else storage) - skipped - width


def _check(die: Die, child: Die, offset: int) -> None:
    size = die.number(dw.AT_BYTE_SIZE) or 0
    if not 0 <= offset <= size:
        raise child.bad(f"a member at {offset:#x} of a structure of {size:#x} bytes")
