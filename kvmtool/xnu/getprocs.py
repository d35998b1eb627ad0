"""The processes a KERN_PROC_* filter selects, as kinfo_proc records.

Source: sysctl_prochandle() and sysdoproc_filt_*() in bsd/kern/kern_sysctl.c, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import UnsupportedError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.kinfo_reader import KinfoReader
from kvmtool.xnu.proc import procs
from kvmtool.xnu.proc_state import P_CONTROLT, SIDL
from kvmtool.xnu.queues import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target
    from kvmtool.xnu.kinfo import KinfoProc
    from kvmtool.xnu.proc import Proc

# bsd/sys/sysctl.h
KERN_PROC_ALL, KERN_PROC_PID, KERN_PROC_PGRP, KERN_PROC_SESSION = range(4)
KERN_PROC_TTY, KERN_PROC_UID, KERN_PROC_RUID = range(4, 7)


def _same(value: Any, arg: int) -> bool:
    """Whether a number is the C int `arg`, be it signed or unsigned."""
    return isinstance(value, int) and not (value ^ arg) & 0xFFFFFFFF


def _on_tty(proc: Proc, record: KinfoProc) -> Any:
    flag, tdev = record.kp_proc.p_flag, record.kp_eproc.e_tdev
    return tdev if isinstance(flag, Unreadable) or flag & P_CONTROLT else None


# op: what of a process must be `arg`. XNU has no filter for SESSION: up to 10.6 it gives every
# process, later ENOTSUP; here it filters.
_FILTERS: dict[int, Callable[[Proc, KinfoProc], Any]] = {
    KERN_PROC_PID: lambda _, record: record.kp_proc.p_pid,
    KERN_PROC_PGRP: lambda _, record: record.kp_eproc.e_pgid,
    KERN_PROC_SESSION: lambda proc, _: proc.sid,
    KERN_PROC_TTY: _on_tty,
    KERN_PROC_UID: lambda _, record: record.kp_eproc.e_ucred.cr_uid,
    KERN_PROC_RUID: lambda _, record: record.kp_eproc.e_pcred.p_ruid,
}


def getprocs(
    target: Target, op: int, arg: int = 0, report: Report | None = None, pointers: bool = True
) -> list[KinfoProc]:
    """The processes that `op` (KERN_PROC_*) and `arg` select, live ones first, then zombies.

    As in XNU embryos (SIDL) are left out. `arg` is a C int: -2 and 4294967294 are one uid. Where
    walks stopped, and who could not be judged, goes into `report`. See `KinfoReader` for
    `pointers`. Raises `UnsupportedError` for an unknown `op`.
    """
    if op != KERN_PROC_ALL and op not in _FILTERS:
        raise UnsupportedError("invalid filter")
    report = report if report is not None else Report()
    reader = KinfoReader(target, pointers)
    chosen = []
    for proc in procs(target, report):
        if proc.stat == SIDL:
            continue
        record = reader.read(proc)
        value = arg if op == KERN_PROC_ALL else _FILTERS[op](proc, record)
        if isinstance(value, Unreadable):
            report.notes.append(f"process at {proc.address:#x} left out: {value.reason}")
        elif _same(value, arg):
            chosen.append(record)
    return chosen
