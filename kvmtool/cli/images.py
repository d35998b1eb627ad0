"""kexts, symbol and kernels: what is in an image, what lies at an address, what files are known."""

from __future__ import annotations

import click

from kvmtool.cli import ERROR, PARTIAL, say
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

KEXT_COLUMNS = (
    Column("identifier", "IDENTIFIER"),
    Column("version", "VERSION"),
    Column("uuid", "UUID"),
    Column("address", "ADDRESS", "address"),
    Column("size", "SIZE", "address"),
    Column("symbols", "SYMBOLS", "number"),
    Column("origin", "SYMBOLS FROM"),
    Column("dependencies", "LINKED AGAINST", "list"),
    Column("path", "PATH"),
)
_KEXTS_SHOWN = ("address", "size", "identifier", "version", "uuid", "origin")

KERNEL_COLUMNS = (
    Column("kind", "KIND"),
    Column("arch", "ARCH"),
    Column("uuid", "UUID"),
    Column("version", "VERSION"),
    Column("path", "PATH"),
)


@click.command()
@columns_option
@format_option
@kernel_options
def kexts(columns: tuple[str, ...], format: str, where: Where) -> None:
    """List the kexts in a kernel's image, and the files named with --kext.

    A kext's symbols are found as KEXT:SYMBOL by every command; the last part of its identifier will
    do where no other kext has it.

    \b
    Example:
      kvmtool kexts -N kernelcache
    """
    chosen = choose_columns(KEXT_COLUMNS, columns, _KEXTS_SHOWN if format == "table" else ())
    rows = (
        {
            **{name: getattr(kext, name) for name in ("identifier", "version", "size", "origin")},
            "uuid": None if kext.uuid is None else uuid_text(kext.uuid),
            "address": kext.address or None,
            "symbols": len(kext.symbols),
            "dependencies": list(kext.dependencies),
            "path": kext.path,
        }
        for kext in opened(where).kexts
    )
    render(rows, chosen, format)


@click.command()
@click.argument("addresses", metavar="ADDRESS...", type=ADDRESS, nargs=-1, required=True)
@format_option
@kernel_options
def symbol(addresses: tuple[AddressExpr, ...], format: str, where: Where) -> None:
    """Print what lies at each ADDRESS, as name+offset [kext].

    Exit status: 0 when all are known, 3 when some are, 1 when none is.

    \b
    Example:
      kvmtool symbol 0xffffff80002c4ca4 -N mach_kernel
    """
    kvm = opened(where)
    rows = []
    for expression in addresses:
        address = expression.resolve(kvm.address)
        found = kvm.symbol_at(address)
        if found is None:
            say(f"{address:#x} is in no segment of the kernel, and in no kext")
            continue
        if format == "table":
            click.echo(f"{address:#x} {visible(str(found))}")
        rows.append(
            {
                "address": address,
                "symbol": found.symbol.name,
                "offset": found.offset,
                "kext": found.kext,
                "symbol_address": found.symbol.address,
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


@click.command()
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
