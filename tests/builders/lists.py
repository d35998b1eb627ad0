"""The lists processes are on: allproc, zombproc, children, group members, task and thread queues,
the pid hash; and the variables that point to single ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.builders.heap import MASK64, Record, bsd_list, queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.builders.procs import Processes
    from tests.builders.specs import ProcSpec


def smr_key_hash(key: int) -> int:
    """smrh_key_hash_u32 of osfmk/kern/smr_hash.h (xnu-8796 on), seed 0."""
    x = key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


class Lists:
    """Links processes that have been filled in, as the kernel of that release does."""

    def __init__(self, processes: Processes) -> None:
        self._all = processes
        self._types = processes.types
        self._memory = processes.memory
        self._image = processes.image

    def plant(self) -> None:
        """All of them."""
        self._proc_lists()
        self._families()
        self._task_queues()
        self._pid_hash()
        self._roots()

    def _newest_first(self, keep: Callable[[ProcSpec], bool]) -> list[int]:
        """Addresses of the processes for which `keep(spec)`, as LIST_INSERT_HEAD orders them."""
        procs = self._all.procs
        return [procs[spec.pid].address for spec in reversed(self._all.specs) if keep(spec)]

    def _proc_lists(self) -> None:
        memory, types, image = self._memory, self._types, self._image
        width = memory.width
        link = types.offset("proc", "p_list")
        allproc = image.variable("_allproc", width)
        bsd_list(memory, allproc, self._newest_first(lambda spec: not spec.zombie), link)
        zombproc = image.variable("_zombproc", width)
        bsd_list(memory, zombproc, self._newest_first(lambda spec: spec.zombie), link)

    def _families(self) -> None:
        """p_children of each parent, pg_members of each group."""
        types, memory = self._types, self._memory
        children: dict[int, list[int]] = {}
        members: dict[int, list[int]] = {}
        for spec in reversed(self._all.specs):
            address = self._all.procs[spec.pid].address
            members.setdefault(spec.pgid, []).append(address)
            if spec.pid:
                children.setdefault(spec.ppid, []).append(address)
        for pid, addresses in children.items():
            head = self._all.procs[pid].place("p_children")
            bsd_list(memory, head, addresses, types.offset("proc", "p_sibling"))
        for pgid, addresses in members.items():
            head = self._all.pgrps[pgid].place("pg_members")
            bsd_list(memory, head, addresses, types.offset("proc", "p_pglist"))

    def _task_queues(self) -> None:
        memory, types, image = self._memory, self._types, self._image
        specs = [spec for spec in self._all.specs if not spec.zombie]
        tasks = [self._all.tasks[spec.pid].address for spec in specs]
        threads = [address for spec in specs for address in self._all.threads[spec.pid]]
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

    def hashed(self) -> list[ProcSpec]:
        """Who is in the pid hash: never pid 0; zombies until they are reaped, from 10.5 on."""
        keeps_zombies = self._types.has("proc", "p_listflag")
        specs = [s for s in self._all.specs if s.pid and (keeps_zombies or not s.zombie)]
        return specs[::-1]

    def _pid_hash(self) -> None:
        """hashinit(maxproc / 4) buckets; newest first in each."""
        size = 1 << (self._all.maxproc // 4 - 1).bit_length()
        heads = self._all.zones["kalloc"].alloc(size * self._memory.width)
        if self._types.has("proc", "p_hash.next"):  # xnu-8796 (macOS 13.3)
            self._smr_hash(heads, size)
        else:
            self._hash_table(heads, size)

    def _buckets(self, heads: int, keys: Iterable[int], mask: int) -> dict[int, list[int]]:
        """Head's address → addresses of the processes it leads to; `keys` go with `hashed`."""
        buckets: dict[int, list[int]] = {}
        for key, spec in zip(keys, self.hashed(), strict=True):
            place = heads + (key & mask) * self._memory.width
            buckets.setdefault(place, []).append(self._all.procs[spec.pid].address)
        return buckets

    def _hash_table(self, heads: int, size: int) -> None:
        """LISTs; in macOS 12 and 13.0 chains of one hazard or SMR pointer each, and static."""
        memory, image = self._memory, self._image
        link = self._types.offset("proc", "p_hash")
        wrapped = ("p_hash.__hazard_ptr", "p_hash.__smr_ptr")
        single = any(self._types.has("proc", member) for member in wrapped)
        keys = (spec.pid for spec in self.hashed())
        for place, addresses in self._buckets(heads, keys, size - 1).items():
            if single:
                self._chain(place, addresses, link)
            else:
                bsd_list(memory, place, addresses, link)
        memory.put_pointer(image.variable("_pidhashtbl", memory.width, local=single), heads)
        memory.put_pointer(image.variable("_pidhash", memory.width, local=single), size - 1)

    def _smr_hash(self, heads: int, size: int) -> None:
        """struct smr_hash pid_hash; the pointers are to the links, not to the structures."""
        link = self._types.offset("proc", "p_hash")
        keys = (smr_key_hash(spec.pid) for spec in self.hashed())
        for place, addresses in self._buckets(heads, keys, size - 1).items():
            self._chain(place, [address + link for address in addresses], 0)
        # smr_hash_array_encode: the order replaces bits 48 to 55, which are ones in a kernel
        order = 64 - (size - 1).bit_length()
        table = self._image.variable("_pid_hash", 16, local=True)
        self._memory.put_pointer(table, heads & ~(0xFF << 48) & MASK64 | order << 48)
        self._memory.put_u32(table + 8, len(self.hashed()))

    def _chain(self, place: int, addresses: Iterable[int], link: int) -> None:
        for address in addresses:
            self._memory.put_pointer(place, address)
            place = address + link

    def _roots(self) -> None:
        memory, image = self._memory, self._image
        width = memory.width
        memory.put_pointer(image.variable("_kernproc", width), self._all.procs[0].address)
        memory.put_pointer(image.variable("_kernel_task", width), self._all.tasks[0].address)
        init = self._all.procs[1].address if 1 in self._all.procs else 0
        place = image.variable("_initproc", width)
        signed = ("", "initproc") in self._types.signed
        memory.put_pointer(place, self._types.sign(init, place) if signed else init)
        memory.put_u32(image.variable("_nprocs", 4), len(self._all.specs))
        memory.put_u32(image.variable("_maxproc", 4), self._all.maxproc)
        if self._all.task_follows_proc:
            size = image.variable("_proc_struct_size", width)
            memory.put_pointer(size, self._all.proc_struct_size)
