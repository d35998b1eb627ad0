"""Registers in memory: what a thread saved when it gave up its CPU, what a trap pushed.

x86 saves at the top of the kernel stack (osfmk/i386/cswitch.s, thread.h: STACK_IKS), arm64 where
machine.kstackptr points (osfmk/arm64/cswitch.s). Source: xnu-792..11417; osfmk/mach/arm/
thread_status.h, osfmk/i386/seg.h.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtool.target import Target
    from kvmtool.xnu.thread import Thread

KERNEL_STACK_SIZE = 0x4000  # bytes, where no variable says it: osfmk/mach/i386/vm_param.h
STATE_ROOM = 0x400  # bytes above a handler's frame that are searched for the processor's state
_STACK_LIMIT = 1 << 20
_KERNEL_CS = (0x08, 0x80)  # KERNEL_CS, KERNEL64_CS: osfmk/i386/seg.h
_FLAG_1, _FLAGS_END = 0x2, 1 << 22  # eflags: bit 1 is always set

# struct x86_kernel_state: where sp, fp and pc lie in it, and how far below the top of the stack it
# begins; since xnu-4570 an allocation's name lies above it, up to xnu-1228 a link to the saved
# state of the last exception
_SAVED_X86: Mapping[str, tuple[Struct, tuple[int, ...]]] = {
    "x86_64": (Struct("<8x2Q32xQ"), (64, 80)),
    "i386": (Struct("<4x2I8xI"), (32, 28, 24)),
}


class Registers(NamedTuple):
    """What unwinding starts from: `pc`, `sp` and `fp` as addresses; `origin` says whose they are.

    `cs` is x86's code segment, 0 where it is not known.
    """

    pc: int
    sp: int
    fp: int
    origin: str
    cs: int = 0


def registers_of(
    target: Target, states: tuple[tuple[int, bytes], ...], origin: str
) -> Registers | None:
    """The registers of a CPU in a container; None for one that has none, or not of this machine."""
    arch = target.arch
    for flavor, data in states:
        values: dict[str, Any] = arch.registers(flavor, data)
        if values.get(arch.pc):
            pc, sp, fp = (target.strip(values.get(name, 0)) for name in (arch.pc, arch.sp, arch.fp))
            return Registers(pc, sp, fp, origin, values.get("cs", 0))
    return None


def stack_size(target: Target) -> int:
    """Bytes of a kernel stack: kernel_stack_size, where the kernel has it and it can be one."""
    symbol = target.symbols.get("_kernel_stack_size")  # xnu-1456 (10.6) on
    if symbol is None:
        return KERNEL_STACK_SIZE
    try:
        size = target.pointer(symbol.address)
    except FaultError:
        return KERNEL_STACK_SIZE
    sane = size and size % 4096 == 0 and size <= _STACK_LIMIT
    return size if sane else KERNEL_STACK_SIZE


def saved_registers(
    target: Target, thread: Thread, size: int, is_text: Callable[[int], bool]
) -> Registers | None:
    """What `thread` saved when it gave up its CPU; None if nothing there can be that.

    Its kernel stack is `size` bytes long. Raises `FaultError`.
    """
    name, stack = target.arch.name, thread.kernel_stack
    if name.startswith("arm64"):
        return _saved_arm64(target, thread, size, is_text)
    if name not in _SAVED_X86:
        return None
    top = stack + size
    layout, places = _SAVED_X86[name]
    for below in places:
        sp, fp, pc = layout.unpack(target.memory.read(top - below, layout.size))
        inside = stack <= sp <= top and (fp == 0 or stack <= fp < top)
        if inside and is_text(pc):
            return Registers(pc, sp, fp, _origin(thread, top - below))
    return None


def _saved_arm64(
    target: Target, thread: Thread, size: int, is_text: Callable[[int], bool]
) -> Registers | None:
    """struct arm_kernel_saved_state: x19 to x28, fp, lr, sp; it goes on at lr."""
    at, stack = thread.kstackptr, thread.kernel_stack
    if not isinstance(at, int) or not stack <= at < stack + size:
        return None
    fp, lr, sp = (target.pointer(at + 80 + 8 * n) for n in range(3))
    return Registers(lr, sp, fp, _origin(thread, at)) if is_text(lr) else None


def _origin(thread: Thread, at: int) -> str:
    stale = ", which may be stale: it was running" if thread.running else ""
    return f"registers it saved at {at:#x}{stale}"


def interrupted(target: Target, after: int, end: int, is_text: Callable[[int], bool]) -> int | None:
    """Where the kernel was when an x86 processor pushed its state between `after` and `end`.

    That is the address, a kernel code segment, flags, and on x86_64 the stack pointer. None where
    no such thing is found.
    """
    name, width = target.arch.name, target.arch.pointer_size
    if name not in ("i386", "x86_64"):
        return None
    wide = name == "x86_64"
    try:
        data = target.memory.read(after, min(end - after, STATE_ROOM) & -width)
    except FaultError:
        return None
    words = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    for place in range(len(words) - (3 if wide else 2)):
        pc, cs, flags, *rest = words[place : place + 4]
        if cs & 0xFFFF not in _KERNEL_CS or not flags & _FLAG_1 or flags >= _FLAGS_END:
            continue
        if wide and not after < rest[0] < end + STATE_ROOM:
            continue
        if is_text(pc):
            return pc
    return None
