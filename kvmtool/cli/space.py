"""regions, vtop and search: an address space looked at from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import ERROR, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import (
    ADDRESS,
    AddressExpr,
    Where,
    choose_columns,
    columns_option,
    core_argument,
    format_option,
    kernel_options,
)
from kvmtool.cli.render import Address, Column, render, render_one, visible
from kvmtool.errors import UnsupportedError
from kvmtool.memory import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.arch.walker import Walker
    from kvmtool.kvm import Kvm
    from kvmtool.memory import Memory
    from kvmtool.paging import PagedMemory

REGION_COLUMNS = (
    Column("start", "START", "address"),
    Column("end", "END", "address"),
    Column("size", "SIZE", "address"),
    Column("permissions", "PROT"),
    Column("physical", "PHYSICAL", "address"),
    Column("reason", "MISSING"),
)
_AROUND = 16  # bytes shown on from a hit


def _regions(kvm: Kvm, physical: bool) -> Iterator[dict[str, Any]]:
    memory = kvm.physical if physical else kvm.memory
    if memory is None:
        raise UnsupportedError("this is no dump of physical memory: leave --physical out")
    if kvm.way is None or physical:
        for region in memory.regions():
            end = region.start + region.size
            yield _region(region.start, end, None, None, None)
        return
    paged: PagedMemory = memory  # type: ignore[assignment]
    for mapping in paged.mappings():
        end = mapping.start + mapping.size
        yield _region(
            mapping.start, end, mapping.permissions, mapping.physical, mapping.reason or None
        )


def _region(
    start: int, end: int, permissions: str | None, physical: int | None, reason: str | None
) -> dict[str, Any]:
    return {
        "start": start,
        "end": end,
        "size": end - start,
        "permissions": permissions,
        "physical": physical,
        "reason": reason,
    }


@click.command(cls=Sectioned)
@click.option("--physical", is_flag=True, help="Physical memory instead of the kernel's.")
@columns_option
@format_option
@kernel_options
@core_argument
def regions(physical: bool, columns: tuple[str, ...], format: str, where: Where) -> None:
    """List what memory there is; of a dump with page tables also permissions and what is absent.

    \b
    Example:
      kvmtool regions -N mach_kernel -M core
    """
    chosen = choose_columns(REGION_COLUMNS, columns)
    render(_regions(opened(where), physical), chosen, format)


def _tables(kvm: Kvm) -> Walker:
    """The kernel's page table: the one its memory is read through, or the one found inside it."""
    if kvm.way is not None:
        paged: PagedMemory = kvm.memory  # type: ignore[assignment]
        return paged.walker
    if kvm.dump is None:
        raise UnsupportedError("a kernel's file alone has no page tables: name a core with -M")
    from kvmtool.physmap import kernel_walker

    tables = kernel_walker(kvm.arch, kvm.memory, kvm.symbols)
    if tables is None:
        raise UnsupportedError(f"page tables of {kvm.arch.name} are not known here")
    return tables


@click.command(cls=Sectioned)
@click.argument("address", type=ADDRESS)
@format_option
@kernel_options
def vtop(address: AddressExpr, format: str, where: Where) -> None:
    """Show how ADDRESS is translated to a physical one: every step of the page table walk.

    Of a core that holds only the kernel's memory, as far as the page tables' own pages are in it.

    \b
    Example:
      kvmtool vtop _version -N mach_kernel -M memory.lime
    """
    kvm = opened(where)
    start = address.within(kvm)
    tables = _tables(kvm)
    walk = tables.walk(start)
    steps = [
        {
            "level": step.level,
            "table": Address(step.table),
            "slot": step.slot,
            "entry": None if step.entry is None else Address(step.entry),
            "flags": step.flags,
        }
        for step in walk.steps
    ]
    record = {
        "address": Address(start),
        "physical": None if walk.physical is None else Address(walk.physical),
        "reason": walk.reason or None,
        "page_size": Address(walk.size),
        "mode": tables.mode,
        "root": Address(tables.root),
        "steps": steps,
    }
    if format == "table":
        columns = [
            Column("level", "LEVEL"),
            Column("table", "TABLE", "address"),
            Column("slot", "SLOT", "number"),
            Column("entry", "ENTRY", "address"),
            Column("flags", "FLAGS"),
        ]
        render(steps, columns, "table")
        end = f"{walk.physical:#x}" if walk.physical is not None else f"no: {walk.reason}"
        click.echo(f"{start:#x} -> {end}")
    else:
        render_one(record, format)
    if walk.physical is None:
        click.get_current_context().exit(ERROR)


def _needle(kvm: Kvm, what: str, kind: str) -> bytes:
    """The bytes to look for."""
    if kind == "text":
        return what.encode("utf-8", "surrogateescape")
    if kind == "hex":
        try:
            return bytes.fromhex(what)
        except ValueError as error:
            raise click.BadParameter(f"{what!r}: expected hexadecimal bytes") from error
    order = "little" if kvm.arch.byteorder == "<" else "big"
    pointer = ADDRESS.convert(what, None, None).within(kvm)
    return pointer.to_bytes(kvm.arch.pointer_size, order)  # type: ignore[arg-type]


def _hits(kvm: Kvm, memory: Memory, needle: bytes, step: int, physical: bool) -> Iterator[Any]:
    for address in memory.find(needle, step):
        pieces = memory.read_pieces(address, max(len(needle), _AROUND))
        data = next((piece.data for piece in pieces if isinstance(piece, Piece)), None) or b""
        found = None if physical else kvm.symbol_at(address)
        yield {
            "address": address,
            "symbol": None if found is None else visible(str(found)),
            "bytes": data[: max(len(needle), _AROUND)].hex(),
        }


@click.command(cls=Sectioned)
@click.argument("what", metavar="BYTES|STRING|POINTER")
@click.option("--hex", "kind", flag_value="hex", help="BYTES as hexadecimal digits: cffaedfe.")
@click.option("--pointer", "kind", flag_value="pointer", help="An address, as a pointer to it.")
@click.option("--align", type=int, default=1, metavar="N", help="Only at multiples of N bytes.")
@click.option("--limit", type=int, default=1000, show_default=True, help="Stop after so many.")
@click.option("--physical", is_flag=True, help="Physical memory instead of the kernel's.")
@format_option
@kernel_options
def search(
    what: str,
    kind: str | None,
    align: int,
    limit: int,
    physical: bool,
    format: str,
    where: Where,
) -> None:
    """Find a string, bytes (--hex) or a pointer (--pointer) in memory.

    Exit status: 0 when something is found, 1 when nothing is.

    \b
    Example:
      kvmtool search --pointer _cdevsw -N mach_kernel -M core
    """
    kvm = opened(where)
    needle = _needle(kvm, what, kind or "text")
    if not needle:
        raise click.BadParameter("nothing to look for")
    memory = kvm.physical if physical else kvm.memory
    if memory is None:
        raise UnsupportedError("this is no dump of physical memory: leave --physical out")
    step = kvm.arch.pointer_size if kind == "pointer" and align == 1 else max(align, 1)
    found = 0

    def counted() -> Iterator[Any]:
        nonlocal found
        for hit in _hits(kvm, memory, needle, step, physical):
            if found == limit:
                say(f"stopped after {limit}: --limit says how many")
                return
            found += 1
            yield hit

    columns = (
        Column("address", "ADDRESS", "address"),
        Column("symbol", "SYMBOL"),
        Column("bytes", "BYTES"),
    )
    render(counted(), columns, format)
    if not found:
        click.get_current_context().exit(ERROR)
