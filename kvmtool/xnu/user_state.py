"""The registers with which a thread entered the kernel from its process.

Source: osfmk/i386/pcb.h, thread.h (machine_thread.iss; in a pcb up to xnu-1699), osfmk/mach/i386/
thread_status.h (x86_saved_state_t), osfmk/arm64/thread.h (upcb), osfmk/mach/arm/thread_status.h
(arm_saved_state), xnu-792..11417. Types of the kernel's own say where each register lies. Without
them it is as in xnu-4903 and later where built-in layouts have machine.iss; of x86_64 kernels
before it is tried: machine.iss is the first member, and a state of 64 bits ends with what the
processor pushed, in one of the two places where releases have had it.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import NotFoundError
from kvmtool.target import offset_of
from kvmtool.types.near import whose_types

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.types.model import TypeTable

_WIDTHS = {14: 4, 15: 8}  # flavor: x86_SAVED_STATE32, x86_SAVED_STATE64
_SAVED_STATE = "x86_saved_state_t"
_NAMES = {  # (pc, sp, fp, code segment) of each width
    4: ("uss.ss_32.eip", "uss.ss_32.uesp", "uss.ss_32.ebp", "uss.ss_32.cs"),
    8: ("uss.ss_64.isf.rip", "uss.ss_64.isf.rsp", "uss.ss_64.rbp", "uss.ss_64.isf.cs"),
}
_PLACES = {4: (72, 84, 40, 76), 8: (184, 208, 112, 192)}  # xnu-4903..11417
# (rip, rsp, rbp, cs) with v_arg6 to v_arg8 (up to xnu-2422), and without
_TRIED = ((200, 224, 136, 208), _PLACES[8])
_USER_END = 1 << 47
_FLAG_1, _FLAGS_END = 0x2, 1 << 22  # rflags: bit 1 is always set
_ARM_FP, _ARM_STATE = 8 + 8 * 29, Struct("<4QI")  # fp, lr, sp, pc, cpsr
_ARM_MODE = 0xF  # cpsr: 0 in EL0


class UserState(NamedTuple):
    """Addresses in a process whose pointers have `width` bytes; `link` is arm64's lr."""

    pc: int
    sp: int
    fp: int
    link: int | None
    width: int


class UserStates:
    """Reads it for the threads of one kernel."""

    def __init__(self, target: Target) -> None:
        """Finds out where it is kept. Raises `NotFoundError` where types do not say so."""
        self._target, types = target, target.types
        self._arm = target.arch.name.startswith("arm64")
        self._pcb: int | None = None  # where machine.pcb is, and iss in a pcb then
        self.tried = False  # whether no types say where it is
        if self._arm:
            self._at = _needed(types, "machine.upcb")
            return
        late = types.has("thread", "machine.iss")
        if not late and target.arch.name == "x86_64" and types.has("thread", "machine"):
            self._at, self.tried = types.offset("thread", "machine"), True
            self._places: dict[int, tuple[int, ...]] = {4: _PLACES[4]}
            return
        if late or not types.has("pcb", "iss"):
            self._at = _needed(types, "machine.iss")
        else:
            self._pcb, self._at = _needed(types, "machine.pcb"), types.offset("pcb", "iss")
        widths = (4, 8) if late or target.arch.pointer_size == 8 else (4,)
        self._places = {width: _places(types, width, late) for width in widths}

    def read(self, thread: int) -> UserState | None:
        """What the thread at `thread` had in user mode; None for one that never was there.

        Raises `FaultError`.
        """
        if self._pcb is not None:
            thread = self._target.pointer(thread + self._pcb)
        state = self._target.pointer(thread + self._at) if thread else 0
        if not state:
            return None
        return self._arm64(state) if self._arm else self._x86(state)

    def _x86(self, state: int) -> UserState | None:
        width = _WIDTHS.get(self._target.unsigned(state, "I"), 0)
        if width == 8 and self.tried:
            return self._try(state)
        if width not in self._places:
            return None
        code = "I" if width == 4 else "Q"
        places = self._places[width]
        pc, sp, fp, cs = (self._target.unsigned(state + place, code) for place in places)
        # a thread of the kernel's has the selectors, too, and nothing else
        return UserState(pc, sp, fp, None, width) if cs & 3 == 3 and pc else None

    def _try(self, state: int) -> UserState | None:
        """The one reading of a state of 64 bits in which all that the processor pushed fits."""
        found = []
        for at, *rest in _TRIED:
            pushed = [self._target.unsigned(state + at + 8 * n, "Q") for n in range(5)]
            pc, cs, flags, sp, ss = pushed
            rings = all(selector & 3 == 3 and selector < 1 << 16 for selector in (cs, ss))
            if (
                rings
                and pc < _USER_END
                and sp < _USER_END
                and flags & _FLAG_1
                and flags < _FLAGS_END
            ):
                fp = self._target.unsigned(state + rest[1], "Q")
                found.append(UserState(pc, sp, fp, None, 8))
        return found[0] if len(found) == 1 else None

    def _arm64(self, state: int) -> UserState | None:
        data = self._target.memory.read(state + _ARM_FP, _ARM_STATE.size)
        *addresses, cpsr = _ARM_STATE.unpack(data)
        fp, lr, sp, pc = map(self._target.strip, addresses)
        if not pc or cpsr & _ARM_MODE:
            return None
        return UserState(pc, sp, fp, lr, 8)


def _needed(types: TypeTable, member: str) -> int:
    found = offset_of(types, "thread", member)
    if found is None:
        raise _lacking(types, member)
    return found


def _lacking(types: TypeTable, member: str) -> NotFoundError:
    return NotFoundError("member", f"thread.{member}", (), whose_types(types.name, types.origin))


def _places(types: TypeTable, width: int, late: bool) -> tuple[int, ...]:
    known = [offset_of(types, _SAVED_STATE, name) for name in _NAMES[width]]
    found = tuple(place for place in known if place is not None)
    if len(found) == len(known):
        return found
    if not late or types.has("machine_thread"):
        raise _lacking(types, "machine.iss->uss")
    return _PLACES[width]
