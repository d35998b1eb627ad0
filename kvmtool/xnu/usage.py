"""What a process uses: processor time, memory, and what it waits for.

Source: osfmk/kern/task.h, thread.h, timer.h, bsd/kern/bsd_stubs.c, osfmk/kern/task.c
(task_info, TASK_BASIC_INFO), xnu-792..11417. Up to macOS 12 a task keeps the time of its ended
threads, and each thread its own; from 13 on a task keeps the time of all (recount.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.processor import abstime_hz
from kvmtool.xnu.queues import Report, walk_queue
from kvmtool.xnu.recount import Recount

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.xnu.proc import Proc

_THREADS = 1 << 16  # of one task
_NANOSECOND = 1_000_000_000


class Usage(NamedTuple):
    """What one process uses. Any field may be `Unreadable`; None: this kernel does not keep it.

    `utime` and `stime` are in nanoseconds, None where the kernel does not say how fast its clock
    runs; `vsize` and `rss` in bytes; `wait_event` is what its first waiting thread waits for, an
    address; `textvp` the vnode of its executable; `csflags` its code-signing flags.
    """

    utime: Any
    stime: Any
    vsize: Any
    rss: Any
    wait_event: Any
    textvp: Any
    csflags: Any


class UsageReader:
    """Reads it for the processes of one kernel."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of proc, task, thread, map and pmap."""
        types = target.types
        self._target = target
        self._proc = _record(target, "proc", {"textvp": ("P", "p_textvp"), **_CSFLAGS})
        self._proc_ro = _record(target, "proc_ro", _CSFLAGS)
        self._ro = offset_of(types, "proc", "p_proc_ro")
        self._task = _record(target, "task", _TASK)
        self._thread = Record(target, _thread_fields(target))
        self._threads = types.offset("task", "threads")
        self._link = types.offset("thread", "task_threads")
        self._map = _record(target, "_vm_map", {"size": ("P", "size"), "pmap": ("P", "pmap")})
        resident = offset_of(types, "pmap", "stats.resident_count", "stats")
        self._pmap = Record(target, {"resident": (resident, "I")})
        self._hz = abstime_hz(target)
        self._recount = Recount(target)

    def read(self, proc: Proc) -> Usage:
        """The usage of one process; a zombie uses nothing. Never raises `FaultError`."""
        raw = self._proc.read(proc.address)
        csflags = raw["csflags"]
        if csflags is None and self._ro is not None:
            csflags = self._csflags(proc.address + self._ro)
        task = proc.task
        if not isinstance(task, int):
            return Usage(task, task, task, task, task, raw["textvp"], csflags)
        fields = self._task.read(task)
        utime, stime, event = self._times(task, fields)
        vsize, rss = self._memory(fields["map"])
        return Usage(utime, stime, vsize, rss, event, raw["textvp"], csflags)

    def _csflags(self, pointer: int) -> Any:
        try:
            return self._proc_ro.read(self._target.pointer(pointer))["csflags"]
        except FaultError as fault:
            return Unreadable.of(fault)

    def _times(self, task: int, fields: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Time of ended threads and of living ones; the event the first waiting one waits for."""
        report = Report()
        times: dict[str, Any] = {name: fields[name] for name in ("user", "system")}
        by_thread = fields["recount"] is None
        if not by_thread:
            times["user"], times["system"] = self._recount.task(fields["recount"])
        event: Any = None
        head = task + self._threads
        for thread in walk_queue(self._target, head, self._link, "threads", report, _THREADS):
            raw = self._thread.read(thread)
            for name in times if by_thread else ():
                times[name] = _added(times[name], _timer(raw, name))
            if event is None and raw["event"]:
                event = raw["event"]
        if report.stops:
            torn = Unreadable(report.stops[0])
            event = event or torn
            times = {n: _added(time, torn) for n, time in times.items()} if by_thread else times
        return self._nanoseconds(times["user"]), self._nanoseconds(times["system"]), event

    def _nanoseconds(self, ticks: Any) -> Any:
        if not isinstance(ticks, int):
            return ticks
        return None if self._hz is None else ticks * _NANOSECOND // self._hz

    def _memory(self, vm_map: Any) -> tuple[Any, Any]:
        """Bytes mapped, and bytes resident."""
        if not isinstance(vm_map, int):
            return vm_map, vm_map
        fields = self._map.read(vm_map)
        pmap = fields["pmap"]
        if not isinstance(pmap, int) or not pmap:
            return fields["size"], pmap or None
        resident = self._pmap.read(pmap)["resident"]
        if isinstance(resident, int):
            resident *= self._target.arch.page_size
        return fields["size"], resident


_CSFLAGS = {"csflags": ("I", "p_csflags")}
_TASK = {
    "user": ("Q", "total_user_time"),
    "system": ("Q", "total_system_time"),
    "map": ("P", "map"),
    "recount": ("P", "tk_recount.rtk_lifetime"),
}


def _record(target: Target, struct: str, wanted: dict[str, tuple[str, str]]) -> Record:
    fields = {
        name: (offset_of(target.types, struct, member), code)
        for name, (code, member) in wanted.items()
    }
    return Record(target, fields)


def _thread_fields(target: Target) -> dict[str, tuple[int | None, str]]:
    """struct timer's bits: one word of 64, or two of 32 in an order of their own."""
    types = target.types
    fields: dict[str, tuple[int | None, str]] = {
        "event": (offset_of(types, "thread", "wait_event"), "P")
    }
    for name in ("user", "system"):
        member = f"{name}_timer"
        start = offset_of(types, "thread", member)
        low = offset_of(types, "thread", f"{member}.low_bits")
        whole = offset_of(types, "thread", f"{member}.all_bits")
        if start is None:
            fields[name] = (None, "Q")
        elif low is not None or target.arch.pointer_size == 4:
            # {low, high, check, tstamp} in 10.4, {tstamp (64 bits), low, high, check} since
            at = start + 8 if low is None else low
            fields[f"{name}_low"], fields[f"{name}_high"] = (at, "I"), (at + 4, "I")
        else:
            fields[name] = (start + 8 if whole is None else whole, "Q")
    return fields


def _timer(raw: dict[str, Any], name: str) -> Any:
    if name in raw:
        return raw[name]
    low, high = raw[f"{name}_low"], raw[f"{name}_high"]
    for word in (low, high):
        if isinstance(word, Unreadable):
            return word
    return high << 32 | low


def _added(total: Any, more: Any) -> Any:
    for value in (total, more):
        if value is None or isinstance(value, Unreadable):
            return value
    return total + more
