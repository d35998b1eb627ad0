"""mounts: the mounted file systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.xnu.mount import Mount

LISTING = Listing(
    "mounts",
    "mounts",
    (
        Column("from", "FILESYSTEM"),
        Column("on", "MOUNTED ON"),
        Column("type", "TYPE"),
        Column("options", "OPTIONS", "list", ", ".join),
        Column("flags", "FLAGS", "address"),
        Column("bsize", "BSIZE", "number"),
        Column("iosize", "IOSIZE", "number"),
        Column("blocks", "BLOCKS", "number"),
        Column("bfree", "FREE", "number"),
        Column("bavail", "AVAIL", "number"),
        Column("bused", "USED", "number"),
        Column("files", "FILES", "number"),
        Column("ffree", "FFREE", "number"),
        Column("fsid", "FSID", "list"),
        Column("owner", "OWNER", "number"),
        Column("vnodecovered", "COVERS", "address"),
        Column("address", "MOUNT", "address"),
    ),
    ("from", "on", "type", "options"),
)


def row_of(mount: Mount) -> dict[str, Any]:
    """A mount under the names that -o and JSON have."""
    row = {c.name: getattr(mount, c.name) for c in LISTING.columns if c.name != "from"}
    return {"from": mount.from_, **row}


@click.command(cls=Sectioned)
@listing_options
def mounts(where: Where, columns: tuple[str, ...], format: str) -> None:
    """List the mounted file systems, as mount does.

    Sizes are in blocks of BSIZE bytes, as the kernel keeps them.

    \b
    Example:
      kvmtool mounts -N mach_kernel -M core -o from,on,bavail
    """
    from kvmtool.xnu.mount import mounts as walk
    from kvmtool.xnu.queues import Report

    target = opened(where).verified_target()
    report = Report()
    LISTING.show(map(row_of, walk(target, report)), columns, format, report)
