"""Threads: the Mach side of what runs, with the names the BSD side gave them.

Source: osfmk/kern/thread.h, thread.c, timer.h, bsd/sys/user.h (pth_name), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of, unsigned
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import MAXCOMLEN, text_of
from kvmtool.xnu.processor import NANOSECOND, abstime_hz, running_on
from kvmtool.xnu.queues import Difference, Report, walk_queue
from kvmtool.xnu.recount import Recount
from kvmtool.xnu.space import no_process
from kvmtool.xnu.task import TaskReader, letter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

# osfmk/kern/thread.h: the bit of thread.state, and its name without TH_
STATES = (
    (0x1, "WAIT"),
    (0x2, "SUSP"),
    (0x4, "RUN"),
    (0x8, "UNINT"),
    (0x10, "TERMINATE"),
    (0x20, "TERMINATE2"),
    (0x40, "WAIT_REPORT"),
    (0x80, "IDLE"),
    (0x100, "WAKING"),
)
TH_RUN = 0x4
MAXTHREADNAMESIZE = 64


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread. Any field may be `Unreadable`; None says the kernel has no such thing.

    `address`, `task`, `wait_event`, `continuation` and `kernel_stack` are kernel addresses, 0 for
    none; `kstackptr` is where arm64 saves the registers. `state` and `options` are the kernel's
    numbers (TH_*, TH_OPT_*). `wmesg` is what msleep(9) was told it waits for. `user_time` and
    `system_time` are nanoseconds up to when the thread
    last left its CPU. `cpu` is the one that it was running on, None if on none. `pid` and `command`
    are None for a task without a process.
    """

    address: int
    task: Any
    pid: Any
    command: Any
    tid: Any
    state: Any
    sched_pri: Any
    base_pri: Any
    name: Any
    wmesg: Any
    wait_event: Any
    continuation: Any
    kernel_stack: Any
    kstackptr: Any
    user_time: Any
    system_time: Any
    suspend_count: Any
    active: Any
    options: Any
    cpu: Any

    @property
    def letter(self) -> Any:
        """`state` as ps(1) shows it: R, U, S, T, or H for one that is going away."""
        return self.state if isinstance(self.state, Unreadable) else letter(self.state)

    @property
    def flags(self) -> Any:
        """The names of the bits of `state`."""
        if isinstance(self.state, Unreadable):
            return self.state
        return [word for bit, word in STATES if self.state & bit]

    @property
    def running(self) -> bool:
        """Whether it was on a CPU: what it had saved when it last left one is stale then."""
        return isinstance(self.cpu, int)


class _Owner(NamedTuple):
    """The process that a task belongs to."""

    pid: Any
    command: Any


