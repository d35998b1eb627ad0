"""Filling kinfo_proc from kernel memory, as sysctl KERN_PROC does.

Nothing asks for a version: what the kernel's proc has no member for was not there to be told.
Source: fill_externproc() and fill_eproc() in their 32- and 64-bit forms, bsd/kern/kern_sysctl.c,
xnu-792..11417.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.kinfo import (
    EPROC_CTTY,
    EPROC_SLEADER,
    WMESGLEN,
    Eproc,
    ExternProc,
    Itimerval,
    KinfoProc,
    Pcred,
    Timeval,
    Ucred,
)
from kvmtool.xnu.proc import MAXCOMLEN, NGROUPS
from kvmtool.xnu.proc_state import (
    P_CONTROLT,
    P_LEXIT,
    P_LPPWAIT,
    P_LTRACED,
    P_PPWAIT,
    P_TRACED,
    P_WEXIT,
)
from kvmtool.xnu.tty import NODEV

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.xnu.proc import Proc

NO_PID = 30001  # bsd/sys/proc_internal.h, xnu-792

# Members of proc that are copied as they are. From p_dupfd on they are gone since xnu-1228 (10.5);
# user_stack is still in proc, but the newest kernels do not tell it any more.
_COPIED = {
    **dict.fromkeys(("p_oppid", "p_debugger", "sigwait"), "i"),
    **dict.fromkeys(("p_sigignore", "p_sigcatch"), "I"),
    "user_stack": "Q",
    **dict.fromkeys(("p_dupfd", "p_cpticks", "p_traceflag"), "i"),
    **dict.fromkeys(("p_estcpu", "p_pctcpu", "p_swtime", "p_slptime"), "I"),
    **dict.fromkeys(("p_uticks", "p_sticks", "p_iticks"), "Q"),
    "p_usrpri": "B",
}
# Kernel addresses: given away until xnu-1699, kept back from xnu-2050 (10.8) on.
_POINTERS = ("exit_thread", "p_textvp", "p_ru", "p_wchan", "p_wmesg", "p_tracep")
_MOVED = ((P_LTRACED, P_TRACED), (P_LPPWAIT, P_PPWAIT), (P_LEXIT, P_WEXIT))


def _first_unreadable(*values: Any) -> Unreadable | None:
    return next((value for value in values if isinstance(value, Unreadable)), None)


class KinfoReader:
    """Makes kinfo_proc records of one kernel's processes."""

    def __init__(self, target: Target, pointers: bool = True) -> None:
        """With `pointers` every kernel address is told, as kernels before 10.8 tell them.

        Without, those of a kernel that slides are 0, as it would answer itself.
        """
        self._target = target
        self._pointers = pointers or target.symbols.get("_vm_kernel_slide") is None
        self._proc = Record(target, self._proc_fields())
        self._pgrp = self._record(
            "pgrp", {"session": ("P", "pg_session"), "jobc": ("i", "pg_jobc")}
        )
        self._session = self._record("session", _SESSION)
        self._tty = self._record("tty", _TTY)
        self._ucred = Record(target, self._ucred_fields())
        self._lctx = self._record("lctx", {"id": ("i", "lc_id")})
        self._gids = Struct(f"{target.arch.byteorder}{NGROUPS}I")
        self._group_id = self._record("pgrp", {"id": ("i", "pg_id")})
        # xnu-1228 (10.5) brought p_listflag and gave p_lflag's bits the meaning they have since
        self._moved = _MOVED if target.types.has("proc", "p_listflag") else ()

    # layouts

    def _record(self, struct: str, wanted: dict[str, tuple[str, str]]) -> Record:
        types = self._target.types
        return Record(
            self._target,
            {
                name: (offset_of(types, struct, member) if types.has(struct) else None, code)
                for name, (code, member) in wanted.items()
            },
        )

    def _proc_fields(self) -> dict[str, tuple[int | None, str]]:
        types = self._target.types
        wanted = {**_COPIED, **dict.fromkeys((*_POINTERS, "p_lctx"), "P"), "p_rtime": "T"}
        wanted["p_comm"] = f"{MAXCOMLEN}s"
        found: dict[str, tuple[int | None, str]] = {
            name: (offset_of(types, "proc", name), code) for name, code in wanted.items()
        }
        timer = offset_of(types, "proc", "p_realtimer")
        timeval = 2 * self._target.arch.pointer_size
        found["it_interval"] = (timer, "T")
        found["it_value"] = (None if timer is None else timer + timeval, "T")
        self._sigacts_at = offset_of(types, "proc", "p_sigacts")
        self._has_sigacts = self._sigacts_at is not None and self._is_struct("p_sigacts")
        found["p_sigacts"] = (None if self._has_sigacts else self._sigacts_at, "P")
        return found

    def _is_struct(self, name: str) -> bool:
        """Whether proc's member is wider than a pointer: from xnu-8019 on sigacts is in proc."""
        members = self._target.types.struct("proc").members.values()
        at = self._target.types.offset("proc", name)
        following = min(m.offset for m in members if m.offset > at and "." not in m.name)
        return following - at > self._target.arch.pointer_size

    def _ucred_fields(self) -> dict[str, tuple[int | None, str]]:
        types = self._target.types
        inner = offset_of(types, "ucred", "cr_posix")
        struct = "ucred" if inner is None else "posix_cred"
        found: dict[str, tuple[int | None, str]] = {
            "cr_ref": (types.offset("ucred", "cr_ref"), "i")
        }
        for name, code in _UCRED.items():
            found[name] = ((inner or 0) + types.offset(struct, name), code)
        return found

    # one process

    def read(self, proc: Proc) -> KinfoProc:
        """The record of a process. Never raises `FaultError`: see `Unreadable`."""
        raw = self._proc.read(proc.address)
        return KinfoProc(self._extern_proc(proc, raw), self._eproc(proc, raw))

    def _extern_proc(self, proc: Proc, raw: dict[str, Any]) -> ExternProc:
        told = {name: _zero(raw[name]) for name in _COPIED}
        if self._pointers:
            told |= {name: _zero(raw[name]) for name in _POINTERS}
            sigacts = proc.address + (self._sigacts_at or 0)
            told["p_sigacts"] = sigacts if self._has_sigacts else _zero(raw["p_sigacts"])
            told["p_pgrp"] = _zero(proc.pgrp)
        comm = raw["p_comm"]
        return ExternProc(
            p_starttime=_timeval(proc.start),
            p_flag=self._flag(proc),
            p_stat=proc.stat,
            p_pid=proc.pid,
            p_realtimer=Itimerval(_timeval(raw["it_interval"]), _timeval(raw["it_value"])),
            p_rtime=_timeval(raw["p_rtime"]),
            p_priority=proc.priority,
            p_nice=proc.nice,
            p_comm=comm + b"\0" if isinstance(comm, bytes) else comm,
            p_xstat=proc.xstat,
            p_acflag=proc.acflag,
            **told,
        )

    def _flag(self, proc: Proc) -> Any:
        """p_flag with the bits that moved to p_lflag where they were before."""
        unreadable = _first_unreadable(proc.flag, proc.lflag if self._moved else None)
        if unreadable is not None:
            return unreadable
        flag = proc.flag
        for moved, was in self._moved:
            flag |= was if proc.lflag & moved else 0
        return flag

    def _eproc(self, proc: Proc, raw: dict[str, Any]) -> Eproc:
        pgrp = self._at(self._pgrp, proc.pgrp)
        session = self._at(self._session, pgrp["session"])
        tdev, tpgid, tsess = self._terminal(proc, session)
        pcred, ucred = self._credentials(proc)
        return Eproc(
            e_paddr=proc.address if self._pointers else 0,
            e_sess=_zero(pgrp["session"]) if self._pointers else 0,
            e_pcred=pcred,
            e_ucred=ucred,
            e_ppid=proc.ppid,
            e_pgid=proc.pgid if proc.pgrp else 0,
            e_jobc=_zero(pgrp["jobc"]),
            e_tdev=tdev,
            e_tpgid=tpgid,
            e_tsess=tsess if self._pointers else 0,
            e_wmesg=self._wmesg(raw["p_wmesg"]),
            e_flag=_eproc_flag(proc.address, session),
            e_lcid=self._lcid(raw["p_lctx"]),
        )

    def _at(self, record: Record, address: Any) -> dict[str, Any]:
        """The record at `address`; every field of a null or unreadable pointer is the pointer."""
        if isinstance(address, Unreadable):
            return dict.fromkeys(record.names, address)
        return record.read(address) if address else dict.fromkeys(record.names)

    def _credentials(self, proc: Proc) -> tuple[Pcred, Ucred]:
        ucred = {name: _zero(value) for name, value in self._at(self._ucred, proc.ucred).items()}
        groups = ucred["cr_groups"]
        if isinstance(groups, bytes):
            groups = self._gids.unpack(groups)
        pcred = Pcred(
            p_ruid=ucred["cr_ruid"],
            p_svuid=ucred["cr_svuid"],
            p_rgid=ucred["cr_rgid"],
            p_svgid=ucred["cr_svgid"],
        )
        return pcred, Ucred(
            cr_ref=ucred["cr_ref"],
            cr_uid=ucred["cr_uid"],
            cr_ngroups=ucred["cr_ngroups"],
            cr_groups=groups or (0,) * NGROUPS,
        )

    def _terminal(self, proc: Proc, session: dict[str, Any]) -> tuple[Any, Any, Any]:
        """(e_tdev, e_tpgid, e_tsess)."""
        if isinstance(proc.flag, int) and not proc.flag & P_CONTROLT:
            return NODEV, 0, 0
        unreadable = _first_unreadable(proc.flag, session["ttyp"])
        if unreadable is not None:
            return unreadable, unreadable, unreadable
        tty = self._at(self._tty, session["ttyp"])
        if session["ttydev"] is not None:  # xnu-8019 (macOS 12) on: told with or without the tty
            return session["ttydev"], session["ttypgrpid"], _zero(tty["session"])
        if not session["ttyp"]:
            return NODEV, 0, 0
        tpgid = session["ttypgrpid"]
        if tpgid is None:  # xnu-792 asks the tty
            tpgid = self._at(self._group_id, tty["pgrp"])["id"]
            tpgid = NO_PID if tpgid is None else tpgid
        return tty["dev"], tpgid, _zero(tty["session"])

    def _wmesg(self, address: Any) -> Any:
        """The text a process waits with, from xnu-792 alone."""
        if not address or isinstance(address, Unreadable):
            return address or b""
        try:
            text = self._target.text(address, WMESGLEN)
        except FaultError as fault:
            return Unreadable.of(fault)
        return text.encode("utf-8", "surrogateescape")

    def _lcid(self, lctx: Any) -> Any:
        """The login context, from xnu-1228 to 1699; hardly any process ever had one."""
        if isinstance(lctx, int) and lctx and not self._target.types.has("lctx", "lc_id"):
            return Unreadable(f"there is no layout of struct lctx, at {lctx:#x}")
        return _zero(self._at(self._lctx, lctx)["id"])


