"""load: load averages, boot time, how much there was to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened, time_fields
from kvmtool.cli.render import Column

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.xnu.load import Load


def _averages(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


LISTING = Listing(
    "load",
    "fields",
    (
        Column("loadavg", "load averages (1, 5, 15 min)", "list", _averages),
        Column("avenrun", "avenrun (5, 30, 60 s)", "list", _averages),
        Column("mach_factor", "mach_factor (5, 30, 60 s)", "list", _averages),
        Column("boottime", "boottime"),
        Column("boottime_raw", "boottime_raw", "list"),
        Column("nprocs", "nprocs", "number"),
        Column("tasks", "tasks", "number"),
        Column("threads", "threads", "number"),
        Column("maxproc", "maxproc", "number"),
    ),
    ("boottime", "nprocs", "tasks", "threads", "loadavg", "avenrun", "mach_factor"),
)


def row_of(found: Load) -> dict[str, Any]:
    """The load under the names that -o and JSON have."""
    row = {name: getattr(found, name) for name in found.__slots__}
    return {**row, **time_fields("boottime", found.boottime)}


@click.command(cls=Sectioned)
@listing_options
def load(where: Where, columns: tuple[str, ...], format: str) -> None:
    """Print the load averages, when the kernel booted, and how many processes it had.

    The load averages are getloadavg(3)'s; avenrun and mach_factor are Mach's own, the latter the
    share of a processor that one more thread could have had.

    \b
    Example:
      kvmtool load -N mach_kernel -M core
    """
    from kvmtool.xnu.load import load as look
    from kvmtool.xnu.queues import Report

    LISTING.show_one(row_of(look(opened(where).nearest_target())), columns, format, Report())
