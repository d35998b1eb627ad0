"""devsw: the device switches, every function by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.outside import settled
from kvmtool.cli.render import Column, Named
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kexts import Code
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.devsw import Device

# what fills a slot, or a function of one, that no driver has taken: bsd/kern/subr_xxx.c, conf.h
_STUBS = ("_enodev", "_enodev_strat", "_nulldev", "_eno_", "_nodev", "_seltrue", "_asc_")
_FUNCTIONS = (
    *("open", "close", "read", "write", "ioctl", "stop", "reset", "select", "mmap", "strategy"),
    *("dump", "psize", "reserved_1", "reserved_2"),
)
LISTING = Listing(
    "devsw",
    "slots",
    (
        Column("kind", "KIND"),
        Column("major", "MAJOR", "number"),
        Column("driver", "DRIVER"),
        Column("type", "TYPE"),
        *(Column(name, name.upper(), "text") for name in _FUNCTIONS),
        Column("ttys", "TTYS", "address"),
        Column("outside", "OUTSIDE TEXT", "list"),
        Column("address", "ADDRESS", "address"),
    ),
    ("kind", "major", "driver", "type", "open", "read", "ioctl", "strategy", "outside"),
)


def _driver(codes: dict[str, Code]) -> str | None:
    """Who took the slot: a kext, "kernel", or nobody."""
    taken = [
        code
        for code in codes.values()
        if code.address and not (code.symbol or "").startswith(_STUBS)
    ]
    owners = list(dict.fromkeys(code.kext or "kernel" for code in taken if code.inside))
    if not owners:
        return "?" if taken else None
    return owners[0] if len(owners) == 1 else ", ".join(owners)


def row_of(kvm: Kvm, device: Device) -> dict[str, Any]:
    """A slot under the names that -o and JSON have."""
    from kvmtool.xnu.devsw import TYPES

    row: dict[str, Any] = dict.fromkeys(_FUNCTIONS)
    codes: dict[str, Code] = {}
    for name, pointer in device.functions.items():
        if isinstance(pointer, Unreadable):
            row[name] = pointer
            continue
        codes[name] = kvm.code_at(pointer)
        row[name] = Named(pointer, str(codes[name]))
    odd = next((cell for cell in row.values() if isinstance(cell, Unreadable)), None)
    known = device.type if isinstance(device.type, Unreadable) else TYPES.get(device.type, "?")
    return {
        "kind": device.kind,
        "major": device.major,
        "driver": _driver(codes) if odd is None else odd,
        "type": known,
        **row,
        "ttys": device.ttys,
        "outside": [name for name, code in codes.items() if code.address and not code.inside],
        "address": device.address,
    }


@click.command(cls=Sectioned)
@click.option("--all", "every", is_flag=True, help="Slots that no driver has taken, too.")
@listing_options
def devsw(where: Where, every: bool, columns: tuple[str, ...], format: str) -> None:
    """List the character and block device switches, and which driver owns each slot.

    A function that lies in no known text is named under OUTSIDE TEXT. Of a kernel's file the
    switches are as they were built.

    \b
    Example:
      kvmtool devsw -N mach_kernel -M core -o major,driver,read
    """
    from kvmtool.xnu.devsw import devices
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    report = Report()
    found = (row_of(kvm, device) for device in devices(kvm.built_target(), report))
    rows = settled(kvm, found, report, "driver")
    taken = (row for row in rows if every or row["driver"] is not None)
    LISTING.show(taken, columns, format, report)
