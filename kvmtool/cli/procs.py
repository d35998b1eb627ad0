"""procs: the process list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened, time_fields
from kvmtool.cli.params import pids_option
from kvmtool.cli.render import Column, Named
from kvmtool.cli.words import remember
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.proc import Proc


def _short_tty(tty: str) -> str:
    # ps drops /dev/tty, or /dev/ where that is all there is to drop
    for prefix in ("/dev/tty", "/dev/"):
        if tty.startswith(prefix) and len(tty) > len(prefix):
            return tty[len(prefix) :]
    return tty


def _short_time(iso: str) -> str:
    return iso[:19].replace("T", " ")


def _minutes(time: int) -> str:
    # ps's M:SS.hh; the number itself is in nanoseconds
    seconds, rest = divmod(time, 1_000_000_000)
    return f"{seconds // 60}:{seconds % 60:02d}.{rest // 10_000_000:02d}"


def _kilobytes(size: int) -> str:
    return str(size >> 10)


# What is found through a process's task, map and vnode: read only when it is asked for.
_USED = ("time", "utime", "stime", "vsize", "rss", "wchan", "csflags", "text")
# What a process was started with, from its own memory: read only when it is asked for.
_STARTED = ("path", "args", "env", "apple")
COLUMNS = (
    Column("pid", "PID", "number"),
    Column("ppid", "PPID", "number"),
    Column("pgid", "PGID", "number"),
    Column("sid", "SID", "number"),
    Column("uid", "UID", "number"),
    Column("ruid", "RUID", "number"),
    Column("svuid", "SVUID", "number"),
    Column("gid", "GID", "number"),
    Column("rgid", "RGID", "number"),
    Column("svgid", "SVGID", "number"),
    Column("groups", "GROUPS", "list"),
    Column("login", "LOGIN"),
    Column("tty", "TT", show=_short_tty),
    Column("tdev", "TDEV", "address"),
    Column("state", "STAT"),
    Column("stat", "P_STAT", "number"),
    Column("flag", "F", "number", lambda flag: f"{flag:x}"),
    Column("lflag", "LF", "number", lambda flag: f"{flag:x}"),
    Column("nice", "NI", "number"),
    Column("priority", "PRI", "number"),
    Column("start", "STARTED", show=_short_time),
    Column("start_raw", "START_RAW", "list"),
    Column("xstat", "XSTAT", "number"),
    Column("acflag", "ACFLG", "number"),
    Column("zombie", "ZOMBIE"),
    Column("threads", "THREADS", "number"),
    Column("comm", "COMM"),
    Column("name", "NAME"),
    Column("command", "COMMAND"),
    Column("time", "TIME", "number", _minutes),
    Column("utime", "USER", "number", _minutes),
    Column("stime", "SYSTEM", "number", _minutes),
    Column("vsize", "VSZ", "number", _kilobytes),
    Column("rss", "RSS", "number", _kilobytes),
    Column("wchan", "WCHAN"),
    Column("csflags", "CSFLAGS", "address"),
    Column("text", "TEXT"),
    Column("path", "PATH"),
    Column("args", "ARGS", "list"),
    Column("env", "ENVIRONMENT", "list"),
    Column("apple", "APPLE", "list"),
    Column("address", "PADDR", "address"),
    Column("task", "TASK", "address"),
    Column("ucred", "UCRED", "address"),
    Column("parent", "PARENT", "address"),
    Column("pgrp", "PGRP", "address"),
    Column("session", "SESS", "address"),
    Column("lists", "LISTS", "list"),
)
LISTING = Listing(
    "procs",
    "processes",
    COLUMNS,
    ("pid", "ppid", "pgid", "uid", "login", "tty", "state", "start", "command"),
    (*_USED, *_STARTED),
)
_STORED = tuple(
    c.name for c in COLUMNS if c.name not in ("start_raw", "command", *_USED, *_STARTED)
)


def row_of(proc: Proc) -> dict[str, Any]:
    """A process under the names that -o and JSON have."""
    row = {name: getattr(proc, name) for name in _STORED}
    row |= time_fields("start", proc.start)
    row["lists"] = list(proc.lists)
    row["command"] = _command(proc)
    return row


def _command(proc: Proc) -> Any:
    """The long name where there is one; in brackets what has no command left, as ps does."""
    if isinstance(proc.comm, Unreadable) or not isinstance(proc.name, str):
        return proc.comm
    name = proc.name or proc.comm
    return f"({name})" if proc.zombie is True else name


def _filters(
    pid: tuple[int, ...], pgid: int | None, sid: int | None, tty: str | None, user: str | None
) -> list[Callable[[Proc], bool]]:
    checks: list[Callable[[Proc], bool]] = []
    if pid:
        checks.append(lambda proc: proc.pid in pid)
    if pgid is not None:
        checks.append(lambda proc: proc.pgid == pgid)
    if sid is not None:
        checks.append(lambda proc: proc.sid == sid)
    if tty is not None:
        wanted = {tty, f"/dev/{tty}", f"/dev/tty{tty}"}
        checks.append(lambda proc: proc.tty in wanted)
    if user is not None:
        if user.isdigit():
            checks.append(lambda proc: proc.uid == int(user))
        else:
            checks.append(lambda proc: proc.login == user)
    return checks


def _as_tree(procs: list[Proc]) -> Iterator[tuple[Proc, str]]:
    """The processes parents first, each with the branch drawn before its name.

    Pids may be damaged: whoever has no parent here, or is its own ancestor, stands at the left.
    """
    pids = {proc.pid for proc in procs if isinstance(proc.pid, int)}
    children: dict[int, list[Proc]] = {}
    roots = []
    for proc in sorted(procs, key=_pid_key):
        if isinstance(proc.ppid, int) and proc.ppid in pids and proc.ppid != proc.pid:
            children.setdefault(proc.ppid, []).append(proc)
        else:
            roots.append(proc)
    shown: set[int] = set()
    for root in [*roots, *sorted(procs, key=_pid_key)]:
        yield from _branch(root, children, shown)


def _branch(
    root: Proc, children: dict[int, list[Proc]], shown: set[int]
) -> Iterator[tuple[Proc, str]]:
    waiting = [(root, "", "")]
    while waiting:
        proc, mark, indent = waiting.pop()
        if proc.address in shown:
            continue
        shown.add(proc.address)
        yield proc, mark
        below = children.get(proc.pid, []) if isinstance(proc.pid, int) else []
        for place, child in enumerate(reversed(below)):
            last = place == 0
            mark_of, more = ("`- ", "   ") if last else ("|- ", "|  ")
            waiting.append((child, indent + mark_of, indent + more))


def _pid_key(proc: Proc) -> tuple[int, int]:
    return (proc.pid if isinstance(proc.pid, int) else 1 << 32, proc.address)


class _Used:
    """The columns of what processes use."""

    def __init__(self, kvm: Kvm) -> None:
        from kvmtool.xnu.usage import UsageReader
        from kvmtool.xnu.vnode import VnodeReader

        target = kvm.verified_target()
        self._kvm, self._reader, self._vnodes = kvm, UsageReader(target), VnodeReader(target)

    def row(self, proc: Proc) -> dict[str, Any]:
        """The cells of one process."""
        found = self._reader.read(proc)
        both = (found.utime, found.stime)
        odd = next((time for time in both if not isinstance(time, int)), None)
        whole = all(isinstance(time, int) for time in both)
        return {
            "time": sum(both) if whole else odd,
            "utime": found.utime,
            "stime": found.stime,
            "vsize": found.vsize,
            "rss": found.rss,
            "wchan": self._event(found.wait_event),
            "csflags": found.csflags,
            "text": self._path(found.textvp),
        }

    def _event(self, event: Any) -> Any:
        """The symbol of what is waited for; the address where it is on the heap."""
        if not isinstance(event, int) or not event:
            return event if isinstance(event, Unreadable) else None
        code = self._kvm.symbol_at(event)
        return Named(event, f"{event:#x}" if code is None else str(code))

    def _path(self, vnode: Any) -> Any:
        if not isinstance(vnode, int) or not vnode:
            return vnode if isinstance(vnode, Unreadable) else None
        return self._vnodes.path(vnode)


def started(kvm: Kvm, proc: Proc) -> dict[str, Any]:
    """What a process was started with, as text: path, args, env, apple."""
    found = kvm.arguments(proc)
    return {
        "path": _text(found.path),
        "args": _text(found.argv),
        "env": _text(found.env),
        "apple": _text(found.apple),
    }


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _rows(
    kvm: Kvm, procs: Iterable[Proc], tree: bool, wanted: set[str]
) -> Iterator[dict[str, Any]]:
    """A row a process; what costs more to find only if it is `wanted`."""
    used = _Used(kvm) if wanted.intersection(_USED) else None
    marked = _as_tree(list(procs)) if tree else ((proc, "") for proc in procs)
    for proc, mark in marked:
        row = row_of(proc)
        row |= used.row(proc) if used is not None else {}
        row |= started(kvm, proc) if wanted.intersection(_STARTED) else {}
        if isinstance(row["command"], str):
            row["command"] = mark + row["command"]
        yield row


def _heard(procs: Iterable[Proc], known: list[tuple[str, str]]) -> Iterator[Proc]:
    """The processes, and what a shell may complete of them in `known`."""
    for proc in procs:
        if isinstance(proc.pid, int):
            known.append((str(proc.pid), proc.comm if isinstance(proc.comm, str) else ""))
        yield proc


def _keep(where: Where, checks: list[Callable[[Proc], bool]], known: list[tuple[str, str]]) -> None:
    if known and not checks:
        remember("pids", where, lambda: known)


@click.command(cls=Sectioned)
@pids_option
@click.option("--pgrp", "pgid", type=int, help="Only this process group.")
@click.option("--session", "sid", type=int, help="Only this session.")
@click.option("--tty", help="Only this terminal: ttys000, s000, console.")
@click.option("--user", help="Only this effective uid, or this login name.")
@click.option("--tree", is_flag=True, help="Parents first, drawn as a tree.")
@click.option("--env", is_flag=True, help="Arguments and environment, too.")
@listing_options
def procs(
    pid: tuple[int, ...],
    pgid: int | None,
    sid: int | None,
    tty: str | None,
    user: str | None,
    tree: bool,
    env: bool,
    columns: tuple[str, ...],
    format: str,
    where: Where,
) -> None:
    """List the processes of a crash dump, as ps does.

    Live ones in the order of allproc, then zombies. What cannot be read is shown as "?"; where a
    list is torn, what stopped is named on stderr and the exit status is 3. Arguments and
    environment lie in a process's own memory, which only dumps of physical memory hold.

    \b
    Example:
      kvmtool procs -N mach_kernel -M core -o pid,tty,command
      kvmtool procs -N mach_kernel -M mem.lime -o pid,args
    """
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    report = Report()
    checks = _filters(pid, pgid, sid, tty, user)
    known: list[tuple[str, str]] = []
    click.get_current_context().call_on_close(lambda: _keep(where, checks, known))
    every = _heard(kvm.procs(report), known)
    found = (proc for proc in every if all(check(proc) for check in checks))
    if env:
        columns = (*(columns or LISTING.shown), "args", "env")
    wanted = {column.name for column in LISTING.chosen(columns, format)}
    LISTING.show(_rows(kvm, found, tree, wanted), columns, format, report)