class ThreadReader:
    """Reads threads of one kernel; each task's owner is read once."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of thread, uthread and proc."""
        self._target = target
        types = target.types
        self.tasks = TaskReader(target)
        self.task_link = types.offset("thread", "task_threads")
        self.task_head = types.offset("task", "threads")
        self._record = Record(target, _fields(target))  # says which member these types lack
        self._active_bit = types.struct("thread").members["active"].bit_offset or 0
        self._ro = None
        if types.has("thread", "t_tro"):  # xnu-8019.61 (macOS 12.1) on
            self._ro = Record(target, {"task": (types.offset("thread_ro", "tro_task"), "P")})
        self._after = None if types.has("thread", "uthread") else types.size("thread")
        self._uthread = Record(
            target,
            {
                "name": (offset_of(types, "uthread", "pth_name"), "P"),  # xnu-1456 (10.6) on
                "wmesg": (offset_of(types, "uthread", "uu_wmesg"), "P"),  # xnu-1228 (10.5) on
            },
        )
        comm, long = f"{MAXCOMLEN + 1}s", f"{2 * MAXCOMLEN + 1}s"
        self._proc = Record(
            target,
            {
                "pid": (types.offset("proc", "p_pid"), "i"),
                "comm": (types.offset("proc", "p_comm"), comm),
                "name": (offset_of(types, "proc", "p_name"), long),
            },
        )
        self._owners: dict[int, _Owner] = {}
        self._hz = abstime_hz(target)
        self._recount = Recount(target)
        self._running = running_on(target)

    def read(self, address: int) -> Thread:
        """The thread at `address`. Never raises `FaultError`."""
        raw = self._record.read(address)
        task = raw["task"]
        if self._ro is not None:
            at = raw["tro"]
            task = at if isinstance(at, Unreadable) else self._ro.read(at)["task"]
        owner = self.owner(task)
        active = raw["active"]
        name, wmesg = self._texts(address, raw["uthread"])
        user, system = self._times(raw)
        return Thread(
            address=address,
            task=task,
            pid=owner.pid,
            command=owner.command,
            name=name,
            wmesg=wmesg,
            user_time=user,
            system_time=system,
            active=active if not isinstance(active, int) else bool(active >> self._active_bit & 1),
            cpu=self._cpu(address, raw["state"]),
            **{name: raw[name] for name in _PLAIN},
        )

    def _cpu(self, address: int, state: Any) -> Any:
        """The CPU it was running on; None for one that was not, as one that waits."""
        cpus, lost = self._running
        if address in cpus or lost is None or (isinstance(state, int) and not state & TH_RUN):
            return cpus.get(address)
        return lost

    def owner(self, task: Any) -> _Owner:
        """The process of the task at `task`."""
        if isinstance(task, Unreadable):
            return _Owner(task, task)
        if not task:
            return _Owner(None, None)
        if task not in self._owners:
            self._owners[task] = self._owner(task)
        return self._owners[task]

    def _owner(self, task: int) -> _Owner:
        proc = self.tasks.proc_of(task)
        if not isinstance(proc, int):
            return _Owner(proc, proc)
        raw = self._proc.read(proc)
        comm, name = text_of(raw["comm"]), text_of(raw["name"])
        return _Owner(raw["pid"], name if isinstance(name, str) and name else comm)

    def _texts(self, address: int, uthread: Any) -> tuple[Any, Any]:
        """pth_name and uu_wmesg, pointers to text that are null for a thread without."""
        # macOS 12.1 on: thread and uthread are one allocation (osfmk/kern/thread.c)
        at = address + self._after if self._after is not None else uthread
        if isinstance(at, Unreadable) or not at:
            return at or None, at or None
        raw = self._uthread.read(at)
        return self._text(raw["name"]), self._text(raw["wmesg"])

    def _text(self, pointer: Any) -> Any:
        if isinstance(pointer, Unreadable) or not pointer:
            return pointer or None
        try:
            return self._target.text(pointer, MAXTHREADNAMESIZE)
        except FaultError as fault:
            return Unreadable.of(fault)

    def _times(self, raw: dict[str, Any]) -> tuple[Any, Any]:
        """User and system time in nanoseconds."""
        if raw["recount"] is not None:
            user, system = self._recount.thread(raw["recount"])
        else:
            user, system = _ticks(raw, "user"), _ticks(raw, "system")
        return self._nanoseconds(user), self._nanoseconds(system)

    def _nanoseconds(self, ticks: Any) -> Any:
        if not isinstance(ticks, int):
            return ticks
        return None if self._hz is None else ticks * NANOSECOND // self._hz


def _ticks(raw: dict[str, Any], mode: str) -> Any:
    low, high = raw[f"{mode}_low"], raw[f"{mode}_high"]
    for part in (low, high):
        if isinstance(part, Unreadable):
            return part
    return None if low is None else low | (high or 0) << 32


