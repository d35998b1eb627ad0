"""Processes in kernel memory: what fork(2), setsid(2), exit(2) and the Mach side leave behind.

Every step asks the layout what the release has and plants exactly that, after XNU's
bsd/kern/kern_proc.c, kern_fork.c, kern_exit.c, bsd/sys/proc_internal.h and osfmk/kern/{task,
thread}.h.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING, Any

from tests.builders.heap import Record, queue, tail_queue
from tests.builders.lists import Lists
from tests.builders.macho import up
from tests.builders.specs import (
    KERNEL_TASK,
    MAXCOMLEN,
    MAXLOGNAME,
    P_CONTROLT,
    TF_64B,
    TF_HASPROC,
    TH_WAIT,
    ProcSpec,
    cut,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.builders.heap import Memory, Region, Types
    from tests.builders.image import KernelImage


class Processes:
    """Plants all processes at once; `truth` is then what a perfect reader would say of them."""

    def __init__(
        self,
        types: Types,
        memory: Memory,
        image: KernelImage,
        zones: dict[str, Region],
        specs: Sequence[ProcSpec],
        maxproc: int,
    ) -> None:
        self.types = types
        self.memory = memory
        self.image = image
        self.zones = zones
        self.maxproc = maxproc
        self._wide = memory.width == 8
        kernel = [] if any(spec.pid == 0 for spec in specs) else [KERNEL_TASK]
        self.specs = [spec.complete(self._wide) for spec in [*kernel, *specs]]
        self.specs.sort(key=lambda spec: spec.pid != 0)  # pid 0 is the first of all
        self.procs: dict[int, Record] = {}
        self.tasks: dict[int, Record] = {}
        self.read_only: dict[int, Record] = {}
        self._creds: dict[tuple[Any, ...], Record] = {}
        self._cred_of: dict[int, int] = {}
        self.pgrps: dict[int, Record] = {}
        self._sessions: dict[int, Record] = {}
        self._session_spec: dict[int, ProcSpec] = {}  # who decides about login and tty
        self._ttys: dict[tuple[int, int], Record] = {}
        self.threads: dict[int, list[int]] = {}
        self._thread_ids = itertools.count(1)
        # proc_struct_size of kern_fork.c: rounded to what a struct task needs (8)
        self.proc_struct_size = up(types.layout.size("proc"), 8)

    @property
    def task_follows_proc(self) -> bool:
        """macOS 13: task and proc are one allocation, and neither points to the other."""
        return not self.types.has("proc", "task")

    def plant(self) -> dict[str, Any]:
        """Everything; returns the truth."""
        for spec in self.specs:
            if spec.pid in self.procs:
                raise ValueError(f"pid {spec.pid} occurs twice")
            self._allocate(spec)
        for spec in self.specs:
            self._credentials(spec)
            self._group(spec)
        self._fill_sessions()
        for spec in self.specs:
            self._fill_proc(spec)
            if not spec.zombie:
                self._fill_task(spec)
        lists = Lists(self)
        lists.plant()
        return self._truth() | {"pidhash": sorted(spec.pid for spec in lists.hashed())}

    def _record(self, zone: str, tag: str, address: int | None = None) -> Record:
        return Record(self.types, self.zones[zone], tag, address)

    def _allocate(self, spec: ProcSpec) -> None:
        layout = self.types.layout
        if self.task_follows_proc:
            size = self.proc_struct_size + layout.size("task")
            address = self.zones["proc"].alloc(size)
            proc = self._record("proc", "proc", address)
            self.tasks[spec.pid] = self._record("proc", "task", address + self.proc_struct_size)
        elif spec.pid == 0:
            image = self.image
            address = image.variable("_proc0", layout.size("proc"), align=16)
            proc = Record(self.types, image.common, "proc", address)
            self.tasks[0] = self._record("task", "task")
        else:
            proc = self._record("proc", "proc")
            self.tasks[spec.pid] = self._record("task", "task")
        self.procs[spec.pid] = proc
        if self.types.has("proc", "p_proc_ro"):
            self.read_only[spec.pid] = self._record("proc_ro", "proc_ro")

    def _credentials(self, spec: ProcSpec) -> None:
        """struct ucred, shared by all who are alike, as kauth_cred_update has it."""
        if not spec.groups or spec.groups[0] != spec.gid:
            raise ValueError(f"pid {spec.pid}: the first group is the effective gid")
        key = (spec.uid, spec.ruid, spec.svuid, spec.rgid, spec.svgid, spec.groups)
        if key not in self._creds:
            cred = self._record("ucred", "ucred")
            self._creds[key] = cred
            posix = cred
            if self.types.has("ucred", "cr_posix"):  # xnu-1699 (10.7)
                posix = self._record("ucred", "posix_cred", cred.place("cr_posix"))
            for member, value in (
                ("cr_uid", spec.uid),
                ("cr_ruid", spec.ruid),
                ("cr_svuid", spec.svuid),
                ("cr_rgid", spec.rgid),
                ("cr_svgid", spec.svgid),
                ("cr_gmuid", spec.uid),
            ):
                posix.u32(member, value)
            posix.u16("cr_ngroups", len(spec.groups))
            for index, gid in enumerate(spec.groups):
                posix.u32("cr_groups", gid, at=4 * index)
        self._cred_of[spec.pid] = self._creds[key].address

    def _static(self, symbol: str, tag: str, pid: int) -> Record:
        """A pgrp or session; those of proc 0 are variables of the kernel while proc 0 is one."""
        if pid == 0 and not self.task_follows_proc:
            address = self.image.variable(symbol, self.types.layout.size(tag), align=16)
            return Record(self.types, self.image.common, tag, address)
        return self._record("kalloc", tag)

    def _group(self, spec: ProcSpec) -> None:
        if spec.sid not in self._sessions:
            self._sessions[spec.sid] = self._static("_session0", "session", spec.sid)
        if spec.pgid not in self.pgrps:
            pgrp = self.pgrps[spec.pgid] = self._static("_pgrp0", "pgrp", spec.pgid)
            pgrp.u32("pg_id", spec.pgid)
            pgrp.ptr("pg_session", self._sessions[spec.sid].address)
        if spec.tty is not None and spec.tty not in self._ttys:
            tty = self._ttys[spec.tty] = self._record("kalloc", "tty")
            tty.u32("t_dev", spec.tty[0] << 24 | spec.tty[1])

    def _fill_sessions(self) -> None:
        members = collections.Counter(spec.sid for spec in self.specs)
        for spec in self.specs:
            leads = spec.pid == spec.sid
            if leads or spec.sid not in self._session_spec:
                self._session_spec[spec.sid] = spec
        for sid, spec in self._session_spec.items():
            session = self._sessions[sid]
            session.u32("s_sid", sid)
            session.text("s_login", spec.login, MAXLOGNAME)
            session.u32("s_count", members[sid], maybe=True)
            session.u32("s_refcount", members[sid], maybe=True)
            if spec.pid == sid:
                session.ptr("s_leader", self.procs[sid].address)
            if spec.tty is not None:
                tty = self._ttys[spec.tty]
                session.ptr("s_ttyp", tty.address)
                session.u32("s_ttydev", spec.tty[0] << 24 | spec.tty[1], maybe=True)
                session.u32("s_ttypgrpid", spec.pgid, maybe=True)
                tty.ptr("t_session", session.address)
                tty.ptr("t_pgrp", self.pgrps[spec.pgid].address)

    def _parent(self, spec: ProcSpec) -> Record:
        if spec.ppid not in self.procs:
            raise ValueError(f"pid {spec.pid}: its parent {spec.ppid} is not given")
        return self.procs[spec.ppid]

    def _fill_proc(self, spec: ProcSpec) -> None:
        proc = self.procs[spec.pid]
        for member, value in (
            ("p_pid", spec.pid),
            ("p_flag", spec.flag),
            ("p_lflag", spec.lflag),
        ):
            proc.u32(member, value)
        for member, value in (
            ("p_ppid", spec.ppid),
            ("p_original_ppid", spec.ppid),
            ("p_pgrpid", spec.pgid),
            ("p_sessionid", spec.sid),
            ("p_uid", spec.uid),
            ("p_gid", spec.gid),
            ("p_ruid", spec.ruid),
            ("p_rgid", spec.rgid),
            ("p_svuid", spec.svuid),
            ("p_svgid", spec.svgid),
            ("p_idversion", spec.pid + 1),
        ):
            proc.u32(member, value, maybe=True)
        proc.u64("p_uniqueid", spec.pid + 1, maybe=True)
        proc.u64("p_puniqueid", spec.ppid + 1, maybe=True)
        proc.u8("p_stat", spec.stat)
        proc.u8("p_nice", spec.nice)
        proc.u16("p_xstat", spec.xstat)
        proc.text("p_comm", spec.comm, MAXCOMLEN + 1)
        proc.text("p_name", spec.name, 2 * MAXCOMLEN + 1)
        proc.ptr("p_pptr", self._parent(spec).address)
        proc.ptr("p_pgrp", self.pgrps[spec.pgid].address)
        proc.ptr("p_ucred", self._cred_of[spec.pid], maybe=True)
        if not spec.zombie:  # proc_exit: task = TASK_NULL
            proc.ptr("task", self.tasks[spec.pid].address, maybe=True)
        self._fill_start(spec, proc)
        if spec.pid in self.read_only:
            self._fill_ro(spec, proc)

    def _fill_start(self, spec: ProcSpec, proc: Record) -> None:
        if self.types.has("proc", "p_start"):
            proc.timeval("p_start", spec.start)
        elif not spec.zombie:  # 10.4: in pstats, which proc_exit frees
            stats = self._record("kalloc", "pstats")
            stats.timeval("p_start", spec.start)
            proc.ptr("p_stats", stats.address)

    def _fill_ro(self, spec: ProcSpec, proc: Record) -> None:
        """macOS 12.1: struct proc_ro, from the read-only zone."""
        read_only = self.read_only[spec.pid]
        proc.ptr("p_proc_ro", read_only.address)
        read_only.ptr("pr_proc", proc.address)
        if not spec.zombie:
            read_only.ptr("pr_task", self.tasks[spec.pid].address)
        read_only.u64("p_uniqueid", spec.pid + 1)
        read_only.u32("p_idversion", spec.pid + 1)
        read_only.u32("p_orig_ppid", spec.ppid, maybe=True)
        read_only.ptr("p_ucred", self._cred_of[spec.pid])

    def _fill_task(self, spec: ProcSpec) -> None:
        task = self.tasks[spec.pid]
        task.u32("active", 1)
        task.u32("thread_count", len(spec.threads))
        task.u32("suspend_count", spec.suspend_count)
        task.ptr("bsd_info", self.procs[spec.pid].address, maybe=True)
        if spec.pid in self.read_only:
            task.ptr("bsd_info_ro", self.read_only[spec.pid].address, maybe=True)
        flags = TF_HASPROC if self.task_follows_proc else 0
        task.u32("t_flags", flags | (TF_64B if self._wide else 0), maybe=True)
        self.threads[spec.pid] = [self._thread(spec, state) for state in spec.threads]
        link = self.types.offset("thread", "task_threads")
        queue(self.memory, task.place("threads"), self.threads[spec.pid], link)
        self._uthreads(spec)

    def _thread(self, spec: ProcSpec, state: int) -> int:
        types = self.types
        size = types.layout.size("thread")
        follows = not types.has("thread", "uthread")  # macOS 12.1: one allocation
        extra = types.layout.size("uthread") if follows else 0
        thread = self._record("thread", "thread", self.zones["thread"].alloc(size + extra))
        task = self.tasks[spec.pid].address
        thread.u32("state", state)
        thread.ptr("task", task, maybe=True)
        thread.ptr("t_task", task, maybe=True)
        thread.u64("thread_id", next(self._thread_ids), maybe=True)
        for member in ("sched_pri", "base_pri", "priority"):
            thread.u16(member, 31 if spec.pid else 81, maybe=True)
        if state & TH_WAIT:
            thread.word("wait_event", self.tasks[spec.pid].place("threads"))
        if types.has("thread", "t_tro"):
            self._thread_ro(spec, thread)
        uthread = self._record("thread", "uthread", thread.address + size if follows else None)
        thread.ptr("uthread", uthread.address, maybe=True)
        uthread.ptr("uu_proc", self.procs[spec.pid].address, maybe=True)
        uthread.ptr("uu_thread", thread.address, maybe=True)
        return thread.address

    def _thread_ro(self, spec: ProcSpec, thread: Record) -> None:
        """macOS 12.1: struct thread_ro."""
        read_only = self._record("proc_ro", "thread_ro")
        thread.ptr("t_tro", read_only.address)
        read_only.ptr("tro_owner", thread.address)
        read_only.ptr("tro_proc", self.procs[spec.pid].address)
        read_only.ptr("tro_proc_ro", self.read_only[spec.pid].address)
        read_only.ptr("tro_task", self.tasks[spec.pid].address)
        read_only.ptr("tro_cred", self._cred_of[spec.pid])

    def _uthreads(self, spec: ProcSpec) -> None:
        """p_uthlist, the BSD side of the threads."""
        places = []
        for address in self.threads[spec.pid]:
            if self.types.has("thread", "uthread"):
                at = address + self.types.offset("thread", "uthread")
                places.append(int.from_bytes(self.memory.read(at, self.memory.width), "little"))
            else:
                places.append(address + self.types.layout.size("thread"))
        head = self.procs[spec.pid].place("p_uthlist")
        tail_queue(self.memory, head, places, self.types.offset("uthread", "uu_list"))

    def _truth(self) -> dict[str, Any]:
        processes = [self._process(spec) for spec in self.specs]
        return {
            "processes": processes,
            "allproc": [spec.pid for spec in reversed(self.specs) if not spec.zombie],
            "zombproc": [spec.pid for spec in reversed(self.specs) if spec.zombie],
            "nprocs": len(self.specs),
            "maxproc": self.maxproc,
            "kernproc": self.procs[0].address,
            "kernel_task": self.tasks[0].address,
            "initproc": self.procs[1].address if 1 in self.procs else None,
        }

    def _process(self, spec: ProcSpec) -> dict[str, Any]:
        session = self._session_spec[spec.sid]
        fields = "pid ppid pgid sid uid ruid svuid gid rgid svgid stat flag nice xstat zombie"
        found: dict[str, Any] = {field: getattr(spec, field) for field in fields.split()}
        startless = spec.zombie and not self.types.has("proc", "p_start")
        return found | {
            "groups": list(spec.groups or ()),
            "tty": session.tty if spec.flag is not None and spec.flag & P_CONTROLT else None,
            "login": session.login,
            "start": None if startless else spec.start,
            "comm": cut(spec.comm, MAXCOMLEN),
            "name": cut(spec.name or "", 2 * MAXCOMLEN),
            "address": self.procs[spec.pid].address,
            "task": None if spec.zombie else self.tasks[spec.pid].address,
            "ucred": self._cred_of[spec.pid],
            "pgrp": self.pgrps[spec.pgid].address,
            "session": self._sessions[spec.sid].address,
            "proc_ro": self.read_only[spec.pid].address if spec.pid in self.read_only else None,
            "threads": list(zip(self.threads.get(spec.pid, ()), spec.threads, strict=True)),
        }
