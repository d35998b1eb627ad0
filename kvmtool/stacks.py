"""The kernel stacks of a dump: of its threads, and of its CPUs by the registers the dump holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import MismatchError, NotFoundError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.backtrace import Unwinder
from kvmtool.xnu.panic import FUNCTIONS
from kvmtool.xnu.queues import Report
from kvmtool.xnu.saved_registers import registers_of
from kvmtool.xnu.space import no_process
from kvmtool.xnu.thread import ThreadReader, threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.handle import Kvm
    from kvmtool.xnu.backtrace import Backtrace
    from kvmtool.xnu.saved_registers import Registers
    from kvmtool.xnu.thread import Thread


class Stacks:
    """The stacks of one dump. `threads` are all that were found; none where no layout fits."""

    def __init__(self, kvm: Kvm, report: Report | None = None) -> None:
        """Finds the threads; what stopped, or why there are none, goes into `report`.

        Raises as `Kvm.nearest_target`.
        """
        self._kvm = kvm
        self._report = report = report if report is not None else Report()
        self.threads: list[Thread] = []
        self._reader: ThreadReader | None = None
        try:
            target = kvm.verified_target()
        except MismatchError:  # registers and frames need none
            report.notes.append("no structure layout fits this kernel: its threads are not known")
            target = kvm.nearest_target()
        else:
            self._reader = ThreadReader(target)
            self.threads = list(threads(target, report))
        self.unwinder = Unwinder(target, kvm.code_at)
        self._sets = self._register_sets()
        self._owner = {place: self._owner_of(place) for place in self._sets}
        self._of_thread = {
            thread.address: place for place, thread in self._owner.items() if thread is not None
        }

    def _register_sets(self) -> dict[int, Registers]:
        """The registers in the container, by their place in it; a CPU without any has none."""
        facts, dump = self._kvm.facts, self._kvm.dump
        sets = {}
        for place, thread in enumerate(facts.threads if facts is not None else ()):
            origin = f"registers {place} in {dump.source.name}" if dump is not None else ""
            found = registers_of(self.unwinder.target, thread.states, origin)
            if found is not None:
                sets[place] = found
        return sets

    def _owner_of(self, place: int) -> Thread | None:
        """Which thread ran with the registers at `place`: by its stack, else by the CPU's number.

        A core that XNU wrote itself has the registers of the CPU that panicked alone.
        """
        registers = self._sets[place]
        for thread in self.threads:
            if any(self.unwinder.holds(thread, at) for at in (registers.sp, registers.fp)):
                return thread
        running = [thread for thread in self.threads if thread.running]
        if len(self._sets) != len(running):
            return None
        return next((thread for thread in running if thread.cpu == place), None)

    def cpus(self) -> Iterator[Backtrace]:
        """What each CPU was doing: by its registers, else by what its thread had saved."""
        for place in self._sets:
            yield self._by_registers(place)
        if not self._sets:
            yield from (self.unwinder.of_thread(thread) for thread in self._running())

    def cpu(self, number: int) -> Backtrace:
        """What the CPU `number` was doing. Raises `NotFoundError`."""
        if number in self._sets:
            return self._by_registers(number)
        for thread in self._running():
            if thread.cpu == number:
                return self.of(thread)
        raise NotFoundError("CPU", str(number), hint=f"known are {self._numbers()}")

    def panicking(self, cpu: int | None = None, thread: int | None = None) -> Backtrace | None:
        """The stack that runs through panic(), else that of the `thread` or `cpu` a log names.

        Where nothing leads to one, a CPU's that is cut by missing memory: it may have run through
        panic(). None if there is none of these.
        """
        cut = None
        for stack in self.cpus():
            if any(frame.code.symbol in FUNCTIONS for frame in stack.frames):
                return stack
            cut = stack if cut is None and stack.unreadable else cut
        try:
            if thread is not None and self._reader is not None:
                return self.at(thread)
            return cut if cpu is None else self.cpu(cpu)
        except NotFoundError:
            return cut

    def _numbers(self) -> str:
        known = {*self._sets, *(thread.cpu for thread in self._running())}
        return ", ".join(map(str, sorted(n for n in known if n is not None))) or "none"

    def _running(self) -> list[Thread]:
        return sorted((t for t in self.threads if t.running), key=lambda t: t.cpu or 0)

    def _by_registers(self, place: int) -> Backtrace:
        thread = self._owner[place]
        number = place if thread is None or not thread.running else thread.cpu
        return self.unwinder.of_registers(self._sets[place], thread, number)

    def registers_of(self, thread: int) -> Registers | None:
        """The container's registers of the thread at `thread`, if it has them."""
        place = self._of_thread.get(thread)
        return None if place is None else self._sets[place]

    def place_of(self, thread: int) -> int | None:
        """Which of the container's register sets is that of the thread at `thread`, if one is."""
        return self._of_thread.get(thread)

    def unmatched(self, thread: Any) -> Unreadable | None:
        """Why it cannot be told which registers are the thread's; None if it has none."""
        if isinstance(thread, Unreadable):
            return thread
        known = next((one for one in self.threads if one.address == thread), None)
        if known is None:
            return Unreadable(self._report.stops[0]) if self._report.stops else None
        stack = known.kernel_stack
        return stack if isinstance(stack, Unreadable) else None

    def of(self, thread: Thread) -> Backtrace:
        """The stack of `thread`: by the registers of its CPU if it was running."""
        place = self._of_thread.get(thread.address)
        if place is not None:
            return self._by_registers(place)
        return self.unwinder.of_thread(thread)

    def of_process(self, pid: int) -> list[Backtrace]:
        """The stacks of a process's threads. Raises `NotFoundError`."""
        found = [thread for thread in self.threads if thread.pid == pid]
        if not found:
            raise (
                no_process(pid, self._report)
                if self._reader
                else NotFoundError("process", str(pid), hint=self._why())
            )
        return [self.of(thread) for thread in found]

    def at(self, address: int) -> Backtrace:
        """The stack of the thread at `address`, also of one on no list. Raises `NotFoundError`."""
        known = next((thread for thread in self.threads if thread.address == address), None)
        if known is None and self._reader is not None:
            known = self._reader.read(address)
        if known is None or isinstance(known.state, Unreadable):
            why = known.state.reason if known is not None else self._why()
            raise NotFoundError("thread", f"{address:#x}", hint=why)
        return self.of(known)

    def by_id(self, tid: int) -> Backtrace:
        """The stack of the thread with that id. Raises `NotFoundError`."""
        for thread in self.threads:
            if thread.tid == tid:
                return self.of(thread)
        raise NotFoundError("thread", str(tid), hint=self._why())

    def _why(self) -> str:
        return "" if self._reader is not None else "no structure layout fits this kernel"
