"""sysctl: the kernel's tree of names, with the values that lie in memory."""

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
    from kvmtool.xnu.sysctl import Oid

_FEW = 16  # bytes of an opaque value that a table shows


class _Hex(str):
    """An opaque value, as hexadecimal digits."""

    __slots__ = ()


def _shown(value: object) -> str:
    if isinstance(value, _Hex) and len(value) > 2 * _FEW:
        return f"{value[: 2 * _FEW]}… ({len(value) // 2} bytes)"
    return str(value)


LISTING = Listing(
    "sysctl",
    "names",
    (
        Column("name", "NAME"),
        Column("value", "VALUE", "text", _shown),
        Column("mib", "MIB", "list", lambda mib: ".".join(map(str, mib))),
        Column("type", "TYPE"),
        Column("fmt", "FMT"),
        Column("flags", "FLAGS", "list"),
        Column("handler", "HANDLER"),
        Column("arg1", "ARG1", "address"),
        Column("arg2", "ARG2", "number"),
        Column("kind", "KIND", "address"),
        Column("outside", "OUTSIDE TEXT"),
        Column("address", "ADDRESS", "address"),
    ),
    ("name", "value", "type", "handler"),
)


def row_of(kvm: Kvm, oid: Oid) -> dict[str, Any]:
    """An oid under the names that -o and JSON have; an opaque value as hexadecimal digits."""
    row: dict[str, Any] = {c.name: getattr(oid, c.name, None) for c in LISTING.columns}
    row["mib"] = list(oid.mib)
    row["outside"] = False
    if isinstance(oid.value, bytes):
        row["value"] = _Hex(oid.value.hex())
    if isinstance(oid.handler, int):
        code = kvm.code_at(oid.handler) if oid.handler else None
        row["handler"] = Named(oid.handler, str(code)) if code else None
        row["outside"] = code is not None and not code.inside
    return row


@click.command(cls=Sectioned)
@click.argument("name", required=False)
@click.option("--computed", is_flag=True, help="Names whose value their handler computes, too.")
@listing_options
def sysctl(
    where: Where, name: str | None, computed: bool, columns: tuple[str, ...], format: str
) -> None:
    """List the sysctl names and the values that lie in memory; with NAME those at or below it.

    A handler of its own computes its value when it is asked: such names are listed with --computed,
    or when they are named.

    \b
    Example:
      kvmtool sysctl kern -N mach_kernel -M core
    """
    from kvmtool.errors import NotFoundError
    from kvmtool.types.near import near_misses
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.sysctl import oids

    kvm = opened(where)
    report = Report()
    every = list(oids(kvm.nearest_target(), report))
    if name is not None:
        below = f"{name}."
        found = [oid for oid in every if oid.name == name or oid.name.startswith(below)]
        if not found:
            raise NotFoundError("sysctl", name, near_misses(name, [oid.name for oid in every]))
        every = found
    leaves = [oid for oid in every if oid.type != "node"]
    exact = [oid for oid in leaves if computed or oid.value is not None or oid.name == name]
    rows = settled(kvm, (row_of(kvm, oid) for oid in exact), report)
    LISTING.show(rows, columns, format, report)
