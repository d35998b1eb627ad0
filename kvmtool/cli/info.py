"""info: everything known about a kernel and a core."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.color import bold
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import Where, core_argument, format_option, kernel_options
from kvmtool.cli.render import Address, Column, render, render_one, visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtool.formats import Format
    from kvmtool.kvm import Kvm
    from kvmtool.macho import MachO

_ROWS_SHOWN = 64


def kernel_facts(kvm: Kvm) -> dict[str, Any] | None:
    """What the kernel's Mach-O says of itself."""
    from kvmtool.boot import banner_of
    from kvmtool.image import image_memory
    from kvmtool.macho import uuid_text
    from kvmtool.macho_names import (
        build_version,
        cpu_name,
        filetype_name,
        flag_names,
        source_version,
    )
    from kvmtool.symbols import SymbolTable

    image = kvm.kernel
    if image is None:
        return None
    text = image.segment("__TEXT")
    inside = kvm.dump is not None and image.source.name.startswith(kvm.dump.source.name)
    banner = None if inside else banner_of(image_memory(image), SymbolTable(image.symtab, 0))
    return {
        "file": image.source.name,
        "layers": [f"{layer.name}: {layer.detail}" for layer in kvm.layers],
        "kind": kvm.kind,
        "arch": cpu_name(image.cputype, image.cpusubtype),
        "filetype": filetype_name(image.filetype),
        "flags": flag_names(image.flags),
        "uuid": None if image.uuid is None else uuid_text(image.uuid),
        "version": kvm.version if inside else banner,
        "link_address": None if text is None else Address(text.vmaddr),
        "symbols": len(kvm.symbols),
        "missing": kvm.symbols.hint or None,
        "build_version": build_version(image),
        "source_version": source_version(image),
        "segments": segments(image),
    }


def segments(image: MachO) -> list[dict[str, Any]]:
    """The segments, addresses as addresses."""
    return [
        {
            "segname": s.segname,
            "vmaddr": Address(s.vmaddr),
            "vmsize": Address(s.vmsize),
            "fileoff": Address(s.fileoff),
            "filesize": Address(s.filesize),
            "prot": "".join(c if s.initprot >> n & 1 else "-" for n, c in enumerate("rwx")),
            "nsects": s.nsects,
        }
        for s in image.segments
    ]


def core_facts(kvm: Kvm, dump: Format) -> dict[str, Any]:
    """What the container holds and says."""
    from kvmtool.macho import uuid_text

    facts = dump.facts
    regions = list(kvm.memory.regions())
    said = {name: f"{where}" for name, where in facts.said.items()}
    return {
        "file": dump.source.name,
        "format": dump.name,
        "arch": kvm.arch.name,
        "segment_count": len(kvm.memory),
        "region_count": len(regions),
        "readable_bytes": sum(region.size for region in regions),
        "lowest": Address(regions[0].start) if regions else None,
        "highest": Address(regions[-1].start + regions[-1].size) if regions else None,
        "uuid": None if facts.uuid is None else uuid_text(facts.uuid),
        "version": facts.version,
        "kernel_address": _address(facts.kernel_address),
        "slide": _address(facts.slide),
        "va_bits": facts.va_bits,
        "said_by": said,
        "notes": [
            {"owner": note.owner, "offset": Address(note.offset), "size": note.size}
            for note in dump.notes
        ],
        "warnings": list(dump.warnings),
    }


def _address(value: int | None) -> Address | None:
    return None if value is None else Address(value)


def threads(kvm: Kvm, dump: Format) -> list[dict[str, Any]]:
    """The register sets, the pc as a symbol too."""
    found = []
    for number, thread in enumerate(dump.facts.threads):
        registers: dict[str, Any] = {}
        flavors = []
        for flavor, data in thread.states:
            known = kvm.arch.flavors.get(flavor)
            flavors.append(known.name if known else f"flavor {flavor}")
            values = kvm.arch.registers(flavor, data)
            registers.update({name: Address(value) for name, value in values.items()})
        pc = registers.get(kvm.arch.pc)
        found.append(
            {
                "thread": number,
                "flavors": flavors,
                "pc": None if pc is None else pc,
                "at": _symbol(kvm, pc),
                "registers": registers,
            }
        )
    return found


def _symbol(kvm: Kvm, address: int | None) -> str | None:
    found = kvm.symbol_at(address) if address else None
    return None if found is None else str(found)


def slide_facts(kvm: Kvm) -> dict[str, Any] | None:
    """Where the kernel was found, and how."""
    boot = kvm.boot
    if boot is None:
        return None
    mode, root, missing = _page_tables(kvm)
    return {
        "page_tables": mode,
        "root": _address(root),
        "slide": _address(boot.slide),
        "kernel_address": Address(boot.kernel_address),
        "how": boot.how,
        "version": boot.version,
        "rejected": [*boot.rejected, *missing],
    }


