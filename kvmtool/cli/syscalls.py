"""syscalls: the system call table and the Mach traps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.outside import settled
from kvmtool.cli.render import Column, Named

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.syscalls import Call

LISTING = Listing(
    "syscalls",
    "entries",
    (
        Column("table", "TABLE"),
        Column("number", "NUMBER", "number"),
        Column("name", "NAME"),
        Column("arguments", "ARGS", "number"),
        Column("handler", "HANDLER"),
        Column("munge", "MUNGE"),
        Column("kext", "KEXT"),
        Column("outside", "OUTSIDE TEXT"),
        Column("address", "ADDRESS", "address"),
    ),
    ("table", "number", "name", "arguments", "handler", "kext", "outside"),
)


def row_of(kvm: Kvm, call: Call) -> dict[str, Any]:
    """An entry under the names that -o and JSON have."""
    row: dict[str, Any] = {c.name: getattr(call, c.name, None) for c in LISTING.columns}
    row["outside"] = False
    for name in ("handler", "munge"):
        pointer = getattr(call, name)
        if isinstance(pointer, int) and pointer:
            code = kvm.code_at(pointer)
            row[name] = Named(pointer, str(code))
            row["outside"] = row["outside"] or not code.inside
            if name == "handler":
                row["kext"] = code.kext
    return row


@click.command(cls=Sectioned)
@click.option("--traps", "only", flag_value="trap", help="Only the Mach traps.")
@click.option("--bsd", "only", flag_value="syscall", help="Only the system calls.")
@listing_options
def syscalls(where: Where, only: str | None, columns: tuple[str, ...], format: str) -> None:
    """List the system calls (sysent) and the Mach traps, each with the function that answers it.

    Of a kernel's file the tables as they were built. Where a table's symbol is stripped, as
    sysent's is from 10.11 on, it is found by how many arguments its entries take.

    \b
    Example:
      kvmtool syscalls -N mach_kernel -M core --traps
    """
    from kvmtool.errors import FaultError, FormatError, NotFoundError
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    report = Report()
    calls: list[Call] = []
    wanted = {"syscall": kvm.syscalls, "trap": kvm.traps}
    for name, walk in wanted.items():
        if only in (None, name):
            try:
                calls += walk()
            except (NotFoundError, FaultError, FormatError) as missing:
                if only is not None:
                    raise
                report.stop(f"{name}s", 0, str(missing))
    rows = settled(kvm, (row_of(kvm, call) for call in calls), report, "kext")
    LISTING.show(rows, columns, format, report)
