"""Kernel stacks: who called whom, by frame pointers, and why the chain ends where it does.

A thread that is not running left its registers at the top of its kernel stack when it gave up its
CPU (osfmk/i386/cswitch.s, thread.h: STACK_IKS; osfmk/arm64/cswitch.s: machine.kstackptr); one that
gave up its stack, too, goes on at its continuation. One that runs has them in the container.
Where a trap interrupted the kernel the chain goes on with what was interrupted: by itself where the
handler made a frame for it (arm64, and x86_64 since xnu-2050), else by way of the state that the
processor pushed. Source: xnu-792..11417; osfmk/mach/i386/thread_status.h, osfmk/i386/{idt64,
locore}.s, osfmk/arm64/locore.s.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmtool.kexts import Code
    from kvmtool.target import Target
    from kvmtool.xnu.thread import Thread

LIMIT = 512  # frames
KERNEL_STACK_SIZE = 0x4000  # bytes, where no variable says it: osfmk/mach/i386/vm_param.h
_STACK_LIMIT = 1 << 20
_GAP = 1 << 16  # bytes from a frame to the next on a stack of unknown size
# first-level handlers: below them lies what they interrupted
_HANDLERS = ("fleh_", "hndl_", "trap_from_", "alltraps", "lo_alltraps", "hi64_", "allintrs")
_SYSCALLS = ("scall", "syscall", "sysenter")  # in the name of a handler that no trap enters
_SYSCALL = "a system call: it was in user mode before"
_STATE_ROOM = 0x400  # bytes above a handler's frame that are searched for the processor's state
_KERNEL_CS = (0x08, 0x80)  # KERNEL_CS, KERNEL64_CS: osfmk/i386/seg.h
_FLAG_1, _FLAGS_END = 0x2, 1 << 22  # eflags: bit 1 is always set
_USER_X86_64 = 1 << 47


class Registers(NamedTuple):
    """What unwinding starts from: `pc`, `sp` and `fp` as addresses; `origin` says whose they are.

    `cs` is x86's code segment, 0 where it is not known.
    """

    pc: int
    sp: int
    fp: int
    origin: str
    cs: int = 0


class Frame(NamedTuple):
    """One function: `pc` is where it was, or where it will be returned to.

    `kind` is "pc" for the first, "return", or "trap" for what was interrupted there. `fp` is the
    frame in which `pc` was found, None for what was not found in one.
    """

    pc: int
    fp: int | None
    code: Code
    kind: str


class Backtrace(NamedTuple):
    """A kernel stack, innermost function first. `stop` says why there is no more.

    `thread` and `cpu` are None where not known. `origin` says where the registers come from;
    `continuation` is where a thread without a stack goes on. `unreadable` is whether memory that
    would have gone on with it is missing.
    """

    thread: Thread | None
    cpu: int | None
    origin: str
    frames: tuple[Frame, ...]
    stop: str
    unreadable: bool = False
    continuation: Code | None = None


class Unwinder:
    """Unwinds the stacks of one kernel. `code_at` says what an address of code belongs to."""

    def __init__(self, target: Target, code_at: Callable[[int], Code]) -> None:
        """Reads how large a kernel stack is."""
        self.target, self._code_at = target, code_at
        self._known: dict[int, Code] = {}
        self.width = target.arch.pointer_size
        self._pair = Struct(target.arch.byteorder + ("2Q" if self.width == 8 else "2I"))
        self.stack_size = _stack_size(target)
        # osfmk/arm64/locore.s makes a frame for what it interrupts, wherever that was
        self.frames_traps = target.arch.name.startswith("arm64")

    def code(self, address: int, returns: bool = False) -> Code:
        """What `address` belongs to; of a return address, what the call before it does."""
        at = address - 1 if returns else address
        if at not in self._known:
            self._known[at] = self._code_at(at)
        found = self._known[at]
        return found._replace(address=address, offset=found.offset + 1) if returns else found

    def of_thread(self, thread: Thread) -> Backtrace:
        """The stack of a thread as it left it. Never raises `FaultError`."""
        goes_on = thread.continuation
        code = self.code(goes_on) if isinstance(goes_on, int) and goes_on else None
        stack = thread.kernel_stack
        if isinstance(stack, Unreadable):
            stop = f"its stack is not known: {stack.reason}"
            return Backtrace(thread, thread.cpu, "", (), stop, True, code)
        if not stack:
            stop = "no kernel stack: " + (
                f"it goes on at {code}" if code else "and no continuation"
            )
            return Backtrace(thread, thread.cpu, "", (), stop, False, code)
        try:
            registers = self._saved(thread, stack)
        except FaultError as fault:
            stop = f"its saved registers at {fault.address:#x} are {fault.reason}"
            return Backtrace(thread, thread.cpu, "", (), stop, True, code)
        if registers is None:
            stop = f"no saved registers at the top of the stack {stack:#x}"
            return Backtrace(thread, thread.cpu, "", (), stop, False, code)
        return self.of_registers(registers, thread, thread.cpu)._replace(continuation=code)

    def of_registers(
        self, registers: Registers, thread: Thread | None = None, cpu: int | None = None
    ) -> Backtrace:
        """The stack that `registers` lead to; `thread` says where its own stack lies."""
        if self.is_user(registers.pc) or registers.cs & 3:
            stop = f"it was in user mode, at {registers.pc:#x}"
            return Backtrace(thread, cpu, registers.origin, (), stop)
        walk = _Walk(self, registers, self._stack_of(thread))
        frames = tuple(walk)
        return Backtrace(thread, cpu, registers.origin, frames, walk.stop, walk.unreadable)

    def holds(self, thread: Thread, address: int) -> bool:
        """Whether `address` lies in the kernel stack of `thread`."""
        stack = self._stack_of(thread)
        return stack is not None and address in stack

    def _stack_of(self, thread: Thread | None) -> range | None:
        if thread is None or not isinstance(thread.kernel_stack, int) or not thread.kernel_stack:
            return None
        return range(thread.kernel_stack, thread.kernel_stack + self.stack_size)

    def is_user(self, address: int) -> bool:
        """Whether only a process can have it; on i386 every address may be the kernel's."""
        name = self.target.arch.name
        if name == "x86_64":
            return address < _USER_X86_64
        return name.startswith("arm64") and not address >> 55 & 1

    def pair(self, address: int) -> tuple[int, int]:
        """The saved frame pointer and the return address at `address`. Raises `FaultError`."""
        fp, pc = self._pair.unpack(self.target.memory.read(address, self._pair.size))
        return self.target.strip(fp), self.target.strip(pc)

    def _saved(self, thread: Thread, stack: int) -> Registers | None:
        """What the thread saved when it gave up its CPU; None if nothing there can be that."""
        name = self.target.arch.name
        if name.startswith("arm64"):
            return self._saved_arm64(thread, stack)
        if name not in ("i386", "x86_64"):
            return None
        top = stack + self.stack_size
        # struct x86_kernel_state; since xnu-4570 an allocation's name lies above it, and up to
        # xnu-1228 a link to the saved state of the last exception
        layout, places = _SAVED_X86[name]
        for below in places:
            data = self.target.memory.read(top - below, layout.size)
            sp, fp, pc = layout.unpack(data)
            inside = stack <= sp <= top and (fp == 0 or stack <= fp < top)
            if inside and self.code(pc).inside:
                return Registers(pc, sp, fp, _origin(thread, top - below))
        return None

    def _saved_arm64(self, thread: Thread, stack: int) -> Registers | None:
        """struct arm_kernel_saved_state: x19 to x28, fp, lr, sp; it goes on at lr."""
        at = thread.kstackptr
        if not isinstance(at, int) or not stack <= at < stack + self.stack_size:
            return None
        fp, lr, sp = (self.target.pointer(at + 80 + 8 * n) for n in range(3))
        if not self.code(lr).inside:
            return None
        return Registers(lr, sp, fp, _origin(thread, at))

    def interrupted(self, after: int, end: int) -> int | None:
        """Where the kernel was when the processor pushed its state between `after` and `end`.

        An x86 state is the address, a kernel code segment, flags, and on x86_64 the stack pointer.
        """
        width, wide = self.width, self.target.arch.name == "x86_64"
        if self.target.arch.name not in ("i386", "x86_64"):
            return None
        try:
            data = self.target.memory.read(after, min(end - after, _STATE_ROOM) & -width)
        except FaultError:
            return None
        words = [
            int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)
        ]
        for place in range(len(words) - (3 if wide else 2)):
            pc, cs, flags, *rest = words[place : place + 4]
            if cs & 0xFFFF not in _KERNEL_CS or not flags & _FLAG_1 or flags >= _FLAGS_END:
                continue
            if wide and not after < rest[0] < end + _STATE_ROOM:
                continue
            if self.code(pc).inside:
                return pc
        return None


