"""args: what processes were started with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.params import pids_option
from kvmtool.cli.procs import started
from kvmtool.cli.render import Column

if TYPE_CHECKING:
    from kvmtool.cli.params import Where

LISTING = Listing(
    "args",
    "processes",
    (
        Column("pid", "PID", "number"),
        Column("comm", "COMM"),
        Column("path", "PATH"),
        Column("args", "ARGS", "list"),
        Column("env", "ENVIRONMENT", "list"),
        Column("apple", "APPLE", "list"),
    ),
    ("pid", "path", "args"),
)


@click.command(cls=Sectioned)
@pids_option
@click.option("--env", is_flag=True, help="The environment, too.")
@listing_options
def args(
    pid: tuple[int, ...], env: bool, where: Where, columns: tuple[str, ...], format: str
) -> None:
    """List what processes were started with: path, arguments, environment, apple strings.

    They lie in each process's own memory: dumps of physical memory and running machines have it,
    a kernel's core does not, and what was compressed or swapped out is gone.

    \b
    Example:
      kvmtool args -N mach_kernel -M mem.lime --env
    """
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.space import no_process

    kvm = opened(where)
    report = Report()
    chosen = [proc for proc in kvm.procs(report) if not pid or proc.pid in pid]
    for missing in sorted(set(pid) - {proc.pid for proc in chosen}):
        raise no_process(missing, report)
    rows = ({"pid": p.pid, "comm": p.comm, **started(kvm, p)} for p in chosen)
    columns = (*(columns or LISTING.shown), "env") if env else columns
    LISTING.show(rows, columns, format, report)
