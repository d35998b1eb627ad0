"""What runs in a built crash: processors, kernel stacks, and what else a thread holds.

Written into the memory of a `Built` after the fact; symbols that lie in it are `SYMBOLS`, which the
build must be given as `more_symbols`. As the rest, asks the layout what the release has.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tests.builders.macho import Sym

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtool.types.model import TypeTable
    from tests.builders.xnu import Built

STACK = 0x4000
_BASE = {"i386": 0x22000000, "x86_64": 0xFFFFFF8070000000, "arm64": 0xFFFFFE2480000000}
_ALWAYS = ("_processor_list", "_kernel_stack_size", "_gPEClockFrequencyInfo")
_PANIC = (
    *("_panicstr", "_debugger_panic_str", "_debug_buf_base", "_debug_buf_ptr", "_panic_info"),
    "_debug_buf",  # an array: the last
)
_PLACES = (*_ALWAYS, *_PANIC)
_ROOM = 0x100
_BUFFER_AT, BUFFER = 0x10000, 0x8000  # on pages of its own, whatever size they have


def _offset(name: str) -> int:
    return _BUFFER_AT if name == "_debug_buf" else _ROOM * _PLACES.index(name)


def symbols(arch: str, slide: int, names: Sequence[str] = ()) -> list[Sym]:
    """`more_symbols` for `build`: where the variables of this module are, and those of `names`."""
    base = _BASE[arch] - slide
    return [Sym(name, base + _offset(name)) for name in _PLACES if name in _ALWAYS or name in names]


class Running:
    """Adds to one built crash. Addresses are those in memory."""

    def __init__(self, built: Built, layout: TypeTable) -> None:
        self.built, self.layout = built, layout
        self.memory = built.memory
        self.wide = built.memory.width == 8
        self._region = self.memory.region("running", _BASE[built.arch])
        self._region.alloc(_BUFFER_AT + BUFFER)
        self.variables = {name: _BASE[built.arch] + _offset(name) for name in _PLACES}
        self.memory.put_pointer(self.variables["_kernel_stack_size"], STACK)

    def words(self, address: int, *values: int) -> None:
        """Pointer-sized words at `address`."""
        code = "Q" if self.wide else "I"
        mask = (1 << 8 * self.memory.width) - 1
        data = struct.pack(f"<{len(values)}{code}", *(value & mask for value in values))
        self.memory.write(address, data)

    def text(self, value: str) -> int:
        """A C string somewhere in memory."""
        at = self._region.alloc(len(value.encode()) + 1)
        self.memory.write(at, value.encode() + b"\0")
        return at

    def clock(self, hz: int) -> None:
        """gPEClockFrequencyInfo.timebase_frequency_hz."""
        at = self.variables["_gPEClockFrequencyInfo"] + 9 * 8
        self.memory.write(at, struct.pack("<Q", hz))

    def processors(self, active: Sequence[int]) -> None:
        """processor_list: one CPU for each of the threads `active`, numbered from 0."""
        size = self.layout.size("processor")
        where = [self._region.alloc(size) for _ in active]
        self.words(self.variables["_processor_list"], where[0])
        numbers = ("cpu_id", "cpu_num", "processor_data.slot_num")
        number = next((name for name in numbers if self.layout.has("processor", name)), None)
        for cpu, (at, thread) in enumerate(zip(where, active, strict=True)):
            self.put("processor", at, "active_thread", thread)
            if number is not None:
                place = at + self.layout.offset("processor", number)
                self.memory.write(place, struct.pack("<I", cpu))
            following = where[cpu + 1] if cpu + 1 < len(where) else 0
            self.put("processor", at, "processor_list", following)

    def put(self, tag: str, address: int, member: str, value: int) -> None:
        """A pointer into the member of a structure."""
        self.words(address + self.layout.offset(tag, member), value)

    def uthread(self, thread: int) -> int:
        """Where the BSD side of a thread lies."""
        if not self.layout.has("thread", "uthread"):
            return thread + self.layout.size("thread")
        at = thread + self.layout.offset("thread", "uthread")
        return int.from_bytes(self.memory.read(at, self.memory.width), "little")

    def timer(self, thread: int, member: str, value: int) -> bool:
        """user_timer or system_timer; whether this release has one."""
        if not self.layout.has("thread", member):
            return False
        at = thread + self.layout.offset("thread", member)
        if self.wide:  # tstamp, all_bits
            self.memory.write(at, struct.pack("<QQ", 0, value))
        elif self.layout.has("thread", f"{member}.low_bits"):  # 10.4: low, high, check, tstamp
            self.memory.write(at, struct.pack("<II", value & 0xFFFFFFFF, value >> 32))
        else:  # tstamp, low, high, check
            low, high = value & 0xFFFFFFFF, value >> 32
            low_at = at + self.layout.offset("timer", "low_bits")
            self.memory.write(low_at, struct.pack("<I", low))
            self.memory.write(
                at + self.layout.offset("timer", "high_bits"), struct.pack("<I", high)
            )
        return True

    def stack(self, thread: int, calls: Sequence[int], *, at_top: int | None = None) -> int:
        """A kernel stack for `thread`, which gave up its CPU in `calls` (innermost first).

        Frames lie 0x80 bytes apart, the last one's saved frame pointer is 0; the registers are
        saved `at_top` bytes below the top (struct x86_kernel_state, arm_kernel_saved_state).
        Returns its address.
        """
        width = self.memory.width
        stack = self._region.alloc(STACK, 0x1000)
        self.memory.write(stack, bytes(STACK))
        self.put("thread", thread, "kernel_stack", stack)
        top = stack + STACK
        frames = [top - 0x800 + 0x80 * number for number in range(len(calls) - 1)]
        for number, (frame, call) in enumerate(zip(frames, calls[1:], strict=True)):
            following = frames[number + 1] if number + 1 < len(frames) else 0
            self.words(frame, following, call)
        first, sp = (frames or [0])[0], top - 0x820
        if self.built.arch == "arm64":
            state = top - (at_top or 0x70)
            self.words(state + 10 * width, first, calls[0], sp)
            member = thread + self.layout.offset("thread", "machine.kstackptr")
            self.words(member, state)
        elif self.wide:  # rbx rsp rbp r12 r13 r14 r15 rip
            self.words(top - (at_top or 64), 0xB, sp, first, 0xC, 0xD, 0xE, 0xF, calls[0])
        else:  # ebx esp ebp edi esi eip
            self.words(top - (at_top or 32), 0xB, sp, first, 0xD, 0x5, calls[0])
        return stack

    def frame(self, stack: int, number: int) -> int:
        """Where frame `number` (0 is the innermost) of a `stack` lies."""
        return stack + STACK - 0x800 + 0x80 * number
