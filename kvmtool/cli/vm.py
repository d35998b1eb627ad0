"""vm: the counters of virtual memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.params import Where
    from kvmtool.xnu.vm import Vm

LISTING = Listing(
    "vm",
    "counters",
    (
        Column("group", "GROUP"),
        Column("counter", "COUNTER"),
        Column("value", "VALUE", "number"),
        Column("unit", "UNIT"),
        Column("bytes", "BYTES", "number"),
    ),
    ("group", "counter", "value", "unit", "bytes"),
)


def rows(found: Vm) -> Iterator[dict[str, Any]]:
    """Every counter under the names that -o and JSON have."""
    size = found.page_size
    yield _row("page", "page_size", size, "bytes", size)
    for name, value in found.pages.items():
        yield _row("pages", name, value, "pages", size)
    for name, value in found.compressor.items():
        unit = name.partition("_")[0]
        known = unit if unit in ("pages", "bytes") else name.replace("_", " ")
        yield _row("compressor", name, value, known, size)
    for name, value in found.events.items():
        yield _row("events", name, value, "times", size)


def _row(group: str, name: str, value: Any, unit: str, page: Any) -> dict[str, Any]:
    size = value if unit == "bytes" else None
    if unit == "pages" and isinstance(value, int):
        size = value * page if isinstance(page, int) else page
    elif isinstance(value, Unreadable):
        size = value if unit == "pages" else size
    return {"group": group, "counter": name, "value": value, "unit": unit, "bytes": size}


@click.command(cls=Sectioned)
@listing_options
def vm(where: Where, columns: tuple[str, ...], format: str) -> None:
    """Print the counters of virtual memory, as vm_stat and sysctl vm do.

    Pages as they are counted now, what the compressor holds, and what has happened since boot.

    \b
    Example:
      kvmtool vm -N mach_kernel -M core
    """
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.vm import vm as look

    report = Report()
    found = look(opened(where).nearest_target(), report)
    LISTING.show(rows(found), columns, format, report)
