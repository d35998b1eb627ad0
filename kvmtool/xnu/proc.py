"""Processes: allproc, zombproc, and everything that leads to a process they do not list.

Source: bsd/sys/proc_internal.h, bsd/sys/ucred.h, bsd/kern/kern_proc.c, xnu-792..11417. Nothing here
asks for a version: a member or symbol is there or it is not, the newest form first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc_lists import Census
from kvmtool.xnu.proc_state import SSTOP, SZOMB, marks
from kvmtool.xnu.queues import Report
from kvmtool.xnu.task import TaskReader
from kvmtool.xnu.tty import tty_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

MAXCOMLEN = 16
NGROUPS = 16
MAXLOGNAME = 255
_NAME_SIZE = 2 * MAXCOMLEN + 1


@dataclass(frozen=True, slots=True)
class Proc:
    """One process. Any field may be `Unreadable`; None says the kernel has no such thing.

    `address`, `task`, `ucred`, `parent` are kernel addresses; `start` is (seconds, microseconds)
    since 1970 UTC; `state` is the STAT column of ps; `lists` names every list that led here.
    """

    address: int
    pid: Any
    ppid: Any
    pgid: Any
    sid: Any
    uid: Any
    ruid: Any
    svuid: Any
    gid: Any
    rgid: Any
    svgid: Any
    groups: Any
    tty: Any
    tdev: Any
    login: Any
    stat: Any
    flag: Any
    lflag: Any
    nice: Any
    priority: Any
    start: Any
    xstat: Any
    acflag: Any
    zombie: Any
    comm: Any
    name: Any
    task: Any
    ucred: Any
    parent: Any
    pgrp: Any
    session: Any
    state: Any
    threads: Any
    lists: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every field could be read."""
        return not any(isinstance(getattr(self, n), Unreadable) for n in self.__slots__)


_FIRST, _LAST = -30_610_224_000, 253_402_300_799  # the years of four digits


def iso_time(start: tuple[int, int]) -> str:
    """A timeval as ISO 8601 in UTC with microseconds; an impossible one as its numbers."""
    seconds, micros = start
    if not (_FIRST <= seconds <= _LAST and 0 <= micros < 1_000_000):
        return f"{seconds}.{micros:06d}"
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{text}.{micros:06d}Z"


def text_of(field: Any) -> Any:
    """A char array's text up to its NUL; bytes that are not UTF-8 become lone surrogates."""
    if isinstance(field, bytes):
        return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return field


