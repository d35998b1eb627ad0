"""What a command is here: its help shows its own options first, then those that name a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmtool.cli.params import Where

if TYPE_CHECKING:
    from collections.abc import Iterable

# Which kernel, and -v and --pager: what nearly every command has.
SHARED = frozenset(Where._fields)


class Sectioned(click.Command):
    """A command whose options stand under two headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command.format_options`."""
        write_options(self.get_params(ctx), ctx, formatter)


def write_options(
    params: Iterable[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """The help of the options among `params`: the command's own, then which kernel it is about."""
    own: list[tuple[str, str]] = []
    shared: list[tuple[str, str]] = []
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None and not isinstance(param, click.Argument):
            (shared if param.name in SHARED else own).append(record)
    for heading, records in (("Options", own), ("Which kernel", shared)):
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
