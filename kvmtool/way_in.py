"""The way into a kernel when all there is is physical memory: its page table, and its slide.

The surest and cheapest comes first: control registers in the dump; then the places where a kernel
can lie (on Intel it is slid by multiples of 2 MiB, physically as virtually); then a search for
tables that map the header found there; then a pass over all memory for kernel headers and low
globals pages, and one for the banner. Whatever is found is a candidate and no more, until the
kernel's own header and its banner are read through the page table. Copies of both lie in file
caches and logs: several hits are normal. A slide of 0 is as good as any.

What it took a pass over all memory to find is remembered by content, and verified when used again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool import way_base, way_memo, way_places, way_roots
from kvmtool.errors import (
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.formats import UNSAID
from kvmtool.macho import uuid_text
from kvmtool.paging import BUDGET, PagedMemory
from kvmtool.way_judge import Judge, KernelFile, Verdict
from kvmtool.way_memo import Remembered
from kvmtool.way_places import MACHINES, MASK, Machine, Place, Shifted
from kvmtool.way_roots import Root

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.formats import Facts
    from kvmtool.macho import MachO
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.way_scan import Progress

_LIMIT = 100  # places, and reasons, that are kept
_MOVES = 4  # places for which it is searched where memory begins: ten passes each
_SEARCHES = 8  # places for which memory is searched for tables: each costs a pass
_TOLD = 4  # reasons that an error tells


class Way(NamedTuple):
    """How to read a kernel in physical memory.

    `root` is the physical address of its top page table, `mode` its paging mode; `kernel_address`
    that of its Mach-O header, `slide` bytes from its link address (None when neither a kernel file
    nor a symbol table in memory tells). `how` says which way led there, `rejected` which did not.
    `base` is where memory really begins: what is read has to be moved there first, unless it is 0.
    """

    root: int
    mode: str
    kernel_address: int
    slide: int | None
    cputype: int
    uuid: bytes | None
    version: str | None
    how: str
    rejected: tuple[str, ...] = ()
    base: int = 0


def kernel_memory(physical: Memory, way: Way, budget: int = BUDGET) -> PagedMemory:
    """The kernel's address space. `budget` as in `PagedMemory`: 0 for a live machine."""
    return PagedMemory(physical, way_roots.walker(physical, way.mode, way.root), budget=budget)


def process_memory(
    physical: Memory,
    way: Way,
    root: int,
    known: int | None,
    space: str,
    budget: int | None = None,
) -> PagedMemory:
    """The address space under the table `root`, the same kind as the kernel's or another.

    An i386 kernel on a 64-bit processor runs processes on 4-level tables whatever its own are
    (osfmk/i386/pmap.c, xnu-1228), and an arm64 one some on pages of 4 KiB (osfmk/arm/pmap, xnu-7195
    on): the kind that translates `known`, an address of the process, is the right one.
    """
    size = BUDGET if budget is None else budget
    memories = [
        PagedMemory(physical, walker, space=space, budget=size)
        for walker in way_roots.of_process(physical, way.mode, root)
    ]
    for memory in memories:
        if known is not None and memory.walker.walk(known).physical is not None:
            return memory
    return memories[0]


def find_way(
    physical: Memory,
    kernel: MachO | None,
    facts: Facts,
    name: str,
    *,
    kernel_address: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    remember: bool = True,
    movable: bool = False,
) -> Way:
    """The way into the kernel, `kernel` its file if there is one, `name` the dump's for messages.

    `kernel_address` (of the header) is given by a user who knows the slide; with `force` another
    kernel than the file's is taken all the same. `progress` is called with bytes done and bytes in
    all. `remember` is for files: what a live machine holds moves. `movable` is memory from 0 on of
    which nobody knows where it really begins: that is found, too (`Way.base`).

    Raises `MismatchError` when there is a kernel, but not that of the file; `NotFoundError`.
    """
    known = KernelFile(kernel) if kernel is not None else None
    search = _Search(physical, known, facts, Judge(known, name, force), progress)
    search.kernel_address, search.movable = kernel_address, movable
    way = search.quick()
    if way is None:
        way = _remembered(search, known) if remember else search.thorough()
    if way is None:
        error = search.failure()
        error.tried = tuple(search.rejected)
        raise error
    return way._replace(rejected=tuple(search.rejected))


def _remembered(search: _Search, kernel: KernelFile | None) -> Way | None:
    key = way_memo.key(search.physical, kernel.uuid if kernel is not None else None)
    found = way_memo.load(key)
    way = search.again(found) if found is not None else None
    if way is None:
        way = search.thorough()
        if way is not None:
            root = Root(way.root, (way.mode,), way.how)
            way_memo.store(key, Remembered(root, way.cputype, way.kernel_address, way.base))
    return way


