"""A process's own address space, through its task's map and pmap.

Source: osfmk/kern/task.h, vm/vm_map.h, i386/pmap.h (pm_cr3), arm/pmap.h (ttep), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtool.target import Target
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.queues import Report


def find_process(procs: Iterable[Proc], pid: int, report: Report | None = None) -> Proc:
    """The process with that pid; `report` is where `procs` says what it missed.

    Raises `NotFoundError`.
    """
    for proc in procs:
        if proc.pid == pid:
            return proc
    raise no_process(pid, report)


def no_process(pid: int, report: Report | None) -> NotFoundError:
    """That there is no such process, as far as the lists could be read."""
    torn = report is not None and report.stops
    hint = f"not every process could be read: {report.stops[0]}" if report and torn else ""
    return NotFoundError("process", str(pid), hint=hint)


def table_root(target: Target, proc: Proc) -> int:
    """Physical address of the top page table of a process, as its pmap has it (pm_cr3, ttep).

    Raises `UnsupportedError` for one without a task (a zombie), `FaultError`, `NotFoundError`.
    """
    if proc.task is None:
        raise UnsupportedError(f"process {proc.pid} has no address space: it is a zombie")
    if isinstance(proc.task, Unreadable):
        raise UnsupportedError(f"the task of process {proc.pid} cannot be read: {proc.task.reason}")
    types = target.types
    vm_map = target.pointer(proc.task + types.offset("task", "map"))
    pmap = target.pointer(vm_map + types.offset("_vm_map", "pmap"))
    at = offset_of(types, "pmap", "pm_cr3", "ttep")
    if at is None:
        raise NotFoundError("member", "pmap.pm_cr3")
    # pmap_paddr_t is 8 bytes on i386 too, from PAE on (osfmk/i386/pmap.h, xnu-792.13)
    return int.from_bytes(target.memory.read(pmap + at, 8), "little")


def user_stack(target: Target, proc: Proc) -> int | None:
    """An address the process surely has: just below its initial stack; None when unknown."""
    at = offset_of(target.types, "proc", "user_stack")
    if at is None:
        return None
    try:
        top = target.pointer(proc.address + at)
    except FaultError:
        return None
    return top - target.arch.pointer_size if top else None