def _page_tables(kvm: Kvm) -> tuple[str | None, int | None, list[str]]:
    """The paging mode and root of the kernel, or why a dump of its memory does not lead to them."""
    if kvm.way is not None:
        return kvm.way.mode, kvm.way.root, []
    from kvmtool.errors import NotFoundError
    from kvmtool.physmap import kernel_walker

    try:
        tables = kernel_walker(kvm.arch, kvm.memory, kvm.symbols)
    except NotFoundError as error:
        return None, None, [str(error)]
    return (None, None, []) if tables is None else (tables.mode, tables.root, [])


def layout_facts(kvm: Kvm) -> list[dict[str, Any]]:
    """The types held against the kernel's memory, and what came of it."""
    from kvmtool.errors import NotFoundError

    try:
        if kvm.dump is None:
            return [_untried(kvm)]
        tried = kvm.tried
    except NotFoundError as error:
        return [{"layout": None, "how": str(error), "fits": False, "why": "none to try"}]
    return [
        {
            "layout": choice.table.name,
            "origin": choice.table.origin,
            "how": choice.how,
            "fits": verdict.fits,
            "why": verdict.why,
        }
        for choice, _, verdict in tried
    ]


def _untried(kvm: Kvm) -> dict[str, Any]:
    choice = kvm.type_choice
    return {
        "layout": choice.table.name,
        "origin": choice.table.origin,
        "how": choice.how,
        "fits": None,
        "why": "a kernel's file has no memory to hold it against",
    }


def container_facts(dump: Format) -> dict[str, Any] | None:
    """The corefile container a core came out of: its files and its panic log."""
    corefile = dump.container
    if corefile is None:
        return None
    return {
        "file": corefile.source.name,
        "format": f"corefile v{corefile.version}",
        "files": [
            {
                "name": member.name,
                "offset": Address(member.offset),
                "length": member.length,
                "stage": member.stage,
            }
            for member in corefile.members
        ],
        "panic_log": corefile.log().decode("utf-8", "replace"),
    }


def gather(kvm: Kvm) -> dict[str, Any]:
    """The whole answer, as JSON has it."""
    dump = kvm.dump
    facts: dict[str, Any] = {"kernel": kernel_facts(kvm)}
    if dump is None:
        facts["layouts"] = layout_facts(kvm)
    else:
        facts["container"] = container_facts(dump)
        facts["core"] = core_facts(kvm, dump)
        facts["slide"] = slide_facts(kvm)
        facts["layouts"] = layout_facts(kvm) if len(kvm.symbols) else []
        facts["threads"] = threads(kvm, dump)
    return facts


def show(facts: Mapping[str, Any]) -> None:
    """The answer for a person: a heading for each part, tables indented, the panic log as it is."""
    for part, content in facts.items():
        for item in content if isinstance(content, list) else [content]:
            if not item:
                continue
            click.echo(bold(part.upper(), sys.stdout), color=True)
            plain = {
                key: value
                for key, value in item.items()
                if key not in _BLOCKS and value not in (None, [], {}, "")
            }
            render_one(plain, "table")
            for key in _BLOCKS:
                _block(key, item.get(key))
            click.echo()


_BLOCKS = ("segments", "files", "notes", "registers", "panic_log")


def _block(title: str, content: Any) -> None:
    """A list as a table, registers four a line, text as lines; under its title, indented."""
    if isinstance(content, dict) and content:
        pairs = [f"{name:>6} {value:#x}" for name, value in content.items()]
        width = max(map(len, pairs)) + 2
        rows = (pairs[at : at + 4] for at in range(0, len(pairs), 4))
        lines = ["".join(f"{pair:<{width}}" for pair in row).rstrip() for row in rows]
    elif isinstance(content, str):
        lines = [visible(line.expandtabs()) for line in content.splitlines()]
    elif isinstance(content, list) and content:
        lines = _table_lines(content)
    else:
        return
    click.echo(title.replace("_", " ") + ":")
    for line in lines:
        click.echo(f"  {line}".rstrip())


def _table_lines(rows: list[dict[str, Any]]) -> list[str]:
    out = io.StringIO()
    columns = [
        Column(
            name,
            name.upper(),
            "address"
            if isinstance(value, Address)
            else "number"
            if isinstance(value, int)
            else "text",
        )
        for name, value in rows[0].items()
    ]
    render(rows[:_ROWS_SHOWN], columns, "table", out)
    lines = out.getvalue().splitlines()
    if len(rows) > _ROWS_SHOWN:
        lines.append(f"and {len(rows) - _ROWS_SHOWN} more (--format json shows all)")
    return lines


@click.command(cls=Sectioned)
@format_option
@kernel_options
@core_argument
def info(format: str, where: Where) -> None:
    """Show everything known: files, formats, UUIDs, banner, slide and how it was found, threads.

    Holds no memory contents beyond names, the banner and the panic log.

    \b
    Example:
      kvmtool info -N mach_kernel -M core
    """
    facts = gather(opened(where))
    if format == "table":
        show(facts)
    else:
        render_one(facts, format)