class ProcReader:
    """Reads processes of one kernel; credentials, groups and sessions are read once each."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of each structure."""
        self.target = target
        types = target.types
        self.link = offset_of(types, "proc", "p_list.le_next", "p_list") or 0
        self.hash_link = offset_of(types, "proc", "p_hash.le_next", "p_hash")
        self._proc = Record(target, _proc_fields(target))
        self._ucred = Record(target, _ucred_fields(target))
        self._pgrp = Record(target, _fields(target, "pgrp", _PGRP))
        self._session = Record(target, _session_fields(target))
        self._ro = (
            Record(target, _fields(target, "proc_ro", _PROC_RO))
            if types.has("proc", "p_proc_ro")
            else None
        )
        self._stats = (
            None
            if types.has("proc", "p_start")
            else Record(target, {"start": (offset_of(types, "pstats", "p_start"), "T")})
        )
        self._pid = Record(target, {"pid": (types.offset("proc", "p_pid"), "i")})
        self.tasks = TaskReader(target)
        self._cache: dict[tuple[str, int], dict[str, Any]] = {}

    def _cached(self, kind: str, record: Record, address: Any) -> dict[str, Any]:
        """The record at `address`; every field of a null or unreadable pointer is the pointer."""
        if isinstance(address, Unreadable):
            return dict.fromkeys(record.names, address)
        if not address:
            return dict.fromkeys(record.names)
        key = (kind, address)
        if key not in self._cache:
            self._cache[key] = record.read(address)
        return self._cache[key]

    def pid(self, address: int) -> Any:
        """p_pid of the process at `address`."""
        return self._pid.read(address)["pid"]

    def read(self, address: int, lists: tuple[str, ...], zombie: bool = False) -> Proc:
        """The process at `address`, met on `lists`. Never raises `FaultError`."""
        raw = self._proc.read(address)
        ro = self._cached("proc_ro", self._ro, raw["ro"]) if self._ro else {}
        ucred_at = ro["ucred"] if "ucred" in ro else raw["ucred"]
        ucred = self._cached("ucred", self._ucred, ucred_at)
        pgrp = self._cached("pgrp", self._pgrp, raw["pgrp"])
        session = self._cached("session", self._session, pgrp["session"])
        is_zombie = zombie or raw["stat"] == SZOMB
        task = self._task(address, raw, ro, is_zombie)
        state, threads = self._state(address, raw, session, task, is_zombie)
        groups = _groups(ucred, self.target.arch.byteorder)
        tty, tdev = tty_name(self.target, session["ttyp"], session["ttyvp"])
        return Proc(
            address=address,
            pid=raw["pid"],
            ppid=self._ppid(raw),
            pgid=_first(pgrp["id"], raw["pgrpid"]),
            sid=_first(session["sid"], raw["sessionid"]),
            **{name: _first(raw[name], ucred.get(name)) for name in _IDS},
            gid=_first(raw["gid"], groups[0] if isinstance(groups, list) and groups else groups),
            groups=groups,
            tty=tty,
            tdev=tdev,
            login=text_of(session["login"]),
            stat=raw["stat"],
            flag=raw["flag"],
            lflag=raw["lflag"],
            nice=raw["nice"],
            priority=raw["priority"],
            start=self._start(raw),
            xstat=raw["xstat"],
            acflag=raw["acflag"],
            zombie=is_zombie,
            comm=text_of(raw["comm"]),
            name=text_of(raw["name"]),
            task=task,
            ucred=ucred_at,
            parent=raw["pptr"],
            pgrp=raw["pgrp"],
            session=pgrp["session"],
            state=state,
            threads=threads,
            lists=lists,
        )

    def _ppid(self, raw: dict[str, Any]) -> Any:
        if raw["ppid"] is not None:
            return raw["ppid"]
        # 10.4 keeps only the pointer (bsd/sys/proc.h, xnu-792)
        parent = raw["pptr"]
        if isinstance(parent, Unreadable):
            return parent
        return self.pid(parent) if parent else 0

    def _start(self, raw: dict[str, Any]) -> Any:
        if self._stats is None:
            return raw["start"]
        return self._cached("pstats", self._stats, raw["stats"])["start"]

    def _task(self, address: int, raw: dict[str, Any], ro: dict[str, Any], zombie: bool) -> Any:
        if zombie:
            return None
        if self.tasks.computed is not None:
            # xnu-8792 (macOS 13) on: allocated together, and proc_ro has the pointer too
            known = ro.get("task")
            if known is None or isinstance(known, Unreadable):
                return address + self.tasks.computed
            return known or None
        task = raw["task"]
        return task if isinstance(task, Unreadable) else task or None

    def _state(
        self, address: int, raw: dict[str, Any], session: dict[str, Any], task: Any, zombie: bool
    ) -> tuple[Any, Any]:
        """The STAT column of ps, and how many threads there are."""
        if zombie:
            return "Z", 0
        letter, threads = self.tasks.state(task)
        if raw["stat"] == SSTOP and not isinstance(letter, Unreadable):
            letter = "T"
        behind = marks(address, raw, session)
        for part in (letter, behind):
            if isinstance(part, Unreadable):
                return part, threads
        return letter + behind, threads


def _first(*values: Any) -> Any:
    """The first value that is there and readable; else the first that is there at all."""
    there = [value for value in values if value is not None]
    readable = (value for value in there if not isinstance(value, Unreadable))
    return next(readable, there[0] if there else None)


def _groups(ucred: dict[str, Any], byteorder: str) -> Any:
    count, groups = ucred["ngroups"], ucred["groups"]
    for value in (count, groups):
        if value is None or isinstance(value, Unreadable):
            return value
    numbers = Struct(byteorder + f"{NGROUPS}I").unpack(groups)
    return list(numbers[: max(0, min(count, NGROUPS))])


