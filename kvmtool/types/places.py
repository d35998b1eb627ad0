"""Which member lies at a byte of a structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError
from kvmtool.types.ctype import DEPTH_LIMIT, Array, Compound, Opaque, unqualified
from kvmtool.types.outline import LINE_LIMIT, holes_of, in_order, length, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import CType


class Place(NamedTuple):
    """What covers a byte: the member `path` ("p_comm[3]"), or a "hole" or "padding" in it.

    `offset` is bytes from the outermost start to that member (hole), `size` its bytes;
    `bit_offset` (0 to 7) and `bit_size` are set for bit-fields and holes of bits.
    """

    what: str
    path: str
    offset: int
    size: int | None
    bit_offset: int | None = None
    bit_size: int | None = None
    type: CType | None = None


def places(ctype: CType, offset: int) -> list[Place]:
    """The innermost members that cover the byte at `offset`: several in unions and of bit-fields.

    Raises `KvmError` for a byte that is not in the type, and for damaged types.
    """
    size = ctype.size
    if size is None or not 0 <= offset < size:
        extent = "no size" if size is None else f"{size:#x} bytes"
        raise KvmError(f"offset {offset:#x} is outside: the type has {extent}")
    found = []
    for place in _at(ctype, "", 0, offset, 0):
        found.append(place)
        if len(found) > LINE_LIMIT:
            raise KvmError(f"expected at most {LINE_LIMIT} members at offset {offset:#x}")
    return found


def _at(ctype: CType, path: str, base: int, offset: int, depth: int) -> Iterator[Place]:
    if depth > DEPTH_LIMIT:
        raise KvmError(f"{path}: structures nested deeper than {DEPTH_LIMIT}")
    found = unqualified(ctype)
    if isinstance(found, Array):
        step = found.target.size or 0
        if step and not isinstance(unqualified(found.target), Opaque):
            index = (offset - base) // step
            yield from _at(found.target, f"{path}[{index}]", base + index * step, offset, depth + 1)
            return
    elif isinstance(found, Compound) and found.complete:
        yield from _inside(found, path, base, offset, depth)
        return
    yield Place("member", path, base, ctype.size, type=ctype)


def _inside(compound: Compound, path: str, base: int, offset: int, depth: int) -> Iterator[Place]:
    first, last = 8 * (offset - base), 8 * (offset - base) + 8
    for field in in_order(compound):
        if start(field) >= last or start(field) + length(field) <= first:
            continue
        below = ".".join(filter(None, (path, field.name)))
        at = base + start(field) // 8
        if field.bit_size is None:
            yield from _at(field.type, below, at, offset, depth + 1)
        else:
            place = (at, field.type.size, start(field) % 8, field.bit_size)
            yield Place("member", below, *place, field.type)
    for what, begin, bits in holes_of(compound):
        if begin < last and begin + bits > first:
            at = base + begin // 8
            if begin % 8 or bits % 8:
                yield Place(what, path, at, None, begin % 8, bits)
            else:
                yield Place(what, path, at, bits // 8)
