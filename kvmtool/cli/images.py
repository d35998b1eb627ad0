"""symbol and kernels: what lies at an address, what files are known."""

from __future__ import annotations

import click

from kvmtool.cli import ERROR, PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import (
    ADDRESS,
    AddressExpr,
    Where,
    choose_columns,
    columns_option,
    format_option,
    kernel_options,
)
from kvmtool.cli.render import Column, render, visible
from kvmtool.macho import uuid_text

KERNEL_COLUMNS = (
    Column("kind", "KIND"),
    Column("arch", "ARCH"),
    Column("uuid", "UUID"),
    Column("version", "VERSION"),
    Column("path", "PATH"),
)


@click.command(cls=Sectioned)
@click.argument("addresses", metavar="ADDRESS...", type=ADDRESS, nargs=-1, required=True)
@format_option
@kernel_options
def symbol(addresses: tuple[AddressExpr, ...], format: str, where: Where) -> None:
    """Print what lies at each ADDRESS, as name+offset [kext].

    In a kext whose symbols are not known, OFFSET counts from its beginning.

    Exit status: 0 when all are known, 3 when some are, 1 when none is.

    \b
    Example:
      kvmtool symbol 0xffffff80002c4ca4 -N mach_kernel
    """
    kvm = opened(where)
    rows = []
    for expression in addresses:
        address = expression.within(kvm)
        found = kvm.symbol_at(address)
        place = kvm.code_at(address) if found is None else found
        if found is None and place.kext is None:
            say(f"{address:#x} is in no segment of the kernel, and in no kext")
            continue
        if format == "table":
            click.echo(f"{address:#x} {visible(str(place))}")
        rows.append(
            {
                "address": address,
                "symbol": None if found is None else found.symbol.name,
                "offset": place.offset,
                "kext": place.kext,
                "symbol_address": None if found is None else found.symbol.address,
            }
        )
    if format != "table":
        columns = (
            Column("address", "ADDRESS", "address"),
            Column("symbol", "SYMBOL"),
            Column("offset", "OFFSET", "number"),
            Column("kext", "KEXT"),
            Column("symbol_address", "SYMBOL_ADDRESS", "address"),
        )
        render(rows, columns, format)
    if len(rows) < len(addresses):
        click.get_current_context().exit(PARTIAL if rows else ERROR)


@click.command(cls=Sectioned)
@columns_option
@format_option
@kernel_options
def kernels(columns: tuple[str, ...], format: str, where: Where) -> None:
    """List the kernels, kexts and dSYMs in the directories of --kernel-path.

    Without it, in those of KVMTOOL_KERNEL_PATH. What was seen is remembered by UUID; a core's
    kernel is taken from there when none is named.

    \b
    Example:
      kvmtool kernels --kernel-path /Library/Developer/KDKs
    """
    from kvmtool.kernel_search import survey

    chosen = choose_columns(KERNEL_COLUMNS, columns)
    found = survey(where.kernel_path or None)
    rows = (
        {**known._asdict(), "uuid": uuid_text(known.uuid) if known.uuid else None}
        for known in found.known
    )
    render(rows, chosen, format)
    if not found.files and not found.unreadable:
        say("no files: name directories with --kernel-path or KVMTOOL_KERNEL_PATH")
    for problem in found.problems:
        say(problem)
    if found.stopped:
        say(f"stopped: {found.stopped}")
    if found.stopped or found.unreadable:
        click.get_current_context().exit(PARTIAL)