# our name -> (code, members, newest first)
_PROC = {
    "ro": ("P", "p_proc_ro"),
    "task": ("P", "task"),
    "pptr": ("P", "p_pptr"),
    "ppid": ("i", "p_ppid"),
    "pgrpid": ("i", "p_pgrpid"),
    "sessionid": ("i", "p_sessionid"),
    "uid": ("I", "p_uid"),
    "gid": ("I", "p_gid"),
    "ruid": ("I", "p_ruid"),
    "rgid": ("I", "p_rgid"),
    "svuid": ("I", "p_svuid"),
    "svgid": ("I", "p_svgid"),
    "pid": ("i", "p_pid"),
    "stat": ("b", "p_stat"),
    "pgrp": ("P", "p_pgrp"),
    "ucred": ("P", "p_ucred"),
    "stats": ("P", "p_stats"),
    "flag": ("I", "p_flag"),
    "lflag": ("I", "p_lflag"),
    "listflag": ("I", "p_listflag"),
    "xstat": ("H", "p_xstat"),
    "acflag": ("H", "p_acflag"),
    "priority": ("B", "p_priority"),
    "nice": ("b", "p_nice"),
    "comm": (f"{MAXCOMLEN + 1}s", "p_comm"),
    "name": (f"{_NAME_SIZE}s", "p_name"),
    "start": ("T", "p_start"),
}
_PROC_RO = {"ucred": ("P", "p_ucred"), "task": ("P", "pr_task")}
_PGRP = {"id": ("i", "pg_id"), "session": ("P", "pg_session")}
_SESSION = {
    "leader": ("P", "s_leader"),
    "sid": ("i", "s_sid"),
    "ttyp": ("P", "s_ttyp"),
    "ttyvp": ("P", "s_ttyvp"),
    "ttypgrpid": ("i", "s_ttypgrpid"),
}
_UCRED = {
    "uid": ("I", "cr_uid"),
    "ruid": ("I", "cr_ruid"),
    "svuid": ("I", "cr_svuid"),
    "ngroups": ("h", "cr_ngroups"),
    "groups": (f"{NGROUPS * 4}s", "cr_groups"),
    "rgid": ("I", "cr_rgid"),
    "svgid": ("I", "cr_svgid"),
}
_IDS = ("uid", "ruid", "svuid", "rgid", "svgid")


def _fields(
    target: Target, struct: str, wanted: dict[str, tuple[str, str]]
) -> dict[str, tuple[int | None, str]]:
    return {
        name: (offset_of(target.types, struct, member), code)
        for name, (code, member) in wanted.items()
    }


def _proc_fields(target: Target) -> dict[str, tuple[int | None, str]]:
    fields = _fields(target, "proc", _PROC)
    at, _ = fields["name"]
    room = target.types.size("proc") - (at or 0)
    fields["name"] = (at, f"{min(_NAME_SIZE, room)}s")
    return fields


def _session_fields(target: Target) -> dict[str, tuple[int | None, str]]:
    fields = _fields(target, "session", _SESSION)
    at = offset_of(target.types, "session", "s_login")
    room = target.types.size("session") - (at or 0)
    fields["login"] = (at, f"{min(MAXLOGNAME, room)}s")
    return fields


def _ucred_fields(target: Target) -> dict[str, tuple[int | None, str]]:
    """ucred's own members, or from xnu-1699 (10.7) on those of the posix_cred inside it."""
    types = target.types
    inner = offset_of(types, "ucred", "cr_posix")
    struct = "ucred" if inner is None else "posix_cred"
    fields: dict[str, tuple[int | None, str]] = {
        name: (None if at is None else at + (inner or 0), code)
        for name, (at, code) in _fields(target, struct, _UCRED).items()
    }
    return fields


def procs(target: Target, report: Report | None = None) -> Iterator[Proc]:
    """Every process, live ones in the order of allproc, then zombies, then those found elsewhere.

    What could not be read, where a walk stopped, and which lists disagree goes into `report`.
    """
    report = report if report is not None else Report()
    reader = ProcReader(target)
    census = Census(reader, report)
    for address, lists, zombie in census:
        yield reader.read(address, lists, zombie)
