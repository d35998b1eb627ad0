"""Threads as they stand: processors, kernel stacks, continuations, names and registers.

After osfmk/kern/{thread,processor}.h, osfmk/mach/i386/thread_status.h (x86_kernel_state),
osfmk/arm64/cswitch.s (arm_kernel_saved_state) and bsd/sys/user.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.builders.heap import Record
from tests.builders.specs import TH_RUN

if TYPE_CHECKING:
    from tests.builders.ground import Ground

SIZE = 0x4000
CALLERS = ("_thread_block_reason", "_msleep", "_sleepy_driver", "_unix_syscall")
CONTINUATION = "_goes_on_here"
RETURN = 5  # bytes into a caller: where its call returns to
CLOCK = 24_000_000  # ticks a second, on arm64


class Stacks:
    """A thread that runs is on a CPU; the first other of a process has a stack, the rest none."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._types = ground.types
        self._region = ground.region("stacks", 1)
        self._callers = [ground.image.function(name) for name in CALLERS]
        self._continuation = ground.image.function(CONTINUATION)

    def plant(self) -> dict[str, Any]:
        """The truth by the thread's address, and the registers of each CPU."""
        ground = self._ground
        ground.pointer_variable("_kernel_stack_size", SIZE)
        if ground.image.arch == "arm64":
            at = ground.image.variable("_gPEClockFrequencyInfo", 0x60)
            ground.memory.write(at + 9 * 8, CLOCK.to_bytes(8, "little"))
        found: dict[int, dict[str, Any]] = {}
        running, number = [], 0
        for spec in ground.processes.specs:
            with_stack = False
            for place, thread in enumerate(ground.processes.threads.get(spec.pid, ())):
                number += 1
                runs = bool(spec.threads[place] & TH_RUN)
                names = self._names(thread, f"{spec.comm} {place}", f"wait{number}")
                truth = found[thread] = {
                    "address": thread,
                    "pid": spec.pid,
                    "tid": number,
                    "cpu": None,
                    **names,
                }
                if runs:
                    truth["cpu"] = len(running)
                    running.append(thread)
                if runs or not with_stack:
                    truth |= self._stack(thread)
                    with_stack = with_stack or not runs
                else:
                    self._record(thread).ptr("continuation", self._continuation)
                    truth |= {"continuation": self._continuation, "stack": 0, "calls": []}
        return {
            "threads": found,
            "registers": [found[thread]["registers"] for thread in running],
            "processors": self._processors(running, min(found)),
        }

    def _record(self, thread: int) -> Record:
        return Record(self._types, self._ground.zones["thread"], "thread", thread)

    def _names(self, thread: int, name: str, wmesg: str) -> dict[str, Any]:
        types, ground = self._types, self._ground
        follows = not types.has("thread", "uthread")
        place = thread + (types.layout.size("thread") if follows else 0)
        if not follows:
            at = thread + types.offset("thread", "uthread")
            place = int.from_bytes(ground.memory.read(at, ground.memory.width), "little")
        uthread = Record(types, ground.zones["thread"], "uthread", place)
        uthread.ptr("pth_name", ground.text(name), maybe=True)
        uthread.ptr("uu_wmesg", ground.text(wmesg), maybe=True)
        return {
            "name": name if types.has("uthread", "pth_name") else None,
            "wmesg": wmesg if types.has("uthread", "uu_wmesg") else None,
        }

    def _stack(self, thread: int) -> dict[str, Any]:
        """Four frames, innermost first, and what a context switch saves above them."""
        width = self._ground.memory.width
        stack = self._region.alloc(SIZE, SIZE)
        frames = [stack + SIZE - 0x400 + 0x80 * number for number in range(len(CALLERS))]
        for number, frame in enumerate(frames[:-1]):
            self._ground.words(frame, frames[number + 1], self._callers[number + 1] + RETURN)
        self._ground.words(frames[-1], 0, 0)
        sp, pc = frames[0] - 2 * width, self._callers[0] + RETURN
        record = self._record(thread)
        record.ptr("kernel_stack", stack)
        self._save(record, stack, sp, frames[0], pc)
        calls = [pc, *(caller + RETURN for caller in self._callers[1:])]
        return {
            "continuation": 0,
            "stack": stack,
            "calls": calls,
            "registers": {"pc": pc, "sp": sp, "fp": frames[0]},
        }

    def _save(self, thread: Record, stack: int, sp: int, fp: int, pc: int) -> None:
        top, words = stack + SIZE, self._ground.words
        if self._ground.image.arch == "arm64":
            at = top - 0x100
            thread.ptr("machine.kstackptr", at)
            # x19 to x28, fp, lr, sp; code pointers are signed
            words(at, *range(19, 29), fp, self._types.sign(pc, at), sp)
        elif self._ground.image.arch == "x86_64":
            # rbx, rsp, rbp, r12 to r15, rip; since xnu-4570 (10.13) 16 bytes lie above it
            above = 16 if self._types.has("pmap", "pm_ucr3") else 0
            words(top - 64 - above, 1, sp, fp, 12, 13, 14, 15, pc)
        else:  # ebx, esp, ebp, edi, esi, eip; up to xnu-1228 (10.5) a link lies above it
            above = 0 if self._types.has("thread", "thread_id") else 4
            words(top - 24 - above, 1, sp, fp, 4, 5, pc)

    def _processors(self, threads: list[int], idle: int) -> list[dict[str, Any]]:
        """processor_list: one for each thread that runs; the first idles."""
        types, ground = self._types, self._ground
        places = [ground.record("processor") for _ in threads]
        numbers = ("cpu_id", "cpu_num", "processor_data.slot_num")
        number = next((name for name in numbers if types.has("processor", name)), None)
        pset = ground.bytes(bytes(64))
        found = []
        for cpu, (record, thread) in enumerate(zip(places, threads, strict=True)):
            record.ptr("active_thread", thread)
            record.ptr("idle_thread", idle if cpu else thread)
            record.ptr("processor_set", pset)
            record.u32("state", 6 if cpu else 4)
            record.u32("current_pri", 31 + cpu)
            if number is not None:
                record.u32(number, cpu)
            following = places[cpu + 1].address if cpu + 1 < len(places) else 0
            record.ptr("processor_list", following)
            found.append(
                {
                    "address": record.address,
                    "cpu": cpu,
                    "active_thread": thread,
                    "idle_thread": idle if cpu else thread,
                    "processor_set": pset,
                    "state": "running" if cpu else "idle",
                    "current_pri": 31 + cpu,
                }
            )
        ground.pointer_variable("_processor_list", places[0].address)
        self._machine(found)
        return found

    def _machine(self, processors: list[dict[str, Any]]) -> None:
        """cpu_data_ptr of Intel's, CpuDataEntries {physical, virtual} of arm64's."""
        ground, width = self._ground, self._ground.memory.width
        arm = ground.image.arch == "arm64"
        step = 2 if arm else 1
        name = "_CpuDataEntries" if arm else "_cpu_data_ptr"
        table = ground.image.variable(name, step * width * len(processors))
        for cpu, truth in enumerate(processors):
            known = self._types.has("cpu_data")
            truth["interrupts"] = None
            if known:
                data = ground.record("cpu_data")
                data.u32("cpu_preemption_level", cpu + 1)
                for vector in (0x40, 0xD1):
                    data.u32("cpu_hwIntCnt", vector + cpu, at=4 * vector)
                truth["cpu_data"] = data.address
                truth["interrupts"] = 0x40 + 0xD1 + 2 * cpu
            else:
                truth["cpu_data"] = ground.bytes(bytes(64))
            truth["preemption_level"] = cpu + 1 if known else None
            ground.words(table + (step * cpu + step - 1) * width, truth["cpu_data"])
