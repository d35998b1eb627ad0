"""type --diff: what differs between two kernels in a type."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvmtool.cli import say
from kvmtool.cli.render import Column, render
from kvmtool.types.chained import origin_of
from kvmtool.types.compare import compare, compare_values, meanings_differ
from kvmtool.types.ctype import Compound, CType, Enum, unqualified
from kvmtool.types.declare import declare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.model import TypeTable
    from kvmtool.types.outline import Line

_MANY = 3
Row = dict[str, Any]

_SIDES = ("", "_other")
_PLACES = ("offset", "bit_offset", "size", "bit_size")
COLUMNS = (
    Column("change", "CHANGE", "list"),
    Column("name", "MEMBER"),
    *(Column(name + side, "", "number") for name in _PLACES for side in _SIDES),
    *(Column("type" + side, "") for side in _SIDES),
)
SHOWN = (*COLUMNS[:2], Column("offset", "OFFSET"), Column("size", "SIZE"), Column("type", "TYPE"))
VALUES = (*COLUMNS[:2], *(Column("value" + side, "", "number") for side in _SIDES))
VALUES_SHOWN = (*COLUMNS[:2], Column("value", "VALUE"))


def show_diff(
    name: str, ours: tuple[TypeTable, CType], other: TypeTable, expand: bool, format: str
) -> None:
    """Write what differs in the type `name` from `ours` to that of `other`.

    The first row is the type itself; of enums there are only values. Raises
    NotFoundError("type") when `other` lacks it.
    """
    table, ctype = ours
    sides = (table, ctype), (other, other.type(name))
    before, after = (unqualified(one) for _, one in sides)
    rows, columns, shown = [_whole(name, before, after)], COLUMNS, SHOWN
    if isinstance(before, Compound) and isinstance(after, Compound):
        for path, kinds, was, now in compare(before, after, expand):
            rows.append(_row(path, kinds, _of_line(was), _of_line(now)))
    elif isinstance(before, Enum) and isinstance(after, Enum):
        changes = compare_values(before, after)
        rows = [
            dict(zip(("name", "change", "value", "value_other"), c, strict=True)) for c in changes
        ]
        columns, shown = VALUES, VALUES_SHOWN
    first, second = (origin_of(types.source, one) for types, one in sides)
    say(f"from {first} to {second}")
    if not any(row["change"] for row in rows):
        say(f"{name} is alike in both")
    if format == "table":
        render(_joined(rows), shown, format)
    else:
        render(rows, columns, format)


def _whole(name: str, before: CType, after: CType) -> Row:
    """The row of the type itself."""
    kinds = ["resized"] if before.size != after.size else []
    kinds += ["retyped"] if meanings_differ(before, after) else []
    sides = [{"offset": 0, "size": ctype.size, "type": declare(ctype)} for ctype in (before, after)]
    return _row(name, tuple(kinds), *sides)


def _of_line(line: Line | None) -> Row:
    if line is None:
        return {}
    found: Row = {name: getattr(line, name) for name in _PLACES}
    if line.unknown or line.type is None:
        return {**found, "size": None, "type": None}
    return {**found, "type": declare(line.type)}


def _row(name: str, change: tuple[str, ...], before: Row, after: Row) -> Row:
    row: Row = {"change": list(change), "name": name}
    for key in (*_PLACES, "type"):
        row[key], row[f"{key}_other"] = before.get(key), after.get(key)
    return row


def _joined(rows: list[Row]) -> Iterator[Row]:
    """The cells of `rows`; of members that moved together, a line for all of them."""
    for shift, group in groupby(rows, key=_shift):
        members = list(group)
        if shift is None or len(members) < _MANY:
            yield from map(_cells, members)
        else:
            names = f"{members[0]['name']} ... {members[-1]['name']}"
            by = f"{'-' if shift < 0 else '+'}{abs(shift):#x}"
            cells = dict.fromkeys(("size", "type"))
            text = f"{len(members)} members by {by}"
            yield {"change": ["moved"], "name": names, "offset": text, **cells}


def _shift(row: Row) -> int | None:
    """By how many bytes a member moved to which nothing else happened."""
    if row["change"] != ["moved"] or row["bit_offset"] != row["bit_offset_other"]:
        return None
    shift: int = row["offset_other"] - row["offset"]
    return shift


def _cells(row: Row) -> Row:
    """What a person reads: one value, or two and an arrow."""
    sides = [{key: row.get(key + side) for key in (*_PLACES, "type", "value")} for side in _SIDES]
    texts: list[Row] = []
    for side in sides:
        offset, bit, bits = side["offset"], side["bit_offset"], side["bit_size"]
        place = None if offset is None else f"{offset:#x}{'' if bit is None else f':{bit}'}"
        size = side["size"] if bits is None else f"{bits}b"
        texts.append({"offset": place, "size": size, "type": side["type"], "value": side["value"]})
    before, after = texts
    cells = {key: _arrow(before[key], after[key]) for key in before}
    return {"change": row["change"], "name": row["name"], **cells}


def _arrow(before: Any, after: Any) -> str | None:
    if before == after:
        return None if before is None else f"{before}"
    return f"{'-' if before is None else before} -> {'-' if after is None else after}"
