"""The physical memory of a built machine: the kernel's page table, and processes with their own.

The static part of an Intel kernel lies where it is linked, less the base of its address space
(osfmk/x86_64/idle_pt.c); all else lies anywhere. A process has what it was started with at the top
of its stack (bsd/kern/kern_exec.c, exec_copyout_strings).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders import physical
from tests.builders.macho import up
from tests.builders.pagetable import Rights, Tables

if TYPE_CHECKING:
    from tests.builders.ground import Ground
    from tests.builders.maps import Maps
    from tests.builders.xnu import Built

MODES = {"i386": "PAE", "x86_64": "4-level", "arm64": "arm64 16K T1SZ 17"}
BASES = {"i386": 0, "x86_64": 0xFFFFFF8000000000, "arm64": None}
STATIC = 16 << 20  # physical bytes for what lies where it is linked
USER = Rights(user=True)
STACKS = {4: 0xBFFFF000, 8: 0x7FFF5FC00000}
BOOT_PML4 = 0xFFFFFF8000100000  # unslid
_LARGE = 2 << 20


class Started(NamedTuple):
    """What a process was started with."""

    path: str
    argv: list[str]
    env: list[str]
    apple: list[str]


def started(pid: int, comm: str) -> Started:
    """Some of everything; one process has no environment, one more than a page of it."""
    env = [] if pid == 56 else ["PATH=/usr/bin:/bin", f"HOME=/Users/of {pid}", "LANG=Kölsch"]
    if pid == 71:
        env += [f"VARIABLE_{number}={'x' * number}" for number in range(120)]
    apple = ["stack_guard=0x1234", "malloc_entropy=0x1,0x2"]
    return Started(f"/usr/bin/{comm}", [comm, "--pid", str(pid), "", "ende"], env, apple)


class Ram:
    """Plants page tables and processes' memory; `image` is what a dump of the machine holds."""

    def __init__(self, ground: Ground, maps: Maps, size: int = 64 << 20) -> None:
        self._ground = ground
        self._maps = maps
        self._arch = ground.image.arch
        self._kernel = Tables(MODES[self._arch], size)
        self._memory = self._kernel.memory
        self._next = self._kernel.next
        self._frames = STATIC if BASES[self._arch] is not None else 0

    def plant(self) -> dict[str, Any]:
        """Processes' memory and all pointers to tables; the truth by pid."""
        self._roots()
        found = {}
        for spec in self._ground.processes.specs:
            if spec.zombie:
                continue
            if spec.pid == 0:
                self._table_of(0, self._kernel.root)
                continue
            found[spec.pid] = self._process(spec.pid, spec.comm)
        return {"started": found, "ram": self}

    def _roots(self) -> None:
        """The kernel's variables that lead to its page table."""
        ground, root = self._ground, self._kernel.root
        if self._arch == "arm64":
            ground.pointer_variable("_cpu_ttep", root)
        elif self._arch == "i386":
            ground.pointer_variable("_IdlePDPT", root)
        else:
            base = BASES["x86_64"]
            assert base is not None
            ground.pointer_variable("_IdlePML4", base + root)
            if ground.image.slide:
                self._boot_tables(base)

    def _boot_tables(self, base: int) -> None:
        """BootPML4: all of the low gigabytes, once from 0 and once in the kernel's own slot."""
        ground = self._ground
        address = BOOT_PML4 + ground.image.slide
        ground.image.symbol("_BootPML4", address, "common")
        pdpt, directory = self._take(), self._take()
        entries = {0: pdpt, 511: pdpt}
        table = bytearray(4096)
        for index, target in entries.items():
            struct.pack_into("<Q", table, 8 * index, target | 7)
        ground.memory.write(address, bytes(table))
        self._kernel.put(pdpt, directory | 7)
        for index in range(512):
            self._kernel.put(directory + 8 * index, index * _LARGE | 0x87)

    def _take(self) -> int:
        """A page for a table; gives its physical address."""
        self._next -= self._kernel.page
        self._kernel.next = self._next
        return self._next

    def _table_of(self, pid: int, root: int) -> None:
        """pm_cr3 or ttep of the process's pmap."""
        if pid in self._maps.pmaps:
            pmap = self._maps.pmaps[pid]
            pmap.u64("pm_cr3", root, maybe=True)
            pmap.u64("ttep", root, maybe=True)

    def _process(self, pid: int, comm: str) -> dict[str, Any]:
        ground, types = self._ground, self._ground.types
        width, page = ground.memory.width, self._kernel.page
        tables = Tables(MODES[self._arch], 0, self._memory, self._next)
        known = started(pid, comm)
        block = self._block(known)
        top = STACKS[width] - pid % 7 * 16
        start = (top - len(block) - 64) // page * page
        for address in range(start, up(top, page), page):
            frame = self._frame()
            tables.map(address, frame, USER)
            self._put(frame, address, top - len(block), block)
        self._next = self._kernel.next = tables.next
        proc = ground.processes.procs[pid]
        proc.ptr("user_stack", top)
        proc.u32("p_argslen" if types.has("proc", "p_argslen") else "p_swtime", len(block))
        proc.u32("p_argc", len(known.argv))
        self._table_of(pid, tables.root)
        return known._asdict() | {"block": top - len(block)}

    def _put(self, frame: int, address: int, start: int, block: bytes) -> None:
        """That part of `block` at `start` which the page at `address` has."""
        page = self._kernel.page
        low, high = max(start, address), min(start + len(block), address + page)
        if low < high:
            at = frame + low - address
            self._memory[at : at + high - low] = block[low - start : high - start]

    def _block(self, known: Started) -> bytes:
        width = self._ground.memory.width
        # from xnu-3248 (10.11) on the path has a name
        old = self._ground.types.has("thread", "priority")
        path = ("" if old else "executable_path=") + known.path
        head = path.encode() + b"\0"
        head = head.ljust(up(len(head), width), b"\0")
        strings = b"".join(text.encode() + b"\0" for text in (*known.argv, *known.env))
        return head + strings + bytes(5) + b"".join(t.encode() + b"\0" for t in known.apple)

    def _frame(self) -> int:
        frame = self._frames
        self._frames += self._kernel.page
        if self._frames > self._next:
            raise ValueError("physical memory is full")
        return frame

    def finish(self, built: Built) -> None:
        """Map the kernel, once everything in it has its place."""
        base = BASES[self._arch]
        self._kernel.next = self._next
        for address, content in built.runs(1):
            where = address - base if base is not None else STATIC
            if not 0 <= where < STATIC:
                where = self._frame()
            self._kernel.map(address, where)
            self._memory[where : where + len(content)] = content
        self._next = self._kernel.next

    def ranges(self) -> list[tuple[int, bytes]]:
        """(physical address, content) of what is in use."""
        bounds = [(0, self._frames), (self._next, len(self._memory))]
        return [(start, bytes(self._memory[start:end])) for start, end in bounds]

    def lime(self) -> bytes:
        """A LiME image."""
        return physical.lime(*self.ranges())
