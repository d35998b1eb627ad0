"""What processes use: times, the executable's vnode, signing flags, what threads wait for.

After osfmk/kern/{task,thread,timer,recount}.h and bsd/sys/proc_internal.h, proc_ro.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from tests.builders.heap import Record

if TYPE_CHECKING:
    from tests.builders.filesystem import FileSystem
    from tests.builders.ground import Ground

CS_VALID, CS_SIGNED = 0x1, 0x20000000
CPUS = 3
CHANNELS = ("_hz", "_lbolt", "_vm_page_free_wanted")


class Usage:
    """Numbers that follow from the pid, so that no two processes are alike."""

    def __init__(self, ground: Ground, files: FileSystem) -> None:
        self._ground = ground
        self._files = files
        self._zone = ground.zones["thread"]
        self._timers: dict[int, dict[str, int]] = {}

    def plant(self) -> dict[str, Any]:
        """For every process; the truth by pid."""
        if self._ground.types.has("task", "tk_recount"):
            self._ground.int_variable("_zpercpu_early_count", CPUS)
            if self._ground.image.arch == "arm64":
                self._ground.pointer_variable("_pcore_node", 0)
        channels = [self._ground.image.variable(name, 8) for name in CHANNELS]
        found = {}
        for spec in self._ground.processes.specs:
            proc = self._ground.processes.procs[spec.pid]
            path = None if spec.pid == 0 or spec.zombie else f"/usr/bin/{spec.comm}"
            if path is not None:
                proc.ptr("p_textvp", self._files.vnode(path, "REG"))
            flags = CS_VALID | CS_SIGNED | spec.pid << 4
            truth = {"text": path, "csflags": self._csflags(spec.pid, proc, flags)}
            if not spec.zombie:
                truth |= self._times(spec.pid)
                truth |= self._channel(spec.pid, channels[spec.pid % len(channels)])
            found[spec.pid] = truth
        return {"usage": found, "timers": self._timers}

    def _csflags(self, pid: int, proc: Record, flags: int) -> int | None:
        types = self._ground.types
        if types.has("proc", "p_csflags"):
            proc.u32("p_csflags", flags)
            return flags
        if types.has("proc_ro", "p_csflags"):
            self._ground.processes.read_only[pid].u32("p_csflags", flags)
            return flags
        return None

    def _times(self, pid: int) -> dict[str, Any]:
        """Of ended threads in the task, of each living one in its timers."""
        types, processes = self._ground.types, self._ground.processes
        user, system = (pid + 1) * 1_000_000_007, (pid + 2) * 5_000_000_123
        task = processes.tasks[pid]
        by_cpu = types.has("task", "tk_recount")
        if not by_cpu:
            task.u64("total_user_time", user)
            task.u64("total_system_time", system)
        for number, thread in enumerate(processes.threads[pid], 1):
            mine, kernels = number * 0x1_0000_0007, number * 0x2_0000_0003
            if by_cpu:
                kinds = 2 if self._ground.image.arch == "arm64" else 1
                tracks = self._tracks(mine, kernels, kinds)
                record = Record(types, self._zone, "thread", thread)
                record.ptr("th_recount.rth_lifetime", tracks)
            else:
                self._timer(thread, "user_timer", mine)
                self._timer(thread, "system_timer", kernels)
            self._timers[thread] = {"user_time": mine, "system_time": kernels}
            user, system = user + mine, system + kernels
        if by_cpu:
            task.ptr("tk_recount.rtk_lifetime", self._tracks(user, system, CPUS))
        return {"utime": user, "stime": system}

    def _tracks(self, user: int, system: int, count: int) -> int:
        """`count` of struct recount_track that make up the times together."""
        later = self._ground.types.has("thread", "th_recount.rth_interrupt_duration_mach")
        energy = [0x4000] if self._ground.image.arch == "arm64" else []
        data = b""
        for number in range(count):
            share = (user // count, system // count)
            if number == 0:
                share = (share[0] + user % count, share[1] + system % count)
            if later:  # rt_pad, rt_sync; {time, instructions, cycles} of the kernel and of users
                words = [share[1], 0x1000, 0x2000, share[0], 0x1001, 0x2001, *energy]
                head = struct.pack("<2I", 0, 6)
            else:
                words, head = [*share, *energy], struct.pack("<2I", 6, 0)
            data += head + struct.pack(f"<{len(words)}Q", *words)
        guard = struct.pack("<2Q", (1 << 64) - 1, (1 << 64) - 1)
        return self._ground.bytes(data + guard)

    def _timer(self, thread: int, member: str, value: int) -> None:
        """struct timer: {low, high, check, tstamp}, later tstamp first, later one 64-bit word."""
        types, memory = self._ground.types, self._ground.memory
        at = thread + types.offset("thread", member)
        low, high = value & 0xFFFFFFFF, value >> 32
        if memory.width == 8 and not types.has("timer", "low_bits"):
            memory.write(at, struct.pack("<2Q", 1, value))
        elif types.has("thread", f"{member}.low_bits"):
            memory.write(at, struct.pack("<3IQ", low, high, high, 1)[:16])
        else:
            words = {"low_bits": low, "high_bits": high, "high_bits_check": high}
            for word, number in words.items():
                memory.put_u32(at + types.offset("timer", word), number)

    def _channel(self, pid: int, channel: int) -> dict[str, Any]:
        """The first waiting thread's event becomes a variable of the kernel's."""
        for thread in self._ground.processes.threads[pid]:
            record = Record(self._ground.types, self._zone, "thread", thread)
            at = record.place("wait_event")
            if any(self._ground.memory.read(at, self._ground.memory.width)):
                record.word("wait_event", channel)
                return {"wchan": channel}
        return {"wchan": None}
