"""What the commands that list kernel objects have in common: rows, columns, what stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvmtool.cli import PARTIAL, say
from kvmtool.cli.opening import opened
from kvmtool.cli.params import (
    choose_columns,
    columns_option,
    core_argument,
    format_option,
    kernel_options,
)
from kvmtool.cli.render import render, render_one
from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvmtool.cli.params import Command
    from kvmtool.cli.render import Column
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.queues import Report


_WHOLE = frozenset((str, int, bool, float, bytes, type(None)))  # nothing is missing in these


class Listing(NamedTuple):
    """A table of kernel objects: the command's `name` ("procs"), `what` it lists ("processes").

    `columns` are all there are, `shown` the names of those in a table without -o; those `asked` for
    by name alone stand in no answer otherwise. docs/fields.md is made from these.
    """

    name: str
    what: str
    columns: Sequence[Column]
    shown: Sequence[str]
    asked: Sequence[str] = ()

    def chosen(self, lists: Sequence[str], format: str) -> list[Column]:
        """The columns that -o names; without it those of a table, or all but the `asked`."""
        every = [column.name for column in self.columns if column.name not in self.asked]
        return choose_columns(self.columns, lists, self.shown if format == "table" else every)

    def show(
        self,
        rows: Iterable[Mapping[str, Any]],
        chosen: Sequence[str],
        format: str,
        report: Report,
    ) -> None:
        """Write the rows as they come; then say what stopped, and exit 3 if anything is missing.

        `chosen` are the columns of -o; without them a table shows `shown`, other formats all.
        """
        columns = self.chosen(chosen, format)
        names = [column.name for column in columns]
        seen = unreadable = 0

        def counted() -> Iterator[Mapping[str, Any]]:
            nonlocal seen, unreadable
            for seen, row in enumerate(rows, 1):  # noqa: B007  # it outlives the loop
                odd = [value for name in names if type(value := row[name]) not in _WHOLE]
                unreadable += any(map(_missing, odd))
                yield row

        render(counted(), columns, format)
        if not seen and format == "table":
            say(f"no {self.what}")
        finish(report, unreadable, self.what)

    def show_one(
        self, row: Mapping[str, Any], chosen: Sequence[str], format: str, report: Report
    ) -> None:
        """Write the one answer `row`; then as `show`. Every field that is missing is told."""
        columns = self.chosen(chosen, format)
        render_one({c.name: row[c.name] for c in columns}, format, columns=columns)
        missing = [c.name for c in columns if _missing(row[c.name])]
        if missing and format != "table":
            say(f"could not be read: {', '.join(missing)}")
        finish(report)
        if missing:
            click.get_current_context().exit(PARTIAL)


def time_fields(name: str, value: Any) -> dict[str, Any]:
    """A (seconds, microseconds) as ISO 8601 under `name`, and as it is under `name`_raw."""
    from kvmtool.xnu.proc import iso_time

    known = isinstance(value, tuple)
    raw = list(value) if known else value
    return {name: iso_time(value) if known else value, f"{name}_raw": raw}


def header_missing(kvm: Kvm, address: int) -> Unreadable | None:
    """Why the header of an image in memory, where its UUID stands, cannot be read; or None."""
    try:
        kvm.memory.check(address, 4)
    except FaultError as fault:
        return Unreadable(f"{fault.reason} at {fault.address:#x}")
    return None


def _missing(value: Any) -> bool:
    """Whether a field, or something in a list or mapping, could not be read."""
    if isinstance(value, list):
        return any(map(_missing, value))
    if isinstance(value, dict):
        return any(map(_missing, value.values()))
    return isinstance(value, Unreadable)


def finish(report: Report, unreadable: int = 0, what: str = "rows") -> None:
    """Say on stderr what a walk met; exit status 3 if it or a field was cut short."""
    for text in (*report.notes, *report.stops):
        say(text)
    if unreadable:
        say(f"{unreadable} {what} have fields that could not be read")
    if report.partial or unreadable:
        click.get_current_context().exit(PARTIAL)


def listing_options(command: Command) -> Command:
    """-o, --format and the kernel's options, for a command that makes a `Listing`."""
    for option in (core_argument, kernel_options, format_option, columns_option):
        command = option(command)
    return command


__all__ = ["Listing", "finish", "header_missing", "listing_options", "opened", "time_fields"]
