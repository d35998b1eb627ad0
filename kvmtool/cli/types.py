"""type and types: how a kernel's structures are laid out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import SIZE, Where, format_option, kernel_options
from kvmtool.cli.words import complete_types, remember
from kvmtool.errors import KvmError, NotFoundError, UnknownFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.render import Column
    from kvmtool.types.ctype import CType
    from kvmtool.types.model import TypeTable

KINDS = ("struct", "union", "class", "enum", "typedef", "base")


def types_of(where: Where) -> TypeTable:
    """The types of the kernel the user named, or those of the file or layout named alone.

    Raises what `kvmtool.open`, `Kvm.types` and `type_files.open_types` raise.
    """
    if where.layout is not None and where.types is None:
        from kvmtool.types import layouts

        return layouts.table(where.layout)
    if where.kernel is not None or where.core is not None:
        return opened(where).types
    if where.types is None:
        raise KvmError("no types: name a kernel with -N, its types with --types, or a --layout")
    return _of_file(where.types, where)


def _of_file(path: str, where: Where) -> TypeTable:
    """The types in the file at `path`, of no known kernel."""
    from kvmtool.type_files import KernelIdentity, open_types
    from kvmtool.types.model import TypeTable

    found = open_types(path, KernelIdentity(where.arch), where.force)
    context = click.get_current_context()
    for source in found.held:
        context.call_on_close(source.close)
    return TypeTable(found.source)


def _others(other: str, where: Where) -> TypeTable:
    """What --diff names: a file with types, a kernel, or a built-in layout."""
    if not os.path.exists(other):
        from kvmtool.types import layouts

        return layouts.table(other)
    try:
        return _of_file(other, where)
    except (UnknownFormatError, NotFoundError):  # a kernel without types of its own
        return opened(Where(kernel=other, arch=where.arch)).types


@click.command(cls=Sectioned)
@click.argument("words", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_types)
@click.option("-e", "--expand", is_flag=True, help="Open the structures inside that have a name.")
@click.option("--offset", type=SIZE, metavar="BYTES", help="Only the member that lies there.")
@click.option(
    "--diff",
    metavar="OTHER",
    help="What differs in OTHER: a kernel, a file with types, or a built-in layout's name.",
)
@format_option
@kernel_options
def type(  # noqa: A001  the command's name
    words: tuple[str, ...],
    expand: bool,
    offset: int | None,
    diff: str | None,
    format: str,
    where: Where,
) -> None:
    """Print how the type NAME is declared, with the place of every member.

    NAME is a tag (proc), a typedef (pid_t), or any type as C writes it ('struct proc *'). In front
    of a member stand its offset, hexadecimal, and its size in bytes; of a bit-field also its bit in
    that byte (:3), and its size in bits (1b). Other formats have a row for each member.

    With --diff, what came, went, moved, or changed its size or type from this kernel to OTHER. The
    exit status is 0 whether or not anything did.

    \b
    Example:
      kvmtool type proc --layout '10.8.5 x86_64'
    """
    if diff is not None and offset is not None:
        raise click.UsageError("--offset and --diff exclude each other")
    table, name = types_of(where), " ".join(words)
    ctype = table.type(name)
    if diff is not None:
        from kvmtool.cli.type_diff import show_diff

        show_diff(name, (table, ctype), _others(diff, where), expand, format)
    elif offset is not None:
        _show_places(ctype, offset, format)
    elif format == "table":
        _show_declaration(ctype, table, expand)
    else:
        from kvmtool.cli.render import render

        render(_member_rows(ctype, name, expand), _member_columns(), format)


def _show_declaration(ctype: CType, table: TypeTable, expand: bool) -> None:
    from kvmtool.cli.declaration import declaration
    from kvmtool.cli.render import visible
    from kvmtool.types.chained import origin_of

    origin = origin_of(table.source, ctype)
    lines = [f"/* types of {origin} */", *declaration(ctype, expand)]
    click.echo("\n".join(map(visible, lines)))


def _member_columns() -> tuple[Column, ...]:
    from kvmtool.cli.render import Column  # costs start-up, and the plain output needs none

    return (
        Column("offset", "OFFSET", "number", hex),
        Column("size", "SIZE", "number"),
        Column("bit_offset", "BIT", "number"),
        Column("bit_size", "BITS", "number"),
        Column("type", "TYPE"),
        Column("name", "MEMBER"),
    )


def _member_rows(ctype: CType, name: str, expand: bool) -> Iterator[dict[str, Any]]:
    """A row for each member; one for what has none."""
    from kvmtool.types.ctype import Compound, Enum, unqualified
    from kvmtool.types.declare import declare
    from kvmtool.types.outline import outline

    found = unqualified(ctype)
    bits = {"bit_offset": None, "bit_size": None}
    if isinstance(found, Compound) and found.complete:
        for line in outline(found, expand):
            if line.path is not None and line.type is not None:
                row = {key: getattr(line, key) for key in ("offset", "size", *bits)}
                text = None if line.unknown else declare(line.type)
                yield {**row, "type": text, "name": line.path}
    elif isinstance(found, Enum):
        for value, number in found.values:
            text = f"{declare(found)} = {number}"
            yield {"offset": None, "size": found.size, **bits, "type": text, "name": value}
    else:
        yield {"offset": 0, "size": ctype.size, **bits, "type": declare(found), "name": name}


def _show_places(ctype: CType, offset: int, format: str) -> None:
    from kvmtool.cli.render import Column, render
    from kvmtool.types.ctype import Opaque
    from kvmtool.types.declare import declare
    from kvmtool.types.places import places

    rows = [
        {
            **place._asdict(),
            "name": place.path or None,
            "type": place.what
            if place.type is None
            else None
            if isinstance(place.type, Opaque)
            else declare(place.type),
            "into": offset - place.offset,
        }
        for place in places(ctype, offset)
    ]
    render(rows, (*_member_columns(), Column("into", "INTO", "number", hex)), format)


@click.command(cls=Sectioned)
@click.argument("pattern", required=False)
@click.option("--kind", type=click.Choice(KINDS), multiple=True, help="Only these. Repeatable.")
@format_option
@kernel_options
def types(pattern: str | None, kind: tuple[str, ...], format: str, where: Where) -> None:
    """List the structures, unions, enums and typedefs; PATTERN (a part of the name, or with * and
    ?) picks some.

    SIZE is in bytes; there is none for what is only declared. Exit status 3 where the description
    of one is damaged.

    \b
    Example:
      kvmtool types '*vnode*' --layout '10.8.5 x86_64'
    """
    from kvmtool.cli.render import Column, render
    from kvmtool.unreadable import Unreadable

    damaged = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal damaged
        for row in _type_rows(table, pattern, kind):
            damaged += isinstance(row["size"], Unreadable)
            yield row

    table = types_of(where)
    remember("types", where, lambda: ((name, "") for name in table.source.names("tag")))
    columns = (
        Column("kind", "KIND"),
        Column("size", "SIZE", "number"),
        Column("name", "NAME"),
        Column("type", "TYPE"),
    )
    render(counted(), columns, format)
    if damaged:
        say(f"{damaged} type{'' if damaged == 1 else 's'} could not be read")
        click.get_current_context().exit(PARTIAL)


def _type_rows(
    table: TypeTable, pattern: str | None, kinds: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    from kvmtool.unreadable import Unreadable

    for space in ("tag", "typedef", "base"):
        if kinds and space in ("typedef", "base") and space not in kinds:
            continue
        for name in sorted(_matching(table.source.names(space), pattern)):
            try:
                row = _type_row(table, space, name)
            except KvmError as error:
                row = {"kind": space, "size": Unreadable(str(error)), "name": name, "type": None}
            if row is not None and (not kinds or row["kind"] in kinds):
                yield row


def _type_row(table: TypeTable, space: str, name: str) -> dict[str, Any] | None:
    from kvmtool.types.ctype import Typedef
    from kvmtool.types.declare import declare

    found = table.source.find(space, name)
    if found is None:
        return None
    target = declare(found.target) if isinstance(found, Typedef) else None
    kind = found.kind if space == "tag" else space
    return {"kind": kind, "size": found.size, "name": name, "type": target}


def _matching(names: Any, pattern: str | None) -> Any:
    """As `symbols` matches: a part of the name, or a shell's pattern."""
    if pattern is None:
        return names
    if not any(char in pattern for char in "*?["):
        return (name for name in names if pattern in name)
    from fnmatch import translate
    from re import compile as compile_pattern

    matches = compile_pattern(translate(pattern)).match
    return (name for name in names if matches(name))