# x86_kernel_state: where sp, fp and pc lie in it, and how far below the top of the stack it begins
_SAVED_X86: Mapping[str, tuple[Struct, tuple[int, ...]]] = {
    "x86_64": (Struct("<8x2Q32xQ"), (64, 80)),
    "i386": (Struct("<4x2I8xI"), (32, 28, 24)),
}


def _origin(thread: Thread, at: int) -> str:
    stale = ", which may be stale: it was running" if thread.running else ""
    return f"registers it saved at {at:#x}{stale}"


class _Walk:
    """One walk along the frames; when it has ended, `stop` says why."""

    def __init__(self, unwinder: Unwinder, registers: Registers, stack: range | None) -> None:
        self._unwinder, self._start, self._own = unwinder, registers, stack
        self._bounds = stack if stack is not None and registers.fp in stack else None
        self._below = registers.sp - 1 if registers.sp else 0
        self.stop = f"more than {LIMIT} frames"
        self.unreadable = self._syscall = False

    def __iter__(self) -> Iterator[Frame]:
        unwinder, start = self._unwinder, self._start
        code = unwinder.code(start.pc)
        yield Frame(start.pc, None, code, "pc")
        if not code.inside:
            self.stop = f"it was at {start.pc:#x}, which lies in no known text"
            return
        fp = start.fp
        hit: int | None = None  # what the handler that was just met interrupted
        for _ in range(LIMIT):
            if self._ends(fp):
                return
            try:
                following, pc = unwinder.pair(fp)
            except FaultError as fault:
                self.stop = f"the frame at {fp:#x} is {fault.reason}"
                self.unreadable = True
                return
            if hit not in (None, pc):
                yield Frame(hit, None, unwinder.code(hit), "trap")
            trapped = hit == pc
            code = unwinder.code(pc, returns=not trapped)
            if not self._goes_on(pc, code, trapped):
                return
            yield Frame(pc, fp, code, "trap" if trapped else "return")
            self._syscall = _is_syscall(code)
            hit = self._interrupted(fp, following) if _is_handler(code) else None
            self._below, fp = fp, following

    def _ends(self, fp: int) -> bool:
        """Whether `fp` is no frame on this stack; then `stop` says why."""
        unwinder = self._unwinder
        if fp == 0:
            self.stop = "end of the chain" if not self._syscall else _SYSCALL
        elif unwinder.is_user(fp):
            self.stop = f"the kernel was entered from user mode (frame pointer {fp:#x})"
        elif fp % unwinder.width:
            self.stop = f"frame pointer {fp:#x} is not aligned"
        elif self._own is not None and self._bounds is None and fp in self._own:
            self._bounds = self._own  # back from an interrupt's stack on the thread's own
            return False
        elif self._bounds is not None and fp not in self._bounds:
            low, high = self._bounds.start, self._bounds.stop
            self.stop = f"frame pointer {fp:#x} leaves the kernel stack {low:#x}-{high:#x}"
        elif fp <= self._below:
            self.stop = f"frame pointer {fp:#x} does not lie above {self._below:#x}"
        elif self._bounds is None and self._below and fp - self._below > _GAP:
            self.stop = f"frame pointer {fp:#x} is too far from {self._below:#x}"
        else:
            return False
        return True

    def _goes_on(self, pc: int, code: Code, trapped: bool) -> bool:
        if pc == 0:
            self.stop = "end of the chain"
        elif trapped and self._unwinder.is_user(pc):
            self.stop = f"the kernel was entered from user mode, at {pc:#x}"
        elif self._unwinder.is_user(pc):
            self.stop = f"return address {pc:#x} is not the kernel's"
        elif not code.inside:
            self.stop = f"return address {pc:#x} lies in no known text"
        else:
            return True
        return False

    def _interrupted(self, fp: int, following: int) -> int | None:
        """What the handler whose frame is at `fp` interrupted, as far as that is known."""
        unwinder = self._unwinder
        if unwinder.frames_traps:
            try:
                return unwinder.pair(following)[1]
            except FaultError:
                return None  # it is told when the walk gets there
        after = fp + 2 * unwinder.width
        return unwinder.interrupted(after, following if following > after else after + _STATE_ROOM)


def _is_syscall(code: Code) -> bool:
    return _is_handler(code) and any(word in (code.symbol or "") for word in _SYSCALLS)


def _is_handler(code: Code) -> bool:
    return (code.symbol or "").lstrip("_").startswith(_HANDLERS)


def _stack_size(target: Target) -> int:
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
