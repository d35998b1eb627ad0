"""vmmap: the ranges of an address space, and what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column
from kvmtool.cli.words import complete_pids
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.vm_map import Map, MapReader
    from kvmtool.xnu.vmmap import Entry

LISTING = Listing(
    "vmmap",
    "entries",
    (
        Column("start", "START", "address"),
        Column("end", "END", "address"),
        Column("size", "SIZE", "number"),
        Column("prot", "PRT"),
        Column("max_prot", "MAX"),
        Column("share_mode", "SHRMOD"),
        Column("tag_name", "TAG"),
        Column("tag", "TAG NUMBER", "number"),
        Column("object", "OBJECT", "address"),
        Column("offset", "OFFSET", "address"),
        Column("wired_count", "WIRED", "number"),
        Column("user_wired_count", "USER WIRED", "number"),
        Column("resident", "RESIDENT", "number"),
        Column("ref_count", "REFS", "number"),
        Column("shadow_depth", "SHADOWS", "number"),
        Column("submap", "SUBMAP", "address"),
        Column("depth", "DEPTH", "number"),
        Column("inheritance", "INHERIT"),
        Column("behavior", "BEHAVIOR"),
        Column("flags", "FLAGS", "list"),
        Column("pager", "PAGER"),
        Column("vnode", "VNODE", "address"),
        Column("path", "PATH"),
        Column("address", "ENTRY", "address"),
    ),
    (
        *("start", "end", "size", "prot", "max_prot", "share_mode", "tag_name", "object"),
        *("offset", "wired_count", "submap", "path"),
    ),
)
_DERIVED = ("size", "prot", "max_prot")
_STORED = tuple(c.name for c in LISTING.columns if c.name not in _DERIVED)


def protection(bits: Any) -> Any:
    """VM_PROT_ bits as vmmap writes them: rwx; of others that are set the number follows."""
    if not isinstance(bits, int):
        return bits
    word = "".join(letter if bits & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
    return word if bits < 8 else f"{word}+{bits & ~7:#x}"


def row_of(entry: Entry) -> dict[str, Any]:
    """An entry under the names that -o and JSON have."""
    row = {name: getattr(entry, name) for name in _STORED}
    start, end = entry.start, entry.end
    size: Any = next((value for value in (start, end) if isinstance(value, Unreadable)), None)
    return {
        **row,
        "size": end - start if size is None else size,
        "prot": protection(entry.protection),
        "max_prot": protection(entry.max_protection),
    }


def _chosen(kvm: Kvm, reader: MapReader, which: str) -> Map:
    """The map that the user named. Raises `click.BadParameter` for what names none."""
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.space import find_process

    if which == "kernel":
        return reader.of_kernel()
    try:
        number = int(which, 0)
    except ValueError:
        raise click.BadParameter(
            f"{which!r}: expected a pid, kernel, or the address of a vm_map (0x…)",
            param_hint="PID|kernel|MAP",
        ) from None
    if which.lower().startswith("0x"):
        return reader.at(number, f"{number:#x}")
    report = Report()
    return reader.of_process(find_process(kvm.procs(report), number, report))


def _complete(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    kernel = [CompletionItem("kernel")] if "kernel".startswith(start) else []
    return kernel + complete_pids(ctx, param, start)


@click.command(cls=Sectioned)
@click.argument("which", metavar="PID|kernel|MAP", shell_complete=_complete)
@click.option("--submaps", is_flag=True, help="What is in submaps, too, each below its entry.")
@listing_options
def vmmap(which: str, submaps: bool, where: Where, columns: tuple[str, ...], format: str) -> None:
    """List the ranges of an address space, as vmmap does: of a process, of the kernel, of any map.

    PRT and MAX are the protection now and at most, SHRMOD how the memory is shared, TAG what it was
    allocated for, OBJECT the kernel's vm_object, PATH the file behind it. SIZE is in bytes,
    RESIDENT counts pages of the whole object.

    \b
    Example:
      kvmtool vmmap 1 -N mach_kernel -M core
    """
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.vmmap import Maps

    kvm, report = opened(where), Report()
    maps = Maps(kvm.verified_target(), report)
    found = maps.entries(_chosen(kvm, maps.reader, which), submaps=submaps)
    LISTING.show(map(row_of, found), columns, format, report)
