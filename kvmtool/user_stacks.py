"""The stacks that threads had in their processes when they entered the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, FormatError, NotFoundError, UnsupportedError
from kvmtool.types.near import whose_types
from kvmtool.xnu.queues import Report
from kvmtool.xnu.user_stack import Mappings, UserStack, UserWalk
from kvmtool.xnu.user_state import UserState, UserStates
from kvmtool.xnu.vmmap import Maps

if TYPE_CHECKING:
    from kvmtool.handle import Kvm
    from kvmtool.memory import Memory
    from kvmtool.stacks import Stacks
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.thread import Thread

_USER_CS = 0x1B  # osfmk/i386/seg.h: code of 32 bits


class UserStacks:
    """The user-mode stacks of one dump; of each process memory and map are looked up once."""

    def __init__(self, kvm: Kvm, stacks: Stacks, report: Report | None = None) -> None:
        """Finds the processes. Raises as `Kvm.verified_target` and `UserStates`."""
        self._kvm, self._stacks = kvm, stacks
        self._target = kvm.verified_target()
        self._states = self._borne_out(UserStates(self._target))
        self._report = report if report is not None else Report()
        self._procs = {proc.pid: proc for proc in kvm.procs(self._report)}
        self._maps = Maps(self._target, self._report)
        self._known: dict[int, tuple[Mappings, Memory | str]] = {}

    def _borne_out(self, states: UserStates) -> UserStates:
        """What was only tried must be found of some thread. Raises `NotFoundError`."""
        if not states.tried:
            return states
        for thread in self._stacks.threads:
            if isinstance(thread.pid, int) and thread.pid > 0:
                try:
                    if states.read(thread.address) is not None:
                        return states
                except FaultError:
                    continue
        types = self._target.types
        hint = whose_types(types.name, types.origin)
        raise NotFoundError("member", "thread.machine.iss", (), hint)

    def of(self, thread: Thread | None) -> UserStack | None:
        """The stack of `thread` in its process; None for one that has none there."""
        proc = self._procs.get(thread.pid) if thread is not None else None
        if thread is None or proc is None or proc.pid == 0:
            return None
        try:
            state = self._running(thread) or self._states.read(thread.address)
        except FaultError as fault:
            return UserStack((), f"its registers at {fault.address:#x} are {fault.reason}", True)
        if state is None:
            return None
        mappings, memory = self._process(proc)
        order = self._target.arch.byteorder
        return UserWalk(state, mappings, memory, self._target.strip, order).stack()

    def _running(self, thread: Thread) -> UserState | None:
        """The registers of a thread that a CPU was running in user mode."""
        registers = self._stacks.registers_of(thread.address)
        if registers is None:
            return None
        if not self._stacks.unwinder.is_user(registers.pc) and not registers.cs & 3:
            return None
        width = 4 if registers.cs == _USER_CS else self._target.arch.pointer_size
        return UserState(registers.pc, registers.sp, registers.fp, None, width)

    def _process(self, proc: Proc) -> tuple[Mappings, Memory | str]:
        if proc.pid not in self._known:
            memory: Memory | str
            try:
                memory = self._kvm.space_of(proc)
            except (UnsupportedError, FaultError, NotFoundError) as error:
                memory = str(error)
            self._known[proc.pid] = self._mappings(proc), memory
        return self._known[proc.pid]

    def _mappings(self, proc: Proc) -> Mappings:
        try:
            where = self._maps.reader.of_process(proc)
            return Mappings(self._maps.entries(where, submaps=True))
        except (FaultError, FormatError, NotFoundError, UnsupportedError) as error:
            self._report.stop(f"map of process {proc.pid}", 0, str(error))
            return Mappings(())
