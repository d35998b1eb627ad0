"""A structure as lines, as a person reads it: every member with its place, and the holes between.

Places are normal: a bit-field's byte is the one its first bit is in, whichever byte the source of
the types counts from. Bits are numbered in the order the machine fills them (`ctype.Field`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError
from kvmtool.types.ctype import (
    DEPTH_LIMIT,
    Array,
    Base,
    Compound,
    CType,
    Enum,
    Field,
    Opaque,
    Qualified,
    Typedef,
    unqualified,
)
from kvmtool.types.declare import declare

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_LIMIT = 1 << 16  # of one structure; XNU's largest has some hundred
_HEAD = "\0"  # stands for a structure's head in a declaration


class Line(NamedTuple):
    """One line of a structure.

    `what` it is: "member", "open", "close", "value", "hole" or "padding". "open" is a member whose
    own members follow, up to its "close"; "value" is an enum's. `text` is the C without its
    semicolon. `depth` counts the structures around the line, the outermost one included. `offset`
    is bytes from the outermost structure's start; `bit_offset` (0 to 7) and `bit_size` are set for
    bit-fields, and for holes that are no whole bytes. `size` is that of the type, in bytes. `path`
    is the member's name from the outermost structure on, None where it has none. `unknown` says
    that only its place is known: `size` is the room there is for it.
    """

    what: str
    depth: int
    text: str
    offset: int = 0
    size: int | None = None
    bit_offset: int | None = None
    bit_size: int | None = None
    path: str | None = None
    type: CType | None = None
    unknown: bool = False


class Summary(NamedTuple):
    """What there is to say of a whole structure; `members` and `holes` are its own, not nested.

    `hole_bits` are lost between members, `padding_bits` after the last.
    """

    size: int
    members: int
    holes: int
    hole_bits: int
    padding_bits: int


def outline(compound: Compound, expand: bool = False) -> list[Line]:
    """The lines between the braces of the complete `compound`.

    Structures without a name are opened where they stand; with `expand` also those that have one.
    Raises `KvmError` for a nest deeper or larger than any real one, and what the reader raises.
    """
    lines: list[Line] = []
    for line in _lines(compound, "", 0, 1, expand):
        lines.append(line)
        if len(lines) > LINE_LIMIT:
            raise KvmError(f"{_named(compound)}: expected at most {LINE_LIMIT} lines")
    below = False  # whether the line below is of no known size: then nor is what it closes
    for at in range(len(lines) - 1, -1, -1):
        line = lines[at]
        below = below if line.what == "open" else _is_opaque(line.type)
        lines[at] = line._replace(unknown=below)
    return lines


def _is_opaque(ctype: CType | None) -> bool:
    return ctype is not None and isinstance(element(ctype), Opaque)


def summary(compound: Compound) -> Summary:
    """Size, holes and padding of the complete `compound`."""
    holes = [bits for what, _, bits in holes_of(compound) if what == "hole"]
    padding = sum(bits for what, _, bits in holes_of(compound) if what == "padding")
    size, members = compound.size or 0, len(compound.fields)
    return Summary(size, members, len(holes), sum(holes), padding)


def in_order(compound: Compound) -> list[Field]:
    """The members in memory order, those of one place in the order of the declaration."""
    return sorted(compound.fields, key=lambda field: start(field)) if compound.fields else []


def start(field: Field) -> int:
    """Bits from the start of its structure to `field`."""
    return 8 * field.offset + (field.bit_offset or 0)


def length(field: Field) -> int:
    """The bits that `field` takes: none if its type has no size."""
    return 8 * (field.type.size or 0) if field.bit_size is None else field.bit_size


def element(ctype: CType) -> CType:
    """What an array of arrays is made of, without typedefs; what is no array, itself."""
    for _ in range(DEPTH_LIMIT):
        ctype = unqualified(ctype)
        if not isinstance(ctype, Array):
            return ctype
        ctype = ctype.target
    raise KvmError(f"a type is an array nested deeper than {DEPTH_LIMIT}")


def holes_of(compound: Compound) -> list[tuple[str, int, int]]:
    """Where no member lies: ("hole" or "padding", first bit, how many bits), in order.

    A union has padding only, and neither is known of a structure with members of unknown types.
    """
    end, found = 0, []
    for field in in_order(compound):
        if start(field) > end and compound.kind != "union":
            found.append(("hole", end, start(field) - end))
        end = max(end, start(field) + length(field))
    if end < 8 * (compound.size or 0):
        found.append(("padding", end, 8 * (compound.size or 0) - end))
    return found


def _lines(compound: Compound, prefix: str, base: int, depth: int, expand: bool) -> Iterator[Line]:
    if depth > DEPTH_LIMIT:
        raise KvmError(f"{_named(compound)}: structures nested deeper than {DEPTH_LIMIT}")
    holes = holes_of(compound)[::-1]
    for field in in_order(compound):
        if holes and holes[-1][1] < start(field):
            yield _hole(*holes.pop(), base, depth)
        yield from _member(field, prefix, base, depth, expand)
    yield from (_hole(*hole, base, depth) for hole in holes)


def _hole(what: str, first: int, bits: int, base: int, depth: int) -> Line:
    at = base + first // 8
    if first % 8 or bits % 8:
        return Line(what, depth, "", at, None, first % 8, bits)
    return Line(what, depth, "", at, bits // 8)


def _member(field: Field, prefix: str, base: int, depth: int, expand: bool) -> Iterator[Line]:
    name = field.name or ""
    path = prefix + name if name else None
    bit = None if field.bit_size is None else start(field) % 8
    at = base + start(field) // 8
    place = (at, field.type.size, bit, field.bit_size, path, field.type)
    inner = None if bit is not None else _inside(field.type, expand)
    if inner is None:
        text = f"{name}" if _is_opaque(field.type) else declare(field.type, name)
        text += "" if field.bit_size is None else f":{field.bit_size}"
        yield Line("member", depth, text, *place)
        return
    head, _, tail = declare(_stand_in(field.type), name).partition(_HEAD)
    tag = f"{inner.kind} {inner.tag} " if inner.tag else f"{inner.kind} "
    typedef = _typedef_of(field.type)
    said = f" /* {typedef} */" if typedef else ""
    yield Line("open", depth, f"{head}{tag}{{{said}", *place)
    if isinstance(inner, Enum):
        yield from (Line("value", depth + 1, f"{n} = {v},") for n, v in inner.values)
    else:
        below = f"{path}{'[0]' * _dimensions(field.type)}." if path else prefix
        yield from _lines(inner, below, at, depth + 1, expand)
    yield Line("close", depth, f"}}{tail}")


def _inside(ctype: CType, expand: bool) -> Compound | Enum | None:
    """What to open of a member of this type: a structure that cannot be asked for by name."""
    found = element(ctype)
    if isinstance(found, Compound) and found.complete:
        return found if expand or not (found.tag or _typedef_of(ctype)) else None
    if isinstance(found, Enum):
        return None if found.tag or _typedef_of(ctype) else found
    return None


def _typedef_of(ctype: CType) -> str | None:
    """The typedef name by which the member is declared; None if it is declared by what it is."""
    while isinstance(ctype, (Array, Qualified)):  # `element` has come to the end of it
        ctype = ctype.target
    return ctype.name if isinstance(ctype, Typedef) else None


def _stand_in(ctype: CType) -> CType:
    """`ctype` with `_HEAD` in place of the structure in it."""
    if isinstance(ctype, Array):
        return Array(_stand_in(ctype.target), ctype.count)
    if isinstance(ctype, Qualified):
        return Qualified(ctype.qualifier, _stand_in(ctype.target))
    if isinstance(ctype, Typedef) and isinstance(unqualified(ctype), Array):
        return _stand_in(unqualified(ctype))
    return Base(_HEAD, 0)


def _dimensions(ctype: CType) -> int:
    found, count = unqualified(ctype), 0
    while isinstance(found, Array):
        found, count = unqualified(found.target), count + 1
    return count


def _named(compound: Compound) -> str:
    return f"{compound.kind} {compound.tag or '{...}'}"
