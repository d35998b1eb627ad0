"""print and walk: kernel objects by C expressions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import finish
from kvmtool.cli.opening import opened
from kvmtool.cli.params import Where, format_option, kernel_options
from kvmtool.cli.render import Address, Column, render, render_one
from kvmtool.cli.words import complete_symbols
from kvmtool.errors import FaultError, NotFoundError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.cli.natural import Forms, Natural
    from kvmtool.evaluate import Expression
    from kvmtool.kvm import Kvm
    from kvmtool.object import Object

_COLUMNS = (
    Column("address", "ADDRESS", "address"),
    Column("name", "NAME"),
    Column("type", "TYPE"),
    Column("value", "VALUE"),
    Column("meaning", "MEANING"),
)


@click.command(cls=Sectioned)
@click.argument("expression", metavar="EXPR", shell_complete=complete_symbols)
@click.option(
    "--depth",
    type=click.IntRange(0),
    default=64,
    metavar="N",
    help="Show structures inside structures only N deep.",
)
@click.option(
    "--elements",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    metavar="N",
    help="Show so many elements of an array.",
)
@click.option("-x", "--hex", "hexadecimal", is_flag=True, help="Numbers in hexadecimal.")
@format_option
@kernel_options
def print(  # noqa: A001  the command is called that
    expression: str,
    depth: int,
    elements: int,
    hexadecimal: bool,
    format: str,
    where: Where,
) -> None:
    """Print what a C expression over the kernel's variables means.

    There are symbols, members (-> and . are one), indices, casts, * and &, sizeof, offsetof,
    arithmetic, comparisons, && || ?:, numbers and character constants. KEXT:SYMBOL is a kext's;
    in double quotes any name is a symbol's. A symbol whose type is not known is cast to the type it
    was declared with: ((struct proc *)kernproc)->p_pid.

    A structure is a tree with the offset of each member, pointers with the symbol they lead to,
    times in UTC. What cannot be read is "?", and the exit status then 3. Before an expression that
    begins with - stands --.

    \b
    Example:
      kvmtool print 'cdevsw[11].d_read' -N mach_kernel -M core
    """
    from kvmtool.cli.natural import Forms
    from kvmtool.cli.tree import Tree

    kvm = opened(where)
    tree = Tree(kvm.evaluate(expression), Forms(kvm, hexadecimal), depth, elements)
    if format == "table":
        for line in tree.lines():
            click.echo(line)
    elif format == "csv":
        render(tree.rows(), _COLUMNS, format)
    else:
        render_one(tree.record(), format)
    if tree.left_out:
        say(f"{tree.left_out} elements are not shown: --elements says how many of an array are")
    if tree.unreadable:
        say(f"{tree.unreadable} values could not be read")
        click.get_current_context().exit(PARTIAL)


class _Inside:
    """The names of one element: its members, and behind them the kernel's."""

    def __init__(self, kvm: Kvm, element: Object) -> None:
        self._kvm, self._element = kvm, element
        self.target = kvm.scope.target

    def variable(self, name: str) -> Object:
        try:
            return self._element.member(name)
        except NotFoundError:
            if ":" not in name and self._kvm.symbols.get(name) is None:
                raise
            return self._kvm.scope.variable(name)

    def is_type(self, name: str) -> bool:
        return self._kvm.scope.is_type(name)


def _columns_of(kvm: Kvm, lists: Sequence[str]) -> list[Expression]:
    """The expressions of -o, divided at commas that are not in parentheses."""
    from kvmtool.evaluate import Expression

    texts = [""]
    for text in lists:
        depth = 0
        for char in text:
            depth += (char == "(") - (char == ")")
            if char == "," and depth <= 0:
                texts.append("")
            else:
                texts[-1] += char
        texts.append("")
    return [Expression(text.strip(), kvm.scope) for text in texts if text.strip()]


def _cell(kvm: Kvm, forms: Forms, member: Expression, element: Object) -> Natural:
    from kvmtool.cli.natural import missing

    try:
        found = member.value(_Inside(kvm, element))
    except FaultError as fault:
        return missing(fault)
    return forms.of(found, member.text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, Address)


def _show(cells: Iterator[tuple[Object, list[Natural]]], names: list[str], format: str) -> int:
    """Write a row for each element; how many of them have cells that could not be read."""
    first = next(cells, None)
    numbers = [] if first is None else [_is_number(cell.value) for cell in first[1]]
    shown = [Column("address", "ADDRESS", "address")]
    shown += [
        Column(name, name, "number" if number else "text")
        for name, number in itertools.zip_longest(names, numbers)
    ]
    unreadable = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal unreadable
        for element, naturals in itertools.chain([] if first is None else [first], cells):
            row: dict[str, Any] = {"address": element.address}
            for name, natural in zip(names, naturals, strict=True):
                plain = format != "table" or isinstance(natural.value, (str, Unreadable))
                row[name] = natural.value if plain else str(natural)
            unreadable += any(isinstance(cell, Unreadable) for cell in row.values())
            yield row

    render(rows(), shown, format)
    return unreadable


@click.command(cls=Sectioned)
@click.argument("expression", metavar="EXPR", shell_complete=complete_symbols)
@click.option("--next", "follow", metavar="MEMBER", help="The member with the next pointer.")
@click.option(
    "--container",
    metavar="TYPE[.MEMBER]",
    help="What the elements are; with MEMBER, links point at that member of them.",
)
@click.option(
    "-o",
    "--columns",
    metavar="LIST",
    multiple=True,
    help="Members of each element to show, or any expressions of them. Repeatable.",
)
@click.option("--limit", type=click.IntRange(1), default=1 << 20, help="Stop after so many.")
@click.option("-x", "--hex", "hexadecimal", is_flag=True, help="Numbers in hexadecimal.")
@format_option
@kernel_options
def walk(
    expression: str,
    follow: str | None,
    container: str | None,
    columns: tuple[str, ...],
    limit: int,
    hexadecimal: bool,
    format: str,
    where: Where,
) -> None:
    """Walk a list of the kernel's, and show members of each element.

    EXPR is the head of a LIST, SLIST, STAILQ, TAILQ, CIRCLEQ or Mach queue, or a pointer to the
    first element. Where the head does not tell what the elements are, --container does: TYPE where
    links point at elements, TYPE.MEMBER where they point at a queue_chain inside.

    A list that is torn, or runs in a circle, is shown as far as it goes; stderr says where it
    stopped, and the exit status is 3.

    \b
    Example:
      kvmtool walk allproc --next p_list -o 'p_pid,p_pgrp' -N kernel -M core
      kvmtool walk tasks --container task --next tasks -o map -N kernel -M core
    """
    from kvmtool.cli.natural import Forms
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.walk import chain_of, walk_chain

    kvm = opened(where)
    head = kvm.evaluate(expression)
    target, report, forms = kvm.scope.target, Report(), Forms(kvm, hexadecimal)
    chain = chain_of(target, head, follow, container)
    members = _columns_of(kvm, columns)
    cells = (
        (element, [_cell(kvm, forms, member, element) for member in members])
        for element in walk_chain(target, chain, expression, report, limit)
    )
    unreadable = _show(cells, [member.text for member in members], format)
    finish(report, unreadable, "elements")
