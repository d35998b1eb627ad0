"""Kernel stacks: who called whom, by frame pointers, and why the chain ends where it does.

A thread that is not running left its registers on its kernel stack when it gave up its CPU; one
that gave up its stack, too, goes on at its continuation. One that runs has them in the container.
Where a trap interrupted the kernel the chain goes on with what was interrupted: by itself where the
handler made a frame for it (arm64, and x86_64 since xnu-2050), else by way of the state that the
processor pushed. Source: osfmk/i386/{idt64,locore}.s, osfmk/arm64/locore.s, xnu-792..11417.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.saved_registers import STATE_ROOM, interrupted, saved_registers, stack_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.kexts import Code
    from kvmtool.target import Target
    from kvmtool.xnu.saved_registers import Registers
    from kvmtool.xnu.thread import Thread

LIMIT = 512  # frames
_GAP = 1 << 16  # bytes from a frame to the next on a stack of unknown size
# first-level handlers: below them lies what they interrupted
_HANDLERS = ("fleh_", "hndl_", "trap_from_", "alltraps", "lo_alltraps", "hi64_", "allintrs")
_SYSCALLS = ("scall", "syscall", "sysenter")  # in the name of a handler that no trap enters
_SYSCALL = "a system call: it was in user mode before"
_USER_X86_64 = 1 << 47


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
    would have gone on with it is missing, `textless` whether it led to where no known code lies.
    """

    thread: Thread | None
    cpu: Any
    origin: str
    frames: tuple[Frame, ...]
    stop: str
    unreadable: bool = False
    continuation: Code | None = None
    textless: bool = False


class Unwinder:
    """Unwinds the stacks of one kernel. `code_at` says what an address of code belongs to."""

    def __init__(self, target: Target, code_at: Callable[[int], Code]) -> None:
        """Reads how large a kernel stack is."""
        self.target, self._code_at = target, code_at
        self._known: dict[int, Code] = {}
        self.width = target.arch.pointer_size
        self._pair = Struct(target.arch.byteorder + ("2Q" if self.width == 8 else "2I"))
        self.stack_size = stack_size(target)
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
            lost = isinstance(goes_on, Unreadable)
            where = f"it goes on at {code}" if code else "and no continuation"
            stop = f"no kernel stack: {goes_on.reason if lost else where}"
            return Backtrace(thread, thread.cpu, "", (), stop, lost, code)
        try:
            registers = saved_registers(self.target, thread, self.stack_size, self.is_text)
        except FaultError as fault:
            stop = f"its saved registers at {fault.address:#x} are {fault.reason}"
            return Backtrace(thread, thread.cpu, "", (), stop, True, code)
        if registers is None:
            stop = f"no saved registers at the top of the stack {stack:#x}"
            return Backtrace(thread, thread.cpu, "", (), stop, False, code)
        return self.of_registers(registers, thread, thread.cpu)._replace(continuation=code)

    def of_registers(
        self, registers: Registers, thread: Thread | None = None, cpu: Any = None
    ) -> Backtrace:
        """The stack that `registers` lead to; `thread` says where its own stack lies."""
        if self.is_user(registers.pc) or registers.cs & 3:
            stop = f"it was in user mode, at {registers.pc:#x}"
            return Backtrace(thread, cpu, registers.origin, (), stop)
        walk = _Walk(self, registers, self._stack_of(thread))
        frames = tuple(walk)
        stop, lost = walk.stop, walk.unreadable
        return Backtrace(thread, cpu, registers.origin, frames, stop, lost, None, walk.textless)

    def is_text(self, address: int) -> bool:
        """Whether `address` lies in the text of the kernel or of a kext."""
        return self.code(address).inside

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


class _Walk:
    """One walk along the frames; when it has ended, `stop` says why."""

    def __init__(self, unwinder: Unwinder, registers: Registers, stack: range | None) -> None:
        self._unwinder, self._start, self._own = unwinder, registers, stack
        self._bounds = stack if stack is not None and registers.fp in stack else None
        self._below = registers.sp - 1 if registers.sp else 0
        self.stop = f"more than {LIMIT} frames"
        self.unreadable = self.textless = self._syscall = False

    def __iter__(self) -> Iterator[Frame]:
        unwinder, start = self._unwinder, self._start
        code = unwinder.code(start.pc)
        yield Frame(start.pc, None, code, "pc")
        if not code.inside:
            self.stop = f"it was at {start.pc:#x}, which lies in no known text"
            self.textless = True
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
            self.textless = True
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
        end = following if following > after else after + STATE_ROOM
        return interrupted(unwinder.target, after, end, unwinder.is_text)


def _is_syscall(code: Code) -> bool:
    return _is_handler(code) and any(word in (code.symbol or "") for word in _SYSCALLS)


def _is_handler(code: Code) -> bool:
    return (code.symbol or "").lstrip("_").startswith(_HANDLERS)