def threads(
    target: Target, report: Report | None = None, pid: int | None = None
) -> Iterator[Thread]:
    """Every thread, by task in the order of tasks; with `pid` those of one process.

    Then the threads that only the kernel's list of all threads has. What stopped or disagreed goes
    into `report`. Raises `NotFoundError` when there is no process `pid`.
    """
    report = report if report is not None else Report()
    reader = ThreadReader(target)
    seen: set[int] = set()
    stops, found = len(report.stops), pid is None
    for task in reader.tasks.walk(report):
        if pid is not None and reader.owner(task).pid != pid:
            continue
        found = True
        name = f"threads of task {task:#x}"
        head = task + reader.task_head
        for address in walk_queue(target, head, reader.task_link, name, report):
            seen.add(address)
            yield reader.read(address)
    torn = len(report.stops) > stops
    for thread in _elsewhere(target, reader, seen, report):
        if pid is None or thread.pid == pid:
            found = True
            if not torn:
                who = thread.tid if isinstance(thread.tid, int) else "?"
                subject = f"thread {who} at {thread.address:#x}"
                text = f"{subject} is on threads, but on no task"
                report.differ(Difference(subject, thread.address, ("threads",), ("tasks",), text))
            yield thread
    if not found:
        raise no_process(pid or 0, report)


def _elsewhere(
    target: Target, reader: ThreadReader, seen: set[int], report: Report
) -> Iterator[Thread]:
    """What the list of all threads has that is not among the `seen`."""
    head, link = _all_threads(target)
    if head is not None and link is not None:
        for address in walk_queue(target, head, link, "threads", report):
            if address not in seen:
                yield reader.read(address)


def _all_threads(target: Target) -> tuple[int | None, int | None]:
    """The list of all threads, and its link in a thread: in 10.4 the default processor set's."""
    types = target.types
    symbol = target.symbols.get("_threads")
    if symbol is not None:
        return symbol.address, offset_of(types, "thread", "threads")
    pset = target.symbols.get("_default_pset")
    inside = offset_of(types, "processor_set", "threads")
    head = None if pset is None or inside is None else pset.address + inside
    return head, offset_of(types, "thread", "pset_threads")


_PLAIN = (
    *("tid", "state", "sched_pri", "base_pri", "wait_event", "continuation", "kernel_stack"),
    *("kstackptr", "suspend_count", "options"),
)


def _fields(target: Target) -> dict[str, tuple[int | None, str]]:
    types = target.types
    fields: dict[str, tuple[int | None, str]] = {
        name: (offset_of(types, "thread", *members), "P")
        for name, members in {
            "task": ("task",),
            "tro": ("t_tro",),
            "uthread": ("uthread",),
            "continuation": ("continuation",),
            "kernel_stack": ("kernel_stack",),
            "kstackptr": ("machine.kstackptr",),
            "recount": ("th_recount.rth_lifetime",),  # xnu-8792 (13.0) on
        }.items()
    }
    # event64_t: 64 bits on every machine
    wide = target.arch.pointer_size == 8
    fields["wait_event"] = (types.offset("thread", "wait_event"), "P" if wide else "Q")
    fields["tid"] = (offset_of(types, "thread", "thread_id"), "Q")
    fields["state"] = (types.offset("thread", "state"), "I")
    fields["active"] = (types.offset("thread", "active"), "B")
    # widths changed: ints became shorts, counts became bytes
    for name, *members in (
        ("sched_pri", "sched_pri"),
        ("base_pri", "base_pri", "priority"),
        ("suspend_count", "suspend_count"),
        ("options", "options"),
    ):
        member = next((m for m in members if types.has("thread", m)), members[0])
        code = unsigned(types, "thread", member)
        signed = name in ("sched_pri", "base_pri")
        fields[name] = (types.offset("thread", member), code.lower() if signed else code)
    for mode in ("user", "system"):
        low, high = _timer(target, f"{mode}_timer")
        fields[f"{mode}_low"] = (low, "I" if high is not None else "Q")
        fields[f"{mode}_high"] = (high, "I")
    return fields


def _timer(target: Target, member: str) -> tuple[int | None, int | None]:
    """Where a thread's timer keeps its value: all of it, or its halves. None from macOS 13 on."""
    types = target.types
    start = offset_of(types, "thread", member)
    if start is None:
        return None, None

    def inside(part: str) -> int | None:
        at = offset_of(types, "thread", f"{member}.{part}")
        if at is not None:
            return at
        known = types.find_struct("timer") is not None and types.has("timer", part)
        return start + types.offset("timer", part) if known else None

    whole = inside("all_bits")
    return (whole, None) if whole is not None else (inside("low_bits"), inside("high_bits"))
