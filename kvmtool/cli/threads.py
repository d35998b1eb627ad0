"""threads: what every process was doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column, Named
from kvmtool.cli.words import complete_pids
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.thread import Thread

_CENTISECOND = 10_000_000  # nanoseconds


def _clock(nanoseconds: int) -> str:
    """Minutes, seconds and hundredths, as ps shows TIME."""
    minutes, hundredths = divmod(nanoseconds // _CENTISECOND, 6000)
    return f"{minutes}:{hundredths // 100:02}.{hundredths % 100:02}"


LISTING = Listing(
    "threads",
    "threads",
    (
        Column("pid", "PID", "number"),
        Column("command", "COMMAND"),
        Column("tid", "TID", "number"),
        Column("address", "THREAD", "address"),
        Column("state", "STAT"),
        Column("flags", "FLAGS", "list"),
        Column("cpu", "CPU", "number"),
        Column("pri", "PRI", "number"),
        Column("base", "BASE", "number"),
        Column("name", "NAME"),
        Column("wmesg", "WMESG"),
        Column("wait_event", "WAITS FOR"),
        Column("continuation", "CONTINUES AT"),
        Column("kernel_stack", "KERNEL STACK", "address"),
        Column("user_time", "USER", "number", _clock),
        Column("system_time", "SYSTEM", "number", _clock),
        Column("suspend_count", "SUSPENDED", "number"),
        Column("active", "ACTIVE"),
        Column("options", "OPTIONS", "address"),
        Column("th_state", "TH_STATE", "address"),
        Column("task", "TASK", "address"),
    ),
    ("pid", "command", "tid", "state", "cpu", "pri", "name", "wmesg", "wait_event", "continuation"),
)
_PLAIN = (
    *("pid", "command", "tid", "address", "flags", "cpu", "name", "wmesg", "kernel_stack"),
    *("user_time", "system_time", "suspend_count", "active", "options", "task"),
)


def row_of(kvm: Kvm, thread: Thread) -> dict[str, Any]:
    """A thread under the names that -o and JSON have."""
    return {
        **{name: getattr(thread, name) for name in _PLAIN},
        "state": thread.letter,
        "th_state": thread.state,
        "pri": thread.sched_pri,
        "base": thread.base_pri,
        "wait_event": _data(kvm, thread.wait_event),
        "continuation": _code(kvm, thread.continuation),
    }


def _data(kvm: Kvm, address: Any) -> Any:
    """Where something lies, by the symbol there; none for 0."""
    if isinstance(address, Unreadable) or not address:
        return address or None
    found = kvm.symbol_at(address)
    return Named(address, f"{address:#x}" if found is None else str(found))


def _code(kvm: Kvm, address: Any) -> Any:
    """A function, by its symbol; none for 0."""
    if isinstance(address, Unreadable) or not address:
        return address or None
    return Named(address, str(kvm.code_at(address)))


@click.command(cls=Sectioned)
@click.argument("pid", required=False, type=int, shell_complete=complete_pids)
@listing_options
def threads(where: Where, pid: int | None, columns: tuple[str, ...], format: str) -> None:
    """List the threads, or those of the process PID: what each waits for, and where it goes on.

    CPU is the one it was running on. Times are nanoseconds in json, up to when the thread last left
    its CPU.

    \b
    Example:
      kvmtool threads -N mach_kernel -M core
      kvmtool threads 1 -N mach_kernel -M core -o tid,flags,kernel_stack
    """
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.thread import threads as walk

    kvm = opened(where)
    report = Report()
    rows = (row_of(kvm, thread) for thread in walk(kvm.verified_target(), report, pid))
    LISTING.show(rows, columns, format, report)
