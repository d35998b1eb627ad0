"""nlist and symbols: names to addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import ERROR, PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import FORMATS, Where, format_option, kernel_options
from kvmtool.cli.words import complete_symbols, remember
from kvmtool.nlist import N_EXT, N_STAB, N_TYPE, N_UNDF, Nlist, type_letter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.render import Column
    from kvmtool.kvm import Kvm

_KEXT_BUNDLE = 0xB


def _columns() -> tuple[Column, ...]:
    from kvmtool.cli.render import Column  # costs start-up, and the plain output needs none

    return (
        Column("address", "ADDRESS", "address"),
        Column("type", "TYPE"),
        Column("name", "NAME"),
        Column("n_value", "N_VALUE", "address"),
        *(Column(n, n.upper(), "number") for n in ("n_type", "n_sect", "n_desc")),
    )


class Letters:
    """The type letters of one file's symbols."""

    def __init__(self, kvm: Kvm) -> None:
        image = kvm.kernel
        sections = image.sections if image is not None else ()
        self._sections = tuple((s.segname, s.sectname) for s in sections)
        self._kext = image is not None and image.filetype == _KEXT_BUNDLE and image.is64

    def __call__(self, n_type: int, n_sect: int, n_value: int) -> str:
        return type_letter(Nlist("", n_type, n_sect, 0, n_value, 0), self._sections, self._kext)


def _rows(kvm: Kvm, names: tuple[str, ...], raw_value: bool) -> Iterator[dict[str, Any]]:
    letter = Letters(kvm)
    for name, found in zip(names, kvm.nlist(names), strict=True):
        if found is None:
            near = kvm.near(name)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            say(f"symbol {name} not found{hint}" if len(kvm.symbols) else _no_symbols(kvm))
            continue
        yield {
            "address": found.n_value if raw_value else found.address,
            "type": letter(found.n_type, found.n_sect, found.n_value),
            "name": found.name,
            "n_value": found.n_value,
            "n_type": found.n_type,
            "n_sect": found.n_sect,
            "n_desc": found.n_desc,
        }


def _no_symbols(kvm: Kvm) -> str:
    name = kvm.kernel.source.name if kvm.kernel else "the kernel"
    return kvm.symbols.hint or f"{name} has no symbol table"


@click.command(cls=Sectioned)
@click.argument(
    "names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_symbols
)
@click.option("--raw-value", is_flag=True, help="Print n_value as linked, without the slide.")
@format_option
@kernel_options
def nlist(names: tuple[str, ...], raw_value: bool, format: str, where: Where) -> None:
    """Print address, type letter and name of each symbol NAME, as kvm_nlist finds it.

    A leading underscore may be left out. Exit status: 0 when all are found, 3 when some are, 1 when
    none is; each miss is named on stderr.

    \b
    Example:
      kvmtool nlist _cdevsw -N mach_kernel
    """
    kvm = opened(where)
    rows = list(_rows(kvm, names, raw_value))
    if format == "table":
        for row in rows:
            click.echo(f"{row['address']:#x} {row['type']} {row['name']}")
    else:
        from kvmtool.cli.render import render

        render(rows, _columns(), format)
    if len(rows) < len(names):
        click.get_current_context().exit(PARTIAL if rows else ERROR)


@click.command(cls=Sectioned)
@click.argument("pattern", required=False)
@click.option(
    "--format",
    type=click.Choice(("bsd", "posix", *FORMATS)),
    default="bsd",
    show_default=True,
    help="bsd and posix as nm has them.",
)
@click.option("-a", "--stabs", is_flag=True, help="Debugger entries too.")
@click.option("-g", "--external", is_flag=True, help="External symbols only.")
@click.option("-u", "--undefined", is_flag=True, help="Undefined symbols only.")
@click.option("-n", "--numeric", is_flag=True, help="Sort by address.")
@click.option("-p", "--table-order", is_flag=True, help="Do not sort.")
@click.option("-r", "--reverse", is_flag=True, help="Sort backwards.")
@click.option("-j", "--names-only", is_flag=True, help="Names only.")
@kernel_options
def symbols(
    pattern: str | None,
    format: str,
    stabs: bool,
    external: bool,
    undefined: bool,
    numeric: bool,
    table_order: bool,
    reverse: bool,
    names_only: bool,
    where: Where,
) -> None:
    """List symbols, as nm does; PATTERN (a part of the name, or with * and ?) picks some.

    \b
    Example:
      kvmtool symbols '*devsw*' -N mach_kernel
    """
    kvm = opened(where)
    remember("symbols", where, lambda: _words(kvm))
    picked = [
        entry
        for entry in kvm.symbols.entries()
        if (stabs or not entry.n_type & N_STAB)
        and (not external or entry.n_type & N_EXT)
        and (not undefined or entry.n_type & (N_STAB | N_TYPE) == N_UNDF)
    ]
    if pattern is not None:
        picked = _matching(picked, pattern)
    if not len(kvm.symbols):
        say(_no_symbols(kvm))
    if numeric:
        picked.sort(key=lambda entry: (entry.n_value, entry.name), reverse=reverse)
    elif not table_order:
        picked.sort(key=lambda entry: entry.name, reverse=reverse)
    _print(kvm, picked, "names" if names_only else format)


def _words(kvm: Kvm) -> Iterator[tuple[str, str]]:
    """What the shell may complete: the names that have an address."""
    for entry in kvm.symbols.entries():
        if not entry.n_type & N_STAB and entry.n_type & N_TYPE != N_UNDF:
            yield entry.name, ""


def _matching(entries: list[Nlist], pattern: str) -> list[Nlist]:
    if not any(char in pattern for char in "*?["):
        return [entry for entry in entries if pattern in entry.name]
    from fnmatch import translate
    from re import compile as compile_pattern

    matches = compile_pattern(translate(pattern)).match
    return [entry for entry in entries if matches(entry.name)]


def _print(kvm: Kvm, entries: list[Nlist], format: str) -> None:
    from kvmtool.cli.render import render, visible

    if format == "names":
        _echo(visible(entry.name) for entry in entries)
        return
    letter, address = Letters(kvm), kvm.symbols.address_of
    digits = kvm.arch.pointer_size * 2
    if format in ("bsd", "posix"):
        width = f"0{digits}x"
        lines = []
        for entry in entries:
            kind = letter(entry.n_type, entry.n_sect, entry.n_value)
            value = " " * digits if kind == "U" else f"{address(entry):{width}}"
            name = visible(entry.name)
            if format == "posix":
                lines.append(f"{name} {kind} {address(entry):x} 0")
            else:
                lines.append(f"{value} {kind} {name}")
        _echo(lines)
        return
    rows = (
        {
            "address": address(entry),
            "type": letter(entry.n_type, entry.n_sect, entry.n_value),
            **entry._asdict(),
        }
        for entry in entries
    )
    render(rows, _columns(), format)


def _echo(lines: Any) -> None:
    import sys

    out = sys.stdout
    for line in lines:
        out.write(f"{line}\n")
