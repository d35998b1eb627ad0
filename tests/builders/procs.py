"""Processes in kernel memory: what fork(2), setsid(2), exit(2) and the Mach side leave behind.

Every step asks the layout what the release has and plants exactly that; the facts and where they
come from stand in reference notes on XNU's bsd/kern/kern_proc.c, kern_fork.c, kern_exit.c,
bsd/sys/proc_internal.h and osfmk/kern/{task,thread}.h of each release.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING, Any

from tests.builders.heap import MASK64, Record, bsd_list, queue, tail_queue
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

def smr_key_hash(key: int) -> int:
    """smrh_key_hash_u32 of osfmk/kern/smr_hash.h (xnu-8796 on), seed 0."""
    x = key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


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
        self._types = types
        self._memory = memory
        self._image = image
        self._zones = zones
        self._maxproc = maxproc
        self._wide = memory.width == 8
        kernel = [] if any(spec.pid == 0 for spec in specs) else [KERNEL_TASK]
        self._specs = [spec.complete(self._wide) for spec in [*kernel, *specs]]
        self._specs.sort(key=lambda spec: spec.pid != 0)  # pid 0 is the first of all
        self._procs: dict[int, Record] = {}
        self._tasks: dict[int, Record] = {}
        self._ro: dict[int, Record] = {}
        self._creds: dict[tuple[Any, ...], Record] = {}
        self._cred_of: dict[int, int] = {}
        self._pgrps: dict[int, Record] = {}
        self._sessions: dict[int, Record] = {}
        self._session_spec: dict[int, ProcSpec] = {}  # who decides about login and tty
        self._ttys: dict[tuple[int, int], Record] = {}
        self._threads: dict[int, list[int]] = {}
        self._thread_ids = itertools.count(1)
        # proc_struct_size of kern_fork.c: rounded to what a struct task needs (8)
        self.proc_struct_size = up(types.layout.size("proc"), 8)

    @property
    def task_follows_proc(self) -> bool:
        """macOS 13: task and proc are one allocation, and neither points to the other."""
        return not self._types.has("proc", "task")

    def plant(self) -> dict[str, Any]:
        """Everything; returns the truth."""
        for spec in self._specs:
            if spec.pid in self._procs:
                raise ValueError(f"pid {spec.pid} occurs twice")
            self._allocate(spec)
        for spec in self._specs:
            self._credentials(spec)
            self._group(spec)
        self._fill_sessions()
        for spec in self._specs:
            self._fill_proc(spec)
            if not spec.zombie:
                self._fill_task(spec)
        self._lists()
        self._pid_hash()
        self._roots()
        return self._truth()

    # -- objects -------------------------------------------------------------------------------

    def _record(self, zone: str, tag: str, address: int | None = None) -> Record:
        return Record(self._types, self._zones[zone], tag, address)

    def _allocate(self, spec: ProcSpec) -> None:
        layout = self._types.layout
        if self.task_follows_proc:
            size = self.proc_struct_size + layout.size("task")
            address = self._zones["proc"].alloc(size)
            proc = self._record("proc", "proc", address)
            self._tasks[spec.pid] = self._record("proc", "task", address + self.proc_struct_size)
        elif spec.pid == 0:
            image = self._image
            address = image.variable("_proc0", layout.size("proc"), align=16)
            proc = Record(self._types, image.common, "proc", address)
            self._tasks[0] = self._record("task", "task")
        else:
            proc = self._record("proc", "proc")
            self._tasks[spec.pid] = self._record("task", "task")
        self._procs[spec.pid] = proc
        if self._types.has("proc", "p_proc_ro"):
            self._ro[spec.pid] = self._record("proc_ro", "proc_ro")

    def _credentials(self, spec: ProcSpec) -> None:
        """struct ucred, shared by all who are alike, as kauth_cred_update has it."""
        if not spec.groups or spec.groups[0] != spec.gid:
            raise ValueError(f"pid {spec.pid}: the first group is the effective gid")
        key = (spec.uid, spec.ruid, spec.svuid, spec.rgid, spec.svgid, spec.groups)
        if key not in self._creds:
            cred = self._record("ucred", "ucred")
            self._creds[key] = cred
            posix = cred
            if self._types.has("ucred", "cr_posix"):  # xnu-1699 (10.7)
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
            address = self._image.variable(symbol, self._types.layout.size(tag), align=16)
            return Record(self._types, self._image.common, tag, address)
        return self._record("kalloc", tag)

    def _group(self, spec: ProcSpec) -> None:
        if spec.sid not in self._sessions:
            self._sessions[spec.sid] = self._static("_session0", "session", spec.sid)
        if spec.pgid not in self._pgrps:
            pgrp = self._pgrps[spec.pgid] = self._static("_pgrp0", "pgrp", spec.pgid)
            pgrp.u32("pg_id", spec.pgid)
            pgrp.ptr("pg_session", self._sessions[spec.sid].address)
        if spec.tty is not None and spec.tty not in self._ttys:
            tty = self._ttys[spec.tty] = self._record("kalloc", "tty")
            tty.u32("t_dev", spec.tty[0] << 24 | spec.tty[1])

    def _fill_sessions(self) -> None:
        members = collections.Counter(spec.sid for spec in self._specs)
        for spec in self._specs:
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
                session.ptr("s_leader", self._procs[sid].address)
            if spec.tty is not None:
                tty = self._ttys[spec.tty]
                session.ptr("s_ttyp", tty.address)
                session.u32("s_ttydev", spec.tty[0] << 24 | spec.tty[1], maybe=True)
                session.u32("s_ttypgrpid", spec.pgid, maybe=True)
                tty.ptr("t_session", session.address)
                tty.ptr("t_pgrp", self._pgrps[spec.pgid].address)

    def _parent(self, spec: ProcSpec) -> Record:
        if spec.ppid not in self._procs:
            raise ValueError(f"pid {spec.pid}: its parent {spec.ppid} is not given")
        return self._procs[spec.ppid]

    def _fill_proc(self, spec: ProcSpec) -> None:
        proc = self._procs[spec.pid]
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
        proc.ptr("p_pgrp", self._pgrps[spec.pgid].address)
        proc.ptr("p_ucred", self._cred_of[spec.pid], maybe=True)
        if not spec.zombie:  # proc_exit: task = TASK_NULL
            proc.ptr("task", self._tasks[spec.pid].address, maybe=True)
        self._fill_start(spec, proc)
        if spec.pid in self._ro:
            self._fill_ro(spec, proc)

    def _fill_start(self, spec: ProcSpec, proc: Record) -> None:
        if self._types.has("proc", "p_start"):
            proc.timeval("p_start", spec.start)
        elif not spec.zombie:  # 10.4: in pstats, which proc_exit frees
            stats = self._record("kalloc", "pstats")
            stats.timeval("p_start", spec.start)
            proc.ptr("p_stats", stats.address)

    def _fill_ro(self, spec: ProcSpec, proc: Record) -> None:
        """macOS 12.1: struct proc_ro, from the read-only zone."""
        read_only = self._ro[spec.pid]
        proc.ptr("p_proc_ro", read_only.address)
        read_only.ptr("pr_proc", proc.address)
        if not spec.zombie:
            read_only.ptr("pr_task", self._tasks[spec.pid].address)
        read_only.u64("p_uniqueid", spec.pid + 1)
        read_only.u32("p_idversion", spec.pid + 1)
        read_only.u32("p_orig_ppid", spec.ppid, maybe=True)
        read_only.ptr("p_ucred", self._cred_of[spec.pid])

    def _fill_task(self, spec: ProcSpec) -> None:
        task = self._tasks[spec.pid]
        task.u32("active", 1)
        task.u32("thread_count", len(spec.threads))
        task.u32("suspend_count", spec.suspend_count)
        task.ptr("bsd_info", self._procs[spec.pid].address, maybe=True)
        if spec.pid in self._ro:
            task.ptr("bsd_info_ro", self._ro[spec.pid].address, maybe=True)
        flags = TF_HASPROC if self.task_follows_proc else 0
        task.u32("t_flags", flags | (TF_64B if self._wide else 0), maybe=True)
        self._threads[spec.pid] = [self._thread(spec, state) for state in spec.threads]
        link = self._types.offset("thread", "task_threads")
        queue(self._memory, task.place("threads"), self._threads[spec.pid], link)
        self._uthreads(spec)

    def _thread(self, spec: ProcSpec, state: int) -> int:
        types = self._types
        size = types.layout.size("thread")
        follows = not types.has("thread", "uthread")  # macOS 12.1: one allocation
        extra = types.layout.size("uthread") if follows else 0
        thread = self._record("thread", "thread", self._zones["thread"].alloc(size + extra))
        task = self._tasks[spec.pid].address
        thread.u32("state", state)
        thread.ptr("task", task, maybe=True)
        thread.ptr("t_task", task, maybe=True)
        thread.u64("thread_id", next(self._thread_ids), maybe=True)
        for member in ("sched_pri", "base_pri", "priority"):
            thread.u16(member, 31 if spec.pid else 81, maybe=True)
        if state & TH_WAIT:
            thread.word("wait_event", self._tasks[spec.pid].place("threads"))
        if types.has("thread", "t_tro"):
            self._thread_ro(spec, thread)
        uthread = self._record("thread", "uthread", thread.address + size if follows else None)
        thread.ptr("uthread", uthread.address, maybe=True)
        uthread.ptr("uu_proc", self._procs[spec.pid].address, maybe=True)
        uthread.ptr("uu_thread", thread.address, maybe=True)
        return thread.address

    def _thread_ro(self, spec: ProcSpec, thread: Record) -> None:
        """macOS 12.1: struct thread_ro."""
        read_only = self._record("proc_ro", "thread_ro")
        thread.ptr("t_tro", read_only.address)
        read_only.ptr("tro_owner", thread.address)
        read_only.ptr("tro_proc", self._procs[spec.pid].address)
        read_only.ptr("tro_proc_ro", self._ro[spec.pid].address)
        read_only.ptr("tro_task", self._tasks[spec.pid].address)
        read_only.ptr("tro_cred", self._cred_of[spec.pid])

    def _uthreads(self, spec: ProcSpec) -> None:
        """p_uthlist, the BSD side of the threads."""
        places = []
        for address in self._threads[spec.pid]:
            if self._types.has("thread", "uthread"):
                at = address + self._types.offset("thread", "uthread")
                places.append(int.from_bytes(self._memory.read(at, self._memory.width), "little"))
            else:
                places.append(address + self._types.layout.size("thread"))
        head = self._procs[spec.pid].place("p_uthlist")
        tail_queue(self._memory, head, places, self._types.offset("uthread", "uu_list"))

    # -- lists ---------------------------------------------------------------------------------

    def _newest_first(self, keep: Any) -> list[int]:
        """Addresses of the processes for which `keep(spec)`, as LIST_INSERT_HEAD orders them."""
        return [self._procs[spec.pid].address for spec in reversed(self._specs) if keep(spec)]

    def _lists(self) -> None:
        memory, types, image = self._memory, self._types, self._image
        width = memory.width
        link = types.offset("proc", "p_list")
        allproc = image.variable("_allproc", width)
        bsd_list(memory, allproc, self._newest_first(lambda spec: not spec.zombie), link)
        zombproc = image.variable("_zombproc", width)
        bsd_list(memory, zombproc, self._newest_first(lambda spec: spec.zombie), link)
        children: dict[int, list[int]] = {}
        members: dict[int, list[int]] = {}
        for spec in reversed(self._specs):
            address = self._procs[spec.pid].address
            members.setdefault(spec.pgid, []).append(address)
            if spec.pid:
                children.setdefault(spec.ppid, []).append(address)
        for pid, addresses in children.items():
            head = self._procs[pid].place("p_children")
            bsd_list(memory, head, addresses, types.offset("proc", "p_sibling"))
        for pgid, addresses in members.items():
            head = self._pgrps[pgid].place("pg_members")
            bsd_list(memory, head, addresses, types.offset("proc", "p_pglist"))
        self._task_queues()

    def _task_queues(self) -> None:
        memory, types, image = self._memory, self._types, self._image
        tasks = [self._tasks[spec.pid].address for spec in self._specs if not spec.zombie]
        threads = [address for spec in self._specs for address in self._threads.get(spec.pid, ())]
        if types.has("task", "pset_tasks"):  # 10.4: the queues belong to the processor set
            address = image.variable("_default_pset", types.layout.size("processor_set"))
            pset = Record(types, image.common, "processor_set", address)
            queue(memory, pset.place("tasks"), tasks, types.offset("task", "pset_tasks"))
            queue(memory, pset.place("threads"), threads, types.offset("thread", "pset_threads"))
            pset.u32("task_count", len(tasks))
            pset.u32("thread_count", len(threads))
            return
        head = image.variable("_tasks", 2 * memory.width)
        queue(memory, head, tasks, types.offset("task", "tasks"))
        head = image.variable("_threads", 2 * memory.width)
        queue(memory, head, threads, types.offset("thread", "threads"))
        memory.put_u32(image.variable("_tasks_count", 4), len(tasks))
        memory.put_u32(image.variable("_threads_count", 4), len(threads))

    def _hashed(self) -> list[ProcSpec]:
        """Who is in the pid hash: never pid 0; zombies until they are reaped, from 10.5 on."""
        keeps_zombies = self._types.has("proc", "p_listflag")
        specs = [s for s in self._specs if s.pid and (keeps_zombies or not s.zombie)]
        return specs[::-1]

    def _pid_hash(self) -> None:
        memory, types, image = self._memory, self._types, self._image
        size = 1 << (self._maxproc // 4 - 1).bit_length()
        heads = self._zones["kalloc"].alloc(size * memory.width)
        link = types.offset("proc", "p_hash")
        buckets: dict[int, list[int]] = {}
        scattered = types.has("proc", "p_hash.next")  # xnu-8796 (macOS 13.3): smr_hash
        for spec in self._hashed():
            key = smr_key_hash(spec.pid) if scattered else spec.pid
            buckets.setdefault(key & size - 1, []).append(self._procs[spec.pid].address)
        if scattered:
            for bucket, addresses in buckets.items():
                self._smr_list(heads + bucket * memory.width, addresses, link)
            # smr_hash_array_encode: the order replaces bits 48 to 55, which are ones in a kernel
            order = 64 - (size - 1).bit_length()
            table = image.variable("_pid_hash", 16, local=True)
            memory.put_pointer(table, heads & ~(0xFF << 48) & MASK64 | order << 48)
            memory.put_u32(table + 8, sum(map(len, buckets.values())))
            return
        local = self._single_links()  # and static, both from xnu-8019 on
        for bucket, addresses in buckets.items():
            place = heads + bucket * memory.width
            if local:
                self._chain(place, addresses, link)
            else:
                bsd_list(memory, place, addresses, link)
        memory.put_pointer(image.variable("_pidhashtbl", memory.width, local=local), heads)
        memory.put_pointer(image.variable("_pidhash", memory.width, local=local), size - 1)

    def _single_links(self) -> bool:
        """macOS 12 and 13.0: p_hash is one hazard or SMR pointer to the next proc."""
        wrapped = ("p_hash.__hazard_ptr", "p_hash.__smr_ptr")
        return any(self._types.has("proc", member) for member in wrapped)

    def _chain(self, place: int, addresses: Sequence[int], link: int) -> None:
        for address in addresses:
            self._memory.put_pointer(place, address)
            place = address + link

    def _smr_list(self, place: int, addresses: Sequence[int], link: int) -> None:
        """struct smrq_slist: the pointers are to the links, not to the structures."""
        for address in addresses:
            self._memory.put_pointer(place, address + link)
            place = address + link

    def _roots(self) -> None:
        memory, image = self._memory, self._image
        width = memory.width
        memory.put_pointer(image.variable("_kernproc", width), self._procs[0].address)
        memory.put_pointer(image.variable("_kernel_task", width), self._tasks[0].address)
        init = self._procs[1].address if 1 in self._procs else 0
        place = image.variable("_initproc", width)
        signed = ("", "initproc") in self._types.signed
        memory.put_pointer(place, self._types.sign(init, place) if signed else init)
        memory.put_u32(image.variable("_nprocs", 4), len(self._specs))
        memory.put_u32(image.variable("_maxproc", 4), self._maxproc)
        if self.task_follows_proc:
            memory.put_pointer(image.variable("_proc_struct_size", width), self.proc_struct_size)

    # -- truth ---------------------------------------------------------------------------------

    def _truth(self) -> dict[str, Any]:
        processes = [self._process(spec) for spec in self._specs]
        return {
            "processes": processes,
            "allproc": [spec.pid for spec in reversed(self._specs) if not spec.zombie],
            "zombproc": [spec.pid for spec in reversed(self._specs) if spec.zombie],
            "pidhash": sorted(spec.pid for spec in self._hashed()),
            "nprocs": len(self._specs),
            "maxproc": self._maxproc,
            "kernproc": self._procs[0].address,
            "kernel_task": self._tasks[0].address,
            "initproc": self._procs[1].address if 1 in self._procs else None,
        }

    def _process(self, spec: ProcSpec) -> dict[str, Any]:
        session = self._session_spec[spec.sid]
        fields = "pid ppid pgid sid uid ruid svuid gid rgid svgid stat flag nice xstat zombie"
        found: dict[str, Any] = {field: getattr(spec, field) for field in fields.split()}
        startless = spec.zombie and not self._types.has("proc", "p_start")
        return found | {
            "groups": list(spec.groups or ()),
            "tty": session.tty if spec.flag is not None and spec.flag & P_CONTROLT else None,
            "login": session.login,
            "start": None if startless else spec.start,
            "comm": cut(spec.comm, MAXCOMLEN),
            "name": cut(spec.name or "", 2 * MAXCOMLEN),
            "address": self._procs[spec.pid].address,
            "task": None if spec.zombie else self._tasks[spec.pid].address,
            "ucred": self._cred_of[spec.pid],
            "threads": list(zip(self._threads.get(spec.pid, ()), spec.threads, strict=True)),
        }
