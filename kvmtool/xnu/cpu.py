"""Processors: what the scheduler and the machine layer keep of each CPU.

Source: osfmk/kern/processor.h (struct processor, processor_list, processor_array),
osfmk/i386/cpu_data.h (cpu_data_ptr), osfmk/arm/cpu_data_internal.h (CpuDataEntries),
xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import Record, offset_of, record
from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu import named
from kvmtool.xnu.queues import Report, walk_list
from kvmtool.xnu.thread import ThreadReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

_SLOT = "_percpu_slot_processor"  # from 11 on this itself is the boot processor's
_ROOTS = ("_processor_list", "_processor_array", "_master_processor", _SLOT)
LIMIT = 256  # processors: MAX_CPUS is 64 or less in every release
_VECTORS = 256  # of the interrupts that cpu_hwIntCnt counts
# osfmk/kern/processor.h, the same numbers since 10.4
STATES = {
    0: "off line",
    1: "shutdown",
    2: "start",
    3: "inactive",
    4: "idle",
    5: "dispatching",
    6: "running",
}
_PROCESSOR: dict[str, tuple[str, *tuple[str, ...]]] = {
    "cpu": ("i", "cpu_id", "cpu_num", "processor_data.slot_num"),
    "state": ("i", "state"),
    "active_thread": ("P", "active_thread"),
    "idle_thread": ("P", "idle_thread"),
    "next_thread": ("P", "next_thread"),
    "current_pri": ("i", "current_pri"),
    "processor_set": ("P", "processor_set"),
}
_CPU_DATA = {
    "running": ("I", "cpu_running"),
    "interrupt_level": ("i", "cpu_interrupt_level"),
    "preemption_level": ("i", "cpu_preemption_level"),
    "signals": ("I", "cpu_signals"),
    "pending_ast": ("I", "cpu_pending_ast"),
    "int_state": ("P", "cpu_int_state"),
    "int_stack_top": ("P", "cpu_int_stack_top"),
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """One processor. A field is None where this kernel has no such thing, or `Unreadable`.

    `address` is its struct processor, `cpu_data` its machine-dependent part; threads are kernel
    addresses, `tid`, `pid` and `command` those of the active one; `idle` is whether that is the
    idle thread. `interrupts` is how many it has taken, of all vectors.
    """

    address: int
    cpu: Any
    state: Any
    active_thread: Any
    idle_thread: Any
    next_thread: Any
    current_pri: Any
    processor_set: Any
    tid: Any
    pid: Any
    command: Any
    cpu_data: Any
    running: Any
    interrupt_level: Any
    preemption_level: Any
    signals: Any
    pending_ast: Any
    int_state: Any
    int_stack_top: Any
    interrupts: Any

    @property
    def idle(self) -> Any:
        """Whether it runs its idle thread."""
        active, idle = self.active_thread, self.idle_thread
        for thread in (active, idle):
            if not isinstance(thread, int):
                return thread
        return active == idle != 0


def processors(target: Target, report: Report) -> Iterator[int]:
    """Addresses of every struct processor: processor_list, then what processor_array has besides.

    Where the walk stopped, and what is on one of the two alone, goes into `report`. Raises
    `NotFoundError` for a kernel with neither symbol.
    """
    if named.address_of(target, *_ROOTS) is None:
        raise NotFoundError("symbol", _ROOTS[0], hint=target.symbols.hint)
    types = target.types
    link = offset_of(types, "processor", "processor_list")
    head = named.address_of(target, "_processor_list")
    seen: set[int] = set()
    stops = len(report.stops)
    if head is not None and link is not None:
        for address in walk_list(target, head, link, "processor_list", report, LIMIT):
            seen.add(address)
            yield address
    for address in _array(target, report):
        if address not in seen:
            seen.add(address)
            if head is not None and len(report.stops) == stops:
                report.notes.append(
                    f"processor {address:#x} is in processor_array, but not on processor_list"
                )
            yield address
    if not seen:
        master = named.pointer(target, "_master_processor") or named.address_of(target, _SLOT)
        if isinstance(master, int) and master:
            yield master


def _array(target: Target, report: Report) -> Iterator[int]:
    """What processor_array (10.12 on) holds, up to processor_count entries."""
    start = named.address_of(target, "_processor_array")
    count = named.number(target, "_processor_count")
    if start is None or not isinstance(count, int):
        return
    for place in range(min(count, LIMIT)):
        try:
            address = target.pointer(start + place * target.arch.pointer_size)
        except FaultError as fault:
            reason = f"its entry at {fault.address:#x} is {fault.reason}"
            report.stop("processor_array", place, reason)
            return
        if address:
            yield address


def cpus(target: Target, report: Report | None = None) -> Iterator[Cpu]:
    """Every processor with what it does, in the order of processor_list. Raises as `processors`."""
    report = report if report is not None else Report()
    reader = _Reader(target)
    for place, address in enumerate(processors(target, report)):
        yield reader.read(place, address)


class _Reader:
    def __init__(self, target: Target) -> None:
        self._target = target
        self._processor = record(target, "processor", _PROCESSOR)
        self._threads = ThreadReader(target)
        types = target.types
        known = types.has("cpu_data")
        self._data: Record | None = record(target, "cpu_data", _CPU_DATA) if known else None
        self._counts = offset_of(types, "cpu_data", "cpu_hwIntCnt") if known else None

    def read(self, place: int, address: int) -> Cpu:
        raw = self._processor.read(address)
        number = place if raw["cpu"] is None else raw["cpu"]
        state = raw["state"]
        if isinstance(state, int):
            state = STATES.get(state, str(state))
        data = self._cpu_data(number)
        return Cpu(
            address,
            **{**raw, "cpu": number, "state": state},
            **self._thread(raw["active_thread"]),
            cpu_data=data,
            **self._machine(data),
            interrupts=self._interrupts(data),
        )

    def _thread(self, address: Any) -> dict[str, Any]:
        if not isinstance(address, int) or not address:
            return dict.fromkeys(("tid", "pid", "command"), address or None)
        thread = self._threads.read(address)
        return {"tid": thread.tid, "pid": thread.pid, "command": thread.command}

    def _cpu_data(self, number: Any) -> Any:
        """Where cpu_data of that CPU lies: cpu_data_ptr[n], or CpuDataEntries[n].cpu_data_vaddr."""
        if not isinstance(number, int) or not 0 <= number < LIMIT:
            return number if isinstance(number, Unreadable) else None
        target, width = self._target, self._target.arch.pointer_size
        table = named.address_of(target, "_cpu_data_ptr")
        if table is not None:
            at = table + number * width
        else:
            table = named.address_of(target, "_CpuDataEntries")
            if table is None:
                return None
            at = table + (2 * number + 1) * width
        return guarded(lambda: target.pointer(at)) or None

    def _machine(self, data: Any) -> dict[str, Any]:
        if self._data is None or not isinstance(data, int):
            value = data if self._data is not None else None
            return dict.fromkeys(_CPU_DATA, value)
        return self._data.read(data)

    def _interrupts(self, data: Any) -> Any:
        if self._counts is None or not isinstance(data, int):
            return data if self._counts is not None else None
        layout = Struct(f"{self._target.arch.byteorder}{_VECTORS}I")
        at = data + self._counts
        read = self._target.memory.read
        return guarded(lambda: sum(layout.unpack(read(at, layout.size))))