class _Search:
    """One search. The ways are generators of verified answers: the first is taken."""

    def __init__(
        self,
        physical: Memory,
        kernel: KernelFile | None,
        facts: Facts,
        judge: Judge,
        progress: Progress | None,
    ) -> None:
        self.physical, self.kernel, self.facts = physical, kernel, facts
        self.judge, self.progress = judge, progress
        self.kernel_address: int | None = None
        self.movable = False
        self.rejected: list[str] = []
        self._places: list[Place] = []
        self._searched = 0  # how many of them have been searched for tables
        self._tried: set[tuple[int, str, int, int]] = set()
        cputype = kernel.image.cputype if kernel is not None else facts.cputype
        self._machines = tuple(m for m in MACHINES if cputype in (UNSAID, m.cputype))
        if not self._machines:
            raise UnsupportedError(f"{judge.name}: no page tables of cputype {cputype:#x} known")

    def quick(self) -> Way | None:
        """Without passing over memory."""
        return next(self._registers(), None) or next(self._likely(), None)

    def thorough(self) -> Way | None:
        """By passing over memory, no more often than it takes."""
        for ways in (self._tables, self._scanned, self._banners, self._moved, self._tables):
            way = next(ways(), None)
            if way is not None:
                return way
        return None

    def again(self, known: Remembered) -> Way | None:
        """What an earlier search found, if it verifies here."""
        machine = next((m for m in self._machines if m.cputype == known.cputype), None)
        if machine is None or self.kernel_address not in (None, known.kernel_address):
            return None
        if known.base and not self.movable:
            return None
        try:
            return self._verify(known.root, machine, known.kernel_address, known.base)
        except UnsupportedError:  # a mode that this version does not know
            return None

    # the ways

    def _registers(self) -> Iterator[Way]:
        for number, registers in enumerate(self.facts.control):
            for root in way_roots.of_registers(registers):
                root = root._replace(how=f"{root.how} {root.address:#x} of CPU {number}")
                found = False
                for machine, mode, address in self._mapped(root):
                    found = True
                    way = self._verify(root._replace(modes=(mode,)), machine, address)
                    if way is not None:
                        yield self._own(way, machine)
                if not found:
                    self._reject(f"{root.how}: maps no kernel (a user's table?)")

    def _mapped(self, root: Root) -> Iterator[tuple[Machine, str, int]]:
        for mode in root.modes:
            space = self._space(root.address, mode)
            for machine in self._machines:
                for address in self._addresses(space, machine):
                    yield machine, mode, address

    def _likely(self) -> Iterator[Way]:
        for machine in self._machines:
            if machine.base is None:
                continue
            for address in self._addresses(Shifted(self.physical, machine.base), machine):
                at = address - machine.base
                yield from self._from_place(Place(machine, address, at, way_places.HEADER, at))

    def _scanned(self) -> Iterator[Way]:
        known = self.kernel
        low_globals_at, link = (known.low_globals_at, known.link) if known else (None, None)
        for place in way_places.scanned(
            self.physical, self._machines, low_globals_at, link, self.judge.name, self.progress
        ):
            if self.kernel_address in (None, place.address):
                yield from self._from_place(place)

    def _banners(self) -> Iterator[Way]:
        known = self.kernel
        if known is None or known.banner is None or known.version_at is None:
            return
        (machine,) = self._machines
        for at in self.physical.find(known.banner.encode("utf-8", "surrogateescape")):
            header = at - (known.version_at - known.link)
            if machine.base is not None:
                address = (header + machine.base) & MASK
            elif self.kernel_address is not None:
                address = self.kernel_address
            else:
                continue  # the header, which would tell, is not there: it had been found
            if self.kernel_address in (None, address):
                yield from self._from_place(Place(machine, address, header, "banner", at))

    def _tables(self) -> Iterator[Way]:
        while self._searched < min(len(self._places), _SEARCHES):
            place = self._places[self._searched]
            self._searched += 1
            for root in way_roots.searched(self.physical, place, self.progress):
                root = root._replace(how=f"{place.how}, {root.how}")
                way = self._verify(root, place.machine, place.address)
                if way is not None:
                    yield way
            self._reject(f"{place.how}: no page table found that maps it to {place.address:#x}")

    def _moved(self) -> Iterator[Way]:
        """By tables that agree with each other if memory begins elsewhere."""
        places = [place for place in self._places if place.machine.base is None]
        for place in places[: _MOVES if self.movable else 0]:
            memory = place.static(self.physical)
            symbols = self.judge.symbols(memory, place.address)
            for base, root in way_base.searched(self.physical, place, self.progress):
                where = f"memory from {base:#x} on, {place.if_from(base)}"
                if symbols is not None:  # the kernel knows best which of its tables is in use
                    yield from self._named(place, memory, symbols, base, where)
                root = root._replace(how=f"{where}, {root.how}")
                way = self._verify(root, place.machine, place.address, base)
                if way is not None:
                    yield way
            self._reject(f"{place.how}: no page tables that tell where memory begins")

    def _from_place(self, place: Place) -> Iterator[Way]:
        memory = place.static(self.physical)
        why = self.judge.refuse(memory, place.address)
        if why is not None:
            if why:
                self._reject(f"{place.how}: {why}")
            return
        if len(self._places) < _LIMIT and place[:3] not in [known[:3] for known in self._places]:
            self._places.append(place)  # its header and its low globals page tell of the same one
        symbols = self.judge.symbols(memory, place.address)
        if symbols is None:
            self._reject(f"{place.how}: no symbols to find its page table by")
            return
        base, where = None, place.how
        if self.movable and place.machine.base is None:
            base = way_base.of_variables(memory, place, symbols)
        if base is not None:
            where = f"memory from {base:#x} on by gPhysBase, {place.if_from(base)}"
        yield from self._named(place, memory, symbols, base or 0, where)

    def _named(
        self, place: Place, memory: Shifted, symbols: SymbolTable, base: int, where: str
    ) -> Iterator[Way]:
        """By the tables that the kernel's symbols name, if memory begins at `base`."""
        to_physical = way_roots.static_address(place.machine, place.address - place.physical)
        count = 0
        for root in way_roots.of_symbols(memory, to_physical, place.machine, symbols):
            count += 1
            root = root._replace(how=f"{where}, {root.how}")
            way = self._verify(root, place.machine, place.address, base)
            if way is not None:
                yield way
        if not count:
            self._reject(f"{place.how}: nothing its symbols name can be a page table (a copy?)")

    def _own(self, way: Way, machine: Machine) -> Way:
        """The same by the kernel's own table: a CPU may have been using a process's."""
        space = self._space(way.root, way.mode)
        symbols = self.judge.symbols(space, way.kernel_address)
        if symbols is None:
            return way

        def to_physical(address: int) -> int:
            return space.translate(address)[0]

        for root in way_roots.of_symbols(space, to_physical, machine, symbols):
            if root.address == way.root:
                return way
            root = root._replace(how=f"{way.how}, then {root.how}")
            own = self._verify(root, machine, way.kernel_address)
            if own is not None:
                return own
        return way

    # parts of them

    def _addresses(self, memory: Memory, machine: Machine) -> Iterator[int]:
        if self.kernel_address is not None:
            yield self.kernel_address
            return
        yield from way_places.addresses(memory, machine, self.kernel.link if self.kernel else None)

    def _space(self, root: int, mode: str, base: int = 0) -> PagedMemory:
        physical = Shifted(self.physical, base) if base else self.physical
        return PagedMemory(physical, way_roots.walker(physical, mode, root))

    def _verify(self, root: Root, machine: Machine, address: int, base: int = 0) -> Way | None:
        verdict: Verdict | str = ""
        for mode in root.modes:
            candidate = (root.address, mode, address, base)
            if candidate in self._tried:
                continue
            self._tried.add(candidate)
            space = self._space(root.address, mode, base)
            verdict = self.judge.judge(space, address)
            if isinstance(verdict, Verdict):
                top = space.walker.root
                slide, uuid, version = verdict
                found = (slide, machine.cputype, uuid, version, root.how)
                return Way(top, mode, address, *found, base=base)
        if verdict:
            self._reject(f"{root.how}: {verdict}")
        return None

    def _reject(self, text: str) -> None:
        if len(self.rejected) < _LIMIT and text not in self.rejected:
            self.rejected.append(text)

    def failure(self) -> MismatchError | NotFoundError:
        """Why there is no way in."""
        seen, name = self.judge.seen, self.judge.name
        if self.kernel is None or seen is None:
            tried = "; ".join(self.rejected[:_TOLD]) or "no trace of one was found"
            hint = "" if self.kernel is not None else "; name the kernel's file with -N"
            if self.movable and any(place.machine.base is None for place in self._places):
                hint += "; --core-format raw@ADDRESS says where in physical memory the file begins"
            return NotFoundError("kernel", f"in {name}", hint=tried + hint)
        uuid, version = seen
        return MismatchError(
            f"{self.kernel} is not the kernel of {name} ({uuid_text(uuid)}, "
            f"{version or 'banner not read'}); --force goes on all the same, --slide names a slide"
        )
