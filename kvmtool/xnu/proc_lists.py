"""Every way to a process: what one list leaves out, another may still know.

allproc and zombproc are the kernel's own lists; the tasks, the pid hash, kernproc and the links
between relatives, neighbours and group members lead to the same processes. Where a list is torn,
they give back what lies behind the hole; where a process is on one and not on another, that is
shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc_state import SIDL, SRUN, SSLEEP, SSTOP, SZOMB
from kvmtool.xnu.queues import Difference, Report, walk_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.xnu.proc import ProcReader

_HASH_LIMIT = 1 << 20  # buckets; pidhash is maxproc rounded to a power of two
_ORDER_SHIFT = 48
_PID_LIMIT = 1 << 22  # PID_MAX is 99,999 (bsd/sys/proc_internal.h)


class Census:
    """All processes of a target, each once, with the lists it is on."""

    def __init__(self, reader: ProcReader, report: Report) -> None:
        """Walks every list; what stopped or disagreed goes into `report`."""
        self._reader, self._target, self._report = reader, reader.target, report
        self._lists: dict[int, list[str]] = {}
        self._zombies: set[int] = set()
        stops = len(report.stops)
        self._walk("allproc", self._heads("_allproc"))
        self._walk("zombproc", self._heads("_zombproc"))
        torn = len(report.stops) > stops
        self._zombies.update(a for a, lists in self._lists.items() if "zombproc" in lists)
        main = set(self._lists)
        elsewhere = (("tasks", self._by_task()), ("pidhash", self._by_hash()))
        # to their ends: what these lack is missing there
        self._walked = [name for name, found in elsewhere if self._add_whole(name, found)]
        if torn:
            self._add("kernproc", self._kernproc())
            self._add("links", self._linked())
        self._compare(main, torn)

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...], bool]]:
        """(address of the proc, lists it is on, whether it is a zombie)."""
        for address, lists in self._lists.items():
            yield address, tuple(lists), address in self._zombies

    def _heads(self, symbol: str) -> int | None:
        found = self._target.symbols.get(symbol)
        if found is None:
            self._report.stop(symbol[1:], 0, f"the kernel has no symbol {symbol}")
            return None
        return found.address

    def _walk(self, name: str, head: int | None) -> None:
        if head is not None:
            self._add(name, walk_list(self._target, head, self._reader.link, name, self._report))

    def _add(self, name: str, addresses: Iterator[int]) -> bool:
        """Note that `name` leads to these; whether it led to any."""
        any_found = False
        for address in addresses:
            any_found = True
            lists = self._lists.setdefault(address, [])
            if name not in lists:
                lists.append(name)
        return any_found

    def _add_whole(self, name: str, addresses: Iterator[int]) -> bool:
        """As `_add`; whether it led to any, and to all there are."""
        stops = len(self._report.stops)
        return self._add(name, addresses) and len(self._report.stops) == stops

    def _real(self, address: int) -> bool:
        """Whether a process seems to lie there: a pid that can be read and can be one."""
        pid = self._reader.pid(address)
        return not isinstance(pid, Unreadable) and 0 <= pid < _PID_LIMIT

    def _by_task(self) -> Iterator[int]:
        for task in self._reader.tasks.walk(self._report):
            proc = self._reader.tasks.proc_of(task)
            if isinstance(proc, Unreadable):
                self._report.stops.append(f"tasks: the process of task {task:#x} is {proc.reason}")
            elif proc is not None and self._real(proc):
                yield proc

    def _by_hash(self) -> Iterator[int]:
        """The chains of the pid hash, in the form this kernel has."""
        link = self._reader.hash_link
        if link is None:
            return
        try:
            if self._target.symbols.get("_pid_hash") is not None:
                yield from self._smr_hash(link)
            elif self._target.symbols.get("_pidhashtbl") is not None:
                yield from self._hash_table(link)
        except FaultError as fault:
            self._report.stop("pidhash", 0, f"{fault.address:#x} is {fault.reason}")

    def _hash_table(self, link: int) -> Iterator[int]:
        """pidhashtbl: an array of LIST heads, `pidhash` its mask (to xnu-8792, macOS 13.0)."""
        target = self._target
        mask = target.variable("_pidhash")
        first = target.variable("_pidhashtbl")
        if mask is not None and first is not None:
            yield from self._chains(first, mask + 1, link, 0)

    def _smr_hash(self, link: int) -> Iterator[int]:
        """struct smr_hash pid_hash, whose links point at links (osfmk/kern/smr_hash.h, xnu-8796).

        Bits 48 to 55 of smrh_array hold 64 minus the logarithm of its size.
        """
        target = self._target
        raw = int.from_bytes(target.memory.read(target.symbols.address("_pid_hash"), 8), "little")
        order = 64 - (raw >> _ORDER_SHIFT & 0xFF)
        array = target.strip(raw | 0xFF << _ORDER_SHIFT)
        yield from self._chains(array, 1 << max(order, 0), link, link)

    def _chains(self, first: int, buckets: int, link: int, into: int) -> Iterator[int]:
        """The processes of every hash chain; all chains that stop make one line.

        A link points `into` bytes into a process, `link` is where the process has its own.
        """
        if buckets & (buckets - 1) or buckets > _HASH_LIMIT:
            self._report.stop("pidhash", 0, f"{buckets:#x} buckets are no hash table's")
            return
        size = self._target.arch.pointer_size
        chains = Report()
        for head in range(first, first + buckets * size, size):
            for at in walk_list(self._target, head, link - into, "pidhash", chains):
                if self._real(at - into):
                    yield at - into
        if chains.stops:
            reason = chains.stops[0].split(": ", 2)[2]
            self._report.stops.append(
                f"pidhash: {len(chains.stops)} of {buckets} chains stopped, the first because "
                f"{reason}"
            )

    def _kernproc(self) -> Iterator[int]:
        try:
            proc = self._target.variable("_kernproc")
        except FaultError:
            return
        if proc and self._looks_like_proc(proc):
            yield proc

    def _linked(self) -> Iterator[int]:
        """Whatever the processes found so far point at, near and far, until nothing is new."""
        types, size = self._target.types, self._target.arch.pointer_size
        lists = [
            at
            for name in ("p_list", "p_sibling", "p_pglist", "p_hash")
            if (at := offset_of(types, "proc", name)) is not None
        ]
        pointers = [
            at
            for name in ("p_pptr", "p_children")
            if (at := offset_of(types, "proc", name)) is not None
        ]
        waiting, seen = list(self._lists), set(self._lists)
        while waiting:
            proc = waiting.pop()
            found = [self._pointer(proc + at) for at in (*lists, *pointers)]
            found += [self._pointer(proc + at + size, -at) for at in lists]
            for other in found:
                if other and other not in seen and self._looks_like_proc(other):
                    seen.add(other)
                    waiting.append(other)
                    yield other

    def _pointer(self, address: int, plus: int = 0) -> int:
        """The pointer at `address`, moved by `plus` bytes; 0 where it cannot be read."""
        try:
            pointer = self._target.pointer(address)
        except FaultError:
            return 0
        return pointer + plus if pointer else 0

    def _looks_like_proc(self, address: int) -> bool:
        """Whether what lies there can be a process: a link may also lead to a list's head."""
        proc = self._reader.read(address, ())
        return (
            self._real(address)
            and proc.stat in (SIDL, SRUN, SSLEEP, SSTOP, SZOMB)
            and isinstance(proc.comm, str)
            and proc.comm.isprintable()
            and proc.comm != ""
            and proc.ppid is not None
        )

    def _compare(self, main: set[int], torn: bool) -> None:
        """Say which processes the kernel's own lists leave out, and which only they have."""
        others = {address: lists for address, lists in self._lists.items() if address not in main}
        if torn and others:
            ways = sorted({name for lists in others.values() for name in lists})
            self._report.notes.append(
                f"{len(others)} processes behind where allproc stopped were found by way of "
                f"{', '.join(ways)}"
            )
            return
        for address, lists in others.items():
            who = self._who(address)
            text = f"{who} is on {' and '.join(lists)}, but not on allproc or zombproc"
            missing = ("allproc", "zombproc")
            self._report.differ(Difference(who, address, tuple(lists), missing, text))
        if not torn:
            self._say_missing(main)

    def _say_missing(self, main: set[int]) -> None:
        for address in main - self._zombies:
            lists = self._lists[address]
            missing = [name for name in self._walked if name not in lists]
            pid = self._reader.pid(address)
            if isinstance(pid, Unreadable):
                continue  # on the other lists it was not counted
            if pid == 0 and "pidhash" in missing:
                missing.remove("pidhash")  # proc 0 is never hashed (bsd/kern/bsd_init.c)
            if missing:
                who = self._who(address)
                text = f"{who} is on allproc, but not on {' or '.join(missing)}"
                self._report.differ(Difference(who, address, tuple(lists), tuple(missing), text))

    def _who(self, address: int) -> str:
        return f"process {self._reader.pid(address)} at {address:#x}"
