"""check: is this kernel as its makers left it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column, Named, render
from kvmtool.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from click.shell_completion import CompletionItem

    from kvmtool.check import Finding, Outcome
    from kvmtool.cli.params import Where

LISTING = Listing(
    "check",
    "findings",
    (
        Column("severity", "SEVERITY"),
        Column("check", "CHECK"),
        Column("kind", "KIND"),
        Column("where", "WHERE"),
        Column("address", "ADDRESS", "address"),
        Column("found", "FOUND"),
        Column("kext", "KEXT"),
        Column("expected", "EXPECTED"),
        Column("evidence", "EVIDENCE"),
    ),
    ("severity", "check", "kind", "where", "address", "found", "evidence"),
)


def row_of(finding: Finding) -> dict[str, Any]:
    """A finding under the names that -o and JSON have."""
    row: dict[str, Any] = {c.name: getattr(finding, c.name, None) for c in LISTING.columns}
    code = finding.found
    row["found"] = None if code is None else Named(code.address, str(code))
    row["kext"] = None if code is None else code.kext
    return row


class _Names(click.ParamType[str]):
    """The name of a check."""

    name = "check"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "CHECK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from kvmtool.check import CHECKS

        if value not in CHECKS:
            self.fail(f"no check {value!r}: expected one of {', '.join(CHECKS)}", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names, with what each check looks at."""
        from click.shell_completion import CompletionItem

        from kvmtool.check import CHECKS

        names = [name for name in CHECKS if name.startswith(incomplete)]
        return [CompletionItem(name, help=CHECKS[name].what) for name in names]


@click.command(cls=Sectioned)
@click.option("--only", multiple=True, type=_Names(), help="Make this check; may be repeated.")
@click.option("--all", "every", is_flag=True, help="What has a known reason, too.")
@click.option("--list", "listed", is_flag=True, help="Say which checks there are, and end.")
@listing_options
def check(
    where: Where,
    only: tuple[str, ...],
    every: bool,
    listed: bool,
    columns: tuple[str, ...],
    format: str,
) -> None:
    """Look for what a rootkit changes: pointers to code, lists, and the code itself.

    Pointers must lead to code of the kernel, or of the kext they belong to: those of system calls,
    Mach traps, devices, sysctl names, file systems, protocols, policies and interrupts. Processes
    and kexts must be on all lists where they belong, and the code of the kernel and of kexts as in
    their files.

    Severity is "high" where a pointer leads to no known code at all, or something is hidden, and
    "medium" where it leads to another's code. With --all those of "info" are listed, too: what is
    not as linked for a known reason.

    stderr says how much each check looked at, and what was not there to be checked. Exit status: 0
    nothing was found, 3 something was found, or part of what should be checked cannot be read, 1
    nothing of what was asked for is there.

    \b
    Example:
      kvmtool check -N mach_kernel -M core
      kvmtool check -N mach_kernel -M core --only syscalls --format json
    """
    from kvmtool.check import CHECKS
    from kvmtool.check import check as make

    if listed:
        for name, entry in CHECKS.items():
            click.echo(f"{name:12} {entry.what}")
        return
    outcomes: list[Outcome] = []
    render(
        _rows(make(opened(where), only), outcomes, every), LISTING.chosen(columns, format), format
    )
    _summary(outcomes)


def _rows(
    made: Iterable[Outcome], outcomes: list[Outcome], every: bool
) -> Iterator[dict[str, Any]]:
    """The rows of each check as it is made; the outcomes are kept in `outcomes`."""
    for outcome in made:
        outcomes.append(outcome)
        yield from map(row_of, outcome.findings if every else outcome.alarming)


def _summary(outcomes: list[Outcome]) -> None:
    """What was looked at, what was not there, what could not be read; the exit status."""
    looked = [
        f"{number} {what}"
        for outcome in outcomes
        for what, number in outcome.looked.items()
        if number
    ]
    say(f"looked at {', '.join(looked) or 'nothing'}")
    incomplete: dict[str, list[str]] = {}
    for outcome in outcomes:
        for text in outcome.absent:
            say(f"{outcome.name}: not there: {text}")
        for text in outcome.incomplete:
            incomplete.setdefault(text, []).append(outcome.name)
    for text, names in incomplete.items():
        say(f"{', '.join(names)}: incomplete: {text}")
    if not looked and not incomplete:
        raise KvmError("there was nothing to check")
    found = sum(len(outcome.alarming) for outcome in outcomes)
    partial = any(outcome.incomplete for outcome in outcomes)
    say({0: "no findings", 1: "1 finding"}.get(found, f"{found} findings"))
    if found or partial:
        click.get_current_context().exit(PARTIAL)
