"""zones: the zones of the kernel's allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.cli.params import Where
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.zone import Zone

LISTING = Listing(
    "zones",
    "zones",
    (
        Column("name", "ZONE NAME"),
        Column("elem_size", "ELEM SIZE", "number"),
        Column("cur_size", "CUR SIZE", "number"),
        Column("max_size", "MAX SIZE", "number"),
        Column("elements", "CUR #ELTS", "number"),
        Column("max_elements", "MAX #ELTS", "number"),
        Column("in_use", "CUR INUSE", "number"),
        Column("cached", "CACHED", "number"),
        Column("alloc_size", "ALLOC SIZE", "number"),
        Column("alloc_elements", "ALLOC COUNT", "number"),
        Column("sum_size", "TOTAL ALLOCS", "number"),
        Column("flags", "FLAGS", "list"),
        Column("index", "INDEX", "number"),
        Column("address", "ZONE", "address"),
    ),
    (
        *("name", "elem_size", "cur_size", "max_size", "elements", "max_elements", "in_use"),
        *("alloc_size", "alloc_elements", "address"),
    ),
)
_NAMES = [column.name for column in LISTING.columns if column.kind != "list"]


def row_of(zone: Zone) -> dict[str, Any]:
    """A zone under the names that -o and JSON have."""
    return {column.name: getattr(zone, column.name) for column in LISTING.columns}


def _sorted(rows: Iterable[dict[str, Any]], by: str | None) -> Iterable[dict[str, Any]]:
    """Texts ascending, numbers from the largest down; what is not known last."""
    if by is None:
        return rows
    whole = list(rows)
    kind = str if by == "name" else int
    known = [row for row in whole if isinstance(row[by], kind)]
    known.sort(key=lambda row: row[by], reverse=kind is int)
    return known + [row for row in whole if not isinstance(row[by], kind)]


def _counted(rows: Iterable[dict[str, Any]], report: Report) -> Iterator[dict[str, Any]]:
    """The rows; then what they come to together is noted."""
    count = size = used = 0
    for row in rows:
        count += 1
        elem, in_use, current = row["elem_size"], row["in_use"], row["cur_size"]
        size += current if isinstance(current, int) else 0
        used += in_use * elem if isinstance(in_use, int) and isinstance(elem, int) else 0
        yield row
    report.notes.append(f"{count} zones: {size} bytes, {used} of them in use")


@click.command(cls=Sectioned)
@click.option("--name", metavar="TEXT", help="Only zones that have TEXT in their name.")
@click.option(
    "--sort", type=click.Choice(_NAMES), metavar="COLUMN", help="Sort by a column, e.g. cur_size."
)
@listing_options
def zones(
    name: str | None, sort: str | None, where: Where, columns: tuple[str, ...], format: str
) -> None:
    """List the zones of the kernel's allocator, as zprint does.

    Sizes are in bytes. CUR INUSE are elements that somebody has: what lies free in the caches of
    the processors (CACHED, macOS 11 on) is not among them. What the zones come to is said at the
    end, on stderr.

    \b
    Example:
      kvmtool zones -N mach_kernel -M core --sort cur_size
    """
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.zone import zones as walk

    report = Report()
    found = map(row_of, walk(opened(where).verified_target(), report))
    rows = (row for row in found if name is None or name in str(row["name"]))
    LISTING.show(_counted(_sorted(rows, sort), report), columns, format, report)
