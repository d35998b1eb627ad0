"""Tasks and threads: the Mach half of a process.

Source: osfmk/kern/task.h, thread.h, thread.c (thread_info_internal), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report, walk_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

# osfmk/kern/thread.h
TH_WAIT, TH_SUSP, TH_RUN, TH_UNINT, TH_TERMINATE = 0x1, 0x2, 0x4, 0x8, 0x10
# osfmk/kern/task.h, xnu-8792 on: the task was allocated behind a proc
TF_HASPROC = 0x00800000
_PROC_ALIGNMENT = 16  # alignof(struct task): bsd/kern/kern_fork.c, xnu-8792
_THREADS = 1 << 16  # per task
_ORDER = "RUSTH?"  # ps shows the liveliest thread's state (adv_cmds ps, tasks.c)


class TaskReader:
    """Tasks of one kernel. `computed` is the distance from a proc to its task, from macOS 13 on."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of task and thread."""
        self._target = target
        types = target.types
        self._link = offset_of(types, "task", "tasks", "pset_tasks")
        self._threads = types.offset("task", "threads")
        thread = {
            "next": (types.offset("thread", "task_threads"), "P"),
            "state": (types.offset("thread", "state"), "i"),
        }
        self._thread = Record(target, thread)
        self._task = Record(
            target,
            {
                "bsd_info": (offset_of(types, "task", "bsd_info"), "P"),
                "flags": (offset_of(types, "task", "t_flags"), "I"),
                "suspended": (offset_of(types, "task", "suspend_count"), "i"),
                "first": (self._threads, "P"),
            },
        )
        self.computed = self._proc_to_task()

    def _proc_to_task(self) -> int | None:
        types = self._target.types
        if types.has("task", "bsd_info"):
            return None
        symbol = self._target.symbols.get("_proc_struct_size")
        if symbol is not None:
            try:
                return self._target.pointer(symbol.address)
            except FaultError:
                pass  # the same number follows from the layout, as kern_fork.c computes it
        return -(-types.size("proc") // _PROC_ALIGNMENT) * _PROC_ALIGNMENT

    def walk(self, report: Report) -> Iterator[int]:
        """Addresses of all tasks: `_tasks`, or in 10.4 the default processor set's."""
        head = self._head()
        if head is not None and self._link is not None:
            yield from walk_queue(self._target, head, self._link, "tasks", report)

    def _head(self) -> int | None:
        target = self._target
        tasks = target.symbols.get("_tasks")
        if tasks is not None:
            return tasks.address
        pset = target.symbols.get("_default_pset")
        inside = offset_of(target.types, "processor_set", "tasks")
        return None if pset is None or inside is None else pset.address + inside

    def proc_of(self, task: int) -> Any:
        """Address of a task's proc; None if it has none, `Unreadable` where that cannot be told."""
        fields = self._task.read(task)
        if self.computed is None:
            return fields["bsd_info"] or None
        flags = fields["flags"]
        if isinstance(flags, Unreadable):
            return flags
        return task - self.computed if flags & TF_HASPROC else None

    def state(self, task: Any) -> tuple[Any, Any]:
        """(state letter of ps, number of threads) of the task at `task`."""
        if task is None or isinstance(task, Unreadable):
            return ("?", 0) if task is None else (task, task)
        fields = self._task.read(task)
        if isinstance(fields["first"], Unreadable):
            return fields["first"], fields["first"]
        letters, count, lost = self._thread_letters(task + self._threads, fields["first"])
        suspended = fields["suspended"]
        if isinstance(suspended, int) and suspended > 0:
            return "T", count
        missing = suspended if isinstance(suspended, Unreadable) else lost
        if missing is not None:
            return missing, count
        return next((letter for letter in _ORDER if letter in letters), "?"), count

    def _thread_letters(self, head: int, first: int) -> tuple[set[str], Any, Unreadable | None]:
        """(the letters of all threads, how many there are, what of the letters is missing)."""
        letters: set[str] = set()
        lost: Unreadable | None = None
        seen: set[int] = set()
        thread = first
        while thread not in (0, head):
            if thread in seen or len(seen) >= _THREADS:
                circle = Unreadable(f"threads run in a circle at {thread:#x}")
                return letters, circle, circle
            seen.add(thread)
            fields = self._thread.read(thread)
            if isinstance(fields["state"], int):
                letters.add(letter(fields["state"]))
            else:
                lost = fields["state"]
            if isinstance(fields["next"], Unreadable):
                return letters, fields["next"], fields["next"]
            thread = fields["next"]
        return letters, len(seen), lost


def letter(state: int) -> str:
    """thread_info_internal()'s run state as ps shows it."""
    if state & TH_TERMINATE:
        return "H"
    if state & TH_RUN:
        return "R"
    if state & TH_UNINT:
        return "U"
    if state & TH_SUSP:
        return "T"
    return "S" if state & TH_WAIT else "H"
