"""Does this layout fit this kernel? Asked of the memory before a single record is believed.

`kernproc` must have pid 0 and the name kernel_task where the layout puts them, and the first links
of allproc must close: each process's back link points at the link that led to it.
Source: bsd/kern/bsd_init.c (proc 0), bsd/sys/queue.h, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import offset_of

if TYPE_CHECKING:
    from kvmtool.target import Target

_LINKS = 3
_KERNEL_TASK = "kernel_task"


class Verdict(NamedTuple):
    """`fits` is True, False, or None where the memory that would tell is missing; and why."""

    fits: bool | None
    why: str


def check(target: Target) -> Verdict:
    """Hold the target's layout against its memory."""
    try:
        proc = target.variable("_kernproc")
        if proc is None:
            return Verdict(None, "the kernel has no symbol _kernproc")
        types = target.types
        pid = target.integer(proc + types.offset("proc", "p_pid"))
        comm = target.text(proc + types.offset("proc", "p_comm"), 17)
    except NotFoundError as missing:
        return Verdict(False, str(missing))
    except FaultError as fault:
        return Verdict(None, f"kernproc cannot be read: {fault}")
    if pid != 0 or comm != _KERNEL_TASK:
        return Verdict(
            False,
            f"kernproc at {proc:#x} has pid {pid} and name {comm!r}, "
            f"expected 0 and {_KERNEL_TASK!r}",
        )
    return _links(target)


def _links(target: Target) -> Verdict:
    allproc = target.symbols.get("_allproc")
    link = offset_of(target.types, "proc", "p_list.le_next", "p_list")
    if allproc is None or link is None:
        return Verdict(True, "kernproc is kernel_task with pid 0")
    where, step = allproc.address, target.arch.pointer_size
    closed = 0
    try:
        while closed < _LINKS:
            proc = target.pointer(where)
            if not proc:
                break
            back = target.pointer(proc + link + step)
            if back != where:
                return Verdict(
                    False,
                    f"allproc: the back link of {proc:#x} is {back:#x}, expected {where:#x}",
                )
            where = proc + link
            closed += 1
    except FaultError as fault:
        return Verdict(True, f"kernproc is kernel_task with pid 0; allproc is cut: {fault}")
    return Verdict(True, f"kernproc is kernel_task with pid 0, {closed} links of allproc close")