_SESSION = {
    "leader": ("P", "s_leader"),
    "ttyvp": ("P", "s_ttyvp"),
    "ttyp": ("P", "s_ttyp"),
    "ttypgrpid": ("i", "s_ttypgrpid"),
    "ttydev": ("i", "s_ttydev"),
}
_TTY = {"dev": ("i", "t_dev"), "pgrp": ("P", "t_pgrp"), "session": ("P", "t_session")}
_UCRED = {
    "cr_uid": "I",
    "cr_ruid": "I",
    "cr_svuid": "I",
    "cr_ngroups": "h",
    "cr_groups": f"{NGROUPS * 4}s",
    "cr_rgid": "I",
    "cr_svgid": "I",
}


def _zero(value: Any) -> Any:
    """What is not in this kernel (None) is told as 0."""
    return 0 if value is None else value


def _timeval(value: Any) -> Any:
    return value if isinstance(value, Unreadable) else Timeval(*(value or (0, 0)))


def _eproc_flag(address: int, session: dict[str, Any]) -> Any:
    unreadable = _first_unreadable(session["ttyvp"], session["leader"])
    if unreadable is not None:
        return unreadable
    flag = EPROC_CTTY if session["ttyvp"] else 0
    return flag | (EPROC_SLEADER if session["leader"] == address else 0)
